"""What the tests share: the script as a module, small settings and models, shards on disk, and launches."""

import multiprocessing.forkserver
import os
import signal
import socket
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

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)
for number in train_gpt.STOP_SIGNALS:  # those ignored in a shell's background or by nohup are inherited
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

SMALL = dict(
    model_dim=32, num_heads=2, mlp_dim=64, vocab_size=50, vocab_multiple=8, bos_id=49,
    batch_tokens=(512,), microbatches=8, max_seq_len=(40,), val_tokens=256, val_slice_tokens=64,
    nproc=1, num_iterations=6, val_loss_every=3, warmup_steps=3, window_block=4, dtype="float32",
    torch_compile=False,
)


def pytest_collection_modifyitems(items):
    """The longest test, the demo, begins first, so that it does not end alone."""
    items.sort(key=lambda item: "demo_builds" not in item.name)


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


def fresh_model(s, seed=0, world_size=1):
    """A model on the CPU with its initial weights."""
    network = train_gpt.NETWORKS[s.network]
    model = network(s, network.plain_kernels, world_size)
    train_gpt.init_weights(model, seed)
    return model


def stage_of(s, long_window, short_window):
    """The first stage of a run, with these windows in tokens."""
    return train_gpt.make_stages(s)[0]._replace(long_window=long_window, short_window=short_window)


def step_of(s, number, lr_factor, momentum, windows=(12, 4)):
    """What a step is told, number from 0."""
    return train_gpt.Step(number, stage_of(s, *windows), lr_factor, momentum)


def training_loss(model, batch, stage):
    """What a training step minimises."""
    return model.training_loss(train_gpt.Batch(*batch), train_gpt.Step(0, stage, 1.0, 0.0))[0]


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A token shard as system facts have it: 256 int32 of header, then uint16 tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def read_shard(path, bos=256):
    """The documents of a shard, without BOS."""
    header, tokens = np.fromfile(path, "<i4", count=256), np.fromfile(path, "<u2", offset=1024)
    assert header.tolist() == [20240520, 1, len(tokens)] + 253 * [0]
    starts = np.flatnonzero(tokens == bos)
    assert starts[0] == 0
    return [part[1:] for part in np.split(tokens, starts[1:])]


def random_documents(seed, count, longest=90, vocab_size=50, bos=49):
    """`count` documents of random length, each opened by BOS, as a list of arrays."""
    rng = np.random.default_rng(seed)
    return [np.append(bos, rng.integers(0, bos, size=rng.integers(0, longest))) for _ in range(count)]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    """Size of the difference of two tensors, relative to the expected one."""
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


def overrides(s):
    """The environment that makes these settings: those that are not the speedrun's."""
    values = {f.name: getattr(s, f.name) for f in fields(s) if getattr(s, f.name) != f.default}
    texts = {}
    for name, x in values.items():
        texts[name.upper()] = int(x) if isinstance(x, bool) else train_gpt.setting_text(x).strip("'")
    return {"PRESET": "speedrun"} | texts


def environment(**changes):
    """A run's environment: this one, less any setting and torchrun's variables, and changes (None: unset).
    One process of one thread, unless a change says otherwise."""
    torchrun = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    dropped = {f.name.upper() for f in fields(train_gpt.Settings)} | {"PRESET"} | torchrun
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    clean |= {"OMP_NUM_THREADS": 1, "NPROC": 1} | changes
    return {name: str(value) for name, value in clean.items() if value is not None}


def launch(*arguments, nproc=1, cwd=None, timeout=120, script=ROOT / "train_gpt.py", **changes):
    """Run a script as a user would: plain Python for one process, else torchrun; returns what it did."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *(torchrun if nproc > 1 else []), str(script), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**changes), cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def run_main(monkeypatch, capfd):
    """A function that calls main() here, in the environment of some changes: (exit code, stdout, stderr)."""

    def run(*arguments, **changes):
        monkeypatch.setattr(os, "environ", environment(**changes))
        code = train_gpt.main(list(arguments))
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def pretend_gpus(monkeypatch):
    """pretend_gpus(count, capability): so many GPUs of 80 GiB are reported, on which nothing can run."""

    def pretend(count, capability=(9, 0)):
        monkeypatch.setattr(train_gpt, "count_gpus", lambda: count)
        answers = dict(set_device=None, get_device_capability=capability, get_device_name="a GPU")
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
        card = train_gpt.Card("a GPU", 80 << 30, capability)
        monkeypatch.setattr(train_gpt, "read_card", lambda device: card)

    return pretend


server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["conftest"])


class Run:
    """A run of main(), a process a rank, forked by a server that has loaded PyTorch: it starts in no time.

    faults: functions, each called with the rank before main(). What rank r prints goes to printed_r beside
    LOG_DIR.
    """

    def __init__(self, s, *faults, ranks=1, **changes):
        folder = Path(s.log_dir).parent
        with pytest.MonkeyPatch.context() as patch:  # a path on which the server finds this file
            patch.setenv("PYTHONPATH", str(ROOT / "tests"))
            multiprocessing.forkserver.ensure_running()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.printed, self.processes = [folder / f"printed_{rank}" for rank in range(ranks)], []
        for rank, printed in enumerate(self.printed):
            world = dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=ranks)
            world |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            environ = environment(**overrides(s) | (world if ranks > 1 else {}) | changes)
            printed.write_bytes(b"")
            process = server.Process(target=forked, args=(rank, environ, printed, faults), daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, timeout=180):
        """Exit codes, negative for signals. Fails if a rank is still there after `timeout` seconds."""
        for process in self.processes:
            process.join(timeout)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert None not in codes, f"still running: {codes}\n{self.text()}"
        return codes

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def text(self):
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in self.printed)


def ran(s, *faults, ranks=1, code=0, **changes):
    """What a run printed, all of whose ranks ended with this exit code."""
    run = Run(s, *faults, ranks=ranks, **changes)
    codes = run.wait()
    assert codes == [code] * ranks, f"{codes}\n{run.text()}"
    return run.text()


def forked(rank, environ, printed, faults):
    """A rank of a Run."""
    out = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(out, number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
    os.chdir(printed.parent)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    train_gpt.PARENT = os.getppid()  # the server imported it; a rank without its parent ends
    for fault in faults:
        fault(rank)
    sys.exit(train_gpt.main([]))


def before(owner, name, hook, monkeypatch=None):
    """Have hook(*its arguments) called before a function of a module or class; monkeypatch undoes it."""
    real = getattr(owner, name)

    def hooked(*args, **kwargs):
        hook(*args, **kwargs)
        return real(*args, **kwargs)

    (monkeypatch.setattr if monkeypatch else setattr)(owner, name, hooked)
