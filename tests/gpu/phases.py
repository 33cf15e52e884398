"""
Run train_gpt.py, and add to its log how long each phase of a step takes.

    torchrun --standalone --nproc_per_node=N tests/gpu/phases.py [--plain]

Settings come from the environment, as for train_gpt.py. This program imports that script, wraps some of its
functions, and calls its main(). The wrappers put marks on the GPU's stream (CUDA events; on a CPU they take
the time). The time from one mark to the next belongs to the phase that the later one names, so the phases
fill a step without a gap; that of a collective is how long the GPU waits for it. --plain takes plain kernels,
but for the head. The log's line `phases:` is JSON: long window -> phase -> ms, the median of its steps.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402

marks = []  # (step, long window, phase, time) of every mark, from training's first step on
now = 0, 0  # the step under way and its long window

def take_time():
    """A CUDA event, which takes the time when the GPU gets to it, or, on a CPU, the time in seconds."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

def milliseconds(before, after) -> float:
    """Between two results of take_time, which the GPU has passed."""
    return 1000 * (after - before) if isinstance(after, float) else before.elapsed_time(after)

def mark(phase: str) -> None:
    marks.append((*now, phase, take_time()))

def marked(function, phase: str):
    """The function, followed by a mark."""
    def call(*args):
        result = function(*args)
        mark(phase)
        return result
    return call

def wrap_train_gpt(plain: bool) -> None:
    choose_kernels, train_step = train_gpt.choose_kernels, train_gpt.train_step
    wait, result = train_gpt.ShardedParam.wait, train_gpt.Log.result
    train_batches = train_gpt.train_batches

    def choose(device, s):
        kernels, lines = choose_kernels(device, s)
        if plain:
            kernels = train_gpt.Kernels(head_loss=kernels.head_loss, compiled=kernels.compiled)
            lines = [*lines, "kernels: --plain: plain PyTorch, except the head"]

        def head_loss(x, weight, targets):
            mark("blocks, forward")
            x.register_hook(lambda grad: mark("head, backward"))
            return kernels.head_loss(x, weight, targets)
        return kernels._replace(head_loss=marked(head_loss, "head, forward")), lines

    def batches_with_marks(*args):
        for batch in train_batches(*args):
            mark("batch")
            yield batch

    def step_with_marks(model, optimizer, batches, step, lr_factor, momentum, windows, *stop):
        global now
        now = step, windows[0]
        if step == 1:
            marks.clear()  # those of the warm-up, whose steps count from 1, too
        mark("between steps")
        return train_step(model, optimizer, batches, step, lr_factor, momentum, windows, *stop)

    def wait_with_mark(sp):
        wait(sp)
        mark("all-gather" if sp.grad_slice is None else "reduce-scatter")  # None once it is updated

    def result_and_phases(self, *args):
        result(self, *args)
        self.write(f"phases: {json.dumps(phases_of_steps())}", console=False)

    train_gpt.choose_kernels, train_gpt.train_step = choose, step_with_marks
    train_gpt.ShardedParam.wait, train_gpt.Log.result = wait_with_mark, result_and_phases
    train_gpt.train_batches = batches_with_marks
    torch.Tensor.backward = marked(torch.Tensor.backward, "blocks, backward")
    train_gpt.Muon.update = marked(train_gpt.Muon.update, "Muon")
    train_gpt.Adam.update = marked(train_gpt.Adam.update, "Adam")

def phases_of_steps() -> dict[int, dict[str, float]]:
    """long window -> phase -> ms in a step. Called after validation, which has waited for the GPU."""
    laps = defaultdict(Counter)  # (window, phase) -> step -> ms
    for (*_, before), (step, window, phase, after) in zip(marks, marks[1:]):
        laps[window, phase][step] += milliseconds(before, after)
    found = defaultdict(dict)
    for (window, phase), steps in laps.items():
        found[window][phase] = median(steps.values())
    return found

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plain", action="store_true")
    wrap_train_gpt(parser.parse_args().plain)
    sys.exit(train_gpt.main([]))
