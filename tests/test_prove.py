"""tests/gpu/prove.py, so far as a CPU can run it."""

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, ROOT, environment

import train_gpt

sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import prove  # noqa: E402


@pytest.mark.slow
def test_the_program_for_gpus_runs_small_on_a_cpu_from_end_to_end(tmp_path):
    command = [sys.executable, prove.__file__, "--small", "--log", tmp_path / "prove.txt"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for version in prove.VERSIONS:
        assert re.search(rf"^\| {version} \| \d+\.\d\d \(\d\.\d\d\)", done.stdout, re.M), version
        trained = rf"^{version}: train loss 5\.57\d+ at step 1, .* validation loss \d"
        assert re.search(trained, done.stdout, re.M), version
    assert (tmp_path / "prove.txt").read_text() == done.stdout


def test_what_fails_or_takes_too_long_is_named_and_the_rest_runs(tmp_path, capsys):
    report = prove.Report(tmp_path / "prove.txt", 60)
    assert report.run("good", ["-c", "import os; print(os.environ['X'])"], 60, X=3) == "3\n"
    assert report.run("bad", ["-c", "print('so far'); 1 / 0"], 60) is None
    assert report.run("slow", ["-uc", "import time; print('begun'); time.sleep(60)"], 1.5) is None
    with report.telling_of("worse"):
        raise ValueError("wrong")
    shown = capsys.readouterr().out
    assert report.failed == ["bad", "slow", "worse"] and shown == (tmp_path / "prove.txt").read_text()
    for part in ("FAILED: bad\nexit code 1\nso far\n", "ZeroDivisionError", "FAILED: slow\nit took more than",
                 "begun", "FAILED: worse\nTraceback", "ValueError: wrong"):
        assert part in shown, part


def test_a_version_that_fails_does_not_keep_the_others_from_being_timed(tmp_path, capsys, monkeypatch, small):
    real = prove.Version

    def version(name, *args):
        return 1 / 0 if name == "all fast" else real(name, *args)

    monkeypatch.setattr(prove, "Version", version)
    report = prove.Report(tmp_path / "prove.txt", 3 * prove.LIMIT)
    prove.measure(report, small, CPU, rounds=1, size=8)
    shown = capsys.readouterr().out
    assert report.failed == ["times of all fast"] and "in brackets the ratio to head in bfloat16" in shown
    assert len(re.findall(r"^\| (?:plain|head in)", shown, re.M)) == len(prove.VERSIONS) - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, prove.__file__], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("prove.py: expected a CUDA GPU, found none;")


def test_a_microbatch_of_the_race_takes_34_tflop_in_products_with_weights_and_what_attention_sees():
    """23 in the blocks, 11 in the head; a piece of n tokens has n (n + 1) / 2 pairs in a window as long."""
    s = train_gpt.Settings()
    with torch.device("meta"):
        model = train_gpt.GPT(s, train_gpt.plain_kernels())
    batch = SimpleNamespace(inputs=torch.zeros(49_152), cu_seqlens=torch.arange(0, 49_153, 2048))
    pairs = 11 * 24 * 2048 * 2049 // 2
    assert prove.flops(model, batch, (2048, 2048)) == pytest.approx(34.35e12 + 14 * 768 * pairs, rel=1e-3)
    short = replace(s, window_pattern="S" * 12)
    with torch.device("meta"):
        model = train_gpt.GPT(short, train_gpt.plain_kernels())
    pairs = 11 * 24 * (2048 + 2047)  # each token sees itself and the one before it
    assert prove.flops(model, batch, (2048, 1)) == pytest.approx(34.35e12 + 14 * 768 * pairs, rel=1e-3)
