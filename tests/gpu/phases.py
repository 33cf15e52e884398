"""
Run train_gpt.py and time the phases of its steps.

    torchrun --standalone --nproc_per_node=N tests/gpu/phases.py --out FILE.json [--plain attention head XXT]

Settings come from the environment, as for train_gpt.py, which stays as it is: this program imports it, wraps
functions of it, and calls its main(). The wrappers put marks on the GPU's stream (CUDA events; on a CPU they
take the time). What lies between a mark and the one before it is a lap of the phase that the mark names, so
the laps of a step fill it without a gap. A collective's lap is how long the GPU waits for it, not how long it
takes. --plain puts plain kernels in the place of fast ones after they are chosen. Rank 0 writes FILE: for
each long window, the ms of each phase in a step, the median over the steps with that window.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402

PLAIN = dict(attention=("attn_args", "attention"), head=("head_loss",), XXT=("XXT",))
marks = None  # during training: (step, long window, phase, event) of every mark
now = (0, 0)  # the step under way and its long window


def mark(phase: str) -> None:
    if marks is None:
        return
    event = time.perf_counter()
    if torch.cuda.is_initialized():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    marks.append((*now, phase, event))


def marked(function, phase):
    """The function, followed by a mark. phase: a name, or a function of the arguments that gives it."""
    @wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        mark(phase if isinstance(phase, str) else phase(*args))
        return result

    return call


def mark_hidden(hidden):
    """Marks after the blocks' forward pass, and where the backward pass comes from the head to the blocks."""
    def call(*args):
        x = hidden(*args)
        if torch.is_grad_enabled():
            mark("blocks, forward")
            x.register_hook(lambda grad: mark("head, backward"))
        return x

    return call


def wrap_train_gpt(plain: list[str]) -> None:
    choose_kernels, warm_up = train_gpt.choose_kernels, train_gpt.warm_up
    train, train_step = train_gpt.train, train_gpt.train_step

    def choose(device, s):
        (kernels, lines), slow = choose_kernels(device, s), train_gpt.Kernels()
        for name in plain:
            kernels = kernels._replace(**{field: getattr(slow, field) for field in PLAIN[name]})
            lines = [*lines, f"{name}: plain PyTorch after all, for comparison"]
        if "head" in plain and s.torch_compile:  # uncompiled, its float32 logits do not fit in a GPU's memory
            kernels = kernels._replace(head_loss=torch.compile(train_gpt.softcapped_loss, dynamic=False))
        return kernels._replace(head_loss=marked(kernels.head_loss, "head, forward")), lines

    def warm_up_marked(model, *args):
        model.hidden = mark_hidden(model.hidden)  # outside of what is compiled
        return warm_up(model, *args)

    def train_with_marks(*args, **kwargs):
        global marks
        marks = []
        return train(*args, **kwargs)

    def step_with_marks(model, optimizers, loader, step, lr_scale, momentum, windows, *more):
        global now
        now = step, windows[0]
        mark("between steps")
        return train_step(model, optimizers, loader, step, lr_scale, momentum, windows, *more)

    train_gpt.choose_kernels, train_gpt.warm_up = choose, warm_up_marked
    train_gpt.train, train_gpt.train_step = train_with_marks, step_with_marks
    optimizer = train_gpt.ShardedOptimizer  # a slice has a gradient until it is updated
    optimizer.reduce_scatter = marked(optimizer.reduce_scatter, "reduce-scatter")
    optimizer.wait = marked(
        optimizer.wait, lambda _, sp: "all-gather" if sp.grad_slice is None else "reduce-scatter")
    train_gpt.Muon.update = marked(train_gpt.Muon.update, "Muon")
    train_gpt.DistAdam.update = marked(train_gpt.DistAdam.update, "Adam")
    train_gpt.TrainLoader.next_batch = marked(train_gpt.TrainLoader.next_batch, "batch")
    torch.Tensor.backward = marked(torch.Tensor.backward, "blocks, backward")


def laps() -> dict[int, dict[str, float]]:
    """long window -> phase -> ms in a step."""
    steps = defaultdict(lambda: defaultdict(float))  # (step, window) -> phase -> ms
    for (*_, before), (step, window, phase, event) in zip(marks, marks[1:]):
        ms = 1000 * (event - before) if isinstance(event, float) else before.elapsed_time(event)
        steps[step, window][phase] += ms
    found = defaultdict(lambda: defaultdict(list))
    for (_, window), phases in steps.items():
        for phase, ms in phases.items():
            found[window][phase].append(ms)
    return {window: {phase: median(ms) for phase, ms in phases.items()} for window, phases in found.items()}


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plain", nargs="*", choices=PLAIN, default=[])
    args = parser.parse_args()
    wrap_train_gpt(args.plain)
    code = train_gpt.main([])
    if code == 0 and os.environ.get("RANK", "0") == "0":
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        args.out.write_text(json.dumps(laps()))
    return code


if __name__ == "__main__":
    sys.exit(main())
