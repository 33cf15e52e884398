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
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT, environment, fresh_model, launch, overrides

import train_gpt
from train_gpt import Clock, Log, Settings, UserError, World, train

STEP = re.compile(r"step:(\d+)/(\d+) train_time:(\d+)ms step_avg:([\d.]+)ms train_loss:([\d.]+)")
VALIDATION = re.compile(r"step:(\d+)/(\d+) val_loss:([\d.]+) train_time:(\d+)ms step_avg:([\d.]+)ms")


def only_log(tmp_path):
    (path,) = (tmp_path / "logs").iterdir()
    return path.read_text(encoding="utf-8")


class FakeModel:
    """Stands in for the model where only the loop's decisions are looked at."""

    scalars = torch.zeros(1)


class FakeCheckpoints:
    """Stands in for the checkpoints, and keeps the steps after which one was written."""

    def __init__(self, saved):
        self.save = saved.append


class FakeLoader:
    """Stands in for the loader; its second pass begins in step 3."""

    def __init__(self, trained):
        self.trained = trained

    @property
    def passes(self):
        return 1 if len(self.trained) < 3 else 2

    def use(self, steps):
        return f"what {steps} steps took"


def raced(monkeypatch, tmp_path, losses, saved=None, **changes):
    """Steps trained, steps validated and log lines of a race whose validations give `losses` in turn.

    A training step takes a second, a validation 1000.
    """
    s = replace(Settings(), **dict(log_dir=str(tmp_path), num_iterations=10, val_loss_every=4) | changes)
    trained, validated, losses = [], [], iter(losses)

    def train_step(forward, optimizers, loader, step, s, stop_signal):
        trained.append(step)
        return lambda: (1.0, stop_signal())

    def validate(model, forward, val_tokens, s, world, step):
        validated.append(step)
        return next(losses)

    monkeypatch.setattr(train_gpt, "train_step", train_step)
    monkeypatch.setattr(train_gpt, "validate", validate)
    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: len(trained) + 1000.0 * len(validated))
    log = Log(s, 0)
    world, clock = World(0, 1, 0, 1), Clock(torch.device("cpu"))
    checkpoints = FakeCheckpoints([] if saved is None else saved)
    train(FakeModel, None, None, FakeLoader(trained), None, s, world, log, clock, checkpoints)
    return trained, validated, log.path.read_text().splitlines()


def test_the_race_validates_every_so_often_and_after_the_last_step(monkeypatch, tmp_path):
    trained, validated, lines = raced(monkeypatch, tmp_path, [9, 8, 7, 6])
    assert trained == list(range(10)) and validated == [0, 4, 8, 10]
    assert lines[-3:] == [
        "target not reached: validation loss 6.0000, target 3.28, at step 10 of 10, after 10.0 s of training",
        "target_reached:0 target_loss:3.28 val_loss:6.0000 final_step:10 train_time:10000ms "
        "step_avg:1000.00ms",
        "peak memory allocated: 0 MiB reserved: 0 MiB",
    ]


@pytest.mark.parametrize(
    "changes, losses, expected",
    [
        (dict(), [4.0, 4.0, 4.0, 4.0], []),
        (dict(checkpoint_every=3), [4.0, 4.0, 4.0, 4.0], [3, 6, 9]),
        (dict(checkpoint_every=5, checkpoint_last=True), [4.0, 4.0, 4.0, 4.0], [5, 10]),
        (dict(checkpoint_last=True), [4.0, 4.0, 3.0], [8]),
    ],
)
def test_checkpoints_are_written_every_so_often_and_at_the_end_if_asked(
    monkeypatch, tmp_path, changes, losses, expected
):
    saved = []
    raced(monkeypatch, tmp_path, losses, saved, **changes)
    assert saved == expected


def test_each_further_pass_over_the_data_and_what_was_taken_are_logged(monkeypatch, tmp_path):
    _, _, lines = raced(monkeypatch, tmp_path, [4.0, 4.0, 3.0])
    assert [line for line in lines if line.startswith("data:")] == [
        "data: pass 2 over the training shards begins in step 3",
        "data: what 8 steps took",
    ]


def test_validation_is_not_on_the_clock(monkeypatch, tmp_path):
    _, _, lines = raced(monkeypatch, tmp_path, [9, 8, 7, 6])
    assert [line for line in lines if line.startswith(("step:4/", "step:5/", "step:10/"))] == [
        "step:4/10 train_time:4000ms step_avg:1000.00ms train_loss:1.0000",
        "step:4/10 val_loss:8.0000 train_time:4000ms step_avg:1000.00ms",
        "step:5/10 train_time:5000ms step_avg:1000.00ms train_loss:1.0000",
        "step:10/10 train_time:10000ms step_avg:1000.00ms train_loss:1.0000",
        "step:10/10 val_loss:6.0000 train_time:10000ms step_avg:1000.00ms",
    ]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_ends_the_race_with_a_sentence(monkeypatch, tmp_path, loss):
    with pytest.raises(UserError, match=f"^step 4: expected a finite validation loss, found {loss}") as error:
        raced(monkeypatch, tmp_path, [9, loss, 7, 6])
    assert error.value.exit_code == 1
    (log,) = tmp_path.iterdir()
    assert f"step:4/10 val_loss:{loss}" in log.read_text() and "target_reached" not in log.read_text()


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


def test_starting_and_stopping_the_clock_wait_for_a_gpu_and_reading_it_does_not(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for device in (torch.device("cpu"), torch.device("cuda", 3)):
        clock = Clock(device)
        for expected in (1, 2):
            clock.start()
            clock.milliseconds()
            clock.stop()
            clock.milliseconds()
            assert waited == ([device] * 2 * expected if device.type == "cuda" else [])


def test_a_step_line_on_a_gpu_is_written_one_step_later(tmp_path):
    log, waited = Log(replace(Settings(), log_dir=str(tmp_path)), 0), []
    clock = Clock(torch.device("cuda"))

    def loss(value):
        return lambda: waited.append(value) or (value, 0)

    log.step(1, loss(5.0), clock)
    assert waited == [] and "step:1/" not in log.path.read_text()
    log.step(2, loss(4.0), clock)
    assert waited == [5.0]
    assert re.search(r"^step:1/1705 .* train_loss:5.0000$", log.path.read_text(), re.M)
    log.flush(clock)
    log.flush(clock)
    assert waited == [5.0, 4.0] and log.path.read_text().count("train_loss:4.0000") == 1


def test_a_step_line_on_the_cpu_is_written_at_once(tmp_path):
    log = Log(replace(Settings(), log_dir=str(tmp_path)), 0)
    assert log.step(1, lambda: (5.0, 15), Clock(torch.device("cpu"))) == 15
    assert "train_loss:5.0000" in log.path.read_text()


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    log = Log(replace(Settings(), log_dir=str(tmp_path / "none")), 1)
    log.write("hello")
    log.validation(0, 1.0, Clock(torch.device("cpu")))
    log.result(0, 1.0, Clock(torch.device("cpu")))
    assert capsys.readouterr().out == "" and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_log_holds_its_scripts_source_all_settings_the_environment_and_lines_that_parse(tmp_path, data):
    """But the value of no environment variable. A copy under another name logs itself."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8") + "# an experiment\n"
    script = tmp_path / "experiment.py"
    script.write_text(source, encoding="utf-8")
    s = replace(data, muon_lr=0.02)
    done = launch(script=script, **overrides(s), HF_TOKEN="hf_secret", MY_OWN="my_secret", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = only_log(tmp_path)
    assert log.startswith(source + "\n" + "=" * 100)
    tail = log[len(source) :]
    for f in fields(Settings):
        mark = "  (overridden)" if f.name.upper() in overrides(s) else ""
        assert f"\n{f.name}: {getattr(s, f.name)!r}{mark}\n" in tail, f.name
    for expected in (
        f"\nPython {sys.version}",
        f"\nPyTorch {torch.__version__}, CUDA ",
        ", Triton ",
        "\ngit commit: ",
        "\nattention: ",
        "\nhead: ",
        "\nnewton_schulz: ",
        "\npreset: speedrun, ",
        "\nbatch: 1 rank x 8 microbatches x 64 tokens = 512 tokens/step\n",
    ):
        assert expected in tail, expected
    for secret in ("hf_secret", "HF_TOKEN", "my_secret", "MY_OWN"):
        assert secret not in log
    steps, validations = STEP.findall(tail), VALIDATION.findall(tail)
    assert [(int(step), int(total)) for step, total, *_ in steps] == [(i, 6) for i in range(1, 7)]
    assert [int(step) for step, *_ in validations] == [0, 3, 6]
    assert float(validations[0][2]) == pytest.approx(math.log(56), abs=1e-3)  # the head starts at zero
    assert tail.splitlines()[-1].startswith("peak memory allocated: ")
    shown = done.stdout.splitlines()
    assert shown[0] == shown[-1] and shown[0].startswith("log: ")
    assert "step:6/6 val_loss" in done.stdout and "def main" not in done.stdout


def test_a_run_that_diverges_ends_with_a_sentence_and_exit_code_1(data, run_main):
    s = replace(data, warmup_steps=0, val_loss_every=1, adam_lr=1e3, scalar_lr_mult=1e6, muon_lr=1e3)
    code, _, said = run_main(**overrides(s))
    assert code == 1 and re.fullmatch(r"step \d+: expected a finite validation loss, found nan: .*\n", said)


def test_a_gpu_without_memory_left_is_a_sentence_that_names_the_setting(data, run_main, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.21 GiB.\nMore words.")

    monkeypatch.setattr(train_gpt, "train", out_of_memory)
    code, _, said = run_main(**overrides(replace(data, microbatch_parts=3)))
    assert code == 1 and said == (
        "MICROBATCH_PARTS: expected the step to fit in memory, found: CUDA out of memory. Tried to "
        "allocate 9.21 GiB.; set more than 3, for instance 6.\n")


@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 9.21 GiB.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
])
def test_memory_that_validation_lacks_is_a_sentence_that_names_another_setting(data, run_main, monkeypatch,
                                                                              message):
    def out_of_memory(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(train_gpt, "validation_batches", out_of_memory)
    code, _, said = run_main(**overrides(data))
    assert code == 1 and said == (f"VAL_SLICE_TOKENS: expected the validation of a slice to fit in memory, "
                                  f"found: {message}; set a divisor of VAL_TOKENS=256 below 64.\n")


def test_the_estimate_of_memory_counts_what_a_step_keeps(small):
    """Held against real tensors: parameters, gradients, state, and what autograd keeps of a forward pass."""
    s = replace(small, batch_tokens=2048, skip_attn="0,1,2,3,4,5,6,7,8,9,10,11")
    model, batch = fresh_model(s), train_gpt.plan_batch(s, 1)
    found, kept = train_gpt.estimate_memory(s, batch), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        model.hidden(torch.arange(256) % 50, torch.tensor([0, 256]), 256, (12, 4))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept.values()}
    count = sum(p.numel() for p in model.parameters())
    assert found["parameters"] == found["gradients"] == 4 * count
    activations = sum(size for place, size in storages.items() if place not in own)
    assert found["activations"] == pytest.approx(activations, rel=0.02)
    matrices = model.mlp_bank.numel()
    assert found["optimizers"] == pytest.approx(4 * matrices + 8 * (count - matrices), abs=100)
    assert found["head"] == 4 * 256 * 32 + 8 * model.lm_head.numel() + 8 * 256 * 56


def test_more_parts_and_more_ranks_need_less_memory():
    def gigabytes(num_ranks, **changes):
        s = replace(train_gpt.Settings(), **changes)
        found = train_gpt.estimate_memory(s, train_gpt.plan_batch(s, num_ranks))
        return {name: size / 1e9 for name, size in found.items()}

    one, eight, parts = gigabytes(1), gigabytes(8), gigabytes(8, microbatch_parts=8)
    assert one["optimizers"] == pytest.approx(8 * eight["optimizers"], rel=0.03)  # padded rows
    assert {**one, "optimizers": 0} == {**eight, "optimizers": 0}
    assert parts["activations"] == pytest.approx(eight["activations"] * 8192 / 49_152, rel=0.1)
    assert one["parameters"] == pytest.approx(0.78, abs=0.01)


def test_what_is_no_lack_of_memory_stays_what_it_is():
    with pytest.raises(RuntimeError, match="other") as error:
        with train_gpt.telling_of_memory("NAME", "it", "do something"):
            raise RuntimeError("other")
    assert not isinstance(error.value, train_gpt.UserError)


@pytest.mark.parametrize("val_loss_every", [0, 3])
def test_the_warm_up_leaves_nothing_to_compile_and_the_log_says_so(data, run_main, monkeypatch,
                                                                   val_loss_every):
    """Windows for steps 0 to 6: 3, 7 and 11 blocks; training meets them all, validation some; the head."""
    real = train_gpt.compiled
    monkeypatch.setattr(train_gpt, "compiled", lambda *args: real(*args, backend="eager"))
    monkeypatch.setattr(train_gpt, "check_compiler", lambda *_: None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    s = replace(data, torch_compile=True, val_loss_every=val_loss_every, target_loss=0.0)
    code, shown, _ = run_main(**overrides(s))
    torch._dynamo.reset()
    graphs = 8 if val_loss_every else 6
    ready = rf"^ready after \d+\.\d s, with 3 steps of warm-up and {graphs} graphs compiled$"
    assert code == 0 and re.search(ready, shown, re.M)
    assert "\ncompiled since the warm-up: 0 graphs\n" in shown


@pytest.mark.slow
def test_wrong_settings_are_told_once_however_many_ranks_there_are():
    done = launch(nproc=2, PRESET="demo", NUM_ITERATION=3)
    assert done.returncode and done.stderr.count("NUM_ITERATION: unknown setting") == 1


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_alone_is_told_with_its_number(tmp_path, data):
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.environ['TRAIN_FILES'] = '/no/such'\n"
        "sys.exit(train_gpt.main([]))\n"
    )
    done = launch(nproc=2, script=program, **overrides(data))
    assert done.returncode and done.stderr.count("expected token shards at /no/such, found none") == 1
    assert "\nrank 1: TRAIN_FILES: expected token shards" in "\n" + done.stderr


def test_every_window_stage_and_the_head_compile_to_a_graph_for_training_and_one_for_evaluation(small):
    """Ten graphs of one function are more than torch.compile allows by default."""
    layout = dict(num_layers=2, skip_attn="", skip_mlp="", value_embeds="00", window_pattern="LS")
    s = replace(small, num_iterations=20, window_schedule="2,3,4,5,6", **layout)
    model, graphs = fresh_model(s), []
    inputs, targets = torch.arange(32, dtype=torch.int32), torch.arange(1, 33)
    batch = inputs, targets, torch.tensor([0, 7, 32, 32], dtype=torch.int32), 25

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        forward = train_gpt.compiled(model, s, backend=backend)
        for _ in range(2):  # the second time compiles nothing
            for step in train_gpt.window_steps(s):
                windows = train_gpt.attention_windows(step, s)
                loss = forward(*batch, windows)
                torch.testing.assert_close(loss, model(*batch, windows))
                loss.backward()
                model.eval()
                with torch.no_grad():
                    torch.testing.assert_close(forward(*batch, windows), loss / 32)
                model.train()
    torch._dynamo.reset()
    assert len(graphs) == 12


@pytest.mark.slow
def test_a_terminal_shows_one_live_line_with_losses_speed_and_time_left(tmp_path, data):
    outside, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=tmp_path,
        env=environment(**overrides(data)),
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


@pytest.mark.slow
def test_the_demo_reaches_its_target_as_it_is(tmp_path):
    """On as many threads as PyTorch takes by itself."""
    done = launch(PRESET="demo", LOG_DIR=tmp_path, OMP_NUM_THREADS=None, timeout=400)
    assert done.returncode == 0, done.stderr
    ((reached, loss),) = re.findall(
        r"^target_reached:(\d) target_loss:1.7 val_loss:(\S+) ", done.stdout, re.M
    )
    assert reached == "1" and float(loss) <= 1.70


def test_a_folder_that_cannot_hold_logs_is_one_sentence(tmp_path, data, run_main):
    (tmp_path / "file").touch()
    code, shown, said = run_main(**overrides(replace(data, log_dir=str(tmp_path / "file"))))
    assert (code, shown, said.count("\n")) == (1, "", 1) and said.startswith("LOG_DIR: expected a folder")
