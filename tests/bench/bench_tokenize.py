# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Measure data/tokenize_text.py: MB of text per second, from the start of the process to its end.

    python tests/bench/bench_tokenize.py [--tokenizer gpt2 --workers 1 2 4] [--megabytes 128] [--repeats 5]

The text is made up, the same each time. Numbers of workers take turns, so that other work on the machine
affects all of them. Printed are median, least and most.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "tokenize_text.py"


def write_text(path: Path, megabytes: float) -> None:
    """A .jsonl file with about `megabytes` (10^6 bytes) of text; the words' frequencies follow Zipf's law."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            text = " ".join(rng.choices(words, weights, k=rng.randrange(1, 1000)))
            file.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes")
    parser.add_argument("--megabytes", type=float, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="for gpt2")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    speeds = {workers: [] for workers in args.workers}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(text, args.megabytes)
        for _ in range(args.repeats):
            for workers, found in speeds.items():
                command = [sys.executable, SCRIPT, text, "--out", f"{folder}/out", "--overwrite",
                           "--tokenizer", args.tokenizer, "--workers", str(workers)]
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found.append(text.stat().st_size / 1e6 / (time.perf_counter() - start))
    for workers, found in speeds.items():
        print(f"{args.tokenizer}, {workers} workers: {statistics.median(found):.1f} MB/s "
              f"({min(found):.1f} to {max(found):.1f}, {len(found)} runs)")


if __name__ == "__main__":
    main()
