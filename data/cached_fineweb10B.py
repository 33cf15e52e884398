"""
Fetch FineWeb as GPT-2 tokens: the validation shard and the first N training shards of 100M tokens each.

    python data/cached_fineweb10B.py [N]       # default 10; DATA_PATH: another root, as for train_gpt.py

Shards that are already there are kept. A shard takes 200 MB; there are 103.
"""

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = "kjj0/fineweb10B-gpt2"
NUM_SHARDS = 103
SPEEDRUN_SHARDS = 10  # nine last for about 1,697 of the speedrun's 1,705 steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "shards",
        nargs="?",
        type=int,
        default=SPEEDRUN_SHARDS,
        metavar="N",
        help=f"training shards, 1 to {NUM_SHARDS} (default {SPEEDRUN_SHARDS})",
    )
    count = parser.parse_args().shards
    if not 1 <= count <= NUM_SHARDS:
        parser.error(f"N: expected 1 to {NUM_SHARDS} shards, found {count}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        print("huggingface_hub is not installed; pip install -r requirements.txt", file=sys.stderr)
        return 1
    root = Path(os.environ.get("DATA_PATH") or Path(__file__).resolve().parent.parent)
    folder = root / "data" / "fineweb10B"
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    for i, name in enumerate(names, start=1):
        if (folder / name).exists():
            print(f"[{i}/{len(names)}] {name}: already there")
            continue
        print(f"[{i}/{len(names)}] {name}", flush=True)
        try:
            hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=folder)
        except Exception as error:  # network, disk, hub: the client has an exception for each
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(
                f"{name}: could not be fetched from {REPOSITORY}: {reason} Run this again to go on.",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
