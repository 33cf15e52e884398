"""
Token shards and their manifest, as every tool in this folder that makes a corpus writes them. Needs numpy.

A shard is 256 little-endian int32 words of header (20240520, version 1, number of tokens, zeros) and then the
tokens as uint16; every document opens with the tokenizer's BOS. NAME_train_000001.bin, NAME_train_000002.bin,
... and NAME_val_000000.bin, ... lie in one folder, with a manifest of this form beside them:

    {"format": 1, "tokenizer": "bytes", "vocab_size": 257, "bos_id": 256,
     "shards": {"text_train_000001.bin": {"documents": 12, "tokens": 3456, "sha256": "..."}, ...}}

A folder holds one corpus. It is written in a hidden folder within, and moved into place when it is whole.
Whatever kills a writer before that leaves the folder as it was but for the hidden one, which the next writer
removes. Validation shards go out first and come in last, since no run starts without them: a writer that is
killed between two of its last renames leaves a folder without them, and never a mixture of two corpora.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC, VERSION, HEADER_WORDS = 20240520, 1, 256
SHARD_TOKENS = 100_000_000  # of FineWeb's shards
MOST_TOKENS = 2**31 - 1  # the header counts in int32
MANIFEST, MANIFEST_FORMAT = "manifest.json", 1
STAGING = ".shards-"  # what the hidden folder's name begins with
BLOCK_BYTES = 1 << 20


class DataError(Exception):
    """Something that the person who makes a corpus can put right: one sentence, no traceback, exit code 1."""


class Tokenizer(NamedTuple):
    name: str
    vocab_size: int  # ids that may occur, BOS included
    bos_id: int


BYTES = Tokenizer("bytes", 257, 256)
GPT2 = Tokenizer("gpt2", 50_257, 50_256)


def byte_document(text: bytes) -> np.ndarray:
    """BOS and the bytes of a text, uint16 [1 + len(text)]."""
    tokens = np.empty(1 + len(text), dtype="<u2")
    tokens[0] = BYTES.bos_id
    tokens[1:] = np.frombuffer(text, np.uint8)
    return tokens


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path):
    """Holds the folder's lock while the body runs, where its file system has locks (some have none)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove the hidden folders of writers that were killed: those whose lock nobody holds."""
    for left in folder.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):  # it is gone, its writer lives, or nobody can tell
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(handle)


class ShardWriter:
    """Writes documents, in order, as the shards STEM_000001.bin, ... of a folder, in constant memory.

    A document is never cut, since a loader that starts at each BOS would lose the rest: a shard ends before
    the document that would take it beyond `limit` tokens. One that is longer by itself is a shard of its own.
    """

    def __init__(self, folder: Path, stem: str, first: int, limit: int):
        self.folder, self.stem, self.number, self.limit = folder, stem, first, limit
        self.file, self.tokens, self.documents = None, 0, 0  # of the shard that is being written
        self.finished = {}  # by file name: documents, tokens, sha256

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, uint16 [its BOS and tokens]. Raises OSError; DataError for 2^31 and more."""
        if len(tokens) > MOST_TOKENS:
            raise DataError(f"A document: expected at most {MOST_TOKENS:,} tokens, which a shard can hold, "
                            f"found {len(tokens):,}; split it.")
        if self.tokens and self.tokens + len(tokens) > self.limit:
            self.finish_shard()
        if self.file is None:
            self.file = open(self.folder / f"{self.stem}_{self.number:06d}.bin", "wb", BLOCK_BYTES)
            self.file.write(bytes(4 * HEADER_WORDS))  # the count follows
        self.file.write(np.ascontiguousarray(tokens, dtype="<u2"))
        self.tokens += len(tokens)
        self.documents += 1

    def finish_shard(self) -> None:
        """Complete the shard that is being written, if any, with its header. Raises OSError."""
        if self.file is None:
            return
        header = np.zeros(HEADER_WORDS, dtype="<i4")
        header[:3] = MAGIC, VERSION, self.tokens
        with self.file as file:
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())  # a rename may otherwise outlive a power cut that the tokens do not
        path = Path(self.file.name)
        self.finished[path.name] = dict(documents=self.documents, tokens=self.tokens, sha256=sha256(path))
        self.file, self.tokens, self.documents, self.number = None, 0, 0, self.number + 1

    def abandon(self) -> None:
        """Close the file of an unfinished shard, whatever becomes of its last bytes."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()


class Corpus:
    """The shards of one corpus on their way into a folder; a context in which `train` and `val` are written.

    Leaving the context without `publish` leaves the folder as it was. Of several writers at once, each has a
    hidden folder of its own, and they publish one after another. Raises OSError where the folder cannot be
    written, and DataError where it holds a corpus already, unless that has this name and `overwrite` is set.
    """

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, *, shard_tokens: int = SHARD_TOKENS,
                 overwrite: bool = False):
        self.folder, self.name, self.tokenizer = folder, name, tokenizer
        self.shard_tokens, self.overwrite = shard_tokens, overwrite

    def __enter__(self) -> "Corpus":
        self.made_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):  # so that nobody takes the new folder for a leftover before it is locked
            self.check_free()
            remove_leftovers(self.folder)
            self.staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.folder))
            self.alive = os.open(self.staging, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(self.alive, fcntl.LOCK_EX)
        self.train = ShardWriter(self.staging, f"{self.name}_train", 1, self.shard_tokens)
        self.val = ShardWriter(self.staging, f"{self.name}_val", 0, self.shard_tokens)
        return self

    def __exit__(self, *exception) -> None:
        self.train.abandon()
        self.val.abandon()
        shutil.rmtree(self.staging, ignore_errors=True)
        os.close(self.alive)
        if self.made_folder:
            with contextlib.suppress(OSError):  # it is not empty, and so of use
                self.folder.rmdir()

    def present(self, split: str = "train|val") -> list[str]:
        """Names of the shards that the folder holds, whatever their corpus."""
        return sorted(n for n in os.listdir(self.folder) if re.fullmatch(rf".+_({split})_\d{{6,}}\.bin", n))

    def check_free(self) -> None:
        """Raises DataError where the folder must not be written."""
        found = self.present()
        others = [name for name in found if not re.match(rf"{re.escape(self.name)}_(train|val)_", name)]
        if others:
            raise DataError(f"{self.folder}: expected a folder without another corpus, found {others[0]}; "
                            "choose another folder.")
        found += [MANIFEST] * (self.folder / MANIFEST).exists()
        if found and not self.overwrite:
            raise DataError(f"{self.folder}: expected a folder without shards, found {found[0]}; choose "
                            "another folder, or add --overwrite to replace them.")

    def publish(self) -> dict:
        """Put shards and manifest in place, and return the manifest's `shards`, training first.

        Shards of an earlier corpus of this name go. Where the very same corpus is there already it stays
        untouched, so that a run that is about to read it finds it. Raises OSError and DataError.
        """
        self.train.finish_shard()
        self.val.finish_shard()
        shards = self.train.finished | self.val.finished
        content = dict(format=MANIFEST_FORMAT, tokenizer=self.tokenizer.name,
                       vocab_size=self.tokenizer.vocab_size, bos_id=self.tokenizer.bos_id, shards=shards)
        with open(self.staging / MANIFEST, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with locked(self.folder):
            self.check_free()  # again: another writer may have published meanwhile
            if not self.is_there(shards):
                for old in [*self.present("val"), MANIFEST, *self.present("train")]:
                    (self.folder / old).unlink(missing_ok=True)
                for new in [*self.train.finished, MANIFEST, *self.val.finished]:
                    os.replace(self.staging / new, self.folder / new)
        return shards

    def is_there(self, shards: dict) -> bool:
        """Whether the folder holds these very shards and their manifest."""
        try:
            same_manifest = (self.folder / MANIFEST).read_bytes() == (self.staging / MANIFEST).read_bytes()
            return (same_manifest and self.present() == sorted(shards)
                    and all(sha256(self.folder / name) == shard["sha256"] for name, shard in shards.items()))
        except OSError:
            return False
