"""
Check this machine's GPUs in one command, and leave logs that show what was run.

    python tests/gpu/prove.py [--out FOLDER]     # on GPUs, about 8 minutes
    python tests/gpu/prove.py --small            # tiny, on a CPU: shows that this program runs, and no more

It (1) runs the tests of the kernels on a GPU; (2) trains 20 steps of the speedrun's shapes on synthetic
shards, through train_gpt.py under torchrun, with float8 and without; (3) trains 60 steps at full width on the
demo's text, with float8 and without. Each run's lines on kernels, graphs, time, memory and loss are printed,
and its log is in FOLDER. The exit code is 1 if anything failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("batch:", "attention:", "head:", "Newton-Schulz:", "kernels:", "ready", "compiled", "WARNING",
         "target_reached", "peak")
SMALL = dict(MODEL_DIM=32, NUM_HEADS=2, MLP_DIM=64, BATCH_TOKENS=1024, VAL_SLICE_TOKENS=512, WINDOW_BLOCK=16,
             MAX_SEQ_LEN=128, DTYPE="float32", TORCH_COMPILE=0, DEVICE="cpu", WARMUP_STEPS=3, VOCAB_SIZE=500)


def write_synthetic_shard(path: Path, num_tokens: int, vocab_size: int) -> None:
    """A shard of random documents of about 500 tokens; the last id opens each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size - 1, num_tokens).astype("<u2")
    tokens[np.flatnonzero(rng.random(num_tokens) < 1 / 500)] = vocab_size - 1
    tokens[0] = vocab_size - 1
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, num_tokens
    path.write_bytes(header.tobytes() + tokens.tobytes())


def train(name: str, out: Path, processes: int, **settings) -> bool:
    """One run of train_gpt.py under torchrun; prints lines of its log. Returns whether it succeeded."""
    settings |= dict(PRESET="speedrun", TARGET_LOSS=0, VAL_LOSS_EVERY=0, LOG_DIR=out / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / "train_gpt.py")]
    environ = os.environ | {key: str(value) for key, value in settings.items()}
    print(f"\n{name}: " + " ".join(f"{key}={value}" for key, value in settings.items()), flush=True)
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    print(*(line for line in done.stdout.splitlines() if line.startswith(SHOWN)), sep="\n", flush=True)
    if done.returncode:
        print(f"FAILED: {name}", done.stderr[-3000:], sep="\n", flush=True)
    return done.returncode == 0


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("prove"), help="folder for logs (default: prove)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    args = parser.parse_args()
    if not (args.small or torch.cuda.is_available()):
        parser.error("expected a CUDA GPU, found none; --small runs on a CPU")
    processes = 1 if args.small else max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    steps, text_steps = (3, 3) if args.small else (20, 60)
    sizes = SMALL if args.small else {}
    vocab_size = sizes.get("VOCAB_SIZE", 50_257)
    passed = True
    if not args.small:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", str(ROOT / "tests/gpu/test_gpu.py")]
        passed &= subprocess.run(command, cwd=ROOT).returncode == 0
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "tokens.bin"
        write_synthetic_shard(shard, 100_000 if args.small else 30_000_000, vocab_size)
        text = Path(folder) / "text"
        subprocess.run([sys.executable, str(ROOT / "data/demo_corpus.py"), str(text)], check=True)
        for fp8 in (1,) if args.small else (1, 0):
            passed &= train(f"shapes-fp8-{fp8}", args.out, processes, NUM_ITERATIONS=steps, FP8_HEAD=fp8,
                            TRAIN_FILES=shard, VAL_FILES=shard, **sizes | dict(
                                BOS_ID=vocab_size - 1, VAL_TOKENS=1024 if args.small else 2_097_152))
            passed &= train(f"text-fp8-{fp8}", args.out, processes, NUM_ITERATIONS=text_steps, FP8_HEAD=fp8,
                            TRAIN_FILES=text / "*train*", VAL_FILES=text / "*val*", **dict(
                                BATCH_TOKENS=131_072, VAL_SLICE_TOKENS=65_536) | sizes | dict(
                                BOS_ID=256, VAL_TOKENS=1024 if args.small else 524_288, EPOCHS=4))
    print("\npassed" if passed else "\nFAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
