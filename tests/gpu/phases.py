# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Run train_gpt.py, and add to its log what the time of a step goes to.

    python3 tests/gpu/phases.py [--profile FILE] [--variants ROUNDS]                # one process
    torchrun --standalone --nproc_per_node=N tests/gpu/phases.py [...]              # several

Settings come from the environment, as for train_gpt.py. This program imports that script, wraps some of its
functions, and calls its main(). The wrappers put marks on the GPU's stream (CUDA events; on a CPU they take
the time). The time from one mark to the next belongs to the phase that the later one names, so the phases
fill a step without a gap; that of a collective is how long the GPU waits for it. The log's line `phases:` is
JSON: long window -> phase -> ms, the median of its steps.

--profile FILE: after the run, one more step under torch.profiler; FILE gets its kernels, the largest first.
--variants ROUNDS: after the run, that many rounds of steps: one with the run's kernels, then one with each
kernel replaced by its plain version. The log's line `variants:` is JSON: variant -> ms of a step, by round.
"""

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import median
from types import MethodType

import torch
import torch._dynamo  # before there is a process group: see run() of train_gpt.py

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402

marks = []  # (step, long window, phase, time) of every mark, from training's first step on
now = 0, 0  # the step under way and its long window
head_loss = None  # the function that computes the head's loss in the step under way
last_step = None  # what the last step was told
first_batch = None

def take_time():
    """A CUDA event, which takes the time when the GPU gets to it, or, on a CPU, the time in seconds."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event

def milliseconds(before, after) -> float:
    """Between two results of take_time, which the GPU has passed."""
    if isinstance(after, float):
        return 1000 * (after - before)
    return before.elapsed_time(after)

def mark(phase: str) -> None:
    marks.append((*now, phase, take_time()))

def marked(function, phase: str):
    """The function, followed by a mark."""
    def call(*args):
        result = function(*args)
        mark(phase)
        return result
    return call

def wrap_train_gpt(profile: Path | None, rounds: int) -> None:
    choose_kernels, train_step, train = train_gpt.choose_kernels, train_gpt.train_step, train_gpt.train
    wait, ended = train_gpt.ShardedParam.wait, train_gpt.Log.ended
    train_batches = train_gpt.train_batches

    def choose(device, s):
        global head_loss
        kernels, lines = choose_kernels(device, s)
        head_loss = kernels.head_loss

        def head_loss_with_marks(x, *case):
            mark("blocks, forward")
            x.register_hook(lambda grad: mark("head, backward"))
            return head_loss(x, *case)
        return kernels._replace(head_loss=marked(head_loss_with_marks, "head, forward")), lines

    def batches_with_marks(*args):
        global first_batch
        for batch in train_batches(*args):
            first_batch = first_batch or batch
            mark("batch")
            yield batch

    def step_with_marks(model, optimizer, batches, step, *stop):
        global now, last_step
        now, last_step = (step.number, step.stage.long_window), step
        if step.number == 0:
            marks.clear()  # those of the warm-up, whose steps count from 0, too
        mark("between steps")
        return train_step(model, optimizer, batches, step, *stop)

    def wait_with_mark(sp):
        wait(sp)
        mark("all-gather" if sp.grad_slice is None else "reduce-scatter")  # None once it is updated

    def ended_and_phases(self, *args):
        ended(self, *args)
        self.write(f"phases: {json.dumps(phases_of_steps())}", console=False)

    def train_and_measure(model, optimizer, batches, schedule, val_tokens, log, *rest):
        code = train(model, optimizer, batches, schedule, val_tokens, log, *rest)
        s, step = model.settings, partial(train_step, model, optimizer, repeat(first_batch), last_step)
        if profile:
            log.write(f"profile: {profile_step(step, profile if log.file else None)}")
        if rounds:
            graphs = torch._dynamo.utils.counters["stats"]
            compiled = graphs["unique_graphs"]
            log.write(f"variants: {json.dumps(time_variants(step, model, optimizer, s, rounds))}")
            graphs["unique_graphs"] = compiled  # those of the variants are not the run's
        return code

    train_gpt.choose_kernels, train_gpt.train_step = choose, step_with_marks
    train_gpt.ShardedParam.wait, train_gpt.Log.ended = wait_with_mark, ended_and_phases
    train_gpt.train_batches, train_gpt.train = batches_with_marks, train_and_measure
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

def wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()

def profile_step(step, path: Path | None) -> str:
    """Profile a call of step(). `path` gets a table of the kernels (on a CPU: operations), the largest first.
    Returns a line that sums it up."""
    on_gpu = torch.cuda.is_initialized()
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    step()
    wait_for_gpu()
    begun = time.perf_counter()
    with torch.profiler.profile(activities=[kind]) as profiler:
        step()
        wait_for_gpu()
    elapsed = 1000 * (time.perf_counter() - begun)
    found = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((microseconds / 1000, event.count, event.key))
    found.sort(reverse=True)
    lines = [f"{ms:9.3f} ms {count:6} x  {name[:150]}" for ms, count, name in found if ms > 0]
    if path:  # on rank 0
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    busy = sum(ms for ms, *_ in found)
    return f"one step, {busy:.1f} ms in {len(lines)} kinds of kernels, {elapsed:.1f} ms with the profiler"

def time_variants(step, model, optimizer, s, rounds: int) -> dict[str, list[float]]:
    """variant -> ms of a step in each round; the variants alternate."""
    fast, compiled, rows = model.kernels, model.hidden, [sp.row for sp in optimizer.sharded_params]
    fast_head = head_loss
    plain_head = train_gpt.softcapped_loss
    if s.torch_compile:
        plain_head = torch.compile(plain_head, dynamic=False)

    def use_fast():
        global head_loss
        head_loss, model.kernels, model.hidden = fast_head, fast, compiled
        for sp, row in zip(optimizer.sharded_params, rows):
            sp.row = row

    def use_plain_head():
        global head_loss
        head_loss = plain_head

    def use_plain_newton_schulz():
        for sp in optimizer.sharded_params:
            if isinstance(sp.row.rule, train_gpt.Muon):
                sp.row = sp.row._replace(rule=sp.row.rule._replace(XXT=train_gpt.XXT))

    def use_uncompiled_blocks():
        model.hidden = MethodType(train_gpt.GPT.hidden, model)

    def use_uncompiled_blocks_and_plain_attention():
        use_uncompiled_blocks()
        model.kernels = fast._replace(attn_args=train_gpt.banded_mask, attention=train_gpt.banded_attention)

    variants = {
        "the run's kernels": use_fast,
        "head in bfloat16": use_plain_head,
        "Newton-Schulz with whole products": use_plain_newton_schulz,
        "blocks without torch.compile": use_uncompiled_blocks,
        "blocks without torch.compile, plain attention": use_uncompiled_blocks_and_plain_attention,
    }
    found = defaultdict(list)
    for number in range(rounds + 1):  # the first, in which what is new is compiled, does not count
        for name, use in variants.items():
            use_fast()
            use()
            wait_for_gpu()
            begun = time.perf_counter()
            step()
            wait_for_gpu()
            if number:
                found[name].append(round(1000 * (time.perf_counter() - begun), 3))
    use_fast()
    return found

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--variants", type=int, default=0, metavar="ROUNDS")
    options = parser.parse_args()
    wrap_train_gpt(options.profile, options.variants)
    sys.exit(train_gpt.main([]))
