"""run.sh: which Python it takes, what it installs, what it starts; mostly with a Python that is a fake."""

import os
import re
import subprocess
import sys
from collections import namedtuple

import pytest
from conftest import ROOT, environment, overrides

# Writes its arguments to $CALLS, one call a line, and does nothing. It has the packages of requirements.txt
# if a file `installed` lies beside it, or if the true Python has them.
FAKE = f"""#!/usr/bin/env bash
printf '%s|' "$(basename "$(dirname "$0")")" "$@" | tr '\\n' ' ' >>"$CALLS"
echo "OMP_NUM_THREADS=${{OMP_NUM_THREADS-unset}}" >>"$CALLS"
case "$*" in
*version_info*) exec {sys.executable} -c "import sys; sys.version_info = ${{VERSION:-3, 10}}; $2" ;;
--version) echo "Python 3.9.18" ;;
*cpu_count*) echo 8 ;;
-\\ *) [ -e "$(dirname "$0")/installed" ] || exec {sys.executable} "$@" ;;
"-m venv "*) [ -z "${{NO_VENV:-}}" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip install "*) [ -z "${{NO_PIP:-}}" ] && touch "$(dirname "$0")/installed" ;;
"-m torch.distributed.run "*) exit "${{TORCHRUN:-0}}" ;;
*--nproc*) echo "${{PROCESSES:-1}}"; exit "${{REFUSED:-0}}" ;;
esac
"""
Done = namedtuple("Done", "code stdout stderr calls")


class Checkout:
    """A folder with run.sh and a fake Python; its train_gpt.py is never run."""

    def __init__(self, folder, requirements="pytest\n"):
        self.folder, self.python, self.calls = folder, folder / "fake/python", folder / "calls"
        self.script = folder / "run.sh"
        self.python.parent.mkdir(parents=True)
        self.script.write_bytes((ROOT / "run.sh").read_bytes())
        (folder / "requirements.txt").write_text(requirements)
        self.python.write_text(FAKE)
        for path in (self.script, self.python):
            path.chmod(0o755)

    def run(self, *arguments, script=None, cwd=None, **changes):
        self.calls.unlink(missing_ok=True)
        changes = dict(PYTHON=self.python, CALLS=self.calls, OMP_NUM_THREADS=None) | changes
        done = subprocess.run(
            [str(script or self.script), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=cwd,
            env=environment(**changes),
        )
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return Done(done.returncode, done.stdout, done.stderr, calls)

    def torchrun(self, nproc, *arguments, python="fake", threads="unset"):
        """The call that starts `nproc` processes."""
        start = f"{python}|-m|torch.distributed.run|--standalone|--nproc_per_node={nproc}"
        return "|".join([start, str(self.folder / "train_gpt.py"), *arguments, f"OMP_NUM_THREADS={threads}"])


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a checkout")


def started(done):
    return [call for call in done.calls if "torch.distributed.run" in call]


def test_the_last_call_is_torchrun_whose_arguments_are_passed_on_and_whose_exit_code_is_returned(checkout):
    done = checkout.run("a", "b c", TORCHRUN=7, PROCESSES=1)
    assert done.code == 7 and done.stderr == ""
    assert done.calls[-1] == checkout.torchrun(1, "a", "b c")
    assert f"fake|{checkout.folder / 'train_gpt.py'}|--nproc|a|b c|OMP_NUM_THREADS=unset" in done.calls
    plan = f"{checkout.python} -m torch.distributed.run --standalone --nproc_per_node=1"
    assert done.stdout == f"+ {plan} {checkout.folder / 'train_gpt.py'} a b c\n"


@pytest.mark.parametrize("link", ["absolute", "relative", "two"])
def test_it_is_found_through_links_from_another_folder_and_with_cdpath(checkout, tmp_path, link):
    """CDPATH makes cd print and go elsewhere: here, to another folder of the checkout's name."""
    bin, decoy = tmp_path / "bin", tmp_path / "decoy" / "a checkout"
    bin.mkdir(), decoy.mkdir(parents=True)
    (bin / "direct").symlink_to(checkout.script if link == "absolute" else "../a checkout/run.sh")
    (bin / "go").symlink_to("direct")
    script = {"absolute": "bin/direct", "relative": "bin/direct", "two": "bin/go"}[link]
    done = checkout.run(script=script, cwd=tmp_path, CDPATH=tmp_path / "decoy")
    assert done.code == 0 and done.calls[-1] == checkout.torchrun(1)
    done = checkout.run(script="a checkout/run.sh", cwd=tmp_path, CDPATH=tmp_path / "decoy")
    assert done.code == 0 and done.calls[-1] == checkout.torchrun(1)


@pytest.mark.parametrize("argument", ["-h", "--help", "--dry-run", "--nproc", "--sample", "--sample=x"])
def test_what_only_tells_something_starts_no_torchrun(checkout, argument):
    done = checkout.run(argument, "more", REFUSED=3)
    assert done.calls[-1] == f"fake|{checkout.folder / 'train_gpt.py'}|{argument}|more|OMP_NUM_THREADS=unset"
    assert started(done) == [] and done.code == (3 if argument == "--nproc" else 0)


def test_refused_settings_start_no_torchrun(checkout):
    done = checkout.run(REFUSED=2, PROCESSES="")
    assert done.code == 2 and started(done) == []


@pytest.mark.parametrize(
    "changes, found",
    [
        (dict(PYTHON="no/such/python"), "'no/such/python' is none"),
        (dict(VERSION="3, 9, 18"), "is Python 3.9.18"),
    ],
)
def test_without_python_of_at_least_3_10_it_ends_with_one_sentence(checkout, changes, found):
    done = checkout.run(**changes)
    assert (done.code, done.stdout, started(done)) == (2, "", [])
    assert done.stderr.startswith("run.sh: needs Python 3.10 or newer; ") and found in done.stderr
    assert done.stderr.endswith("; set PYTHON=/path/to/python.\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["no-such-package>=1", "pytest<1"])
def test_missing_packages_are_installed_in_a_venv_of_the_checkout_which_is_kept(tmp_path, missing):
    checkout = Checkout(tmp_path, f"pytest>=1  # there\n\n# a comment\n{missing}\n")
    done = checkout.run()
    assert done.code == 0 and f"needs {missing}, found " in done.stderr
    assert done.stdout.startswith(f"run.sh: installing requirements.txt in {tmp_path}/.venv ")
    assert f"fake|-m|venv|{tmp_path}/.venv|OMP_NUM_THREADS=unset" in done.calls
    assert f"bin|-m|pip|install|-r|{tmp_path}/requirements.txt|OMP_NUM_THREADS=unset" in done.calls
    assert done.calls[-1] == checkout.torchrun(1, python="bin")
    again = checkout.run()
    assert again.code == 0 and again.stdout.startswith(f"run.sh: using {tmp_path}/.venv/bin/python\n")
    assert not any("|venv|" in call or "|pip|" in call for call in again.calls)
    assert again.calls[-1] == checkout.torchrun(1, python="bin")


def test_a_python_with_the_packages_is_used_though_there_is_a_venv(checkout):
    (checkout.folder / ".venv").symlink_to("no-such-folder")
    done = checkout.run()
    assert done.calls[-1] == checkout.torchrun(1, python="fake") and ".venv" not in done.stdout


@pytest.mark.parametrize(
    "obstacle, said", [("NO_VENV", "could not make"), ("NO_PIP", "pip could not install")]
)
def test_what_cannot_be_installed_is_told_with_a_remedy(tmp_path, obstacle, said):
    done = Checkout(tmp_path, "no-such-package\n").run(**{obstacle: 1})
    assert done.code == 1 and started(done) == []
    assert f"run.sh: {said} {tmp_path}/" in done.stderr


@pytest.mark.parametrize(
    "processes, given, threads", [(1, None, "unset"), (2, None, 4), (3, None, 2), (16, None, 1), (2, 5, 5)]
)
def test_several_processes_share_the_cores(checkout, processes, given, threads):
    """The fake Python counts 8."""
    done = checkout.run(PROCESSES=processes, OMP_NUM_THREADS=given)
    assert done.calls[-1] == checkout.torchrun(processes, threads=threads)


def test_an_unknown_argument_ends_it_before_torchrun_with_exit_code_2(tmp_path):
    done = subprocess.run(
        [str(ROOT / "run.sh"), "--dryrun"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env=environment(PYTHON=sys.executable, PRESET="demo"),
    )
    assert done.returncode == 2 and "unrecognized arguments: --dryrun" in done.stderr
    assert "torch.distributed" not in done.stdout + done.stderr and os.listdir(tmp_path) == []


@pytest.mark.slow
def test_two_processes_train_and_settings_reach_them(tmp_path, data):
    done = subprocess.run(
        [str(ROOT / "run.sh")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment(**overrides(data), PYTHON=sys.executable, NPROC=2),
    )
    assert done.returncode == 0, done.stderr
    line = r"^\+ .* -m torch.distributed.run --standalone --nproc_per_node=2 .*train_gpt.py$"
    assert re.search(line, done.stdout, re.M)
    assert "2 ranks x 4 microbatches x 64 tokens" in done.stdout and "step:6/6 val_loss" in done.stdout
