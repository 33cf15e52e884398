"""The program for GPUs, in its small form on a CPU."""

import subprocess
import sys

import pytest
from conftest import ROOT, environment


@pytest.mark.slow
def test_the_program_for_gpus_runs_small_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "tests/gpu/prove.py"), "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("target_reached:") == 2 and done.stdout.endswith("\npassed\n")
    assert len(list(tmp_path.glob("*/*/log.txt"))) == 2
