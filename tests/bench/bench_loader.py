# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
How long a training step waits for its batch, across the ends of shards.

    python tests/bench/bench_loader.py [--shard-tokens 100000000] [--step-ms 60]

It writes three shards of made-up documents, plans 8-rank steps of the speedrun over all of them, and takes
one rank's batches. A sleep stands for the training step. It prints how long planning took (every token is
read and checked), how long next(batches) took in the steps, and the tokens a second without the sleep.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt

WORLD_SIZE = 8


def write_shard(path: Path, num_tokens: int, bos_id: int) -> None:
    """A shard of random ids, in documents of about 600 tokens and a few of over 5,000."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, bos_id, num_tokens, dtype=np.uint16)
    starts = rng.lognormal(6.0, 0.9, num_tokens // 100).astype(np.int64).cumsum()
    tokens[0] = tokens[starts[starts < num_tokens]] = bos_id
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, num_tokens
    with open(path, "wb") as file:
        file.writelines([header, tokens])


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shard-tokens", type=int, default=100_000_000)
    parser.add_argument("--step-ms", type=float, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            write_shard(Path(folder) / f"{number}.bin", args.shard_tokens, train_gpt.Settings.bos_id)
        steps = int(3 * args.shard_tokens * 0.7) // train_gpt.Settings.batch_tokens[0]  # a third is dropped
        s = replace(train_gpt.Settings(), train_files=f"{folder}/*.bin", num_iterations=steps)
        begun = time.perf_counter()
        schedule = train_gpt.make_schedule(s)
        plan = train_gpt.plan_packing(train_gpt.open_shards(s, "train_files"), s, schedule, WORLD_SIZE)
        print(f"planning: {time.perf_counter() - begun:.2f} s\n{plan.summary}")
        for name, seconds in (("steps", args.step_ms / 1000), ("no sleep", 0.0)):
            numbers = train_gpt.microbatches_of_rank(plan, 0, 0, WORLD_SIZE)
            batches = train_gpt.train_batches(plan, numbers, torch.device("cpu"))
            waits, begun = [], time.perf_counter()
            for _ in range(steps):
                start = time.perf_counter()
                next(batches)
                waits.append(1000 * (time.perf_counter() - start))
                time.sleep(seconds)
            rate = steps * s.batch_tokens[0] / WORLD_SIZE / (time.perf_counter() - begun) / 1e6
            print(f"{name}: next(batches) took {statistics.median(waits[1:]):.3f} ms in the median, at most "
                  f"{max(waits[1:]):.3f} ms in {steps - 1} steps, {rate:.1f}M tokens a second")


if __name__ == "__main__":
    main()
