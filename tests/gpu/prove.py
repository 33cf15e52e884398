"""
prove.py: whether the fast kernels are right on this GPU, how fast they are, and which loss they train to.

    python tests/gpu/prove.py [--log FILE]     # on a GPU, in at most 8 minutes
    python tests/gpu/prove.py --small          # tiny, on a CPU: shows that this program runs, and no more

It (1) runs the tests of the kernels on the GPU; (2) times a microbatch and an optimizer step of the
speedrun, and their parts, with each fast kernel and without it, in turn, and prints medians, ratios and the
share of the rate that a large matrix product reaches here; (3) trains 60 steps at full width on the demo's
corpus with and without each. --only takes some of the three. All that it prints goes to the log too. What no
longer fits in the time is left out, and what fails does not keep the rest from running; both are named. The
exit code is 1 where something failed.
"""

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import counted  # noqa: E402

KINDS = ("attention", "head", "newton_schulz")


class Report:
    """Prints to the console and into the log; knows how much time is left, and what failed."""

    def __init__(self, path: Path, seconds: float):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        self.file, self.end = open(path, "w", encoding="utf-8"), time.monotonic() + seconds
        self.failed = []

    def __call__(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            print(line, file=self.file, flush=True)

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def failure(self, what: str, *lines: str) -> None:
        self.failed.append(what)
        self(f"FAILED: {what}", *lines)

    @contextlib.contextmanager
    def telling_of(self, what: str):
        """Whatever goes wrong with `what` is told, and not raised."""
        try:
            yield
        except Exception:
            self.failure(what, traceback.format_exc())
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def run(self, what: str, command: list, seconds: float, **changes) -> str | None:
        """What a program prints, or None where it fails or takes longer."""
        environ = os.environ | {name: str(value) for name, value in changes.items()}
        try:
            done = subprocess.run([sys.executable, *map(str, command)], text=True, cwd=ROOT, env=environ,
                                  capture_output=True, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired as late:
            shown = late.stdout.decode(errors="replace") if late.stdout else ""
            return self.failure(what, f"it took more than {seconds:.0f} s", shown[-2000:])
        if done.returncode:
            return self.failure(what, f"exit code {done.returncode}", done.stdout[-4000:],
                                done.stderr[-2000:])
        return done.stdout


def without(kinds, plain_fp8=False):
    """train_gpt.fast_kernels, less the candidates of some kinds, or less float8."""
    real = train_gpt.fast_kernels

    def fast_kernels(device, s):
        found = real(device, replace(s, fp8_head=s.fp8_head and not plain_fp8))
        return {kind: [] if kind in kinds else candidates for kind, candidates in found.items()}

    return fast_kernels


# name -> what is left out of the fast kernels
VERSIONS = {
    "all fast": without(()),
    "head in bfloat16": without((), plain_fp8=True),
    **{f"plain {kind}": without((kind,)) for kind in KINDS},
}


# ----------------------------------------------------------------------------------------------------
# (2) Times


def milliseconds(device: torch.device, function, times: int = 1) -> float:
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    for _ in range(times):
        function()
    return 1000 * (now() - start) / times


def matrix_rate(device: torch.device, size: int) -> float:
    """TFLOP/s of a bfloat16 product of square matrices of random numbers, the median of ten."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    a @ b
    return 2 * size**3 / statistics.median(milliseconds(device, lambda: a @ b) for _ in range(10)) / 1e9


def random_batch(s, device: torch.device) -> train_gpt.Batch:
    """A microbatch of random tokens, in pieces of random lengths."""
    rng, num_tokens = np.random.default_rng(0), s.batch_tokens // s.microbatches
    lengths = rng.integers(1, s.max_piece_tokens + 1, size=num_tokens)
    starts = np.cumsum(np.append(0, lengths))
    starts = starts[starts < num_tokens]
    tokens = rng.integers(0, s.vocab_size, size=num_tokens + 1).astype(np.uint16)
    length = train_gpt.cu_seqlens_length(num_tokens, len(starts))
    return train_gpt.make_batch(tokens, starts, length, s.max_piece_tokens, device)


def flops(model, batch, windows) -> float:
    """Of a microbatch, forward and backward: products with weights, and queries with the keys they see."""
    s, num_tokens = model.settings, batch.inputs.numel()
    weights = sum(p.numel() for p in (model.attn_bank, model.mlp_bank, model.lm_head))
    starts = batch.cu_seqlens.cpu().numpy()
    place = np.concatenate([np.arange(n) for n in np.diff(np.unique(np.append(starts, num_tokens)))])
    pairs = sum(np.minimum(place, windows[0 if b.long else 1]).sum() + num_tokens
                for b in model.blocks if b.attn is not None)
    return 6.0 * num_tokens * weights + 14.0 * s.model_dim * pairs  # 4 forward, 10 backward


class Version:
    """A model with its own kernels, compiled, and its optimizers; times itself part by part."""

    def __init__(self, name, s, device, batch, windows):
        train_gpt.fast_kernels, real = VERSIONS[name], train_gpt.fast_kernels
        try:
            kernels, self.reasons = train_gpt.choose_kernels(device, s)
        finally:
            train_gpt.fast_kernels = real
        self.name, self.device, self.batch, self.windows = name, device, batch, windows
        self.model = train_gpt.GPT(s, kernels)
        train_gpt.init_weights(self.model, 0)
        self.model.to(device)
        with torch.no_grad():  # zeros would be faster than what is trained
            for p in (self.model.lm_head, self.model.attn_bank, self.model.mlp_bank):
                p.copy_(0.02 * torch.randn_like(p))
        self.forward = train_gpt.compiled(self.model, s) if s.torch_compile else self.model
        self.optimizers = train_gpt.make_optimizers(self.model, s, 0, 1)
        generator = torch.Generator(device).manual_seed(0)
        tokens = batch.inputs.numel()

        def normal(*shape, dtype=s.torch_dtype):
            return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

        self.qkv = normal(3, tokens, s.num_heads, s.head_dim)
        self.x = normal(tokens, s.model_dim)
        self.plans = [kernels.attention_plan(batch.cu_seqlens, tokens, window, s.torch_dtype, batch.longest)
                      for window in windows]
        self.attention, self.head_loss = kernels.attention, kernels.head_loss
        if s.torch_compile:  # as within the model: what is plain is fused there too
            self.attention, self.head_loss = (torch.compile(f, dynamic=False, fullgraph=True)
                                              for f in (self.attention, self.head_loss))
        self.starts = batch.cu_seqlens.cpu().numpy()

    def step(self) -> dict[str, float]:
        """Milliseconds of a microbatch with the optimizers' step: in one go, and then part by part."""
        loss, times, milli = [], {}, lambda function: milliseconds(self.device, function)

        def whole():
            self.forward(*self.batch, self.windows).backward()
            train_gpt.optimizer_step(self.optimizers, lr_scale=0.0, momentum=0.9)

        times["step"] = milli(whole)
        times["forward"] = milli(lambda: loss.append(self.forward(*self.batch, self.windows)))
        times["backward"] = milli(loss[0].backward)
        for optimizer in self.optimizers:
            times[type(optimizer).__name__] = milli(
                lambda: train_gpt.optimizer_step([optimizer], lr_scale=0.0, momentum=0.9))
        return times

    def parts(self) -> dict[str, float]:
        """Milliseconds of the kernels alone, forward and backward."""
        model, s = self.model, self.model.settings

        def attention(plan):
            y = self.attention(*self.qkv.unbind(), plan, s.attn_scale)
            torch.autograd.grad(y.float().sum(), self.qkv)

        def head():
            loss = self.head_loss(self.x, model.lm_head, self.batch.targets)
            torch.autograd.grad(loss, (self.x, model.lm_head))

        def orthogonalize():
            with torch.no_grad():
                for bank in (model.attn_bank, model.mlp_bank):
                    model.kernels.orthogonalize(bank, s.torch_dtype)

        def batch():
            tokens = np.zeros(self.batch.inputs.numel() + 1, dtype=np.uint16)
            train_gpt.make_batch(tokens, self.starts, len(self.starts), self.batch.longest, self.device)

        calls = {"attention, long window": lambda: attention(self.plans[0]),
                 "attention, short window": lambda: attention(self.plans[1]),
                 "head and loss": head, "Newton-Schulz": orthogonalize, "batch to device": batch}
        return {name: milliseconds(self.device, call) for name, call in calls.items()}


def measure(report: Report, s, device: torch.device, rounds: int, size: int) -> None:
    """The table. All fast comes first, and other versions while at least half of the time is left."""
    rate, batch = matrix_rate(device, size), random_batch(s, device)
    windows = train_gpt.attention_windows(s.num_iterations, s)
    report(f"matrix product of {size} x {size} x {size} in bfloat16: {rate:.1f} TFLOP/s",
           f"microbatch: {batch.inputs.numel():,} tokens, windows {windows}")
    for stack in train_gpt.symmetric_stacks(s, 1) if device.type == "cuda" else ():
        with report.telling_of(f"tiles for {stack}"):
            times = train_gpt.time_tiles(stack, s.torch_dtype, device)
            report(f"milliseconds of symmetric products of {stack} by tile:",
                   *(f"  {ms:.3f} {tile}" for tile, ms in sorted(times.items(), key=lambda item: item[1])))
    versions, peaks, cuda = [], {}, device.type == "cuda"
    for name in VERSIONS:
        if versions and report.seconds_left() < LIMIT / 2:
            report(f"left out for want of time: {name}")
            continue
        with report.telling_of(f"times of {name}"):
            start, before = time.monotonic(), torch.cuda.memory_allocated() if cuda else 0
            version = Version(name, s, device, batch, windows)
            version.step(), version.parts()  # compiles
            took = time.monotonic() - start
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                version.step()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) >> 20
            report(f"{name}: ready after {took:.0f} s", *("  " + reason for reason in version.reasons))
            versions.append(version)
    if not versions:
        return
    times, done = {version.name: {} for version in versions}, 0
    while done < rounds and (not done or report.seconds_left() > 0.3 * LIMIT):
        for version in versions:
            for name, value in (version.step() | version.parts()).items():
                times[version.name].setdefault(name, []).append(value)
        done += 1
    work, first = flops(versions[0].model, batch, windows), versions[0].name
    names = list(times[first])
    report(f"milliseconds, medians of {counted(done, 'round')}, in turn; in brackets the ratio to {first}",
           "| version | " + " | ".join(names) + " | TFLOP/s | share | peak MiB |",
           "| --- " * (len(names) + 4) + "|")
    for version in versions:
        own, cells = times[version.name], []
        for name in names:
            ratio = statistics.median(a / b for a, b in zip(own[name], times[first][name]))
            cells.append(f"{statistics.median(own[name]):.2f} ({ratio:.2f})")
        passes = [a + b for a, b in zip(own["forward"], own["backward"])]
        reached = work / statistics.median(passes) / 1e9
        report(f"| {version.name} | " + " | ".join(cells) +
               f" | {reached:.1f} | {reached / rate:.0%} | {peaks.get(version.name, 0):,} |")
    report(f"forward and backward take {work / 1e12:.2f} TFLOP, at that rate {work / rate / 1e9:.1f} ms")


# ----------------------------------------------------------------------------------------------------
# (3) Training


def train(report: Report, small: bool) -> None:
    """60 steps of each version, in processes of their own; prints losses side by side."""
    steps = 3 if small else 60
    changes = dict(PRESET="demo", NUM_ITERATIONS=steps, TARGET_LOSS=0, VAL_LOSS_EVERY=0, EPOCHS=1000,
                   WARMUP_STEPS=2, LOG_DIR=str(Path(report.file.name).with_suffix("")))
    if small:
        changes |= dict(MODEL_DIM=16, NUM_HEADS=1, MLP_DIM=16)
    else:
        changes |= dict(MODEL_DIM=768, NUM_HEADS=6, MLP_DIM=3072, DTYPE="bfloat16", TORCH_COMPILE=1,
                        VOCAB_MULTIPLE=128, BATCH_TOKENS=98_304, MICROBATCHES=2, WINDOW_SCHEDULE="3",
                        WINDOW_BLOCK=128, VAL_SLICE_TOKENS=24_576, MUON_LR=0.05)
    report(f"{steps} steps on the demo's corpus: " + " ".join(f"{k}={v}" for k, v in changes.items()))
    for name in VERSIONS:
        if report.seconds_left() < 60:
            report(f"left out for want of time: {name}")
            continue
        command = [__file__, "--train", name]
        shown = report.run(f"training of {name}", command, report.seconds_left(), **changes)
        if shown is None:
            continue
        losses = [float(x) for x in re.findall(r"train_loss:(\S+)", shown)]
        last, end = re.findall(r"val_loss:(\S+) train_time:(\S+)", shown)[-1], losses[-10:]
        report(f"{name}: train loss {losses[0]:.4f} at step 1, {statistics.mean(end):.4f} over the last "
               f"{len(end)}; validation loss {last[0]} after {last[1]} of training")


LIMIT = 8 * 60  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether the fast kernels are right, and how fast.")
    parser.add_argument("--log", type=Path, default=Path("prove.txt"))
    parser.add_argument("--small", action="store_true", help="tiny, on a CPU, without the tests")
    parser.add_argument("--only", nargs="+", choices=("tests", "times", "training"),
                        default=("tests", "times", "training"))
    parser.add_argument("--train", choices=VERSIONS, help="train_gpt.py with one version's kernels")
    args = parser.parse_args()
    if args.train:
        train_gpt.fast_kernels = VERSIONS[args.train]
        return train_gpt.main([])
    if not args.small and not torch.cuda.is_available():
        print("prove.py: expected a CUDA GPU, found none; --small runs it on a CPU, tiny", file=sys.stderr)
        return 1
    device, s = torch.device("cpu" if args.small else "cuda"), train_gpt.Settings()
    if args.small:
        s = replace(s, model_dim=32, num_heads=2, mlp_dim=64, vocab_size=50, bos_id=49, batch_tokens=512,
                    max_piece_tokens=40, val_slice_tokens=64, window_block=4, torch_compile=False)
    report = Report(args.log, LIMIT)
    report(*train_gpt.describe_environment(device))
    if "tests" in args.only and not args.small:
        report("(1) tests on the GPU")
        tests = ["-m", "pytest", "-q", "-rs", "tests/test_triton.py", "tests/gpu"]
        shown = report.run("tests", tests, 0.4 * LIMIT, TRITON_INTERPRET=0)
        if shown:
            report(shown[-3000:])
    if "times" in args.only:
        report("(2) times")
        torch._dynamo.config.recompile_limit = 64  # all versions compile the same code
        with report.telling_of("times"):
            measure(report, s, device, rounds=2 if args.small else 10, size=128 if args.small else 8192)
    if "training" in args.only:
        report("(3) training")
        with report.telling_of("training"):
            train(report, args.small)
    report(f"failed: {', '.join(report.failed) or 'nothing'}", f"log: {args.log}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
