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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, prove.__file__], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("prove.py: expected a CUDA GPU, found none;")


def test_a_microbatch_of_the_race_takes_34_tflop_in_products_with_weights_and_what_attention_sees():
    """23 in the blocks, 11 in the head; a piece of n tokens has n (n + 1) / 2 pairs in a window as long."""
    s = train_gpt.Settings()
    with torch.device("meta"):
        model = train_gpt.GPT(s, train_gpt.choose_kernels(CPU, s)[0])
    batch = SimpleNamespace(inputs=torch.zeros(49_152), cu_seqlens=torch.arange(0, 49_153, 2048))
    pairs = 11 * 24 * 2048 * 2049 // 2
    assert prove.flops(model, batch, (2048, 2048)) == pytest.approx(34.35e12 + 14 * 768 * pairs, rel=1e-3)
    short = replace(s, window_pattern="S" * 12)
    with torch.device("meta"):
        model = train_gpt.GPT(short, train_gpt.choose_kernels(CPU, short)[0])
    pairs = 11 * 24 * (2048 + 2047)  # each token sees itself and the one before it
    assert prove.flops(model, batch, (2048, 1)) == pytest.approx(34.35e12 + 14 * 768 * pairs, rel=1e-3)
