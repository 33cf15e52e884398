"""What a run survives: kills, damaged files, changed settings, signals, NaN and dead ranks.

Most runs here are forked (faults.py). Those behind the marker `faults` take minutes together.
"""

import errno
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import faults
import numpy as np
import pytest
from conftest import CPU, ROOT, launch, overrides, random_documents, write_shard
from faults import Started, checkpoints, content, ended_as, flip, losses, refused, resumed, same
from faults import together, up_to

import train_gpt
from train_gpt import UserError, World

faulty = [pytest.mark.slow, pytest.mark.faults]


def last_line(log_dir):
    (log,) = Path(log_dir).glob("*.txt")
    return log.read_text(encoding="utf-8").splitlines()[-1]


# ---------------------------------------------------------------------------------------------------
# To go on, bit for bit


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(s, whole, tmp_path, ranks):
    kept = up_to(4, whole(ranks), s.log_dir)
    code, text = resumed(replace(s, warmup_steps=2), tmp_path, ranks=ranks, RESUME_CHANGED=1)
    assert code == 0 and f"resumed: {kept}, step 4" in text
    expected = {key: loss for key, loss in losses(whole(ranks)).items() if key[0] > 4}
    assert len(expected) == 3 and losses(s.log_dir) == expected
    assert same(content(checkpoints(s.log_dir)[0]), content(checkpoints(whole(ranks))[0]))


def scaled(kept, ratio):
    """The optimizers' state as it would be if gradients had been larger by a ratio."""
    powers = dict(momentum=1, mean=1, square=2)
    return {(rank, name): x * ratio ** powers.get(name.partition(" of ")[0], 0)
            for (rank, name), x in kept.items()}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_checkpoint_of_2_ranks_is_put_back_on_any_number_bit_for_bit(s, whole, tmp_path, ranks):
    """Parameters, optimizer state, position and clock: the checkpoint is written again at once.

    Gradients are averaged over ranks, and so are half as large on twice as many.
    """
    kept = up_to(4, whole(2), s.log_dir)
    before = content(kept)
    clock = json.loads((kept / "checkpoint.json").read_text())["training_seconds"]
    assert before[0, "momentum of mlp_bank"].any() and clock > 0
    code, text = resumed(s, tmp_path, faults.other_random_state, faults.written_again, ranks=ranks)
    position = tuple(before["step", "position"].tolist()[1:])
    assert code == 0, text
    assert text.count(f"put back: step 4, position {position}, clock {clock!r}\n") == ranks
    after = content(kept)
    assert same(together(after), scaled(together(before), 2 / ranks))
    assert len({rank for rank, _ in after}) == ranks + 1
    for rank in range(min(ranks, 2)):
        assert after[rank, "random state"].equal(before[rank, "random state"])


@pytest.mark.slow
def test_a_run_goes_on_from_another_number_of_ranks_up_to_rounding(s, whole, tmp_path):
    up_to(4, whole(2), s.log_dir)
    assert resumed(s, tmp_path)[0] == 0
    found, expected = losses(s.log_dir), losses(whole(1))
    assert {key: float(x) for key, x in found.items()} == pytest.approx(
        {key: float(x) for key, x in expected.items() if key[0] > 4}, abs=1.1e-4
    )


@pytest.mark.slow
def test_a_run_that_was_done_says_its_result_again_and_counts_its_clock_on(s, whole, tmp_path):
    up_to(6, whole(), s.log_dir)
    code, text = resumed(s, tmp_path)
    about = json.loads((checkpoints(whole())[0] / "checkpoint.json").read_text())
    assert code == 0 and "train_loss" not in text
    assert f"final_step:6 train_time:{1000 * about['training_seconds']:.0f}ms" in text


def test_resume_auto_without_a_checkpoint_starts_anew(s, whole, tmp_path):
    code, text = resumed(s, tmp_path)
    assert code == 0 and "starting anew" in text and ended_as(whole(), s.log_dir)


def killed_and_resumed(s, whole, tmp_path, first, moments):
    """Kill the run at each of the moments in turn, and resume; how many kills there were until its end."""
    up_to(first, whole, s.log_dir)
    s = replace(s, resume="auto", checkpoint_keep=2)
    for kills, moment in enumerate(moments):
        started = Started(s, tmp_path, partial(faults.killed_at, moment))
        (code,) = started.wait()
        newest = train_gpt.read_checkpoint(checkpoints(s.log_dir)[0])  # raises where it is damaged
        assert newest["step"] >= first
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, started.text()
    started = Started(s, tmp_path)
    assert started.wait() == [0], started.text()
    return len(moments)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_costs_no_other_one(s, whole, tmp_path):
    moments = random.Random(0).sample(range(1, 45), 6)
    assert killed_and_resumed(s, whole(), tmp_path, 2, moments) == 6
    assert losses(s.log_dir).items() <= losses(whole()).items()
    assert same(content(checkpoints(s.log_dir)[0]), content(checkpoints(whole())[0]))
    assert len(checkpoints(s.log_dir)) == 2 and not list(Path(s.log_dir).glob("*/*.partial"))


@pytest.mark.slow
@pytest.mark.faults
def test_a_kill_at_any_moment_of_a_checkpoints_writing_costs_no_other_one(s, whole, tmp_path):
    """Between any two things that are done to the disk, and amid each write."""
    kills = killed_and_resumed(s, whole(), tmp_path, 2, range(1, 300))
    assert kills >= 40
    assert same(content(checkpoints(s.log_dir)[0]), content(checkpoints(whole())[0]))


def killed_at_random(s, tmp_path, ranks, kills, seed):
    """Kill the run at random times until that has been done `kills` times; then let it finish.

    The other ranks follow a little later, as torchrun has it.
    """
    rng, s, done = random.Random(seed), replace(s, resume="auto"), 0
    while done < kills:
        started = Started(s, tmp_path, ranks=ranks)
        started.processes[0].join(rng.uniform(0.0, 1.5))
        started.processes[rng.randrange(ranks)].kill()
        time.sleep(rng.uniform(0.0, 0.2))
        started.kill()
        codes = [process.exitcode for process in started.processes]
        done += -signal.SIGKILL in codes
        if codes == [0] * ranks:  # it was done before, so begin another one
            shutil.rmtree(s.log_dir)
    started = Started(s, tmp_path, ranks=ranks)
    assert started.wait() == [0] * ranks, started.text()


@pytest.mark.parametrize(
    "ranks, kills",
    [
        pytest.param(1, 6, marks=pytest.mark.slow),
        pytest.param(1, 30, marks=faulty),
        pytest.param(2, 20, marks=faulty),
    ],
)
def test_a_run_that_is_killed_at_random_ends_as_if_it_had_not_been(s, whole, tmp_path, ranks, kills):
    killed_at_random(s, tmp_path, ranks, kills, seed=kills)
    assert ended_as(whole(ranks), s.log_dir)


# ---------------------------------------------------------------------------------------------------
# What it goes on from, and what not


class Lines(list):
    """A log that keeps its lines."""

    write = list.append


@pytest.fixture
def choose(s, whole):
    """choose(): the folder that RESUME=auto takes of two checkpoints, and the log's lines."""
    up_to(4, whole(), s.log_dir)
    hashes = json.loads((checkpoints(s.log_dir)[0] / "checkpoint.json").read_text())["hashes"]

    def choose(resume="auto", **changes):
        log, world, clock = Lines(), World(0, 1, 0, 1), train_gpt.Clock(CPU)
        settings = replace(s, resume=resume, **changes)
        chosen = train_gpt.Checkpoints(settings, world, None, [], None, clock, log, hashes).choose()
        return chosen and chosen.name, log

    return choose


def cut(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def lose(path, rng):
    path.unlink()


@pytest.mark.parametrize("name", ["rank_0.bin", "checkpoint.json", "complete"])
@pytest.mark.parametrize("damage, times", [(flip, 20), (cut, 20), (lose, 1)])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(s, choose, name, damage, times):
    rng, path = random.Random(times), checkpoints(s.log_dir)[0] / name
    intact = path.read_bytes()
    assert choose() == ("step_000004", [])
    for _ in range(times):
        damage(path, rng)
        chosen, (line,) = choose()
        assert chosen == "step_000003"
        assert line.startswith("checkpoint: damaged") and "step_000004" in line
        path.write_bytes(intact)


def test_where_all_checkpoints_are_damaged_it_is_one_sentence(s, whole, tmp_path):
    up_to(2, whole(), s.log_dir)
    for folder in checkpoints(s.log_dir):
        flip(folder / "rank_0.bin", random.Random(0))
    code, text = resumed(s, tmp_path)
    said = text.splitlines()[-1] + "\n"
    assert refused(code, said) and said.startswith("RESUME: ") and "SHA-256" in said, text


@pytest.mark.slow
def test_a_run_goes_on_from_before_a_damaged_checkpoint_and_writes_it_again(s, whole, tmp_path):
    newest = up_to(4, whole(), s.log_dir)
    flip(newest / "rank_0.bin", random.Random(0))
    code, text = resumed(s, tmp_path)
    assert code == 0 and "step_000003, step 3" in text and f"checkpoint: {newest}\n" in text
    assert same(content(checkpoints(s.log_dir)[0]), content(checkpoints(whole())[0]))


@pytest.mark.slow
def test_damaged_checkpoints_do_not_count_among_the_newest_and_are_not_removed(s, whole, tmp_path):
    up_to(4, whole(), s.log_dir)
    for folder in checkpoints(s.log_dir)[:2]:
        flip(folder / "rank_0.bin", random.Random(0))
    cut(tmp_path / "logs" / "before.checkpoints" / "step_000002" / "complete", random.Random(0))
    started = Started(replace(s, resume="auto", num_iterations=6), tmp_path, partial(faults.killed_at, 20))
    started.wait()
    left = [folder.name for folder in checkpoints(s.log_dir)]
    assert left[-1] == "step_000001" and len(left) <= 2, left
    (run,) = Path(s.log_dir).glob("*.checkpoints")
    assert len(list(run.glob("*.damaged"))) == 3


def test_the_newest_checkpoint_is_found_whatever_a_copy_did_to_times(s, choose):
    for age, folder in enumerate(reversed(checkpoints(s.log_dir))):
        os.utime(folder, (age, age))
    times = [folder.stat().st_mtime for folder in checkpoints(s.log_dir)]
    assert times == sorted(times, reverse=True)
    for age, folder in enumerate(checkpoints(s.log_dir)):
        os.utime(folder, (age, age))
    assert choose()[0] == "step_000004"


@pytest.mark.slow
def test_what_a_user_names_is_gone_on_from_and_left_as_it_is(s, whole, tmp_path):
    kept = up_to(4, whole(), s.log_dir)
    (kept.parent / "step_by_step.txt").write_text("mine")
    before = sorted(path.relative_to(kept.parent) for path in kept.parent.rglob("*"))
    for changes in (dict(resume=str(kept)), dict(resume=str(kept.parent)), dict(resume_changed=True)):
        others = replace(s, **{"resume": "auto", "log_dir": s.log_dir, **changes})
        started = Started(others, tmp_path)
        assert started.wait() == [0] and "step 4, after" in started.text(), started.text()
        assert sorted(path.relative_to(kept.parent) for path in kept.parent.rglob("*")) == before
        (own,) = set(Path(s.log_dir).glob("*.checkpoints")) - {kept.parent}
        assert len(list(own.glob("step_*"))) == 2
        shutil.rmtree(own)


@pytest.mark.slow
def test_changes_are_refused_with_the_difference_unless_told_otherwise(s, shared, whole, tmp_path):
    up_to(2, whole(), s.log_dir)
    source = tmp_path / "train_gpt.py"
    source.write_text((ROOT / "train_gpt.py").read_text(encoding="utf-8") + "# faster\n", encoding="utf-8")
    write_shard(tmp_path / "train_0.bin", np.concatenate(random_documents(3, 200)))
    cases = [
        (replace(s, muon_lr=0.04), "muon_lr 0.05 (here 0.04)", ()),
        (replace(s, skip_attn="6,7"), "skip_attn '7' (here '6,7')", ()),
        (s, "source '", [partial(faults.other_source, source)]),
        (replace(s, train_files=str(tmp_path / "train_*.bin")), "data '", ()),
    ]
    for settings, difference, put_in in cases:
        code, text = resumed(settings, tmp_path, *put_in)
        assert refused(code, text.splitlines()[-1] + "\n") and difference in text, text
    code, text = resumed(replace(s, muon_lr=0.04), tmp_path, RESUME_CHANGED=1)
    assert code == 0 and "step 2, after" in text and "with changes" in text


def walked(s, position, microbatches):
    walk = train_gpt.DocumentWalk(train_gpt.open_shards(s, "train_files"), s.max_piece_tokens)
    walk.position = position
    for _ in range(microbatches):
        walk.next_microbatch(s.batch_tokens // s.microbatches)
    return walk.position


@pytest.mark.slow
def test_with_changes_it_goes_on_in_the_same_data_and_begins_other_data(s, whole, tmp_path):
    kept = up_to(4, whole(), s.log_dir)
    before = tuple(json.loads((kept / "checkpoint.json").read_text())["position"])
    write_shard(tmp_path / "train_0.bin", np.concatenate(random_documents(3, 2000, longest=9)))
    shorter, other = replace(s, max_piece_tokens=7), replace(s, train_files=str(tmp_path / "train_*.bin"))
    for settings, position in ((shorter, before), (other, (0, 0))):
        started = Started(replace(settings, resume=str(kept), resume_changed=True), tmp_path)
        assert started.wait() == [0] and "step 4, after" in started.text(), started.text()
        about = json.loads((checkpoints(s.log_dir)[0] / "checkpoint.json").read_text())
        assert about["step"] == 6 and tuple(about["position"]) == walked(settings, position, 4) > before


def test_a_checkpoint_beyond_the_last_step_is_refused(choose):
    with pytest.raises(UserError, match="^RESUME: expected .* at most NUM_ITERATIONS=3 steps, found .*0004;"):
        choose(num_iterations=3, resume_changed=True)


def test_resume_names_a_checkpoint_or_a_folder_of_them_or_is_refused(s, choose, tmp_path):
    (run,) = Path(s.log_dir).glob("*.checkpoints")
    assert choose(str(run))[0] == "step_000004" and choose(str(run / "step_000002"))[0] == "step_000002"
    for nowhere in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="^RESUME: expected auto, a checkpoint") as error:
            choose(str(nowhere))
        assert error.value.exit_code == 2


def test_a_run_that_is_alive_is_not_gone_on_from(s, choose):
    (run,) = Path(s.log_dir).glob("*.checkpoints")
    handle = train_gpt.lock(run, create=True)
    chosen, (line,) = choose()
    assert chosen is None and line.endswith("starting anew")
    os.close(handle)
    assert choose() == ("step_000004", [])


def test_where_a_file_system_has_no_locks_nothing_is_taken_for_alive(s, choose, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (run,) = Path(s.log_dir).glob("*.checkpoints")
    os.close(train_gpt.lock(run, create=True))
    monkeypatch.setattr(train_gpt.fcntl, "flock", flock)
    assert choose() == ("step_000004", [])
    os.close(train_gpt.lock(run))


@pytest.mark.slow
def test_two_runs_at_once_do_not_touch_each_other(s, whole, tmp_path):
    """The second starts while the first waits in its fourth step; both may resume."""
    first, second = (tmp_path / name for name in ("1", "2"))
    first.mkdir(), second.mkdir()
    go = partial(faults.paused, 4, tmp_path / "go")
    one = Started(replace(s, resume="auto"), first, go)
    while "checkpoint: " not in one.text() or "step:3/6 train" not in one.text():
        time.sleep(0.05)
    two = Started(replace(s, resume="auto"), second)
    assert two.wait() == [0], two.text()
    (tmp_path / "go").touch()
    assert one.wait() == [0], one.text()
    assert len(list(Path(s.log_dir).glob("*.checkpoints"))) == 2 and "starting anew" in two.text()
    assert ended_as(whole(), s.log_dir) and len(checkpoints(s.log_dir)) == 4


# ---------------------------------------------------------------------------------------------------
# To stop


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_after_the_step_with_a_checkpoint(s, whole, tmp_path, number):
    """Twice at once is once: torchrun passes on what a terminal sends to all."""
    s = replace(s, checkpoint_every=5)
    started = Started(s, tmp_path, partial(faults.signalled, number, 2, 1, 0), ranks=2)
    assert started.wait() == [128 + number] * 2, started.text()
    assert last_line(s.log_dir) == f"stopped by {number.name} after step 2 of 6"
    assert [folder.name for folder in checkpoints(s.log_dir)] == ["step_000002"]
    assert resumed(replace(s, checkpoint_last=True), tmp_path, ranks=2)[0] == 0
    assert ended_as(whole(2), s.log_dir)


def test_a_second_signal_ends_the_run_at_once(s, tmp_path):
    started = Started(s, tmp_path, partial(faults.signalled, signal.SIGTERM, 2, 0, 1.1))
    assert started.wait() == [128 + signal.SIGTERM]
    assert "step:1/6" in last_line(s.log_dir) or last_line(s.log_dir).startswith("checkpoint: ")
    assert [folder.name for folder in checkpoints(s.log_dir)] == ["step_000001"]


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_for_another(s, tmp_path):
    started = Started(s, tmp_path, partial(faults.paused_on, 1, 2, tmp_path / "never"), ranks=2)
    while "checkpoint: " not in started.text():
        time.sleep(0.05)
    first = started.processes[0]
    for _ in range(2):
        time.sleep(1.2)
        assert first.exitcode is None
        os.kill(first.pid, signal.SIGTERM)
    first.join(5)
    assert first.exitcode == 128 + signal.SIGTERM, started.text()
    started.kill()


def test_a_run_that_was_to_write_one_checkpoint_at_its_end_writes_it_when_stopped(s, tmp_path):
    s = replace(s, checkpoint_every=0, checkpoint_last=True)
    started = Started(s, tmp_path, partial(faults.signalled, signal.SIGTERM, 2, 0, None))
    assert started.wait() == [128 + signal.SIGTERM], started.text()
    assert [folder.name for folder in checkpoints(s.log_dir)] == ["step_000002"]


def test_resume_auto_passes_over_the_checkpoints_of_other_runs(s, tmp_path):
    """Two runs of one folder, both stopped: each finds its own, and a third is told of the newest."""
    for seed in (1, 2):
        stop = partial(faults.signalled, signal.SIGTERM, 2, 0, None)
        started = Started(replace(s, seed=seed), tmp_path, stop)
        assert started.wait() == [128 + signal.SIGTERM], started.text()
    for seed in (1, 2):
        code, text = resumed(replace(s, seed=seed), tmp_path)
        assert code == 0 and "step_000002, step 2, after" in text
    code, text = resumed(replace(s, seed=3), tmp_path)
    assert code == 2 and "found " in text and "with seed 2 (here 3)" in text


def test_a_run_without_checkpoints_stops_too(s, tmp_path):
    s = replace(s, checkpoint_every=0)
    started = Started(s, tmp_path, partial(faults.signalled, signal.SIGINT, 2, 0, None))
    assert started.wait() == [130] and last_line(s.log_dir) == "stopped by SIGINT after step 2 of 6"
    assert checkpoints(s.log_dir) == []


def run_with_torchrun(s, tmp_path, *put_in):
    """Two ranks under torchrun, with faults; its result, once no process of the run is left."""
    program, mark = tmp_path / "program.py", f"run{os.getpid()}-{random.getrandbits(64)}"
    lines = [f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]", "import faults, train_gpt"]
    lines += [f"faults.{f.func.__name__}(*{f.args!r}, int(os.environ['RANK']))" for f in put_in]
    program.write_text("import os, sys\n" + "\n".join(lines) + "\nsys.exit(train_gpt.main([]))\n")
    done = launch(nproc=2, script=program, cwd=tmp_path, timeout=60, **overrides(s), MARK=mark)
    left = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            left += [environ.parent.name] * (f"MARK={mark}".encode() in environ.read_bytes())
        except OSError:  # another's, or gone
            pass
    assert left == [], "processes of the run are left"
    return done


@pytest.mark.slow
def test_a_signal_to_one_rank_under_torchrun_loses_nothing(s, whole, tmp_path):
    number = int(signal.SIGTERM)
    done = run_with_torchrun(s, tmp_path, partial(faults.signalled, number, 3, 1, None))
    assert done.returncode and last_line(s.log_dir) == "stopped by SIGTERM after step 3 of 6", done.stderr
    assert resumed(s, tmp_path, ranks=2)[0] == 0 and ended_as(whole(2), s.log_dir)


@pytest.mark.parametrize(
    "phase, how",
    [pytest.param("checkpoint", 9, marks=pytest.mark.slow)]
    + [pytest.param(phase, 9, marks=faulty) for phase in ("data", "backward", "optimizer")]
    + [pytest.param(phase, -3, marks=faulty) for phase in faults.PHASES],
)
def test_a_rank_that_dies_takes_the_run_with_it_within_a_minute(s, whole, tmp_path, phase, how):
    """With no process left; the last checkpoint stays, and the run goes on from it."""
    done = run_with_torchrun(s, tmp_path, partial(faults.dies, phase, how, 1))
    assert done.returncode and [x.name for x in checkpoints(s.log_dir)] == ["step_000002", "step_000001"]
    assert resumed(s, tmp_path, ranks=2)[0] == 0 and ended_as(whole(2), s.log_dir)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["optimizer", "checkpoint"])
def test_without_torchrun_too_a_rank_that_dies_ends_the_other(s, tmp_path, phase):
    started = Started(s, tmp_path, partial(faults.dies, phase, signal.SIGKILL, 1), ranks=2)
    codes = started.wait()
    assert codes[0] > 0 and codes[1] == -signal.SIGKILL, started.text()
    assert [x.name for x in checkpoints(s.log_dir)] == ["step_000002", "step_000001"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["the loss", "lm_head", *(pytest.param(x, marks=faulty) for x in ("mlp_bank", "scalars"))]
)
def test_nan_on_one_rank_stops_all_before_the_optimizers_and_is_named(s, tmp_path, name):
    started = Started(s, tmp_path, partial(faults.spoiled, name, 3, 1), ranks=2)
    assert started.wait() == [1, 1], started.text()
    where = name if name == "the loss" else f"the gradient of {name}"
    text = started.text()
    assert f"step 3: expected finite numbers, found others in {where} on rank 1" in text
    assert text.count("expected finite") == 1 and "rank 0" not in text and "Traceback" not in text
    assert last_line(s.log_dir).startswith("ended by UserError: step 3: expected finite numbers")
    assert text.count("parameters unchanged") == 2
    assert [x.name for x in checkpoints(s.log_dir)] == ["step_000002", "step_000001"]
