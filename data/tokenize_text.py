"""
Make token shards from your own text.

    python -m pip install -r data/requirements.txt
    python data/tokenize_text.py INPUT... --out FOLDER [--tokenizer auto|gpt2|bytes] [--val-every 100]

INPUT is a .txt file (one document), a .jsonl file (a document per line, in its field "text"), a .parquet file
(a document per row, in its column "text"), one of these with .gz, a folder of them, or an address on the
Hugging Face hub, such as hf://datasets/HuggingFaceFW/fineweb/sample/10BT, which is streamed and not stored.

Documents keep their order; empty ones are skipped, and long ones are cut into documents of 2,048 tokens (640
bytes), since training takes no more of one. Tokens are GPT-2's, or bytes if tiktoken or its vocabulary is
missing. The first of every --val-every documents goes to validation. Any --workers gives the same bytes.
FOLDER gets its shards when all are complete, and the command that trains on them in command.txt. A run that
fails or is interrupted adds nothing to FOLDER; one that is killed leaves a folder unfinished-*: delete it.
"""

import argparse
import glob
import io
import itertools
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
from shards import BYTES_BOS, SHARD_TOKENS, DataError, byte_document, new_corpus
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
KINDS = (".txt", ".jsonl", ".parquet")
BOS = {"bytes": BYTES_BOS, "gpt2": 50_256}  # also the highest id
MOST_TOKENS = {"bytes": 641, "gpt2": 2048}  # that training takes of one document
# What train_gpt.py's presets validate on: tokens, and tokens in one slice
VALIDATION = {"demo": (49_152, 8192), "speedrun": (10_485_760, 262_144)}

def kind_of(path: str) -> str:
    """The suffix of a file name, without .gz."""
    return Path(path.lower().removesuffix(".gz")).suffix

def find_files(inputs: list[str]) -> list[str]:
    """Paths or addresses of the files that the inputs name, each once. Raises DataError."""
    files = []
    for given in inputs:
        names, found = [], "none"
        try:
            file_system, path = fsspec.url_to_fs(given)
            names = [name for name in file_system.find(path) if "/." not in name.removeprefix(path)]
            names = sorted(names or file_system.glob(path))
        except Exception as error:  # the hub's client has many classes of them
            found = str(error).split("\n")[0]
        names = [name for name in names if kind_of(name) in KINDS]
        if not names:
            raise DataError(f"{given}: expected files that end in {', '.join(KINDS)}, found {found}; name "
                            "another file or folder.")
        files += map(file_system.unstrip_protocol, names) if "://" in given else names
    return list(dict.fromkeys(files))

def read_values(path: str, field: str) -> Iterator[object]:
    """What the file has in place of each document. Raises exceptions of many classes."""
    with fsspec.open(path, "rb", compression="infer") as file:
        if kind_of(path) == ".parquet":
            import pyarrow.parquet
            for rows in pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=[field]):
                yield from rows.column(field).to_pylist()
        elif kind_of(path) == ".jsonl":
            for line in io.TextIOWrapper(file, "utf-8-sig", newline="\n"):
                yield json.loads(line)[field] if line.strip() else None
        else:
            yield file.read().decode("utf-8-sig")

def read_documents(files: list[str], field: str) -> Iterator[bytes]:
    """All documents that are not empty, in order, as UTF-8. Raises DataError."""
    for path in files:
        number = 0  # lines, rows or documents read so far
        try:
            for value in read_values(path, field):
                if not isinstance(value, str | None):
                    raise TypeError(f"a value of type {type(value).__name__}")
                if value:
                    yield value.encode("utf-8")  # fails for half a surrogate pair, which JSON can hold
                number += 1
        except Exception as error:
            found = "no such field" if isinstance(error, KeyError) else str(error).strip().split("\n")[0]
            raise DataError(f"{path}, after {number:,} good lines or rows: expected a text in field "
                            f"{field!r}, found: {found}; correct the file or --text-field.") from error

def load_gpt2(required: bool):
    """tiktoken's GPT-2 encoding, or None if it is missing. Raises DataError if it is missing and required."""
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # its HTTP client has many classes of them
        problem = (f"GPT-2 tokens: expected tiktoken and its vocabulary, found {type(error).__name__}; run "
                   "python -m pip install -r data/requirements.txt, connect to the network, or use "
                   "--tokenizer bytes.")
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
        while some := list(itertools.islice(documents, 512)):  # map() would read all documents at once
            yield from pool.map(encode_gpt2, some, itertools.repeat(encoding))

def cut(tokens: np.ndarray, size: int) -> list[np.ndarray]:
    """A document as documents of at most `size` tokens, each with BOS first."""
    return [np.insert(tokens[i:i + size - 1], 0, tokens[0]) for i in range(1, len(tokens), size - 1)]

def training_command(folder: Path, tokenizer: str, train_tokens: int, val_tokens: int) -> str:
    """The command that trains on these shards: the speedrun on 100M GPT-2 tokens or more, else the demo."""
    preset = "speedrun" if tokenizer == "gpt2" and train_tokens >= SHARD_TOKENS else "demo"
    most_tokens, slice_tokens = VALIDATION[preset]
    slice_tokens = min(slice_tokens, val_tokens - 1)  # the last token is only a target
    slices = min(most_tokens, val_tokens - 1) // slice_tokens
    stem = glob.escape(str(folder.resolve() / "text"))
    train_files, val_files = shlex.quote(f"{stem}_train_*.bin"), shlex.quote(f"{stem}_val_*.bin")
    # EPOCHS is a maximum: the run takes as many passes as it needs. The presets' targets are for other data.
    return (f"PRESET={preset} TRAIN_FILES={train_files} VAL_FILES={val_files} "
            f"VOCAB_SIZE={BOS[tokenizer] + 1} BOS_ID={BOS[tokenizer]} EPOCHS=100000 TARGET_LOSS=0 "
            f"VAL_TOKENS={slices * slice_tokens} VAL_SLICE_TOKENS={slice_tokens} "
            f"{shlex.quote(str(ROOT / 'run.sh'))}")

def run(args: argparse.Namespace) -> None:
    """Write the shards that the arguments ask for. Raises DataError."""
    files = find_files(args.inputs)
    encoding = None if args.tokenizer == "bytes" else load_gpt2(required=args.tokenizer == "gpt2")
    tokenizer = "gpt2" if encoding else "bytes"
    print(f"tokenizer: {tokenizer}, {BOS[tokenizer] + 1:,} ids, BOS {BOS[tokenizer]}", flush=True)
    documents = itertools.islice(read_documents(files, args.text_field), args.limit_documents)
    encoded = encode_all(documents, encoding, args.workers) if encoding else map(byte_document, documents)
    try:
        with new_corpus(args.out, "text", args.overwrite) as (train, val):
            for tokens in tqdm(encoded, unit=" texts", disable=None):
                for document in cut(tokens, MOST_TOKENS[tokenizer]):
                    number = train.documents + val.documents
                    writer = train if number % args.val_every else val
                    writer.add(document)
            if not train.documents:
                raise DataError("The inputs: expected at least 2 documents, found "
                                f"{val.documents}; add text.")
        command = training_command(args.out, tokenizer, train.tokens, val.tokens)
        (args.out / "command.txt").write_text(command + "\n")
    except OSError as error:
        raise DataError(f"{args.out}: expected to write shards here, found: {error.strerror or error}; make "
                        "room or choose another folder with --out.") from error
    for writer in (train, val):
        print(f"{args.out / writer.stem}_*.bin: {writer.documents:,} documents, {writer.tokens:,} tokens")
    print(f"train: {command}")

def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hf:// address")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder for the shards")
    add("--overwrite", action="store_true", help="replace the text_*.bin in FOLDER")
    add("--tokenizer", default="auto", choices=("auto", "gpt2", "bytes"))
    add("--val-every", default=100, type=int, metavar="N", help="one document of N validates (100)")
    add("--workers", default=4, type=int, metavar="N", help="threads that make GPT-2 tokens (4)")
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (text)")
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
