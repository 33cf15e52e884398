"""What the tests share: the script as a module, small settings, and shards on disk."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

SMALL = dict(
    num_layers=12,
    model_dim=32,
    num_heads=2,
    mlp_dim=64,
    vocab_size=50,
    vocab_multiple=8,
    bos_id=49,
    batch_tokens=512,
    microbatches=8,
    max_piece_tokens=40,
    val_tokens=256,
    val_slice_tokens=64,
    num_iterations=6,
    val_loss_every=3,
    warmup_steps=3,
    window_block=4,
    dtype="float32",
    torch_compile=False,
)


@pytest.fixture
def small():
    """Settings of a model of all twelve blocks with every feature, small enough for float64 references."""
    return replace(train_gpt.Settings(), **SMALL)


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A token shard as system facts have it: 256 int32 of header, then uint16 tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def random_documents(seed, count, longest=90, vocab_size=50, bos=49):
    """`count` documents of random length, each opened by BOS, as a list of arrays."""
    rng = np.random.default_rng(seed)
    return [np.append(bos, rng.integers(0, bos, size=rng.integers(0, longest))) for _ in range(count)]


def environment(**overrides):
    """The environment of a run: this one, less any setting and torchrun's variables, with overrides."""
    known = {f.upper() for f in train_gpt.Settings.__dataclass_fields__} | {
        "PRESET",
        "NPROC",
        "OMP_NUM_THREADS",
    }
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    clean = {name: value for name, value in os.environ.items() if name not in known | torchrun}
    return clean | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in overrides.items()}


def launch(*arguments, nproc=1, cwd=None, timeout=120, script=ROOT / "train_gpt.py", **overrides):
    """Run a script as a user would: plain Python for one process, else torchrun; returns what it did."""
    start = (
        [sys.executable]
        if nproc == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    )
    return subprocess.run(
        [*start, str(script), *map(str, arguments)],
        env=environment(**overrides),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
