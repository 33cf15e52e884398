"""
Check this machine's GPUs in one command, and leave logs and tables of what was measured.

    python tests/gpu/prove.py [--out FOLDER]     # on GPUs, at most 8 minutes
    python tests/gpu/prove.py --small            # tiny, on a CPU: shows that this program runs, and no more

It (1) runs the tests of the kernels; (2) times Newton-Schulz on the matrices that one rank of 8 has, and the
two orders of the head's weight gradient; (3) trains 20 steps of the speedrun's shapes on synthetic shards,
through train_gpt.py under torchrun, and times the phases of a step (phases.py); (4) trains 60 steps at full
width on the demo's text, with float8 and without, and compares the losses; (5) repeats (3) with each fast
kernel replaced by the plain one. FOLDER gets summary.md with the tables, and shapes/ and text/ with a folder
of logs for each run, which records/report.py reads. What failed, or did not run for lack of time, is named,
and the exit code is then 1. roofline.py puts an estimate beside the phases.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

SHOWN = ("batch:", "attention:", "head:", "Newton-Schulz:", "XXT:", "kernels:", "ready", "compiled",
         "WARNING", "target_reached", "peak")
SMALL = dict(MODEL_DIM=32, NUM_HEADS=2, MLP_DIM=64, BATCH_TOKENS=512, VAL_SLICE_TOKENS=512, WINDOW_BLOCK=16,
             MAX_SEQ_LEN=128, DTYPE="float32", TORCH_COMPILE=0, DEVICE="cpu", WARMUP_STEPS=3, VOCAB_SIZE=500,
             MICROBATCHES=2)
FP8_TOLERANCE = 0.1  # nats a byte between the validation losses of (4): rounding, not another training


class Report:
    """What was measured goes to the console and, at once, to summary.md."""

    def __init__(self, out: Path, minutes: float):
        self.out, self.deadline, self.problems = out, time.monotonic() + 60 * minutes, []
        out.mkdir(parents=True, exist_ok=True)

    def write(self, *lines: str) -> None:
        print(*lines, "", sep="\n", flush=True)
        with open(self.out / "summary.md", "a", encoding="utf-8") as file:
            print(*lines, "", sep="\n", file=file)

    def table(self, title: str, rows: list[list]) -> None:
        """rows: the header first; numbers are written with three decimals."""
        texts = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
        lines = ["| " + " | ".join(row) + " |" for row in texts]
        self.write(f"## {title}", "", lines[0], "|" + " --- |" * len(rows[0]), *lines[1:])

    def run(self, name: str, command: list, **environ) -> str | None:
        """Standard output of a command that succeeded in the time that is left, else None and a problem."""
        print(f"{name}: " + " ".join(f"{key}={value}" for key, value in environ.items()), flush=True)
        environ = os.environ | {key: str(value) for key, value in environ.items()}
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environ, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            output, errors = process.communicate(timeout=max(self.deadline - time.monotonic(), 0))
            problem = f"FAILED: {name}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, too
            output, errors = process.communicate()
            problem = f"NOT MEASURED, no time left: {name}"
        if problem:
            self.problems.append(problem)
            print(output[-3000:], errors[-3000:], problem, sep="\n", flush=True)
        return None if problem else output

    def train(self, name: str, processes: int, plain: list[str] = [], **settings) -> dict | None:
        """A run of train_gpt.py: its figures, and its log in the folder `name`. None if it failed."""
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                       ROOT / "tests/gpu/phases.py", "--out", f"{folder}/phases.json", "--plain", *plain]
            settings |= dict(PRESET="speedrun", TARGET_LOSS=0, VAL_LOSS_EVERY=0, LOG_DIR=folder)
            output = self.run(name, command, **settings)
            if output is None:
                return None
            print(*(line for line in output.splitlines() if line.startswith(SHOWN)), "", sep="\n")
            log, = Path(folder).glob("*/log.txt")
            text, phases = log.read_text(encoding="utf-8"), Path(folder, "phases.json").read_text()
            (self.out / name).mkdir(parents=True)
            (self.out / name / "log.txt").write_text(text, encoding="utf-8")
        if "WARNING, on the clock" in output:  # the log holds the source, too
            self.problems.append(f"FAILED: {name} compiled graphs after its warm-up")
        last = re.search(r"^target_reached:.* val_loss:(\S+) .* step_avg:(\S+)ms$", text, re.MULTILINE)
        losses = re.findall(r"^step:.* train_loss:(\S+)$", text, re.MULTILINE)
        return dict(phases=json.loads(phases), val_loss=float(last[1]), step_avg=float(last[2]),
                    train_losses=[float(x) for x in losses],
                    peak=re.search(r"^peak memory allocated: (\d+)", text, re.MULTILINE)[1])


def milliseconds(function, repeats: int = 20) -> float:
    """The median time of a call, after three that do not count."""
    times = []
    for _ in range(3 + repeats):
        if torch.cuda.is_initialized():
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # about 1 ms, in which all launches get into the queue, as in a run
            begun.record()
            function()
            ended.record()
            ended.synchronize()
            times.append(begun.elapsed_time(ended))
        else:
            begun = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - begun))
    return median(times[3:])


def time_newton_schulz(report: Report, s: train_gpt.Settings, device: str) -> None:
    """The orthogonalisation of a step on one rank of 8; of the symmetric kernel on a GPU only."""
    with torch.device("meta"):
        model = train_gpt.GPT(s, train_gpt.Kernels(), 8)
    rows = [["bank", "matrices", "plain, ms", *["symmetric, ms"] * (device == "cuda")]]
    for name in ("attn_bank", "gate_bank", "mlp_bank"):
        shape = getattr(model, name).chunk(8)[0].shape
        G, functions = torch.randn(shape, device=device), [train_gpt.XXT, train_gpt.symmetric_XXT]
        rows.append([name, " x ".join(map(str, shape)), *(
            milliseconds(lambda: train_gpt.newton_schulz(G, s.torch_dtype, XXT))
            for XXT in functions[:len(rows[0]) - 2])])
    report.table("Newton-Schulz on the matrices of one rank of 8", rows)


def time_weight_gradient(report: Report, s: train_gpt.Settings, device: str) -> None:
    """Of one microbatch: the two orders of the product, each giving a contiguous (V, D)."""
    tokens, one = s.batch_tokens // s.microbatches, torch.ones((), device=device)
    x8_t = torch.randn(s.model_dim, tokens, device=device).to(torch.float8_e4m3fn)
    grads_t = torch.randn(s.padded_vocab, tokens, device=device).to(torch.float8_e5m2)

    def product(a, b):
        return torch._scaled_mm(a, b.mT, one, one, out_dtype=torch.float32)

    report.table("Head's weight gradient in float8, one microbatch", [
        ["order", "ms"],
        ["grads.T @ x", milliseconds(lambda: product(grads_t, x8_t))],
        ["(x.T @ grads).T, made contiguous", milliseconds(lambda: product(x8_t, grads_t).T.contiguous())]])


def write_synthetic_shard(path: Path, num_tokens: int, vocab_size: int) -> None:
    """A shard of random documents of about 500 tokens; the last id opens each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size - 1, num_tokens).astype("<u2")
    tokens[np.flatnonzero(rng.random(num_tokens) < 1 / 500)] = vocab_size - 1
    tokens[0] = vocab_size - 1
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, num_tokens
    path.write_bytes(header.tobytes() + tokens.tobytes())


def report_phases(report: Report, runs: dict[str, dict]) -> None:
    """Phases of the first run by attention window, and of all runs."""
    windows, *_ = (run["phases"] for run in runs.values())
    phases = list(max(windows.values(), key=len))
    rows = [["phase", *windows]] + [[phase, *(w[phase] for w in windows.values())] for phase in phases]
    rows.append(["sum", *(sum(w.values()) for w in windows.values())])
    report.table(f"ms of a step by long attention window, {next(iter(runs))}", rows)
    rows = [["phase", *runs]]
    for phase in phases:
        rows.append([phase, *(fmean(w[phase] for w in run["phases"].values()) for run in runs.values())])
    rows.append(["sum", *(sum(row[i] for row in rows[1:]) for i in range(1, len(rows[0])))])
    rows.append(["step_avg of the log", *(run["step_avg"] for run in runs.values())])
    rows.append(["peak memory, MiB", *(run["peak"] for run in runs.values())])
    report.table("ms of a step, mean of the windows", rows)


def report_losses(report: Report, runs: dict[str, dict]) -> None:
    rows = [["run", "steps", "validation loss", "mean of the last 10 training losses", "step_avg, ms"]]
    for name, run in runs.items():
        losses = run["train_losses"]
        rows.append([name, len(losses), run["val_loss"], fmean(losses[-10:]), run["step_avg"]])
    report.table("Losses on the demo's text, nats a byte", rows)
    if len(runs) == 2:
        one, other = (run["val_loss"] for run in runs.values())
        report.write(f"The validation losses differ by {one - other:+.4f}, at most {FP8_TOLERANCE} expected.")
        if not abs(one - other) <= FP8_TOLERANCE:
            report.problems.append("FAILED: the losses with float8 and without differ by too much")


def prove(report: Report, processes: int, small: bool) -> None:
    sizes, device = SMALL if small else {}, "cpu" if small else "cuda"
    s = replace(train_gpt.Settings(), **{name.lower(): value for name, value in sizes.items()})
    report.write("# " + (f"{processes} processes on a CPU, tiny" if small else
                         f"{processes} x {torch.cuda.get_device_name()}"), "",
                 f"PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M')}")
    if not small:
        tests = [ROOT / "tests/gpu/test_gpu.py", ROOT / "tests/test_kernels.py"]
        if output := report.run("kernels", ["-m", "pytest", "-p", "no:xdist", "-o", "addopts=-q", *tests]):
            report.write(f"Tests of the kernels: {output.strip().splitlines()[-1]}")
    time_newton_schulz(report, s, device)
    if small or torch.cuda.get_device_capability() >= (8, 9):
        time_weight_gradient(report, s, device)
    if not small:
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        shard, text, vocab_size = Path(folder, "tokens.bin"), Path(folder, "text"), s.vocab_size
        write_synthetic_shard(shard, 100_000 if small else 30_000_000, vocab_size)
        report.run("demo's text", [ROOT / "data/demo_corpus.py", text])
        shapes = dict(NUM_ITERATIONS=6 if small else 20, TRAIN_FILES=shard, VAL_FILES=shard, WARMUP_STEPS=6,
                      BOS_ID=vocab_size - 1, VAL_TOKENS=1024 if small else 2_097_152)
        language = dict(NUM_ITERATIONS=3 if small else 60, TRAIN_FILES=text / "*train*", BOS_ID=256,
                        VAL_FILES=text / "*val*", VAL_TOKENS=1024 if small else 524_288, EPOCHS=4,
                        BATCH_TOKENS=131_072, VAL_SLICE_TOKENS=65_536, WARMUP_STEPS=3)
        runs = {"shapes/fast": report.train("shapes/fast", processes, **shapes | sizes)}
        losses = {name: report.train(name, 1 if small else processes, **language | sizes | dict(FP8_HEAD=fp8))
                  for name, fp8 in (("text/fp8-head-1", 1), ("text/fp8-head-0", 0))}
        for plain in (["XXT", "head", "attention"],) if small else (["XXT"], ["head"], ["attention"]):
            name = "shapes/plain-" + "-".join(plain)
            runs[name] = report.train(name, processes, plain, **shapes | sizes)
    for tell, found in ((report_phases, runs), (report_losses, losses)):
        if measured := {name: run for name, run in found.items() if run}:
            tell(report, measured)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("prove"), help="a new folder (default: prove)")
    parser.add_argument("--minutes", type=float, default=8, help="no run goes on longer (default: 8)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        parser.error("expected a CUDA GPU, found none; --small runs on a CPU")
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"expected an empty folder, found logs in {args.out}; name another with --out")
    processes = 2 if args.small else max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    report = Report(args.out, args.minutes)
    prove(report, processes, args.small)
    report.write(*(report.problems or ["passed"]))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
