"""data/demo_corpus.py: what the demo's corpus holds, and how it is written."""

import re
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT, environment, read_shard

sys.path.insert(0, str(ROOT / "data"))
import demo_corpus  # noqa: E402

SHARDS = ["stdlib_train_000001.bin", "stdlib_val_000000.bin"]


def build(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo_corpus.py", str(folder)])
    return demo_corpus.main()


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
    monkeypatch.setattr(demo_corpus, "HELD_OUT", {"m00", "m16", "m32", "not/there"})
    return folder


def test_parts_end_at_the_first_line_end_after_the_size_and_together_are_the_text():
    text = b"ab\n\ncd\r\nefghijkl\nm\nno"
    assert demo_corpus.cut_at_line_ends(text, 4) == [b"ab\n\n", b"cd\r\n", b"efghijkl\n", b"m\nno"]
    assert demo_corpus.cut_at_line_ends(text, 99) == [text]
    assert demo_corpus.cut_at_line_ends(b"ab\n", 2) == [b"ab\n"]


def test_the_corpus_is_the_standard_library_and_training_uses_nine_tenths_of_it(built, run_main):
    assert sorted(path.name for path in built.iterdir()) == SHARDS
    documents = [document for name in SHARDS for document in read_shard(built / name)]
    training, validation = demo_corpus.standard_library(demo_corpus.Path(sysconfig.get_paths()["stdlib"]))
    assert sum(map(len, documents)) == sum(map(len, training + validation))
    assert len(validation) > 20, "most of the modules held out are in this Python"
    files = dict(TRAIN_FILES=built / SHARDS[0], VAL_FILES=built / SHARDS[1])
    code, shown, said = run_main("--dry-run", PRESET="demo", DEVICE="cpu", **files)
    assert (code, said) == (0, "") and float(re.search(r"uses [\d,]+ \((.+)%\)", shown)[1]) > 90


def test_two_builds_write_the_same_bytes_and_a_third_replaces_only_shards(library, tmp_path, monkeypatch):
    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    for folder in ("a", "b"):
        assert build(tmp_path / folder, monkeypatch) == 0
    (tmp_path / "b" / "notes").touch()
    assert build(tmp_path / "b", monkeypatch) == 0
    assert files(tmp_path / "b") == files(tmp_path / "a") | {"notes": b""}


def test_named_modules_are_held_out_and_cut_in_the_same_way(library, tmp_path, monkeypatch):
    assert build(tmp_path / "out", monkeypatch) == 0
    training, held_out = (read_shard(tmp_path / "out" / name) for name in SHARDS)
    assert {bytes(text[:5].tolist()) for text in held_out} == {b"# 00\n", b"# 16\n", b"# 32\n"}
    assert len({bytes(text[:5].tolist()) for text in training}) == 37
    assert {len(text) for text in training + held_out if len(text) >= 640} == {640}


def test_what_cannot_be_decoded_tests_and_tables_are_left_out(library):
    training, validation = demo_corpus.standard_library(library)
    (library / "z.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    (library / "broken.py").write_bytes(b"#\n" * 99 + b"# caf\xe9\n")
    (library / "empty.py").touch()
    (library / "_sysconfigdata_x.py").write_text("x = 1\n")
    (library / "test").mkdir()
    (library / "test" / "module.py").write_text("x = 1\n")
    training.append("# coding: latin-1\n# café\n".encode())
    assert demo_corpus.standard_library(library) == (training, validation)


def test_an_error_is_one_sentence(library, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert build(tmp_path / "file", monkeypatch) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'file'}: cannot write the demo's shards here: ")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    assert build(tmp_path / "out", monkeypatch) == 1 and not (tmp_path / "out").exists()
    assert "found 0 modules to train on and 0 to validate on; use a Python" in capsys.readouterr().err
