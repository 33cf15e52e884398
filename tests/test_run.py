"""The run: clock, log lines, results, and the demo from end to end, as a user launches it."""

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment, launch, random_documents, write_shard

import train_gpt
from train_gpt import Clock, Log, Settings, train

STEP = re.compile(r"step:(\d+)/(\d+) train_time:(\d+)ms step_avg:([\d.]+)ms train_loss:([\d.]+)")
VALIDATION = re.compile(r"step:(\d+)/(\d+) val_loss:([\d.]+) train_time:(\d+)ms step_avg:([\d.]+)ms")


@pytest.fixture
def data(tmp_path):
    """Overrides for a run of the small model on random documents, with logs in tmp_path / 'logs'."""
    write_shard(tmp_path / "train_1.bin", np.concatenate(random_documents(1, 200)))
    write_shard(tmp_path / "val_0.bin", np.concatenate(random_documents(2, 40)))
    return {name.upper(): value for name, value in SMALL.items()} | dict(
        DEVICE="cpu",
        PRESET="speedrun",
        TRAIN_FILES=tmp_path / "train_*.bin",
        VAL_FILES=tmp_path / "val_*.bin",
        LOG_DIR=tmp_path / "logs",
        TORCH_COMPILE=0,
    )


def only_log(tmp_path):
    (path,) = (tmp_path / "logs").iterdir()
    return path.read_text(encoding="utf-8")


class Fake:
    """Stands in for model and clock where only the loop's decisions are looked at."""

    scalars = torch.zeros(1)


def raced(monkeypatch, tmp_path, losses, **overrides):
    """Steps trained, steps validated and last log lines of a race whose validations give `losses` in turn."""
    s = replace(Settings(), **dict(log_dir=str(tmp_path), num_iterations=10, val_loss_every=4) | overrides)
    trained, validated, losses = [], [], iter(losses)
    monkeypatch.setattr(
        train_gpt,
        "train_step",
        lambda forward, opt, loader, step, s: (trained.append(step), (torch.tensor(1.0), lambda: None))[1],
    )
    monkeypatch.setattr(train_gpt, "validate", lambda *a: (validated.append(a[-1]), next(losses))[1])
    log = Log(s, 0)
    train(Fake, None, None, None, None, s, None, log)
    return trained, validated, log.path.read_text().splitlines()


def test_the_race_validates_every_so_often_and_after_the_last_step(monkeypatch, tmp_path):
    trained, validated, lines = raced(monkeypatch, tmp_path, [9, 8, 7, 6])
    assert trained == list(range(10)) and validated == [0, 4, 8, 10]
    assert lines[-3].startswith(
        "target not reached: validation loss 6.0000, target 3.28, at step 10 of 10, after"
    )
    assert re.fullmatch(
        r"target_reached:0 target_loss:3.28 val_loss:6.0000 final_step:10 train_time:\d+ms "
        r"step_avg:[\d.]+ms",
        lines[-2],
    )
    assert re.fullmatch(r"peak memory allocated: \d+ MiB reserved: \d+ MiB", lines[-1])


def test_the_race_stops_at_the_first_validation_at_or_below_the_target(monkeypatch, tmp_path):
    trained, validated, lines = raced(monkeypatch, tmp_path, [9, 3.2801, 3.28, 0], target_loss=3.28)
    assert trained == list(range(8)) and validated == [0, 4, 8]
    assert "target reached: validation loss 3.2800, target 3.28, at step 8 of 10" in lines[-3]
    assert lines[-2].startswith("target_reached:1 ")


def test_a_race_without_validations_in_between_validates_at_the_end(monkeypatch, tmp_path):
    assert raced(monkeypatch, tmp_path, [1], val_loss_every=0)[1] == [10]


def test_the_clock_counts_only_between_start_and_stop(monkeypatch):
    now = iter([10.0, 12.5, 100.0, 101.0])
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    assert clock.milliseconds() == 0
    clock.start()
    clock.stop()
    assert clock.milliseconds() == 2500
    clock.start()
    assert clock.milliseconds() == 3500


def test_a_step_line_on_a_gpu_waits_one_step_behind(tmp_path, capsys):
    log, waited = Log(replace(Settings(), log_dir=str(tmp_path)), 0), []
    clock = Clock(torch.device("cpu"))
    clock.device = torch.device("cuda")
    log.step(1, torch.tensor(5.0), lambda: waited.append(1), clock)
    assert waited == [] and "step:1/" not in log.path.read_text()
    log.step(2, torch.tensor(4.0), lambda: waited.append(2), clock)
    assert (
        waited == [1]
        and "step:1/1705" in log.path.read_text()
        and "train_loss:5.0000" in log.path.read_text()
    )
    log.flush(clock)
    assert waited == [1, 2] and "train_loss:4.0000" in log.path.read_text()


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = Log(replace(Settings(), log_dir=str(tmp_path / "none")), 1)
    log.write("hello")
    log.validation(0, 1.0, Clock(torch.device("cpu")))
    log.result(0, 1.0, Clock(torch.device("cpu")))
    assert capsys.readouterr().out == "" and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_log_alone_reproduces_its_run_and_its_lines_parse(tmp_path, data):
    done = launch(**data, HF_TOKEN="hf_secret", MUON_LR=0.02, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = only_log(tmp_path)
    assert log.startswith((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    tail = log[len((ROOT / "train_gpt.py").read_text(encoding="utf-8")) :]
    for expected in (
        f"Python {sys.version}",
        f"PyTorch {torch.__version__}, CUDA ",
        "Triton ",
        "git commit: ",
        "seed: 0",
        "muon_lr: 0.02  (overridden)",
        "adam_lr: 0.008\n",
        "attention: ",
        "head: ",
        "newton_schulz: ",
        "1 rank x 8 microbatches x 64 tokens = 512 tokens/step",
    ):
        assert expected in tail, expected
    assert "hf_secret" not in log and "HF_TOKEN" not in tail
    steps, validations = STEP.findall(tail), VALIDATION.findall(tail)
    assert [int(step) for step, *_ in steps] == list(range(1, 7)) and all(
        total == "6" for _, total, *_ in steps
    )
    assert [int(step) for step, *_ in validations] == [0, 3, 6]
    assert (
        abs(float(validations[0][2]) - math.log(56)) < 1e-3
    )  # the padded vocabulary, since the head is zero
    assert tail.splitlines()[-1].startswith("peak memory allocated: ")
    shown = done.stdout.splitlines()
    assert shown[0] == shown[-1] and shown[0].startswith("log: ")
    assert "step:6/6 val_loss" in done.stdout and "def main" not in done.stdout


@pytest.mark.slow
def test_a_terminal_shows_one_live_line_with_losses_speed_and_time_left(tmp_path, data):
    outside, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=tmp_path,
        env=environment(**data),
        stdout=terminal,
        stderr=subprocess.PIPE,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(outside, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=60) == 0, process.stderr.read()
    process.stderr.close()
    shown = shown.decode()
    live = r"step \d/6 .*train \d\.\d+, val \d\.\d+, \d+ ms/step, [\d,]+ tokens/s, [\d:?]+ left"
    assert re.search(live, shown), shown
    assert "train_loss" not in shown and "step:3/6 val_loss:" in shown
    assert STEP.search(only_log(tmp_path))


@pytest.mark.slow
def test_the_demo_builds_its_corpus_and_its_loss_really_falls(tmp_path):
    done = launch(
        PRESET="demo",
        DATA_PATH=tmp_path,
        LOG_DIR=tmp_path / "logs",
        NUM_ITERATIONS=12,
        VAL_LOSS_EVERY=12,
        VAL_TOKENS=8192,
        BATCH_TOKENS=2048,
        WARMUP_STEPS=0,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (_, _, first, *_), (_, _, last, *_) = VALIDATION.findall(done.stdout)
    assert 5.5 < float(first) < 5.7 and float(last) < 3.5


def test_the_demo_corpus_is_the_standard_library_and_holds_modules_out(tmp_path):
    built = launch(tmp_path / "a", script=ROOT / "data" / "demo_corpus.py")
    assert built.returncode == 0, built.stderr
    demo = replace(Settings(), **train_gpt.PRESETS["demo"])
    texts = {}
    for name in ("train_000001", "val_000000"):
        shard = train_gpt.TokenShard(tmp_path / "a" / f"stdlib_{name}.bin", demo)
        starts = shard.index()
        documents = [
            bytes(shard.tokens[a + 1 : b].astype(np.uint8)) for a, b in zip(starts, starts[1:], strict=False)
        ]
        texts[name] = set(documents)
    assert not texts["train_000001"] & texts["val_000000"]
    import json.decoder
    import textwrap

    for module in (json.decoder, textwrap):
        source = open(module.__file__, "rb").read()
        assert (source in texts["train_000001"]) != (source in texts["val_000000"])
    again = launch(tmp_path / "b", script=ROOT / "data" / "demo_corpus.py")
    assert again.returncode == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_folder_that_cannot_hold_logs_is_one_sentence(tmp_path, data):
    (tmp_path / "file").touch()
    done = launch(**data | dict(LOG_DIR=tmp_path / "file"))
    assert (
        done.returncode == 1
        and done.stderr.startswith("LOG_DIR: expected a folder")
        and done.stderr.count("\n") == 1
    )


def test_run_sh_prints_the_line_that_it_runs_and_passes_settings_on(tmp_path, data):
    done = subprocess.run(
        [str(ROOT / "run.sh")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment(**data, PYTHON=sys.executable, NPROC=2),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^\+ .* -m torch.distributed.run --standalone --nproc_per_node=2 .*train_gpt.py$", done.stdout, re.M
    )
    assert "2 ranks x 4 microbatches x 64 tokens" in done.stdout and "step:6/6 val_loss" in done.stdout
    wrong = subprocess.run(
        [str(ROOT / "run.sh")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=environment(PYTHON=sys.executable, NUM_ITERATION=3),
    )
    assert (
        wrong.returncode == 2
        and wrong.stdout == ""
        and wrong.stderr.startswith("NUM_ITERATION: no such setting")
    )
