"""
Check this machine's GPUs in one command, and leave logs and tables of what was measured.

    python tests/gpu/prove.py [--out FOLDER]     # on GPUs, at most 8 minutes
    python tests/gpu/prove.py --small            # tiny, on a CPU: shows that this program runs, and no more

The parts, the most important first:
  1. shapes/fast: 20 steps of the speedrun's shapes on synthetic shards, by train_gpt.py under torchrun, on
     all GPUs, with the times of a step's phases (phases.py);
  2. the tests of the kernels;
  3. text/fp8-head-1 and -0: 60 steps at full width on the demo's text, with the head in float8 or bfloat16;
  4. shapes/plain: as 1, at one attention window, with plain kernels, one in a phase at most;
  5. operations on their own: Newton-Schulz on what one rank of 8 has, and the head's weight gradient.
FOLDER gets summary.md; the runs' logs, for records/report.py, in folders of these names; and console/ with
what the parts print. A part that fails or finds no time left is named at the end, and stops no other;
the exit code is then 1. roofline.py puts an estimate beside the phases.
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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from phases import milliseconds, take_time, train_gpt

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("batch:", "attention:", "head:", "Newton-Schulz:", "blocks:", "kernels:", "ready")  # lines of a log
SMALL = dict(MODEL_DIM=32, NUM_HEADS=2, MLP_DIM=64, BATCH_TOKENS=512, VAL_SLICE_TOKENS=512, WINDOW_BLOCK=16,
             MAX_SEQ_LEN=128, DTYPE="float32", TORCH_COMPILE=0, DEVICE="cpu", WARMUP_STEPS=3, VOCAB_SIZE=500,
             MICROBATCHES=2, NUM_ITERATIONS=6, VAL_TOKENS=1024)
TABLE = "ms of a step, by run and long attention window; peak memory in MiB"
FP8_TOLERANCE = 0.1  # nats a byte between the validation losses with float8 and without

class Report:
    """What was measured; summary.md has it at once."""
    def __init__(self, out: Path, minutes: float):
        self.out, self.deadline = out.resolve(), time.monotonic() + 60 * minutes
        self.sections = {}  # title -> lines
        self.columns = {}  # run and attention window -> phase, or another figure -> value
        self.problems = []
        self.out.mkdir(parents=True, exist_ok=True)

    def add(self, title: str, *lines: str) -> None:
        """Put a section into summary.md, or replace it."""
        self.sections[title] = "\n".join(lines)
        texts = [f"## {title}\n\n{text}\n" for title, text in self.sections.items()]
        (self.out / "summary.md").write_text("\n".join(texts), encoding="utf-8")

    def part(self, name: str, function, *args, **kwargs) -> None:
        """Call function(report, name, ...). What it raises is a problem, and does not stop other parts."""
        begun = time.monotonic()
        try:
            function(self, name, *args, **kwargs)
        except Exception as error:
            self.problems.append(f"FAILED: {name}: {type(error).__name__}: {error}")
            print(self.problems[-1], flush=True)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)

def run(report: Report, name: str, command: list, **environ) -> str:
    """What a command prints. Raises RuntimeError if it fails, and TimeoutError if no time is left."""
    console = report.out / "console" / f"{name}.txt"
    console.parent.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {key: str(value) for key, value in environ.items()}
    with open(console, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environ, stdout=file,
                                   stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=max(report.deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks; if it were killed, they would go on
            process.wait(timeout=60)
            raise TimeoutError("no time was left") from None
    output = console.read_text(encoding="utf-8", errors="replace")
    if code:
        raise RuntimeError(f"exit code {code}; the end of {console}:\n{output[-2000:]}")
    return output

def train(report: Report, name: str, processes: int, *options: str, **settings) -> None:
    """A run of train_gpt.py: its log goes to the folder `name`, its figures into the table of all runs."""
    folder = report.out / name
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               ROOT / "tests/gpu/phases.py", *options]
    run(report, name, command, PRESET="speedrun", TARGET_LOSS=0, VAL_LOSS_EVERY=0, LOG_DIR=folder, **settings)
    log, = folder.glob("*/log.txt")
    text = log.rename(folder / "log.txt").read_text(encoding="utf-8")
    log.parent.rmdir()
    lines = text.split("=" * 100 + "\n")[-1]  # without source, environment and settings
    report.add(name, *(f"- {line}" for line in lines.splitlines() if line.startswith(SHOWN)))
    for warning in re.findall(".*WARNING: plain PyTorch.*|WARNING, while timed.*", lines):
        report.problems.append(f"FAILED: {name}: {warning}")
    # each stands in many lines; the dict keeps the last
    figures = dict(re.findall(r"(step_avg|val_loss|peak memory allocated): ?([\d.]+)", lines))
    for window, phases in json.loads(re.search("^phases: (.*)$", lines, re.MULTILINE)[1]).items():
        phases["sum"] = sum(phases.values())
        report.columns[f"{name}, {window}"] = {key: f"{ms:.3f}" for key, ms in phases.items()} | figures
    table = [["phase", *report.columns], ["---"] * (1 + len(report.columns))]
    for key in [*phases, *figures]:
        table.append([key, *(column.get(key, "-") for column in report.columns.values())])
    report.add(TABLE, *("| " + " | ".join(row) + " |" for row in table))

def compare_losses(report: Report, name: str) -> None:
    """Of the two runs on text."""
    text = [column for run, column in report.columns.items() if run.startswith("text/")]
    if len(text) < 2:
        raise ValueError("a run is missing")
    float8, bfloat16 = (float(column["val_loss"]) for column in text)
    difference = float8 - bfloat16
    report.add(name, f"{difference:+.4f} nats a byte; at most {FP8_TOLERANCE} is expected")
    if abs(difference) > FP8_TOLERANCE:
        raise ValueError(report.sections[name])

def test_kernels(report: Report, name: str) -> None:
    """All but the slow one, which compiles kernels for a GPU that is not there."""
    options = ["-p", "no:xdist", "-o", "addopts=-q", "-m", "not slow"]
    output = run(report, name, ["-m", "pytest", *options, "tests/gpu/test_gpu.py", "tests/test_kernels.py"])
    report.add(name, output.strip().splitlines()[-1])

def time_call(function, *args) -> float:
    """ms of a call, the mean of 10, launched while the GPU sleeps: in a step, too, launches are hidden."""
    for _ in range(3):
        function(*args)
    if torch.cuda.is_initialized():
        torch.cuda._sleep(50_000_000)  # cycles, about 30 ms
    begun = take_time()
    for _ in range(10):
        function(*args)
    ended = take_time()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return milliseconds(begun, ended) / 10

def time_operations(report: Report, name: str, s: train_gpt.Settings, device: str) -> None:
    """Newton-Schulz on the matrices of one rank of 8; the head's weight gradient in two orders."""
    lines = []

    def measure(operation, function, *args):
        lines.append(f"- {operation}: {time_call(function, *args):.3f} ms")
        report.add(name, *lines)

    with torch.device("meta"):
        model = train_gpt.GPT(s, train_gpt.Kernels(), 8)
    for bank in ("attn_bank", "mlp_bank"):
        G = torch.randn(getattr(model, bank).chunk(8)[0].shape, device=device)
        case = train_gpt.newton_schulz, G, s.torch_dtype
        measure(f"Newton-Schulz, {bank}, plain products", *case)
        if device == "cuda":
            measure(f"Newton-Schulz, {bank}, symmetric products", *case, train_gpt.symmetric_XXT)
    tokens, one = s.batch_tokens // s.microbatches, torch.ones((), device=device)
    x8_t = torch.randn(s.model_dim, tokens, device=device).to(torch.float8_e4m3fn)
    grads_t = torch.randn(s.padded_vocab, tokens, device=device).to(torch.float8_e5m2)
    product = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.float32)
    measure("head's weight gradient, (x.T @ grads).T", lambda: product(x8_t, grads_t.mT).T.contiguous())
    measure("head's weight gradient, grads.T @ x", product, grads_t, x8_t.mT)

def write_synthetic_shard(path: Path, num_tokens: int, vocab_size: int) -> None:
    """A shard of random documents of about 500 tokens; the last id opens each. As in text, some ids are far
    more common than others (id n as 1 / n), since the embedding's gradient takes longer then."""
    rng = np.random.default_rng(0)
    tokens = ((vocab_size - 1) ** rng.random(num_tokens) - 1).astype("<u2")
    tokens[rng.random(num_tokens) < 1 / 500] = vocab_size - 1
    tokens[0] = vocab_size - 1
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, num_tokens
    path.write_bytes(header.tobytes() + tokens.tobytes())

def prove(report: Report, processes: int, small: bool, data: Path) -> None:
    """All parts. data: a folder for the shards."""
    sizes, shard, demo = SMALL if small else {}, data / "synthetic.bin", train_gpt.PRESETS["demo"]
    s = replace(train_gpt.Settings(), **{name.lower(): value for name, value in sizes.items()})
    write_synthetic_shard(shard, 12_000_000, s.vocab_size)
    shapes = dict(TRAIN_FILES=shard, VAL_FILES=shard, BOS_ID=s.vocab_size - 1, NUM_ITERATIONS=20,
                  WARMUP_STEPS=6, VAL_TOKENS=2_097_152) | sizes
    # a microbatch and a window of `shapes`, so that its compiled graph can be used again
    text = dict(TRAIN_FILES=demo["train_files"], VAL_FILES=demo["val_files"], DATA_PATH=data, BOS_ID=256,
                BATCH_TOKENS=49_152, MICROBATCHES=1, NUM_ITERATIONS=60, WINDOW_SCHEDULE="7", WARMUP_STEPS=2,
                VAL_TOKENS=262_144) | sizes
    plain = shapes | dict(NUM_ITERATIONS=10, WINDOW_SCHEDULE="7", WARMUP_STEPS=2, FP8_HEAD=0)
    report.part("shapes/fast", train, processes, **shapes)
    if not small:
        report.part("tests of the kernels", test_kernels)
    for fp8 in (1, 0):
        report.part(f"text/fp8-head-{fp8}", train, 1, **text | dict(FP8_HEAD=fp8))
    report.part("difference of the losses on text", compare_losses)
    report.part("shapes/plain", train, processes, "--plain", **plain)
    report.part("operations", time_operations, s, "cpu" if small else "cuda")

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("prove"), help="a new folder (default: prove)")
    parser.add_argument("--minutes", type=float, default=7, help="after which runs are ended (default: 7)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        parser.error("expected a CUDA GPU, found none; --small runs on a CPU")
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"expected an empty folder, found files in {args.out}; name another with --out")
    processes = 2 if args.small else max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    machine = "processes on a CPU, tiny" if args.small else f"x {torch.cuda.get_device_name()}"
    report = Report(args.out, args.minutes)
    report.add("machine", f"{processes} {machine}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as folder:
        prove(report, processes, args.small, Path(folder))
    report.add("result", *(report.problems or ["passed"]))
    print((report.out / "summary.md").read_text(encoding="utf-8"))
    return 1 if report.problems else 0

if __name__ == "__main__":
    sys.exit(main())
