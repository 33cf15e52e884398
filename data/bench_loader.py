"""
Benchmark of the training loader in train_gpt.py: how long a step waits for its batch, and what it costs.

    python data/bench_loader.py                       # made-up documents: 4 shards of 100M tokens, 800 MB
    python data/bench_loader.py --shard-tokens 10000000
    python data/bench_loader.py --files 'data/fineweb10B/fineweb_train_*.bin'

It prints, for one rank and the microbatches of the speedrun:
- opening: from opening the first shard to its first batch, the check of all its tokens included;
- waits: how long next_batch() took in steps of --step-ms across up to three shard ends, in rounds with the
  thread that works ahead and, for comparison, without it, in turn;
- throughput: batches taken as fast as they come, and how many times that is what a rank of the race takes;
- memory: the most that the process held, beyond what it held at the start, in shards.

A sleep stands for the training step. Memory is the process's own, without the system's cache of files.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402

RACE_TOKENS_PER_SECOND = 500_000  # of a rank on 8 GPUs: 49,152 tokens in about 96 ms
STEPS_AROUND_END = 20  # before a shard's end, and as many after it


def write_shards(folder: Path, shards: int, tokens: int, s: train_gpt.Settings) -> None:
    """Made-up shards of `tokens` tokens: random ids, in documents of about 600, a few of over 5,000."""
    rng = np.random.default_rng(0)
    for number in range(shards):
        header = np.zeros(256, dtype="<i4")
        header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, tokens
        with open(folder / f"made_up_{number:06d}.bin", "wb") as file:
            file.write(header.tobytes())
            for first in range(0, tokens, 1 << 20):  # in parts, so that it costs no memory
                ids = rng.integers(0, s.bos_id, min(tokens - first, 1 << 20), dtype=np.uint16)
                starts = rng.lognormal(6.0, 0.9, len(ids) // 100 + 1).astype(np.int64).cumsum()
                ids[0] = ids[starts[starts < len(ids)]] = s.bos_id
                file.write(ids.tobytes())


def resident_bytes() -> int:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Bench:
    """One rank's loader over open shards."""

    def __init__(self, shards: list[train_gpt.TokenShard], s: train_gpt.Settings):
        self.shards, self.s = shards, s
        self.batch = train_gpt.BatchPlan(1, s.batch_tokens // s.microbatches, 1, 1)

    def loader(self, ahead: int) -> train_gpt.TrainLoader:
        # A plan of nothing: how many pieces a microbatch may have is taken from the documents instead.
        most_pieces = self.batch.microbatch_tokens // 16
        use = train_gpt.DataUse(0, 0, 0, most_pieces, 1)
        device = train_gpt.choose_device(self.s, train_gpt.World(0, 1, 0, 1))[0]
        return train_gpt.TrainLoader(self.shards, self.s, self.batch, use, 0, device, batches_ahead=ahead)

    def before_end(self, shard: int) -> tuple[int, int]:
        """The position some steps before a shard's end."""
        kept = np.minimum(np.diff(self.shards[shard].index()), self.s.max_piece_tokens)
        tokens_left = kept[::-1].cumsum()[::-1]
        enough = STEPS_AROUND_END * (self.batch.microbatch_tokens + 1)
        if tokens_left[0] < enough:
            raise train_gpt.UserError(f"{self.shards[shard].path}: expected documents for {enough:,} "
                                      f"tokens of batches, found {tokens_left[0]:,}; take larger shards.")
        return shard, int(np.searchsorted(-tokens_left, -enough, side="right")) - 1

    def waits(self, loader: train_gpt.TrainLoader, step_seconds: float) -> list[float]:
        """Seconds that next_batch() took in each step around each shard end, less the first after a jump."""
        found = []
        for shard in range(min(3, len(self.shards) - 1)):
            loader.seek(self.before_end(shard))
            for step in range(2 * STEPS_AROUND_END):
                start = time.perf_counter()
                batch = loader.next_batch()
                found += [time.perf_counter() - start] * (step > 0)
                time.sleep(step_seconds)
                del batch  # with its step, as in training
            if loader.position[0] != shard + 1:
                raise RuntimeError(f"the steps did not cross the end of {self.shards[shard].path}")
        return found


def milliseconds(seconds: list[float]) -> str:
    return f"median {1000 * statistics.median(seconds):.3f} ms, worst {1000 * max(seconds):.3f} ms"


def run(paths: list[Path], step_ms: float, rounds: int, s: train_gpt.Settings) -> None:
    if len(paths) < 2:
        raise train_gpt.UserError("shards: expected at least 2, so that one ends before another begins, "
                                  f"found {len(paths)}; take more.")
    baseline = resident_bytes()
    start = time.perf_counter()
    bench = Bench([train_gpt.TokenShard(paths[0], s)], s)
    loader = bench.loader(ahead=4)
    loader.next_batch()
    opening = time.perf_counter() - start
    first = bench.shards[0].num_tokens
    print(f"opening: {opening:.3f} s to the first batch of a shard of {first:,} tokens")

    bench = Bench([train_gpt.TokenShard(path, s) for path in paths], s)
    for shard in bench.shards:
        shard.index()
    waits = {"ahead": [], "without": []}
    for _ in range(rounds):
        for name, ahead in (("ahead", 4), ("without", 0)):
            waits[name] += bench.waits(bench.loader(ahead), step_ms / 1000)
    for name, found in waits.items():
        print(f"waits, thread {name}: {milliseconds(found)}, in {len(found)} steps of {step_ms:g} ms")
    ratio = statistics.median(waits["without"]) / statistics.median(waits["ahead"])
    print(f"median wait without the thread / ahead: {ratio:.0f}")

    loader, tokens = bench.loader(ahead=4), 0
    start = time.perf_counter()
    while loader.position[0] == 0 and tokens < 100_000_000:
        tokens += loader.next_batch().inputs.numel()
    rate = tokens / (time.perf_counter() - start)
    print(f"throughput: {rate / 1e6:.1f}M tokens/s in {tokens:,} tokens, "
          f"{rate / RACE_TOKENS_PER_SECOND:.0f} times the race's {RACE_TOKENS_PER_SECOND:,} a rank")

    largest = 2 * max(shard.num_tokens for shard in bench.shards)
    used = resident_bytes() - baseline
    print(f"memory: {used / 2**20:.0f} MiB beyond the start's {baseline / 2**20:.0f} MiB, "
          f"{used / largest:.2f} times the largest shard")


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--files", help="pattern of shards to read instead of made-up ones")
    parser.add_argument("--shards", type=int, default=4, help="made-up shards (default 4)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="in each (default 100,000,000)")
    parser.add_argument("--step-ms", type=float, default=60, help="length of a step in ms (default 60)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds with and without thread (default 2)")
    args = parser.parse_args()
    try:
        s = train_gpt.Settings()
        if args.files:
            shards = train_gpt.open_shards(replace(s, train_files=args.files), "train_files")
            run([shard.path for shard in shards], args.step_ms, args.rounds, s)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), args.shards, args.shard_tokens, s)
            run(sorted(Path(folder).iterdir()), args.step_ms, args.rounds, s)
        return 0
    except (train_gpt.UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
