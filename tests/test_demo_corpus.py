"""data/demo_corpus.py: what it takes from the standard library, and how it writes it."""

import hashlib
import importlib.util
import json.decoder
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment

import train_gpt

SCRIPT = ROOT / "data" / "demo_corpus.py"
DEMO = replace(train_gpt.Settings(), **train_gpt.PRESETS["demo"])
SHARDS = ["stdlib_train_000001.bin", "stdlib_val_000000.bin"]
FILES = ["manifest.json", *SHARDS]
sys.path.insert(0, str(SCRIPT.parent))  # where a script finds what lies beside it


@pytest.fixture
def corpus():
    """The script as a module of its own for each test."""
    spec = importlib.util.spec_from_file_location("demo_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library(corpus, tmp_path, monkeypatch):
    """A folder that stands in for the standard library: 40 modules of 3,000 bytes and more."""
    folder = tmp_path / "library"
    (folder / "package").mkdir(parents=True)
    for i in range(40):
        (folder / f"{'package/' if i % 3 else ''}m{i:02}.py").write_text(
            f"# {i:02}\n" + "x = 1\n" * (499 + i)
        )
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


def build(corpus, monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["demo_corpus.py", str(folder)])
    return corpus.main()


def documents(path):
    """A shard's texts, through the reader of the training script."""
    shard = train_gpt.TokenShard(path, DEMO)
    starts = shard.index()
    assert starts[0] == 0
    return [bytes(shard.read(a, b)[1:].astype(np.uint8)) for a, b in zip(starts, starts[1:])]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder in which two processes at once built the corpus of this Python."""
    folder = tmp_path_factory.mktemp("corpus") / "new" / "folder"
    command = [sys.executable, str(SCRIPT), str(folder)]
    builds = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in builds:
        _, said = process.communicate(timeout=120)
        assert (process.returncode, said) == (0, b"")
    return folder


def test_two_builds_at_once_leave_two_shards_their_manifest_and_nothing_else(built):
    assert sorted(path.name for path in built.iterdir()) == FILES
    manifest = json.loads((built / "manifest.json").read_text())
    listed = manifest.pop("shards")
    assert manifest == {"format": 1, "tokenizer": "bytes", "vocab_size": 257, "bos_id": 256}
    assert list(listed) == SHARDS
    for name in SHARDS:
        shard = train_gpt.TokenShard(built / name, DEMO)
        sha256 = hashlib.sha256((built / name).read_bytes()).hexdigest()
        count = len(shard.index()) - 1
        assert listed[name] == {"documents": count, "tokens": shard.num_tokens, "sha256": sha256}


def test_the_corpus_is_the_standard_library_of_this_python_with_every_sixteenth_module_held_out(
    built, corpus
):
    texts = list(corpus.standard_library().values())
    training, held_out = (documents(built / name) for name in SHARDS)
    for module in (json.decoder, textwrap):
        assert Path(module.__file__).read_bytes() in texts
    assert sorted(held_out) == sorted(text[:2048] for text in texts[::16])
    assert sorted(training) == sorted(text for i, text in enumerate(texts) if i % 16)


def test_held_out_modules_are_cut_at_2048_bytes_and_not_in_training(corpus, library, tmp_path, monkeypatch):
    assert build(corpus, monkeypatch, tmp_path / "out") == 0
    training, held_out = (documents(tmp_path / "out" / name) for name in SHARDS)
    assert len(training) == 37 and [len(text) for text in held_out] == [2048] * 3
    assert not {text[:2048] for text in training} & set(held_out)
    whole = {path.read_bytes() for path in library.rglob("*.py")}
    assert set(training) < whole and set(held_out) <= {text[:2048] for text in whole}


def test_two_builds_are_byte_for_byte_the_same(corpus, library, tmp_path, monkeypatch):
    for folder in ("a", "b"):
        assert build(corpus, monkeypatch, tmp_path / folder) == 0
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sources_that_cannot_be_decoded_tests_and_generated_tables_are_left_out(corpus, library):
    before = corpus.standard_library()
    (library / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    (library / "broken.py").write_bytes(b"# caf\xe9, and no coding that says so\n")
    (library / "broken_later.py").write_bytes(b"#\n" * 99 + b"# caf\xe9\n")
    (library / "unknown.py").write_bytes(b"# coding: no-such-coding\n")
    (library / "empty.py").write_bytes(b"")
    (library / "_sysconfigdata_x.py").write_bytes(b"x = 1\n")
    for name in ("test", "site-packages", "encodings", "package/tests"):
        (library / name).mkdir()
        (library / name / "module.py").write_text("x = 1\n")
    added = dict(corpus.standard_library().items() - before.items())
    assert added == {"latin.py": "# coding: latin-1\n# café\n".encode()}


def test_an_interrupted_build_leaves_nothing(corpus, library, tmp_path, monkeypatch):
    """Whatever it wrote so far stands in a hidden folder, and is taken away."""
    seen = []

    def interrupt(source, target):
        seen.append((Path(target).exists(), sorted(path.name for path in Path(source).parent.iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(corpus, monkeypatch, tmp_path / "out")
    assert seen == [(False, FILES)] and not (tmp_path / "out").exists()


def test_a_build_during_another_does_not_disturb_it(corpus, library, tmp_path, monkeypatch):
    """The other begins and ends while this one has written all its documents and published none."""
    out, publish, others = tmp_path / "out", corpus.Corpus.publish, []

    def overtaken(self):
        others.append(subprocess.run([sys.executable, str(SCRIPT), str(out)], env=environment()))
        return publish(self)

    monkeypatch.setattr(corpus.Corpus, "publish", overtaken)
    assert build(corpus, monkeypatch, out) == 0 and others[0].returncode == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [len(documents(out / name)) for name in SHARDS] == [37, 3]


def test_a_corpus_that_is_there_stays_unless_it_is_damaged(corpus, library, tmp_path, monkeypatch):
    def state():
        return {path: (path.stat().st_ino, path.read_bytes()) for path in (tmp_path / "out").iterdir()}

    assert build(corpus, monkeypatch, tmp_path / "out") == 0
    before = state()
    assert build(corpus, monkeypatch, tmp_path / "out") == 0 and state() == before
    with open(tmp_path / "out" / SHARDS[1], "ab") as file:
        file.write(b"xx")
    assert build(corpus, monkeypatch, tmp_path / "out") == 0
    assert {path: content for path, (_, content) in state().items()} == {
        path: content for path, (_, content) in before.items()
    }


def test_it_needs_nothing_but_numpy(tmp_path):
    missing = "torch tqdm tiktoken pyarrow fsspec huggingface_hub"
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in '{missing}'.split():\n    sys.modules[name] = None\n"
    )
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(PYTHONPATH=tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_python_without_its_sources_is_one_sentence(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    assert build(corpus, monkeypatch, tmp_path / "out") == 1
    assert capsys.readouterr() == (
        "",
        f"{tmp_path / 'none'}: expected the standard library's source texts, found 0; use a Python that "
        "carries them.\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(corpus, library, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert build(corpus, monkeypatch, tmp_path / "file") == 1
    shown, said = capsys.readouterr()
    assert shown == "" and said.startswith(f"{tmp_path / 'file'}: cannot write the demo's shards here: ")
    assert said.count("\n") == 1 and "set DATA_PATH to a folder" in said


@pytest.mark.parametrize("missing", SHARDS)
def test_a_run_of_the_demo_builds_what_is_missing(built, tmp_path, missing):
    folder = tmp_path / train_gpt.DEMO_DATA
    shutil.copytree(built, folder)
    (folder / missing).unlink()
    train_gpt.ensure_demo_data(replace(DEMO, data_path=str(tmp_path)))
    for name in FILES:
        assert (folder / name).read_bytes() == (built / name).read_bytes()


def test_a_run_on_other_data_builds_nothing(tmp_path):
    changes = dict(data_path=str(tmp_path), train_files="my_train.bin", val_files="my_val.bin")
    train_gpt.ensure_demo_data(replace(DEMO, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_data_path_that_is_not_there_is_refused_and_not_made(tmp_path, run_main):
    missing = tmp_path / "none"
    code, shown, said = run_main("--nproc", PRESET="demo", DATA_PATH=missing, LOG_DIR=tmp_path / "logs")
    assert (code, shown, said.count("\n")) == (2, "", 1) and said.startswith("DATA_PATH: expected a folder")
    assert not missing.exists()
