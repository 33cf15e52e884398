"""
Make token shards from your own text.

    python -m pip install -r data/requirements.txt
    python data/tokenize_text.py INPUT... --out FOLDER [--tokenizer auto|gpt2|bytes] [--val-every 100]

INPUT is a .txt file (one document), a .jsonl file (one document per line, in its field "text"), a .parquet
file (one document per row, in its column "text"), or a folder of such files. Text may be compressed (.gz).
INPUT may also be an address on the Hugging Face hub, which is streamed and not stored, for example:

    python data/tokenize_text.py hf://datasets/HuggingFaceFW/fineweb/sample/10BT --out data/fineweb-raw

Documents keep their order; empty ones are skipped. Tokens are GPT-2's, or bytes if tiktoken or its vocabulary
is missing. The first of every --val-every documents goes to validation. The shards are the same bytes for any
number of workers. FOLDER gets them when all are complete: an interrupted run leaves it as it was.
"""

import argparse
import functools
import glob
import io
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import fsspec
import numpy as np
from shards import BYTES_BOS, SHARD_TOKENS, DataError, ShardWriter, byte_document, new_corpus
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
KINDS = (".txt", ".jsonl", ".parquet")
BOS = {"bytes": BYTES_BOS, "gpt2": 50_256}  # also the highest id
TASK_DOCUMENTS = 16  # sent to a worker at a time
# What the presets of train_gpt.py use: training tokens, validation tokens, validation tokens in one slice.
PRESETS = {"demo": (44 * 2 * 641, 49_152, 8192), "speedrun": (1705 * 8 * 49_153, 10_485_760, 262_144)}
LEAST_USED = 641  # tokens that a microbatch of either preset uses of a longer document


def kind_of(path: str) -> str:
    """The suffix of a file name, without .gz."""
    return Path(path.lower().removesuffix(".gz")).suffix


def find_files(inputs: list[str]) -> list[str]:
    """Paths or addresses of the files that the inputs name. Raises DataError."""
    files = []
    for given in inputs:
        try:
            file_system, path = fsspec.url_to_fs(given)
            names = sorted(file_system.find(path) or file_system.glob(path))
        except Exception as error:  # the hub's client has many classes of them
            found = str(error).split("\n")[0]
            raise DataError(f"{given}: expected a file or folder, found: {found}; correct it.") from error
        names = [name for name in names if kind_of(name) in KINDS and "/." not in name.removeprefix(path)]
        if not names:
            raise DataError(f"{given}: expected files that end in {', '.join(KINDS)}, found none; name "
                            "another file or folder.")
        files += map(file_system.unstrip_protocol, names) if "://" in given else names
    if len(set(files)) < len(files):  # its documents would be in training and in validation
        raise DataError(f"{max(files, key=files.count)}: expected each file once, found it twice.")
    return files


def read_values(path: str, field: str) -> Iterator[object]:
    """What the file has in place of each document. Raises exceptions of many classes."""
    with fsspec.open(path, "rb", compression="infer") as file:
        if kind_of(path) == ".parquet":
            import pyarrow.parquet

            for rows in pyarrow.parquet.ParquetFile(file).iter_batches(256, columns=[field]):
                yield from rows.column(field).to_pylist()
            return
        text = io.TextIOWrapper(file, "utf-8-sig", newline="\n")
        if kind_of(path) == ".txt":
            yield text.read()
        else:
            for line in text:
                yield json.loads(line)[field] if line.strip() else ""


def read_documents(files: list[str], field: str) -> Iterator[str]:
    """All documents that are not empty, in order. Raises DataError."""
    for path in files:
        number = 0  # lines, rows or documents read so far
        try:
            for value in read_values(path, field):
                if not isinstance(value, str | None):
                    raise TypeError(f"a value of type {type(value).__name__}")
                if value:
                    value.encode("utf-8")  # raises an error for half a surrogate pair, which JSON can hold
                    yield value
                number += 1
        except Exception as error:
            found = "no such field" if isinstance(error, KeyError) else str(error).strip().split("\n")[0]
            raise DataError(f"{path}, after {number:,} good lines or rows: expected a text in field "
                            f"{field!r}, found: {found}; correct the file or --text-field.") from error


@functools.cache
def gpt2_encoding():
    """tiktoken's GPT-2 encoding. Raises DataError if the package or its vocabulary is missing."""
    try:
        import tiktoken

        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # its HTTP client has many classes of them
        found = type(error).__name__
        raise DataError(f"GPT-2 tokens: expected tiktoken and its vocabulary, found {found}; run "
                        "python -m pip install -r data/requirements.txt, connect to the network, or use "
                        "--tokenizer bytes.") from error


def choose_tokenizer(asked: str) -> tuple[str, str]:
    """The tokenizer's name and why it was chosen. Raises DataError if the one asked for cannot be used."""
    if asked == "bytes":
        return asked, "as asked"
    try:
        gpt2_encoding()
        return "gpt2", "tiktoken has its vocabulary"
    except DataError as error:
        if asked == "gpt2":
            raise
        return "bytes", str(error).split(";")[0]


def encode_document(tokenizer: str, text: str) -> np.ndarray:
    """BOS and tokens, uint16. What looks like a special token is text."""
    if tokenizer == "bytes":
        return byte_document(text.encode("utf-8"))
    try:
        return np.array([BOS["gpt2"], *gpt2_encoding().encode_ordinary(text)], "<u2")
    except BaseException as error:  # tiktoken raises one that is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"The document that begins with {text[:40]!r}: tiktoken cannot split it, probably "
                        "because of hundreds of thousands of spaces in a row; shorten them.") from None


def start_worker() -> None:
    """Leave Ctrl-C to the main process, and end this process when that one ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main_process.join(), os._exit(1)), daemon=True).start()


def encode_all(documents: Iterator[str], tokenizer: str, workers: int) -> Iterator[np.ndarray]:
    """Encode the documents, in order, in `workers` processes. Raises DataError if one of them is killed."""
    encode = functools.partial(encode_document, tokenizer)
    if workers == 1:
        yield from map(encode, documents)
        return
    # Spawned, not forked, because pyarrow has threads.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    results = []
    try:
        # map() reads all its input at once, so it gets a few documents at a time. The next ones are submitted
        # before the results of the last ones are taken.
        while some := list(itertools.islice(documents, 4 * TASK_DOCUMENTS * workers)):
            submitted = executor.map(encode, some, chunksize=TASK_DOCUMENTS)
            yield from results
            results = submitted
        yield from results
    except BrokenProcessPool:
        raise DataError("A worker: expected its result, found that it was killed; use fewer --workers if "
                        "memory was short.") from None
    finally:
        executor.shutdown(cancel_futures=True)


def training_command(folder: Path, tokenizer: str, train: ShardWriter, val: ShardWriter, usable: int) -> str:
    """The command that trains on these shards: the speedrun on 100M GPT-2 tokens or more, else the demo."""
    preset = "speedrun" if tokenizer == "gpt2" and train.tokens >= SHARD_TOKENS else "demo"
    train_tokens, val_tokens, slice_tokens = PRESETS[preset]
    slice_tokens = min(slice_tokens, val.tokens - 1)  # the last token is only a target
    pattern = glob.escape(str(folder.resolve())) + "/text_{}_*.bin"
    settings = dict(
        PRESET=preset, TRAIN_FILES=pattern.format("train"), VAL_FILES=pattern.format("val"),
        VOCAB_SIZE=BOS[tokenizer] + 1, BOS_ID=BOS[tokenizer],
        # A microbatch takes less than twice its tokens, because the rest of its last document is dropped.
        EPOCHS=-(-2 * train_tokens // usable),
        VAL_TOKENS=min(val_tokens, (val.tokens - 1) // slice_tokens * slice_tokens),
        VAL_SLICE_TOKENS=slice_tokens,
        TARGET_LOSS=0,  # the presets' targets are for their own data
    )
    script = "./run.sh" if Path.cwd() == ROOT else shlex.quote(str(ROOT / "run.sh"))
    return " ".join([*(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()), script])


def run(args: argparse.Namespace) -> None:
    """Write the shards that the arguments ask for. Raises DataError."""
    documents = read_documents(find_files(args.inputs), args.text_field)
    tokenizer, why = choose_tokenizer(args.tokenizer)
    print(f"tokenizer: {tokenizer} ({why}), {BOS[tokenizer] + 1:,} ids, BOS {BOS[tokenizer]}", flush=True)
    # To send bytes to another process takes longer than to encode them.
    workers = args.workers or (1 if tokenizer == "bytes" else os.cpu_count() or 1)
    encoded = encode_all(itertools.islice(documents, args.limit_documents), tokenizer, workers)
    usable = 0  # training tokens without the ends of long documents
    try:
        with new_corpus(args.out, "text", args.shard_tokens, args.overwrite) as (train, val):
            for number, tokens in enumerate(tqdm(encoded, unit=" documents", disable=None)):
                if number % args.val_every == 0:
                    val.add(tokens)
                else:
                    train.add(tokens)
                    usable += min(len(tokens), LEAST_USED)
            if not train.documents:
                raise DataError("The inputs: expected documents for training and for validation, found "
                                f"{val.documents} for validation; add documents.")
        command = training_command(args.out, tokenizer, train, val, usable)
        (args.out / "command.txt").write_text(command + "\n")
    except OSError as error:
        raise DataError(f"{args.out}: expected to write shards here, found: {error.strerror or error}; make "
                        "room or choose another folder with --out.") from error
    for writer in (train, val):
        print(f"{args.out / writer.stem}_*.bin: {writer.documents:,} documents, {writer.tokens:,} tokens")
    print(f"train: {command}")


def positive(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) < 2**31:  # a shard's header counts in int32
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of 1 to {2**31 - 1:,}, found {text!r}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hf:// address")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder for the shards")
    add("--overwrite", action="store_true", help="replace the text_*.bin in FOLDER")
    add("--tokenizer", default="auto", choices=("auto", "gpt2", "bytes"))
    add("--val-every", default=100, type=positive, metavar="N", help="each N-th document validates (100)")
    add("--shard-tokens", default=SHARD_TOKENS, type=positive, metavar="N", help="most tokens of a shard")
    add("--workers", type=positive, metavar="N", help="processes (one per core for gpt2, 1 for bytes)")
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (text)")
    add("--limit-documents", type=positive, metavar="N", help="stop after N documents")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that .partial is removed
    try:
        run(args)
    except (DataError, KeyboardInterrupt) as error:
        print(error if isinstance(error, DataError) else "Interrupted; nothing was written.", file=sys.stderr)
        return 1 if isinstance(error, DataError) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
