"""Runs of train_gpt.py as forked processes, and the faults that are put into them; what such runs leave.

A server that has loaded PyTorch, but never used it, forks the ranks: a start takes hundredths of a second.
A fault is a function that is called in each rank before main(), as fault(rank), and puts something between.
"""

import codecs
import contextlib
import errno
import io
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from conftest import environment, overrides

import train_gpt

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["faults"])


class Started:
    """A run: a process a rank, each with a file for what it prints."""

    def __init__(self, s, folder, *faults, ranks=1, cwd=None, **changes):
        path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(Path(__file__).parent)
        multiprocessing.forkserver.ensure_running()  # with a path on which it finds this file
        os.environ.pop("PYTHONPATH")
        os.environ.update({"PYTHONPATH": path} if path else {})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.printed = [Path(folder) / f"printed_{rank}" for rank in range(ranks)]
        self.processes = []
        for rank, printed in enumerate(self.printed):
            world = dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=ranks)
            world |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            environ = environment(**overrides(s), **(world if ranks > 1 else {}), **changes)
            printed.write_bytes(b"")
            arguments = (rank, environ, printed, cwd or folder, faults)
            self.processes.append(server.Process(target=forked, args=arguments, daemon=True))
            self.processes[-1].start()

    def wait(self, timeout=60):
        """Exit codes, negative for signals. A rank that is still there after `timeout` seconds fails."""
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


def forked(rank, environ, printed, cwd, faults):
    """A rank of a run: what `python train_gpt.py` does, after the faults were put in."""
    out = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(out, number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    for fault in faults:
        fault(rank)
    sys.exit(train_gpt.main([]))


def before(owner, name, hook):
    """Have hook(*its arguments) called before a function."""
    real = getattr(owner, name)

    def hooked(*args, **kwargs):
        hook(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, hooked)


def at_step(number, act):
    """Have act() called before step `number`, counted from 1, on this rank."""
    before(train_gpt, "train_step", lambda f, o, loader, step, *_: act() if step + 1 == number else None)


# ---------------------------------------------------------------------------------------------------
# Faults, whose last argument is the rank that puts them in


def killed_at(n, rank):
    """SIGKILL at the n-th moment of this process's checkpoints: amid each write, before all else on disk."""
    moments = itertools.count(1)

    def moment(*_, **__):
        if next(moments) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn(io.FileIO):
        def write(self, data):
            data = bytes(data)
            super().write(data[: len(data) // 2])
            moment()
            return super().write(data[len(data) // 2 :])

    train_gpt.open = lambda path, mode="r", **kw: (Torn if mode == "wb" else open)(path, mode, **kw)
    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "mkdir"), (Path, "rename")):
        before(owner, name, moment)


def signalled(number, step, on_rank, apart, rank):
    """The signal comes in the step; if `apart` is not None, also a second time, `apart` seconds later."""

    def act():
        os.kill(os.getpid(), number)
        if apart is not None:
            time.sleep(apart)
            os.kill(os.getpid(), number)

    if rank == on_rank:
        at_step(step, act)


def no_room(broken, rank):
    """ENOSPC in the middle of those files of checkpoints that are named: {(step, file's name), ...}."""
    real = train_gpt.write_synced

    def write_synced(path, *parts):
        if (int(path.parent.stem[5:]), path.name) in broken:
            path.write_bytes(b"".join(map(bytes, parts))[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *parts)

    train_gpt.write_synced = write_synced


def quota(size, first, last, rank):
    """The kernel lets no file grow beyond `size` bytes from one step to another."""
    limit = resource.RLIMIT_FSIZE
    at_step(first, lambda: resource.setrlimit(limit, (size, resource.RLIM_INFINITY)))
    at_step(last, lambda: resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))


def full_disk(folder, first, last, rank):
    """A file takes all the room that there is from one step to another."""
    ballast = Path(folder) / "ballast"

    def fill():
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    at_step(first, fill)
    at_step(last, ballast.unlink)


def little_room(megabytes, rank):
    train_gpt.shutil.disk_usage = lambda path: Room(megabytes * 1_000_000)


class Room:
    def __init__(self, free):
        self.free = free


def spoiled(name, step, on_rank, rank):
    """NaN in the gradient of a parameter, or in "the loss", on one rank; says if that moved a parameter."""
    real_weights, real_step, models, now = train_gpt.init_weights, train_gpt.train_step, [], [0]

    def init_weights(model, seed):
        real_weights(model, seed)
        models.append(model)
        if rank == on_rank and name != "the loss":
            param = dict(model.named_parameters())[name]
            param.register_hook(lambda grad: grad * float("nan") if now[0] == step else grad)

    def train_step(forward, optimizers, loader, done, *rest):
        now[0] = done + 1
        kept = [p.detach().clone() for p in models[0].parameters()]
        bad = rank == on_rank and name == "the loss" and now[0] == step
        try:
            return real_step((lambda *a: forward(*a) * float("nan")) if bad else forward, optimizers, loader,
                             done, *rest)
        except train_gpt.UserError:
            same = all(torch.equal(p, was) for p, was in zip(models[0].parameters(), kept))
            print("parameters unchanged" if same else "parameters moved", flush=True)
            raise

    train_gpt.init_weights, train_gpt.train_step = init_weights, train_step


PHASES = dict(
    data=lambda die: before(train_gpt.TrainLoader, "next_batch", die),
    backward=lambda die: before(torch.Tensor, "backward", die),
    optimizer=lambda die: before(train_gpt.ShardedOptimizer, "update_and_gather", die),
    checkpoint=lambda die: before(train_gpt, "write_tensors", die),
)


def dies(phase, how, on_rank, rank):
    """That rank dies in a phase of its third step: how is a signal, or an exit code below zero."""
    step = [0]

    def die(*_, **__):
        if step[0] == 3:
            os.kill(os.getpid(), how) if how > 0 else os._exit(-how)

    if rank == on_rank:
        before(train_gpt, "train_step", lambda forward, o, loader, done, *_: step.__setitem__(0, done + 1))
        PHASES[phase](die)


def written_again(rank):
    """The run ends once the checkpoint is put back, after writing it again as it now is."""
    real = train_gpt.Checkpoints.resume

    def resume(self):
        step, position = real(self), self.loader.position
        self.save(step)
        print(f"put back: step {step}, position {position}, clock {self.clock.total!r}", flush=True)
        if self.world.size > 1:
            train_gpt.dist.barrier()
        os._exit(0)

    train_gpt.Checkpoints.resume = resume


def other_random_state(rank):
    torch.manual_seed(rank + 99)


def other_source(path, rank):
    train_gpt.__file__ = str(path)


def nobody(rank):
    """Go on as a user without rights, who might not be able to read what is loaded only when needed."""
    train_gpt.describe_model(train_gpt.Settings()), codecs.lookup("ascii")
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def paused(step, until, rank):
    """Wait before a step until a file is there."""

    def wait():
        while not Path(until).exists():
            time.sleep(0.01)

    at_step(step, wait)


def paused_on(on_rank, step, until, rank):
    if rank == on_rank:
        paused(step, until, rank)


# ---------------------------------------------------------------------------------------------------
# What a run leaves


def losses(log_dir):
    """{(step, "train" or "val"): loss} of all logs in a folder; where two logs have one, they must agree."""
    found = {}
    for path in Path(log_dir).glob("*.txt"):
        log = path.read_text(encoding="utf-8")
        for step, kind, loss in re.findall(r"^step:(\d+)/\d+ .*?\b(train|val)_loss:(\S+)", log, re.M):
            assert found.setdefault((int(step), kind), loss) == loss, f"step {step}: two {kind} losses"
    return found


def checkpoints(log_dir):
    """All checkpoints in a folder for logs, the newest first."""
    return train_gpt.checkpoints_in(*Path(log_dir).glob("*.checkpoints"))


def content(folder):
    """Every tensor of a checkpoint by (rank, name), and its step and position."""
    about = train_gpt.read_checkpoint(folder)
    kept = {("step", "position"): torch.tensor([about["step"], *about["position"]])}
    for rank in range(len(about["files"])):
        tensors = train_gpt.read_tensors(folder / f"rank_{rank}.bin")
        kept |= {(rank, name): x for name, x in tensors.items()}
    return kept


def same(a, b):
    """Whether two contents are the same, byte for byte, but for random states, which each process draws."""
    raw = [{key: (x.shape, x.dtype, x.numpy().tobytes()) for key, x in kept.items()} for kept in (a, b)]
    drawn = {key for kept in raw for key in kept if key[1] == "random state"}
    return all(raw[0].get(key) == raw[1].get(key) for key in {*raw[0], *raw[1]} - drawn)


def together(kept):
    """The content's parameters and optimizer state, with the rows of all ranks in one: {name: tensor}."""
    found = {}
    for name in {name for _, name in kept if name not in ("position", "random state")}:
        parts = [kept[rank, name] for rank in range(9) if (rank, name) in kept]
        found[name] = parts[0]
        if " of " in name and parts[0].dim():
            p = kept[0, name.split(" of ")[1]]
            num_rows = len(p) if name.startswith("momentum") else p.numel() // p.shape[-1]
            found[name] = torch.cat(parts)[:num_rows]
    return {(0, name): x for name, x in found.items()}


def ended_as(whole, log_dir):
    """Whether what a folder's runs did, all together, is what the uninterrupted run did, bit for bit."""
    expected, found = losses(whole), losses(log_dir)
    assert set(expected) == {(i, "train") for i in range(1, 7)} | {(i, "val") for i in (0, 3, 6)}
    return found == expected and same(content(checkpoints(log_dir)[0]), content(checkpoints(whole)[0]))


def up_to(step, whole, log_dir):
    """Give a folder for logs the checkpoints of a whole run up to one, as if it had been killed there."""
    for folder in sorted(checkpoints(whole))[:step]:
        shutil.copytree(folder, Path(log_dir) / "before.checkpoints" / folder.name)
    return Path(log_dir) / "before.checkpoints" / f"step_{step:06d}"


def refused(code, said):
    """One sentence, no traceback."""
    return code == 2 and said.count("\n") == 1 and "Traceback" not in said


def resumed(s, tmp_path, *put_in, ranks=1, **changes):
    """Exit code, the same on all ranks, and all that RESUME=auto printed."""
    started = Started(replace(s, resume="auto"), tmp_path, *put_in, ranks=ranks, **changes)
    codes = started.wait()
    assert len(set(codes)) == 1, started.text()
    return codes[0], started.text()


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
