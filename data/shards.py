"""
Token shards: the files that train_gpt.py reads, and how the tools in this folder write them. Needs numpy.

A shard is a header of 256 little-endian int32 words (20240520, version 1, number of tokens, zeros), followed
by the tokens as uint16. Every document begins with the tokenizer's BOS. A folder holds one corpus:
NAME_train_000001.bin, NAME_train_000002.bin, ... and NAME_val_000000.bin, ...
"""

import contextlib
import fcntl
import filecmp
import os
import re
import shutil
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
SHARD_TOKENS = 100_000_000  # as in FineWeb's shards
BYTES_BOS = 256  # where the other ids are bytes


class DataError(Exception):
    """An error that the user can correct: printed as one sentence, without a traceback."""


def byte_document(text: bytes) -> np.ndarray:
    """BOS and the bytes of a text, uint16 [1 + len(text)]."""
    return np.insert(np.frombuffer(text, np.uint8).astype("<u2"), 0, BYTES_BOS)


class ShardWriter:
    """Writes documents, in order, to the shards STEM_000001.bin, STEM_000002.bin, ... of a folder.

    A shard holds at most `limit` tokens. Documents are not split, because the loader would skip a part that
    does not begin with BOS; a document longer than `limit` gets a shard of its own.
    """

    def __init__(self, folder: Path, stem: str, first: int, limit: int):
        self.folder, self.stem, self.number, self.limit = folder, stem, first, limit
        self.file, self.shard_tokens = None, 0  # the shard being written
        self.documents, self.tokens = 0, 0  # in all shards

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, uint16, BOS first. Raises OSError."""
        if self.shard_tokens + len(tokens) > self.limit:
            self.finish()
        if self.file is None:
            self.file = open(self.folder / f"{self.stem}_{self.number:06d}.bin", "wb", 1 << 20)
            self.file.write(bytes(4 * HEADER_WORDS))  # overwritten when the count is known
        self.file.write(np.ascontiguousarray(tokens, dtype="<u2"))
        self.shard_tokens += len(tokens)
        self.tokens += len(tokens)
        self.documents += 1

    def finish(self) -> None:
        """Write the header of the current shard, if there is one, and close it. Raises OSError."""
        if self.file is None:
            return
        header = np.zeros(HEADER_WORDS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.shard_tokens
        with self.file as file:
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())  # a power cut after the rename must not leave an empty file
        self.file, self.shard_tokens, self.number = None, 0, self.number + 1


@contextlib.contextmanager
def new_corpus(folder: Path, name: str, limit: int = SHARD_TOKENS, overwrite: bool = False):
    """Yield two ShardWriters (train, val); publish their shards at the end of the `with` block.

    Until then the shards are in the hidden folder `.partial`. After an exception the folder is as it was;
    what a killed process leaves in `.partial` is removed by the next one. Writers of one folder take turns.
    Raises OSError, and DataError if the folder holds shards and `overwrite` is not set, or another corpus.
    """
    made_here = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging, lock = folder / ".partial", os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        check_free(folder, name, overwrite)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        train, val = (ShardWriter(staging, f"{name}_{split}", first, limit)
                      for split, first in (("train", 1), ("val", 0)))
        yield train, val
        train.finish()
        val.finish()
        publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if made_here:
            with contextlib.suppress(OSError):  # not empty: the corpus is there
                folder.rmdir()
        os.close(lock)


def shard_names(folder: Path) -> list[str]:
    """Names of all shards in a folder, training first."""
    return sorted(name for name in os.listdir(folder) if re.fullmatch(r".+_(train|val)_\d+\.bin", name))


def check_free(folder: Path, name: str, overwrite: bool) -> None:
    """Raise DataError if the shards of a corpus called `name` must not be written to the folder."""
    for found in shard_names(folder):
        if not found.startswith((f"{name}_train_", f"{name}_val_")):
            raise DataError(f"{folder}: expected a folder without another corpus, found {found}; choose "
                            "another folder.")
        if not overwrite:
            raise DataError(f"{folder}: expected a folder without shards, found {found}; choose another "
                            "folder, or add --overwrite to replace them.")


def publish(staging: Path, folder: Path) -> None:
    """Replace the folder's shards by those in `staging`, unless they are the same. Raises OSError.

    Validation shards are removed first and added last. No run starts without them, so that none can start on
    a mixture of two corpora if this process is killed.
    """
    old, new = shard_names(folder), shard_names(staging)
    if old == new == filecmp.cmpfiles(staging, folder, new, shallow=False)[0]:
        return  # a run may be reading them
    for name in reversed(old):
        (folder / name).unlink()
    for name in new:
        os.replace(staging / name, folder / name)
