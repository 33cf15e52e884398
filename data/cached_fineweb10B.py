# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Fetch FineWeb as GPT-2 tokens: the validation shard and the first N training shards of 100M tokens each.

    python data/cached_fineweb10B.py [N]

N is 1 to 103; 10, the default, is what the speedrun needs. ./run.sh --dry-run says what another run needs.
A shard is 200 MB. The shards go to data/fineweb10B below DATA_PATH, or below this checkout. A shard gets its
name when its SHA-256 was found correct. Whole shards are kept: after an interruption, or for a larger N, run
this again. The first run notes the commit of the dataset in revision.txt beside the shards, and later runs
fetch from that commit. Needs huggingface_hub, whose settings apply (HF_ENDPOINT for a mirror, HF_TOKEN,
proxies).
"""

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from shards import HEADER_WORDS, MAGIC, VERSION, DataError, best_effort_console

REPOSITORY = "kjj0/fineweb10B-gpt2"
NUM_SHARDS = 103  # training shards in the repository


def shard_problem(path: Path) -> str:
    """What is wrong with a shard's header or size; empty if nothing is. Raises OSError."""
    header = np.fromfile(path, "<i4", count=HEADER_WORDS)
    if len(header) < HEADER_WORDS or header[:2].tolist() != [MAGIC, VERSION]:
        return f"expected a header with {MAGIC} and version {VERSION}, found {header[:2].tolist()}"
    expected, found = 4 * HEADER_WORDS + 2 * int(header[2]), path.stat().st_size
    return "" if found == expected else f"expected {expected:,} bytes as the header says, found {found:,}"


def fetch_shard(folder: Path, name: str, revision: str, sha256: str) -> None:
    """Download one file, check it, and move it into the folder. Raises DataError and the hub's exceptions."""
    from huggingface_hub import hf_hub_download

    part = Path(hf_hub_download(
        REPOSITORY, name, repo_type="dataset", revision=revision, local_dir=folder / ".partial"))
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        part.unlink()
        raise DataError(f"{name}: expected SHA-256 {sha256} as the hub says, found {digest.hexdigest()}; run "
                        "this again.")
    os.replace(part, folder / name)


def fetch_shards(folder: Path, names: list[str]) -> None:
    """Fetch the named shards. Raises DataError and the hub's exceptions."""
    from huggingface_hub import HfApi

    pinned = folder / "revision.txt"
    revision = pinned.read_text(encoding="utf-8").strip() if pinned.exists() else "main"
    info = HfApi().dataset_info(REPOSITORY, revision=revision, files_metadata=True)
    files = {file.rfilename: file.lfs for file in info.siblings if file.lfs}
    for name in names:
        if name not in files:
            raise DataError(f"{name}: expected it in {REPOSITORY} at {revision}, found no such file.")
    needed, free = sum(files[name].size for name in names), shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{folder}: expected {needed / 1e6:,.1f} MB of free disk space, found "
                        f"{free / 1e6:,.1f} MB; make room, or set DATA_PATH to another disk.")
    pinned.write_text(info.sha + "\n", encoding="utf-8")
    for name in names:
        fetch_shard(folder, name, info.sha, files[name].sha256)
        print(f"{name}: fetched", flush=True)
    shutil.rmtree(folder / ".partial", ignore_errors=True)


def run(folder: Path, count: int) -> None:
    """Bring the validation shard and `count` training shards into the folder. Raises DataError."""
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    missing = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            problem = shard_problem(folder / name) if (folder / name).exists() else "missing"
            missing += [name] if problem else []
            print(f"{name}: {problem or 'already there'}", flush=True)
        if missing:
            fetch_shards(folder, missing)
    except DataError:
        raise
    except Exception as error:  # the hub's client has many classes of them
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: expected to fetch {REPOSITORY} from the hub into it, found: {found}; "
                        "check the network, HF_ENDPOINT and the disk, and run this again.") from error
    print(f"{folder}: complete, with {count} training shards")


@best_effort_console()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=10, metavar="N", help="training shards (10)")
    count = parser.parse_args(arguments).count
    if not 1 <= count <= NUM_SHARDS:
        parser.error(f"N: expected 1 to {NUM_SHARDS} training shards, found {count}")
    root = Path(os.environ.get("DATA_PATH") or Path(__file__).resolve().parent.parent)
    try:
        if not root.is_dir():
            raise DataError(f"DATA_PATH: expected a folder, found none at {root}; correct it or make it.")
        run(root / "data" / "fineweb10B", count)
    except (DataError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        print("Stopped; run this again to go on from here." if stopped else error, file=sys.stderr)
        return 130 if stopped else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
