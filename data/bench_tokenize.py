"""
Measure data/tokenize_text.py: MB of text a second, from the start of the command's work to its last shard.

    python data/bench_tokenize.py [FILE...] [--megabytes 128] [--workers 1 2] [--repeats 5]

Without FILE it makes a .jsonl file of made-up English-like words, always the same ones. Runs take turns, so
that whatever else the machine does falls on all alike; printed are the medians, the least and the most, and
the median of the ratios to the first number of workers, round by round. The start of the workers counts, so
small inputs favour one. Where GPT-2's vocabulary cannot be had, `gpt2` is measured with a stand-in of about
50,000 tokens, made from the text's own words by a rule, and says so: it finds most words at once, and so is
faster than the real one.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tokenize_text
from shards import DataError

SCRIPT = Path(__file__).resolve().parent / "tokenize_text.py"
FAMILIAR, WORDS_A_DOCUMENT = 60_000, 500
STAND_IN = """
import json, pathlib, tiktoken, tiktoken.registry
from tiktoken_ext.openai_public import r50k_pat_str
words = json.loads((pathlib.Path(__file__).parent / "words.json").read_text())
ranks = {bytes([i]): i for i in range(256)}
for word in words:  # every beginning of a token is one, and so merges lead to it
    for end in range(2, len(word) + 2):
        if len(ranks) < 50_256:
            ranks.setdefault(f" {word}"[:end].encode(), len(ranks))
tiktoken.registry.ENCODINGS["gpt2"] = tiktoken.Encoding(
    "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
"""


def made_up_words(rng: random.Random) -> list[str]:
    """Words of one to four syllables, the commonest first."""
    parts = itertools.product("bcdfghlmnprstvw", "aeiou", ("", "n", "r", "s"))
    syllables = ["".join(letters) for letters in parts]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4)))) for _ in range(FAMILIAR)]


def write_text(path: Path, words: list[str], megabytes: int, rng: random.Random) -> None:
    """A .jsonl file with about `megabytes` (10^6 bytes) of text, its words as frequent as Zipf says."""
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            count = rng.randrange(1, 2 * WORDS_A_DOCUMENT)
            text = " ".join(rng.choices(words, cum_weights=weights, k=count)) + "."
            written += len(text)
            file.write(json.dumps({"text": text}) + "\n")


def measure(inputs: list[str], tokenizer: str, workers: int, env: dict) -> float:
    """MB/s of one run, as it says itself. Raises DataError with the message of one that fails."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *inputs, "--out", f"{folder}/out", "--tokenizer", tokenizer,
             "--workers", str(workers)],
            capture_output=True, text=True, env=env)
    if done.returncode:
        raise DataError(done.stderr.strip())
    return float(re.search(r"([\d.]+) MB/s", done.stdout).group(1))


def prepare_gpt2(folder: Path, words: list[str]) -> tuple[str, dict]:
    """What to call the encoding that is measured as gpt2, and the environment that has it."""
    try:
        tokenize_text.gpt2_encoding()
        return "gpt2", dict(os.environ)
    except DataError as error:
        if "package" in str(error):
            raise
    (folder / "words.json").write_text(json.dumps(words))
    (folder / "sitecustomize.py").write_text(STAND_IN)
    return "gpt2 (stand-in vocabulary)", os.environ | {"PYTHONPATH": str(folder)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="FILE")
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizers", nargs="+", choices=("bytes", "gpt2"), default=["bytes", "gpt2"])
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        words = made_up_words(rng)
        if not args.inputs:
            args.inputs = [f"{folder}/text.jsonl"]
            write_text(Path(args.inputs[0]), words, args.megabytes, rng)
        try:
            names = {"bytes": ("bytes", dict(os.environ))}
            if "gpt2" in args.tokenizers:
                names["gpt2"] = prepare_gpt2(Path(folder), words)
            cases = list(itertools.product(args.tokenizers, args.workers))
            figures = {case: [] for case in cases}
            for _ in range(args.repeats):
                for tokenizer, workers in cases:
                    speed = measure(args.inputs, tokenizer, workers, names[tokenizer][1])
                    figures[tokenizer, workers].append(speed)
        except DataError as error:
            print(error, file=sys.stderr)
            return 1
    for tokenizer in args.tokenizers:
        base = figures[tokenizer, args.workers[0]]
        for workers in args.workers:
            speeds = figures[tokenizer, workers]
            ratio = statistics.median(speed / first for speed, first in zip(speeds, base))
            print(f"{names[tokenizer][0]}, workers {workers}: {statistics.median(speeds):.1f} MB/s "
                  f"({min(speeds):.1f} to {max(speeds):.1f}, {len(speeds)} runs), "
                  f"{ratio:.2f} x workers {args.workers[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
