"""
Build the demo's corpus: the source texts of the standard library of the Python that runs this.

    python data/demo_corpus.py [FOLDER]        # default: data/stdlib-VERSION beside this script

Each text is a document: its UTF-8 bytes as ids 0-255, opened by BOS = 256. Every 16th module is held out
for validation, cut at 2,048 bytes, so that a short validation covers most of them. Not included are tests
(many distributions lack them), installed packages, and generated tables (character maps, help topics, build
flags). The order is shuffled, always in the same way, so that any stretch is a mixture. Needs numpy and the
standard library; shards.py beside this script writes the shards and their manifest.
"""

import argparse
import platform
import random
import sys
import sysconfig
import tokenize
from pathlib import Path

from shards import BYTES, Corpus, DataError, byte_document

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
        with Corpus(folder, "stdlib", BYTES, overwrite=True) as corpus:
            for writer, documents in ((corpus.val, held_out), (corpus.train, training)):
                shuffle(documents)
                for text in documents:
                    writer.add(byte_document(text))
            shards = corpus.publish()
        for name, shard in shards.items():
            print(f"{folder / name}: {shard['documents']} documents, {shard['tokens']:,} tokens")
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
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
