"""data/tokenize_text.py and data/shards.py: own text becomes shards."""

import gzip
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, environment, read_shard

import train_gpt

sys.path.insert(0, str(ROOT / "data"))
import shards  # noqa: E402
import tokenize_text  # noqa: E402

SCRIPT = ROOT / "data" / "tokenize_text.py"
SHARDS = ["text_train_000001.bin", "text_val_000000.bin"]


def arguments(*given, out, **options):
    options = {"out": out, "tokenizer": "bytes"} | options
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [*map(str, given), *flags]


def made(*given, **options):
    """Run the script in this process."""
    assert tokenize_text.main(arguments(*given, **options)) == 0


@pytest.fixture
def refused(capsys):
    """A function that runs the script in this process and returns the one sentence with which it fails."""

    def call(*given, **options):
        assert tokenize_text.main(arguments(*given, **options)) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    return call


def texts_in(folder, split):
    paths = sorted(folder.glob(f"text_{split}_*.bin"))
    return [d.astype(np.uint8).tobytes().decode() for path in paths for d in read_shard(path)]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    return path


def paths_of(*given):
    return [file.path for file in tokenize_text.find_files([str(path) for path in given])]


# ---- What comes out

def test_all_kinds_of_files_come_back_in_path_order(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "it's [here]"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffone\n\ndocumént\u2028\n".encode())
    write_jsonl(folder / "b" / "x.jsonl", ["two", "", "thrée\u2028\n"])
    (folder / "b" / "y.JSONL.gz").write_bytes(
        gzip.compress(b'\n{"text": "four", "n": 1}\n{"text": null}\n{"text": "five", "n": [{}]}'))
    pq.write_table(pa.table({"n": range(3), "text": ["six", None, "s\u00e9ven"]}), folder / "c.parquet")
    (folder / "empty.txt").touch()
    (folder / "ignored.md").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_bytes(b"\xff")
    made(folder, out=tmp_path / "out", val_every=3)
    texts = ["one\n\ndocumént\u2028\n", "two", "thrée\u2028\n", "four", "five", "six", "séven"]
    assert texts_in(tmp_path / "out", "val") == texts[::3]
    assert texts_in(tmp_path / "out", "train") == [text for i, text in enumerate(texts) if i % 3]


@pytest.fixture
def small_gpt2(monkeypatch):
    """A small BPE stands in for GPT-2's vocabulary, which would need a network."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", tiktoken.Encoding(
        "gpt2", pat_str=r" ?[^ ]+| ", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}))


def test_the_bytes_are_the_same_for_any_number_of_workers_and_the_limit_holds(tmp_path, small_gpt2):
    rng = random.Random(0)
    texts = [f"{i}:" + "".join(rng.choices("the\n é€𝄞", k=rng.randrange(50))) for i in range(1500)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    for workers in (1, 3):
        options = dict(tokenizer="gpt2", workers=workers, limit_documents=1401)
        made(tmp_path / "a.jsonl", out=tmp_path / str(workers), **options)
    for name in SHARDS:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert len(read_shard(tmp_path / "1" / SHARDS[0], 50256)) == 1401 - 15


def test_a_long_text_is_cut_into_documents_that_training_takes_whole(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(3 * 640 + 1))
    (tmp_path / "book.txt").write_text(text)
    made(tmp_path / "book.txt", out=tmp_path / "out", val_every=2)
    assert texts_in(tmp_path / "out", "val") == [text[:640], text[640:1280]]
    assert texts_in(tmp_path / "out", "train") == [text[1280:1920], text[-1]]


def test_no_document_is_in_training_and_in_validation(tmp_path):
    """But the first, and any that is longer than all that lies between two for validation."""
    texts = [chr(97 + i) * 2000 for i in range(26)]
    made(write_jsonl(tmp_path / "a.jsonl", texts), out=tmp_path / "out", val_every=5)
    train, val = ({text[0] for text in texts_in(tmp_path / "out", kind)} for kind in ("train", "val"))
    assert train & val == {"a"} and len(train | val) == 26
    val_pieces, train_pieces = (len(texts_in(tmp_path / "out", kind)) for kind in ("val", "train"))
    assert val_pieces == pytest.approx((val_pieces + train_pieces) / 5, abs=4)
    assert tokenize_text.held_out(410, 1000, 10, 100) == 4, "of a book, the beginning"


def test_hidden_files_are_left_out_but_a_hidden_folder_can_be_named(tmp_path):
    folder = tmp_path / ".cache"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".git/b.txt"):
        (folder / name).touch()
    for given in (folder, folder / "*.txt", folder / "*", f"{folder}/"):
        assert paths_of(given) == [str(folder / "a.txt")]


def test_its_own_output_is_not_read_as_input(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    for out in (tmp_path, tmp_path / "out", tmp_path):
        made(tmp_path, "--overwrite", out=out)
        assert texts_in(out, "val") + texts_in(out, "train") == ["a", "b", "c"]


def test_linked_folders_are_read_once_and_what_is_left_out_is_printed(tmp_path, capsys):
    folder, other = tmp_path / "in", tmp_path / "other"
    for name in ("in/a.txt", "in/.git/b.txt", "in/notes.md", "in/LICENSE", "other/c.txt", "other/d.TXT"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in {"more.d": other, "again": other, "self": folder, "same.txt": "a.txt"}.items():
        (folder / link).symlink_to(target)
    expected = [folder / "a.txt", folder / "again" / "c.txt", folder / "again" / "d.TXT"]
    assert paths_of(folder, other, f"{tmp_path}/other/../in/a.txt") == [str(path) for path in expected]
    said = capsys.readouterr().out
    assert said == "read: 3 .txt; left out: 4 .txt named twice, 1 hidden, 1 without suffix, 1 .md\n"


@pytest.mark.parametrize("name", ["a::b.txt", "zip::c.txt", "data:d.txt", "file:e.txt", "[f]*.txt", "~g.txt"])
def test_a_local_file_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("text")
    for given in (name, tmp_path, tmp_path / "*.txt"):
        (file,) = tokenize_text.find_files([str(given)])
        assert [list(blocks) for blocks in tokenize_text.read_values(file, "text")] == [["text"]]


def pieces_of(*given, separator="", limit=None):
    files = tokenize_text.find_files([str(path) for path in given])
    return [piece.decode() for piece in tokenize_text.read_documents(files, "text", separator, limit)]


def test_a_text_is_read_in_pieces_that_change_none_of_its_tokens(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    pattern = pytest.importorskip("tiktoken_ext.openai_public").r50k_pat_str
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b"\n\n": 258, b"  ": 259}
    gpt2 = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    text = "".join(random.Random(0).choices(["the", " ", "\n", "\r", "é€", "\u3000", "'s", "7", "!"], k=5000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "a.jsonl", [text])
    monkeypatch.setattr(tokenize_text, "PIECE", 100)
    for name in ("a.txt", "a.jsonl"):
        pieces = pieces_of(tmp_path / name)
        assert max(map(len, pieces)) <= 100 and len(pieces) > 50 and "".join(pieces) == text
        assert [t for piece in pieces for t in gpt2.encode(piece)] == gpt2.encode(text)
        assert pieces_of(tmp_path / name, tmp_path / "a.jsonl", limit=1) == pieces


def test_memory_does_not_grow_with_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some words" * 1_000_000)
    tracemalloc.start()
    try:
        made(tmp_path / "a.txt", out=tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 13, 14, 29, 1 << 18])
def test_a_text_is_split_at_what_separates_its_documents(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tokenize_text, "PIECE", piece)
    (tmp_path / "a.txt").write_bytes(b"one\r\n<|endoftext|>\r\n\n  two\n\nlines\n<|endoftext|><|endoftext|>"
                                     b"three<|endoftext|>\n<|endoftext|>\n")
    texts = ["one", "  two\n\nlines", "three", "four"]
    write_jsonl(tmp_path / "b.jsonl", ["four<|endoftext|>"])
    for limit in (1, 2, 3, 4, None):
        pieces = pieces_of(tmp_path, separator="<|endoftext|>", limit=limit)
        assert "".join(pieces) == "".join(texts[:limit])
    if piece > 30:
        assert pieces == texts


def test_a_separator_that_is_learnt_as_text_is_told_once(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", ["one<|endoftext|>two<|endoftext|>"] * 2)
    made(tmp_path / "a.jsonl", out=tmp_path / "out")
    notice = "<|endoftext|> is learnt as text; if it separates texts, add --split-at '<|endoftext|>'.\n"
    assert capsys.readouterr().out.count(f"{tmp_path / 'a.jsonl'}: {notice}") == 1
    made(tmp_path / "a.jsonl", "--overwrite", out=tmp_path / "out", split_at="<|endoftext|>")
    assert "learnt as text" not in capsys.readouterr().out
    assert texts_in(tmp_path / "out", "train") == ["two", "one", "two"]


def test_a_shard_ends_before_the_document_that_would_make_it_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 10)
    lengths = [1, 9, 5, 4, 1, 3, 25, 4, 4]  # and BOS; the first document is for validation
    text, out = write_jsonl(tmp_path / "a.jsonl", ["x" * length for length in lengths]), tmp_path / "out"
    made(text, out=out)
    found = [[len(d) for d in read_shard(path)] for path in sorted(out.glob("*_train_*.bin"))]
    assert found == [[9], [5], [4, 1], [3], [25], [4, 4]]


def test_gpt2_tokens_are_tiktokens_and_what_looks_special_is_text(tmp_path, small_gpt2, capsys):
    write_jsonl(tmp_path / "a.jsonl", ["the then  the", "<|endoftext|>", "é the"] * 2)
    made(tmp_path / "a.jsonl", out=tmp_path / "out", tokenizer="auto", val_every=4)
    said = capsys.readouterr().out
    assert "\ntokenizer: gpt2, " in said and " VOCAB_SIZE=50257 BOS_ID=50256 " in said
    training = read_shard(tmp_path / "out" / SHARDS[0], 50256)
    assert [document.tolist() for document in training[:3]] == [
        [*b"<|endoftext|>"], [*"é".encode(), 258], [257, 258, ord("n"), ord(" "), 258]]


def test_without_gpt2s_vocabulary_auto_takes_bytes_and_gpt2_fails(tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    write_jsonl(tmp_path / "a.jsonl", "ab")
    made(tmp_path / "a.jsonl", out=tmp_path / "out", tokenizer="auto")
    said = capsys.readouterr().out
    assert "\nGPT-2 tokens: expected tiktoken and its vocabulary" in said and "\ntokenizer: bytes, " in said
    assert "pip install -r data/requirements.txt" in refused(
        tmp_path / "a.jsonl", out=tmp_path / "x", tokenizer="gpt2")


@pytest.mark.parametrize("count, length, val_every", [(2, 20, 2), (400, 2000, 40), (2, 2_000_000, 2)])
def test_the_training_script_accepts_the_command_at_the_end(tmp_path, run_main, count, length, val_every):
    out = tmp_path / "it's [here]"
    made(write_jsonl(tmp_path / "a.jsonl", ["x" * length] * count), out=out, val_every=val_every)
    *settings, script = shlex.split((out / "command.sh").read_text())
    assert (ROOT / script).samefile(ROOT / "run.sh")
    settings = dict(part.split("=", 1) for part in settings)
    code, _, said = run_main("--dry-run", DEVICE="cpu", LOG_DIR=tmp_path / "logs", **settings)
    assert (code, said) == (0, "")


def test_a_demo_on_gpt2_tokens_has_room_for_whole_documents(tmp_path, small_gpt2, run_main):
    out = tmp_path / "out"
    made(write_jsonl(tmp_path / "a.jsonl", [" the" * 4000] * 40), out=out, tokenizer="gpt2", val_every=10)
    settings = dict(part.split("=", 1) for part in shlex.split((out / "command.sh").read_text())[:-1])
    code, shown, _ = run_main("--dry-run", DEVICE="cpu", LOG_DIR=tmp_path / "logs", **settings)
    assert code == 0 and "tokens can be used" not in shown, shown


# ---- What goes wrong

def test_an_address_on_the_hub_is_expanded_and_keeps_its_file_system():
    import fsspec

    memory = fsspec.filesystem("memory")  # stands in for the hub's file system
    for name in ("b.jsonl", "a.parquet", "sub/c.txt", "README.md"):
        memory.pipe(f"/sample/{name}", b"")
    everything = ["/sample/a.parquet", "/sample/b.jsonl", "/sample/sub/c.txt"]
    assert paths_of("memory://sample") == paths_of("memory://sample/*", "memory://sample") == everything
    assert paths_of("memory://sample/*.jsonl") == everything[1:2]
    assert tokenize_text.find_files(["memory://sample"])[0].fs is memory


LINES = [b'{"text": "%d"}' % i for i in range(100)]
WRONG_FILES = {  # name: content, where and what is found
    "latin.txt": (b"a\n" * 200_000 + b"caf\xe9", "byte 0xe9 in line 200,001; "),
    "cut.txt.gz": (gzip.compress(b"text")[:-9], "Compressed file ended before"),
    "latin.jsonl": (b"\n".join([*LINES[:50], b'{"text": "\xe9"}', *LINES]), "line 51: 'utf-8' codec can't"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "line 3: Expecting ',' delimiter"),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b"}', "line 2: no such field"),
    "list.jsonl": (b'["text"]', "line 1: list indices"),
    "number.jsonl": (b'{"text": 3}', "line 1: a value of type int"),
    "surrogate.jsonl": (b'{"text": "ab\\ud800"}', "line 1: 'utf-8' codec can't encode character '\\ud800'"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "line 100: Compressed file ended before"),
    "cut.parquet": (b"PAR1 and no more", "row 1: "),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_one_sentence_and_leaves_nothing(tmp_path, refused, name):
    content, problem = WRONG_FILES[name]
    (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / "good.jsonl", "abc")
    said = refused(tmp_path / "good.jsonl", tmp_path / name, out=tmp_path / "out")
    if ".txt" in name:
        expected = f"{tmp_path / name}: expected text in UTF-8, found: {problem}"
    else:
        place, found = problem.split(": ", 1)
        expected = f"{tmp_path / name}, {place}: expected a text in field 'text', found: {found}"
    assert said.startswith(expected) and "; correct the file" in said
    assert not (tmp_path / "out").exists()


def test_a_wrong_value_in_a_parquet_file_is_told_at_its_row(tmp_path, refused):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"a"] * 5 + [b"caf\xe9"] + [b"a"] * 5).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert ", row 6: expected a text" in refused(tmp_path / "a.parquet", out=tmp_path / "out")


def test_missing_files_and_too_few_documents_are_one_sentence(tmp_path, refused):
    a = write_jsonl(tmp_path / "a.jsonl", ["", "a"])
    for path in ("none.jsonl", "kind.csv"):
        (tmp_path / "kind.csv").touch()
        text = refused(tmp_path / path, out=tmp_path / "out")
        assert text.startswith(f"{tmp_path / path}: expected files that end in .txt, .jsonl, .parquet, found")
    assert "expected at least 2 documents, found 1; " in refused(a, a, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong", [dict(val_every="x"), dict(val_every=1), dict(limit_documents=0), dict(workers=0)])
def test_wrong_arguments_end_with_code_2(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit, match="2"):
        tokenize_text.main(arguments("a.jsonl", out=tmp_path / "out", **wrong))
    assert "--" + list(wrong)[0].replace("_", "-") in capsys.readouterr().err.splitlines()[-1]


def test_a_text_on_which_tiktoken_gives_up_is_one_sentence(tmp_path, small_gpt2, monkeypatch, refused):
    def give_up(self, text):
        raise type("PanicException", (BaseException,), {})

    monkeypatch.setattr("tiktoken.Encoding.encode_ordinary", give_up)
    said = refused(write_jsonl(tmp_path / "a.jsonl", [" a"]), out=tmp_path / "out", tokenizer="gpt2")
    assert said.startswith("The document that begins with ' a': tiktoken cannot split it")


def test_a_corpus_is_replaced_only_with_overwrite_and_another_one_never(tmp_path, monkeypatch, refused):
    out, text = tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", "abcdefgh")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 4)
        made(text, out=out)
    (out / "notes").write_text("mine")
    before = files_in(out)
    write_jsonl(text, "ab")
    assert "expected a folder without shards, found text_train_000001.bin; " in refused(text, out=out)
    assert files_in(out) == before
    made(text, "--overwrite", out=out)
    assert set(files_in(out)) == {"command.sh", "notes", *SHARDS}
    (out / "fineweb_val_000000.bin").touch()
    assert "found fineweb_val_000000.bin; " in refused(text, "--overwrite", out=out)


def test_of_two_runs_into_one_folder_the_later_one_fails(tmp_path):
    with pytest.raises(shards.DataError, match="found text_train_000001.bin; choose another"):
        with shards.new_corpus(tmp_path, "text") as late:
            with shards.new_corpus(tmp_path, "text") as early:
                early[0].add(shards.byte_document(b"early"))
            late[0].add(shards.byte_document(b"late"))
    assert texts_in(tmp_path, "train") == ["early"] and len(files_in(tmp_path)) == 1


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    out, text = tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", "ab")
    made(text, out=out)
    before = files_in(out)
    write_jsonl(text, ["x" * 1000] * 3000)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    command = [sys.executable, str(SCRIPT), *arguments(text, "--overwrite", out=out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{out}: expected to write shards here, found: File too large; make room")
    assert files_in(out) == before


ENDLESS = """
import sys, time, itertools
sys.path.insert(0, "data")
import tokenize_text
tokenize_text.read_values = lambda path, field: (time.sleep(0.001) or "text" for _ in itertools.count())
sys.exit(tokenize_text.main())
"""


@pytest.fixture
def endless(tmp_path):
    """A run that reads text for ever, when it has begun to write."""
    (tmp_path / "a.txt").touch()
    command = [sys.executable, "-c", ENDLESS, *arguments(tmp_path / "a.txt", out=tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out/unfinished-*")):
        time.sleep(0.02)
    yield process, tmp_path / "out"
    process.kill()
    process.wait()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(endless, number, code):
    process, out = endless
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == code and "Traceback" not in said and not out.exists()


def test_the_presets_sizes_are_those_of_the_script():
    for name, found in tokenize_text.VALIDATION.items():
        s = train_gpt.Settings(**train_gpt.PRESETS[name])
        assert found == (s.val_tokens, s.val_slice_tokens)


# ---- A console that fails

@pytest.mark.parametrize("console", [
    lambda: open("/dev/full", "w"), lambda: open(os.devnull, "w", encoding="ascii"), lambda: None,
], ids=["full", "ascii", "closed"])
def test_shards_are_made_whatever_the_console_takes(tmp_path, monkeypatch, console):
    """Also into a folder whose name it lacks characters for."""
    text = write_jsonl(tmp_path / "größe.jsonl", ["one", "two"])
    monkeypatch.setattr(sys, "stdout", console())
    monkeypatch.setattr(sys, "stderr", console())
    made(text, out=tmp_path / "größe")
    assert sorted(files_in(tmp_path / "größe")) == ["command.sh", *SHARDS]
    assert "größe" in (tmp_path / "größe/command.sh").read_text(encoding="utf-8")
