"""
Build the demo's corpus: the source texts of the standard library of the Python that runs this.

    python data/demo_corpus.py [FOLDER]        # default: data/stdlib-VERSION beside this script

Each text is a document: its UTF-8 bytes as ids 0-255, opened by BOS = 256. Every 16th module is held out
for validation, cut at 2,048 bytes, so that a short validation covers most of them. Not included are tests
(many distributions lack them), installed packages, and generated tables (character maps, help topics, build
flags). The order is shuffled, always in the same way, so that any stretch is a mixture. Needs numpy and the
standard library; the shard format is described in train_gpt.py.
"""

import argparse
import os
import platform
import random
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np

BOS = 256
HELD_OUT = 16
HELD_OUT_BYTES = 2048
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def read_source(path: Path) -> bytes | None:
    """A source file as UTF-8 bytes, whatever encoding it declares; None where it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read().encode("utf-8")
    except (SyntaxError, UnicodeError):
        return None


def standard_library() -> dict[str, bytes]:
    """Source texts by path below the library's folder, in path order, empty ones left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(
        path.relative_to(root) for path in root.rglob("*.py") if not path.name.startswith("_sysconfigdata")
    )
    texts = {name.as_posix(): read_source(root / name) for name in names if not LEFT_OUT & set(name.parts)}
    return {name: text for name, text in texts.items() if text}


def write_shard(path: Path, documents: list[bytes]) -> int:
    """Write a token shard atomically; returns its number of tokens."""
    tokens = np.concatenate([np.concatenate(([BOS], np.frombuffer(text, np.uint8))) for text in documents])
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)  # magic, version, number of tokens
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype("<u2").tobytes())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return len(tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(__file__).resolve().parent / f"stdlib-{platform.python_version()}",
    )
    folder = parser.parse_args().folder
    texts = list(standard_library().values())
    if len(texts) < 2 * HELD_OUT:
        print(
            f"{sysconfig.get_paths()['stdlib']}: expected the standard library's source texts, found "
            f"{len(texts)}; use a Python that carries them.",
            file=sys.stderr,
        )
        return 1
    held_out = [text[:HELD_OUT_BYTES] for text in texts[::HELD_OUT]]
    training = [text for i, text in enumerate(texts) if i % HELD_OUT]
    shuffle = random.Random(0).shuffle
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, documents in (
            ("val_000000", held_out),
            ("train_000001", training),
        ):  # training last: it says done
            shuffle(documents)
            count = write_shard(folder / f"stdlib_{name}.bin", documents)
            print(f"{folder / f'stdlib_{name}.bin'}: {len(documents)} documents, {count:,} tokens")
    except OSError as error:
        print(
            f"{error.filename or folder}: cannot write the demo's shards here: {error.strerror}; "
            "set DATA_PATH to a folder where you may write.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
