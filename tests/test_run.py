"""The run: clock, log, what it shows and when it ends, the demo as a whole, and text from a checkpoint."""

import fcntl
import gc
import importlib
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import asdict, fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, ROOT, before, environment, fresh_model, launch, overrides, ran

import train_gpt
from train_gpt import Clock, Log, Settings

STEP = re.compile(r"^step:(\d+)/(\d+) train_time:(\d+)ms step_avg:([\d.]+)ms train_loss:([\d.]+)$", re.M)
VALIDATION = re.compile(r"^step:(\d+)/(\d+) val_loss:([\d.]+) train_time:(\d+)ms step_avg:([\d.]+)ms$", re.M)


def logs(s):
    """What the logs of a folder hold, the oldest first."""
    paths = sorted((ROOT / s.log_dir).glob("*/log.txt"), key=lambda path: path.stat().st_ctime_ns)
    return [path.read_text(encoding="utf-8") for path in paths]


# ---- The loop, with a training step that takes a second and a validation that takes 1000

@pytest.fixture
def race(monkeypatch, tmp_path):
    """race(losses of validations): steps trained, validated and saved after, the log's lines, exit code."""
    handlers = [(number, signal.getsignal(number)) for number in train_gpt.STOP_SIGNALS]

    def race(losses, **changes):
        values = dict(log_dir=str(tmp_path), num_iterations=10, val_loss_every=4, device="cpu") | changes
        s = replace(Settings(), **values)
        trained, validated, saved, losses = [], [], [], iter(losses)

        def train_step(model, optimizer, batches, step, *_):
            trained.append(step.number + 1)
            return train_gpt.Status(step, torch.tensor([1.0, 0.0]), None)

        def validate(*_):
            validated.append(len(trained))
            return next(losses)

        def save_checkpoint(log, model, optimizer, step, *_):
            saved.append(step)

        for function in (train_step, validate, save_checkpoint):
            monkeypatch.setattr(train_gpt, function.__name__, function)
        monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: len(trained) + 1000.0 * len(validated))
        optimizer, log = SimpleNamespace(rank=0, world_size=1, sharded_params=[], waiting=False), Log(s, 0)
        model = SimpleNamespace(settings=s, enter_stage=lambda stage: None)
        schedule = train_gpt.make_schedule(s)
        ending = train_gpt.train(model, optimizer, None, schedule, None, log, Clock(CPU), {}, 0)
        lines = (log.folder / "log.txt").read_text().splitlines()
        return SimpleNamespace(trained=trained, validated=validated, saved=saved, lines=lines, ending=ending)

    yield race
    gc.enable()
    gc.unfreeze()
    for number, handler in handlers:
        signal.signal(number, handler)


def test_validations_and_checkpoints_are_not_on_the_clock_and_the_result_is_told(race):
    done = race([9, 8, 7, 6], checkpoint_every=3)
    assert (done.trained, done.validated) == (list(range(1, 11)), [0, 4, 8, 10])
    assert [line for line in done.lines if re.match("step:(4|5|10)/", line)] == [
        "step:4/10 train_time:4000ms step_avg:1000.00ms train_loss:1.0000",
        "step:4/10 val_loss:8.0000 train_time:4000ms step_avg:1000.00ms",
        "step:5/10 train_time:5000ms step_avg:1000.00ms train_loss:1.0000",
        "step:10/10 train_time:10000ms step_avg:1000.00ms train_loss:1.0000",
        "step:10/10 val_loss:6.0000 train_time:10000ms step_avg:1000.00ms",
    ]
    assert (done.ending.code, done.ending.num_steps) == (0, 10)
    assert done.ending.text == "target not reached: validation loss 6.0000, target 3.28, after step 10 of 10"
    assert done.lines[-2:] == [
        "target_reached:0 target_loss:3.28 val_loss:6.0000 final_step:10 train_time:10000ms "
        "step_avg:1000.00ms",
        "peak memory allocated: 0 MiB reserved: 0 MiB",
    ]
    assert done.saved == [3, 6, 9, 10]


def test_the_race_stops_at_the_first_validation_at_or_below_the_target(race):
    done = race([9, 3.2801, 3.28, 0], checkpoint_every=6)
    assert (done.trained, done.validated, done.saved) == (list(range(1, 9)), [0, 4, 8], [6, 8])
    assert done.ending.text == "target reached: validation loss 3.2800, target 3.28, after step 8 of 10"
    assert done.lines[-2].startswith("target_reached:1 ")


def test_without_validations_in_between_and_checkpoints_there_is_one_at_the_end_and_none(race):
    done = race([1], val_loss_every=0)
    assert (done.validated, done.saved) == ([10], [])


def test_starting_and_stopping_the_clock_wait_for_a_gpu_and_reading_it_does_not(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = Clock(torch.device("cuda", 3))
    for expected in (2, 4):
        clock.start()
        clock.times(1)
        clock.stop()
        clock.times(1)
        assert waited == [clock.device] * expected


# ---- Logs and what is shown

@pytest.mark.slow
def test_a_log_holds_source_environment_settings_and_lines_that_parse_but_no_secret(tmp_path, data):
    """A copy under another name logs itself."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8") + "# an experiment – größer\n"
    script = tmp_path / "experiment.py"
    script.write_text(source, encoding="utf-8")
    s = replace(data, muon_lr=0.02, target_loss=0.0)
    done = launch(script=script, cwd=tmp_path, **overrides(s), HF_TOKEN="hf_secret", MY_OWN="my_secret")
    assert done.returncode == 0, done.stderr
    [log] = logs(s)
    assert log.startswith(source + "\n" + "=" * 100 + "\n")
    tail = log[len(source) :]
    for f in fields(Settings):
        mark = "  (overridden)" if f.name.upper() in overrides(s) else ""
        assert f"\n{f.name}: {train_gpt.setting_text(getattr(s, f.name))}{mark}\n" in tail, f.name
    for expected in (
        f"\nPython {sys.version}\n",
        f"\nPyTorch {torch.__version__}, CUDA ",
        ", Triton ",
        "\ngit rev-parse HEAD: ",
        "\npreset: speedrun, set by PRESET\n",
        "\nkernels: plain PyTorch (the device is a CPU)\n",
        "\nbatch: 1 rank x 8 microbatches x 64 tokens = 512 tokens/step\n",
    ):
        assert expected in tail, expected
    assert not re.search("hf_secret|HF_TOKEN|my_secret|MY_OWN", log)
    assert [x[:2] for x in STEP.findall(tail)] == [(str(i), "6") for i in range(1, 7)]
    assert [x[:2] for x in VALIDATION.findall(tail)] == [("0", "6"), ("3", "6"), ("6", "6")]
    assert float(VALIDATION.findall(tail)[0][2]) == pytest.approx(math.log(56), abs=1e-3)  # the head is zero
    assert done.stdout.startswith("log: ") and "def main" not in done.stdout
    assert STEP.findall(done.stdout) == STEP.findall(tail)
    for_programs = re.compile(r"^(target_reached:|peak memory allocated: ).*", re.M)
    assert len(for_programs.findall(tail)) == 2 and not for_programs.search(done.stdout)
    last = (r"target not reached: .*\ntraining: 3,072 tokens in [\d.]+ s, [\d,]+ a second; "
            r"from start to end: [\d.]+ s\n")
    assert re.search(last + r"\Z", done.stdout) and re.search(last + r"\Z", tail)


def test_two_runs_with_one_seed_write_one_log_but_for_times_and_warm_up(data):
    """Which thereby leaves no trace; another seed has other losses."""
    for s in (data, data, replace(data, warmup_steps=0), replace(data, seed=1)):
        ran(s)
    times = r"[\d.]+m?s\b|[\d.]+ s\b|[\d,]+ a second"
    timeless = [re.sub(times, "TIME", log) for log in logs(data)]
    assert len(timeless) == 4 and timeless[0] == timeless[1]
    losses = [re.findall(r"^step:.*(?:train|val)_loss:([\d.]+)", log, re.M) for log in timeless]
    assert losses[0] == losses[2] != losses[3] and len(losses[0]) == 6 + 3


def eager(rank):
    """torch.compile without a compiler."""
    torch.compile = partial(torch.compile, backend="eager")


@pytest.mark.slow
def test_the_warm_up_leaves_nothing_to_compile(data):
    """Training meets three stages, and so do validations, at steps 0, 3 and 6. A stage has two graphs, one
    for training and one for validation, whatever else moves from step to step."""
    layout = dict(layout="AM AM", value_embeds="0.", window_pattern="LS", warmup_steps=1,
                  batch_tokens=(128, 256, 512), stage_lr_factors=(1.0, 1.5, 2.0))
    shown = ran(replace(data, torch_compile=True, target_loss=0.0, **layout), eager)
    assert re.search(r"^ready after \d+\.\d s: 3 warm-up steps, 6 graphs compiled$", shown, re.M)
    assert "\ncompiled since the warm-up: 0 graphs\n" in shown


@pytest.mark.slow
def test_a_terminal_shows_one_live_line_with_losses_speed_and_time_left(tmp_path, data):
    outside, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    process = subprocess.Popen(command, env=environment(**overrides(data)), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(outside, 1 << 16)
        except OSError:  # the other end is closed
            break
    shown = shown.decode()
    assert process.wait(timeout=60) == 0, shown
    assert re.search(r"\rstep \d/6 .*train \d\.\d+, val \d\.\d+, [\d.]+ms/step, [\d:?]+ left", shown), shown
    assert "train_loss" not in shown and re.search(r"\bstep:3/6 val_loss:", shown)
    assert len(STEP.findall(logs(data)[0])) == 6


WARNING = r"WARNING: std\w+ could not be written: .*; the run goes on, and its log is "


def full(rank):
    """As by `> /dev/full 2>&1`."""
    with open("/dev/full", "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)


def closed(rank):
    """As by `>&- 2>&-`."""
    sys.stdout = sys.stderr = None
    os.close(1)
    os.close(2)


def ascii_only(rank):
    """As by PYTHONIOENCODING=ascii, which raises an error for other characters."""
    sys.stdout = open(1, "w", encoding="ascii", errors="strict", closefd=False)


@pytest.mark.parametrize("fault, told", [(full, 2), (closed, 0), (ascii_only, 0)])
def test_a_console_that_fails_stops_no_run_and_the_log_has_all_and_says_so_once(data, tmp_path, fault, told):
    s = replace(data, log_dir=str(tmp_path / "größe"))
    shown = ran(s, fault)
    [log] = logs(s)
    assert "log.txt" in shown if fault == ascii_only else shown == ""
    assert len(STEP.findall(log)) == 6 and re.search("^target_reached:", log, re.M)
    assert len(re.findall(rf"^{WARNING}", log, re.M)) == told


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -3", "> /dev/full"])
def test_a_run_whose_output_nobody_takes_goes_on_to_its_end_and_exits_as_it_does(data, redirection):
    """Also where Python writes what is left at its end; stderr says where the output is."""
    command = f"set -o pipefail; {sys.executable} {ROOT / 'train_gpt.py'} {redirection}"
    environ = environment(**overrides(data))
    done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n")) == (0, 3 * ("head" in redirection)), done.stderr
    assert re.fullmatch(rf"{WARNING}.*\n", done.stderr)
    assert "\ntarget_reached:" in logs(data)[0]


def test_a_plan_that_cannot_be_printed_is_told_on_stderr(data, run_main, monkeypatch):
    with open("/dev/full", "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        code, _, said = run_main("--dry-run", **overrides(data))
        assert (code, said) == (0, "stdout could not be written: [Errno 28] No space left on device\n")


def test_a_folder_that_cannot_hold_logs_is_one_sentence(tmp_path, data, run_main):
    file = tmp_path / "file"
    file.touch()
    for arguments in ([], ["--dry-run"]):
        code, shown, said = run_main(*arguments, **overrides(replace(data, log_dir=str(file / "logs"))))
        assert (code, shown) == (2, "")
        assert said == f"LOG_DIR: expected a folder that can be written, found {file}; name another.\n"


def test_places_that_are_not_there_are_told_at_once_and_nothing_is_made(tmp_path, data, run_main):
    s = replace(data, data_path=str(tmp_path / "no_data"), resume=str(tmp_path / "no_checkpoint"))
    for arguments in ([], ["--dry-run"]):
        code, shown, said = run_main(*arguments, **overrides(s))
        assert (code, shown) == (2, "") and "DATA_PATH: expected a folder, found none" in said
        assert "RESUME: expected a checkpoint, found no file" in said
    assert not (tmp_path / "no_data").exists()


# ---- Ends

def out_of_memory(rank):
    def lack(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.21 GiB.")

    train_gpt.train = lack


def test_a_gpu_without_memory_left_is_one_sentence_that_names_the_settings(data):
    said = ran(data, out_of_memory, code=1).splitlines()[-1]
    assert said.startswith("MICROBATCHES: expected a step to fit in the GPU's memory; set more ")
    assert "VAL_SLICE_TOKENS" in said and said.endswith(" GiB.")


@pytest.mark.slow
def test_the_demo_builds_its_corpus_and_reaches_its_target(tmp_path):
    """With a process of one thread for each core that gets microbatches."""
    done = launch(PRESET="demo", DATA_PATH=tmp_path, LOG_DIR=tmp_path, NPROC=None, timeout=900)
    assert done.returncode == 0, done.stderr
    target = train_gpt.PRESETS["demo"]["target_loss"]
    ranks = train_gpt.count_processes(replace(Settings(), **train_gpt.PRESETS["demo"]), CPU)
    assert f"\nbatch: {ranks} rank" in done.stdout
    [loss] = re.findall(rf"^target reached: validation loss (\S+), target {target:g},", done.stdout, re.M)
    assert float(loss) <= target
    sample = ("--- a text that the model has not seen:\n.+\n"
              "--- how it goes on, after training on 56,320 tokens in .+:\n.+"
              "\n--- better with more steps: put NUM_ITERATIONS=600 ")
    assert re.search(sample, done.stdout, re.S)


# ---- Text from a checkpoint

@pytest.fixture
def sampled(small, tmp_path, monkeypatch, capfd):
    """sampled(arguments, settings): what records/sample.py prints of random weights and step 2."""
    monkeypatch.syspath_prepend(ROOT / "records")
    sample = importlib.import_module("sample")

    def sampled(*arguments, path=tmp_path / "step_000002.safetensors", **changes):
        s = replace(small, vocab_size=257, bos_id=256, num_iterations=9, device="cuda",
                    ngram_rows=40, ngram_dim=8, ngram_max=5)
        model = fresh_model(s)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.lm_head)
        tensors = {name: p.data for name, p in model.named_parameters()}
        identity = {name: x for name, x in asdict(s).items() if name not in train_gpt.FREE_TO_CHANGE}
        about = dict(step="2", run=json.dumps(identity | changes))
        train_gpt.write_safetensors(tmp_path / "step_000002.safetensors", tensors, about)
        monkeypatch.setattr(sys, "argv", ["sample.py", str(path), *arguments])
        return sample.main(), *capfd.readouterr()

    return sampled


def test_a_sample_begins_with_its_prompt_and_is_that_of_its_seed(sampled):
    """Also one of a GPU's model, where none is."""
    arguments = ("--prompt", "Größe: ", "--length", "20")
    code, text, said = sampled(*arguments)
    assert (code, said) == (0, "") and text.startswith("Größe: ") and 12 < len(text) <= 7 + 20 + 1
    assert sampled(*arguments, "--seed", "0")[1] == text != sampled(*arguments, "--seed", "1")[1]
    assert sampled("--prompt", "Größe: ", "--length", "0")[1] == "Größe: \n"


def test_a_sample_without_a_prompt_has_the_windows_of_the_checkpoints_step(sampled, monkeypatch):
    """Its n-grams are longer than the text at first."""
    windows = []
    before(train_gpt, "generate", lambda model, stage, *_: windows.append(stage.long_window), monkeypatch)
    assert sampled("--length", "2")[0] == 0 and windows == [3 * 4], "step 2 of 9 is in the first stage"


@pytest.mark.parametrize("changes, expected", [
    (dict(vocab_size=264), "expected a vocabulary of bytes (257 ids), or GPT-2's (50,257 ids) and tiktoken"),
    (dict(model_dim=64), "expected a checkpoint of this train_gpt.py"),
    (dict(path="nowhere"), "nowhere: expected a whole checkpoint, found [Errno 2] No such file"),
])
def test_what_cannot_be_sampled_is_one_sentence(sampled, changes, expected):
    code, shown, said = sampled(**changes)
    assert (code, shown, said.count("\n")) == (1, "", 1) and expected in said
