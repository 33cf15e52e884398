# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Make token shards from your own text.

    python -m pip install -r data/requirements.txt
    python data/tokenize_text.py INPUT... --out FOLDER [--tokenizer auto|gpt2|bytes] [--val-every 100]

INPUT is a .txt file (one document), a .jsonl file (a document per line, in its field "text"), a .parquet file
(a document per row, in its column "text"), one of these with .gz, a folder of them, or an address on the
Hugging Face hub, such as hf://datasets/HuggingFaceFW/fineweb/sample/10BT, which is streamed and not stored.
Folders that are linked in a folder are read too. Each file is read once, and what is left out is printed.

Documents keep their order; empty ones are skipped, and long ones are cut into documents of 2,048 tokens (640
bytes), since training takes no more of one. --split-at TEXT also cuts wherever TEXT is, as '<|endoftext|>',
and leaves out TEXT and the line ends around it. Tokens are GPT-2's, or bytes if tiktoken or its vocabulary is
missing. One of --val-every goes to validation: whole documents, as a rule; of the first one, and of those
that are cut into more than --val-every, the beginning. Any --workers gives the same bytes.
FOLDER gets its shards when all are complete, and the command that trains on them in command.sh. A run that
fails or is interrupted adds nothing to FOLDER; one that is killed leaves a folder unfinished-* of no use.
"""

import argparse
import codecs
import glob
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

try:
    import fsspec
    import numpy as np
    from fsspec.core import OpenFile
    from fsspec.implementations.local import LocalFileSystem
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing; in the Python that trains (. .venv/bin/activate, if ./run.sh has "
             "made it), run: python -m pip install -r data/requirements.txt")
from shards import BYTES_BOS, SHARD_TOKENS, DataError, best_effort_console, byte_document, new_corpus

ROOT = Path(__file__).resolve().parent.parent
KINDS = (".txt", ".jsonl", ".parquet")
BOS = {"bytes": BYTES_BOS, "gpt2": 50_256}  # also the highest id
MOST_TOKENS = {"bytes": 641, "gpt2": 2048}  # that training takes of one document
PIECE = 1 << 18  # bytes or characters that are read and encoded at once
LAST_WORD = re.compile(r".*\S(?=\s)", re.DOTALL)  # ends where one does: no GPT-2 token crosses that place
END_OF_TEXT = "<|endoftext|>"
# What train_gpt.py's presets validate on: tokens, and tokens in one slice
VALIDATION = {"demo": (32_768, 8192), "speedrun": (10_485_760, 262_144)}

def kind_of(path: str) -> str:
    """The suffix of a file name, without .gz."""
    return Path(path.lower().removesuffix(".gz")).suffix

def walk(folder: str, known: set[str]) -> Iterator[str]:
    """All files below a folder, and below folders linked there unless they are known. Raises OSError."""
    if (real := os.path.realpath(folder)) in known:
        return
    known.add(real)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from walk(entry.path, known)
        else:
            yield entry.path

def expand(file_system, path: str) -> list[str]:
    """The file, or the files below the folder. Raises exceptions of many classes."""
    if isinstance(file_system, LocalFileSystem) and os.path.isdir(path):
        return list(walk(path, set()))
    return file_system.find(path)

def list_files(given: str):
    """The file system of an input, and the kind or "hidden" of each file there, by name, in order."""
    if "://" in given:
        file_system, path = fsspec.url_to_fs(given)
    else:  # fsspec would take "a::b" for an address
        file_system, path = LocalFileSystem(), os.path.abspath(os.path.expanduser(given))
    top, names = path, expand(file_system, path)
    if not names:
        top = re.split(r"[*?[]", path)[0].rpartition("/")[0]
        for match, info in file_system.glob(path, detail=True).items():
            names += [match] if info["type"] == "file" else expand(file_system, match) or [match]
    kinds = {name: "hidden" if "/." in name.removeprefix(top) else kind_of(name) for name in sorted(names)}
    return file_system, kinds

def describe(counts: Counter) -> str:
    return ", ".join(f"{n:,} {kind or 'without suffix'}" for kind, n in counts.most_common()) or "none"

def find_files(inputs: list[str]) -> list[OpenFile]:
    """The files that the inputs name, each once. Prints how many are read and left out. Raises DataError."""
    files, read, left_out = {}, Counter(), Counter()
    for given in inputs:
        try:
            file_system, kinds = list_files(given)
            found = describe(Counter(kinds.values()))
        except Exception as error:  # the hub's client has many classes of them
            kinds, found = {}, str(error).split("\n")[0]
        if not set(KINDS) & set(kinds.values()):
            raise DataError(f"{given}: expected files that end in {', '.join(KINDS)}, found {found}; name "
                            "another file or folder.")
        for name, kind in kinds.items():
            file = OpenFile(file_system, name, compression="infer")
            address = os.path.realpath(name) if isinstance(file_system, LocalFileSystem) else file.full_name
            if kind not in KINDS or address in files:
                left_out[f"{kind} named twice" if kind in KINDS else kind] += 1
            else:
                files[address] = file
                read[kind] += 1
    print(f"read: {describe(read)}; left out: {describe(left_out)}")
    return list(files.values())

def decode(file) -> Iterator[str]:
    """The text of a UTF-8 file, in blocks. Raises ValueError with the line of a byte that is wrong."""
    lines = 0  # that have ended
    try:
        for text in codecs.iterdecode(iter(partial(file.read, PIECE), b""), "utf-8-sig"):
            yield text
            lines += text.count("\n")
    except UnicodeDecodeError as error:
        lines += error.object.count(b"\n", 0, error.start)
        raise ValueError(f"byte 0x{error.object[error.start]:02x} in line {lines + 1:,}") from error

def blocks_of(value: object) -> list[str]:
    """A text in blocks, none for None. Raises TypeError."""
    if not isinstance(value, str | None):
        raise TypeError(f"a value of type {type(value).__name__}")
    return [value[i:i + PIECE] for i in range(0, len(value or ""), PIECE)]

def read_values(file: OpenFile, field: str) -> Iterator[Iterable[str]]:
    """The text of each line or row, or of a whole .txt, in blocks. Raises exceptions of many classes."""
    with file as stream:
        if kind_of(file.path) == ".parquet":
            import pyarrow.parquet
            for rows in pyarrow.parquet.ParquetFile(stream).iter_batches(256, columns=[field]):
                yield from (blocks_of(value.as_py()) for value in rows.column(field))
        elif kind_of(file.path) == ".jsonl":
            # a file of the hub would read many megabytes for each line
            for line in stream if hasattr(stream, "read1") else io.BufferedReader(stream, PIECE):
                yield blocks_of(json.loads(line.decode("utf-8-sig"))[field] if line.strip() else None)
        else:
            yield decode(stream)

def split(blocks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """(Text, whether a document ends) for pieces of a text of about PIECE characters; some are empty.

    The text is one document if the separator is empty.
    """
    begins, rest, line_ends = True, "", "\r\n" if separator else ""
    for block in blocks:
        *documents, rest = (rest + block).split(separator) if separator else [rest + block]
        for document in documents:
            yield document.strip(line_ends) if begins else document.rstrip(line_ends), True
            begins = True
        if begins:
            rest = rest.lstrip(line_ends)
        while len(rest) > PIECE + len(separator):  # it may end with a part of the separator
            word = LAST_WORD.match(rest, 0, PIECE)
            end = word.end() if word else PIECE
            yield rest[:end], False
            begins, rest = False, rest[end:]
    yield rest.rstrip(line_ends), True

def read_documents(files: list[OpenFile], field: str, separator: str, limit: int | None) -> Iterator[bytes]:
    """The first `limit` documents that are not empty, in order, as UTF-8, in pieces. Raises DataError."""
    documents, begun, noticed = 0, False, bool(separator)
    for file in files:
        kind, number = kind_of(file.path), 0  # lines or rows read so far
        try:
            for blocks in read_values(file, field):
                for text, ends in split(blocks, separator):
                    if text:
                        yield text.encode("utf-8")  # fails for half a surrogate pair, which JSON can hold
                        begun = True
                    if END_OF_TEXT in text and not noticed:
                        noticed = True
                        tqdm.write(f"{file.path}: {END_OF_TEXT} is learnt as text; if it separates texts, "
                                   f"add --split-at '{END_OF_TEXT}'.")
                    if ends:
                        documents, begun = documents + begun, False
                    if documents == limit:
                        return
                number += 1
        except Exception as error:
            found = "no such field" if isinstance(error, KeyError) else str(error).strip().split("\n")[0]
            unit = "row" if kind == ".parquet" else "line"
            problem = (f", {unit} {number + 1:,}: expected a text in field {field!r}, found: {found}; "
                       "correct the file or --text-field.")
            if kind == ".txt":
                problem = f": expected text in UTF-8, found: {found}; correct the file."
            raise DataError(file.path + problem) from error

def load_gpt2(required: bool):
    """tiktoken's GPT-2 encoding, or None if it is missing. Raises DataError if it is missing and required."""
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # its HTTP client has many classes of them
        remedy = "connect to the network, once, to fetch it"
        if isinstance(error, ImportError):
            remedy = "run python -m pip install -r data/requirements.txt"
        problem = (f"GPT-2 tokens: expected tiktoken and its vocabulary, found {type(error).__name__}; "
                   f"{remedy}, or use --tokenizer bytes.")
        if required:
            raise DataError(problem) from error
        print(problem)
        return None

def encode_gpt2(document: bytes, encoding) -> np.ndarray:
    """BOS and GPT-2 tokens of a document, uint16. What looks like a special token is text."""
    text = document.decode("utf-8")
    try:
        return np.array([BOS["gpt2"], *encoding.encode_ordinary(text)], "<u2")
    except BaseException as error:  # tiktoken raises one that is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"The document that begins with {text[:40]!r}: tiktoken cannot split it, probably "
                        "because of hundreds of thousands of spaces in a row; shorten them.") from None

def encode_all(documents: Iterator[bytes], encoding, workers: int) -> Iterator[np.ndarray]:
    """GPT-2 tokens of all documents, in order, from threads: tiktoken releases the GIL."""
    with ThreadPoolExecutor(workers) as pool:
        while some := list(itertools.islice(documents, 128)):  # map() would read all documents at once
            yield from pool.map(encode_gpt2, some, itertools.repeat(encoding))

def cut(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """A document as documents of at most `size` tokens, each with BOS first."""
    return [np.insert(tokens[i:i + size - 1], 0, tokens[0]) for i in range(1, len(tokens), size - 1)]

def held_out(pieces: int, total: int, validating: int, every: int) -> int:
    """How many of a document's first pieces validate, after `total` pieces, of which `validating` do: so many
    that one of `every` does. All, as a rule, since pieces of one document are alike."""
    if validating > total // every:
        return 0
    if validating and pieces <= every:
        return pieces
    return max(1, pieces // every)

def training_command(folder: Path, tokenizer: str, train_tokens: int, val_tokens: int) -> str:
    """The command that trains on these shards: the speedrun on 100M GPT-2 tokens or more, else the demo."""
    preset = "speedrun" if tokenizer == "gpt2" and train_tokens >= SHARD_TOKENS else "demo"
    most_tokens, slice_tokens = VALIDATION[preset]
    slice_tokens = min(slice_tokens, val_tokens - 1)  # the last token is only a target
    slices = min(most_tokens, val_tokens - 1) // slice_tokens
    stem = glob.escape(str(folder.resolve() / "text"))
    train_files, val_files = shlex.quote(f"{stem}_train_*.bin"), shlex.quote(f"{stem}_val_*.bin")
    # The demo's microbatches, of 640 tokens, would never hold the ends of documents of 2,048
    batch = "BATCH_TOKENS=4096 " if (preset, tokenizer) == ("demo", "gpt2") else ""
    # EPOCHS is a maximum: the run takes as many passes as it needs. The presets' targets are for other data.
    return (f"PRESET={preset} TRAIN_FILES={train_files} VAL_FILES={val_files} "
            f"VOCAB_SIZE={BOS[tokenizer] + 1} BOS_ID={BOS[tokenizer]} EPOCHS=100000 TARGET_LOSS=0 "
            f"{batch}VAL_TOKENS={slices * slice_tokens} VAL_SLICE_TOKENS={slice_tokens} "
            f"{shlex.quote(str(ROOT / 'run.sh'))}")

def run(args: argparse.Namespace) -> None:
    """Write the shards that the arguments ask for. Raises DataError."""
    files = find_files(args.inputs)
    encoding = None if args.tokenizer == "bytes" else load_gpt2(required=args.tokenizer == "gpt2")
    tokenizer = "gpt2" if encoding else "bytes"
    print(f"tokenizer: {tokenizer}, {BOS[tokenizer] + 1:,} ids, BOS {BOS[tokenizer]}", flush=True)
    documents = read_documents(files, args.text_field, args.split_at, args.limit_documents)
    encoded = encode_all(documents, encoding, args.workers) if encoding else map(byte_document, documents)
    try:
        with new_corpus(args.out, "text", args.overwrite) as (train, val):
            for tokens in tqdm(encoded, unit=" texts", disable=None):
                pieces = cut(tokens, MOST_TOKENS[tokenizer])
                total = train.documents + val.documents
                count = held_out(len(pieces), total, val.documents, args.val_every)
                for i, piece in enumerate(pieces):
                    (val if i < count else train).add(piece)
            if not train.documents:
                raise DataError("The inputs: expected at least 2 documents, found "
                                f"{val.documents}; add text.")
        command = training_command(args.out, tokenizer, train.tokens, val.tokens)
        (args.out / "command.sh").write_bytes(os.fsencode(command + "\n"))
    except OSError as error:
        raise DataError(f"{args.out}: expected to write shards here, found: {error.strerror or error}; make "
                        "room or choose another folder with --out.") from error
    for writer in (train, val):
        print(f"{args.out / writer.stem}_*.bin: {writer.documents:,} documents, {writer.tokens:,} tokens")
    print(f"train: {command}")

@best_effort_console()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hf:// address")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder for the shards")
    add("--overwrite", action="store_true", help="replace the text_*.bin in FOLDER")
    add("--tokenizer", default="auto", choices=("auto", "gpt2", "bytes"))
    add("--val-every", default=100, type=int, metavar="N", help="one of N validates (100)")
    add("--workers", default=4, type=int, metavar="N", help="threads that make GPT-2 tokens (4)")
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (text)")
    add("--split-at", default="", metavar="TEXT", help="what separates documents in one text (nothing)")
    add("--limit-documents", type=int, metavar="N", help="stop after N documents")
    args = parser.parse_args(arguments)
    if args.val_every < 2:
        parser.error("--val-every: expected 2 or more")
    if min(args.workers, 1 if args.limit_documents is None else args.limit_documents) < 1:
        parser.error("--workers, --limit-documents: expected 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that new_corpus cleans up
    try:
        run(args)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
