"""
Make token shards from your own text.

    python data/tokenize_text.py INPUT... --out FOLDER [--tokenizer auto|gpt2|bytes] [--val-every 100]

INPUT is a .txt file (one document), a .jsonl or .jsonl.gz file (a document a line, in its field "text"), a
.parquet file (a document a row, in its column "text"; needs pyarrow), or a folder of any of them, taken in
the order of their paths, hidden ones left out. It may also be an address on the Hugging Face hub, of a file,
a folder or a pattern: raw FineWeb, for instance, which is streamed and never stored:

    python data/tokenize_text.py hf://datasets/HuggingFaceFW/fineweb/sample/10BT --out data/fineweb-raw \
        --limit-documents 1000000

Documents keep their order, and each opens with BOS; empty ones are skipped. Tokens are GPT-2's where tiktoken
has or can fetch its vocabulary, else bytes. The first of every --val-every documents goes to validation. The
shards and their manifest (see shards.py) are the same bytes whatever the number of workers. Memory is
constant: a few megabytes a worker and a few times the longest document or Parquet row group, whatever the
input's size; only the list of its files grows. FOLDER stays as it was until all is done; nothing resumes.
Exit codes: 0, 1 for what is wrong with data or machine, 2 for wrong arguments, 130 after Ctrl-C.
"""

import argparse
import codecs
import contextlib
import glob
import gzip
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from shards import BYTES, GPT2, MOST_TOKENS, SHARD_TOKENS, Corpus, DataError, Tokenizer, byte_document
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
KINDS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
CHUNK_BYTES = 1 << 20  # of text in one task: many times the cost of handing it to a process
ROWS = 256  # of a Parquet file in one batch; FineWeb's hold 3 kB each
FETCH_SECONDS = 60
PROGRESS_SECONDS = 5  # where it goes to a file
INSTALL = "python -m pip install -r data/requirements.txt"


# ----------------------------------------------------------------------------------------------------
# Inputs: files, and pieces of them small enough to hand to a worker


class Source(NamedTuple):
    path: str  # or address
    size: int  # bytes, compressed where it is
    open: Callable[[], BinaryIO]

    @property
    def kind(self) -> str | None:
        """The longest of KINDS in which the name ends, in either case."""
        return max((k for k in KINDS if self.path.lower().endswith(k)), key=len, default=None)


class Part(NamedTuple):
    """Consecutive documents of one file, not yet decoded."""

    source: str
    kind: str
    first: int  # line (from 1) or row (from 0) of the first
    data: Any  # bytes, whole lines where the kind is .jsonl; a list of values where it is .parquet


class Chunk(NamedTuple):
    """What a worker gets at a time; an error of the reader stands behind the documents before it."""

    parts: list[Part]
    consumed: int  # bytes of the input, for the progress bar
    error: DataError | None = None


def reason(error: BaseException) -> str:
    """What an exception says, in a line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextlib.contextmanager
def reading(path: str):
    """Turns whatever goes wrong with reading `path` into a DataError."""
    failures = (OSError, EOFError, zlib.error, ValueError, NotImplementedError)
    if "://" in path:
        failures = Exception  # network clients have their own
    try:
        yield
    except DataError:
        raise
    except failures as error:
        where = getattr(error, "filename", None) or path  # of a folder, the file that is meant
        raise DataError(f"{where}: expected a readable file, found: {reason(error)}; repair it or leave it "
                        "out.") from error


def hub_sources(address: str) -> list[Source]:
    """The files at an address on the hub, in path order."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise DataError(f"{address}: expected the package huggingface_hub, found none; {INSTALL}") from None
    hub = HfFileSystem()
    found = (hub.glob if glob.has_magic(address) else hub.find)(address, detail=True)
    return [Source(f"hf://{name}", found[name]["size"] or 0, partial(hub.open, name, "rb"))
            for name in sorted(found)]


def local_sources(given: str) -> list[Source]:
    """A file, or all that are not hidden below a folder, in the order of the paths' parts. Raises OSError."""
    paths = [Path(given)]
    if os.path.isdir(given):
        def fail(error):  # a folder that cannot be listed is not passed over
            raise error

        paths = []
        for folder, folders, names in os.walk(given, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths += [Path(folder, name) for name in names if not name.startswith(".")]
    sources = [Source(str(path), 0, partial(open, path, "rb")) for path in sorted(paths)]
    return [source._replace(size=os.stat(source.path).st_size) for source in sources
            if source.kind or source.path == given]


def find_sources(inputs: list[str]) -> list[Source]:
    """The files that the inputs mean, in order. Raises DataError for a missing, unknown or doubled one."""
    known, sources, seen = ", ".join(KINDS), [], set()
    for given in inputs:
        with reading(given):
            remote = given.startswith("hf://")
            found = [source for source in (hub_sources if remote else local_sources)(given) if source.kind]
        if not found:
            raise DataError(f"{given}: expected files that end in {known}, found none; rename them, or name "
                            "another file or folder.")
        sources += found
    for source in sources:
        path = source.path if source.path.startswith("hf://") else os.path.realpath(source.path)
        if path in seen:  # its documents would be in training and in validation
            raise DataError(f"{source.path}: expected each file once, found it twice among the inputs; "
                            "name it once.")
        seen.add(path)
    if any(source.kind == ".parquet" for source in sources):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise DataError(f"Parquet files: expected the package pyarrow, found none; {INSTALL}") from None
    return sources


def parquet_parts(source: Source, file: BinaryIO, field: str) -> Iterator[tuple[Part, int, int]]:
    """As read_parts, for a Parquet file: the values of the one column, in batches of rows."""
    import pyarrow.parquet as pq

    table, row = pq.ParquetFile(file), 0
    if field not in table.schema_arrow.names:
        raise DataError(f"{source.path}: expected a column {field!r}, found {table.schema_arrow.names}; "
                        "name the column with --text-field.")
    for batch in table.iter_batches(batch_size=ROWS, columns=[field], use_threads=False):
        first, row = row, row + len(batch)
        try:
            values = batch.column(0).to_pylist()
        except UnicodeDecodeError:
            raise DataError(f"{source.path}: rows {first:,} to {row - 1:,}: expected UTF-8, found other "
                            "bytes; repair them.") from None
        position = source.size * row // table.metadata.num_rows
        yield Part(source.path, source.kind, first, values), batch.nbytes, position


def read_parts(source: Source, field: str) -> Iterator[tuple[Part, int, int]]:
    """The file in parts, each with its bytes of text and the bytes of the file that have been read so far."""
    with reading(source.path), contextlib.ExitStack() as stack:
        file = stack.enter_context(source.open())
        if source.kind == ".parquet":
            yield from parquet_parts(source, file, field)
        elif source.kind == ".txt":
            data = file.read()
            yield Part(source.path, source.kind, 1, data), len(data), source.size
        else:
            packed = source.kind == ".jsonl.gz"
            text = stack.enter_context(gzip.open(file)) if packed else file
            line, read = 1, 0
            while data := text.read(CHUNK_BYTES):
                data += text.readline()
                read += len(data)
                # where the text is not packed, what is read is the position: a pipe could not tell it
                yield Part(source.path, source.kind, line, data), len(data), file.tell() if packed else read
                line += data.count(b"\n")


def read_chunks(sources: list[Source], field: str) -> Iterator[Chunk]:
    """All files in order, small ones together. An error ends the last chunk, behind what could be read."""
    parts, size, consumed = [], 0, 0
    try:
        for source in sources:
            before = 0
            for part, part_size, position in read_parts(source, field):
                parts.append(part)
                size, consumed, before = size + part_size, consumed + position - before, position
                if size >= CHUNK_BYTES:
                    yield Chunk(parts, consumed)
                    parts, size, consumed = [], 0, 0
        yield Chunk(parts, consumed)
    except DataError as error:
        yield Chunk(parts, consumed, error)


# ----------------------------------------------------------------------------------------------------
# Workers: decode documents and encode them


class Encoded(NamedTuple):
    """The documents of a chunk, up to the first that is wrong."""

    tokens: np.ndarray  # uint16, all documents one after another
    lengths: list[int]  # tokens of each document; 0 for an empty one, which has none, not even BOS
    sizes: list[int]  # bytes of its text
    consumed: int
    error: DataError | None


def decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = data[error.start : error.start + 4].hex(" ")
        raise DataError(f"{where}, byte {error.start:,}: expected UTF-8, found {found}; convert the file, "
                        "for instance with iconv.") from None


def values_of(part: Part, field: str) -> Iterator[tuple[str, Any]]:
    """What stands where a document should, and where that is. Raises DataError."""
    if part.kind == ".parquet":
        yield from ((f"{part.source}: row {row:,}", value) for row, value in enumerate(part.data, part.first))
        return
    data = part.data.removeprefix(codecs.BOM_UTF8) if part.first == 1 else part.data
    if part.kind == ".txt":
        yield part.source, decoded(data, part.source)
        return
    for number, line in enumerate(data.split(b"\n"), part.first):  # JSON's own line ends: no others
        if not line.strip():
            continue
        where = f"{part.source}: line {number:,}"
        try:
            record = json.loads(decoded(line, where))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected a JSON object, found something else ({reason(error)}); "
                            "repair the line.") from None
        if not isinstance(record, dict) or field not in record:
            found = f"only {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{where}: expected a JSON object with a field {field!r}, found {found}; repair "
                            "the line, or name the field with --text-field.")
        yield where, record[field]


@cache
def gpt2_encoding():
    """tiktoken's GPT-2. Raises DataError where the package or its vocabulary cannot be had."""
    try:
        import tiktoken
    except ImportError:
        raise DataError(f"GPT-2 tokens: expected the package tiktoken, found none; {INSTALL}, or take "
                        "--tokenizer bytes.") from None
    found = []

    def fetch():
        try:
            found.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # it lets the exceptions of its HTTP client through
            found.append(error)

    # in a thread, since that client waits for ever where a network answers nothing
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(FETCH_SECONDS)
    if not found or isinstance(found[0], Exception):
        why = type(found[0]).__name__ if found else f"no answer in {FETCH_SECONDS} s"
        raise DataError("GPT-2 tokens: expected tiktoken's vocabulary of 1.5 MB from openaipublic.blob."
                        f"core.windows.net, found none here and could not fetch it ({why}); connect to the "
                        "network, set TIKTOKEN_CACHE_DIR to a folder that tiktoken filled elsewhere, or take "
                        "--tokenizer bytes.")
    return found[0]


def encode_document(value: Any, where: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """BOS and tokens of a document, uint16 [1 + tokens], and its bytes; nothing for an empty one or null."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: expected a string, found {type(value).__name__}; name the field of the "
                        "text with --text-field.")
    try:
        text = (value or "").encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may carry one, as \ud800
        raise DataError(f"{where}: expected characters, found the lone surrogate "
                        f"U+{ord(value[error.start]):04X} at character {error.start}; remove it.") from None
    if not text:
        return np.empty(0, "<u2"), 0
    if tokenizer == BYTES:
        return byte_document(text), len(text)
    # what looks like a special token in a text is text
    try:
        tokens = gpt2_encoding().encode_ordinary(value)
    except BaseException as error:  # tiktoken's own, of no other class; its pattern gives up on a long blank
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{where}: expected a text that tiktoken can split, found: {error}; most likely one "
                        "with hundreds of thousands of blanks in a row; shorten them.") from None
    return np.array([tokenizer.bos_id, *tokens], dtype="<u2"), len(text)


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, field: str) -> Encoded:
    """A chunk's documents. What is wrong with one is returned, not raised: those before it are good."""
    pieces, sizes, error = [np.empty(0, "<u2")], [], chunk.error
    try:
        for part in chunk.parts:
            for where, value in values_of(part, field):
                tokens, size = encode_document(value, where, tokenizer)
                pieces.append(tokens)
                sizes.append(size)
    except DataError as wrong:
        error = wrong
    return Encoded(np.concatenate(pieces), [len(p) for p in pieces[1:]], sizes, chunk.consumed, error)


def serve(pipe, tokenizer: Tokenizer, field: str) -> None:
    """A worker: chunks in, Encoded out, until nobody is at the other end."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(encode_chunk(pipe.recv(), tokenizer, field))


def encode_all(chunks: Iterator[Chunk], tokenizer: Tokenizer, field: str, workers: int) -> Iterator[Encoded]:
    """Encode chunks, in order, in `workers` processes, each of which holds one at most; 1: in this process.

    They take turns, so that order needs no bookkeeping, and none is sent a chunk before its last result has
    been taken, so that neither end of a pipe waits for the other to make room.
    """
    if workers == 1:
        yield from (encode_chunk(chunk, tokenizer, field) for chunk in chunks)
        return
    # spawned, not forked: pyarrow and tqdm have threads, which a fork may catch with a lock in their hands
    context, crew, busy = multiprocessing.get_context("spawn"), [], deque()
    try:
        for chunk in chunks:
            result = None
            if len(crew) < workers:
                pipe, end = context.Pipe()
                worker = context.Process(target=serve, args=(end, tokenizer, field), daemon=True)
                # Ctrl-C is for this process, which then ends the others: they inherit that it is ignored. (A
                # blocked signal would reach the first one: starting it, multiprocessing unblocks SIGINT.)
                handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
                worker.start()
                signal.signal(signal.SIGINT, handler)
                crew.append(worker)
                end.close()
            else:
                pipe = busy.popleft()
                result = pipe.recv()
            pipe.send(chunk)
            busy.append(pipe)
            if result is not None:
                yield result
        while busy:
            yield busy.popleft().recv()
    except (EOFError, OSError) as error:  # from the pipes: read_chunks raises neither
        raise DataError(f"A worker process: expected its answer, found: {reason(error)}; if it was killed "
                        "for want of memory, take fewer --workers.") from error
    finally:
        for process in crew:
            process.terminate()
        for process in crew:
            process.join()


# ----------------------------------------------------------------------------------------------------
# The run


def fill(corpus: Corpus, results: Iterator[Encoded], val_every: int, limit: int | None, bar) -> Counter:
    """Write documents as they come, the first of every `val_every` to validation, `limit` at most.

    Returns counts: documents, skipped, validation (documents), tokens, text_bytes, and least_fed, training
    tokens that any preset's batches can use. Raises OSError, and DataError where a document is wrong or
    training or validation stays empty.
    """
    count = Counter()
    for encoded in results:
        position = 0
        for length, size in zip(encoded.lengths, encoded.sizes):
            if count["documents"] == limit:
                break
            if not length:
                count["skipped"] += 1
                continue
            to_validation = count["documents"] % val_every == 0
            (corpus.val if to_validation else corpus.train).add(encoded.tokens[position : position + length])
            position += length
            count["documents"] += 1
            count["validation"] += to_validation
            count["tokens"] += length
            count["text_bytes"] += size
            count["least_fed"] += 0 if to_validation else min(length, SHORTEST_MICROBATCH)
        bar.set_postfix_str(f"{count['documents']:,} documents, {count['tokens']:,} tokens", refresh=False)
        bar.update(encoded.consumed)
        if count["documents"] == limit:
            break
        if encoded.error:
            raise encoded.error
    train, val = count["documents"] - count["validation"], count["validation"]
    if not (train and val):
        raise DataError("The inputs: expected documents for both training and validation, found "
                        f"{train:,} and {val:,} ({count['skipped']:,} empty ones skipped); add documents.")
    return count


class Preset(NamedTuple):
    """What a preset of train_gpt.py takes from a corpus."""

    tokens: int  # of training: steps x microbatches x (tokens of one + the last target)
    epochs: int
    val_tokens: int
    val_slice_tokens: int


PRESETS = {"demo": Preset(108 * 8 * (640 + 1), 4, 49_152, 8192),
           "speedrun": Preset(1705 * 8 * (49_152 + 1), 1, 10_485_760, 262_144)}
SHORTEST_MICROBATCH = 641


def training_command(folder: Path, tokenizer: Tokenizer, train: int, least_fed: int, val: int) -> str:
    """A command that trains on shards with `train` and `val` tokens: the speedrun on 100M GPT-2 tokens or
    more, else the demo; with more passes and less validation than the preset's where the shards are small.
    """
    name = "speedrun" if tokenizer == GPT2 and train >= SHARD_TOKENS else "demo"
    preset = PRESETS[name]
    pattern = glob.escape(str(folder.resolve())) + "/text_{}_*.bin"
    settings = dict(PRESET=name, TRAIN_FILES=pattern.format("train"), VAL_FILES=pattern.format("val"),
                    VOCAB_SIZE=tokenizer.vocab_size, BOS_ID=tokenizer.bos_id)
    # A microbatch takes less than twice its tokens: itself, and the rest of the document at which it is full
    passes = -(-2 * preset.tokens // least_fed)
    if passes > preset.epochs:
        settings["EPOCHS"] = passes
    slice_tokens = min(preset.val_slice_tokens, val - 1)  # the last token is only a target
    settings["VAL_TOKENS"] = min(preset.val_tokens, (val - 1) // slice_tokens * slice_tokens)
    settings["VAL_SLICE_TOKENS"] = slice_tokens
    settings["TARGET_LOSS"] = 0  # the presets' targets are for their own corpora
    script = "./run.sh" if Path.cwd() == ROOT else shlex.quote(str(ROOT / "run.sh"))
    return " ".join([*(f"{key}={shlex.quote(str(value))}" for key, value in settings.items()), script])


def choose_tokenizer(asked: str) -> tuple[Tokenizer, str]:
    """The tokenizer and why. Raises DataError where the one that was asked for cannot be had."""
    if asked == "bytes":
        return BYTES, "as --tokenizer says"
    try:
        gpt2_encoding()
    except DataError as error:
        if asked == "gpt2":
            raise
        return BYTES, str(error).split(";")[0]
    return GPT2, "as --tokenizer says" if asked == "gpt2" else "tiktoken has its vocabulary"


def run(args: argparse.Namespace) -> None:
    """Make the shards that the arguments ask for. Raises DataError."""
    sources = find_sources(args.inputs)
    tokenizer, why = choose_tokenizer(args.tokenizer)
    print(f"tokenizer: {tokenizer.name} ({why}), {tokenizer.vocab_size:,} ids, BOS {tokenizer.bos_id}",
          flush=True)
    # to hand bytes to another process costs more than to tokenize them
    workers = args.workers or (1 if tokenizer == BYTES else os.cpu_count() or 1)
    started = time.monotonic()
    pause = 0.1 if sys.stderr.isatty() else PROGRESS_SECONDS
    encoded = encode_all(read_chunks(sources, args.text_field), tokenizer, args.text_field, workers)
    try:
        with (Corpus(args.out, "text", tokenizer, shard_tokens=args.shard_tokens, overwrite=args.overwrite)
              as corpus, contextlib.closing(encoded),
              tqdm(total=sum(source.size for source in sources), desc="read", unit="B", unit_scale=True,
                   mininterval=pause, delay=pause) as bar):
            count = fill(corpus, encoded, args.val_every, args.limit_documents, bar)
            shards = corpus.publish()
    except OSError as error:  # those of reading are DataErrors by now
        raise DataError(f"{args.out}: expected to write shards here, found: {reason(error)}; "
                        "make room or choose another folder with --out.") from error
    seconds, megabytes = time.monotonic() - started, count["text_bytes"] / 1e6
    for name, shard in shards.items():
        print(f"{args.out / name}: {shard['documents']:,} documents, {shard['tokens']:,} tokens")
    val = sum(shard["tokens"] for name, shard in shards.items() if name.startswith("text_val_"))
    train = count["tokens"] - val
    print(f"documents: {count['documents']:,}, skipped because empty: {count['skipped']:,}, tokens: "
          f"{count['tokens']:,} ({train:,} for training, {val:,} for validation), shards: {len(shards):,}")
    print(f"{megabytes:,.1f} MB of text in {seconds:.2f} s: {megabytes / seconds:.1f} MB/s with "
          f"{workers} worker{'s' * (workers > 1)}")
    print("train: " + training_command(args.out, tokenizer, train, count["least_fed"], val))


def whole_number(low: int, text: str) -> int:
    with contextlib.suppress(ValueError):
        if low <= int(text) <= MOST_TOKENS:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, found {text!r}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, natural = parser.add_argument, partial(whole_number, 1)
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hf:// address")
    add("--out", required=True, type=Path, metavar="FOLDER", help="for shards and manifest")
    add("--overwrite", action="store_true", help="replace the text_*.bin that FOLDER holds")
    add("--tokenizer", default="auto", choices=("auto", "gpt2", "bytes"))
    add("--val-every", default=100, type=partial(whole_number, 2), metavar="N",
        help="each N-th document goes to validation, from the first on (default: 100)")
    add("--shard-tokens", default=SHARD_TOKENS, type=natural, metavar="N",
        help=f"most tokens of a shard, but for longer documents (default: {SHARD_TOKENS:,})")
    add("--workers", type=natural, metavar="N",
        help="processes that tokenize (default: one a core for gpt2, 1 for bytes)")
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (default: text)")
    add("--limit-documents", type=natural, metavar="N", help="stop after as many documents")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: leave nothing behind
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
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
