# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Build the demo's corpus from the source code of the standard library of the Python that runs this script.

    python data/demo_corpus.py FOLDER

The tokens are UTF-8 bytes, 0 to 255, and BOS = 256. Each module is cut at line ends into documents of 640
bytes or a little more. The modules in HELD_OUT are for validation. Tests are left out, because many
distributions do not have them, and so are installed packages and generated tables. Documents stand in the
order of their hashes, so that one build of Python always gives the same corpus, and other versions nearly the
same.
"""

import argparse
import hashlib
import sys
import sysconfig
import tokenize
from pathlib import Path

from shards import DataError, best_effort_console, byte_document, new_corpus

# Every second of the modules of 1,000 to 30,000 bytes that are the same, byte for byte, in CPython 3.10.13,
# 3.11.7, 3.12.1 and 3.13.0: these validate on the same tokens in the same order.
HELD_OUT = set("""
    _markupbase _sitebuiltins asyncio/protocols curses/__init__ email/_encoded_words html/__init__
    idlelib/autoexpand idlelib/codecontext idlelib/format idlelib/mainmenu idlelib/pyparse
    idlelib/squeezer idlelib/zoomheight importlib/metadata/_functools json/scanner
    multiprocessing/dummy/connection multiprocessing/popen_forkserver multiprocessing/reduction nturl2path
    pyclbr this tkinter/constants tkinter/dnd tkinter/messagebox tracemalloc turtledemo/clock
    turtledemo/forest turtledemo/lindenmayer turtledemo/nim turtledemo/peace turtledemo/planet_and_moon
    turtledemo/round_dance turtledemo/tree unittest/_log unittest/suite urllib/error urllib/robotparser
    xml/dom/__init__ xml/dom/minicompat xml/etree/__init__ xml/sax/saxutils""".split())
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# A microbatch of the demo takes 641 tokens (640 inputs and the last target), and the loader drops the rest of
# the document in which it ends. With documents of 641 tokens and a few more, that is half a line.
DOCUMENT_BYTES = 640

def cut_at_line_ends(text: bytes, size: int) -> list[bytes]:
    """Split a text at the first line end after each `size` bytes. The last part may be shorter."""
    parts, part = [], b""
    for line in text.splitlines(keepends=True):
        part += line
        if len(part) >= size:
            parts.append(part)
            part = b""
    return [*parts, part] if part else parts

def read_source(path: Path) -> bytes:
    """A source file as UTF-8, whatever encoding it declares; empty if it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read().encode("utf-8")
    except (SyntaxError, UnicodeError):
        return b""

def standard_library(root: Path) -> tuple[list[bytes], list[bytes]]:
    """The source code of all modules below a folder, in the order of their paths: training, validation."""
    training, validation = [], []
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("")
        if LEFT_OUT & set(module.parts) or path.name.startswith("_sysconfigdata"):
            continue
        source = read_source(path)
        if source:
            (validation if module.as_posix() in HELD_OUT else training).append(source)
    return training, validation

@best_effort_console()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for the shards")
    folder, root = parser.parse_args().folder, Path(sysconfig.get_paths()["stdlib"])
    training, validation = standard_library(root)
    if not (training and validation):
        print(f"{root}: expected the source code of the standard library, found {len(training)} modules to "
              f"train on and {len(validation)} to validate on; use a Python that includes it.",
              file=sys.stderr)
        return 1
    try:
        with new_corpus(folder, "stdlib", overwrite=True) as writers:
            for writer, part in zip(writers, (training, validation)):
                documents = [text for module in part for text in cut_at_line_ends(module, DOCUMENT_BYTES)]
                documents.sort(key=lambda text: hashlib.sha256(text).digest())
                for text in documents:
                    writer.add(byte_document(text))
                print(f"{writer.stem}: {writer.documents:,} documents, {writer.tokens:,} tokens")
    except (DataError, OSError) as error:
        print(f"{folder}: cannot write the demo's shards here: {error}; set DATA_PATH to a folder where you "
              "may write.", file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
