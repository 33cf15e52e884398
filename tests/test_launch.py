"""run.sh: which Python it takes, what it installs, what it starts. The Python is a fake that notes calls.
The script: how many processes it starts, and how they end together."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, ROOT, environment, launch, overrides, ran

import train_gpt

# Writes its folder and arguments to $CALLS. It has the packages if `installed` is beside it.
FAKE = f"""#!/usr/bin/env bash
echo "$(basename "$(dirname "$0")") $*" >>"$CALLS"
case "$*" in
*version_info*) exec {shlex.quote(sys.executable)} -c "import sys; sys.version_info = $VERSION; $2" ;;
--version) echo "Python 3.9.18" ;;
-\\ *) [ -e "$(dirname "$0")/installed" ] ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install "*) touch "$(dirname "$0")/installed" ;;
"-c import torch"*) [ -e "$(dirname "$0")/torch" ] ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """run(*arguments, **changes) of a copy of run.sh: (exit code, stderr, calls)."""
    folder = tmp_path / "a checkout"
    (folder / "fake").mkdir(parents=True)
    for name, text in (("run.sh", (ROOT / "run.sh").read_text()), ("fake/python", FAKE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def run(*arguments, installed=True, script=folder / "run.sh", shell=(), **changes):
        calls = folder / "calls"
        calls.unlink(missing_ok=True)
        if installed:
            (folder / "fake/installed").touch()
        given = dict(PYTHON=folder / "fake/python", CALLS=calls, VERSION="3, 10")
        environ = environment(**given | changes)
        done = subprocess.run([*shell, script, *arguments], env=environ, capture_output=True, text=True)
        return done.returncode, done.stderr, calls.read_text().replace(f"{folder}/", "").splitlines()

    return run


def test_training_is_one_call_of_the_script(checkout):
    code, _, calls = checkout()
    assert code == 0 and calls[-1] == "fake train_gpt.py"
    assert not any("--dry-run" in call for call in calls)


@pytest.mark.parametrize("word", ["--help", "--dry-run"])
def test_what_trains_nothing_is_one_call(checkout, word):
    assert checkout(word)[2][-1] == f"fake train_gpt.py {word}"


def test_an_old_python_is_one_sentence(checkout):
    code, said, calls = checkout(VERSION="3, 9")
    assert code == 2 and len(calls) == 2
    assert said == "run.sh: expected Python 3.10 or newer, found Python 3.9.18; set PYTHON=/path/to/python.\n"


def test_missing_packages_are_installed_in_venv_once(checkout):
    code, _, calls = checkout(installed=False)
    assert code == 0 and calls[-1] == "bin train_gpt.py"
    assert "fake -m venv .venv" in calls
    assert "bin -m pip install --requirement=requirements.txt" in calls
    again = checkout(installed=False)[2]
    assert again[-1] == "bin train_gpt.py" and not any("install" in call for call in again)


def test_the_tests_get_their_own_packages_and_words(checkout):
    code, _, calls = checkout("test", "-k", "two words", installed=False)
    assert code == 0 and calls[-1] == "bin -m pytest -k two words"
    both = "--requirement=requirements.txt --requirement=tests/requirements.txt"
    assert f"bin -m pip install {both} --requirement=tests/requirements-torch.txt" in calls


def test_the_tests_keep_a_pytorch_that_is_there(checkout, tmp_path):
    checkout(installed=False)
    venv = tmp_path / "a checkout/.venv/bin"
    (venv / "installed").unlink()
    (venv / "torch").touch()
    code, _, calls = checkout("test", installed=False)
    installs = [call for call in calls if "pip install" in call]
    assert code == 0 and installs == [
        "bin -m pip install --requirement=requirements.txt --requirement=tests/requirements.txt"]
    pinned = (ROOT / "tests/requirements.txt").read_text().lower()
    assert "torch==" not in pinned and "torch==" in (ROOT / "tests/requirements-torch.txt").read_text()


def test_another_shell_hands_over_to_bash(checkout):
    code, said, calls = checkout("--dry-run", shell=["sh"])
    assert (code, said, calls[-1]) == (0, "", "fake train_gpt.py --dry-run")


def test_a_link_to_run_sh_uses_the_folder_that_run_sh_is_in(checkout, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/train").symlink_to("../a checkout/run.sh")
    code, _, calls = checkout("--dry-run", script=tmp_path / "bin/train", installed=False)
    assert code == 0 and calls[-1] == "bin train_gpt.py --dry-run" and not (tmp_path / "bin/.venv").exists()


# ---- Processes that the script starts

@pytest.mark.parametrize("cores, microbatches, expected", [
    (1, 2, 1), (2, 2, 2), (4, 2, 2), (64, 8, 8), (6, 8, 4), (3, 8, 2), (2, 1, 1),
])  # fmt: skip
def test_on_a_cpu_there_is_a_process_for_each_core_that_gets_microbatches(
    small, monkeypatch, cores, microbatches, expected
):
    monkeypatch.setattr(train_gpt, "count_cores", lambda: cores)
    s = replace(small, nproc=0, microbatches=microbatches)
    assert train_gpt.count_processes(s, CPU) == expected
    assert train_gpt.count_processes(replace(s, nproc=5), CPU) == 5
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert train_gpt.threads_of_each(expected) == cores // expected


def test_several_gpus_are_started_by_torchrun_after_the_data_are_checked(
        data, run_main, monkeypatch, pretend_gpus):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append(arguments) or sys.exit(7))
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "train_gpt.py"])  # torchrun has no -u
    pretend_gpus(8)
    s = replace(data, device="cuda", nproc=0)
    assert run_main(**overrides(s), NPROC=None)[0] == 7
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert started == [[*torchrun, "train_gpt.py"]]
    code, _, said = run_main(**overrides(replace(s, train_files="/nowhere/*.bin")), NPROC=None)
    assert code == 1 and said.startswith("TRAIN_FILES: expected token shards at /nowhere/*.bin")
    assert len(started) == 1


@pytest.mark.parametrize("gpus, count, microbatches, expected", [
    (8, 8, 8, None), (6, 6, 24, None),
    (5, 4, 8, "4 of 5 are used, since 5 ranks cannot share a step"),
    (6, 4, 8, "4 of 6 are used, since 6 ranks cannot share a step; MICROBATCHES=24 uses all"),
])  # fmt: skip
def test_gpus_that_are_left_idle_are_told(monkeypatch, pretend_gpus, gpus, count, microbatches, expected):
    pretend_gpus(gpus)
    s = replace(train_gpt.Settings(), microbatches=microbatches)
    cuda = torch.device("cuda")
    assert train_gpt.count_processes(s, cuda) == count
    assert train_gpt.idle_gpus(s, cuda, count) == ([f"GPUs: WARNING: {expected}"] if expected else [])
    assert train_gpt.idle_gpus(replace(s, nproc=1), cuda, 1) == train_gpt.idle_gpus(s, CPU, 1) == []


def other_rate(rank):
    if rank:
        os.environ["MUON_LR"] = "0.001"


@pytest.mark.slow
def test_ranks_with_other_settings_are_one_sentence(data):
    """As when a variable is set on one of two nodes."""
    said = ran(replace(data, microbatches=2), other_rate, ranks=2, code=1)
    assert "rank 1: expected the settings, script and data of rank 0, found another muon_lr; start" in said
    assert not Path(data.log_dir).exists()


def two_ranks(data, **changes):
    """The environment of a run that starts a process for each of its two microbatches."""
    s = replace(data, nproc=0, microbatches=2, torch_compile=False, target_loss=0.0)
    return overrides(s) | dict(NPROC=2) | changes


@pytest.mark.slow
def test_the_ranks_that_the_script_starts_train_as_one_process_does(data):
    alone = launch(**two_ranks(data, NPROC=1))
    shared = launch(**two_ranks(data))
    assert (shared.returncode, shared.stderr) == (alone.returncode, alone.stderr) == (0, "")
    assert re.search(r"^processes: 2, of 1 thread each, on \d+ cores?; else set NPROC$", shared.stdout, re.M)
    assert "\nbatch: 2 ranks x 1 microbatch x 256 tokens" in shared.stdout
    assert "\nbatch: 1 rank x 2 microbatches x 256 tokens" in alone.stdout
    losses = [[float(x) for x in re.findall(r"_loss:([\d.]+)", done.stdout)] for done in (alone, shared)]
    assert len(losses[0]) == 6 + 3 and losses[1] == pytest.approx(losses[0], abs=2e-4)


def backend_eager_and_threads_told(rank):
    """torch.compile without a compiler; at the end, the names of gloo's threads are printed."""
    torch.compile = partial(torch.compile, backend="eager")
    destroy = dist.destroy_process_group

    def told():
        destroy()
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        print("left of gloo:", [name for name in names if "gloo" in name], flush=True)

    dist.destroy_process_group = told


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_no_thread_of_the_process_group_outlives_it(data, compiled):
    """One that lets go of a tensor while Python ends aborts the process: a finished run, exit code 134."""
    s = replace(data, microbatches=2, torch_compile=compiled, target_loss=0.0)
    said = ran(s, backend_eager_and_threads_told, ranks=2)
    assert said.count("left of gloo: []\n") == 2, said


SPOILED = """
import atexit, os, sys, time
sys.path.insert(0, {root!r})
import train_gpt

def act(*arguments):
    if os.environ.get("LOCAL_RANK") == "1":
        {act}
    return real(*arguments)

real = train_gpt.{function}
train_gpt.{function} = act
if __name__ == "__main__":
    sys.exit(train_gpt.main([]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("act, code, expected", [
    ("atexit.register(os.abort); raise train_gpt.UserError('the file was cut', rank=1)", 1,
     "rank 1: the file was cut\nrank 1 ended with exit code 1\n"),
    ("atexit.register(os.abort); sys.tracebacklimit = 0; raise ValueError('a fault of the program')", 1,
     "ValueError: a fault of the program\nrank 1 ended with exit code 1\n"),
    ("os.kill(os.getpid(), 9)", 1, "rank 1 ended with exit code -9\n"),
])  # fmt: skip
def test_a_rank_that_fails_ends_the_run_with_a_sentence(data, tmp_path, act, code, expected):
    """At once: while Python ends in order, threads of gloo may abort the process. Here, that always does."""
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED.format(root=str(ROOT), act=act, function="train_step"))
    done = launch(script=script, cwd=tmp_path, **two_ranks(data, WARMUP_STEPS=0))
    assert (done.returncode, done.stderr) == (code, expected)


@pytest.mark.slow
@pytest.mark.parametrize("function, code, expected", [
    ("connect", -signal.SIGTERM, ""),
    ("train_step", 128 + signal.SIGTERM, "stopped by SIGTERM after step [12] of 6"),
])  # fmt: skip
def test_sigterm_to_the_first_rank_ends_all(data, tmp_path, function, code, expected):
    """While another rank has not come yet, and in training."""
    script = tmp_path / "slow.py"
    act = "open('here', 'w')\n        time.sleep(2)"
    script.write_text(SPOILED.format(root=str(ROOT), act=act, function=function))
    environ = environment(**two_ranks(data, WARMUP_STEPS=0))
    process = subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environ, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "here").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    shown = process.communicate(timeout=60)[0]  # until all ranks have closed it
    assert process.returncode == code and "Traceback" not in shown and re.search(expected, shown)
