"""What the tests share: the script as a module, small settings and models, shards on disk, and launches."""

import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

# before Triton is imported: where no GPU is, its interpreter runs the kernels on the CPU
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background, and inherited from there
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
TINY = dict(batch_tokens=64, microbatches=2, max_piece_tokens=20, val_tokens=64, val_slice_tokens=32)
# without the noise of rounding that test_optimizers.py tells of, and to the last step
TINY |= dict(warmup_steps=0, scalar_lr_mult=0.01, target_loss=0.0, checkpoint_every=1)


@pytest.fixture
def small():
    """Settings of a model of all twelve blocks with every feature, small enough for float64 references."""
    return replace(train_gpt.Settings(), **SMALL)


@pytest.fixture
def data(small, tmp_path):
    """Settings of a small run on the CPU: a good training and a good validation shard, logs in tmp_path."""
    write_shard(tmp_path / "train_0.bin", np.concatenate(random_documents(1, 200)))
    write_shard(tmp_path / "val_0.bin", np.concatenate(random_documents(2, 40)))
    patterns = dict(train_files=str(tmp_path / "train_*.bin"), val_files=str(tmp_path / "val_*.bin"))
    return replace(small, device="cpu", log_dir=str(tmp_path / "logs"), **patterns)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Settings of a tiny run of six steps with a checkpoint after each; all tests read the same data."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train_0.bin", np.concatenate(random_documents(1, 200)))
    write_shard(folder / "val_0.bin", np.concatenate(random_documents(2, 40)))
    patterns = dict(train_files=str(folder / "train_*.bin"), val_files=str(folder / "val_*.bin"))
    return replace(train_gpt.Settings(), **SMALL | TINY | patterns, device="cpu")


@pytest.fixture
def s(shared, tmp_path):
    return replace(shared, log_dir=str(tmp_path / "logs"))


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """whole(n): the folder for logs of n ranks' run that nothing happened to."""
    from faults import Started  # which takes this file's functions

    made = {}

    def run(ranks=1):
        if ranks not in made:
            folder = tmp_path_factory.mktemp(f"whole{ranks}")
            settings = replace(shared, log_dir=str(folder), checkpoint_keep=6)
            started = Started(settings, folder, ranks=ranks)
            assert started.wait() == [0] * ranks, started.text()
            made[ranks] = folder
        return made[ranks]

    return run


def fresh_model(s, seed=0):
    """A model on the CPU with its initial weights."""
    model = train_gpt.GPT(s, train_gpt.plain_kernels())
    train_gpt.init_weights(model, seed)
    return model


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


def overrides(s):
    """The environment that makes these settings: those that are not the speedrun's."""
    values = {f.name: getattr(s, f.name) for f in fields(s) if getattr(s, f.name) != f.default}
    return {"PRESET": "speedrun"} | {name.upper(): value for name, value in values.items()}


def environment(**changes):
    """A run's environment: this one, less any setting and torchrun's variables, and changes (None: unset)."""
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    dropped = {f.name.upper() for f in fields(train_gpt.Settings)} | {"PRESET"} | torchrun
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    clean |= {"OMP_NUM_THREADS": 1} | changes
    return {name: str(value) for name, value in clean.items() if value is not None}


def launch(*arguments, nproc=1, cwd=None, timeout=120, script=ROOT / "train_gpt.py", **changes):
    """Run a script as a user would: plain Python for one process, else torchrun; returns what it did."""
    start = (
        [sys.executable]
        if nproc == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    )
    return subprocess.run(
        [*start, str(script), *map(str, arguments)],
        env=environment(**changes),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def run_main(monkeypatch, capfd):
    """A function that calls main() here, in the environment of some changes: (exit code, stdout, stderr)."""

    def run(*arguments, **changes):
        monkeypatch.setattr(os, "environ", environment(**changes))
        code = train_gpt.main(list(arguments))
        return code, *capfd.readouterr()

    return run
