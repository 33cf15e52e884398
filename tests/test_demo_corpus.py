"""data/demo_corpus.py: what the demo's corpus holds, and how it is written."""

import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "data"))
import demo_corpus  # noqa: E402

SHARDS = ["stdlib_train_000001.bin", "stdlib_val_000000.bin"]


def documents(path):
    """The documents of a shard, as bytes without BOS."""
    tokens = np.fromfile(path, "<u2", offset=1024)
    starts = np.flatnonzero(tokens == 256)
    assert starts[0] == 0
    return [part[1:].astype(np.uint8).tobytes() for part in np.split(tokens, starts[1:])]


def build(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo_corpus.py", str(folder)])
    return demo_corpus.main()


def used_share(lengths, microbatch_tokens):
    """Share of the tokens that the loader uses: it drops the rest of a document that ends a microbatch."""
    used = seen = filled = 0
    for length in lengths:
        taken = min(length, microbatch_tokens + 1 - filled)
        used, seen, filled = used + taken, seen + length, filled + taken
        if filled == microbatch_tokens + 1:
            filled = 0
    return used / seen


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The corpus of this Python, built by two processes at once that have numpy but no other package."""
    folder, site = tmp_path_factory.mktemp("corpus") / "new" / "folder", tmp_path_factory.mktemp("site")
    missing = ["torch", "tqdm", "fsspec", "tiktoken", "pyarrow", "huggingface_hub"]
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({missing}))")
    command = [sys.executable, ROOT / "data" / "demo_corpus.py", folder]
    runs = [subprocess.Popen(command, env=environment(PYTHONPATH=site), stderr=subprocess.PIPE)
            for _ in range(2)]
    assert [(run.communicate(timeout=120)[1], run.returncode) for run in runs] == [(b"", 0)] * 2
    return folder


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder with 40 modules that stands in for the standard library."""
    folder = tmp_path / "library"
    folder.mkdir()
    for i in range(40):
        (folder / f"m{i:02}.py").write_text(f"# {i:02}\n" * (100 + 20 * i))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


def test_parts_end_at_the_first_line_end_after_the_size_and_together_are_the_text():
    text = b"ab\n\ncd\r\nefghijkl\nm\nno"
    assert demo_corpus.cut_at_line_ends(text, 4) == [b"ab\n\n", b"cd\r\n", b"efghijkl\n", b"m\nno"]
    assert demo_corpus.cut_at_line_ends(text, 99) == [text]
    assert demo_corpus.cut_at_line_ends(b"ab\n", 2) == [b"ab\n"]


def test_the_corpus_is_the_standard_library_and_training_uses_nine_tenths_of_it(built):
    assert sorted(path.name for path in built.iterdir()) == SHARDS
    training, held_out = (documents(built / name) for name in SHARDS)
    modules = demo_corpus.standard_library(demo_corpus.Path(sysconfig.get_paths()["stdlib"]))
    assert sum(map(len, training)) + sum(map(len, held_out)) == sum(map(len, modules))
    assert sum(map(len, held_out)) + len(held_out) >= 49_153
    for microbatch_tokens in (640, 1280):
        assert used_share([1 + len(text) for text in training], microbatch_tokens) >= 0.9


def test_two_builds_write_the_same_bytes_and_files_that_are_there_stay(library, tmp_path, monkeypatch):
    def state(folder):
        return [(path.stat().st_ino, path.read_bytes()) for path in sorted(folder.iterdir())]

    for folder in ("a", "b"):
        assert build(tmp_path / folder, monkeypatch) == 0
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert [content for _, content in a] == [content for _, content in b]
    assert build(tmp_path / "a", monkeypatch) == 0 and state(tmp_path / "a") == a


def test_every_16th_module_is_held_out_and_cut_in_the_same_way(library, tmp_path, monkeypatch):
    assert build(tmp_path / "out", monkeypatch) == 0
    training, held_out = (documents(tmp_path / "out" / name) for name in SHARDS)
    assert {text[:5] for text in held_out} == {b"# 00\n", b"# 16\n", b"# 32\n"}
    assert len({text[:5] for text in training}) == 37
    assert {len(text) for text in training + held_out if len(text) >= 640} == {640}


def test_what_cannot_be_decoded_tests_and_tables_are_left_out(library):
    before = demo_corpus.standard_library(library)
    (library / "z.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    (library / "broken.py").write_bytes(b"#\n" * 99 + b"# caf\xe9\n")
    (library / "empty.py").touch()
    (library / "_sysconfigdata_x.py").write_text("x = 1\n")
    (library / "test").mkdir()
    (library / "test" / "module.py").write_text("x = 1\n")
    assert demo_corpus.standard_library(library) == [*before, "# coding: latin-1\n# café\n".encode()]


def test_an_error_is_one_sentence(library, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert build(tmp_path / "file", monkeypatch) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'file'}: cannot write the demo's shards here: ")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    assert build(tmp_path / "out", monkeypatch) == 1 and not (tmp_path / "out").exists()
    assert "found 0 modules; use a Python that includes it." in capsys.readouterr().err
