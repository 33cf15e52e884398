"""
Measure data/tokenize_text.py: MB of text per second, from the start of the process to its end.

    python tests/bench/bench_tokenize.py [FILE...] [--tokenizer gpt2] [--megabytes 128] [--workers 1 2]

Without FILE it makes a .jsonl file of made-up words, the same ones each time. Numbers of workers take turns,
so that other work on the machine affects all of them. Printed are median, least and most over --repeats runs.
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
    written = 0
    with open(path, "w") as file:
        while written < megabytes * 1e6:
            text = " ".join(rng.choices(words, weights, k=rng.randrange(1, 1000)))
            written += len(text)
            file.write(json.dumps({"text": text}) + "\n")


def seconds(files: list[str], tokenizer: str, workers: int) -> float:
    """Time of one run. Raises SystemExit with the message of a run that fails."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", f"{folder}/out", "--tokenizer", tokenizer, "--workers", str(workers)]
        start = time.perf_counter()
        done = subprocess.run([sys.executable, SCRIPT, *files, *options], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes")
    parser.add_argument("--megabytes", type=float, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.files:
            args.files = [f"{folder}/text.jsonl"]
            write_text(Path(args.files[0]), args.megabytes)
        megabytes = sum(Path(file).stat().st_size for file in args.files) / 1e6
        speeds = {workers: [] for workers in args.workers}
        for _ in range(args.repeats):
            for workers, found in speeds.items():
                found.append(megabytes / seconds(args.files, args.tokenizer, workers))
    for workers, found in speeds.items():
        print(f"{args.tokenizer}, {workers} workers: {statistics.median(found):.1f} MB/s "
              f"({min(found):.1f} to {max(found):.1f}, {len(found)} runs)")


if __name__ == "__main__":
    main()
