"""
train_gpt.py: train a GPT-2-sized model on FineWeb to a validation loss of 3.28, in the least wall-clock time.

One file, read from top to bottom: settings, kernels, attention, model, optimizers, data, schedules, run.
A newcomer without a GPU gets the same race in small: the demo preset trains the same twelve blocks on
the source texts of Python's standard library. Launch it with

    ./run.sh                                            # this machine: picks preset, device, process count
    NUM_ITERATIONS=200 VAL_LOSS_EVERY=50 ./run.sh       # any setting, from the environment
    python train_gpt.py --help                          # every setting: default, unit, meaning
    python train_gpt.py --dry-run                       # what would run, and whether its data suffices
    torchrun --standalone --nproc_per_node=8 train_gpt.py                 # the race: 8 H100, one node

Facts of the race: 1705 steps of 393,216 tokens; the mean cross-entropy over the first 10,485,760 tokens
of the validation shard must come to 3.28 or less; compilation and validation are not timed. Measured so
far is the demo: 60.9 s of training, +- 3.7 s over ten runs, to a mean loss of 1.669, on 2 cores of an AMD
EPYC with PyTorch 2.13 (records/2026-11-24_Baseline). No GPU has run this yet.

Letters for tensor layouts, the same everywhere: T tokens of a packed sequence, D model width,
H heads, K channels of a head, V vocabulary (padded), W window, N bands of B tokens (plain attention),
S places for piece starts. A microbatch is one packed sequence of pieces: documents, or their beginnings.
"""

import argparse
import codecs
import contextlib
import difflib
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # whose default arguments would keep a group alive that was there before it
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without it; its kernels are then defined, but cannot run
    triton, tl = None, SimpleNamespace(constexpr=int)

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------
# Settings: every knob, its unit and its meaning; read from the environment and checked in one place


class UserError(Exception):
    """Something that the person who launched the run can put right: one sentence a problem, no traceback.

    `exit_code` is 2 for settings and 1 for everything else (data, device, files). `everywhere`: all ranks
    find the same, and so one of them says it.
    """

    def __init__(self, *problems: str, exit_code: int = 1, everywhere: bool = False):
        super().__init__("\n".join(problems))
        self.exit_code, self.everywhere = exit_code, everywhere or exit_code == 2


def setting(default, unit: str, meaning: str, low=None, high=None, choices=None):
    """A dataclass field that knows its unit, meaning and inclusive range (low, high) or its choices."""
    about = dict(unit=unit, meaning=meaning, low=low, high=high, choices=choices)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """All settings of a run; the defaults are the speedrun's. NAME in the environment overrides `name`."""

    # where it runs
    device: str = setting("auto", "", "auto: CUDA where there is a GPU", choices=("auto", "cuda", "cpu"))
    nproc: int = setting(0, "processes", "for run.sh to start; 0: all that GPUs and batch allow, or 1 CPU", 0)
    dtype: str = setting("bfloat16", "", "of activations, embedding tables, head and Newton-Schulz",
                         choices=("bfloat16", "float32"))
    fp8_head: bool = setting(True, "0/1", "train the head in float8 where the GPU can and DTYPE is bfloat16")
    torch_compile: bool = setting(True, "0/1", "compile the model with torch.compile (needs a C++ compiler)")
    seed: int = setting(0, "", "seed of the initial weights", 0, 2**63 - 1)
    data_path: str = setting("", "folder", "where the two patterns below start; empty: beside train_gpt.py")
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "glob", "training shards, by name")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "glob", "validation shards, by name")
    log_dir: str = setting("logs", "folder", "where each run writes its log; relative to the current folder")

    # what survives a kill
    checkpoint_every: int = setting(0, "steps", "distance between checkpoints, beside the log; 0: none", 0)
    checkpoint_last: bool = setting(False, "0/1", "write one at the end of the run")
    checkpoint_keep: int = setting(2, "checkpoints", "the newest of a run that stay", 1)
    resume: str = setting("", "auto or path", "go on from this checkpoint, from the newest in this folder of "
                          "them, or (auto) from the newest in LOG_DIR, if there is one; empty: start anew")
    resume_changed: bool = setting(False, "0/1", "even if settings, data or source were others")

    # the race
    num_iterations: int = setting(1705, "steps", "length of the run and of its schedules", 1)
    target_loss: float = setting(3.28, "nats/token", "validation loss at or below which the run stops", 0.0)
    val_loss_every: int = setting(125, "steps", "distance between validations; 0: only at the end", 0)
    val_tokens: int = setting(10_485_760, "tokens", "to validate, from the start of the validation shards", 1)
    val_slice_tokens: int = setting(262_144, "tokens", "of one forward pass in validation", 1)
    warmup_steps: int = setting(30, "steps", "untimed, and then undone; 0: none, and compilation is timed", 0)

    # a training step's batch
    batch_tokens: int = setting(393_216, "tokens", "of a step, over all ranks", 1)
    microbatches: int = setting(8, "", "packed sequences of a step, over all ranks", 1)
    microbatch_parts: int = setting(1, "", "forward passes that share a microbatch, cut between its pieces; "
                                    "more need less GPU memory, for the same result", 1)
    max_piece_tokens: int = setting(2048, "tokens", "most of one document in a microbatch, from its BOS", 1)
    epochs: int = setting(1, "passes", "most passes over the training shards", 1)

    # the model
    vocab_size: int = setting(50_257, "ids", "ids that may occur in the data", 2, 65_536)
    vocab_multiple: int = setting(128, "ids", "VOCAB_SIZE is rounded up to a multiple of this", 1, 65_536)
    bos_id: int = setting(50_256, "id", "token that opens every document", 0)
    num_layers: int = setting(12, "blocks", "the first half feeds skip connections to the second", 1, 1024)
    model_dim: int = setting(768, "channels", "width of the residual stream", 4, 65_536)
    num_heads: int = setting(6, "heads", "attention heads, which share the width equally", 1)
    mlp_dim: int = setting(3072, "channels", "width of an MLP's hidden layer", 1, 262_144)
    attn_scale: float = setting(0.12, "", "factor of q.k before the softmax", 1e-6, 1e6)
    gate_channels: int = setting(12, "channels", "of a block's input that gate its attention; 0: no gate", 0)
    skip_attn: str = setting("7", "blocks", "blocks without attention, such as 3,7; empty: none")
    skip_mlp: str = setting("0", "blocks", "blocks without an MLP, such as 0,11; empty: none")
    value_embeds: str = setting("012......012", "char/block", "number of its value embedding, or . for none")
    window_pattern: str = setting("LSSSLSSLSSSL", "char/block", "its attention window: L long, S short")
    window_schedule: str = setting("3,7,11", "x window_block", "long windows, each for an equal share of the "
                                   "run; a short one is half as long, rounded down")
    window_block: int = setting(128, "tokens", "unit of window_schedule", 1)

    # the optimizers
    muon_lr: float = setting(0.05, "", "Muon's learning rate, for the blocks' matrices", 0.0, 1e3)
    muon_momentum_start: float = setting(0.85, "", "Muon's momentum at step 0", 0.0, 0.9999)
    muon_momentum_end: float = setting(0.95, "", "Muon's momentum after muon_momentum_steps", 0.0, 0.9999)
    muon_momentum_steps: int = setting(300, "steps", "in which it goes from the first to the second", 0)
    adam_lr: float = setting(0.008, "", "Adam's learning rate, for all else, before the factors", 0.0, 1e3)
    adam_beta1: float = setting(0.8, "", "decay of the mean gradient", 0.0, 0.9999)
    adam_beta2: float = setting(0.95, "", "decay of the mean squared gradient", 0.0, 0.9999)
    adam_eps: float = setting(1e-10, "", "added to the root of the uncorrected second moment", 1e-30)
    embed_lr_mult: float = setting(75.0, "x adam_lr", "for the embedding and the value embeddings", 0.0, 1e6)
    head_lr_mult: float = setting(1.0, "x adam_lr", "for the head", 0.0, 1e6)
    scalar_lr_mult: float = setting(5.0, "x adam_lr", "for the blocks' scalars", 0.0, 1e6)
    cooldown_frac: float = setting(0.45, "of the run", "last part, in which learning rates fall", 0.0, 1.0)
    final_lr_frac: float = setting(0.1, "of the rate", "what the learning rates fall to", 0.0, 1.0)

    @property
    def padded_vocab(self) -> int:
        """V: rows of the tables and of the head."""
        return round_up(self.vocab_size, self.vocab_multiple)

    @property
    def head_dim(self) -> int:
        """K: channels of a head."""
        return self.model_dim // self.num_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def blocks(self) -> "list[Block]":
        """The network's layout, a row a block."""
        no_attn, no_mlp = parse_numbers(self.skip_attn), parse_numbers(self.skip_mlp)
        rows, num_attn, num_mlp = [], 0, 0
        for i in range(self.num_layers):
            table = self.value_embeds[i]
            rows.append(Block(attn=None if i in no_attn else num_attn, mlp=None if i in no_mlp else num_mlp,
                              table=None if table == "." else int(table), long=self.window_pattern[i] == "L"))
            num_attn, num_mlp = num_attn + (i not in no_attn), num_mlp + (i not in no_mlp)
        return rows


class Block(NamedTuple):
    """What one block has; None where it lacks the part."""

    attn: int | None  # its place among the blocks that have attention, and so in their banks
    mlp: int | None  # its place among the blocks that have an MLP
    table: int | None  # its value embedding
    long: bool  # its window


# The demo: the same blocks, narrow, on the standard library of the Python that runs this. The folder bears
# its version, since other versions have other texts. Bytes are the ids 0-255, and 256 is BOS.
DEMO_DATA = f"data/stdlib-{platform.python_version()}"
PRESETS = {
    "speedrun": {},
    "demo": dict(
        dtype="float32", torch_compile=False,
        train_files=f"{DEMO_DATA}/stdlib_train_*.bin", val_files=f"{DEMO_DATA}/stdlib_val_*.bin",
        num_iterations=108, target_loss=1.70, val_loss_every=10, val_tokens=49_152, val_slice_tokens=8192,
        warmup_steps=3, batch_tokens=5120, epochs=4,
        vocab_size=257, vocab_multiple=8, bos_id=256, model_dim=128, num_heads=2, mlp_dim=256,
        window_block=16, muon_lr=0.1, muon_momentum_start=0.7, muon_momentum_end=0.85, muon_momentum_steps=50,
        adam_lr=0.016, embed_lr_mult=15.0, scalar_lr_mult=2.0,
    ),
}


def ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    return ceil_div(n, multiple) * multiple


def counted(n: int, thing: str) -> str:
    """'1 shard', '2,000 shards'."""
    return f"{n:,} {thing}{'' if n == 1 else 'es' if thing.endswith(('s', 'ch')) else 's'}"


def parse_numbers(text: str) -> list[int]:
    """'0,11' -> [0, 11]; '' -> []. Raises ValueError for anything but whole numbers and commas."""
    return [int(part) for part in text.split(",")] if text.strip() else []


def parse_value(spec, text: str):
    """One environment value as its field's type. Raises ValueError, whose message says what was expected."""
    kind, low, high, choices = spec.type, *(spec.metadata[key] for key in ("low", "high", "choices"))
    if kind is bool:
        choices = ("1", "0", "true", "false", "yes", "no", "on", "off")
    if choices and text.lower() not in choices:
        raise ValueError("one of " + ", ".join(choices))
    if kind is bool:
        return choices.index(text.lower()) % 2 == 0
    if kind is str:
        return text.lower() if choices else text
    high = 2**31 - 1 if kind is int and high is None else high  # lengths and positions are int32
    bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    expected = ("a whole number of " if kind is int else "a number of ") + " and ".join(bounds)
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(expected) from None
    if not (math.isfinite(value) and low <= value <= (math.inf if high is None else high)):
        raise ValueError(expected)
    return value


def near_miss(name: str, known: set[str]) -> str | None:
    """The setting that an environment name was probably meant to be.

    Too many words look like names under 6 letters (SEED), so these are found only in another case, or where
    a last S is missing. A beginning of several words (NUM_ITER) is found too.
    """
    if name in known or name.upper() in known:
        return None if name in known else name.upper()
    begun = sorted(k for k in known if "_" in name[:-1] and k.startswith(name.upper()))
    likely = [k for k in known if len(k) >= 6 or name.upper() == k + "S"]
    return next(iter([*difflib.get_close_matches(name.upper(), likely, n=1, cutoff=0.87), *begun]), None)


def resolve_settings(environ, preset: str) -> tuple[Settings, dict[str, str]]:
    """Settings of `preset` ('speedrun' or 'demo') with the overrides found in `environ`, and those overrides.

    Raises UserError (exit code 2) with every problem found: unknown preset, near-misses of names, values
    of the wrong type or out of range, and settings that contradict each other.
    """
    specs = {f.name.upper(): f for f in fields(Settings)}
    problems, wrong = [], set()
    if preset not in PRESETS:
        problems.append(f"PRESET: expected one of {', '.join(PRESETS)}, found {preset!r}.")
    values, overrides = dict(PRESETS.get(preset, {})), {}
    for name in sorted(environ):
        meant = near_miss(name, set(specs) | {"PRESET"})
        if meant:
            problems.append(f"{name}: unknown setting; did you mean {meant}? Otherwise unset {name}.")
        if name not in specs:
            continue
        try:
            values[specs[name].name] = parse_value(specs[name], environ[name])
            overrides[specs[name].name] = environ[name]
        except ValueError as expected:
            problems.append(f"{name}: expected {expected}, found {environ[name]!r}.")
            wrong.add(name)
    settings = Settings(**values)
    if preset in PRESETS:  # what stands in for a wrong value contradicts nobody
        problems += [c for c in contradictions(settings) if not wrong & set(re.findall(r"\w+", c))]
    if problems:
        raise UserError(*problems, exit_code=2)
    return settings, overrides


def contradictions(s: Settings) -> list[str]:
    """Every way in which the settings do not fit together, a sentence each."""
    found = []

    def require(holds: bool, name: str, expected: str):
        if not holds:
            found.append(f"{name.upper()}: expected {expected}, found {getattr(s, name)!r}.")

    require(s.nproc == 0 or feeds(s, s.nproc), "nproc", worlds_that_fit(s))
    for name in ("train_files", "val_files"):
        require(getattr(s, name).strip(), name, "a pattern of file names")
    require(s.bos_id < s.vocab_size, "bos_id", f"an id below VOCAB_SIZE={s.vocab_size}")
    require(s.batch_tokens % s.microbatches == 0, "batch_tokens",
            f"a multiple of MICROBATCHES={s.microbatches}")
    require(s.val_tokens % s.val_slice_tokens == 0, "val_tokens",
            f"a multiple of VAL_SLICE_TOKENS={s.val_slice_tokens}")
    require(s.model_dim % (4 * s.num_heads) == 0, "model_dim",
            f"a multiple of 4 x NUM_HEADS = {4 * s.num_heads} (half of a head's channels rotate, in pairs)")
    require(s.gate_channels <= s.model_dim, "gate_channels", f"at most MODEL_DIM={s.model_dim}")
    lists = {}
    for name in ("skip_attn", "skip_mlp", "window_schedule"):
        try:
            lists[name] = parse_numbers(getattr(s, name))
        except ValueError:
            lists[name] = [-1]
    for name in ("skip_attn", "skip_mlp"):
        distinct = len(set(lists[name])) == len(lists[name])
        require(distinct and all(0 <= i < s.num_layers for i in lists[name]), name,
                f"different block numbers below NUM_LAYERS={s.num_layers}, separated by commas, or nothing")
    require(min(lists["window_schedule"], default=0) >= 2, "window_schedule",
            "whole numbers of at least 2, separated by commas")
    for name, alphabet in (("value_embeds", "0123456789."), ("window_pattern", "LS")):
        text = getattr(s, name)
        require(len(text) == s.num_layers and set(text) <= set(alphabet), name,
                f"a character out of {alphabet} for each of NUM_LAYERS={s.num_layers} blocks")
    tables = sorted(set(s.value_embeds) & set("0123456789"))
    require(tables == [str(i) for i in range(len(tables))], "value_embeds",
            "tables numbered 0, 1, ... without a gap")
    unused = [i for i in lists["skip_attn"] if 0 <= i < len(s.value_embeds) and s.value_embeds[i] != "."]
    require(not unused, "value_embeds", f". for block {', '.join(map(str, unused))}, since "
            f"SKIP_ATTN={s.skip_attn}")
    return found


def choose_preset(environ) -> tuple[str, str]:
    """The preset's name, and a line that says which, why, and how to get the other."""
    if "PRESET" in environ:
        return environ["PRESET"], f"preset: {environ['PRESET']}, as PRESET says"
    root = Path(environ.get("DATA_PATH") or HERE)
    shards = find_files(root, environ.get("TRAIN_FILES", Settings.train_files))
    lacks = [] if torch.cuda.is_available() else ["no CUDA GPU"]
    lacks += [] if shards else ["no FineWeb shards"]
    if not lacks:
        return "speedrun", "preset: speedrun (a CUDA GPU and FineWeb shards are here); the other: PRESET=demo"
    first = "" if shards else ", after python data/cached_fineweb10B.py"
    return "demo", f"preset: demo ({' and '.join(lacks)} here); the other: PRESET=speedrun{first}"


def feeds(s: Settings, world_size: int) -> bool:
    """Whether a step can be split evenly over `world_size` ranks."""
    microbatches = max(s.microbatches, world_size)
    return microbatches % world_size == 0 and s.batch_tokens % microbatches == 0


def worlds_that_fit(s: Settings) -> str:
    return f"a divisor of MICROBATCHES={s.microbatches}, or more that divide BATCH_TOKENS={s.batch_tokens}"


class BatchPlan(NamedTuple):
    """How a step's tokens fall to the ranks: `microbatches` packed sequences, `per_rank` of them each."""

    microbatches: int
    microbatch_tokens: int
    per_rank: int
    world_size: int

    def __str__(self):
        return (f"{counted(self.world_size, 'rank')} x {counted(self.per_rank, 'microbatch')} x "
                f"{self.microbatch_tokens:,} tokens = "
                f"{self.microbatches * self.microbatch_tokens:,} tokens/step")


def plan_batch(s: Settings, world_size: int) -> BatchPlan:
    """Split a step over `world_size` ranks; beyond MICROBATCHES ranks, each has one, shorter microbatch.

    Raises UserError (exit code 2) where the world size does not divide the batch.
    """
    if not feeds(s, world_size):
        raise UserError(f"WORLD_SIZE: expected {worlds_that_fit(s)}, found {world_size}; start another "
                        "number of processes (NPROC=... ./run.sh).", exit_code=2)
    microbatches = max(s.microbatches, world_size)
    return BatchPlan(microbatches, s.batch_tokens // microbatches, microbatches // world_size, world_size)


def largest_world_size(s: Settings, num_gpus: int) -> int:
    """The most processes that `num_gpus` GPUs can run and the batch can feed; 1 without a GPU."""
    return max(w for w in range(1, max(num_gpus, 1) + 1) if feeds(s, w))


# ----------------------------------------------------------------------------------------------------
# Kernels: the step's hot spots, each behind one choice that is made once and says why
#
# Each has a plain version in PyTorch, right on every device, and on GPUs a fast one. A fast one is taken
# where, on the very device of the run, it agrees with the plain one on a small case; the log says which was
# taken, and why not those before it. To add one, write it, and name it in fast_kernels.


jit = triton.jit if triton else lambda function: function  # kernels that are not launched need no Triton


class Kernels(NamedTuple):
    """The implementations that a run uses (signatures: those of the plain versions)."""

    attention_plan: Callable  # what attention has to know of the packing, made once a window
    attention: Callable[..., Tensor]
    head_loss: Callable[..., Tensor]
    orthogonalize: Callable[..., Tensor]


def plain_kernels() -> Kernels:
    return Kernels(banded_plan, banded_attention, softcapped_head_loss, newton_schulz)


def choose_kernels(device: torch.device, s: Settings) -> tuple[Kernels, list[str]]:
    """The kernels for `device`, and for each a line that names the choice and its reason."""
    kernels = plain_kernels()
    why = f"in plain PyTorch, since this is a {device.type}"
    choices = dict(attention=("bands of scaled_dot_product_attention", why),
                   head=("product in the activations' dtype, loss in float32", why),
                   newton_schulz=("torch.matmul", why))
    if device.type == "cuda":
        found = {}
        for kind, candidates in fast_kernels(device, s).items():
            chosen, *choices[kind] = first_that_agrees(candidates, choices[kind][0], device)
            found |= chosen
        kernels = kernels._replace(**found)
    return kernels, [f"{kind}: {name} ({why})" for kind, (name, why) in choices.items()]


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}, {(str(error).splitlines() or [''])[0]}"


def first_that_agrees(candidates, plain: str, device: torch.device) -> tuple[dict[str, Callable], str, str]:
    """The kernels, the name and the reason of the first candidate that does what the plain ones do.

    Candidates are (name, make, error, tolerance). make() returns kernels by their names in Kernels, and
    error(kernels) their distance from the plain ones. Either may raise: the GPU is too old, say, or a package
    is missing. Where none is left, the plain ones stay, and the reason names what was wrong with each. All
    ranks try the candidates together and take one that agrees on each of them. Raises RuntimeError where a
    candidate left the device unusable.
    """
    against = []
    for name, make, error, tolerance in candidates:
        kernels, found, problem = {}, math.inf, ""
        try:
            kernels = make()
            found = error(kernels)
        except Exception as raised:  # whatever it is, it stands in the log
            problem = in_a_line(raised)
        try:
            worst = torch.tensor(found, device=device).nan_to_num(math.inf)
            if dist.is_initialized():
                dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            worst = worst.item()
        except RuntimeError as broken:
            raise RuntimeError(f"{name} failed ({problem}), and {device} does not work since") from broken
        if worst <= tolerance:
            return kernels, name, "; ".join([f"{worst:.1e} from plain PyTorch on a small case", *against])
        if not problem and found <= tolerance:
            problem = "failed on another rank"
        against.append(f"{name}: " + (problem or f"{found:.1e} from plain PyTorch on a small case, more than "
                                                 f"{tolerance:g}"))
    return {}, plain, "; ".join(["in plain PyTorch", *against])


def fast_kernels(device: torch.device, s: Settings) -> dict[str, list]:
    """For each kind of kernel its candidates on a GPU, the best first, as first_that_agrees takes them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype=s.torch_dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def attention_error(kernels) -> float:
        starts = [0, 7, 300, 301, 900, 1000, 1000]
        qkv = 2 * normal(3, 1000, s.num_heads, s.head_dim)

        def attend(plan, attention, window, padding):
            padded = torch.tensor(starts + padding * [1000], dtype=torch.int32, device=device)
            made = plan(padded, 1000, window, s.torch_dtype, 600)
            return lambda qkv: attention(*qkv.unbind(), made, s.attn_scale)

        cases = (8, 0), (384, 300)  # FlashAttention 4 has other kernels for more than 256 pieces
        return max(distance(attend(kernels["attention_plan"], kernels["attention"], *case),
                            attend(banded_plan, banded_attention, *case), qkv) for case in cases)

    def head_error(kernels) -> float:
        x = norm(normal(1000, s.model_dim))
        weight = 0.05 * normal(s.padded_vocab, s.model_dim, dtype=torch.float32)
        targets = torch.randint(s.vocab_size, (1000,), generator=generator, device=device)
        return distance(lambda x, w: kernels["head_loss"](x, w, targets),
                        lambda x, w: softcapped_head_loss(x, w, targets), x, weight)

    def newton_schulz_error(kernels) -> float:
        matrices = [normal(*stack, dtype=torch.float32) for stack in muon_stacks(s, rank_and_size()[1])]
        return max(distance(lambda x: kernels["orthogonalize"](x, s.torch_dtype),
                            lambda x: newton_schulz(x, s.torch_dtype), x, gradients=False)
                   for x in matrices)  # of the sizes that are trained, for which tiles were chosen

    attention = [("FlashAttention 3", lambda: varlen_kernels("FA3"), attention_error, 0.03),
                 ("FlashAttention 4", flash_attention_4_kernels, attention_error, 0.03),
                 ("FlashAttention of PyTorch", varlen_kernels, attention_error, 0.03)]
    head = [("products in float8, loss fused", lambda: fused_head(s, fp8=True), head_error, 0.15),
            ("products in the activations' dtype, loss fused", lambda: fused_head(s, fp8=False), head_error,
             0.03)]
    float8 = s.fp8_head and s.dtype == "bfloat16"
    tiles, why = choose_tiles(s, device)
    shown = ", ".join(f"{'x'.join(map(str, stack))} by {tile}" for stack, tile in tiles.items())
    newton = [(f"half of each symmetric product, {shown or TILES[0]} {why}",
               lambda: half_newton_schulz(tiles), newton_schulz_error, 0.1)]
    return dict(attention=attention, head=head if float8 else head[1:], newton_schulz=newton)


def distance(fast: Callable, plain: Callable, *inputs: Tensor, gradients: bool = True) -> float:
    """The greatest ||x - y|| / ||y|| over results and gradients of two functions; infinite instead of NaN."""
    results = []
    for function in (fast, plain):
        leaves = [x.detach().requires_grad_(gradients) for x in inputs]
        with torch.set_grad_enabled(gradients):
            y = function(*leaves)
            grads = torch.autograd.grad(y.float().square().sum(), leaves) if gradients else ()
        results.append([x.detach().double() for x in (y, *grads)])
    distances = torch.stack([(x - y).norm() / y.norm() for x, y in zip(*results)])
    return distances.nan_to_num(math.inf, math.inf).max().item()


def softcapped_head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of 30 * sigmoid(x @ weight.T / 7.5), as a float32 scalar.

    x: (T, D), in the activations' dtype; weight: (V, D), the float32 master, cast to it here; targets: (T,)
    int64 below V, or NO_TARGET where a token does not count. Without gradients, in validation, the tokens
    are taken in chunks, since the logits of a whole slice would not fit in memory.
    """
    weight = weight.type_as(x)
    chunk = len(x) if torch.is_grad_enabled() else 8192
    losses = []
    for x_chunk, targets_chunk in zip(x.split(chunk), targets.split(chunk)):
        logits = 30 * torch.sigmoid(F.linear(x_chunk, weight).float() / 7.5)
        losses.append(F.cross_entropy(logits, targets_chunk, reduction="sum"))
    return torch.stack(losses).sum()


# The fused head takes the tokens in chunks, and computes a chunk's gradients in the forward pass, as soon as
# its logits are there. Logits are the largest tensor of a step: this way neither all of them nor a float32
# copy are ever in memory. The backward pass only multiplies by the gradient of the loss. Softcapped logits
# lie between 0 and 30, so that their exponentials can be summed as they are.

HEAD_CHUNK = 8192  # tokens


@jit
def softcap_loss_kernel(logits, targets, losses, sums, num_columns, BLOCK: tl.constexpr):
    """A row a program: the sum of exp(30 sigmoid(logits / 7.5)), and the loss; 0 for targets below 0."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_columns
    target = tl.load(targets + row)
    total, hit = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < num_columns
        capped = 30 * tl.sigmoid(tl.load(logits + column, mask=inside, other=0.0).to(tl.float32) / 7.5)
        total += tl.where(inside, tl.exp(capped), 0.0)
        hit += tl.where(column == target, capped, 0.0)
    row_sum = tl.sum(total, 0)
    tl.store(sums + row, row_sum)
    tl.store(losses + row, tl.where(target >= 0, tl.log(row_sum) - tl.sum(hit, 0), 0.0))


@jit
def softcap_gradient_kernel(logits, targets, sums, grads, grads_t, num_rows, num_columns, scale,
                            ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A tile a program: `scale` times the loss's gradient by the logits; also transposed, into grads_t.

    grads may be logits: each place is read before it is written, by the same thread.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    target = tl.load(targets + row, mask=row < num_rows, other=-1)
    row_sum = tl.load(sums + row, mask=row < num_rows, other=1.0)
    s = tl.sigmoid(tl.load(logits + place, mask=inside, other=0.0).to(tl.float32) / 7.5)
    grad = tl.exp(30 * s) / row_sum[:, None] - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    grad *= 4 * s * (1 - s) * tl.where(target >= 0, scale, 0.0)[:, None]
    grad = grad.to(grads.dtype.element_ty)
    tl.store(grads + place, grad, mask=inside)
    if TRANSPOSED:
        place = column.to(tl.int64)[:, None] * num_rows + row[None, :]
        inside = (column < num_columns)[:, None] & (row < num_rows)[None, :]
        tl.store(grads_t + place, tl.trans(grad), mask=inside)


def softcap_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and sums of exponentials, (T,) float32 each. logits: (T, V), contiguous; targets: (T,) int64."""
    losses, sums = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    block = min(4096, triton.next_power_of_2(logits.size(1)))
    softcap_loss_kernel[(len(logits),)](logits, targets, losses, sums, logits.size(1), BLOCK=block,
                                        num_warps=8)
    return losses, sums


def softcap_gradient(logits: Tensor, targets: Tensor, sums: Tensor, grads: Tensor,
                     grads_t: Tensor | None = None, scale: float = 1.0) -> None:
    """Fill grads (T, V), which may be logits, and grads_t (V, T) with `scale` times the loss's gradient."""
    num_rows, num_columns = logits.shape
    grid = ceil_div(num_rows, 64), ceil_div(num_columns, 64)
    transposed = grads_t is not None
    softcap_gradient_kernel[grid](logits, targets, sums, grads, grads_t if transposed else grads, num_rows,
                                  num_columns, scale, ROWS=64, COLUMNS=64, TRANSPOSED=transposed)


@torch.library.custom_op("train_gpt::head_loss", mutates_args=())
def head_loss_op(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What softcapped_head_loss gives without gradients."""
    weight = weight.type_as(x)
    losses = [softcap_loss(F.linear(part, weight), part_targets)[0]
              for part, part_targets in zip(x.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))]
    return torch.cat(losses).sum()


@torch.library.custom_op("train_gpt::head_loss_and_gradients", mutates_args=())
def head_gradients_op(x: Tensor, weight: Tensor, targets: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What softcapped_head_loss gives, and its gradients by x, in x's dtype, and by weight, in float32."""
    losses, x_grad, weight_grad = [], torch.empty_like(x), torch.zeros_like(weight)
    products = Float8Products(x, weight) if fp8 else PlainProducts(x, weight)
    parts = zip(x.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), x_grad.split(HEAD_CHUNK))
    for part, part_targets, part_grad in parts:
        losses.append(products.loss_and_gradients(part, part_targets, part_grad, weight_grad))
    return torch.cat(losses).sum(), x_grad, weight_grad


@head_loss_op.register_fake
def _(x, weight, targets):
    return x.new_empty((), dtype=torch.float32)


@head_gradients_op.register_fake
def _(x, weight, targets, fp8):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def keep_head_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # of the last two outputs, which nothing else uses


def scale_head_gradients(ctx, grad, *none):
    return *(x * grad for x in ctx.saved_tensors), None, None


head_gradients_op.register_autograd(scale_head_gradients, setup_context=keep_head_gradients)


class PlainProducts:
    """The head's three products in the activations' dtype."""

    def __init__(self, x: Tensor, weight: Tensor):
        self.weight = weight.type_as(x)

    def loss_and_gradients(self, x: Tensor, targets: Tensor, x_grad: Tensor, weight_grad: Tensor) -> Tensor:
        """Losses of a chunk; fills x_grad and adds to weight_grad."""
        logits = F.linear(x, self.weight)
        losses, sums = softcap_loss(logits, targets)
        softcap_gradient(logits, targets, sums, grads=logits)
        torch.mm(logits, self.weight, out=x_grad)
        weight_grad += logits.mT @ x
        return losses


class Float8Products:
    """The same products in float8: input and weight as e4m3, the gradient of the logits as e5m2.

    Each factor is divided by a fixed scale first. The logits and the gradient by the input are bfloat16, the
    gradient by the weight float32; fast accumulation for the logits only.
    """

    def __init__(self, x: Tensor, weight: Tensor):
        self.scales = dict(x=x.size(1) ** 0.5 / 448, weight=2.0**-9, grad=1 / 448)
        self.factors = {name: torch.full((), scale, device=x.device) for name, scale in self.scales.items()}
        self.weight = self.cast(weight, "weight")
        self.weight_t = self.weight.mT.contiguous()

    def cast(self, x: Tensor, name: str) -> Tensor:
        """e4m3, whose largest number is 448, and which knows no infinity."""
        return (x / self.scales[name]).clamp(-448, 448).to(torch.float8_e4m3fn)

    def product(self, a: Tensor, b: Tensor, a_name: str, b_name: str, dtype: torch.dtype, fast=False):
        """a @ b.mT; both have their summed axis last, and contiguous, as the hardware wants it."""
        return torch._scaled_mm(a, b.mT, scale_a=self.factors[a_name], scale_b=self.factors[b_name],
                                out_dtype=dtype, use_fast_accum=fast)

    def loss_and_gradients(self, x: Tensor, targets: Tensor, x_grad: Tensor, weight_grad: Tensor) -> Tensor:
        """Losses of a chunk; fills x_grad and adds to weight_grad."""
        num_tokens, missing = len(x), -len(x) % 16  # the hardware takes multiples of 16
        x8 = self.cast(F.pad(x, (0, 0, 0, missing)), "x")
        targets = F.pad(targets, (0, missing), value=-1)
        logits = self.product(x8, self.weight, "x", "weight", torch.bfloat16, fast=True)
        losses, sums = softcap_loss(logits, targets)
        grads = torch.empty_like(logits, dtype=torch.float8_e5m2)
        grads_t = torch.empty_like(logits.mT, dtype=torch.float8_e5m2, memory_format=torch.contiguous_format)
        softcap_gradient(logits, targets, sums, grads, grads_t, scale=1 / self.scales["grad"])
        x_grad.copy_(self.product(grads, self.weight_t, "grad", "weight", torch.bfloat16)[:num_tokens])
        weight_grad += self.product(grads_t, x8.mT.contiguous(), "grad", "x", torch.float32)
        return losses[:num_tokens]


def fused_head(s: Settings, fp8: bool) -> dict[str, Callable]:
    """The head's kernel. Raises ValueError where float8 cannot take the model's sizes."""
    if fp8 and (s.model_dim % 16 or s.padded_vocab % 16):
        raise ValueError(f"float8 needs multiples of 16, not {s.model_dim} channels and {s.padded_vocab} ids")
    if triton is None:
        raise ImportError("no Triton")

    def fused_head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return head_gradients_op(x, weight, targets, fp8)[0]
        return head_loss_op(x, weight, targets)

    return dict(head_loss=fused_head_loss)


def newton_schulz(matrices: Tensor, dtype: torch.dtype, symmetric: Callable | None = None) -> Tensor:
    """Nearly orthogonal matrices with the row and column spaces of the given ones, in `dtype`.

    matrices: (..., rows, cols). Five steps of the quintic iteration of Muon (Keller Jordan et al., 2024,
    kellerjordan.github.io/posts/muon) take the singular values to about 1 +- 0.3; zero stays zero.
    symmetric: what to compute the symmetric products with, such as symmetric_product.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero among the quintics whose values stay near 1
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # so that x @ x.mT is the smaller of the two products
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = symmetric(x) if symmetric else x @ x.mT
        poly = symmetric(gram, alpha=c, base=gram, beta=b) if symmetric else b * gram + c * (gram @ gram)
        x = a * x + poly @ x
    return x.mT if tall else x


@jit
def symmetric_kernel(x, base, out, rows, cols, alpha, beta, BLOCK: tl.constexpr, COLS: tl.constexpr,
                     ADD: tl.constexpr):
    """A tile of symmetric_product at or below the diagonal, and its mirror image, a program each."""
    i, j, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if i >= j:
        x += matrix * rows * cols
        out += matrix * rows * rows
        row_i, row_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            x_i = tl.load(x + row_i[:, None] * cols + col[None, :], other=0.0,
                          mask=(row_i < rows)[:, None] & (col < cols)[None, :])
            x_j = tl.load(x + row_j[None, :] * cols + col[:, None], other=0.0,
                          mask=(row_j < rows)[None, :] & (col < cols)[:, None])
            product = tl.dot(x_i, x_j, product, input_precision="ieee")
        product *= alpha
        place = row_i[:, None] * rows + row_j[None, :]
        inside = (row_i < rows)[:, None] & (row_j < rows)[None, :]
        if ADD:
            base += matrix * rows * rows
            product += beta * tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
        result = product.to(out.dtype.element_ty)
        tl.store(out + place, result, mask=inside)
        if i > j:
            mirror = row_j[:, None] * rows + row_i[None, :]
            tl.store(out + mirror, tl.trans(result), mask=(row_j < rows)[:, None] & (row_i < rows)[None, :])


class Tile(NamedTuple):
    """How a program of symmetric_kernel works."""

    block: int  # rows and columns of its part of the result
    cols: int  # summed at once
    warps: int
    stages: int  # of its pipeline


TILES = (Tile(64, 64, 4, 4), Tile(64, 128, 4, 3), Tile(128, 64, 4, 3), Tile(128, 64, 8, 3),
         Tile(128, 128, 8, 3))  # the first fits every GPU since Ampere, in float32 too


def symmetric_product(x: Tensor, alpha: float = 1.0, base: Tensor | None = None, beta: float = 0.0,
                      tile: Tile = TILES[0]) -> Tensor:
    """alpha * x @ x.mT + beta * base, of which half the tiles are computed and the others mirrored.

    x: (..., rows, cols); base: (..., rows, rows), symmetric; the result: (..., rows, rows), in x's dtype.
    """
    *stack, rows, cols = x.shape
    x, out = x.contiguous(), x.new_empty(*stack, rows, rows)
    base = out if base is None else base.contiguous()
    tiles = ceil_div(rows, tile.block)
    symmetric_kernel[(tiles, tiles, math.prod(stack))](
        x, base, out, rows, cols, alpha, beta, BLOCK=tile.block, COLS=tile.cols, ADD=base is not out,
        num_warps=tile.warps, num_stages=tile.stages)
    return out


def time_tiles(stack: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[Tile, float]:
    """Median milliseconds of symmetric products of random matrices, by each tile that fits this GPU."""
    from triton.testing import do_bench

    x, times = torch.randn(stack, device=device).to(dtype), {}
    base = x @ x.mT if stack[1] == stack[2] else None
    for tile in TILES:
        with contextlib.suppress(triton.runtime.errors.OutOfResources):  # such as shared memory
            times[tile] = do_bench(lambda: symmetric_product(x, 1.0, base, 1.0, tile), warmup=5, rep=30,
                                   return_mode="median")
    return times


def fastest_tile(stack: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile for symmetric products of a stack, (matrices, rows, cols), by the times in Triton's cache.

    The first run on this kind of GPU with this kernel takes them.
    """
    from triton.runtime.cache import get_cache_manager

    about = (stack, str(dtype), TILES, inspect.getsource(symmetric_kernel.fn), triton.__version__,
             torch.cuda.get_device_name(device))
    cache, name = get_cache_manager(hashlib.sha256(repr(about).encode()).hexdigest()), "tile_times.json"
    try:
        times = {Tile(*tile): ms for tile, ms in json.loads(Path(cache.get_file(name)).read_text())}
    except (OSError, TypeError, ValueError):  # nothing is there, or it is damaged
        times = time_tiles(stack, dtype, device)
        with contextlib.suppress(OSError):
            cache.put(json.dumps(list(times.items())), name, binary=False)
    return min(times, key=times.get)


def muon_stacks(s: Settings, world_size: int) -> list[tuple[int, int, int]]:
    """(matrices, rows, cols) of what a rank makes orthogonal: of attention, MLP and gates."""
    num_attn = sum(b.attn is not None for b in s.blocks)
    num_mlp = sum(b.mlp is not None for b in s.blocks)
    banks = [(4 * num_attn, s.model_dim, s.model_dim), (2 * num_mlp, s.model_dim, s.mlp_dim),
             (num_attn, s.num_heads, s.gate_channels)]
    return [(ceil_div(matrices, world_size), *shape) for matrices, *shape in banks if matrices * shape[1]]


def symmetric_stacks(s: Settings, world_size: int) -> list[tuple[int, int, int]]:
    """(matrices, rows, cols) of Muon's symmetric products on a rank, but for those of a single tile."""
    stacks = [(matrices, small, cols) for matrices, *shape in muon_stacks(s, world_size)
              for small, large in [sorted(shape)] if small > TILES[0].block for cols in (small, large)]
    return list(dict.fromkeys(stacks))


def choose_tiles(s: Settings, device: torch.device) -> tuple[dict[tuple[int, int, int], Tile], str]:
    """The tiles of symmetric_stacks, and a reason.

    All ranks take rank 0's choice. Where it cannot time them, it chooses none, and the reason says why.
    Raises RuntimeError where that left the device unusable.
    """
    rank, world_size = rank_and_size()
    chosen, why = {}, "timed here, or in an earlier run"
    try:
        for stack in symmetric_stacks(s, world_size) if rank == 0 else ():
            chosen[stack] = fastest_tile(stack, s.torch_dtype, device)
    except Exception as raised:  # no cache to write to, say, or no memory
        chosen, why = {}, f"not timed: {in_a_line(raised)}"
    try:
        torch.zeros((), device=device).item()
        pairs, why = json.loads(from_rank_0(json.dumps([list(chosen.items()), why]), device))
    except RuntimeError as broken:
        raise RuntimeError(f"symmetric products: {why}, and {device} does not work since") from broken
    return {tuple(stack): Tile(*tile) for stack, tile in pairs}, why


def half_newton_schulz(tiles: dict[tuple[int, int, int], Tile]) -> dict[str, Callable]:
    """The kernel, with the tiles of some (matrices, rows, cols); others take the first."""
    if triton is None:
        raise ImportError("no Triton")

    def product(x: Tensor, **how) -> Tensor:
        return symmetric_product(x, **how, tile=tiles.get(tuple(x.shape), TILES[0]))

    return dict(orthogonalize=functools.partial(newton_schulz, symmetric=product))


# ----------------------------------------------------------------------------------------------------
# Attention: packed documents, causal, within a sliding window
#
# The sequence is cut into N bands as long as the window. A query then finds every key that it may see in
# its own band and the one before, so scores take T x 2W instead of T x T.


def banded_plan(cu_seqlens: Tensor, num_tokens: int, window: int, dtype: torch.dtype,
                longest: int = 0) -> Tensor:
    """Additive mask of banded_attention, made once for all blocks of the model with this window.

    cu_seqlens: (S,) int32, the piece starts in ascending order, padded with num_tokens. Query i may see
    key j where j is in the same piece and 0 <= i - j <= window: the token itself and `window` before it.
    Returns (N, 1, B, keys) of 0 and -inf, B = min(window, num_tokens), with 2B keys a band (B if N is 1).
    """
    band = min(window, num_tokens)
    num_bands = ceil_div(num_tokens, band)
    device = cu_seqlens.device
    query = torch.arange(num_bands * band, device=device).view(num_bands, band, 1)
    key = query.view(num_bands, 1, band)
    if num_bands > 1:
        key = torch.cat((key - band, key), dim=2)
    # A position's piece is the number of starts at or before it. Positions after the last token form a piece
    # of their own; negative ones, before the first token, belong to none.
    query_piece, key_piece = (torch.searchsorted(cu_seqlens, x.int(), right=True) for x in (query, key))
    seen = (key <= query) & (query - key <= band) & (key_piece == query_piece)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf).unsqueeze(1)


def banded_attention(q: Tensor, k: Tensor, v: Tensor, plan: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + plan) v for a packed sequence. q, k, v and the result: (T, H, K), any dtype."""
    num_tokens, num_heads, head_dim = q.shape
    num_bands, _, band, num_keys = plan.shape

    def bands(x: Tensor, with_previous: bool) -> Tensor:  # (T, H, K) -> (N, H, B or 2B, K)
        x = F.pad(x, (0, 0, 0, 0, 0, num_bands * band - num_tokens)).unflatten(0, (num_bands, band))
        if with_previous:  # band 0 has none: it gets zeros, which the plan masks
            x = torch.cat((F.pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=1)
        return x.transpose(1, 2)

    previous = num_keys > band
    q, k, v = bands(q, False), bands(k, previous), bands(v, previous)
    y = F.scaled_dot_product_attention(q, k, v, plan, scale=scale)
    return y.transpose(1, 2).reshape(num_bands * band, num_heads, head_dim)[:num_tokens]


def varlen_plan(cu_seqlens: Tensor, num_tokens: int, window: int, dtype: torch.dtype, longest: int):
    """What FlashAttention needs: piece starts, an upper bound of the pieces' lengths, the window."""
    return cu_seqlens, longest, window


def varlen_kernels(implementation: str | None = None) -> dict[str, Callable]:
    """Attention by torch.nn.attention.varlen, which computes what banded_attention does, on recent GPUs.

    PyTorch carries FlashAttention 2 (Dao, 2023) for it; `implementation` is "FA3", if that is installed.
    Its window counts the keys before the query's own, as ours does. Raises what PyTorch raises.
    """
    from torch.nn import attention as registry
    from torch.nn.attention.varlen import varlen_attn

    if implementation:
        registry.activate_flash_attention_impl(implementation)
    elif registry.current_flash_attention_impl():  # that of a candidate before this one
        registry.restore_flash_attention_impl()

    def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan, scale: float) -> Tensor:
        cu_seqlens, longest, window = plan
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale,
                           window_size=(window, 0))

    return dict(attention_plan=varlen_plan, attention=varlen_attention)


# FlashAttention 4 is called without PyTorch's registry, which in 2.11 knows no windows for it, and in 2.13
# expects two results of a function that now has five.


def flash_attention_4_arguments(cu_seqlens: Tensor, longest: int, window: int, scale: float) -> dict:
    return dict(softmax_scale=scale, window_size_left=window, window_size_right=0, cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest)


@torch.library.custom_op("train_gpt::flash_attention_4", mutates_args=())
def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, window: int,
                      scale: float) -> tuple[Tensor, Tensor]:
    """What banded_attention gives, (T, H, K), and the logarithms of softmax's sums, (H, T) float32."""
    from flash_attn.cute.interface import _flash_attn_fwd  # README.md says how to install it

    arguments = flash_attention_4_arguments(cu_seqlens, longest, window, scale)
    return _flash_attn_fwd(q, k, v, return_lse=True, **arguments)[:2]


@torch.library.custom_op("train_gpt::flash_attention_4_backward", mutates_args=())
def flash_attention_4_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
                               cu_seqlens: Tensor, longest: int, window: int,
                               scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by q, k and v, from what the forward pass was given and gave."""
    from flash_attn.cute.interface import _flash_attn_bwd

    arguments = flash_attention_4_arguments(cu_seqlens, longest, window, scale)
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    arguments |= dict(zip(("dq", "dk", "dv"), grads))
    return _flash_attn_bwd(q, k, v, y, grad, lse, **arguments)[:3]


@flash_attention_4.register_fake
def _(q, k, v, cu_seqlens, longest, window, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.size(1), q.size(0), dtype=torch.float32)


@flash_attention_4_backward.register_fake
def _(grad, q, k, v, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def keep_attention(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.sizes = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)  # of the logarithms, which nothing else uses


def attention_gradients(ctx, grad, _):
    return *flash_attention_4_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None


flash_attention_4.register_autograd(attention_gradients, setup_context=keep_attention)


def flash_attention_4_kernels() -> dict[str, Callable]:
    """Attention by FlashAttention 4, if that is installed, on Hopper GPUs and those after them."""
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # two screens of its compiler's

    def attention(q: Tensor, k: Tensor, v: Tensor, plan, scale: float) -> Tensor:
        return flash_attention_4(q, k, v, *plan, scale)[0]

    return dict(attention_plan=varlen_plan, attention=attention)


# ----------------------------------------------------------------------------------------------------
# Model: all blocks' matrices in two banks, indexed by block
#
# attn_bank holds q, k, v and output projection of every block that has attention, as 4 matrices in a row;
# mlp_bank holds up and down of every block that has an MLP. So a Muon step needs one reduce-scatter, one
# batched Newton-Schulz and one all-gather a bank, however many blocks there are.

SCALARS = dict(skip=1.0, x=1.0, x0=0.0, v=0.5, ve=0.5)  # a row of `scalars`, with the values it starts from


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (num_tokens, 1, head_dim // 2) float32.

    Half of the pairs turn, by (1/1024)^(j/(n-1)) radians a token, j = 0 .. n-1; the others stand still.
    """
    turning = head_dim // 4
    frequency = torch.cat(((1 / 1024) ** torch.linspace(0, 1, turning), torch.zeros(head_dim // 2 - turning)))
    angle = torch.outer(torch.arange(num_tokens, dtype=torch.float32), frequency)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) in float32; x: (T, ..., H, K), paired across K's halves."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x)


class GPT(nn.Module):
    """The model. Parameters are empty until init_weights fills them; it can be built on the meta device."""

    def __init__(self, s: Settings, kernels: Kernels):
        super().__init__()
        self.settings, self.kernels, self.blocks = s, kernels, s.blocks
        num_attn = sum(b.attn is not None for b in self.blocks)
        num_mlp = sum(b.mlp is not None for b in self.blocks)
        self.num_tables = len({b.table for b in self.blocks} - {None})

        def parameter(name: str, *shape: int, dtype=torch.float32):
            empty = 0 in shape  # a layout without gates, say, has no such parameter
            self.register_parameter(name, None if empty else nn.Parameter(torch.empty(shape, dtype=dtype)))

        parameter("embed", s.padded_vocab, s.model_dim, dtype=s.torch_dtype)
        parameter("value_embeds", self.num_tables * s.padded_vocab, s.model_dim, dtype=s.torch_dtype)
        parameter("attn_bank", 4 * num_attn, s.model_dim, s.model_dim)
        parameter("gate_bank", num_attn, s.num_heads, s.gate_channels)
        parameter("mlp_bank", 2 * num_mlp, s.model_dim, s.mlp_dim)
        parameter("lm_head", s.padded_vocab, s.model_dim)
        parameter("scalars", s.num_layers, len(SCALARS))
        cos, sin = rotary_tables(max(s.batch_tokens // s.microbatches, s.val_slice_tokens), s.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor, longest: int,
                windows: tuple[int, int]) -> Tensor:
        """Cross-entropy in nats, a float32 scalar: summed over tokens in training, averaged in evaluation.

        The first four are a Batch; windows: (long, short) attention windows in tokens.
        """
        return self.head(self.hidden(inputs, cu_seqlens, longest, windows), targets)

    def head(self, x: Tensor, targets: Tensor) -> Tensor:
        """forward's loss, from what `hidden` gives."""
        loss = self.kernels.head_loss(x, self.lm_head, targets)
        return loss if self.training else loss / targets.numel()

    def hidden(self, inputs: Tensor, cu_seqlens: Tensor, longest: int, windows: tuple[int, int]) -> Tensor:
        """What the head sees, (T, D) in the activations' dtype."""
        s, num_tokens = self.settings, inputs.numel()
        plans = {window: self.kernels.attention_plan(cu_seqlens, num_tokens, window, s.torch_dtype, longest)
                 for window in dict.fromkeys(windows)}
        x = x0 = norm(F.embedding(inputs, self.embed))
        tables = self.look_up_value_embeds(inputs)
        attn_weights, gate_weights, mlp_weights = self.weights_by_block()
        scalars = [row.unbind() for row in self.scalars.unbind()]
        half, outputs = s.num_layers // 2, []
        for i, block in enumerate(self.blocks):
            skip, w_x, w_x0, w_v, w_ve = scalars[i]
            if i >= s.num_layers - half:
                x = x + skip * outputs.pop()
            x = w_x * x + w_x0 * x0
            if block.attn is not None:
                ve = None if block.table is None else w_ve * tables[block.table]
                gate = None if gate_weights is None else gate_weights[block.attn]
                plan = plans[windows[0 if block.long else 1]]
                x = x + self.attention(norm(x), attn_weights[block.attn], gate, w_v, ve, plan)
            if block.mlp is not None:
                up, down = mlp_weights[block.mlp]  # both (D, hidden), so that they share a bank
                x = x + F.linear(F.relu(norm(x) @ up).square(), down)
            if i < half:
                outputs.append(x)
        return norm(x)

    def attention(self, x: Tensor, qkvo: Tensor, gate: Tensor | None, w_v: Tensor, ve: Tensor | None, plan):
        """One block's attention. x: (T, D), normalised; qkvo: (4, D, D); gate: (H, channels); ve: (T, D)."""
        s, num_tokens = self.settings, len(x)
        qkv = F.linear(x, qkvo[:3].flatten(0, 1)).view(num_tokens, 3, s.num_heads, s.head_dim)
        cos, sin = self.cos[:num_tokens, None], self.sin[:num_tokens, None]
        (q, k), v = rotate(norm(qkv[:, :2]), cos, sin).unbind(1), qkv[:, 2]
        v = w_v * v if ve is None else w_v * v + ve.view_as(v)
        y = self.kernels.attention(q, k, v, plan, s.attn_scale)
        if gate is not None:  # sparse attention gate: a scalar a head and token, from the first channels
            y = y * torch.sigmoid(F.linear(x[:, :s.gate_channels], gate)).unsqueeze(-1)
        return F.linear(y.flatten(1), qkvo[3])

    def look_up_value_embeds(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Each table's rows for the inputs, (T, D) each: one look-up in the tables laid end to end."""
        if self.value_embeds is None:
            return ()
        first_row = self.settings.padded_vocab * torch.arange(self.num_tables, device=inputs.device)
        return F.embedding(inputs + first_row[:, None], self.value_embeds).unbind()

    def weights_by_block(self):
        """Banks cast to the activations' dtype and split: (4, D, D), (H, channels), (2, D, hidden) each."""
        def split(bank: Tensor | None, group: int):
            if bank is None:
                return None
            bank = bank.to(self.settings.torch_dtype)
            return (bank.unflatten(0, (-1, group)) if group > 1 else bank).unbind()

        return split(self.attn_bank, 4), split(self.gate_bank, 1), split(self.mlp_bank, 2)


def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter in place, from numbers drawn on the CPU, so that all devices start alike."""
    generator = torch.Generator().manual_seed(seed)
    bound = 3**0.5 * 0.5 * model.settings.model_dim**-0.5  # uniform within +-bound has std 0.5 / sqrt(D)

    @torch.no_grad()
    def fill(name: str, p: Tensor):
        values = torch.zeros(p.shape)
        if name in ("embed", "value_embeds"):
            values.normal_(generator=generator)
        elif name == "attn_bank":  # q, k, v of every block; the output projections start at zero
            values.unflatten(0, (-1, 4))[:, :3].uniform_(-bound, bound, generator=generator)
        elif name == "mlp_bank":  # up; down starts at zero
            values.unflatten(0, (-1, 2))[:, 0].uniform_(-bound, bound, generator=generator)
        elif name == "scalars":
            values[:] = torch.tensor(list(SCALARS.values()))
        elif name not in ("gate_bank", "lm_head"):
            raise KeyError(f"no initial weights are given for parameter {name}")
        p.copy_(values)

    for name, p in model.named_parameters():
        fill(name, p)


# ----------------------------------------------------------------------------------------------------
# Optimizers: Muon for the blocks' matrices, Adam for the rest, both sharded over the ranks
#
# A parameter is a stack of rows: matrices for Muon, vectors for Adam. Each rank owns an equal run of them
# and keeps optimizer state for those alone. A step has three phases:
#   1. reduce: reduce-scatter the gradients; each rank gets the average over ranks of its own rows; for the
#      head during the backward pass, since its gradient is complete first (the banks and the tables belong to
#      the first blocks too, so that theirs are complete last);
#   2. update: each rank computes the step of its own rows, in place;
#   3. gather: all-gather the rows, so that every rank again holds the whole parameter, bit for bit the same.
# Where the rows do not divide by the number of ranks, the storage behind the parameter is longer than the
# parameter: rows of zeros fill it up, whose gradient is zero, so that they stay zero.


@dataclass
class Shard:
    """One parameter as its optimizer sees it on this rank."""

    name: str
    param: nn.Parameter
    lr_mult: float
    rows: Tensor  # whole padded storage, a multiple of world_size rows; the parameter is a view of its start
    own: Tensor  # this rank's part of `rows`
    state: dict[str, Tensor]  # like `own`
    sent: Tensor | None = None  # phase 1: this rank's gradient, like `rows`
    grad: Tensor | None = None  # phase 1: the averaged gradient of `own`
    work: dist.Work | None = None  # the collective in flight


# torch 2.13 renamed both collectives and warns of the old names, which are all that torch 2.11 has.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ShardedOptimizer:
    """The three phases; a subclass says what a row is, which state it needs and how it moves."""

    powers: dict[str, int]  # of the gradient, to which a state is proportional

    def __init__(self, params: dict[str, tuple[nn.Parameter, float]], rank: int, world_size: int):
        """params: name -> (parameter, learning-rate multiple). Re-homes each parameter in padded storage."""
        self.world_size = world_size
        self.shards = [self.make_shard(name, p, lr_mult, rank) for name, (p, lr_mult) in params.items()]

    def as_rows(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def new_state(self, own: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def update(self, shard: Shard, **schedule: float) -> None:
        raise NotImplementedError

    def make_shard(self, name: str, p: nn.Parameter, lr_mult: float, rank: int) -> Shard:
        rows = self.pad(self.as_rows(p.data))
        p.data = rows.flatten()[:p.numel()].view(p.shape)
        own = rows.chunk(self.world_size)[rank]
        return Shard(name, p, lr_mult, rows, own, self.new_state(own))

    def pad(self, rows: Tensor) -> Tensor:
        missing = -len(rows) % self.world_size
        return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows

    @torch.no_grad()
    def reduce(self, *shards: Shard) -> None:
        """Phase 1, started for these parameters; their gradients are used up."""
        for s in shards:
            s.sent = self.pad(self.as_rows(s.param.grad))
            s.param.grad = None
            if self.world_size == 1:
                s.grad = s.sent
            else:
                s.grad = torch.empty_like(s.own)
                s.work = reduce_scatter(s.grad, s.sent, op=dist.ReduceOp.AVG, async_op=True)

    @torch.no_grad()
    def update_and_gather(self, **schedule: float) -> None:
        """Phase 2, each parameter as its gradient arrives, and phase 3, started at once after it."""
        for s in self.shards:
            if s.work is not None:
                s.work.wait()
            self.update(s, **schedule)
            s.sent = s.grad = None
            if self.world_size > 1:
                s.work = all_gather(s.rows, s.own, async_op=True)

    def finish(self) -> None:
        """End of phase 3: the parameters may be read."""
        for s in self.shards:
            if s.work is not None:
                s.work.wait()
                s.work = None


class Muon(ShardedOptimizer):
    """Momentum, then orthogonalisation of each matrix on its own (Jordan et al., 2024). Rows are matrices."""

    powers = dict(momentum=1)

    def __init__(self, params, rank: int, world_size: int, lr: float, orthogonalize, dtype: torch.dtype):
        super().__init__(params, rank, world_size)
        self.lr, self.orthogonalize, self.dtype = lr, orthogonalize, dtype

    def as_rows(self, x: Tensor) -> Tensor:
        return x

    def new_state(self, own: Tensor) -> dict[str, Tensor]:
        return dict(momentum=torch.zeros_like(own))

    def update(self, s: Shard, lr_scale: float, momentum: float) -> None:
        buffer = s.state["momentum"].lerp_(s.grad, 1 - momentum)
        direction = self.orthogonalize(s.grad.lerp(buffer, momentum), self.dtype)  # Nesterov's look ahead
        rows, cols = direction.shape[-2:]
        s.own.add_(direction, alpha=-self.lr * s.lr_mult * lr_scale * max(1, rows / cols) ** 0.5)


class DistAdam(ShardedOptimizer):
    """Adam (Kingma and Ba, 2015) on rows of the last axis; state has the parameter's dtype.

    eps is added before the correction of the second moment's bias, and is small enough not to matter but for
    gradients near zero.
    """

    powers = dict(mean=1, square=2, step=0)

    def __init__(self, params, rank: int, world_size: int, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, rank, world_size)
        self.lr, self.betas, self.eps = lr, betas, eps

    def as_rows(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2)

    def new_state(self, own: Tensor) -> dict[str, Tensor]:
        return dict(mean=torch.zeros_like(own), square=torch.zeros_like(own), step=torch.zeros(()))

    def update(self, s: Shard, lr_scale: float, momentum: float) -> None:
        beta1, beta2 = self.betas
        s.state["step"] += 1  # kept on the CPU: reading it costs no synchronisation
        t = s.state["step"].item()
        mean = s.state["mean"].mul_(beta1).add_(s.grad, alpha=1 - beta1)
        square = s.state["square"].mul_(beta2).addcmul_(s.grad, s.grad, value=1 - beta2)
        lr = self.lr * s.lr_mult * lr_scale * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        s.own.add_(mean.div(square.sqrt().add_(self.eps)), alpha=-lr)


def make_optimizers(model: GPT, s: Settings, rank: int, world_size: int) -> list[ShardedOptimizer]:
    """Both optimizers, from the one table of who trains what and at which multiple of its learning rate."""
    table = dict(
        attn_bank=(Muon, 1.0),
        gate_bank=(Muon, 1.0),
        mlp_bank=(Muon, 1.0),
        embed=(DistAdam, s.embed_lr_mult),
        value_embeds=(DistAdam, s.embed_lr_mult),
        lm_head=(DistAdam, s.head_lr_mult),
        scalars=(DistAdam, s.scalar_lr_mult),
    )
    params = dict(model.named_parameters())
    if not set(params) <= set(table):
        raise KeyError(f"no optimizer is given for {sorted(set(params) - set(table))}")
    groups = {kind: {name: (params[name], lr_mult) for name, (owner, lr_mult) in table.items()
                     if owner is kind and name in params} for kind in (Muon, DistAdam)}
    return [Muon(groups[Muon], rank, world_size, s.muon_lr, model.kernels.orthogonalize, s.torch_dtype),
            DistAdam(groups[DistAdam], rank, world_size, s.adam_lr, (s.adam_beta1, s.adam_beta2), s.adam_eps)]


@contextlib.contextmanager
def reducing_head(optimizers: list[ShardedOptimizer]):
    """For a step's last backward pass: starts phase 1 of the head within it."""
    owner, head = next((o, shard) for o in optimizers for shard in o.shards if shard.name == "lm_head")
    hook = head.param.register_post_accumulate_grad_hook(lambda _: owner.reduce(head))
    try:
        yield
    finally:
        hook.remove()


def optimizer_step(optimizers: list[ShardedOptimizer], **schedule: float) -> None:
    """One step of all of them, so interleaved that communication overlaps computation."""
    for optimizer in optimizers:
        optimizer.reduce(*(s for s in optimizer.shards if s.sent is None))
    for optimizer in optimizers:
        optimizer.update_and_gather(**schedule)
    for optimizer in optimizers:
        optimizer.finish()


# ----------------------------------------------------------------------------------------------------
# Data: token shards, the walk over their documents, training batches and validation slices
#
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens as uint16.
# Before step 0 the planned steps are walked over the documents of all shards that they need. This reads and
# checks every token, keeps where the documents start, and leaves the shards in the operating system's cache.
# Then a thread reads piece by piece and assembles batches ahead of need: there is no shard to load when one
# ends, and no more than a few batches in memory.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
FINEWEB_SHARDS = 103  # for training, of 100M tokens


class TokenShard:
    """One shard file, held open. Opening it checks header and size; index() checks the tokens."""

    def __init__(self, path: Path, s: Settings):
        """Raises UserError, with file, expected, found and remedy, where the file is not a shard."""
        self.path, self.settings = path, s
        self.starts, self.sha256 = None, None  # of documents, once they are known; what a manifest says
        self.expect(path.is_file() or not path.exists(), "a file", "a pipe or the like")
        try:
            self.file = open(path, "rb")
            size, self.changed = self.look()
            self.head = head = self.file.read(SHARD_HEADER_BYTES)
        except OSError as error:
            raise UserError(f"{path}: expected a readable token shard, found: {error.strerror}; correct its "
                            "permissions, or delete it and make it again.") from None
        self.expect(len(head) == SHARD_HEADER_BYTES, f"{SHARD_HEADER_BYTES} bytes of header", f"{size} bytes")
        magic, version, self.num_tokens = (int(word) for word in np.frombuffer(head, "<i4", count=3))
        self.expect(magic == SHARD_MAGIC, f"magic number {SHARD_MAGIC}", f"{magic}, so it is no token shard")
        self.expect(version == SHARD_VERSION, f"version {SHARD_VERSION}", f"version {version}")
        self.expect(self.num_tokens > 0, "a count of at least 1 token in its header", f"{self.num_tokens}")
        expected = SHARD_HEADER_BYTES + 2 * self.num_tokens
        self.expect(size == expected, f"{expected:,} bytes, as its header's count of "
                    f"{self.num_tokens:,} tokens says", f"{size:,} bytes")

    OTHER_FILE = ("delete it and make it again (a demo shard: run again; FineWeb: python "
                  "data/cached_fineweb10B.py), or name other files")
    OTHER_SETTINGS = "set PRESET, or VOCAB_SIZE and BOS_ID, to what these files hold, or name other files"

    def expect(self, holds: bool, expected: str, found: str, remedy: str = OTHER_FILE):
        if not holds:
            raise UserError(f"{self.path}: expected {expected}, found {found}; {remedy}.")

    def look(self) -> tuple[int, int]:
        """Bytes of the file, and when it was written last, in nanoseconds."""
        about = os.fstat(self.file.fileno())
        return about.st_size, about.st_mtime_ns

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens start to end, uint16, ids checked. Raises UserError where the file no longer holds them."""
        first = SHARD_HEADER_BYTES + 2 * start
        try:
            data = os.pread(self.file.fileno(), 2 * (end - start), first)
        except OSError as error:
            self.expect(False, f"to read {2 * (end - start):,} bytes from byte {first:,}", error.strerror)
        self.expect(len(data) == 2 * (end - start), f"tokens {start:,} to {end:,}",
                    f"{len(data)} bytes of them: it was cut while in use")
        tokens, vocab_size = np.frombuffer(data, "<u2"), self.settings.vocab_size
        if tokens.max() >= vocab_size:
            where = int(np.argmax(tokens >= vocab_size))
            self.expect(False, f"ids below VOCAB_SIZE={vocab_size}",
                        f"{tokens[where]} at token {start + where:,}", self.OTHER_SETTINGS)
        return tokens

    def index(self) -> np.ndarray:
        """(documents + 1,) int64: each document's first token, then the shard's end. Checks every token.

        Raises UserError, also where the tokens are not those of which `sha256`, if given, is the hash.
        """
        if self.starts is None:
            chunk, bos_id, starts = 1 << 22, self.settings.bos_id, []
            digest = hashlib.sha256(self.head)
            for first in range(0, self.num_tokens, chunk):
                tokens = self.read(first, min(first + chunk, self.num_tokens))
                starts.append(first + np.flatnonzero(tokens == bos_id))
                if self.sha256:
                    digest.update(tokens)
            self.expect(self.sha256 in (None, digest.hexdigest()), "the bytes of its manifest.json's SHA-256",
                        "others")
            self.starts = np.concatenate([*starts, [self.num_tokens]])
            self.expect(len(self.starts) > 1, f"documents that open with BOS_ID={bos_id}", "no such token",
                        self.OTHER_SETTINGS)
        return self.starts


def find_files(root: Path, pattern: str) -> list[Path]:
    """Files that match, in name order; an absolute pattern stands for itself."""
    paths = map(Path, glob.glob(os.path.join(glob.escape(str(root)), pattern)))
    return sorted(path for path in paths if not path.is_dir())


def data_root(s: Settings) -> Path:
    """The folder in which the two patterns start. Raises UserError (exit code 2) where there is none."""
    root = Path(s.data_path or HERE)
    if not root.is_dir():
        raise UserError(f"DATA_PATH: expected a folder, found none at {root}; correct it, or make the "
                        "folder.", exit_code=2)
    return root


def open_shards(s: Settings, name: str) -> list[TokenShard]:
    """The shards that match the pattern in setting `name`, each header checked. Raises UserError for none."""
    root, pattern = data_root(s), getattr(s, name)
    paths = find_files(root, pattern)
    if not paths:
        remedy = f"correct {name.upper()} or DATA_PATH"
        if pattern == getattr(Settings, name):
            remedy = "fetch them with python data/cached_fineweb10B.py, or take PRESET=demo, which needs none"
        raise UserError(f"{name.upper()}: expected token shards at {root / pattern}, found none; {remedy}.")
    shards = [TokenShard(path, s) for path in paths]
    for folder in sorted({path.parent for path in paths}):
        check_manifest(folder / "manifest.json", shards, s)
    return shards


def check_manifest(path: Path, shards: list[TokenShard], s: Settings) -> None:
    """Hold settings and the shards beside it against a manifest (form: data/shards.py), if there is one.

    Raises UserError where they differ.
    """
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        vocab_size, bos_id = int(manifest["vocab_size"]), int(manifest["bos_id"])
        listed = {name: (int(about["tokens"]), about["sha256"]) for name, about in
                  manifest["shards"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a manifest of shards, found {error!r}; make the shards again, or "
                        "delete it.") from None
    shards = [shard for shard in shards if shard.path.parent == path.parent and shard.path.name in listed]
    if shards and (vocab_size > s.vocab_size or bos_id != s.bos_id):
        raise UserError(f"{path}: expected the settings of its shards, VOCAB_SIZE={vocab_size} and BOS_ID="
                        f"{bos_id}, found VOCAB_SIZE={s.vocab_size} and BOS_ID={s.bos_id}; set them so.")
    for shard in shards:
        num_tokens, shard.sha256 = listed[shard.path.name]
        shard.expect(shard.num_tokens == num_tokens, f"{num_tokens:,} tokens, as {path.name} says",
                     f"{shard.num_tokens:,}")


class Piece(NamedTuple):
    """A document, or its beginning, in a batch: tokens[start:end] of a shard."""

    shard: int
    start: int
    end: int


class DocumentWalk:
    """Goes through the documents of all shards in order and packs them into microbatches; reads no token.

    The state is a plain pair of numbers, (shard, document), that can be saved and put back.
    """

    def __init__(self, shards: list[TokenShard], max_piece_tokens: int, epochs: int = 1):
        self.shards, self.max_piece_tokens, self.epochs = shards, max_piece_tokens, epochs
        self.position = (0, 0)  # a shard's number goes on counting from pass to pass

    def next_microbatch(self, num_tokens: int) -> list[Piece] | None:
        """Pieces that fill `num_tokens` + 1 tokens (targets are shifted by one); None where the shards end.

        A piece is a document from its BOS, cut at max_piece_tokens or where the microbatch is full. What is
        cut off is not used; the next microbatch opens with the next document.
        """
        (shard, document), missing, pieces = self.position, num_tokens + 1, []
        while missing:
            if shard >= self.epochs * len(self.shards):
                return None
            starts = self.shards[shard % len(self.shards)].index()
            if document == len(starts) - 1:
                shard, document = shard + 1, 0
                continue
            start = int(starts[document])
            length = min(int(starts[document + 1]) - start, self.max_piece_tokens, missing)
            pieces.append(Piece(shard % len(self.shards), start, start + length))
            missing, document = missing - length, document + 1
        self.position = (shard, document)
        return pieces


class DataUse(NamedTuple):
    """What a number of steps takes from the training shards."""

    steps: int
    tokens_used: int
    tokens_dropped: int  # rests of cut documents, and what stands before a shard's first BOS
    most_pieces: int  # in any microbatch
    passes: int  # over the shards, the last one begun

    def __str__(self):
        read = self.tokens_used + self.tokens_dropped
        used, dropped = (f"{n:,} ({n / max(read, 1):.1%})" for n in (self.tokens_used, self.tokens_dropped))
        return (f"{counted(self.steps, 'step')} take {used} of {read:,} tokens read and drop {dropped}, the "
                f"rests of cut documents, in {counted(self.passes, 'pass')}")


def data_use(shards: list[TokenShard], position: tuple[int, int], batch: BatchPlan, steps: int,
             most_pieces: int) -> DataUse:
    """What `steps` steps have taken that end at `position`."""
    shard, document = position
    read = sum(shards[i % len(shards)].num_tokens for i in range(shard))
    read += int(shards[shard % len(shards)].index()[document]) if document else 0
    used = steps * batch.microbatches * (batch.microbatch_tokens + 1)
    return DataUse(steps, used, read - used, most_pieces, ceil_div(shard + (document > 0), len(shards)))


def plan_data(shards: list[TokenShard], batch: BatchPlan, s: Settings, steps: int = 0,
              position: tuple[int, int] = (0, 0)) -> DataUse:
    """Walk the planned steps, or as many as there are documents for, after `steps` that ended at `position`.

    Indexes every shard that it comes to.
    """
    walk, most = DocumentWalk(shards, s.max_piece_tokens, s.epochs), 0
    while steps < s.num_iterations:
        walk.position = position
        microbatches = [walk.next_microbatch(batch.microbatch_tokens) for _ in range(batch.microbatches)]
        if None in microbatches:
            break
        steps, position, most = steps + 1, walk.position, max(most, *map(len, microbatches))
    return data_use(shards, position, batch, steps, most)


def check_data(s: Settings, batch: BatchPlan) -> tuple[list[TokenShard], np.ndarray, DataUse]:
    """Training shards, validation tokens (val_tokens + 1,) and plan. Raises UserError for what is wrong."""
    shards, val_shards = open_shards(s, "train_files"), open_shards(s, "val_files")
    available, needed = sum(x.num_tokens for x in val_shards), s.val_tokens + 1
    if available < needed:
        raise UserError(f"VAL_FILES: expected at least VAL_TOKENS + 1 = {needed:,} tokens in "
                        f"{val_shards[0].path.parent}, found {available:,}; lower VAL_TOKENS or add shards.")
    val_tokens, missing = [], needed
    for shard in val_shards:
        shard.index()
        val_tokens.append(shard.read(0, min(shard.num_tokens, missing)))
        missing -= len(val_tokens[-1])
        if not missing:
            break
    plan = plan_data(shards, batch, s)
    if plan.steps < s.num_iterations:
        have, more = sum(x.num_tokens for x in shards), ""
        if s.train_files == Settings.train_files:
            per_step = have * s.epochs / plan.steps if plan.steps else s.batch_tokens  # tokens read
            enough = math.ceil(len(shards) * s.num_iterations * per_step / (have * s.epochs))
            more = f" (python data/cached_fineweb10B.py {enough})" if enough <= FINEWEB_SHARDS else ""
        raise UserError(f"TRAIN_FILES: expected documents for NUM_ITERATIONS={s.num_iterations} steps of "
                        f"{s.batch_tokens:,} tokens, found {have:,} tokens in "
                        f"{counted(len(shards), 'shard')}, enough for {counted(plan.steps, 'step')}; "
                        f"lower NUM_ITERATIONS, raise EPOCHS={s.epochs}, or add shards{more}.")
    return shards, np.concatenate(val_tokens), plan


NO_TARGET = -100  # as F.cross_entropy has it


class Batch(NamedTuple):
    """One packed sequence on the device, and what is known of it without a look at the device."""

    inputs: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64; NO_TARGET where a token does not count
    cu_seqlens: Tensor  # (S,) int32: where the pieces start, in ascending order, padded with T
    longest: int  # tokens that no piece exceeds; one number for all of training, and one for all validation


def make_batch(tokens: np.ndarray, starts, length: int, longest: int, device: torch.device,
               room: int = 0) -> Batch:
    """A batch from T + 1 tokens and the starts of their pieces, padded with T to `length` of them.

    Where T is below `room`, pieces of at most `longest` tokens whose targets do not count fill it up.
    """
    num_tokens, room = len(tokens) - 1, max(room, len(tokens) - 1)
    inputs, targets = np.zeros(room, dtype=np.int32), np.full(room, NO_TARGET, dtype=np.int64)
    inputs[:num_tokens], targets[:num_tokens] = tokens[:-1], tokens[1:]
    starts = np.append(starts, np.arange(num_tokens, room, longest))
    cu_seqlens = np.full(length, room, dtype=np.int32)
    cu_seqlens[:len(starts)] = starts
    tensors = [torch.from_numpy(x) for x in (inputs, targets, cu_seqlens)]
    if device.type == "cuda":  # pinned, so that the copy does not wait for the device
        tensors = [x.pin_memory().to(device, non_blocking=True) for x in tensors]
    return Batch(*tensors, longest)


def part_tokens(num_tokens: int, s: Settings) -> int:
    """Tokens of each part of a microbatch: its share, and room for the piece in which the share ends."""
    if s.microbatch_parts == 1:
        return num_tokens
    return min(num_tokens, round_up(ceil_div(num_tokens, s.microbatch_parts) + s.max_piece_tokens, 128))


def split_batch(tokens: np.ndarray, starts: np.ndarray, num_parts: int):
    """Yields (tokens, starts) of each part of a microbatch, from T + 1 tokens and the starts below T.

    A part ends where the first piece begins at or after its share of T; a piece that is longer than a share
    leaves the next part empty.
    """
    num_tokens = len(tokens) - 1
    places = np.append(starts, num_tokens)
    shares = np.arange(num_parts + 1) * num_tokens / num_parts
    cuts = places[np.searchsorted(places, shares)]
    for start, end in zip(cuts[:-1], cuts[1:]):
        yield tokens[start:end + 1], starts[(starts >= start) & (starts < end)] - start


def cu_seqlens_length(num_tokens: int, most_pieces: int) -> int:
    """S: room for a piece every 300 tokens, in steps of 128 (shapes stay static); more where data need it."""
    return round_up(max(num_tokens // 300, most_pieces + 1), 128)


class TrainLoader:
    """This rank's training batches: in every round of world_size microbatches, the one of its rank.

    A thread assembles them a few ahead, and on CUDA copies them on a stream of its own. Where that fails,
    the next_batch() that would have returned the batch raises the error instead.
    """

    def __init__(self, shards: list[TokenShard], s: Settings, batch: BatchPlan, plan: DataUse, rank: int,
                 device: torch.device, batches_ahead: int = 4):
        self.settings, self.walk = s, DocumentWalk(shards, s.max_piece_tokens, s.epochs)
        self.batch, self.rank, self.device, self.bos_id = batch, rank, device, s.bos_id
        self.most_pieces = plan.most_pieces
        self.part_tokens, self.parts = part_tokens(batch.microbatch_tokens, s), deque()
        self.longest = min(s.max_piece_tokens, self.part_tokens)
        self.cu_seqlens_length = self.room_for(plan)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.batches_ahead, self.ahead = batches_ahead, deque()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.seek(self.walk.position)

    def seek(self, position: tuple[int, int]) -> None:
        """Go on from a position, (0, 0) or what `position` was after some batch."""
        for batch in self.ahead:
            batch.cancel()
        self.position = position
        self.parts.clear()
        self.thread.submit(setattr, self.walk, "position", position)  # after the batch that it may be at
        self.ahead = deque(self.thread.submit(self.assemble) for _ in range(self.batches_ahead))

    def room_for(self, plan: DataUse) -> int:
        padding = ceil_div(self.part_tokens, self.longest) if self.settings.microbatch_parts > 1 else 0
        return cu_seqlens_length(self.part_tokens, plan.most_pieces + padding)

    def place(self, position: tuple[int, int]) -> list:
        """Where the documents after a position begin: a shard's name and a token's number."""
        shard, document = self.walk.shards[position[0] % len(self.walk.shards)], position[1]
        return [shard.path.name, int(shard.index()[min(document, len(shard.index()) - 1)])]

    def resume(self, steps: int, position: tuple[int, int]) -> None:
        """Go on where another run was after `steps` steps. Raises UserError where there is too little."""
        s, batch = self.settings, self.batch
        plan = plan_data(self.walk.shards, batch, s, steps, position)
        if plan.steps < s.num_iterations:
            raise UserError(f"RESUME: expected documents for NUM_ITERATIONS={s.num_iterations} steps, found "
                            f"enough until step {plan.steps}, going on after step {steps}; lower "
                            "NUM_ITERATIONS, raise EPOCHS, or add shards.", exit_code=2)
        self.cu_seqlens_length = max(self.cu_seqlens_length, self.room_for(plan))
        self.seek(position)

    def next_batch(self) -> Batch:
        """The next batch, or part of one, on the device.

        Raises UserError where a shard no longer is what it was.
        """
        if not self.parts:
            self.ahead.append(self.thread.submit(self.assemble))
            parts, self.position, copied = self.ahead.popleft().result()
            self.parts.extend(parts)
            if copied is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(copied)
                for x in (x for batch in parts for x in (batch.inputs, batch.targets, batch.cu_seqlens)):
                    x.record_stream(stream)
        return self.parts.popleft()

    @property
    def passes(self) -> int:
        """Passes over the shards, the last one begun."""
        return self.position[0] // len(self.walk.shards) + 1

    def use(self, steps: int) -> DataUse:
        """What the `steps` steps so far have taken."""
        return data_use(self.walk.shards, self.position, self.batch, steps, self.most_pieces)

    def assemble(self):
        """In the thread: a batch's parts, the position after it, and the event of their copy, if any."""
        num_tokens = self.batch.microbatch_tokens
        pieces = [self.walk.next_microbatch(num_tokens) for _ in range(self.batch.world_size)][self.rank]
        if pieces is None:
            raise RuntimeError("more batches were asked for than the training shards hold")
        tokens = np.concatenate([self.walk.shards[p.shard].read(p.start, p.end) for p in pieces])
        starts = np.cumsum([0] + [p.end - p.start for p in pieces[:-1]])
        shards = [self.walk.shards[number] for number in sorted({p.shard for p in pieces})]
        changed = [x for x in shards if x.look() != (SHARD_HEADER_BYTES + 2 * x.num_tokens, x.changed)]
        if changed or not np.array_equal(np.flatnonzero(tokens == self.bos_id), starts):
            names = ", ".join(str(shard.path) for shard in changed or shards)
            raise UserError(f"{names}: expected the file that was checked before step 0, found that it was "
                            "written to since; start again, and leave it alone while a run reads it.")
        with torch.cuda.stream(self.stream):  # nothing on the CPU
            parts = [make_batch(*part, self.cu_seqlens_length, self.longest, self.device, self.part_tokens)
                     for part in split_batch(tokens, starts[starts < num_tokens],
                                             self.settings.microbatch_parts)]
        return parts, self.walk.position, self.stream and self.stream.record_event()


def validation_batches(tokens: np.ndarray, s: Settings, rank: int, world_size: int, device: torch.device):
    """Yields (slice number, batch) for this rank's slices of the validation tokens: every world_size-th.

    Slices are cut at fixed places; their pieces start at 0 and wherever a BOS stands.
    """
    size, first = s.val_slice_tokens, np.arange(0, s.val_tokens + 1, s.val_slice_tokens)  # of each slice
    starts = np.union1d(first, np.flatnonzero(tokens[:-1] == s.bos_id))
    longest, places = int(np.diff(starts).max()), np.searchsorted(starts, first)
    length = cu_seqlens_length(size, int(np.diff(places).max()))
    for number in range(rank, len(first) - 1, world_size):
        own = starts[places[number]:places[number + 1]] - first[number]
        yield number, make_batch(tokens[first[number]:first[number + 1] + 1], own, length, longest, device)


# ----------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step


def lr_scale(step: int, s: Settings) -> float:
    """Factor of every learning rate: 1, then linear down to final_lr_frac over the last cooldown_frac."""
    left = (s.num_iterations - step) / s.num_iterations
    if left > s.cooldown_frac or s.cooldown_frac == 0:
        return 1.0
    return s.final_lr_frac + (1 - s.final_lr_frac) * left / s.cooldown_frac


def muon_momentum(step: int, s: Settings) -> float:
    """Muon's momentum, linear over the first muon_momentum_steps."""
    done = min(step / s.muon_momentum_steps, 1) if s.muon_momentum_steps else 1
    return (1 - done) * s.muon_momentum_start + done * s.muon_momentum_end


def attention_windows(step: int, s: Settings) -> tuple[int, int]:
    """(long, short) attention windows in tokens; step num_iterations, after the last, only validates."""
    stages = parse_numbers(s.window_schedule)
    stage = stages[len(stages) * step // (s.num_iterations + 1)]
    return stage * s.window_block, stage // 2 * s.window_block


def window_steps(s: Settings) -> list[int]:
    """The first step of each stage of the window schedule that the run comes to, for the warm-up to visit."""
    stages, steps = len(parse_numbers(s.window_schedule)), s.num_iterations + 1
    return sorted({first for stage in range(stages) if (first := ceil_div(stage * steps, stages)) < steps})


# ----------------------------------------------------------------------------------------------------
# Run: processes and device, clock, log, signals


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    local_rank: int  # on this node
    local_size: int

    @classmethod
    def from_environ(cls, environ) -> "World":
        """As torchrun says; one process where it says nothing. Raises UserError for half a description."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = [name for name in names if environ.get(name)]
        if not given:
            return cls(0, 1, 0, 1)
        try:
            world = cls(*(int(environ[name]) for name in names))
            sane = 0 <= world.local_rank < world.local_size <= world.size and 0 <= world.rank < world.size
        except (KeyError, ValueError):
            sane = False
        if not sane:
            found = ", ".join(f"{name}={environ[name]}" for name in given)
            raise UserError(f"{', '.join(names)}: expected all of them, as torchrun sets them, or none, "
                            f"found {found}.", exit_code=2)
        where = dict(MASTER_ADDR=environ.get("MASTER_ADDR", ""), MASTER_PORT=environ.get("MASTER_PORT", ""))
        if world.size > 1 and not (where["MASTER_ADDR"] and where["MASTER_PORT"].isdecimal()):
            raise UserError(f"{', '.join(where)}: expected where rank 0 listens, as torchrun sets it, found "
                            f"{where} beside WORLD_SIZE={world.size}.", exit_code=2)
        return world


def choose_device(s: Settings, world: World) -> tuple[torch.device, str]:
    """The device of this process and the reason. Raises UserError where DEVICE=cuda cannot be met."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = "as DEVICE says" if s.device != "auto" else f"{'a' if gpus else 'no'} CUDA GPU is here"
    if s.device == "cpu" or (s.device == "auto" and not gpus):
        return torch.device("cpu"), reason
    if world.local_size > gpus:
        raise UserError(f"DEVICE: expected a CUDA GPU for {counted(world.local_size, 'process')} here, found "
                        f"{counted(gpus, 'GPU')}; start fewer (NPROC=... ./run.sh) or set DEVICE=cpu.",
                        exit_code=2)
    return torch.device("cuda", world.local_rank), reason


class Clock:
    """Training time: runs between start() and stop(), each of which waits for the device first."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.started = device, 0.0, None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        self.total, self.started = self.total + self.now() - self.started, None

    def milliseconds(self) -> float:
        """Training time so far. Does not wait for the device while the clock runs."""
        running = 0.0 if self.started is None else time.perf_counter() - self.started
        return 1000 * (self.total + running)


def log_folder(s: Settings) -> Path:
    """LOG_DIR, made where it is missing. Raises UserError where it cannot be written in."""
    folder = Path(s.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"LOG_DIR: expected a folder to write logs in, found {s.log_dir!r}: "
                        f"{error.strerror}; set LOG_DIR to another.") from None


class Log:
    """Output of rank 0: a file that gets every line, and the console; silent on the other ranks.

    On a terminal the steps move one live progress line; in a pipe each prints its line.
    """

    def __init__(self, s: Settings, rank: int):
        self.settings, self.file, self.bar, self.pending, self.val_loss = s, None, None, None, "-"
        self.complete = True
        if rank:
            return
        self.path = log_folder(s) / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.txt"
        self.file = open(self.path, "x", encoding="utf-8", errors="backslashreplace")
        print(f"log: {self.path}", flush=True)

    def write(self, *lines: str, console: bool = True) -> None:
        if self.file is None:
            return
        for line in lines:
            try:
                print(line, file=self.file, flush=True)
            except OSError as error:  # what is lost of a log is not worth a run
                if self.complete:
                    print(f"{self.path}: expected to write the log, found: {error}; the run goes on, and "
                          "its log may lack lines", file=sys.stderr)
                self.complete = False
            if console and self.bar is not None:
                self.bar.write(line, file=sys.stdout)
            elif console:
                print(line, flush=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """The last line of a run that ends before its time says why."""
        self.close_bar()
        if kind is not None:
            self.write(f"ended by {kind.__name__}: {error}", console=False)

    def open_bar(self, first_step: int) -> None:
        """From here on, steps are shown on one live line, if rank 0 has a terminal."""
        if self.file is not None and sys.stdout.isatty():
            from tqdm import tqdm  # only where there is a terminal to draw on

            shape = "step {n_fmt}/{total_fmt} {bar} {postfix}, {remaining} left"
            self.bar = tqdm(total=self.settings.num_iterations, initial=first_step, file=sys.stdout,
                            dynamic_ncols=True, bar_format=shape, leave=False)

    def times(self, step: int, clock: Clock) -> str:
        elapsed = clock.milliseconds()
        return f"train_time:{elapsed:.0f}ms step_avg:{elapsed / max(step, 1):.2f}ms"

    def step(self, step: int, report: "Callable[[], StepReport]", clock: Clock) -> int:
        """Note that `step` steps are enqueued, and write the line of the one before.

        report waits for the step. A GPU has the next step to do while it waits; on the CPU nothing is
        enqueued, so the line is written at once. Returns the stop signal of the step whose line it wrote.
        """
        stop_signal = self.flush(clock)
        self.pending = (step, report)
        return self.flush(clock) if clock.device.type == "cpu" else stop_signal

    def flush(self, clock: Clock) -> int:
        """Write the line that is still to come, if there is one. Returns the stop signal of its step."""
        if self.pending is None:
            return 0
        (step, report), self.pending, s = self.pending, None, self.settings
        loss, stop_signal = report()  # on every rank, so that all stop alike, and none runs further ahead
        if self.file is None:
            return stop_signal
        self.write(f"step:{step}/{s.num_iterations} {self.times(step, clock)} train_loss:{loss:.4f}",
                   console=self.bar is None)
        if self.bar is not None:
            average = clock.milliseconds() / step
            self.bar.set_postfix_str(f"train {loss:.3f}, val {self.val_loss}, {average:.0f} ms/step, "
                                     f"{1000 * s.batch_tokens / average:,.0f} tokens/s", refresh=False)
            self.bar.update(step - self.bar.n)
        return stop_signal

    def validation(self, step: int, val_loss: float, clock: Clock) -> None:
        self.val_loss = f"{val_loss:.3f}"
        times = self.times(step, clock)
        self.write(f"step:{step}/{self.settings.num_iterations} val_loss:{val_loss:.4f} {times}")

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def stopped(self, step: int, number: int) -> None:
        """The final line of a run that a signal ended."""
        self.close_bar()
        name, steps = signal.Signals(number).name, self.settings.num_iterations
        self.write(f"stopped by {name} after step {step} of {steps}")

    def result(self, step: int, val_loss: float, clock: Clock) -> None:
        """The final lines, for people and for programs."""
        self.close_bar()
        s, reached = self.settings, val_loss <= self.settings.target_loss
        self.write(f"target {'' if reached else 'not '}reached: validation loss {val_loss:.4f}, target "
                   f"{s.target_loss:g}, at step {step} of {s.num_iterations}, after "
                   f"{clock.milliseconds() / 1000:.1f} s of training",
                   f"target_reached:{int(reached)} target_loss:{s.target_loss:g} val_loss:{val_loss:.4f} "
                   f"final_step:{step} {self.times(step, clock)}",
                   f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
                   f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")
        if self.file is not None:
            print(f"log: {self.path}", flush=True)


class StopSignal:
    """A context in which SIGTERM and Ctrl-C ask the run to stop: `number` is that of the first, 0 before.

    Another one ends the process at once, unless it comes within a second, in which it counts as the same:
    torchrun passes on to its processes what the terminal has sent to them too. A thread sees to that, since
    Python runs no handler while the main thread waits for other ranks.
    """

    def __init__(self):
        self.number = 0

    def receive(self, number: int, frame) -> None:
        self.number = self.number or number

    def watch(self) -> None:
        first = None
        with open(self.read_end, "rb", buffering=0) as pipe:
            while received := pipe.read(1):  # a byte a signal, and nothing once the other end is closed
                first = first or time.monotonic()
                if time.monotonic() - first > 1:
                    os._exit(128 + received[0])

    def __enter__(self) -> "StopSignal":
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        threading.Thread(target=self.watch, name="signals", daemon=True).start()
        self.before = {n: signal.signal(n, self.receive) for n in (signal.SIGTERM, signal.SIGINT)}
        self.fd_before = signal.set_wakeup_fd(self.write_end)
        return self

    def __exit__(self, *error) -> None:
        signal.set_wakeup_fd(self.fd_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.write_end)


# ----------------------------------------------------------------------------------------------------
# Checkpoints: written and read by all ranks, on any number of them
#
# A checkpoint is a folder step_NNNNNN in the folder of its run, LOG_DIR/RUN.checkpoints:
#   rank_K.bin       of rank K: the length of a JSON index in 8 bytes, the index, and the tensors' bytes: the
#                    parameters (rank 0), this rank's rows of the optimizers' state, its random state;
#   checkpoint.json  step, clock, position in the data, settings, hashes of source and data, and the SHA-256
#                    of every rank's file;
#   complete         the SHA-256 of checkpoint.json; written last, before the folder gets its name.
# Another number of ranks can go on from it: rows are put together in their order, and scaled, since gradients
# are averages over ranks.


class DamagedCheckpoint(Exception):
    """What is wrong with a checkpoint, in a sentence."""


def write_synced(path: Path, *parts) -> str:
    """Write bytes, down to the disk; returns their SHA-256. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """One rank's file; returns its SHA-256. Raises OSError."""
    index, offset = {}, 0
    for name, x in tensors.items():
        index[name] = dict(dtype=str(x.dtype).removeprefix("torch."), shape=list(x.shape), offset=offset)
        offset += x.numel() * x.element_size()
    head = json.dumps(index).encode()
    raw = (x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() for x in tensors.values())
    return write_synced(path, len(head).to_bytes(8, "little"), head, *raw)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a rank's file whose hash was found right. Nothing in it is executed."""
    data = np.fromfile(path, dtype=np.uint8)
    start, found = 8 + int.from_bytes(data[:8].tobytes(), "little"), {}
    for name, about in json.loads(data[8:start].tobytes()).items():
        dtype, first = getattr(torch, about["dtype"]), start + about["offset"]
        raw = data[first:first + math.prod(about["shape"]) * dtype.itemsize].copy()  # for its alignment
        found[name] = torch.from_numpy(raw).view(dtype).view(about["shape"])
    return found


def read_checkpoint(folder: Path) -> dict:
    """checkpoint.json of a whole checkpoint; every byte is checked first. Raises DamagedCheckpoint."""
    def check(name: str, expected: str):
        digest = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != expected:
            found = digest.hexdigest()
            raise DamagedCheckpoint(f"{folder / name}: expected SHA-256 {expected}, found {found}")

    try:
        check("checkpoint.json", (folder / "complete").read_text(encoding="ascii"))
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        for rank, expected in enumerate(about["files"]):
            check(f"rank_{rank}.bin", expected)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder}: expected a whole checkpoint, found {error}") from None
    return about


def sync_folder(folder: Path) -> None:
    """Have the disk hold the names that are in a folder. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints_in(*runs: Path) -> list[Path]:
    """The checkpoints in the folders of runs, the newest first: by step; the run that wrote last first."""
    found = [sorted(run.glob("step_*[0-9]"), key=lambda x: (len(x.name), x.name), reverse=True)
             for run in runs]
    found.sort(key=lambda run: max((x.stat().st_mtime_ns for x in run), default=0), reverse=True)
    return [folder for run in found for folder in run]


def remove(folder: Path) -> None:
    """Remove a checkpoint, or nothing. What a kill leaves of it has no checkpoint's name."""
    with contextlib.suppress(OSError):
        folder = folder.rename(folder.with_suffix(".removed"))
    shutil.rmtree(folder, ignore_errors=True)


def resume_candidates(s: Settings) -> list[Path]:
    """The checkpoints that RESUME may mean, the best first. Raises UserError where it names none."""
    if not s.resume:
        return []
    if s.resume == "auto":
        return checkpoints_in(*(run for run in Path(s.log_dir).glob("*.checkpoints") if not is_alive(run)))
    given = Path(s.resume)
    found = [given] if (given / "complete").exists() else checkpoints_in(given)
    if not found:
        raise UserError("RESUME: expected auto, a checkpoint (with a file `complete`), or a folder of some, "
                        f"found {s.resume!r}; correct it.", exit_code=2)
    return found


def lock(run: Path, create: bool = False) -> int | None:
    """Hold a run's folder while this process lives: a descriptor, or None where another process holds it.

    On a file system without locks nothing is held, and nothing is seen to be. Raises OSError.
    """
    handle = os.open(run / "lock", os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass
    return handle


def is_alive(run: Path) -> bool:
    """Whether some process is writing checkpoints there."""
    try:
        handle = lock(run)
    except OSError:  # it has no lock, or is another user's
        return False
    if handle is not None:
        os.close(handle)
    return handle is None


def from_rank_0(text: str, device: torch.device) -> str:
    """Rank 0's text, on every rank."""
    if not dist.is_initialized():
        return text
    data = torch.tensor(list(os.fsencode(text)), dtype=torch.uint8, device=device)
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, 0)
    data = data if dist.get_rank() == 0 else data.new_empty(int(size))
    if size:
        dist.broadcast(data, 0)
    return os.fsdecode(bytes(data.tolist()))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, by name, uint8."""
    gpu = {"random state of the GPU": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"random state": torch.get_rng_state()} | gpu


def set_random_state(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Put back what random_state gave, so far as this device has such generators."""
    torch.set_rng_state(tensors["random state"])
    if device.type == "cuda" and "random state of the GPU" in tensors:
        torch.cuda.set_rng_state(tensors["random state of the GPU"], device)


class Checkpoints:
    """Puts the state of a run back, and writes it. Every public method is called on all ranks alike."""

    # settings in which a run may differ from the checkpoint that it goes on from
    FREE = {"nproc", "log_dir", "data_path", "checkpoint_every", "checkpoint_last", "checkpoint_keep",
            "resume", "resume_changed"}

    def __init__(self, s: Settings, world: World, model: GPT, optimizers, loader: TrainLoader, clock: Clock,
                 log: Log, hashes: dict[str, str]):
        """hashes: of source and data, by name."""
        self.settings, self.world, self.model, self.optimizers = s, world, model, optimizers
        self.loader, self.clock, self.log, self.hashes = loader, clock, log, hashes
        self.device = clock.device
        self.folder, self.handle, self.damaged = None, None, []

    def settle(self, problem: str) -> None:
        """Raise on all ranks the UserError (exit code 2) that rank 0 has found, if any."""
        problem = from_rank_0(problem, self.device)
        if problem:
            raise UserError(problem, exit_code=2)

    def resume(self) -> int:
        """Put back the checkpoint that RESUME means, if any, and open the run's folder; returns the step.

        Raises UserError where that checkpoint is another run's, where none is whole, and where checkpoints
        are wanted that cannot be written.
        """
        chosen, problem = None, ""
        try:
            chosen = self.choose() if self.world.rank == 0 else None
        except UserError as error:
            problem = str(error)
        self.settle(problem)
        chosen = from_rank_0(str(chosen or ""), self.device)
        step = self.load(Path(chosen)) if chosen else 0
        if self.settings.checkpoint_every or self.settings.checkpoint_last:
            problem = self.open_folder(Path(chosen) if chosen else None) if self.world.rank == 0 else ""
            self.settle(problem)
            self.folder = Path(from_rank_0(str(self.folder), self.device))
        return step

    def choose(self) -> Path | None:
        """The first candidate that is whole and this run's; RESUME=auto passes over those of other runs.

        Raises UserError where there are only others.
        """
        s, damaged, others = self.settings, "", ""
        mine = asdict(s) | self.hashes
        for folder in resume_candidates(s):
            try:
                about = read_checkpoint(folder)
            except DamagedCheckpoint as problem:
                damaged = str(problem)
                self.damaged.append(folder)
                self.log.write(f"checkpoint: damaged: {problem}")
                continue
            theirs = about["settings"] | about["hashes"]
            differing = [f"{name} {theirs.get(name)!r} (here {mine.get(name)!r})"
                         for name in sorted((mine | theirs).keys() - self.FREE)
                         if mine.get(name) != theirs.get(name)]
            if differing and not s.resume_changed:
                others = others or f"{folder} with {', '.join(differing)}"
                if s.resume == "auto":
                    continue
                break
            if about["step"] > s.num_iterations:
                raise UserError(f"RESUME: expected a checkpoint of at most NUM_ITERATIONS={s.num_iterations} "
                                f"steps, found {folder}; raise NUM_ITERATIONS, or name an earlier one.")
            return folder
        if others:
            raise UserError(f"RESUME: expected a checkpoint of this run, found {others}; undo that, name "
                            "another, or set RESUME_CHANGED=1.")
        if damaged:
            raise UserError(f"RESUME: {damaged}, and no other one; name another, or start anew without.")
        if s.resume:
            self.log.write(f"checkpoint: none in {s.log_dir} that no living run holds; starting anew")
        return None

    def optimizer_state(self):
        """(label, tensor, rows over all ranks or None for a number, power of the gradient) of each state."""
        for optimizer in self.optimizers:
            for shard in optimizer.shards:
                num_rows = len(optimizer.as_rows(shard.param.data))
                for key, x in shard.state.items():
                    yield (f"{key} of {shard.name}", x, num_rows if x.dim() else None,
                           optimizer.powers[key])

    @torch.no_grad()
    def load(self, folder: Path) -> int:
        """Put all back from a whole checkpoint; returns its step. Raises UserError if it cannot fit."""
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        saved = [read_tensors(folder / f"rank_{rank}.bin") for rank in range(len(about["files"]))]
        world, nothing = self.world, torch.empty(0)
        position = tuple(about["position"])
        if self.loader.place(position) != about.get("place"):  # it is one in other data
            position = (0, 0)
        self.loader.resume(about["step"], position)

        def put(x: Tensor, label: str, values: Tensor):
            if (x.shape, x.dtype) != (values.shape, values.dtype):
                raise UserError(f"RESUME: expected {label} as {tuple(x.shape)} {x.dtype}, found "
                                f"{tuple(values.shape)} {values.dtype} in {folder}; undo the change.",
                                exit_code=2)
            x.copy_(values)

        for name, p in self.model.named_parameters():
            put(p.data, name, saved[0].get(name, nothing))
        ratio = len(saved) / world.size  # of gradients, which are averages over ranks
        for label, x, num_rows, power in self.optimizer_state():
            values = [tensors.get(label, nothing) for tensors in saved]
            if num_rows is None:
                values = values[0]
            else:
                values = torch.cat(values)[:num_rows]
                padding = values.new_zeros(len(x) * world.size - num_rows, *values.shape[1:])
                values = torch.cat((values, padding)).chunk(world.size)[world.rank]
            put(x, label, values * ratio**power)
        if world.rank < len(saved):  # nothing is drawn after the initial weights; an experiment may
            set_random_state(saved[world.rank], self.device)
        self.clock.total = about["training_seconds"]
        self.log.write(f"resumed: {folder}, step {about['step']}, after {self.clock.total:.1f} s of training"
                       + ", with changes" * self.settings.resume_changed)
        return about["step"]

    def open_folder(self, resumed: Path | None) -> str:
        """On rank 0: go on in the run's folder, or make one, and see that it has room; '' or a problem."""
        s, size = self.settings, sum(x.nbytes for x in self.model.parameters())
        size += self.world.size * sum(x.nbytes for _, x, *_ in self.optimizer_state())
        try:
            if resumed and s.resume == "auto" and not s.resume_changed:
                self.handle = lock(resumed.parent, create=True)  # unless another got there first
            self.folder = resumed.parent if self.handle else self.log.path.with_suffix(".checkpoints")
            self.folder.mkdir(exist_ok=True)
            self.handle = self.handle or lock(self.folder, create=True)
            for rest in self.folder.glob("step_*.[pr]*"):  # .partial and .removed, of a run that was killed
                shutil.rmtree(rest, ignore_errors=True)
            for folder in self.damaged:
                if folder.parent == self.folder:  # so that it is not counted among the newest
                    with contextlib.suppress(OSError):
                        folder.rename(folder.with_suffix(".damaged"))
            with tempfile.TemporaryFile(dir=self.folder):
                free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return (f"LOG_DIR: expected to write checkpoints in {self.folder}, found: {error.strerror}; "
                    "correct it, or set LOG_DIR to another folder.")
        self.log.write(f"checkpoints: the newest {s.checkpoint_keep} in {self.folder}")
        more = max(s.checkpoint_keep - len(checkpoints_in(self.folder)), 0) + 1 if s.checkpoint_every else 1
        return "" if free >= more * size else (
            f"LOG_DIR: expected {more * size / 1e6:,.0f} MB of free disk space at {self.folder}, for "
            f"{counted(more, 'more checkpoint')} (CHECKPOINT_KEEP={s.checkpoint_keep}, and the one that is "
            f"being written), found {free / 1e6:,.0f} MB; make room.")

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps. One that cannot be written is logged, and leaves nothing."""
        if self.folder is None:
            return
        world, device = self.world, self.device
        partial = self.folder / f"step_{step:06d}.partial"
        tensors = dict(self.model.named_parameters()) if world.rank == 0 else {}
        tensors |= {label: x for label, x, *_ in self.optimizer_state()}
        tensors |= random_state(device)
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # then no rank can write
                partial.mkdir()
        if world.size > 1:
            dist.barrier()
        digest, problem = bytes(32), "another rank could not write its file"
        try:
            digest = bytes.fromhex(write_tensors(partial / f"rank_{world.rank}.bin", tensors))
        except OSError as error:
            problem = str(error)
        digests = torch.zeros(world.size, 32, dtype=torch.uint8, device=device)
        digests[world.rank] = torch.tensor(list(digest), dtype=torch.uint8)
        if world.size > 1:
            dist.all_reduce(digests)
        if world.rank == 0:
            self.finish(step, partial, [bytes(row).hex() for row in digests.tolist()], problem)

    def finish(self, step: int, partial: Path, digests: list[str], problem: str) -> None:
        """On rank 0: make the checkpoint whole and remove the oldest; or remove what there is of it."""
        folder = partial.with_suffix("")
        try:
            if "00" * 32 in digests:
                raise OSError(problem)
            position = self.loader.position
            about = dict(step=step, training_seconds=self.clock.total, position=position,
                         place=self.loader.place(position), settings=asdict(self.settings),
                         hashes=self.hashes, log=self.log.path.name, files=digests)
            mark = write_synced(partial / "checkpoint.json", json.dumps(about, indent=1).encode())
            write_synced(partial / "complete", mark.encode())
            sync_folder(partial)
            remove(folder)  # where it is written again
            partial.rename(folder)
            sync_folder(self.folder)
            self.log.write(f"checkpoint: {folder}")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            newest = next(iter(checkpoints_in(self.folder)), "none")
            self.log.write(f"checkpoint: step {step} could not be written: {error}; training goes on, and "
                           f"the newest is {newest}")
        for old in checkpoints_in(self.folder)[self.settings.checkpoint_keep:]:
            remove(old)


# ----------------------------------------------------------------------------------------------------
# Training: what the log begins with, the step, warm-up, validation, the race


def output_of(*command: str) -> str | None:
    """What a program prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def describe_environment(device: torch.device) -> list[str]:
    """What, besides source and settings, it takes to run this again. No environment variable is shown."""
    try:
        triton_version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton_version = "none"
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    lines = [f"Python {sys.version}",
             f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton_version}",
             f"platform: {platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
             f"git commit: {output_of('git', 'rev-parse', 'HEAD') or 'none'}" + ", changed" * bool(changed)]
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines += [f"GPUs of this node: {', '.join(names)}", output_of("nvidia-smi") or "no nvidia-smi"]
    return lines


def describe_settings(s: Settings, overrides: dict[str, str]) -> list[str]:
    marks = {name: "  (overridden)" for name in overrides}
    return [f"{f.name}: {getattr(s, f.name)!r}{marks.get(f.name, '')}" for f in fields(s)]


def describe_model(s: Settings) -> str:
    """Parameter counts by group, from a model without storage."""
    with torch.device("meta"):
        model = GPT(s, plain_kernels())
    counts = {name: p.numel() for name, p in model.named_parameters()}
    groups = " + ".join(f"{count:,} {name}" for name, count in counts.items())
    return f"parameters: {sum(counts.values()):,} = {groups}"


class KeptByAttention(torch.autograd.Function):
    """Attention, so far as memory goes: FlashAttention keeps q, k, v and the result for its backward pass."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(v)
        ctx.save_for_backward(q, k, v, y)
        return y


def estimate_memory(s: Settings, batch: BatchPlan) -> dict[str, int]:
    """Bytes of a GPU's memory that a step takes, if autograd keeps all that it does without torch.compile.

    A forward pass on the meta device, which has shapes and no storage, shows what is kept. The head's share
    is that of fused_head. Validation, the optimizers' working memory and communication come on top of it.
    """
    num_tokens = part_tokens(batch.microbatch_tokens, s)
    with torch.device("meta"):
        kernels = plain_kernels()._replace(
            attention_plan=varlen_plan, attention=lambda q, k, v, *_: KeptByAttention.apply(q, k, v))
        model, inputs = GPT(s, kernels), torch.empty(num_tokens, dtype=torch.int32)
    params, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x  # and no other storage takes its place meanwhile
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        x = model.hidden(inputs, inputs, num_tokens, attention_windows(0, s))
    states = [x for o in make_optimizers(model, s, 0, batch.world_size) for shard in o.shards
              for x in shard.state.values()]
    logits = min(num_tokens, HEAD_CHUNK) * s.padded_vocab
    return dict(
        parameters=sum(p.nbytes for p in model.parameters()),
        gradients=sum(p.nbytes for p in model.parameters()),
        optimizers=sum(x.nbytes for x in states),
        activations=sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in params),
        head=x.nbytes + model.lm_head.numel() * (x.element_size() + 4) + 2 * x.element_size() * logits,
    )


def describe_memory(s: Settings, batch: BatchPlan) -> str:
    parts = estimate_memory(s, batch)
    sizes = " + ".join(f"{size / 1e6:,.0f} {name}" for name, size in parts.items())
    return f"memory a rank, estimated without torch.compile: {sum(parts.values()) / 1e6:,.0f} MB = {sizes}"


def describe_data(shards: list[TokenShard], plan: DataUse, s: Settings) -> str:
    available = sum(shard.num_tokens for shard in shards)
    return (f"data: {s.num_iterations * s.batch_tokens:,} tokens needed, {available:,} available in "
            f"{counted(len(shards), 'shard')}; {plan}")


@contextlib.contextmanager
def telling_of_memory(name: str, what: str, remedy: str):
    """Turns a lack of memory, for `what`, into a UserError that names a setting and a remedy."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; cuBLAS, NCCL and the CPU raise others
        if not re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(error)):
            raise
        raise UserError(f"{name}: expected {what} to fit in memory, found: {str(error).splitlines()[0]}; "
                        f"{remedy}.") from None


def fetch_later(x: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host; the result waits for the copy, but not for what comes after it."""
    if x.device.type == "cpu":
        return lambda: x
    host, arrived = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    arrived.record()

    def value() -> Tensor:
        arrived.synchronize()
        return host

    return value


class StepReport(NamedTuple):
    """What all ranks know of a step that is done."""

    loss: float  # mean over the batch, nats
    stop_signal: int  # the highest that any rank had received by then; 0 for none


def train_step(forward, optimizers, loader: TrainLoader, step: int, s: Settings,
               stop_signal: Callable[[], int] = int) -> Callable[[], StepReport]:
    """One optimizer step. Returns a function that waits until it is done and gives its report.

    That raises UserError where a loss or gradient was not finite on any rank. On the CPU, where nothing needs
    to be waited for, this is raised before the optimizers move; a GPU is not stopped to look, and the host
    finds out while the next step runs: after the weights were spoiled, but before anything of them is kept.
    stop_signal is asked after the backward passes for the signal that this rank has received; 0 for none.
    """
    batch, losses = loader.batch, []
    passes = batch.per_rank * s.microbatch_parts
    for i in range(passes):
        loss = forward(*loader.next_batch(), attention_windows(step, s))
        with reducing_head(optimizers) if i == passes - 1 else contextlib.nullcontext():
            loss.backward()
        losses.append(loss.detach())
    # A row a rank: stop signal, loss, and for each gradient whether its largest entry is no finite number.
    grads = {shard.name: shard.param.grad if shard.sent is None else shard.sent
             for optimizer in optimizers for shard in optimizer.shards}
    largest = torch.stack([torch.linalg.vector_norm(grad, torch.inf).float() for grad in grads.values()])
    names = ["the loss", *(f"the gradient of {name}" for name in grads)]
    table = torch.zeros(batch.world_size, 1 + len(names), device=loss.device)
    row = table[loader.rank]
    row[0], row[1], row[2:] = stop_signal(), torch.stack(losses).sum(), ~largest.isfinite()
    if batch.world_size > 1:
        dist.all_reduce(table)  # on a GPU it waits for this, the host does not
    fetched = fetch_later(table)

    def report() -> StepReport:
        table = fetched().double()
        spoiled = [f"{name} on rank {rank}" for rank, (_, loss, *flags) in enumerate(table.tolist())
                   for name, bad in zip(names, [not math.isfinite(loss), *flags]) if bad]
        if spoiled:
            raise UserError(f"step {step + 1}: expected finite numbers, found others in {', '.join(spoiled)};"
                            " lower the learning rates, or go on from a checkpoint.", everywhere=True)
        return StepReport(table[:, 1].sum().item() / s.batch_tokens, int(table[:, 0].max()))

    if loss.device.type == "cpu":
        report()
    optimizer_step(optimizers, lr_scale=lr_scale(step, s), momentum=muon_momentum(step, s))
    return report


def compiled(model: GPT, s: Settings, **options):
    """model.forward under torch.compile: a graph a window size, and one for the head.

    Each is made for training and for evaluation. A graph gives all its gradients when its backward pass ends:
    with a graph of its own, the head's gradient is on its way to the other ranks while the blocks' is made.
    """
    graphs = 2 * len(window_steps(s))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)
    hidden, head = (torch.compile(part, dynamic=False, fullgraph=True, **options)
                    for part in (model.hidden, model.head))

    def forward(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor, longest: int, windows) -> Tensor:
        return head(hidden(inputs, cu_seqlens, longest, windows), targets)

    return forward


def graphs_compiled(s: Settings) -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if s.torch_compile else 0


def validates(step: int, s: Settings) -> bool:
    """Whether the run validates after `step` steps, if it has not stopped by then."""
    return step == s.num_iterations or (s.val_loss_every > 0 and step % s.val_loss_every == 0)


def warm_up(model: GPT, forward, optimizers, loader: TrainLoader, val_tokens: np.ndarray,
            s: Settings) -> int:
    """Untimed steps at every window size, on real batches; then parameters, state and loader are put back.

    Returns how many there were.
    So that nothing is left to compile, it evaluates at every window size of the validations too.
    Raises RuntimeError if anything is not bit for bit what it was.
    """
    if not s.warmup_steps:
        return 0
    states = [state for o in optimizers for shard in o.shards for state in shard.state.values()]
    tensors = [*(p.data for p in model.parameters()), *states]
    before = [x.to("cpu", copy=True) for x in tensors]  # where a GPU's memory is not needed for it
    position, stages = loader.position, window_steps(s)
    random_states, num_steps = random_state(loader.device), max(s.warmup_steps, len(stages))
    for i in range(num_steps):
        train_step(forward, optimizers, loader, stages[i % len(stages)], s)
        loader.seek(position)
    if s.torch_compile:
        _, batch = next(validation_batches(val_tokens, s, 0, 1, loader.device))
        with evaluation(model, s):
            for windows in {attention_windows(i, s) for i in range(s.num_iterations + 1) if validates(i, s)}:
                forward(*batch, windows)
    set_random_state(random_states, loader.device)
    for x, kept in zip(tensors, before):
        x.copy_(kept)
    if not all(torch.equal(x.cpu(), kept) for x, kept in zip(tensors, before)):
        raise RuntimeError("the warm-up did not put the state back; this is an error in train_gpt.py")
    return num_steps


@contextlib.contextmanager
def evaluation(model: GPT, s: Settings):
    """For forward passes without gradients. Raises UserError for want of memory."""
    less = f"set a divisor of VAL_TOKENS={s.val_tokens} below {s.val_slice_tokens}"
    model.eval()
    with torch.no_grad(), telling_of_memory("VAL_SLICE_TOKENS", "the validation of a slice", less):
        yield
    model.train()


def validate(model: GPT, forward, val_tokens: np.ndarray, s: Settings, world: World, step: int) -> float:
    """Mean loss over all validation tokens, each counted once; the same number on every rank."""
    device = model.scalars.device
    losses = torch.zeros(s.val_tokens // s.val_slice_tokens, device=device)
    with evaluation(model, s):
        for number, batch in validation_batches(val_tokens, s, world.rank, world.size, device):
            losses[number] = forward(*batch, attention_windows(step, s))
    if world.size > 1:  # a slice's loss is a number on one rank and zero on the others: the sum is exact
        dist.all_reduce(losses)
    return losses.double().mean().item()


def train(model: GPT, forward, optimizers, loader: TrainLoader, val_tokens: np.ndarray, s: Settings,
          world: World, log: Log, clock: Clock, checkpoints: Checkpoints, first_step: int = 0) -> int:
    """The race: train and validate until the target or the last step, on a clock that validation stops.

    Returns the exit code: 0, or 128 and the signal that stopped it. Raises UserError where it diverged.
    """
    passes, stop_signal, graphs = loader.passes, 0, graphs_compiled(s)
    log.open_bar(first_step)
    if world.size > 1:
        dist.barrier()  # the clock starts when the last rank is ready
    with StopSignal() as received:
        clock.start()
        for step in range(first_step, s.num_iterations + 1):
            last_step = step == s.num_iterations
            validating = validates(step, s)
            saving = s.checkpoint_every and step % s.checkpoint_every == 0
            if validating or saving or stop_signal:
                clock.stop()
                stop_signal = log.flush(clock) or stop_signal
                if validating:
                    val_loss = validate(model, forward, val_tokens, s, world, step)
                    log.validation(step, val_loss, clock)
                    if not math.isfinite(val_loss):
                        raise UserError(f"step {step}: expected a finite validation loss, found {val_loss}:"
                                        " training has diverged; lower the learning rates.", everywhere=True)
                    last_step = last_step or val_loss <= s.target_loss
                saving = saving or stop_signal or (last_step and s.checkpoint_last)
                if saving and step > first_step:
                    checkpoints.save(step)
                if last_step:
                    break
                if stop_signal:
                    log.stopped(step, stop_signal)
                    return 128 + stop_signal
                clock.start()
            report = train_step(forward, optimizers, loader, step, s, lambda: received.number)
            stop_signal = log.step(step + 1, report, clock)
            if loader.passes > passes:
                passes = loader.passes
                log.write(f"data: pass {passes} over the training shards begins in step {step + 1}")
    if not s.resume_changed:  # which can mean that what was taken before is not known
        log.write(f"data: {loader.use(step)}")
    if s.torch_compile:
        log.write(f"compiled since the warm-up: {counted(graphs_compiled(s) - graphs, 'graph')}")
    log.result(step, val_loss, clock)
    return 0


# ----------------------------------------------------------------------------------------------------
# Launch: from settings to the end of the race; text from a checkpoint; the command line


def ensure_demo_data(s: Settings) -> None:
    """Build the demo's shards where its own patterns find none. Raises UserError where that fails."""
    root, demo = data_root(s), PRESETS["demo"]
    own = [pattern for pattern in (s.train_files, s.val_files) if pattern in demo.values()]
    if all(find_files(root, pattern) for pattern in own):
        return
    command = [sys.executable, str(HERE / "data" / "demo_corpus.py"), str(root / DEMO_DATA)]
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise UserError((result.stderr.strip().splitlines() or ["data/demo_corpus.py failed"])[-1])


def check_compiler(s: Settings, device: torch.device) -> None:
    """Raises UserError (exit code 2) where torch.compile would find no compiler for its code."""
    names = ("CC", "gcc", "clang", "cc") if device.type == "cuda" else ("CXX", "g++", "clang++", "c++")
    if s.torch_compile and not any(map(shutil.which, (os.environ.get(names[0], ""), *names[1:]))):
        raise UserError(f"TORCH_COMPILE: expected a compiler ({', '.join(names[1:])}) on PATH, found none; "
                        "install one (Debian, Ubuntu: apt install build-essential) or set TORCH_COMPILE=0.",
                        exit_code=2)


def planned_world_size(s: Settings, device: torch.device) -> int:
    """How many processes run.sh starts: NPROC, or as many as GPUs and batch allow. Raises UserError."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus and s.nproc > gpus:
        raise UserError(f"NPROC: expected at most {gpus}, one a GPU, found {s.nproc}.", exit_code=2)
    return s.nproc or largest_world_size(s, gpus)


def plan_only(s: Settings, overrides: dict[str, str], why_preset: str, dry_run: bool) -> None:
    """--dry-run and --nproc: all that can be found out before processes are started and a GPU is used."""
    device, why_device = choose_device(s, World(0, 1, 0, 1))
    check_compiler(s, device)
    batch = plan_batch(s, planned_world_size(s, device))
    if dry_run:
        print(why_preset, f"device: {device.type}, {why_device}", "settings:", sep="\n")
        print(*("  " + line for line in describe_settings(s, overrides)), sep="\n")
        print(f"overridden: {', '.join(name.upper() for name in overrides) or 'nothing'}", f"batch: {batch}",
              describe_model(s), describe_memory(s, batch), sep="\n", flush=True)
    ensure_demo_data(s)
    shards, _, plan = check_data(s, batch)
    resume_candidates(s)
    if not dry_run:
        log_folder(s)
    print(describe_data(shards, plan, s) if dry_run else batch.world_size)


def run(s: Settings, overrides: dict[str, str], why_preset: str, world: World) -> int:
    """From settings to the end of the race; returns the exit code. Raises UserError."""
    start, source = time.monotonic(), Path(__file__).read_text(encoding="utf-8")  # before anybody edits it
    device, why_device = choose_device(s, world)
    check_compiler(s, device)
    batch = plan_batch(s, world.size)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if world.local_rank == 0:
        ensure_demo_data(s)
    if world.size > 1:  # waits for every rank, and so for the data
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    shards, val_tokens, plan = check_data(s, batch)

    more = f"set more than {s.microbatch_parts}, for instance {2 * s.microbatch_parts}"
    with Log(s, world.rank) as log, telling_of_memory("MICROBATCH_PARTS", "the step", more):
        kernels, why_kernels = choose_kernels(device, s)
        line = "=" * 100
        log.write(source, line, *describe_environment(device), line, *describe_settings(s, overrides), line,
                  console=False)
        log.write(why_preset, f"device: {device.type}, {why_device}", *why_kernels, f"batch: {batch}",
                  describe_model(s), describe_data(shards, plan, s))

        model = GPT(s, kernels)
        init_weights(model, s.seed)
        model.to(device)
        if world.size > 1:  # ranks on unlike machines might have drawn unlike numbers
            for p in model.parameters():
                dist.broadcast(p.data, 0)
        optimizers = make_optimizers(model, s, world.rank, world.size)
        loader, clock = TrainLoader(shards, s, batch, plan, world.rank, device), Clock(device)
        hashes = dict(source=hashlib.sha256(source.encode()).hexdigest(), data=data_hash(shards, val_tokens))
        checkpoints = Checkpoints(s, world, model, optimizers, loader, clock, log, hashes)
        first_step = checkpoints.resume()
        forward = compiled(model, s) if s.torch_compile else model
        num_steps = warm_up(model, forward, optimizers, loader, val_tokens, s)
        log.write(f"ready after {time.monotonic() - start:.1f} s, with {counted(num_steps, 'step')} of "
                  f"warm-up and {counted(graphs_compiled(s), 'graph')} compiled")
        code = train(model, forward, optimizers, loader, val_tokens, s, world, log, clock, checkpoints,
                     first_step)
    if world.size > 1:  # not after an error: a rank that failed must not wait for the others
        dist.destroy_process_group()
    return code


def data_hash(shards: list[TokenShard], val_tokens: np.ndarray) -> str:
    """SHA-256 of what identifies a run's data: its shards' names and documents, and the validation tokens."""
    digest = hashlib.sha256(val_tokens)
    for shard in shards:
        if shard.starts is not None:
            digest.update(shard.path.name.encode() + shard.starts.tobytes())
    return digest.hexdigest()


def not_in_cache(address: str):
    raise FileNotFoundError(f"{address} is not in tiktoken's cache")


def tokenizer_of(s: Settings):
    """(text -> ids, id -> bytes) of a checkpoint's vocabulary. Raises UserError where it cannot be had."""
    if (s.vocab_size, s.bos_id) == (257, 256):
        return lambda text: list(os.fsencode(text)), lambda token: bytes([token])
    if (s.vocab_size, s.bos_id) != (50_257, 50_256):
        raise UserError(f"--sample: expected a vocabulary of bytes (257 ids) or of GPT-2 (50,257), found "
                        f"{s.vocab_size} ids; no tokenizer for it is known here.")
    try:
        import tiktoken  # only here; python -m pip install tiktoken
        import tiktoken.load

        tiktoken.load.read_file = not_in_cache  # which would fetch what it finds nowhere here
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # the package is not there, or its vocabulary
        raise UserError(f"--sample: expected tiktoken with GPT-2's vocabulary, found: {error!r}; python -m "
                        "pip install tiktoken, and with a network, python -c 'import tiktoken; "
                        "tiktoken.get_encoding(\"gpt2\")'.") from None
    return gpt2.encode_ordinary, gpt2.decode_single_token_bytes


@torch.no_grad()
def sample(folder: Path, prompt: str, length: int, seed: int, temperature: float) -> None:
    """Print the prompt and up to `length` tokens after it, drawn one by one from a checkpoint's model."""
    try:
        about = read_checkpoint(folder)
        s = replace(Settings(**about["settings"]), device="auto")
    except DamagedCheckpoint as problem:
        raise UserError(f"--sample: {problem}; name another.") from None
    except TypeError as error:
        raise UserError(f"--sample: expected a checkpoint of this version's settings, found {error} in "
                        f"{folder}; take the version that wrote it: its log holds the source.") from None
    encode, decode = tokenizer_of(s)
    device = choose_device(s, World(0, 1, 0, 1))[0]
    model = GPT(s, plain_kernels())  # the fast ones take longer to choose than this takes
    saved = read_tensors(folder / "rank_0.bin")
    for name, p in model.named_parameters():
        p.copy_(saved[name])
    model.to(device)
    ids, text = [s.bos_id, *encode(prompt)], codecs.getincrementaldecoder("utf-8")("replace")
    generator, windows = torch.Generator().manual_seed(seed), attention_windows(about["step"], s)
    print(prompt, end="", flush=True)
    for _ in range(length):
        inputs = torch.tensor(ids[-len(model.cos):], dtype=torch.int32, device=device)
        starts = torch.tensor([0, len(inputs)], dtype=torch.int32, device=device)
        x = model.hidden(inputs, starts, len(inputs), windows)[-1]
        logits = 30 * torch.sigmoid((model.lm_head.type_as(x) @ x).float() / 7.5)[:s.vocab_size].cpu()
        chances = torch.softmax(logits / max(temperature, 1e-6), 0)
        ids.append(int(torch.multinomial(chances, 1, generator=generator)))
        if ids[-1] == s.bos_id:  # the document's end
            break
        print(text.decode(decode(ids[-1])), end="", flush=True)
    print(text.decode(b"", final=True))


def parse_arguments(argv) -> argparse.Namespace:
    """The command line; --help lists the settings from the dataclass."""
    rows = ["settings, from the environment:",
            "PRESET\n      speedrun or demo\n      default: speedrun with a CUDA GPU and FineWeb, else demo"]
    for f in fields(Settings):
        demo = PRESETS["demo"].get(f.name, f.default)
        shown = [repr(int(x) if f.type is bool else x) for x in (f.default, demo)]
        default = f"default: {shown[0]}" + (f", in the demo {shown[1]}" if demo != f.default else "")
        unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
        choices = f" (one of {', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        rows.append(f"{f.name.upper()}{unit}\n      {f.metadata['meaning']}{choices}\n      {default}")
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n  ".join(rows),
        description="Train a GPT-2-sized model to a target validation loss in the least wall-clock time.")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, check data, and stop")
    parser.add_argument("--nproc", action="store_true",
                        help="check settings and data, print how many processes to start, and stop")
    parser.add_argument("--sample", type=Path, metavar="CHECKPOINT", help="print text from it, and stop")
    parser.add_argument("--prompt", default="", help="how the text begins")
    parser.add_argument("--length", type=int, default=300, help="most tokens to draw (default: 300)")
    parser.add_argument("--sample-seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest (default: 0.8)")
    args = parser.parse_args(argv)
    if args.length < 0 or not 0 <= args.temperature < math.inf:
        parser.error("expected --length and --temperature of at least 0")
    return args


def main(argv=None) -> int:
    """Returns the exit code: 0; 2 for wrong settings, 1 for what else users can put right; 128 + a signal."""
    args = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the locale cannot show
        stream.reconfigure(errors="backslashreplace")
    speaker = ""
    try:
        if args.sample:
            sample(args.sample, args.prompt, args.length, args.sample_seed, args.temperature)
            return 0
        world = World.from_environ(os.environ)
        speaker = f"rank {world.rank}: " if world.local_rank else ""
        preset, why_preset = choose_preset(os.environ)
        s, overrides = resolve_settings(os.environ, preset)
        if not (args.dry_run or args.nproc):
            return run(s, overrides, why_preset, world)
        if world.rank == 0:
            plan_only(s, overrides, why_preset, args.dry_run)
    except UserError as error:
        if not (error.everywhere and speaker):
            print(f"{speaker}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{speaker}stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
