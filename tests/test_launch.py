"""run.sh: which Python it takes, what it installs, what it starts. The Python is a fake that notes calls."""

import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, environment

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
*--dry-run*) echo "batch: $PROCESSES ranks x 1 microbatches"; exit "$REFUSED" ;;
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
        given = dict(PYTHON=folder / "fake/python", CALLS=calls, VERSION="3, 10", PROCESSES=1, REFUSED=0)
        environ = environment(**given | changes)
        done = subprocess.run([*shell, script, *arguments], env=environ, capture_output=True, text=True)
        return done.returncode, done.stderr, calls.read_text().replace(f"{folder}/", "").splitlines()

    return run


def test_one_process_is_started_without_torchrun_after_a_dry_run(checkout):
    code, _, calls = checkout()
    assert code == 0 and calls[-2:] == ["fake train_gpt.py --dry-run", "fake train_gpt.py"]


def test_several_processes_are_started_by_torchrun(checkout):
    code, _, calls = checkout(PROCESSES=64)
    start = "fake -m torch.distributed.run --standalone --nproc_per_node=64 train_gpt.py"
    assert (code, calls[-1]) == (0, start)


def test_what_the_dry_run_refuses_is_not_started(checkout):
    code, _, calls = checkout(REFUSED=2)
    assert code == 2 and "--dry-run" in calls[-1]


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
