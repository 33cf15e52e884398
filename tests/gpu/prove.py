# Assigned, since --help shows it and python -OO drops docstrings
__doc__ = """
Check this machine's GPUs in one command, and leave logs and tables of what was measured.

    python3 tests/gpu/prove.py [--out FOLDER] [--parts NAMES] [--minutes N]    # on GPUs, six minutes
    python3 tests/gpu/prove.py --small      # tiny, on a CPU: shows that this program runs, and no more

The parts, in the order of what they tell:
  collectives   NCCL with one process: both asynchronous collectives, all_reduce, barrier
  kernels       which kernels train_gpt.py chooses here; after a plain one, no other part is run
  shapes        20 steps of the speedrun's shapes at one attention window on synthetic shards, on all GPUs:
                time and phases of a step (phases.py), memory, the largest kernels, and steps without each
                fast kernel
  operations    single operations alone (operations.py)
  checks        the tests of the kernels, and 60 steps at full width with the head in float8 and in bfloat16,
                not compiled, all side by side
  demo          the demo, on the GPU
  memory        two steps with 8 and with 16 microbatches: estimated and measured peak of memory, the second
                with at most 24 GB for PyTorch
Settings in the environment apply to `shapes` and to the steps of `checks`: PRESET, WINDOW_SCHEDULE=11, other
TRAIN_FILES. FOLDER gets two files, which are brought up to date after each part: summary.md, and
prove.tar.gz with the runs' logs and everything that the parts print. A part that fails, or finds no time
left, is named at the end; the exit code is then 1. roofline.py puts an estimate beside the phases.
"""

import argparse
import gc
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from operations import time_operations
from phases import train_gpt

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("batch:", "attention:", "head:", "Newton-Schulz:", "blocks:", "kernels:", "ready", "target ",
         "profile:", "compiled since", "WARNING, while timed")  # the lines of a log that the summary repeats
SMALL = dict(MODEL_DIM=32, NUM_HEADS=2, MLP_DIM=64, BATCH_TOKENS=512, VAL_SLICE_TOKENS=512, WINDOW_BLOCK=16,
             MAX_SEQ_LEN=128, DTYPE="float32", TORCH_COMPILE=0, DEVICE="cpu", WARMUP_STEPS=3, VOCAB_SIZE=500,
             MICROBATCHES=2, NUM_ITERATIONS=6, VAL_TOKENS=1024)
FP8_TOLERANCE = 0.1  # nats a byte between the validation losses with float8 and without
NAMES = {f.name.upper() for f in fields(train_gpt.Settings)} | {"PRESET"}

class Report:
    """What was measured. `work` is a folder for the parts' files; all of it goes into the archive."""
    def __init__(self, out: Path, work: Path, minutes: float):
        self.out, self.work, self.deadline = out.resolve(), work, time.monotonic() + 60 * minutes
        self.sections = {}  # title -> lines
        self.problems = []
        self.out.mkdir(parents=True, exist_ok=True)

    def add(self, title: str, *lines: str) -> None:
        """Add lines to a section of the summary."""
        self.sections.setdefault(title, []).extend(lines)

    def text(self) -> str:
        sections = [f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in self.sections.items()]
        return "\n".join(sections)

    def save(self) -> None:
        (self.out / "summary.md").write_text(self.text(), encoding="utf-8")
        with tarfile.open(self.out / "prove.tar.gz", "w:gz") as archive:
            archive.add(self.work, "prove")

    def part(self, name: str, function, *args) -> bool:
        """Call function(report, name, ...), print and save what it adds; returns whether it succeeded. What
        it raises is a problem, and does not stop other parts."""
        begun, before = time.monotonic(), len(self.problems)
        try:
            function(self, name, *args)
        except Exception as error:
            self.problems.append(f"FAILED: {name}: {type(error).__name__}: {error}")
        seconds = f"{time.monotonic() - begun:.0f} s"
        self.add(name, f"- {seconds} in all")
        print(f"\n## {name}\n", *self.sections[name], *self.problems[before:], sep="\n", flush=True)
        self.save()
        return len(self.problems) == before

class Program(NamedTuple):
    """A program that runs beside this one, and the file with what it prints."""
    process: subprocess.Popen
    console: Path

def start(report: Report, name: str, command: list, **environ) -> Program:
    """Start Python with these words. What environ names as None is unset."""
    console = report.work / f"{name}.txt"
    environ = {key: str(x) for key, x in (os.environ | environ).items() if x is not None}
    with open(console, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environ, stdout=file,
                                   stderr=subprocess.STDOUT)
    return Program(process, console)

def finish(report: Report, program: Program) -> str:
    """What the program printed. Raises RuntimeError if it failed, and TimeoutError if no time is left; both
    have the end of what it printed."""
    process, console = program
    try:
        code = process.wait(timeout=max(report.deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        code = None
        process.terminate()  # torchrun then ends its ranks; if it were killed, they would go on
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
    output = console.read_text(encoding="utf-8", errors="replace")
    if code is None:
        raise TimeoutError(f"no time was left; the end of {console.name}:\n{output[-1000:]}")
    if code:
        raise RuntimeError(f"exit code {code}; the end of {console.name}:\n{output[-2000:]}")
    return output

def test_collectives(report: Report, name: str, device: torch.device) -> None:
    """Those of the optimizer and of the status, in a world of one process, where they copy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend, of_device = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1,
                            device_id=of_device)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1024, 768, device=device).to(dtype)
            scattered, gathered, total = (torch.full_like(x, torch.nan) for _ in range(3))
            handle = train_gpt.reduce_scatter_tensor(scattered, x, async_op=True)
            handle.wait()
            handle = train_gpt.all_gather_tensor(gathered, scattered, async_op=True)
            handle.wait()
            total.copy_(gathered)
            dist.all_reduce(total)
            dist.barrier()
            if not (torch.equal(scattered, x) and torch.equal(gathered, x) and torch.equal(total, x)):
                raise ValueError(f"a collective of {dtype} changed its numbers")
    finally:
        dist.destroy_process_group()
    report.add(name, f"- {backend}: reduce_scatter, all_gather, all_reduce, barrier of one process: right")

def show_kernels(report: Report, name: str, device: torch.device, s: train_gpt.Settings) -> None:
    begun = time.monotonic()
    _, lines = train_gpt.choose_kernels(device, s)
    report.add(name, *(f"- {line}" for line in lines), f"- chosen in {time.monotonic() - begun:.1f} s")
    report.problems += [f"FAILED: {name}: {line}" for line in lines if "WARNING: plain PyTorch" in line]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

def read_log(report: Report, name: str) -> str:
    """The log of the run whose LOG_DIR was `name`, without source, environment and settings; some of its
    lines go to the summary. It is kept as NAME-log.txt."""
    folder = report.work / name
    logs = list(folder.glob("*/log.txt"))
    if not logs:
        return ""
    text = logs[0].rename(report.work / f"{name}-log.txt").read_text(encoding="utf-8")
    logs[0].parent.rmdir()
    folder.rmdir()
    lines = text.split("=" * 100 + "\n")[-1]
    report.add(name.split("-")[0], *(f"- {line}" for line in lines.splitlines() if line.startswith(SHOWN)))
    for warning in re.findall(".*WARNING: plain PyTorch.*|WARNING, while timed.*", lines):
        report.problems.append(f"FAILED: {name}: {warning}")
    return lines

def figures_of(lines: str) -> dict[str, str]:
    """step_avg [ms], val_loss [nats], memory [MiB], as the log has them last."""
    return dict(re.findall(r"(step_avg|val_loss|peak memory allocated): ?([\d.]+)", lines))

def run_shapes(report: Report, name: str, processes: int, settings: dict) -> None:
    """A run of train_gpt.py by phases.py, and its figures."""
    command = [ROOT / "tests/gpu/phases.py", "--profile", report.work / "profile.txt", "--variants", 3]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]
    program = start(report, name, command, LOG_DIR=report.work / name, **settings)
    try:
        finish(report, program)
    finally:  # what a run that failed or was stopped has measured is worth reading, too
        add_shapes_figures(report, name, read_log(report, name))

def add_shapes_figures(report: Report, name: str, lines: str) -> None:
    """The tables of phases, variants and kernels, as far as a log of phases.py has them."""
    phases_of_windows, variants = {}, {}
    if line := re.search("^phases: (.*)$", lines, re.MULTILINE):
        phases_of_windows = json.loads(line[1])
    if line := re.search("^variants: (.*)$", lines, re.MULTILINE):
        variants = json.loads(line[1])
    report.add(name, "", "| of a step, by long attention window | ms |", "| --- | --- |")
    for window, phases in phases_of_windows.items():
        for phase, ms in (phases | dict(sum=sum(phases.values()))).items():
            report.add(name, f"| {window}: {phase} | {ms:.3f} |")
    for figure, value in figures_of(lines).items():
        report.add(name, f"| {figure} | {value} |")
    report.add(name, "", "| variant | ms of a step, by round | times the run's kernels, mean |",
               "| --- | --- | --- |")
    for variant, times in variants.items():
        ratio = np.mean([x / base for x, base in zip(times, variants["the run's kernels"])])
        report.add(name, f"| {variant} | {', '.join(f'{ms:.1f}' for ms in times)} | {ratio:.4f} |")
    profile = report.work / "profile.txt"
    if profile.exists():
        kernels = profile.read_text(encoding="utf-8").splitlines()[:40]
        report.add(name, "", "The 40 largest kernels of a step:", "", *(f"    {x[:110]}" for x in kernels))

def run_checks(report: Report, name: str, small: bool, settings: dict, seeds: int) -> None:
    """The tests of the kernels, all but the slow one, which compiles kernels for a GPU that is not there; and
    steps on text with the head in float8 and in bfloat16."""
    programs = {}
    for seed in range(seeds):
        for fp8 in (1, 0):
            run = f"{name}-fp8-{fp8}-seed-{seed}"
            programs[run] = start(report, run, [ROOT / "train_gpt.py"], LOG_DIR=report.work / run,
                                  **settings | dict(FP8_HEAD=fp8, SEED=seed))
    options = ["-p", "no:xdist", "-o", "addopts=-q", "-m", "not slow"]
    tests = ["tests/gpu/test_gpu.py", "tests/test_kernels.py"]
    if not small:
        tests = start(report, f"{name}-tests", ["-m", "pytest", *options, *tests])
    losses, errors = {}, []
    for run, program in programs.items():
        try:
            finish(report, program)
            losses[run] = float(figures_of(read_log(report, run))["val_loss"])
        except Exception as error:
            errors.append(f"{run}: {error}")
    for seed in range(seeds):
        pair = [losses.get(f"{name}-fp8-{fp8}-seed-{seed}", torch.nan) for fp8 in (1, 0)]
        difference = pair[0] - pair[1]
        report.add(name, f"- seed {seed}: validation loss {pair[0]:.4f} with FP8_HEAD=1, {pair[1]:.4f} with "
                   f"0: {difference:+.4f}; at most {FP8_TOLERANCE} is expected")
        if not abs(difference) <= FP8_TOLERANCE:
            errors.append(f"seed {seed}: a difference of {difference:+.4f}")
    if not small:
        try:
            report.add(name, f"- tests of the kernels: {finish(report, tests).strip().splitlines()[-1]}")
        except Exception as error:
            errors.append(f"tests: {error}")
    if errors:
        raise RuntimeError("\n".join(errors))

def run_demo(report: Report, name: str, small: bool, data: Path) -> None:
    settings = dict.fromkeys(NAMES)
    settings |= dict(PRESET="demo", DEVICE="cuda", DATA_PATH=data, LOG_DIR=report.work / name, NPROC=1)
    if small:
        settings |= dict(DEVICE="cpu", NUM_ITERATIONS=2, WARMUP_STEPS=0, TARGET_LOSS=9)
    program = start(report, name, [ROOT / "train_gpt.py"], **settings)
    try:
        finish(report, program)
    finally:
        lines = read_log(report, name)
    loss = float(figures_of(lines)["val_loss"])
    if not small and not loss < train_gpt.PRESETS["demo"]["target_loss"] + 0.1:
        raise ValueError(f"expected a validation loss near the demo's target, found {loss}")

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

MEMORY_TOLERANCE = 0.1  # of the estimate, relative

def test_memory(report: Report, name: str, settings: dict) -> None:
    """The estimate of train_gpt.py beside the peak. On a CPU, which has none, both are 0."""
    report.add(name, "", "| microbatches | estimated, MiB | peak allocated, MiB |", "| --- | --- | --- |")
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 24 * 2**30
    limit = f"per_process_memory_fraction:{min(1, 24 * 2**30 / total):.3f}"
    for microbatches, limited in ((8, {}), (16, dict(PYTORCH_CUDA_ALLOC_CONF=limit))):
        part = f"{name}-{microbatches}"
        environ = dict(LOG_DIR=report.work / part, MICROBATCHES=microbatches, NPROC=1) | limited
        finish(report, start(report, part, [ROOT / "train_gpt.py"], **settings | environ))
        lines = read_log(report, part)
        sizes = r"^peak memory allocated: (\d+) MiB.*?(?:estimated: (\d+) MiB)?$"
        found = re.search(sizes, lines, re.MULTILINE)
        peak, estimate = (int(size or 0) for size in found.groups())
        report.add(name, f"| {microbatches} | {estimate} | {peak} |")
        if abs(peak - estimate) > MEMORY_TOLERANCE * estimate:
            report.problems.append(f"FAILED: {name}: with {microbatches} microbatches the peak was {peak} "
                                   f"MiB, the estimate {estimate}")

def build_demo_data(data: Path) -> None:
    command = [sys.executable, ROOT / "data" / "demo_corpus.py", data / train_gpt.DEMO_DATA]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

def prove(report: Report, parts: list[str], processes: int, small: bool, seeds: int, data: Path) -> None:
    """The named parts. data: a folder for the shards."""
    device = torch.device("cpu") if small else torch.device("cuda", 0)
    sizes, demo = SMALL if small else {}, train_gpt.PRESETS["demo"]
    # BOS_ID: a run's own is set below, and must only fit the small vocabulary here
    environ = {"PRESET": "speedrun", "BOS_ID": "0"} | {name: str(value) for name, value in sizes.items()}
    s, *_ = train_gpt.read_settings(environ)
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    every = dict(PRESET="speedrun", TARGET_LOSS=0, VAL_LOSS_EVERY=0)
    shard = data / "synthetic.bin"
    shapes = every | dict(TRAIN_FILES=shard, VAL_FILES=shard, BOS_ID=s.vocab_size - 1, NUM_ITERATIONS=20,
                          WINDOW_SCHEDULE="7", WARMUP_STEPS=6, VAL_TOKENS=2_097_152) | sizes | given
    text = every | dict(TRAIN_FILES=demo["train_files"], VAL_FILES=demo["val_files"], DATA_PATH=data,
                        BOS_ID=256, BATCH_TOKENS=49_152, MICROBATCHES=6, NUM_ITERATIONS=60,
                        WINDOW_SCHEDULE="7", WARMUP_STEPS=2, TORCH_COMPILE=0, VAL_TOKENS=245_760,
                        VAL_SLICE_TOKENS=16_384, NPROC=1)
    if small:
        text |= sizes
    if "collectives" in parts:
        report.part("collectives", test_collectives, device)
    if "kernels" in parts and not report.part("kernels", show_kernels, device, s):
        return
    if "shapes" in parts or "memory" in parts:
        write_synthetic_shard(shard, 12_000_000, s.vocab_size)
    if "shapes" in parts:
        report.part("shapes", run_shapes, processes, shapes)
    if "operations" in parts:
        report.part("operations", lambda *_: report.add("operations", *time_operations(s, device)))
    if "checks" in parts:
        build_demo_data(data)
        report.part("checks", run_checks, small, text | given, seeds)
    if "demo" in parts:
        report.part("demo", run_demo, small, data)
    if "memory" in parts:
        few = dict(NUM_ITERATIONS=2, WARMUP_STEPS=1, TORCH_COMPILE=0)
        report.part("memory", test_memory, shapes | few)

PARTS = "collectives,kernels,shapes,operations,checks,demo,memory"

def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("prove"), help="a new folder (default: prove)")
    parser.add_argument("--parts", default=PARTS, help="names, separated by commas (default: all)")
    parser.add_argument("--minutes", type=float, default=6, help="after which parts are ended (default: 6)")
    parser.add_argument("--seeds", type=int, default=1, help="of the steps on text (default: 1)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := sorted({*parts} - {*PARTS.split(",")}):
        parser.error(f"--parts: expected names out of {PARTS}, found {', '.join(unknown)}")
    if not (args.small or torch.cuda.is_available()):
        parser.error("expected a CUDA GPU, found none; --small runs on a CPU")
    if args.out.is_dir() and any(args.out.iterdir()):
        parser.error(f"expected an empty folder, found files in {args.out}; name another with --out")
    processes = 2 if args.small else max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    machine = "processes on a CPU, tiny" if args.small else f"x {torch.cuda.get_device_name()}"
    with tempfile.TemporaryDirectory() as folder:
        work, data = Path(folder, "work"), Path(folder, "data")
        work.mkdir()
        data.mkdir()
        report = Report(args.out, work, args.minutes)
        date = time.strftime("%Y-%m-%d")
        report.add("machine", f"{processes} {machine}, PyTorch {torch.__version__}, {date}")
        prove(report, parts, processes, args.small, args.seeds, data)
        report.add("result", *(report.problems or ["passed"]))
        report.save()
    print("\n" + "=" * 40 + "\n" + report.text())
    return 1 if report.problems else 0

if __name__ == "__main__":
    sys.exit(main())
