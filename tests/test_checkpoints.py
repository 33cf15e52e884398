"""Checkpoints and what a run survives: kills, damage, changes, full disks, signals, dead ranks and NaN.

Behind the marker `faults`: kills at random.
"""

import importlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SMALL, Run, before, environment, fresh_model, overrides, ran
from conftest import random_documents, write_shard

import train_gpt
from train_gpt import UserError, read_safetensors, write_safetensors

# Four blocks with every feature; steps so small that rounding stays rounding; the target is never reached.
TINY = dict(layout="AM A+M M AM", value_embeds="0..0", window_pattern="LSSL", microbatches=2)
TINY |= dict(batch_tokens=(64,), max_seq_len=(20,))
TINY |= dict(val_tokens=64, val_slice_tokens=32, warmup_steps=0, scalar_lr_mult=0.01)
TINY |= dict(target_loss=0.0, checkpoint_every=1, device="cpu")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Settings of a run of six steps with a checkpoint after each; all tests read the same data."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train_0.bin", np.concatenate(random_documents(1, 200)))
    write_shard(folder / "val_0.bin", np.concatenate(random_documents(2, 40)))
    files = dict(data_path=str(folder), train_files="train_*.bin", val_files="val_*.bin")
    return replace(train_gpt.Settings(), **SMALL | TINY | files)


@pytest.fixture
def s(shared, tmp_path):
    return replace(shared, log_dir=str(tmp_path / "logs"))


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """whole(n): LOG_DIR of n ranks' run that nothing happened to; all its checkpoints are kept aside."""
    made = {}

    def whole(ranks=1):
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp(f"whole{ranks}") / "logs"
            ran(replace(shared, log_dir=str(made[ranks])), kept_aside, ranks=ranks)
        return made[ranks]

    return whole


def kept_aside(rank):
    real = train_gpt.write_safetensors

    def write(path, *rest):
        real(path, *rest)
        os.link(path, path.with_suffix(".kept"))

    train_gpt.write_safetensors = write


def up_to(step, whole, log_dir):
    """Give a folder for logs the newest two checkpoints of a run that was killed after a step."""
    for path in sorted(whole.glob("*/step_*.kept"))[max(0, step - 2) : step]:
        (Path(log_dir) / "before").mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, Path(log_dir) / "before" / f"{path.stem}.safetensors")
    return Path(log_dir) / "before" / f"step_{step:06d}.safetensors"


def checkpoints(log_dir):
    """All checkpoints in a folder for logs, the newest first."""
    paths = Path(log_dir).glob("*/step_*.safetensors")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def names(log_dir):
    return [path.stem for path in checkpoints(log_dir)]


def content(log_dir):
    """Step and tensors, byte for byte, of the newest checkpoint."""
    tensors, metadata = read_safetensors(checkpoints(log_dir)[0])
    return metadata["step"], {name: (x.dtype, x.shape, x.numpy().tobytes()) for name, x in tensors.items()}


def losses(log_dir):
    """{(step, "train" or "val"): loss} of all logs in a folder; where two logs have one, they must agree."""
    found = {}
    for path in Path(log_dir).glob("*/log.txt"):
        log = path.read_text(encoding="utf-8")
        for step, kind, loss in re.findall(r"^step:(\d+)/\d+ .*?\b(train|val)_loss:([\d.]+)", log, re.M):
            assert found.setdefault((int(step), kind), loss) == loss, f"step {step}: two {kind} losses"
    return found


def ended_as(whole, log_dir):
    """Whether what a folder's runs did, all together, is what the whole run did, bit for bit."""
    assert set(losses(whole)) == {(i, "train") for i in range(1, 7)} | {(i, "val") for i in (0, 3, 6)}
    return losses(log_dir) == losses(whole) and content(log_dir) == content(whole)


def last_lines(log_dir):
    """The end of the newest log."""
    path = max(Path(log_dir).glob("*/log.txt"), key=lambda path: path.stat().st_mtime_ns)
    return "\n".join(path.read_text(encoding="utf-8").splitlines()[-4:])


def at_step(number, act):
    """A fault: act() is called as step `number`, from 1, begins."""
    def act_at(model, optimizer, batches, step, *_):
        if step.number == number - 1:
            act()

    before(train_gpt, "train_step", act_at)


# ---- The file

def test_the_safetensors_package_reads_what_a_run_and_its_bfloat16_have_in_their_files(whole, tmp_path):
    import safetensors
    from safetensors.torch import load_file

    mixed = dict(x=torch.randn(3, 5).bfloat16(), y=torch.ones(2))
    write_safetensors(tmp_path / "bfloat16", mixed, dict(step="6"))
    for path in (checkpoints(whole())[0], tmp_path / "bfloat16"):
        (tensors, metadata), theirs = read_safetensors(path), load_file(path)
        assert tensors.keys() == theirs.keys() and metadata["step"] == "6"
        assert all(x.dtype == theirs[name].dtype and x.equal(theirs[name]) for name, x in tensors.items())
        with safetensors.safe_open(path, "pt") as file:
            assert metadata.items() <= file.metadata().items()
    model = fresh_model(replace(train_gpt.Settings(), **SMALL | TINY))
    assert {name for name in load_file(checkpoints(whole())[0]) if "." not in name} == {
        name for name, _ in model.named_parameters()
    }


def test_a_bit_or_a_byte_that_is_wrong_anywhere_is_found(tmp_path):
    path = tmp_path / "small.safetensors"
    write_safetensors(path, dict(x=torch.ones(2, 3)), dict(step="3", run='{"seed": 0}'))
    good = path.read_bytes()
    places = range(len(good))
    flipped = [good[:i] + bytes([good[i] ^ 1 << bit]) + good[i + 1 :] for i in places for bit in range(8)]
    for data in (*flipped, *(good[:i] for i in places), good + b"\0"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"^{path}: expected "):
            read_safetensors(path)
    path.write_bytes(good)
    assert read_safetensors(path)[0]["x"].equal(torch.ones(2, 3))


def killed_at(n, rank):
    """A fault: SIGKILL at the n-th moment of writing: amid each write, and before all else on disk."""
    moments = itertools.count(1)

    def moment(*_, **__):
        if next(moments) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn(io.FileIO):
        def write(self, data):
            data = bytes(data)
            super().write(data[: len(data) // 2])
            moment()
            return super().write(data[len(data) // 2 :])

    train_gpt.open = lambda path, mode="r", **kw: (Torn if mode == "wb" else open)(path, mode, **kw)
    for owner, name in ((os, "fsync"), (Path, "unlink"), (Path, "replace")):
        before(owner, name, moment)


@pytest.fixture
def saver(s, tmp_path):
    """saver(step): write that checkpoint of a fresh model."""
    model = fresh_model(s)
    optimizer = train_gpt.make_optimizer(model, 0, 1)
    log = SimpleNamespace(folder=tmp_path, file=sys.stdout, write=print)
    return lambda step: train_gpt.save_checkpoint(log, model, optimizer, step, 0.5, dict(seed=0))


def test_a_kill_at_any_moment_of_writing_leaves_the_newest_checkpoints_whole(saver, tmp_path):
    """Two of them, where there is no kill."""
    def write(n):
        killed_at(n, 0)
        saver(3)
        os._exit(0)

    for n in range(1, 200):
        for step in (1, 2):
            saver(step)
        process = multiprocessing.get_context("fork").Process(target=write, args=(n,))
        process.start()
        process.join()
        left = sorted(tmp_path.glob("step_*.safetensors"))
        steps = [read_safetensors(path)[1]["step"] for path in left]
        assert steps in (["1", "2"], ["1", "2", "3"], ["2", "3"])
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        for path in left:
            path.unlink()
    assert process.exitcode == 0 and n > 20 and steps == ["2", "3"]


# ---- To go on

@pytest.mark.parametrize("ranks, step, how", [(1, 4, "auto"), (2, 4, "path"), (1, 6, "auto")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(s, whole, ranks, step, how):
    """One that was done says its result again. The clock counts on."""
    newest = up_to(step, whole(ranks), s.log_dir)
    seconds = float(read_safetensors(newest)[1]["seconds"])
    shown = ran(replace(s, resume="auto" if how == "auto" else str(newest)), ranks=ranks)
    assert shown.count(f"resumed: {newest}, step {step}, after {seconds:.1f} s of training\n") == 1
    expected = {key: loss for key, loss in losses(whole(ranks)).items() if key > (step, "train")}
    assert len(expected) == 1 + 6 - step and losses(s.log_dir) == expected
    assert content(s.log_dir) == content(whole(ranks))
    ended = re.search(r"final_step:6 train_time:(\d+)ms", last_lines(s.log_dir))
    assert float(ended[1]) >= int(1000 * seconds)


@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_run_goes_on_at_another_world_size_up_to_rounding(s, whole, first, then):
    up_to(4, whole(first), s.log_dir)
    ran(replace(s, resume="auto"), ranks=then)
    found = {key: float(loss) for key, loss in losses(s.log_dir).items()}
    expected = {key: float(loss) for key, loss in losses(whole(first)).items() if key[0] > 4}
    assert found == pytest.approx(expected, abs=1.1e-4)
    (ours, _), (theirs, _) = (read_safetensors(checkpoints(x)[0]) for x in (s.log_dir, whole(first)))
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, atol=1e-3 * x.abs().max().item(), rtol=0)


# ---- Stages of their own batch, cut and windows; rules with states of their own; a network that changes

STAGES = dict(batch_tokens=(64, 128, 192), max_seq_len=(20, 10, 15), window_schedule=(3, 7, 11),
              microbatches=4, stage_starts=(0, 2, 4), stage_lr_factors=(1.0, 1.5, 2.0), warmup_steps=3)


class RowMuon(train_gpt.Muon):
    """Its state has a tensor of another shape than the parameter's."""

    def init_state(self, p):
        return super().init_state(p) | dict(squares=torch.zeros(len(p), p.size(1), 1))

    def update(self, p, grad, state, step, factors=None):
        squares = state["squares"].lerp_(grad.square().mean(-1, keepdim=True), 0.1)
        super().update(p, grad / (squares.sqrt() + 1e-3), state, step, factors)


class Descent(NamedTuple):
    """It has no state."""

    lr: float
    every = 1

    def init_state(self, p):
        return {}

    def update(self, p, grad, state, step, factors=None):
        p.add_(grad, alpha=-self.lr * step.lr_factor)


def unusual(rank):
    """Such rules, and rotary tables that change when a stage begins."""
    declare = train_gpt.GPT.declare_parameters

    def declare_parameters(s, kernels):
        rows = declare(s, kernels)
        return rows | dict(scalars=rows["scalars"]._replace(rule=Descent(0.01)))

    train_gpt.Muon = RowMuon
    train_gpt.GPT.declare_parameters = staticmethod(declare_parameters)
    train_gpt.GPT.enter_stage = lambda self, stage: self.cos.mul_(1 - stage.first_step / 100)


@pytest.mark.slow
def test_a_run_in_stages_resumes_bit_for_bit_at_every_step(s, tmp_path):
    s = replace(s, **STAGES)
    whole = tmp_path / "whole"
    ran(replace(s, log_dir=str(whole)), unusual, kept_aside)
    for step in range(1, 6):
        own = tmp_path / f"from_{step}"
        up_to(step, whole, own)
        shown = ran(replace(s, log_dir=str(own), resume="auto"), unusual)
        assert f", step {step}, after " in shown
        expected = {key: loss for key, loss in losses(whole).items() if key > (step, "train")}
        assert losses(own) == expected and content(own) == content(whole), step


@pytest.mark.slow
def test_a_run_in_stages_is_the_same_on_one_two_and_four_ranks_up_to_rounding(s, tmp_path):
    s, found = replace(s, **STAGES), {}
    for ranks in (1, 2, 4):
        folder = tmp_path / f"{ranks}"
        ran(replace(s, log_dir=str(folder)), unusual, ranks=ranks)
        found[ranks] = {key: float(loss) for key, loss in losses(folder).items()}
    assert len(found[1]) == 6 + 3
    assert found[2] == pytest.approx(found[1], abs=2e-4) and found[4] == pytest.approx(found[1], abs=2e-4)


# ---- What it goes on from, and what not

def choose(s, resume="auto", source=None, world_size=1):
    """The log's lines on the checkpoint that RESUME means; the last says which. Raises UserError."""
    shards = train_gpt.open_shards(s, "train_files")
    schedule = train_gpt.make_schedule(s)
    plan = train_gpt.plan_packing(shards, s, schedule, s.num_microbatches(world_size))
    source = source or (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    identity = train_gpt.identify_run(s, source, plan, train_gpt.read_validation(s), world_size)
    model, clock, lines = fresh_model(s), train_gpt.Clock(CPU), []
    log = SimpleNamespace(settings=replace(s, resume=str(resume)), write=lines.append)
    train_gpt.load_checkpoint(log, model, train_gpt.make_optimizer(model, 0, 1), clock, identity)
    return lines


def goes_on(path):
    """The line that says that a run goes on from this checkpoint."""
    tensors, metadata = read_safetensors(path)
    return f"resumed: {path}, step {metadata['step']}, after {float(metadata['seconds']):.1f} s of training"


def test_without_a_checkpoint_auto_starts_anew(s):
    assert choose(s) == [f"checkpoint: none in {s.log_dir} to go on from, starting anew"]


def flip(path, place=-1000):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage, lines", [
    (flip, 1), (partial(flip, place=100), 1), (lambda path: os.truncate(path, 5000), 1), (Path.unlink, 0),
])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_name(s, whole, damage, lines):
    newest = up_to(4, whole(), s.log_dir)
    assert choose(s) == choose(s, newest) == [goes_on(newest)]
    damage(newest)
    *said, last = choose(s)
    assert last == goes_on(newest.with_name("step_000003.safetensors")) and len(said) == lines
    assert all(line.startswith(f"checkpoint: skipped: {newest}: expected a whole ") for line in said)
    with pytest.raises(UserError, match=f"^RESUME: {newest}: expected .*[^\n]*$") as error:
        choose(s, newest)
    assert error.value.exit_code == 2


def test_where_all_are_damaged_it_is_one_sentence_on_all_ranks_together(s, whole):
    flip(up_to(1, whole(2), s.log_dir))
    said = ran(replace(s, resume="auto"), ranks=2, code=2)
    assert said.count("RESUME: ") == 1 and said.splitlines()[-1].startswith("RESUME: ") and "SHA-256" in said
    assert "Traceback" not in said and "step:0" not in said


@pytest.mark.parametrize("change, difference", [
    (dict(muon_lr=0.04), "muon_lr 0.05 (here 0.04)"),
    (dict(layout="AM A+M MM AM"), "layout 'AM A+M M AM' (here 'AM A+M MM AM')"),
    (dict(num_iterations=5), "num_iterations 6 (here 5)"),
])
def test_other_settings_are_refused_with_the_difference(s, whole, change, difference):
    newest = up_to(4, whole(), s.log_dir)
    for resume in ("auto", newest):
        with pytest.raises(UserError, match=f"^RESUME: {newest}: expected a checkpoint of ") as error:
            choose(replace(s, **change), resume)
        assert f"found {difference}; undo " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file, difference", [
    ("train_0.bin", "training_data [0-9\\[\\]]+ "), ("val_0.bin", "validation_data "),
])
def test_other_tokens_in_documents_of_the_same_places_are_refused(s, whole, tmp_path, file, difference):
    """The same data in another folder, and what has nothing to do with the race, may be changed."""
    newest = up_to(4, whole(), s.log_dir)
    for path in Path(s.data_path).glob("*.bin"):
        shutil.copy(path, tmp_path)
    shutil.move(tmp_path / "train_0.bin", tmp_path / "other.bin")
    other = replace(s, data_path=str(tmp_path), nproc=2, checkpoint_every=3, train_files="o*.bin",
                    val_loss_every=2, target_loss=1.0)
    assert choose(other) == [goes_on(newest)]
    shutil.move(tmp_path / "other.bin", tmp_path / "train_0.bin")
    other = replace(other, train_files=s.train_files)
    tokens = np.fromfile(tmp_path / file, "<u2")[512:]
    place = np.flatnonzero((tokens[:60] > 0) & (tokens[:60] < 48))[-1]
    tokens[place] -= 1
    write_shard(tmp_path / file, tokens)
    with pytest.raises(UserError, match=f"^RESUME: .* found {difference}[^,]+;"):
        choose(other)


def test_data_in_another_order_are_refused_even_if_the_files_have_one_name(s, whole, tmp_path):
    """The order of the shards is that of their tokens."""
    for number, seed in enumerate((1, 2)):
        (tmp_path / f"{number}").mkdir()
        write_shard(tmp_path / f"{number}/a.bin", np.concatenate(random_documents(seed, 10)))
    s = replace(s, train_files=str(tmp_path / "[0-9]/a.bin"), num_iterations=6, epochs=9)
    newest = saved_by(s)
    assert choose(s)[-1] == goes_on(newest)
    (tmp_path / "0").rename(tmp_path / "2")
    with pytest.raises(UserError, match=" found training_data "):
        choose(s)


def saved_by(s):
    """The newest checkpoint of a run of these settings."""
    ran(s)
    return checkpoints(s.log_dir)[0]


def test_another_source_is_told_where_it_is_named_and_passed_over_by_auto(s, whole):
    newest = up_to(2, whole(), s.log_dir)
    named = choose(s, newest, source="# faster")
    assert named == [f"checkpoint: WARNING: {newest} is of another train_gpt.py; this one goes on from it",
                     goes_on(newest)]
    *skipped, last = choose(s, source="# faster")
    assert len(skipped) == 2 and all("is of another train_gpt.py" in line for line in skipped)
    assert last.endswith("starting anew")


def test_a_checkpoint_of_another_source_with_other_parameters_is_one_sentence(s, whole):
    newest = up_to(2, whole(), s.log_dir)
    tensors, metadata = read_safetensors(newest)
    del tensors["scalars"]  # as if this train_gpt.py had added it
    metadata["run"] = json.dumps(json.loads(metadata["run"]) | dict(source="another"))
    write_safetensors(newest, tensors, metadata)
    sentence = r"^RESUME: .*: expected this model's tensors, found scalars None \(here \[4, 5\]\); "
    with pytest.raises(UserError, match=sentence) as error:
        choose(s, newest)
    assert error.value.exit_code == 2


def damaged_for_rank_1(rank):
    """Rank 1 reads a checkpoint wrong."""
    real = train_gpt.checkpoint_hash
    if rank == 1:
        train_gpt.checkpoint_hash = lambda *case: real(*case)[::-1]


def test_what_one_rank_alone_finds_wrong_with_a_checkpoint_is_told_by_it(s, whole):
    newest = up_to(2, whole(2), s.log_dir)
    said = ran(replace(s, resume=str(newest)), damaged_for_rank_1, ranks=2, code=2)
    assert f"\nrank 1: RESUME: {newest}: expected a whole checkpoint, found " in "\n" + said
    assert "rank 0: step 2, SHA-256 " in said and "rank 1: an error" in said


def test_auto_takes_the_highest_step_whatever_the_times_of_the_files(s, whole):
    newest = up_to(4, whole(), s.log_dir)
    os.utime(newest, (1, 1))
    assert choose(s) == [goes_on(newest)]


def test_a_run_that_is_finished_says_so_and_trains_nothing(s, whole):
    up_to(6, whole(), s.log_dir)
    shown = ran(replace(s, resume="auto"))
    assert "\nfinished: the checkpoint is of a run that has ended; no step was trained\n" in shown
    assert "train_loss" not in shown and " after step 6 of 6\n" in shown


def own_log_dir(rank):
    """Rank 1 has an empty LOG_DIR."""
    if rank == 1:
        os.environ["LOG_DIR"] += "_of_rank_1"


def test_ranks_that_find_different_checkpoints_end_with_one_sentence_each(s, whole):
    up_to(4, whole(2), s.log_dir)
    said = ran(replace(s, resume="auto"), own_log_dir, ranks=2, code=2)
    assert "RESUME: expected one checkpoint for all ranks, found rank 0: step 4, SHA-256 " in said
    assert "; rank 1: none; LOG_DIR must be one folder for all." in said and "Traceback" not in said


def test_another_number_of_microbatches_is_refused(s, whole):
    up_to(4, whole(), s.log_dir)
    with pytest.raises(UserError, match=r" found microbatches_of_a_step 2 \(here 4\)"):
        choose(s, world_size=4)


def test_auto_passes_over_the_checkpoints_of_other_races(s, whole):
    newest = up_to(4, whole(), s.log_dir)
    tensors, metadata = read_safetensors(newest)
    metadata["run"] = json.dumps(json.loads(metadata["run"]) | dict(seed=1))
    write_safetensors(newest.with_name("step_000009.safetensors"), tensors, metadata)
    assert choose(s)[-1] == goes_on(newest) and "step_000009" in choose(replace(s, seed=1))[-1]


# ---- Full disks, signals, dead ranks, NaN

def quota(rank):
    """The kernel lets no file grow beyond a limit in steps 3 and 4."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    at_step(3, lambda: limit((50_000, resource.RLIM_INFINITY)))
    at_step(5, lambda: limit((resource.RLIM_INFINITY, resource.RLIM_INFINITY)))


def test_a_full_disk_costs_no_checkpoint_and_does_not_stop_the_run(s, whole):
    """Nor does a log that cannot grow."""
    shown = ran(s, quota)
    assert re.findall(r"step_00000(\d).safetensors could not be written: \[Errno 27", shown) == ["3", "4"]
    assert names(s.log_dir) == ["step_000006", "step_000005"] and content(s.log_dir) == content(whole())
    assert not list(Path(s.log_dir).glob("*/unfinished"))
    assert "a line of the log could not be written" in shown


def signalled(number, on_rank, rank):
    """The signal comes twice in step 2, since torchrun passes on what a terminal sends to all."""

    def act():
        for _ in range(2):
            os.kill(os.getpid(), number)

    if rank == on_rank:
        at_step(2, act)


@pytest.mark.parametrize("number, ranks, every", [
    (signal.SIGTERM, 2, 5), (signal.SIGINT, 1, 5), (signal.SIGINT, 1, 0),
    (signal.SIGHUP, 1, 5), (signal.SIGUSR1, 1, 5), (signal.SIGUSR2, 1, 5), (signal.SIGXCPU, 1, 0),
])  # fmt: skip
def test_a_signal_to_one_rank_ends_all_after_the_step_with_a_checkpoint_if_they_are_on(
    s, whole, number, ranks, every
):
    s = replace(s, checkpoint_every=every)
    ran(s, partial(signalled, number, ranks - 1), ranks=ranks, code=128 + number)
    said = f"^stopped by {number.name} after step ([23]) of 6(; not saved, .*)?$"
    stopped = re.search(said, last_lines(s.log_dir), re.M)
    assert stopped and bool(stopped[2]) == (every == 0)
    assert names(s.log_dir) == [f"step_00000{stopped[1]}"] * (every > 0)
    if ranks == 2:
        ran(replace(s, resume="auto"), ranks=2)
        assert ended_as(whole(2), s.log_dir)


def nohup(rank):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(s, whole):
    ran(s, nohup, partial(signalled, signal.SIGHUP, 0))
    assert ended_as(whole(), s.log_dir)


def dies(on_rank, rank):
    """SIGKILL in the optimizer of step 3."""
    kill = partial(os.kill, os.getpid(), signal.SIGKILL)
    if rank == on_rank:
        at_step(3, lambda: before(train_gpt.ShardedOptimizer, "step", lambda *_: kill()))


def test_a_rank_that_dies_ends_the_other(s):
    codes = Run(s, partial(dies, 1), ranks=2).wait()
    assert codes[0] > 0 and codes[1] == -signal.SIGKILL
    assert names(s.log_dir) == ["step_000002", "step_000001"]


def spoiled(what, rank):
    """NaN in the loss or a gradient of step 3 on rank 1."""

    def spoil(model, optimizer, batches, step, *_):
        if step.number == 2 and what == "the loss":
            plain = train_gpt.softcapped_loss
            model.kernels = train_gpt.Kernels(head_loss=lambda *case: plain(*case) * torch.nan)
        elif step.number == 2:
            model.mlp_bank.register_hook(lambda grad: grad * torch.nan)

    if rank == 1:
        before(train_gpt, "train_step", spoil)


@pytest.mark.parametrize("what", ["the loss", "the gradient of mlp_bank"])
def test_nan_on_one_rank_stops_all_is_named_once_and_spoils_no_checkpoint(s, what):
    said = ran(s, partial(spoiled, what), ranks=2, code=1)
    expected = f"step 3: expected finite numbers, found inf or nan in {what}"
    assert said.count(expected) == 1 and "Traceback" not in said
    assert f"\nended by UserError: {expected}" in last_lines(s.log_dir)
    assert names(s.log_dir) == ["step_000002", "step_000001"]
    assert all(x.isfinite().all() for x in read_safetensors(checkpoints(s.log_dir)[0])[0].values())


PROGRAM = f"""
import os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import train_gpt
from pathlib import Path
from test_checkpoints import at_step
rank, parent = int(os.environ["RANK"]), os.getppid()

def wait_for_torchruns_death():
    Path(f"waits_{{rank}}").write_text(str(os.getpid()))
    while os.getppid() == parent:
        time.sleep(0.05)

if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    at_step(3, wait_for_torchruns_death)
elif rank == 1:
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(train_gpt.main([]))
"""


def alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_torchrun_restarts_a_run_after_a_kill_and_where_torchrun_is_killed_its_ranks_end(s, whole, tmp_path):
    """Rank 1 is killed in step 2, torchrun in step 3; the ranks save, and what goes on ends bit for bit."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environ = environment(**overrides(replace(s, resume="auto")))
    with open(tmp_path / "printed", "w") as out:
        torchrun = subprocess.Popen([*command, "--max-restarts=3", "program.py"], env=environ, cwd=tmp_path,
                                    stdout=out, stderr=out)
    try:
        waiting = [tmp_path / f"waits_{rank}" for rank in range(2)]
        wait_until(lambda: all(path.exists() and path.read_text() for path in waiting))
        torchrun.kill()
    finally:
        torchrun.terminate()  # with its ranks, if they did not come so far
        torchrun.wait(60)
    assert "step_000001.safetensors, step 1, after" in (tmp_path / "printed").read_text()
    pids = [int(path.read_text()) for path in waiting]
    wait_until(lambda: not any(map(alive, pids)))
    assert re.search("^stopped by SIGHUP after step [34] of 6$", last_lines(s.log_dir), re.M)
    ran(replace(s, resume="auto"), ranks=2)
    assert ended_as(whole(2), s.log_dir)


# ---- Text from a checkpoint, when it is stopped and where the console lacks its characters

@pytest.fixture
def sampled(tmp_path, monkeypatch, capfd):
    """sampled(arguments): what records/sample.py prints from a checkpoint of random weights."""
    monkeypatch.syspath_prepend(ROOT / "records")
    sample = importlib.import_module("sample")
    s = replace(train_gpt.Settings(), **SMALL | dict(vocab_size=257, bos_id=256))
    tensors = {name: p.data for name, p in fresh_model(s).named_parameters()}
    write_safetensors(tmp_path / "x.safetensors", tensors, dict(step="2", run=json.dumps(asdict(s))))

    def sampled(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", str(tmp_path / "x.safetensors"), *arguments])
        return sample.main(), *capfd.readouterr()

    return sampled


def test_ctrl_c_keeps_the_text_so_far(sampled, monkeypatch):
    whole = sampled("--prompt", "Größe", "--length", "20")[1]
    tokens = itertools.count()

    def stop(*_):
        if next(tokens) == 9:
            os.kill(os.getpid(), signal.SIGINT)

    before(train_gpt.GPT, "hidden", stop, monkeypatch)
    code, text, said = sampled("--prompt", "Größe", "--length", "20")
    assert (code, said) == (130, "stopped by Ctrl-C\n") and text.startswith("Größe")
    assert 8 < len(text) < len(whole) and whole.startswith(text.rstrip("\n\ufffd"))


def test_a_sample_needs_no_console_with_all_characters(sampled, monkeypatch):
    """Nor a prompt in UTF-8."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert sampled("--prompt", "Größe \udcff", "--length", "0")[0] == 0
    console.flush()
    assert console.buffer.getvalue() == b"Gr??e ?\n"


# ---- The long ones: python -m pytest -m faults

@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_at_random_ends_as_if_it_had_not_been(s, whole, ranks):
    """The other rank follows a little later, as torchrun has it. A run that was done begins anew."""
    rng, s, kills = random.Random(ranks), replace(s, resume="auto"), 0
    while kills < 30:
        run = Run(s, ranks=ranks)
        run.processes[0].join(rng.uniform(0.0, 3.0))
        run.processes[rng.randrange(ranks)].kill()
        time.sleep(rng.uniform(0.0, 0.2))
        run.kill()
        codes = [process.exitcode for process in run.processes]
        kills += -signal.SIGKILL in codes
        if codes == [0] * ranks:
            assert ended_as(whole(ranks), s.log_dir)
            shutil.rmtree(s.log_dir)
    ran(s, ranks=ranks)
    assert ended_as(whole(ranks), s.log_dir)
