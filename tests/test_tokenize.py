"""data/tokenize_text.py and data/shards.py, run as a user runs them."""

import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from conftest import ROOT, environment
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt

sys.path.insert(0, str(ROOT / "data"))
import shards  # noqa: E402
import tokenize_text  # noqa: E402

SCRIPT = ROOT / "data" / "tokenize_text.py"
# Registers a small BPE as tiktoken's "gpt2" in every process, since GPT-2's own vocabulary needs a network.
SMALL_GPT2 = """
import tiktoken, tiktoken.registry
ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
tiktoken.registry.ENCODINGS["gpt2"] = tiktoken.Encoding(
    "gpt2", pat_str=r" ?[^ ]+| ", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
"""


def arguments(*given, **options):
    options = {"tokenizer": "bytes", "workers": 1} | options
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, str(SCRIPT), *map(str, given), *flags]


def tokenize(*given, env=None, limit=None, **options):
    """Run the script, by default on bytes in one process; `limit`: most bytes of a file it may write."""
    limit = limit and partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run(arguments(*given, **options), env=environment(**env or {}), capture_output=True,
                          text=True, timeout=60, preexec_fn=limit)


def made(*given, out, **options):
    done = tokenize(*given, out=out, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refused(*given, code=1, **options):
    """The sentence with which the script ends, and nothing else that it says on stderr."""
    done = tokenize(*given, **options)
    assert done.returncode == code, done.stderr
    *usage, sentence = done.stderr.splitlines()
    assert code == 2 or not usage, done.stderr
    return sentence


def documents_in(path, bos=256):
    """A shard's documents as arrays without their BOS; the first token must be one."""
    header, tokens = np.fromfile(path, "<i4", count=256), np.fromfile(path, "<u2", offset=1024)
    assert header.tolist() == [20240520, 1, len(tokens)] + 253 * [0]
    starts = np.flatnonzero(tokens == bos)
    assert starts[0] == 0
    return [tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(tokens)])]


def texts_in(folder, split):
    """The texts of all shards of a split, in order."""
    paths = sorted(folder.glob(f"text_{split}_*.bin"))
    return [bytes(d.astype(np.uint8)).decode() for path in paths for d in documents_in(path)]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def random_texts(count, longest=400):
    rng = random.Random(0)
    return [f"{i}:" + "".join(rng.choices("ab\n\r é\u2028€𝄞", k=rng.randrange(longest)))
            for i in range(count)]


def lacking(tmp_path, module):
    """An environment in which `module` is not installed."""
    return customized(tmp_path / "without", f"import sys\nsys.modules[{module!r}] = None\n")


def customized(folder, code):
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return dict(PYTHONPATH=folder)


# ---------------------------------------------------------------------------------------------------
# What comes out


def test_texts_of_all_kinds_in_a_folder_come_back_in_path_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_bytes("one\r\ndocumént\n".encode())
    write_jsonl(folder / "b" / "x.jsonl", ["two", "", "thrée\u2028\n"])
    (folder / "b" / "y.JSONL.gz").write_bytes(gzip.compress(b'\n{"text":\r"four"}\r\n{"text": null}\n\n'))
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbffive")
    (folder / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "six"}\n{"text": "s\\u00e9ven"}')
    for ignored in ("e.md", ".hidden.txt", ".hidden/f.txt"):
        (folder / ignored).write_bytes(b"\xff")
    (folder / "empty.txt").touch()
    said = made(folder, out=tmp_path / "out", val_every=3)
    texts = ["one\r\ndocumént\n", "two", "thrée\u2028\n", "four", "five", "six", "séven"]
    assert texts_in(tmp_path / "out", "val") == texts[::3]
    assert texts_in(tmp_path / "out", "train") == [text for i, text in enumerate(texts) if i % 3]
    assert "documents: 7, skipped because empty: 3, tokens: " in said
    assert sorted(files_in(tmp_path / "out")) == [
        "manifest.json", "text_train_000001.bin", "text_val_000000.bin"]


def test_parquet_comes_back_with_any_column_name_and_its_errors_name_file_and_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = random_texts(1000)
    columns = dict(a=pa.array(texts[:700]), b=pa.array([None, *texts[700:]], pa.large_string()))
    for name, column in columns.items():
        table = pa.table({"n": range(len(column)), "body": column})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=300)
    said = made(tmp_path, out=tmp_path / "out", text_field="body", val_every=4, workers=2)
    assert texts_in(tmp_path / "out", "val") == texts[::4]
    assert texts_in(tmp_path / "out", "train") == [text for i, text in enumerate(texts) if i % 4]
    assert "skipped because empty: 1," in said
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    assert refused(a, out=tmp_path / "x").startswith(f"{a}: expected a column 'text', found ['n', 'body']; ")
    assert refused(a, out=tmp_path / "x", text_field="n").startswith(f"{a}: row 0: expected a string, ")
    b.write_bytes(b"PAR1 and no more")
    assert refused(b, out=tmp_path / "x").startswith(f"{b}: expected a readable file, found: ")
    wrong = pa.StringArray.from_buffers(
        2, pa.py_buffer(np.array([0, 2, 3], "<i4")), pa.py_buffer(b"ok\xff"))
    pq.write_table(pa.table({"text": wrong}), b)
    assert refused(b, out=tmp_path / "x").startswith(f"{b}: rows 0 to 1: expected UTF-8, found ")


def test_the_shards_are_the_same_bytes_for_any_number_of_workers(tmp_path):
    texts = random_texts(9000, longest=900)
    write_jsonl(tmp_path / "a.jsonl", texts)
    for workers in (1, 2, 3):
        made(tmp_path / "a.jsonl", out=tmp_path / str(workers), workers=workers, shard_tokens=1_000_000)
    one, two, three = (files_in(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert one == two == three and len(one) > 5
    assert texts_in(tmp_path / "3", "train") == [text for i, text in enumerate(texts) if i % 100]


def test_a_shard_ends_before_the_document_that_would_overflow_it(tmp_path):
    lengths = [1, 9, 5, 4, 1, 3, 25, 4, 4, 10, 1]  # with BOS 2, 10, 6, 5, 2, ... tokens; the first validates
    write_jsonl(tmp_path / "a.jsonl", ["x" * length for length in lengths])
    made(tmp_path / "a.jsonl", out=tmp_path / "out", shard_tokens=10)
    found = [[len(d) for d in documents_in(path)]
             for path in sorted((tmp_path / "out").glob("text_train_*.bin"))]
    assert found == [[9], [5], [4, 1], [3], [25], [4, 4], [10], [1]]
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["shards"]
    assert list(listed) == [f"text_train_{i:06d}.bin" for i in range(1, 9)] + ["text_val_000000.bin"]


def test_the_manifest_tells_the_truth(tmp_path):
    out = tmp_path / "out"
    said = made(write_jsonl(tmp_path / "a.jsonl", random_texts(200)), out=out, shard_tokens=9000, val_every=4)
    manifest = json.loads((out / "manifest.json").read_text())
    listed = manifest.pop("shards")
    assert manifest == {"format": 1, "tokenizer": "bytes", "vocab_size": 257, "bos_id": 256}
    assert sorted(listed) == sorted(path.name for path in out.glob("*.bin")) and len(listed) > 3
    for name, shard in listed.items():
        documents, digest = documents_in(out / name), hashlib.sha256((out / name).read_bytes()).hexdigest()
        tokens = sum(1 + len(d) for d in documents)
        assert shard == dict(documents=len(documents), tokens=tokens, sha256=digest)
        assert f"{out / name}: {shard['documents']:,} documents, {shard['tokens']:,} tokens\n" in said
    assert sum(shard["documents"] for name, shard in listed.items() if "_val_" in name) == 50


def test_a_limit_of_documents_looks_at_nothing_behind_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n{"text": "c"}\nwrong\n')
    for workers, limit in ((1, 2), (2, 3)):
        out = tmp_path / f"{workers}-{limit}"
        said = made(tmp_path / "a.jsonl", out=out, limit_documents=limit, workers=workers)
        assert f"documents: {limit}, skipped because empty: 1," in said
        assert texts_in(out, "train") == ["b", "c"][: limit - 1]
    assert "line 5" in refused(tmp_path / "a.jsonl", out=tmp_path / "x", limit_documents=4)


def test_gpt2_tokens_are_tiktokens_and_what_looks_special_is_text(tmp_path):
    pytest.importorskip("tiktoken")
    env = customized(tmp_path / "site", SMALL_GPT2)
    write_jsonl(tmp_path / "a.jsonl", ["the then  the", "<|endoftext|>", "é the"] * 20)
    for workers, tokenizer in ((1, "gpt2"), (2, "auto")):
        out = tmp_path / tokenizer
        said = made(tmp_path / "a.jsonl", out=out, workers=workers, tokenizer=tokenizer, env=env, val_every=2)
        assert said.startswith("tokenizer: gpt2 (") and "50,257 ids, BOS 50256\n" in said
        assert "train: PRESET=demo " in said and " VOCAB_SIZE=50257 BOS_ID=50256 " in said
        training = documents_in(out / "text_train_000001.bin", 50256)
        assert [document.tolist() for document in training[:3]] == [  # documents 1, 3 and 5 of all
            [*b"<|endoftext|>"], [257, 258, ord("n"), ord(" "), 258], [*"é".encode(), 258]]
    assert files_in(tmp_path / "gpt2") == files_in(tmp_path / "auto")
    manifest = json.loads((tmp_path / "auto" / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["bos_id"]) == ("gpt2", 50257, 50256)


def check_that_auto_takes_bytes(tmp_path, env, why):
    write_jsonl(tmp_path / "a.jsonl", "ab")
    said = made(tmp_path / "a.jsonl", out=tmp_path / "out", tokenizer="auto", env=env)
    assert re.match(rf"tokenizer: bytes \(GPT-2 tokens: .*{why}.*\), 257 ids, BOS 256\n", said)
    return refused(tmp_path / "a.jsonl", out=tmp_path / "x", tokenizer="gpt2", env=env)


def test_without_gpt2s_vocabulary_auto_takes_bytes_and_gpt2_is_one_sentence(tmp_path):
    pytest.importorskip("tiktoken")
    nobody = "http://127.0.0.1:9"  # listens there
    env = dict(HTTPS_PROXY=nobody, https_proxy=nobody, NO_PROXY="", no_proxy="", TIKTOKEN_CACHE_DIR=tmp_path)
    text = check_that_auto_takes_bytes(tmp_path, env, r"vocabulary.*could not fetch it \(\w+\)")
    assert "could not fetch it" in text and "TIKTOKEN_CACHE_DIR" in text and "--tokenizer bytes" in text


def test_a_network_that_answers_nothing_is_not_waited_for_for_ever(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    forever = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: forever.wait())
    monkeypatch.setattr(tokenize_text, "FETCH_SECONDS", 0.1)
    with pytest.raises(shards.DataError, match="could not fetch it .no answer in 0.1 s"):
        tokenize_text.gpt2_encoding.__wrapped__()
    forever.set()


def test_a_text_that_tiktoken_gives_up_on_is_a_sentence(monkeypatch):
    """It does on a million blanks, with an exception that is no Exception."""
    class PanicException(BaseException):
        pass

    class Encoding:
        def encode_ordinary(self, text):
            raise PanicException("StackOverflow")

    monkeypatch.setattr(tokenize_text, "gpt2_encoding", Encoding)
    with pytest.raises(shards.DataError, match="^blanks.txt: expected a text that tiktoken can split"):
        tokenize_text.encode_document(" " * 9, "blanks.txt", shards.GPT2)


def test_without_tiktoken_auto_takes_bytes_and_gpt2_says_how_to_install_it(tmp_path):
    none = "package tiktoken, found none"
    text = check_that_auto_takes_bytes(tmp_path, lacking(tmp_path, "tiktoken"), none)
    assert f"{none}; python -m pip install -r data/requirements.txt" in text


def test_without_pyarrow_parquet_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "a.parquet").touch()
    text = refused(tmp_path / "a.parquet", out=tmp_path / "x", env=lacking(tmp_path, "pyarrow"))
    assert text.startswith("Parquet files: expected the package pyarrow, found none; python -m pip install")


@pytest.mark.parametrize("count, length, val_every, sets", [
    (2, 20, 2, "EPOCHS=52746 VAL_TOKENS=20 VAL_SLICE_TOKENS=20"),
    (400, 2000, 40, "VAL_TOKENS=16384 VAL_SLICE_TOKENS=8192"),
    (2, 2_000_000, 2, "EPOCHS=1728 VAL_TOKENS=49152 VAL_SLICE_TOKENS=8192")])
def test_the_command_at_the_end_is_one_that_the_training_script_accepts(
        tmp_path, run_main, count, length, val_every, sets):
    write_jsonl(tmp_path / "a.jsonl", ["x" * length] * count)
    out = tmp_path / "it's [here]"
    command = made(tmp_path / "a.jsonl", out=out, val_every=val_every).splitlines()[-1]
    *overrides, script = shlex.split(command.removeprefix("train: "))
    assert (Path.cwd() / script).samefile(ROOT / "run.sh")
    assert command.startswith("train: PRESET=demo TRAIN_FILES=") and sets in command
    overrides = dict(part.split("=", 1) for part in overrides)
    code, _, said = run_main("--dry-run", DEVICE="cpu", LOG_DIR=tmp_path / "logs", **overrides)
    assert (code, said) == (0, "")


def test_the_presets_that_the_command_knows_are_the_training_scripts():
    for name, known in tokenize_text.PRESETS.items():
        s, _ = train_gpt.resolve_settings({}, name)
        assert known == (s.num_iterations * (s.batch_tokens + s.microbatches), s.epochs, s.val_tokens,
                         s.val_slice_tokens)
        least = min(s.batch_tokens // s.microbatches + 1, s.max_piece_tokens)
        assert tokenize_text.SHORTEST_MICROBATCH <= least


documents = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=30)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(documents, st.integers(1, 40), st.integers(2, 9), st.integers(1, 64))
@example(["a", "", "é\n"], 1, 2, 1)
def test_any_documents_come_back(texts, shard_tokens, val_every, chunk_bytes):
    """In this process, with chunks of a few bytes, against a plain split of a list."""
    kept = [text for text in texts if text]
    expected = {"val": kept[::val_every], "train": [t for i, t in enumerate(kept) if i % val_every]}
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_text, "CHUNK_BYTES", chunk_bytes)
        folder = Path(folder)
        write_jsonl(folder / "a.jsonl", texts)
        code = tokenize_text.main(arguments(folder / "a.jsonl", out=folder / "out", val_every=val_every,
                                            shard_tokens=shard_tokens)[2:])
        assert code == (0 if all(expected.values()) else 1)
        for split in expected if code == 0 else ():
            assert texts_in(folder / "out", split) == expected[split]
            for path in (folder / "out").glob(f"text_{split}_*.bin"):
                lengths = [1 + len(d) for d in documents_in(path)]
                assert sum(lengths) <= shard_tokens or len(lengths) == 1
        assert code == 0 or not (folder / "out").exists()


# ---------------------------------------------------------------------------------------------------
# The hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for to list a dataset and read files in ranges."""

    files = {}  # by path in the repository
    broken = False

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        url = urlsplit(unquote(self.path))
        api, resolve = "/api/datasets/some/corpus", "/datasets/some/corpus/resolve/main/"
        if url.path in (api, f"{api}/revision/main"):
            self.reply(200, json.dumps({"_id": "1", "id": "some/corpus", "sha": "0" * 40}).encode())
        elif url.path.startswith(f"{api}/tree/main"):
            below = url.path.removeprefix(f"{api}/tree/main").strip("/")
            deep = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
            entries = self.tree(below + "/" if below else "", deep)
            missing = {} if entries else dict(X_Error_Code="EntryNotFound")
            self.reply(404 if missing else 200, json.dumps(entries or {}).encode(), **missing)
        elif url.path.startswith(resolve) and not self.broken:
            data = self.files[url.path.removeprefix(resolve)]
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
            self.reply(206 if "Range" in self.headers else 200, data[int(first) : int(last or len(data)) + 1],
                       ETag='"1"', X_Repo_Commit="0" * 40)
        else:
            self.reply(404)

    do_HEAD = do_GET

    def tree(self, prefix, deep):
        entries = {}
        for path, data in self.files.items():
            if path.startswith(prefix):
                *folders, _ = path.removeprefix(prefix).split("/")
                for i in range(1, len(folders) + 1 if deep else min(len(folders), 1) + 1):
                    folder = prefix + "/".join(folders[:i])
                    entries[folder] = {"type": "directory", "oid": "2", "path": folder, "size": 0}
                if deep or not folders:
                    entries[path] = {"type": "file", "oid": "1", "path": path, "size": len(data)}
        return list(entries.values())

    def log_message(self, *given):
        pass


@pytest.fixture
def hub(tmp_path):
    """The handler's class, to fill with files, and an environment in which it is the hub."""
    pytest.importorskip("huggingface_hub")
    handler = type("ThisHub", (Hub,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield handler, dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=tmp_path / "hf",
                        HF_HUB_DISABLE_XET=1, HF_HUB_DISABLE_TELEMETRY=1, NO_PROXY="*", no_proxy="*")
    server.shutdown()
    server.server_close()


def test_files_on_the_hub_are_streamed_in_path_order(tmp_path, hub):
    handler, env = hub
    texts, third = random_texts(900), "002.jsonl"
    for name, some in dict(a=texts[:200], b=texts[200:300], c=texts[300:]).items():
        write_jsonl(tmp_path / name, some)
    if importlib.util.find_spec("pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        third = "002.parquet"
        pq.write_table(pa.table({"text": texts[300:], "n": range(600)}), tmp_path / "c", row_group_size=400)
    handler.files = {"README.md": b"\xff", "sample/100BT/0.jsonl": b"wrong"}
    handler.files["sample/10BT/001.jsonl"] = (tmp_path / "b").read_bytes()
    handler.files["sample/10BT/000.jsonl.gz"] = gzip.compress((tmp_path / "a").read_bytes())
    handler.files[f"sample/10BT/{third}"] = (tmp_path / "c").read_bytes()
    address = "hf://datasets/some/corpus/sample/10BT"
    each = [f"{address}/{name}" for name in ("000.jsonl.gz", "001.jsonl", third)]
    for i, inputs in enumerate(([address], [f"{address}/*"], each)):
        made(*inputs, out=tmp_path / str(i), env=env, val_every=2, workers=1 + i % 2)
        assert texts_in(tmp_path / str(i), "val") == texts[::2]
        assert texts_in(tmp_path / str(i), "train") == texts[1::2]
    assert not list((tmp_path / "hf").rglob(f"*{third}*")), "streamed, not stored"


def test_what_the_hub_does_not_have_or_give_is_one_sentence(tmp_path, hub):
    handler, env = hub
    handler.files = {"a.jsonl": b'{"text": "a"}\n'}
    for address in ("hf://datasets/no/such", "hf://datasets/some/corpus/none"):
        assert refused(address, out=tmp_path / "out", env=env).startswith(f"{address}: expected ")
    handler.broken = True
    text = refused("hf://datasets/some/corpus/a.jsonl", out=tmp_path / "out", env=env)
    assert text.startswith("hf://datasets/some/corpus/a.jsonl: expected a readable file, found: ")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------
# What goes wrong


WRONG_FILES = {  # name: content, and what the sentence says behind the path
    "no.txt": (None, "expected a readable file, found: No such file or directory; "),
    "kind.csv": (b"x", "expected files that end in .txt, .jsonl, .jsonl.gz, .parquet, found none; "),
    "latin.txt": (b"ab\xe9cd", "byte 2: expected UTF-8, found e9 63 64; "),
    "cut.txt": ("é".encode()[:1], "byte 0: expected UTF-8, found c3; "),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', "line 2, byte 10: expected UTF-8, found e9 22 7d; "),
    "late.jsonl": (b'{"text": "%s"}\n' % (b"x" * 987) * 2500 + b"[]\xff",
                   "line 2,501, byte 2: expected UTF-8, found ff; "),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "line 3: expected a JSON object, found something"),
    "deep.jsonl": (b"[" * 100_000, "line 1: expected a JSON object, found something else ("),
    "list.jsonl": (b'["text"]', "line 1: expected a JSON object with a field 'text', found list; "),
    "field.jsonl": (b'{"body": "b", "id": 3}',
                    "line 1: expected a JSON object with a field 'text', found only ['body', 'id']; "),
    "number.jsonl": (b'{"text": 3}', "line 1: expected a string, found int; "),
    "surrogate.jsonl": (b'{"text": "ab\\ud800"}',
                        "line 1: expected characters, found the lone surrogate U+D800 at character 2; "),
    "plain.jsonl.gz": (b'{"text": "a"}', "expected a readable file, found: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
                     "expected a readable file, found: Compressed file ended before"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_input_is_one_sentence_and_leaves_nothing(tmp_path, name):
    content, says = WRONG_FILES[name]
    write_jsonl(tmp_path / "good.jsonl", "abc")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = refused(tmp_path / "good.jsonl", tmp_path / name, out=tmp_path / "out", workers=1 + len(says) % 2)
    assert re.match(rf"{re.escape(str(tmp_path / name))}(: |, ){re.escape(says)}.*\.$", text) and "; " in text
    assert not (tmp_path / "out").exists()


def test_the_first_wrong_document_is_the_one_that_is_named(tmp_path):
    """A reader that is ahead of the workers comes upon the missing end of b.jsonl.gz first."""
    write_jsonl(tmp_path / "a.jsonl", random_texts(20))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("wrong\n" + '{"text": "' + "x" * 3_000_000 + '"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n')[:-2])
    text = refused(tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", out=tmp_path / "out", workers=2)
    assert text.startswith(f"{tmp_path / 'a.jsonl'}: line 21: ")


def test_folders_without_texts_files_named_twice_and_dead_links_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").touch()
    text = refused(tmp_path / "in", out=tmp_path / "out")
    assert text.startswith(f"{tmp_path / 'in'}: expected files that end in .txt, ") and "found none" in text
    (tmp_path / "in" / "a.txt").touch()
    text = refused(tmp_path / "in", tmp_path / "in" / ".." / "in" / "a.txt", out=tmp_path / "out")
    assert "a.txt: expected each file once, found it twice" in text
    (tmp_path / "in" / "b.txt").symlink_to(tmp_path / "nowhere")
    text = refused(tmp_path / "in", out=tmp_path / "out")
    assert text.startswith(f"{tmp_path / 'in' / 'b.txt'}: expected a readable file, found: No such file")


@pytest.mark.parametrize("texts, train, validation", [([], 0, 0), (["", "a"], 0, 1)])
def test_too_few_documents_for_the_split_are_counted(tmp_path, texts, train, validation):
    write_jsonl(tmp_path / "a.jsonl", texts)
    text = refused(tmp_path / "a.jsonl", out=tmp_path / "out")
    assert text.startswith("The inputs: expected documents for both training and validation, found "
                           f"{train} and {validation} ({texts.count('')} empty ones skipped); ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [
    dict(val_every=1), dict(val_every="x"), dict(shard_tokens=2**31), dict(workers=0),
    dict(limit_documents=0), dict(tokenizer="bpe"), dict(nonsense=1)])
def test_wrong_arguments_end_with_code_2(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        tokenize_text.main(arguments("a.jsonl", out=tmp_path / "out", **wrong)[2:])
    assert "--" + list(wrong)[0].replace("_", "-") in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_holds_a_corpus_is_left_alone_without_overwrite(tmp_path):
    out, text = tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", random_texts(20))
    made(text, out=out, shard_tokens=500)
    before = files_in(out)
    write_jsonl(text, "ab")
    said = refused(text, out=out)
    assert said.startswith(f"{out}: expected a folder without shards, found text_train_0")
    assert "--overwrite" in said and files_in(out) == before
    (out / "notes").write_text("mine")
    made(text, "--overwrite", out=out)
    assert sorted(files_in(out)) == ["manifest.json", "notes", "text_train_000001.bin", "text_val_000000.bin"]
    assert texts_in(out, "train") + texts_in(out, "val") == ["b", "a"]
    (out / "fineweb_val_000000.bin").touch()
    said = refused(text, "--overwrite", out=out)
    assert said.startswith(f"{out}: expected a folder without another corpus, found fineweb_val_000000.bin; ")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, workers):
    out = tmp_path / "out"
    made(write_jsonl(tmp_path / "a.jsonl", "ab"), out=out)
    before = files_in(out)
    write_jsonl(tmp_path / "a.jsonl", ["x" * 1000] * 5000)
    text = refused(tmp_path / "a.jsonl", "--overwrite", out=out, workers=workers, limit=3_000_000)
    assert text.startswith(f"{out}: expected to write shards here, found: File too large; make room or ")
    assert files_in(out) == before


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", "ab")
    for out in (tmp_path / "a.jsonl", tmp_path / "a.jsonl" / "x"):
        text = refused(tmp_path / "a.jsonl", out=out)
        assert text.startswith(f"{out}: expected to write shards here, found: ") and "--out" in text


# ---------------------------------------------------------------------------------------------------
# Interruptions, several at once, memory


@pytest.fixture
def endless(tmp_path):
    """A function that starts a run which reads from a pipe for ever, and returns when it is writing."""
    running = []

    def feed(pipe):
        line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
        try:
            with open(pipe, "wb", buffering=0) as file:
                while True:
                    file.write(line * 1000)
        except OSError:  # the reader has ended
            pass

    def start(workers):
        pipe, out = tmp_path / "a.jsonl", tmp_path / "out"
        os.mkfifo(pipe)
        line = arguments(pipe, out=out, workers=workers, shard_tokens=50_000)
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env=environment(), start_new_session=True)
        running.append(process)
        threading.Thread(target=feed, args=(pipe,), daemon=True).start()
        wait_for(lambda: len(list(out.glob(f"{shards.STAGING}*/*.bin"))) >= 5 or process.poll() is not None)
        return process, out

    yield start
    for process in running:
        process.kill()
        process.communicate(timeout=30)


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


def members(session):
    """Processes of a session, as [session, state, id, command], those that only wait to be buried aside."""
    found = subprocess.run(["ps", "-ewwo", "sid=,stat=,pid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 3) for line in found.splitlines()]
    return [row for row in rows if row[0] == str(session) and "Z" not in row[1]]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(endless, workers, number, code):
    process, out = endless(workers)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == code and "Traceback" not in stderr
    assert number != signal.SIGINT or stderr.splitlines()[-1] == "Interrupted; nothing was written."
    wait_for(lambda: not members(process.pid))
    assert not out.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_no_shards_and_no_processes_and_the_next_one_tidies_up(
        tmp_path, endless, workers):
    process, out = endless(workers)
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not members(process.pid))
    [left] = out.iterdir()
    assert left.name.startswith(shards.STAGING) and list(left.glob("*.bin"))
    (tmp_path / "a.jsonl").unlink()
    made(write_jsonl(tmp_path / "a.jsonl", "ab"), out=out)
    assert sorted(files_in(out)) == ["manifest.json", "text_train_000001.bin", "text_val_000000.bin"]


def test_a_killed_worker_is_one_sentence(endless):
    process, out = endless(2)
    worker = [row for row in members(process.pid) if "spawn_main" in row[3]][0]
    os.kill(int(worker[2]), signal.SIGKILL)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 1 and "Traceback" not in stderr and not out.exists()
    assert stderr.splitlines()[-1].startswith("A worker process: expected its answer, found: ")


def corpus_of(folder, overwrite=True):
    return shards.Corpus(folder, "text", shards.BYTES, shard_tokens=8, overwrite=overwrite)


def add(corpus, texts):
    """The first to validation."""
    for text in texts:
        (corpus.train if corpus.val.documents else corpus.val).add(shards.byte_document(text))


def test_a_run_killed_among_its_last_renames_leaves_a_whole_corpus_or_no_validation(tmp_path, monkeypatch):
    """Stop before each operation in turn on the way from an old corpus to a new one."""
    old, new = [b"old val", b"old one", b"old two"], [b"new val", b"new 1", b"new 2", b"new 3"]
    whole = {tuple(text.decode() for text in texts) for texts in (old, new)}
    for done in range(4 + 5 + 1):  # of 4 files out and 5 in
        folder = tmp_path / str(done)
        with corpus_of(folder) as corpus:
            add(corpus, old)
            corpus.publish()
        left = iter(range(done))

        def counted(operation):
            def run(*given_, **options):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return operation(*given_, **options)

            return run

        with corpus_of(folder) as corpus, monkeypatch.context() as patch:
            add(corpus, new)
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            try:
                finished = bool(corpus.publish())
            except KeyboardInterrupt:
                finished = False
        assert finished == (done == 9)
        if list(folder.glob("text_val_*.bin")):
            assert (*texts_in(folder, "val"), *texts_in(folder, "train")) in whole
            assert (folder / "manifest.json").exists()
    assert len(list(folder.iterdir())) == 5


def test_a_writer_leaves_another_ones_hidden_folder_alone(tmp_path):
    with corpus_of(tmp_path, overwrite=False) as slow:
        add(slow, [b"1", b"2"])
        with corpus_of(tmp_path) as fast:
            add(fast, [b"3", b"4"])
            fast.publish()
        with pytest.raises(shards.DataError, match="expected a folder without shards"):
            slow.publish()
    assert texts_in(tmp_path, "train") == ["4"] and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_each_worker_holds_one_chunk_of_bounded_size(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000] * 300)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes(), 1))
    taken = given_back = most = 0

    def counted(chunks):
        nonlocal taken, most
        for chunk in chunks:
            taken += 1
            most = max(most, taken - given_back)
            assert sum(len(part.data) for part in chunk.parts) < 2 * tokenize_text.CHUNK_BYTES
            yield chunk

    chunks = counted(tokenize_text.read_chunks(tokenize_text.find_sources([str(tmp_path / name)]), "text"))
    for _ in tokenize_text.encode_all(chunks, shards.BYTES, "text", 2):
        given_back += 1
    assert 20 < taken == given_back and most == 3  # two are with the workers and one is next


def test_progress_shows_share_documents_and_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenize_text, "PROGRESS_SECONDS", 0)
    write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000] * 30)
    assert tokenize_text.main(arguments(tmp_path / "a.jsonl", out=tmp_path / "out")[2:]) == 0
    said = capsys.readouterr().err
    assert "read: 100%" in said and "30 documents, 3,000,030 tokens" in said and "MB/s" in said
