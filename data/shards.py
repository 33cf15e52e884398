"""
Token shards: the files that train_gpt.py reads, and how the tools in this folder write them. Needs numpy.

A shard is a header of 256 little-endian int32 words (20240520, version 1, number of tokens, zeros), followed
by the tokens as uint16. Every document begins with the tokenizer's BOS. A folder holds one corpus:
NAME_train_000001.bin, NAME_train_000002.bin, ... and NAME_val_000000.bin, ...
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
SHARD_TOKENS = 100_000_000  # as in FineWeb's shards
BYTES_BOS = 256  # where the other ids are bytes

class DataError(Exception):
    """An error that the user can correct: printed as one sentence, without a traceback."""

class Console(io.FileIO):
    """The file under stdout or stderr of a tool that makes files: what it does not take is dropped."""
    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)  # None: a pipe that does not block is full
        except OSError:
            return len(data)

@contextlib.contextmanager
def best_effort_console():
    """What is printed in here may fail, as in train_gpt.py: the work goes on."""
    def open_console(stream, errors: str):
        if stream is None:  # the process was started without one
            return open(os.devnull, "w")
        try:
            file = Console(stream.fileno(), "w", closefd=False)
        except OSError:  # no file, as in a notebook
            return stream
        return io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, errors, line_buffering=True)

    streams = sys.stdout, sys.stderr
    sys.stdout = open_console(sys.stdout, "replace")
    sys.stderr = open_console(sys.stderr, "backslashreplace")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams

def byte_document(text: bytes) -> np.ndarray:
    """BOS and the bytes of a text, uint16 [1 + len(text)]."""
    return np.insert(np.frombuffer(text, np.uint8).astype("<u2"), 0, BYTES_BOS)

class ShardWriter:
    """Writes documents, in order, to the shards STEM_000001.bin, STEM_000002.bin, ... of a folder.

    A shard holds at most SHARD_TOKENS tokens. Documents are not split, because the loader would skip a part
    that does not begin with BOS; a document longer than SHARD_TOKENS gets a shard of its own.
    """
    def __init__(self, folder: Path, stem: str, first: int):
        self.folder, self.stem, self.number = folder, stem, first
        self.documents, self.tokens = 0, 0  # in all shards
        self.start_shard()

    def start_shard(self) -> None:
        self.shard_tokens = 0
        self.buffer = bytearray(4 * HEADER_WORDS)  # what is not in the file yet: space for the header, tokens

    @property
    def path(self) -> Path:
        return self.folder / f"{self.stem}_{self.number:06d}.bin"

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, uint16, BOS first. Raises OSError."""
        if self.shard_tokens + len(tokens) > SHARD_TOKENS:
            self.finish()
        self.buffer += tokens.astype("<u2").tobytes()
        self.shard_tokens += len(tokens)
        self.tokens += len(tokens)
        self.documents += 1
        if len(self.buffer) > 1 << 20:
            self.flush()

    def flush(self) -> None:
        with open(self.path, "ab") as file:
            file.write(self.buffer)
        self.buffer = bytearray()

    def finish(self) -> None:
        """Complete the shard that has been filled so far, unless it is empty. Raises OSError."""
        if not self.shard_tokens:
            return
        self.flush()
        header = np.array([MAGIC, VERSION, self.shard_tokens], "<i4")
        with open(self.path, "r+b") as file:
            file.write(header.tobytes())
        self.number += 1
        self.start_shard()

def remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()

def shard_names(folder: Path) -> list[str]:
    """Names of the shards in a folder, training first."""
    return sorted(path.name for path in folder.glob("*.bin"))

@contextlib.contextmanager
def new_corpus(folder: Path, name: str, overwrite: bool = False):
    """Yield two ShardWriters (train, val), whose shards are in the folder when the `with` block has ended.

    Until then they are in a folder `unfinished-*` inside it, which an exception in the block removes. Raises
    OSError, and DataError if the folder holds another corpus, or shards of this one and not `overwrite`, also
    those that another process has written in the meantime. With `overwrite`, processes that write the same
    corpus at once do no harm: they replace files by equal ones.
    """
    def check_folder():
        for found in shard_names(folder):
            if not (overwrite and found.startswith((f"{name}_train_", f"{name}_val_"))):
                raise DataError(f"{folder}: expected a folder without shards, found {found}; choose another "
                                f"folder, or add --overwrite, which replaces only {name}_*.bin.")

    check_folder()
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(remove_if_empty, folder)
        unfinished = stack.enter_context(tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder))
        train = ShardWriter(Path(unfinished), f"{name}_train", first=1)
        val = ShardWriter(Path(unfinished), f"{name}_val", first=0)
        yield train, val
        train.finish()
        val.finish()
        check_folder()
        new = shard_names(Path(unfinished))
        for shard in set(shard_names(folder)) - set(new):
            (folder / shard).unlink(missing_ok=True)
        for shard in new:
            os.replace(Path(unfinished, shard), folder / shard)
