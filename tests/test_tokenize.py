"""data/tokenize_text.py, run as a user runs it."""

import gzip
import json
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, environment

SCRIPT = ROOT / "data/tokenize_text.py"
TEXTS = ["def one():\n", "zwei \u2713", "three\n\nparagraphs", "\ufeffx"] + [f"text {i}" for i in range(60)]
OFFLINE = dict(HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1)


def tokenize(*arguments, tokenizer="bytes"):
    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--tokenizer", tokenizer]
    return subprocess.run(command, env=environment(**OFFLINE), capture_output=True, text=True, timeout=120)


def documents(path):
    """The texts in a shard of bytes."""
    header, tokens = np.fromfile(path, "<i4", count=256), np.fromfile(path, "<u2", offset=1024)
    assert header.tolist() == [20240520, 1, len(tokens)] + 253 * [0] and tokens[0] == 256
    cuts = [*np.flatnonzero(tokens == 256), len(tokens)]
    return [bytes(tokens[a + 1:b].astype(np.uint8)).decode() for a, b in zip(cuts[:-1], cuts[1:])]


@pytest.fixture
def lines(tmp_path):
    """A file of JSON lines with TEXTS and an empty document."""
    path = tmp_path / "in" / "texts.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in [*TEXTS, ""]), encoding="utf-8")
    return path


def test_documents_keep_their_order_and_every_nth_is_held_out_by_any_number_of_workers(lines, tmp_path):
    for workers in (1, 2):
        done = tokenize(lines, "--out", tmp_path / str(workers), "--val-every", 8, "--workers", workers)
        assert done.returncode == 0, done.stderr
    for name in ("text_train_000001.bin", "text_val_000000.bin"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert documents(tmp_path / "1/text_val_000000.bin") == TEXTS[::8]
    assert documents(tmp_path / "1/text_train_000001.bin") == [t for i, t in enumerate(TEXTS) if i % 8]


def test_text_compressed_and_parquet_files_of_a_folder_are_read_in_name_order(tmp_path):
    (tmp_path / "a.txt").write_text("a whole\nfile")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b1"}\n{"text": "b2"}\n'))
    table = pyarrow.table({"text": ["c1", "c2"], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    done = tokenize(tmp_path, "--out", tmp_path / "out", "--val-every", 5)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "out/text_val_000000.bin") == ["a whole\nfile"]
    assert documents(tmp_path / "out/text_train_000001.bin") == ["b1", "b2", "c1", "c2"]


def test_the_command_that_it_prints_trains(lines, tmp_path):
    lines.write_text((json.dumps(dict(text=SCRIPT.read_text())) + "\n") * 40)
    done = tokenize(lines, "--out", tmp_path / "out", "--val-every", 2)
    words = shlex.split(done.stdout.splitlines()[-1].removeprefix("train: "))
    settings = dict(word.split("=", 1) for word in words[:-1])
    small = dict(NUM_ITERATIONS=1, WARMUP_STEPS=0, SAMPLE_TOKENS=0, LOG_DIR=tmp_path / "logs")
    command, environ = [sys.executable, ROOT / "train_gpt.py"], environment(**settings | small)
    trained = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert trained.returncode == 0 and "final_step:1 " in trained.stdout, trained.stderr


@pytest.mark.parametrize("line, said", [
    ('{"other": 1}', "no such field"), ('{"text": 1}', "int"), ('{"text": ', "expected a text in 'text'"),
])
def test_a_wrong_line_is_one_sentence_and_nothing_is_written(lines, tmp_path, line, said):
    lines.write_text('{"text": "good"}\n' + line + "\n")
    done = tokenize(lines, "--out", tmp_path / "out")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith(f"{lines}, after 1 good lines") and said in sentence


def test_wrong_inputs_and_a_folder_with_shards_are_one_sentence(lines, tmp_path):
    done = tokenize(tmp_path / "nothing", "--out", tmp_path / "out")
    assert done.returncode == 1 and "expected files that end in" in done.stderr
    assert tokenize(lines, "--out", tmp_path / "out").returncode == 0
    before = (tmp_path / "out/text_train_000001.bin").read_bytes()
    done = tokenize(lines, "--out", tmp_path / "out")
    assert done.returncode == 1 and "add --overwrite" in done.stderr
    assert (tmp_path / "out/text_train_000001.bin").read_bytes() == before
    assert tokenize(lines, "--out", tmp_path / "out", "--overwrite").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_shards_and_the_next_one_works(lines, tmp_path, number):
    lines.write_text((json.dumps(dict(text="word " * 2000)) + "\n") * 5000)
    command = [sys.executable, SCRIPT, lines, "--out", tmp_path / "out", "--tokenizer", "bytes"]
    run = subprocess.Popen(command, env=environment(**OFFLINE), stderr=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "out/.partial/text_train_000001.bin").exists():
            break
        time.sleep(0.05)
    run.send_signal(number)
    assert run.wait(30) != 0
    assert not list((tmp_path / "out").glob("*.bin"))
    lines.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert tokenize(lines, "--out", tmp_path / "out").returncode == 0
    assert documents(tmp_path / "out/text_train_000001.bin") == ["b"]
    assert not (tmp_path / "out/.partial").exists()
