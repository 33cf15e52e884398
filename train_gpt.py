"""
Train a GPT-2-sized model on FineWeb to a validation loss of 3.28, in the least wall-clock time on 8 H100s.

    ./run.sh                      # picks preset, device and processes for this machine
    NUM_ITERATIONS=200 ./run.sh   # any setting is an environment variable; --help lists them
    torchrun --standalone --nproc_per_node=8 train_gpt.py    # the race: 8 H100 GPUs of one node

The race: 1705 steps of 393,216 tokens; the mean cross-entropy over the first 10,485,760 tokens of the
validation shard must be at most 3.28 nats. Compilation, warm-up and validation are not timed. The code
starts from record 30 of github.com/KellerJordan/modded-nanogpt (September 2025, 163 s); each idea's authors
are named where it is used. Without a GPU, PRESET=demo runs a small version of the race: the same twelve
blocks, 128 wide, on the source code of Python's standard library, with later ideas that made it faster.
PRESET=frontier is record 82 (April 2026, 81.2 s): another network, optimizer and schedule, held to figures
of the published script by tests/test_golden_82.py, and never run on a GPU. Measured so far (records/): the
demo, and the speedrun's shapes on one H200 with FlashAttention 2, 0.64 s a step. No whole race has been run.

Tensor layouts: T tokens of a packed sequence, D model width, H heads, K channels of a head, V padded
vocabulary, N bands of W tokens (plain attention), S document starts. A microbatch is one packed sequence:
whole or cut documents, one after the other; cu_seqlens holds where each begins.
"""

import argparse
import difflib
import gc
import glob
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import groupby, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

# Before PyTorch is imported, which takes seconds:
START = time.monotonic()
PARENT = os.getppid()  # the process that started this one; it changes if that one dies

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.optim.adam import adam
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing: take the Python that has it (. .venv/bin/activate, if ./run.sh has "
             "made it), or install what requirements.txt lists.")

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton: the kernels below are defined, but cannot run
    triton = SimpleNamespace(jit=lambda f: f, autotune=lambda *a, **k: lambda f: f, Config=lambda *a, **k: a)
    tl = SimpleNamespace(constexpr=int)

HERE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------
# Settings

class UserError(Exception):
    """A mistake that the user can correct: printed as one sentence for each problem, without a traceback.
    exit_code: 2 for settings, 1 for everything else. rank: the rank to name, if only one found the error."""
    def __init__(self, *problems: str, exit_code: int = 1, rank: int | None = None):
        super().__init__("\n".join(problems))
        self.exit_code = exit_code
        self.rank = rank

ByStage = tuple[int, ...]
FactorsByStage = tuple[float, ...]

@dataclass(frozen=True)
class Settings:
    """All settings; the defaults are the speedrun's. The environment variable NAME sets field `name`."""

    network: str = "gpt"  # gpt: record 30's and the demo's; frontier: record 82's
    # where it runs
    device: str = "auto"  # auto, cuda or cpu; auto takes CUDA if there is a GPU
    nproc: int = 0  # [processes] to start; 0: one per GPU or CPU core, as many as can share a step
    dtype: str = "bfloat16"  # bfloat16 or float32: activations, embedding tables, Newton-Schulz
    fp8_head: bool = True  # [0 or 1] train the head in float8 if the GPU can and DTYPE is bfloat16
    torch_compile: bool = True  # [0 or 1] compile the blocks with torch.compile (needs a C++ compiler)
    seed: int = 0  # seed of the initial weights
    data_path: str = ""  # [folder] in which the next two patterns start; empty: the script's
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # [pattern] training shards, in name order
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"  # [pattern] validation shards, likewise
    log_dir: str = "logs"  # [folder] each run makes a folder in it, for its log and checkpoints
    checkpoint_every: int = 0  # [steps] save every so many, at a stop and at the end; keep two; 0: never
    resume: str = ""  # checkpoint to continue from; auto: that of the highest step in LOG_DIR, if any
    # the race
    num_iterations: int = 1705  # [steps] length of the run and of its schedules
    target_loss: float = 3.28  # [nats/token] stop at the first validation loss at or below it
    val_loss_every: int = 125  # [steps] validate every so many steps, and at the end; 0: only at the end
    val_tokens: int = 10_485_760  # [tokens] to validate on, from the start of the validation shards
    val_slice_tokens: int = 262_144  # [tokens] of one forward pass; unset: fewer if GPU memory is short
    warmup_steps: int = 30  # [steps] untimed, then undone; each stage takes 1 or more, frontier: 2; 0: none
    sample_tokens: int = 0  # [tokens] to write after an unseen text when the run ends (models of bytes only)
    # a training step's batch. [by stage]: one value, or one for each stage of the run, separated by commas;
    # the longest list says how many stages there are (here three, by window_schedule)
    microbatches: int = 8  # packed sequences per step, all ranks'; unset: more if GPU memory is short
    epochs: int = 1  # [passes] maximum number of passes over the training shards
    batch_tokens: ByStage = (393_216,)  # [tokens, by stage] per step, over all ranks
    max_seq_len: ByStage = (2048,)  # [tokens, by stage] most tokens used of one document
    window_schedule: ByStage = (3, 7, 11)  # [WINDOW_BLOCK, by stage] long windows; the short ones are half
    stage_starts: ByStage = ()  # [step, by stage] first step of each stage; empty: stages of equal length
    stage_lr_factors: FactorsByStage = (1.0,)  # [by stage] of every learning rate
    extension_steps: int = 0  # [steps] of the last stage, after the end of the schedules of rate and stages
    final_val_window: int = 0  # [WINDOW_BLOCK] long window of the last validation; 0: that of the last stage
    token_weights: FactorsByStage = (1.0,)  # of the losses of the next, second next, ... token
    # the model
    vocab_size: int = 50_257  # [ids] that may occur in the data
    vocab_multiple: int = 128  # [ids] the vocabulary is padded to a multiple of this
    bos_id: int = 50_256  # [id] of the token that opens every document
    layout: str = "A AM AM AM AM AM AM M AM AM AM AM"  # a word a block: AM attention, then MLP; A+M: parallel
    value_embeds: str = "012......012"  # one character per block: the number of its value embedding, or a dot
    window_pattern: str = "LSSSLSSLSSSL"  # one character per block: L long attention window, S short
    window_block: int = 128  # [tokens] unit of WINDOW_SCHEDULE
    model_dim: int = 768  # [channels] D
    num_heads: int = 6  # [heads] H
    mlp_dim: int = 3072  # [channels] of an MLP's hidden layer
    attn_scale: float = 0.12  # factor of q.k in the softmax
    gate_channels: int = 12  # [channels] of a block's input that its attention gates read; 0: no gates
    ngram_rows: int = 0  # [rows] of the n-gram table, found by a hash of the last tokens; 0: no table
    ngram_dim: int = 64  # [channels] of the n-gram table, added to the embedding's first channels
    ngram_max: int = 2  # [tokens] of the longest n-gram; the last 2, 3, ... tokens have a row each
    key_offset: bool = False  # [0 or 1] long windows: keys take non-rotary channels from the token before
    equal_qk_start: bool = False  # [0 or 1] with KEY_OFFSET: queries and keys start equal in these channels
    # the optimizers
    muon_lr: float = 0.05  # Muon's learning rate, for the blocks' matrices
    muon_momentum_start: float = 0.85  # Muon's momentum at step 0
    muon_momentum_end: float = 0.95  # Muon's momentum after MUON_MOMENTUM_STEPS
    muon_momentum_steps: int = 300  # [steps] of a linear change from the first to the second
    muon_momentum_cooldown: int = 0  # [steps] at the end of the run, of a linear change back to the first
    adam_lr: float = 0.008  # Adam's learning rate, for all other parameters, before the multiples below
    adam_beta1: float = 0.8  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    embed_lr_mult: float = 75.0  # [x ADAM_LR] for the embedding, the value embeddings and the n-gram table
    scalar_lr_mult: float = 5.0  # [x ADAM_LR] for the blocks' scalars
    cooldown_frac: float = 0.45  # [of the run] last part, in which the learning rates fall linearly
    final_lr_frac: float = 0.1  # [of the learning rate] where the fall ends

    padded_vocab = property(lambda s: round_up(s.vocab_size, s.vocab_multiple))  # V: rows of tables and head
    torch_dtype = property(lambda s: getattr(torch, s.dtype))

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches per step: MICROBATCHES, or one per rank if there are more ranks."""
        return max(self.microbatches, world_size)

# The demo: the same blocks, narrow, on the standard library of the Python that runs this. Bytes are the ids
# 0-255, and 256 is BOS. The folder's name has Python's version, since other versions have other texts.
DEMO_DATA = f"data/demo-{platform.python_version()}"
ON_A_CPU = dict(  # what the demo and the small race share
    dtype="float32", torch_compile=False,
    train_files=f"{DEMO_DATA}/stdlib_train_*.bin", val_files=f"{DEMO_DATA}/stdlib_val_*.bin",
    val_slice_tokens=8192, microbatches=2,
    vocab_size=257, vocab_multiple=8, bos_id=256, num_heads=2,
    window_block=16, key_offset=True, equal_qk_start=True,
    muon_momentum_start=0.7, muon_momentum_end=0.85, muon_momentum_steps=50,
    embed_lr_mult=15.0, scalar_lr_mult=2.0,
)
PRESETS = {
    "speedrun": {},
    "demo": dict(
        ON_A_CPU,
        num_iterations=44, target_loss=1.62, val_loss_every=11, val_tokens=32_768,
        warmup_steps=3, sample_tokens=160, batch_tokens=(1280,),
        model_dim=128, mlp_dim=256, window_schedule=(11, 11, 20),
        gate_channels=0, ngram_rows=65_536, ngram_max=5,
        muon_lr=0.06, adam_lr=0.014, adam_beta1=0.7,
    ),
    # A small race for ideas, to a fixed step; records/2026-11-26_Proxy says what it can tell
    "proxy": dict(
        ON_A_CPU,
        num_iterations=300, target_loss=0.0, val_loss_every=100, val_tokens=65_536,
        warmup_steps=0, batch_tokens=(3072,), model_dim=128, mlp_dim=256,
        muon_lr=0.05, adam_lr=0.009,
    ),
    # Record 82 of modded-nanogpt (April 2026: 81.2 s, 364M tokens); see FrontierGPT
    "frontier": dict(
        network="frontier",
        num_iterations=1385, extension_steps=10,
        batch_tokens=(131_072, 262_144, 393_216, 393_216), stage_lr_factors=(1.0, 1.52, 1.73, 1.73),
        max_seq_len=(896, 2048, 2048, 2048), window_schedule=(3, 7, 11, 13), final_val_window=20,
        token_weights=(1.0, 0.5, 0.25), attn_scale=0.1,
        muon_lr=0.023, muon_momentum_cooldown=50, cooldown_frac=0.6, final_lr_frac=0.15,
    ),
}

def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple

def counted(number: int, noun: str) -> str:
    """'1 rank', '2 ranks', '2 microbatches'."""
    plural = "" if number == 1 else "es" if noun.endswith(("ch", "ss")) else "s"
    return f"{number:,} {noun}{plural}"

def setting_text(value) -> str:
    """A value for a log or a sentence; those of stages as the environment gives them."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)

def restore_settings(saved: dict) -> Settings:
    """The settings from the JSON of a checkpoint, which lacks those that are free to change: they have their
    defaults. For records/sample.py."""
    values = {}
    for f in fields(Settings):
        if f.name in saved:
            values[f.name] = tuple(saved[f.name]) if isinstance(f.default, tuple) else saved[f.name]
    return Settings(**values)

# of an n-gram's newest token, the one before it, ...; the first two are record 62's
HASH_FACTORS = 36313, 27191, 51787, 70937, 91493
BY_STAGE = [f.name for f in fields(Settings)
            if f.type in (ByStage, FactorsByStage) and f.name != "token_weights"]

# The settings that a network does not read
UNREAD = {
    "gpt": {"token_weights"},
    "frontier": {"layout", "value_embeds", "window_pattern", "gate_channels", "ngram_rows", "ngram_dim",
                 "ngram_max", "key_offset", "equal_qk_start", "adam_beta1", "adam_beta2", "embed_lr_mult",
                 "scalar_lr_mult"},
}

def num_stages(s: Settings) -> int:
    """As many as the longest of the settings with a value for each stage says."""
    return max(len(getattr(s, name)) for name in BY_STAGE)

def can_share(s: Settings, world_size: int) -> bool:
    """Whether so many ranks get equal shares of a step's microbatches, each of a multiple of 16 tokens, and
    of the padded vocabulary."""
    count = s.num_microbatches(world_size)
    equal = all(batch_tokens % (16 * count) == 0 for batch_tokens in s.batch_tokens)
    return equal and count % world_size == 0 and s.padded_vocab % world_size == 0

def world_size_problem(s: Settings, world_size: int) -> str:
    """Why `world_size` ranks cannot share a step, or ''."""
    if can_share(s, world_size):
        return ""
    usable = [str(count) for count in range(1, 2 * world_size) if can_share(s, count)]
    return (f"NPROC: expected a number of ranks that can share MICROBATCHES={s.microbatches}, BATCH_TOKENS="
            f"{setting_text(s.batch_tokens)} and {s.padded_vocab} ids equally ({', '.join(usable)}), found "
            f"{world_size}.")

# The values that a number may have, by setting; every other number may be 0 or more.
ABOVE_0 = {"num_iterations", "val_tokens", "val_slice_tokens", "batch_tokens", "microbatches", "max_seq_len",
           "epochs", "vocab_size", "vocab_multiple", "window_block", "model_dim", "num_heads", "mlp_dim",
           "ngram_dim", "attn_scale"}
UP_TO_1 = {"cooldown_frac", "final_lr_frac"}
BELOW_1 = {"muon_momentum_start", "muon_momentum_end", "adam_beta1", "adam_beta2"}

def in_range(name: str, value: float) -> bool:
    """Whether a number may be the value of a setting, or one of its values. NaN is out of every range."""
    if name in UP_TO_1:
        return 0 <= value <= 1
    if name in BELOW_1:
        return 0 <= value < 1
    if name in ABOVE_0:
        return 0 < value < 2**31
    return 0 <= value < 2**31

def describe_range(name: str, number: type) -> str:
    """What a setting expects; number: int or float."""
    if name in UP_TO_1:
        return "a number from 0 to 1"
    if name in BELOW_1:
        return "a number from 0 to below 1"
    if number is int:
        return f"a whole number of at least {int(name in ABOVE_0)}"
    return "a number above 0" if name in ABOVE_0 else "a number of at least 0"

def parse_setting(name: str, kind: type, text: str):
    """The value that a setting has in the environment. Raises ValueError that says what is expected."""
    if kind is str:
        return text
    if kind is bool:
        if text not in ("0", "1"):
            raise ValueError("0 or 1")
        return text == "1"
    by_stage = kind in (ByStage, FactorsByStage)
    parts = text.split(",") if by_stage else [text]
    if name == "stage_starts" and not text:
        parts = []
    number = float if kind in (float, FactorsByStage) else int
    values = []
    for part in parts:
        try:
            value = number(part)
        except ValueError:
            value = math.nan
        if not in_range(name, value):
            raise ValueError(describe_range(name, number))
        values.append(value)
    return tuple(values) if by_stage else values[0]

def find_contradictions(s: Settings) -> list[str]:
    """A sentence for every setting that is out of range or does not fit the others."""
    words = s.layout.split()
    no_attn = [i for i, word in enumerate(words) if "A" not in word and s.value_embeds[i:i + 1].isdecimal()]
    word = r"[AM](\+?[AM])*"
    each = f"for each of the {len(words)} words of LAYOUT"
    count = num_stages(s)
    starts = s.stage_starts
    frontier = s.network == "frontier"
    rows = [  # (setting, whether it fits, what is expected)
        ("network", s.network in UNREAD, " or ".join(UNREAD)),
        ("device", s.device in ("auto", "cuda", "cpu"), "auto, cuda or cpu"),
        ("dtype", s.dtype in ("bfloat16", "float32"), "bfloat16 or float32"),
        ("layout", {*"AM"} <= {*s.layout} and all(re.fullmatch(word, w) for w in words),
         "words such as A, M, AM and A+M, with at least one A and one M"),
        ("value_embeds", re.fullmatch(f"[0-9.]{{{len(words)}}}", s.value_embeds), f"a digit or a dot {each}"),
        ("value_embeds", not no_attn, f"a dot for the blocks without attention, {no_attn}"),
        ("window_pattern", re.fullmatch(f"[LS]{{{len(words)}}}", s.window_pattern), f"L or S {each}"),
        ("window_schedule", min(s.window_schedule, default=0) >= 2,
         "whole numbers of at least 2, separated by commas"),
        ("stage_starts", not starts or (starts[0] == 0 and list(starts) == sorted({*starts})),
         "nothing, or steps that begin with 0 and grow"),
        ("stage_starts", not starts or starts[-1] <= s.num_iterations,
         f"steps up to NUM_ITERATIONS={s.num_iterations}"),
        ("stage_starts", len(starts) in (0, count), f"one value for each of the {count} stages, or none"),
        *((name, len(getattr(s, name)) in (1, count), f"one value, or one for each of the {count} stages")
          for name in BY_STAGE if name != "stage_starts"),
        ("bos_id", s.bos_id < s.vocab_size, f"an id below VOCAB_SIZE={s.vocab_size}"),
        ("batch_tokens", all(n % (16 * s.microbatches) == 0 for n in s.batch_tokens),
         f"a multiple of 16 x MICROBATCHES = {16 * s.microbatches}"),
        ("val_tokens", s.val_tokens % s.val_slice_tokens == 0,
         f"a multiple of VAL_SLICE_TOKENS={s.val_slice_tokens}"),
        ("model_dim", s.model_dim % (4 * s.num_heads) == 0,
         f"a multiple of 4 x NUM_HEADS = {4 * s.num_heads} (half of a head's channels rotate, in pairs)"),
        ("num_heads", s.num_heads % 2 == 0 or not frontier, "an even number, for paired heads"),
        ("model_dim", s.model_dim >= 12 or not frontier, "at least 12, which gates read"),
        ("extension_steps", s.extension_steps < s.num_iterations, f"below NUM_ITERATIONS={s.num_iterations}"),
        ("extension_steps", not s.extension_steps or count > 1 or starts, "0, or settings of several stages"),
        ("gate_channels", s.gate_channels <= s.model_dim or frontier, f"at most MODEL_DIM={s.model_dim}"),
        ("ngram_dim", not s.ngram_rows or s.ngram_dim <= s.model_dim, f"at most MODEL_DIM={s.model_dim}"),
        ("equal_qk_start", s.key_offset or not s.equal_qk_start, "0, or KEY_OFFSET=1 beside it"),
        ("ngram_max", 2 <= s.ngram_max <= len(HASH_FACTORS), f"2 to {len(HASH_FACTORS)}"),
    ]
    found = [f"{name.upper()}: expected {expected}, found {setting_text(getattr(s, name))}."
             for name, fits, expected in rows if not fits]
    if s.nproc and not found and (problem := world_size_problem(s, s.nproc)):
        found.append(problem)
    return found

def is_of_other_program(kind: type, name: str, text: str) -> bool:
    """Whether a variable that is nearly called like setting `name` is rather another program's: many have
    such a folder (LOGDIR), or a text where the setting has a number (MODEL_DIR=/opt/model: MODEL_DIM)."""
    if name in ("LOG_DIR", "DATA_PATH"):
        return True
    return kind not in (str, bool) and text[:1] not in "+-.0123456789"

def read_settings(environ) -> tuple[Settings, list[str], list[str]]:
    """The settings, the names of those that the environment sets, and lines for the log: how the preset was
    chosen, and warnings. Raises UserError (exit code 2) with a sentence for every unknown preset, wrong
    value, near miss of a setting's name, and contradiction."""
    preset, why_preset = choose_preset(environ)
    lines = [why_preset]
    kinds = {f.name.upper(): f.type for f in fields(Settings)}
    known = [*(name for name in kinds if len(name) >= 6), "PRESET"]  # shorter names resemble too many words
    values = dict(PRESETS.get(preset, {}))
    overrides = []
    problems = []
    wrong = set()
    for name in sorted(environ):
        upper = name.upper()
        meant = [upper] if upper in kinds else difflib.get_close_matches(upper, known, n=1, cutoff=0.87)
        if meant and name not in (*meant, "PRESET"):
            near_miss = f"unknown setting; did you mean {meant[0]}?"
            if is_of_other_program(kinds.get(meant[0], str), meant[0], environ[name]):
                lines.append(f"{name}: WARNING: {near_miss} Otherwise leave {name} as it is.")
            else:
                problems.append(f"{name}: {near_miss} Otherwise unset {name}.")
        if name not in kinds:
            continue
        try:
            values[name.lower()] = parse_setting(name.lower(), kinds[name], environ[name])
            overrides.append(name.lower())
        except ValueError as expected:
            problems.append(f"{name}: expected {expected}, found {environ[name]!r}.")
            wrong.add(name)
    settings = Settings(**values)
    for name in overrides:
        if name in UNREAD.get(settings.network, ()):
            network = settings.network
            problems.append(f"{name.upper()}: expected no value, since NETWORK={network} does not read it, "
                            f"found {environ[name.upper()]!r}; unset it.")
    if preset in PRESETS:  # skip cross-checks that involve a value which failed to parse
        problems += [c for c in find_contradictions(settings) if not wrong & set(re.findall(r"\w+", c))]
    else:
        problems.append(f"PRESET: expected one of {', '.join(PRESETS)}, found {preset!r}.")
    if problems:
        raise UserError(*problems, exit_code=2)
    for own, other in (("train_files", "val_files"), ("val_files", "train_files")):
        if own in overrides and other not in overrides:
            lines.append(f"{own.upper()}: WARNING: set without {other.upper()}, which is "
                         f"{getattr(settings, other)}: training and validation may be on different texts")
    return settings, overrides, lines

def find_files(root: Path, pattern: str) -> list[Path]:
    """Files that match, in name order; an absolute pattern stands for itself."""
    paths = map(Path, glob.glob(os.path.join(glob.escape(str(root)), pattern)))
    return sorted(path for path in paths if not path.is_dir())

def choose_preset(environ) -> tuple[str, str]:
    """The preset's name, and a line that says why and how to get another."""
    if "PRESET" in environ:
        return environ["PRESET"], f"preset: {environ['PRESET']}, set by PRESET"
    root = Path(environ.get("DATA_PATH") or HERE)
    shards = find_files(root, environ.get("TRAIN_FILES", Settings.train_files))
    missing = ["no CUDA GPU"] * (not torch.cuda.is_available()) + ["no FineWeb shards"] * (not shards)
    if not missing:
        return "speedrun", "preset: speedrun (a CUDA GPU and FineWeb shards are here); else set PRESET=demo"
    return "demo", (f"preset: demo ({' and '.join(missing)} here); else set PRESET=speedrun"
                    + ", after python data/cached_fineweb10B.py" * (not shards))

# ----------------------------------------------------------------------------------------------------------
# Schedule: a table of what each step is told, made before step 0

class Stage(NamedTuple):
    """A part of the run with one shape of batch and one pair of windows, and so with a graph of its own."""
    first_step: int
    batch_tokens: int  # of a step, over all ranks
    max_seq_len: int  # [tokens] at which a document is cut
    long_window: int  # [tokens]
    short_window: int  # [tokens]
    lr_factor: float  # of every learning rate; the cooldown leads from it to final_lr_frac
    yarn_windows: tuple[int, ...] = ()  # [tokens] the long windows so far, to which YaRN has adapted

class Step(NamedTuple):
    """What one step is told. The validation after n steps uses the stage of step n, which is about to run;
    the schedule has one step more than the run, for the last validation."""
    number: int  # from 0
    stage: Stage
    lr_factor: float  # of every learning rate
    momentum: float  # Muon's
    token_weights: tuple[float, ...] = (1.0,)  # of the losses of the next, second next, ... token
    tied: bool = True  # whether a tied parameter is still a copy

def first_steps(s: Settings) -> list[int]:
    """The first step of each stage."""
    count = num_stages(s)
    if s.stage_starts:
        return list(s.stage_starts)
    if s.extension_steps:  # the last stage (record 35, @classiclarryd)
        scheduled = s.num_iterations - s.extension_steps
        return [round(scheduled * k / (count - 1)) for k in range(count)]
    return [-(-(s.num_iterations + 1) * k // count) for k in range(count)]

def make_stages(s: Settings) -> list[Stage]:
    """The stages of the run (long and short windows: @leloykun; growing windows: @varunneal; growing batches:
    record 46, @varunneal)."""
    def value(values: tuple, k: int):
        return values[k] if len(values) > 1 else values[0]

    stages = []
    for k, first_step in enumerate(first_steps(s)):
        window = value(s.window_schedule, k)
        long_window = window * s.window_block
        stages.append(Stage(
            first_step=first_step,
            batch_tokens=value(s.batch_tokens, k),
            max_seq_len=value(s.max_seq_len, k),
            long_window=long_window,
            short_window=window // 2 * s.window_block,
            lr_factor=value(s.stage_lr_factors, k),
            yarn_windows=(*(stage.long_window for stage in stages), long_window),
        ))
    if s.final_val_window:  # record 35, @classiclarryd: only validated, and YaRN does not adapt to it
        last_window = s.final_val_window * s.window_block
        stages.append(stages[-1]._replace(first_step=s.num_iterations, long_window=last_window))
    return stages

def make_schedule(s: Settings) -> list[Step]:
    """Steps 0 to NUM_ITERATIONS; the last is only validated."""
    stages = make_stages(s)
    two_thirds = math.ceil(2 / 3 * (s.num_iterations - s.extension_steps))
    last_tied = two_thirds // 2 * 2 + 1  # the first odd step from there on (record 53)
    steps = []
    for number in range(s.num_iterations + 1):
        stage = [stage for stage in stages if stage.first_step <= number][-1]
        steps.append(Step(
            number=number,
            stage=stage,
            lr_factor=cool_down(number, stage.lr_factor, s),
            momentum=muon_momentum(number, s),
            token_weights=fade_token_weights(number, stages, s),
            tied=number <= last_tied,
        ))
    return steps

def stages_of(steps: list[Step]) -> list[Stage]:
    """The stages of these steps, each once, in order."""
    return list(dict.fromkeys(step.stage for step in steps))

def stages_between(schedule: list[Step], left: Stage | None, entered: Stage) -> list[Stage]:
    """The stages after `left` (None: from the start) up to and with `entered`, in order."""
    stages = stages_of(schedule)
    first = 0 if left is None else stages.index(left) + 1
    return stages[first:stages.index(entered) + 1]

def cool_down(number: int, factor: float, s: Settings) -> float:
    """The stage's factor, then linear down to final_lr_frac over the last cooldown_frac of the schedule."""
    scheduled = s.num_iterations - s.extension_steps
    left = max(scheduled - number, 0) / scheduled
    if left >= s.cooldown_frac:
        return factor
    done = 1 - left / s.cooldown_frac
    return factor * (1 - done) + s.final_lr_frac * done

def muon_momentum(number: int, s: Settings) -> float:
    """Linear over the first muon_momentum_steps; back over the last muon_momentum_cooldown (record 39)."""
    done = min(number / s.muon_momentum_steps, 1) if s.muon_momentum_steps else 1
    left = s.num_iterations - number
    if left < s.muon_momentum_cooldown:
        done = min(done, left / s.muon_momentum_cooldown)
    return (1 - done) * s.muon_momentum_start + done * s.muon_momentum_end

def fade_token_weights(number: int, stages: list[Stage], s: Settings) -> tuple[float, ...]:
    """TOKEN_WEIGHTS, of which each stage fades out the last that is left, but never the first (record 53,
    @varunneal): with three weights, (1, b, c -> 0), then (1, b -> 0, 0), then (1, 0, 0)."""
    begun = [stage.first_step for stage in stages if stage.first_step <= number]
    left = len(s.token_weights) - len(begun)  # the number of the weight that fades out
    weights = list(s.token_weights)
    for k in range(1, len(weights)):
        if k > left:
            weights[k] = 0.0
    if left > 0:
        ends = [stage.first_step for stage in stages if stage.first_step > number]
        length = (ends[0] if ends else s.num_iterations) - begun[-1]
        weights[left] *= 1 - (number - begun[-1]) / max(length, 1)  # 0: of a stage that is only validated
    return tuple(weights)

# ----------------------------------------------------------------------------------------------------------
# Rules: how a parameter is updated
#
# A rule has its own columns (rates, betas, ...) and two functions: init_state gives its tensors, of any shape
# whose first axis is that of the slice that this rank updates; update changes that slice in place.

def XXT(X: Tensor, base: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """X @ X.T, or alpha * X @ X.T + beta * base, of matrices. X: (n, rows, cols)."""
    return X @ X.mT if base is None else torch.baddbmm(base, X, X.mT, beta=beta, alpha=alpha)

class Orthogonaliser(NamedTuple):
    """Steps X <- a X + (b A + c A A) X, A = X X^T, that bring singular values near 1."""
    coefficients: tuple[tuple[float, float, float], ...]  # (a, b, c) of each step
    margin: float  # X starts as G / (margin |G| + eps): rounding must take no singular value above 1
    eps: float

# Muon's quintic (kellerjordan.github.io/posts/muon), steepest at zero among those whose values stay near 1,
# brings singular values to 1 +- 0.3. Polar Express (Amsel et al., 2025; record 38) has the best polynomial
# for each step.
NEWTON_SCHULZ = Orthogonaliser(((3.4445, -4.7750, 2.0315),) * 5, margin=1.0, eps=1e-7)
POLAR_EXPRESS = Orthogonaliser((
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
), margin=1.02, eps=1e-6)

def newton_schulz(G: Tensor, dtype: torch.dtype, XXT: Callable = XXT,
                  method: Orthogonaliser = NEWTON_SCHULZ) -> Tensor:
    """Nearly orthogonal matrices with the row and column spaces of G, (n, rows, cols), in `dtype`."""
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).to(dtype)  # so that X @ X.T is the smaller product
    X = X / (method.margin * X.norm(dim=(-2, -1), keepdim=True) + method.eps)
    for a, b, c in method.coefficients:
        A = XXT(X)
        B = XXT(A, base=A, alpha=c, beta=b)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X

def mean_square(X: Tensor) -> Tensor:
    """Of each row of tall and square matrices, (n, rows, 1), of each column of wide ones, (n, 1, cols)."""
    return X.square().mean(-1 if X.size(-2) >= X.size(-1) else -2, keepdim=True)

class Muon(NamedTuple):
    """Nesterov momentum, then orthogonalisation of each matrix on its own (Keller Jordan et al., 2024)."""
    lr: float
    dtype: torch.dtype  # of the orthogonalisation
    XXT: Callable = XXT
    method: Orthogonaliser = NEWTON_SCHULZ
    beta2: float = 0.0  # decay of the second moment of the directions (NorMuon); 0: none
    cautious_decay: float = 0.0  # times the rate and lr * lr_factor, where a step shrinks a weight
    every = 1  # of so many steps, the rule takes one

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        state = dict(momentum_buffer=torch.zeros_like(p))
        if self.beta2:
            state["second_moment"] = torch.zeros_like(mean_square(p))
        return state

    def update(self, p: Tensor, grad: Tensor, state, step: Step, factors: Tensor | None = None) -> None:
        """p, grad: (n, rows, cols). factors: (n, 1, 1), of each matrix's learning rate. grad is used up."""
        lr = self.lr * step.lr_factor
        buffer = state["momentum_buffer"].lerp_(grad, 1 - step.momentum)
        direction = newton_schulz(grad.lerp_(buffer, step.momentum), self.dtype, self.XXT, self.method)
        if self.beta2:
            direction = self.even_out(direction.float(), state["second_moment"])
        if self.cautious_decay:  # record 43, @varunneal; >=: a matrix without a gradient decays
            direction = direction + lr * self.cautious_decay * p * (direction * p >= 0)
        if factors is not None:
            direction = direction * factors
        rows, cols = direction.shape[-2:]
        p.add_(direction, alpha=-lr * max(1, rows / cols) ** 0.5)

    def even_out(self, direction: Tensor, second_moment: Tensor) -> Tensor:
        """The directions, float32, with rows (columns) of equal size over time, and the norm that they had
        (NorMuon, Li et al., 2025; record 41, @zichongli5)."""
        second_moment.lerp_(mean_square(direction), 1 - self.beta2)
        even = direction * second_moment.clamp_min(1e-10).rsqrt()
        norm, even_norm = (x.norm(dim=(-2, -1), keepdim=True) for x in (direction, even))
        return even * (norm / even_norm.clamp_min(1e-10))

ADAM_EPS = 1e-10

def cautious_adam(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rate: Tensor,
                  correction: Tensor, betas: tuple[float, float], decay: float) -> None:
    """An update of Adam in place, with weight decay, times the square of the rate, where the step shrinks the
    weight (Liang et al., 2024). rate: () or that of each row; correction: (), for moments that began at 0."""
    grad = grad.float()
    mean = exp_avg.float().lerp(grad, 1 - betas[0])
    square = exp_avg_sq.float().lerp(grad.square(), 1 - betas[1])
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    update = rate * correction * mean / (square.sqrt() + ADAM_EPS)
    weight = p.float()
    p.copy_(weight - update - rate * rate * decay * weight * (update * weight > 0))

class Adam(NamedTuple):
    """Adam (Kingma and Ba, 2015), computed in float32 and rounded once when it is stored. State has the
    parameter's dtype. ADAM_EPS is added to the root of the uncorrected second moment. every: steps that share
    an update (record 39): until it is due, gradients add up in p.grad, on each rank."""
    lr: float
    betas: tuple[float, float]
    cautious_decay: float = 0.0
    every: int = 1
    cautious_adam: Callable = cautious_adam

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        return dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def update(self, p: Tensor, grad: Tensor, state, step: Step, factors: Tensor | None = None) -> None:
        """p, grad: (n, ...). factors: (n, ...), of the learning rate of each row."""
        beta1, beta2 = self.betas
        number = (step.number + 1) // self.every  # of this update, from 1
        lr = self.lr * step.lr_factor
        if self.cautious_decay == 0 and factors is None:  # PyTorch's fused kernel: one pass
            eps = ADAM_EPS / (1 - beta2**number) ** 0.5  # added there to the root of the corrected moment
            steps_done = torch.full((), number - 1, dtype=torch.float32, device=p.device)
            adam([p], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [steps_done], fused=True,
                 amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=0.0, eps=eps, maximize=False)
            return
        # as tensors, so that torch.compile makes no graph for each of their values
        rate = torch.full((), lr, device=p.device)
        correction = torch.full((), (1 - beta2**number) ** 0.5 / (1 - beta1**number), device=p.device)
        if factors is not None:
            rate = rate * factors
        moments = state["exp_avg"], state["exp_avg_sq"]
        self.cautious_adam(p, grad, *moments, rate, correction, self.betas, self.cautious_decay)

class Row(NamedTuple):
    """A parameter, declared once: the model, its initial values and the optimizer read it here. A parameter
    with matrices is a bank: a stack of matrices of one shape."""
    shape: tuple[int, ...]  # at least one axis; unless tiny, the first is padded to a multiple of the ranks
    rule: Muon | Adam
    init: Callable[[Tensor, torch.Generator], None]  # fills the float32 values, which are zero
    dtype: torch.dtype = torch.float32
    tiny: bool = False  # every rank updates all of it; all tiny parameters share one all_reduce
    copy_of: str = ""  # the parameter to which it is tied, as a copy, from the start up to the last Step.tied
    factors: tuple[float, ...] = ()  # of the learning rate, for each of the first axis

def zeros(values: Tensor, generator: torch.Generator) -> None:
    """Initial values of zero."""

def normal(std: float) -> Callable:
    """Initial values from a normal distribution."""
    def init(values: Tensor, generator: torch.Generator) -> None:
        values.normal_(std=std, generator=generator)
    return init

def uniform(bound: float) -> Callable:
    """Initial values from a uniform distribution in +-bound."""
    def init(values: Tensor, generator: torch.Generator) -> None:
        values.uniform_(-bound, bound, generator=generator)
    return init

def uniform_first(bound: float) -> Callable:
    """Of the pairs of matrices in a bank, the first from a uniform distribution in +-bound; the second starts
    at zero."""
    def init(values: Tensor, generator: torch.Generator) -> None:
        values.unflatten(0, (-1, 2))[:, 0].uniform_(-bound, bound, generator=generator)
    return init

def constant(start: float | tuple[float, ...]) -> Callable:
    """These initial values."""
    def init(values: Tensor, generator: torch.Generator) -> None:
        values[:] = torch.tensor(start)
    return init

# ----------------------------------------------------------------------------------------------------------
# Model

def rotary_frequencies(head_dim: int) -> Tensor:
    """(K // 4,), radians a token: (1/1024)^(j/(n-1)), j = 0 .. n-1 (modded-nanogpt, @YouJiacheng)."""
    return (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)

def rotary_cos_sin(num_tokens: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos, (T, 1, 1, K // 2), and sin and -sin, (T, 1, 2, K // 2), of every position's angles, float32.
    Half-truncated RoPE: of the K // 2 pairs, the first half have a frequency; the others do not rotate."""
    frequencies = torch.cat((frequencies, torch.zeros_like(frequencies)))
    positions = torch.arange(num_tokens, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(positions, frequencies)[:, None, None]
    sin = angles.sin()
    return angles.cos(), torch.cat((sin, -sin), dim=-2)

def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021); x: (T, H, K), float32; channel j pairs with j + K // 2.
    With the halves (a, b) of x: (a cos + b sin, b cos - a sin). One formula for both halves, since
    torch.compile would compute each of two formulas for all channels. flip fuses better than roll."""
    x = x.unflatten(-1, (2, -1))
    return (x * cos).addcmul_(x.flip(-2), sin).flatten(-2)

# A norm keeps its result and the scale for the backward pass. Scaling its input does not change it, so the
# gradient has no part along the result.

def scale_to_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """x scaled to a mean square of 1 over the last axis, and the scale (..., 1); x: float32."""
    scale = (x.square().mean(-1, keepdim=True) + 2**-23).rsqrt()
    return x * scale, scale

def norm_backward(y: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    """The gradient, float32, of x, of which y = x * scale is the norm."""
    grad = grad.float()
    along = (grad * y).mean(-1, keepdim=True)
    return torch.addcmul(grad, along, y.float(), value=-1).mul_(scale)

class Norm(torch.autograd.Function):
    """RMS norm without a gain, computed in float32."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y, scale = scale_to_norm(x.float())
        y = y.type_as(x)
        ctx.save_for_backward(y, scale)
        return y.view_as(y)  # y itself may have no gradient under torch.compile of PyTorch 2.11

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return norm_backward(y, scale, grad).type_as(y)

class RotaryNorm(torch.autograd.Function):
    """The norm of queries or keys, rotated; x: (T, H, K). A rotation leaves lengths as they are, so it may
    come before the norm: then only the result, which attention keeps anyway, is kept."""
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, scale = scale_to_norm(apply_rotary(x.float(), cos, sin))
        y = y.type_as(x)
        ctx.save_for_backward(y, scale, cos, sin)
        return y.view_as(y)  # as in Norm

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, scale, cos, sin = ctx.saved_tensors
        x_grad = apply_rotary(norm_backward(y, scale, grad), cos, -sin)
        return x_grad.type_as(y), None, None

def norm(x: Tensor) -> Tensor:
    return Norm.apply(x)

def norm_and_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return RotaryNorm.apply(x, cos, sin)

def offset_keys(k: Tensor) -> Tensor:
    """Keys (T, H, K) that take their non-rotary channels from the token before, so that a query can find what
    followed its own token earlier in the text, in one layer (record 49 of modded-nanogpt). Documents' borders
    are ignored here."""
    rotating, standing = k.unflatten(-1, (2, 2, -1)).unbind(-2)  # of both halves of K: (T, H, 2, K // 4)
    return torch.stack((rotating, torch.cat((standing[:1], standing[:-1]))), dim=-2).flatten(-3)

def banded_mask(cu_seqlens: Tensor, num_tokens: int, window: int, max_seqlen: int, dtype: torch.dtype):
    """The additive mask of banded_attention, (N, 1, W, 2W) of 0 and -inf, for all blocks that share a window.
    cu_seqlens: (S,) int32, ascending, padded with num_tokens. Query i may see key j if both are of the same
    document and 0 <= i - j <= window. Plain attention cuts the sequence into N bands as long as the window,
    W tokens, so that these keys are in i's own band and the one before: scores take T x 2W, not T x T."""
    band = min(window, num_tokens)
    num_bands = -(-num_tokens // band)
    query = torch.arange(num_bands * band, device=cu_seqlens.device).view(num_bands, band, 1)
    key = query[:, :1] + torch.arange(-band, band, device=cu_seqlens.device)
    # The number of starts at or before a position tells documents apart; it is 0 before the first token.
    query_document, key_document = (torch.searchsorted(cu_seqlens, x.int(), right=True) for x in (query, key))
    visible = (key <= query) & (query - key <= band) & (key_document == query_document)
    return torch.where(visible, 0.0, -torch.inf).to(dtype).unsqueeze(1)

def banded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v of a packed sequence. q, k, v and the result: (T, H, K)."""
    num_tokens = len(q)
    num_bands = mask.size(0)
    band = mask.size(2)
    padding = (0, 0, 0, 0, band, num_bands * band - num_tokens)  # the mask hides it
    q, k, v = (F.pad(x, padding).unflatten(0, (-1, band)) for x in (q, k, v))
    k, v = (torch.cat((x[:-1], x[1:]), dim=1) for x in (k, v))  # -> (N, 2W, H, K)
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[1:], k, v)), mask, scale=scale)
    return y.transpose(1, 2).flatten(0, 1)[:num_tokens]

class GatedQKV(torch.autograd.Function):
    """x @ w_qkv.T, and the gates' logits, x[:, :C] @ gate.T. In the backward pass the gradient of the C
    columns is added to that of all of them, instead of in a tensor of its own that is nearly all zeros."""
    @staticmethod
    def forward(ctx, x: Tensor, w_qkv: Tensor, gate: Tensor):
        ctx.save_for_backward(x, w_qkv, gate)
        return F.linear(x, w_qkv), F.linear(x[:, :gate.size(1)], gate)

    @staticmethod
    def backward(ctx, qkv_grad: Tensor, gate_grad: Tensor):
        x, w_qkv, gate = ctx.saved_tensors
        x_grad = qkv_grad @ w_qkv
        x_grad[:, :gate.size(1)] += gate_grad @ gate
        return x_grad, qkv_grad.mT @ x, gate_grad.mT @ x[:, :gate.size(1)]

class ReluSquared(torch.autograd.Function):
    """relu(x)^2 (So et al., 2021). Keeps only its result, whose root is relu(x), for the backward pass."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.relu().square_()
        ctx.save_for_backward(y)
        return y.view_as(y)  # as in Norm

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # in place: fresh memory is slow on a CPU, and so is the root of 0
        return ctx.saved_tensors[0].clamp_min(1e-30).sqrt_().mul_(2).mul_(grad)

def softcapped_logits(x: Tensor, weight: Tensor) -> Tensor:
    """30 * sigmoid(x @ weight.T / 7.5), float32. x: (..., D) in the activations' dtype; weight: (V, D), the
    float32 master, cast here. The cap is as in Gemma 2 (@KoszarskyB); sigmoid and constants: @YouJiacheng."""
    return 30 * torch.sigmoid(F.linear(x, weight.type_as(x)).float() / 7.5)

def softcapped_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies over the tokens, a float32 scalar. x: (T, D); targets: (T,) int64."""
    return F.cross_entropy(softcapped_logits(x, weight), targets, reduction="sum")

class Kernels(NamedTuple):
    """What a run uses where there is a choice; the defaults are plain PyTorch."""
    attn_args: Callable = banded_mask
    attention: Callable = banded_attention
    head_loss: Callable = softcapped_loss
    XXT: Callable = XXT
    compiled: bool = False  # whether torch.compile writes the blocks' kernels
    cautious_adam: Callable = cautious_adam

class Block(NamedTuple):
    """One block of the network."""
    sublayers: list[list[tuple[str, int]]]  # AM: [[("A", 3)], [("M", 2)]]; A+M: [[("A", 3), ("M", 2)]]
    value_embed: int | None  # number of its value embedding
    long_window: bool
    skip_from: int | None  # number of the block whose output is added before anything else

class BlockScalars(NamedTuple):
    """The learned scalars of a block, and where they start."""
    skip_weight: float | Tensor = 1.0  # of the output of block skip_from (U-net skips: @brendanh0gan)
    lambda_x: float | Tensor = 1.0  # mix the embedding back in (@KoszarskyB): of the block's input
    lambda_x0: float | Tensor = 0.0  # and of the embedding
    lambda_v: float | Tensor = 0.5  # of the values
    lambda_ve: float | Tensor = 0.5  # of the value embedding

def parse_layout(s: Settings) -> list[Block]:
    """The network's blocks, from the three layout strings (no MLP in block 0: @EmelyanenkoK, PR 120). The
    second half of the blocks takes the outputs of the first half, the last first."""
    words = s.layout.split()
    counts = dict(A=0, M=0)
    blocks = []
    for i, word in enumerate(words):
        sublayers = []
        for parallel in re.findall(r"[AM](?:\+[AM])*", word):
            parts = []
            for kind in parallel.split("+"):
                parts.append((kind, counts[kind]))
                counts[kind] += 1
            sublayers.append(parts)
        value_embed = None if s.value_embeds[i] == "." else int(s.value_embeds[i])
        mirrored = len(words) - 1 - i
        skip_from = mirrored if mirrored < len(words) // 2 else None
        blocks.append(Block(sublayers, value_embed, s.window_pattern[i] == "L", skip_from))
    return blocks

class Network(nn.Module):
    """What the networks share: a parameter for each row, rotary tables, and how the loop calls them. The
    matrices of all blocks lie in banks: Muon needs one reduce-scatter, Newton-Schulz and all-gather for each
    bank. Unless a parameter is tiny, its first axis is rounded up to a multiple of world_size: each rank owns
    an equal share, and what is added stays zero."""
    plain_kernels = Kernels()
    positions_per_token = 1  # that the rotary tables have

    def __init__(self, s: Settings, kernels: Kernels, world_size: int = 1):
        super().__init__()
        self.settings = s
        self.kernels = kernels
        self.rows = self.declare_parameters(s, kernels)
        for name, row in self.rows.items():
            first = row.shape[0] if row.tiny else round_up(row.shape[0], world_size)
            self.register_parameter(name, nn.Parameter(torch.empty(first, *row.shape[1:], dtype=row.dtype)))
        self.most_tokens = max(max(s.batch_tokens) // s.microbatches, s.val_slice_tokens)
        frequencies = rotary_frequencies(s.model_dim // s.num_heads)
        cos, sin = rotary_cos_sin(self.positions_per_token * self.most_tokens, frequencies)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    device = property(lambda self: self.lm_head.device)

    def enter_stage(self, stage: Stage) -> None:
        """What changes when a stage begins, beyond its batch, windows and rate: here nothing. It may change
        buffers only: the warm-up puts them back. Called for each stage in turn, and again for all that have
        begun when a run resumes."""

    def training_loss(self, batch: "Batch", step: Step) -> tuple[Tensor, Tensor]:
        """What is minimised, and the next token's loss for the log; both summed over the tokens."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                stage: Stage) -> Tensor:
        """Validation: the next token's cross-entropy in nats, summed over the tokens, a float32 scalar. The
        first four arguments are a Batch."""
        x = self.hidden(inputs, cu_seqlens, max_seqlen, stage)
        chunks = zip(x.split(8192), targets.split(8192))  # to save memory
        losses = [F.cross_entropy(self.logits(part), target, reduction="sum") for part, target in chunks]
        return torch.stack(losses).sum()

class GPT(Network):
    """Record 30's network, and the demo's three ideas, off by default."""
    def __init__(self, s: Settings, kernels: Kernels, world_size: int = 1):
        super().__init__(s, kernels, world_size)
        self.blocks = parse_layout(s)

    @staticmethod
    def declare_parameters(s: Settings, kernels: Kernels) -> dict[str, Row]:
        """name -> row, in the order in which initial values are drawn."""
        dim = s.model_dim
        vocab = s.padded_vocab
        num_attn = s.layout.count("A")
        num_mlp = s.layout.count("M")
        num_tables = max((int(c) + 1 for c in s.value_embeds if c.isdecimal()), default=0)
        bound = 3**0.5 * 0.5 * dim**-0.5  # uniform within +-bound has std 0.5 / sqrt(D)
        with_offset = []  # the attentions whose keys have an offset
        for block in parse_layout(s):
            if block.long_window:
                with_offset += [number for parts in block.sublayers for kind, number in parts if kind == "A"]

        def init_attn(values: Tensor, generator: torch.Generator) -> None:
            """q, k and v; the output projections start at zero."""
            matrices = values.unflatten(0, (-1, 4))
            matrices[:, :3].uniform_(-bound, bound, generator=generator)
            if s.equal_qk_start:  # a query finds what followed its own token before anything is learned
                channels = matrices.unflatten(2, (s.num_heads, 2, 2, -1))
                channels[with_offset, 1, :, :, 1] = channels[with_offset, 0, :, :, 1]

        def adam_rule(lr_mult: float) -> Adam:
            return Adam(s.adam_lr * lr_mult, (s.adam_beta1, s.adam_beta2))

        muon = Muon(s.muon_lr, s.torch_dtype, kernels.XXT)
        dtype = s.torch_dtype
        tables = adam_rule(s.embed_lr_mult)
        rows = {"embed": Row((vocab, dim), tables, normal(1.0), dtype)}
        if s.ngram_rows:
            rows["ngrams"] = Row((s.ngram_rows, s.ngram_dim), tables, zeros, dtype)
        if num_tables:  # the tables end to end
            rows["value_embeds"] = Row((num_tables * vocab, dim), tables, normal(1.0), dtype)
        rows["attn_bank"] = Row((4 * num_attn, dim, dim), muon, init_attn)  # q, k, v, output, for each
        if s.gate_channels:
            rows["gate_bank"] = Row((num_attn, s.num_heads, s.gate_channels), muon, zeros, tiny=True)
        # c_fc and c_proj of each MLP; c_proj is stored as (D, hidden), too, so that both stack
        rows["mlp_bank"] = Row((2 * num_mlp, dim, s.mlp_dim), muon, uniform_first(bound))
        rows["lm_head"] = Row((vocab, dim), adam_rule(1), zeros)
        scalars = len(s.layout.split()), len(BlockScalars._fields)
        rows["scalars"] = Row(scalars, adam_rule(s.scalar_lr_mult), constant(BlockScalars()), tiny=True)
        return rows

    def training_loss(self, batch: "Batch", step: Step) -> tuple[Tensor, Tensor]:
        x = self.hidden(batch.inputs, batch.cu_seqlens, batch.max_seqlen, step.stage)
        loss = self.kernels.head_loss(x, self.lm_head, batch.targets)
        return loss, loss.detach()

    def hidden(self, inputs: Tensor, cu_seqlens: Tensor, max_seqlen: int, stage: Stage) -> Tensor:
        """The blocks: token ids (T,) -> the head's input (T, D), in the activations' dtype."""
        s = self.settings
        attn_args = {}
        for window in dict.fromkeys((stage.long_window, stage.short_window)):
            packing = cu_seqlens, len(inputs), window, max_seqlen, s.torch_dtype
            attn_args[window] = self.kernels.attn_args(*packing)
        x = x0 = norm(self.look_up_embed(inputs))
        value_embeds = self.look_up_value_embeds(inputs)
        attentions, mlps = self.split_banks()
        outputs = {}
        for i, (block, row) in enumerate(zip(self.blocks, self.scalars.unbind())):
            scalars = BlockScalars(*row.unbind())
            if block.skip_from is not None:
                x = x + scalars.skip_weight * outputs.pop(block.skip_from)
            x = scalars.lambda_x * x + scalars.lambda_x0 * x0
            window = stage.long_window if block.long_window else stage.short_window
            for parts in block.sublayers:
                x_in = norm(x)
                for kind, number in parts:
                    if kind == "A":
                        weights = attentions[number]
                        ve = None if block.value_embed is None else value_embeds[block.value_embed]
                        offset = s.key_offset and block.long_window
                        x = x + self.attention(x_in, weights, scalars, ve, attn_args[window], offset)
                    else:
                        c_fc, c_proj = mlps[number]  # both (D, hidden) (@byronxu99, PR 109)
                        x = x + F.linear(ReluSquared.apply(x_in @ c_fc), c_proj)
            if i < len(self.blocks) // 2:
                outputs[i] = x
        return norm(x)

    def attention(self, x: Tensor, weights, scalars: BlockScalars, ve: Tensor | None, attn_args,
                  offset: bool) -> Tensor:
        """One attention; x: (T, D), normalised; ve: (T, D)."""
        s = self.settings
        w_qkv, w_o, gate = weights  # (3D, D), (D, D) and (H, channels) or None
        qkv, gate_logits = (F.linear(x, w_qkv), None) if gate is None else GatedQKV.apply(x, w_qkv, gate)
        q, k, v = qkv.view(len(x), 3 * s.num_heads, -1).chunk(3, dim=1)
        cos = self.cos[:len(x)]
        sin = self.sin[:len(x)]
        q = norm_and_rotate(q, cos, sin)
        k = norm_and_rotate(k, cos, sin)
        if offset:
            k = offset_keys(k)
        if ve is None:
            w_o = scalars.lambda_v * w_o  # the same as a factor of v, which has far more elements
        else:  # value embeddings (Zhou et al., 2024; @KoszarskyB)
            v = scalars.lambda_v * v + scalars.lambda_ve * ve.view_as(v)
        y = self.kernels.attention(q, k, v, attn_args, s.attn_scale)
        if gate is not None:  # sparse attention gate, one for each head and token (@classiclarryd, PR 117)
            y = y * torch.sigmoid(gate_logits).unsqueeze(-1)
        return F.linear(y.flatten(1), w_o)

    def logits(self, x: Tensor) -> Tensor:
        return softcapped_logits(x, self.lm_head)

    def look_up_embed(self, inputs: Tensor) -> Tensor:
        """The embedding, (T, D), and in its first channels the sum of the rows for the last 2, 3, ... tokens.
        (Bigrams: record 62 of modded-nanogpt, which adds them before every block. In the demo, whose tokens
        are bytes, longer n-grams play the part of words. Documents' borders are ignored.)"""
        x = F.embedding(inputs, self.embed)
        if "ngrams" not in self.rows:
            return x
        ids = inputs.long()
        hashes = []
        total = HASH_FACTORS[0] * ids
        for back in range(1, self.settings.ngram_max):
            total = total ^ HASH_FACTORS[back] * F.pad(ids, (back, 0))[:len(ids)]
            hashes.append(total % self.settings.ngram_rows)
        rows = F.embedding(torch.stack(hashes), self.ngrams).sum(0)
        return x + F.pad(rows, (0, x.size(1) - rows.size(1)))

    def look_up_value_embeds(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The rows of each value embedding, (T, D) each; all tables in one look-up."""
        if "value_embeds" not in self.rows:
            return ()
        last = self.rows["value_embeds"].shape[0]
        first_rows = torch.arange(0, last, self.settings.padded_vocab, device=inputs.device)
        return F.embedding(inputs + first_rows[:, None], self.value_embeds).unbind()

    def split_banks(self):
        """[(w_qkv, w_o, gate), ...] of the attentions and [(c_fc, c_proj), ...] of the MLPs, each cast to the
        activations' dtype. Of unbind and split, the backward pass is one concatenation; a loop over the bank
        would compile to a sum of bank-sized tensors, one for each matrix."""
        dim = self.settings.model_dim
        dtype = self.settings.torch_dtype
        num_attn = self.settings.layout.count("A")
        num_mlp = self.settings.layout.count("M")
        flat = self.attn_bank.flatten(0, 1)
        sizes = (3 * dim, dim) * num_attn
        attn = [w.to(dtype) for w in flat.split((*sizes, len(flat) - sum(sizes)))]
        gates = [None] * num_attn
        if "gate_bank" in self.rows:
            gates = [w.to(dtype) for w in self.gate_bank.unbind()]
        mlp = [w.to(dtype) for w in self.mlp_bank.unbind()]
        attentions = [(attn[2 * i], attn[2 * i + 1], gates[i]) for i in range(num_attn)]
        mlps = [(mlp[2 * i], mlp[2 * i + 1]) for i in range(num_mlp)]
        return attentions, mlps

# Record 82, in the order in which a token meets its ideas. Authors are named where the pull request of the
# record could be read.

GATE_CHANNELS = 12  # of their input, that gates read
MUDD_DIM = 64  # hidden channels of the small MLPs of record 81

# The attention of blocks 0 to 10. P: paired heads in a short window (record 58); S: a short window; L: a long
# one, with key offset; -: none. All but P leave out a share of a token's own value.
ATTENTIONS = "PSPLSP-SSPL"
VALUE_TABLES = {1: 0, 2: 1, 8: 2, 9: 3}  # block -> its table (records 63 and 70); block 10 has the fifth
MUDD_COUNTS = 14, 5  # of the coefficients of the last block, and of those of the head's input
MUDD_STARTS = (  # of the coefficients of the last block and of the head's input, before the scale of 0.1
    *(0.0,) * 6, 20.0, 20.0, 10 * 1.1**0.5, 10.0, 0.0, 0.5, 10 * 1.1**0.5, 10.0,
    0.0, -5.0, 0.0, 0.0, 0.0,
)

def yarn(frequencies: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Rotary frequencies after the long window has grown to each of `windows` [tokens] in turn. A channel
    that turns less than once in the old window slows down as the window grows, one that turns more than 32
    times stays (YaRN, Peng et al., 2023; record 31)."""
    for old, new in zip(windows, windows[1:]):
        turns = old * frequencies / (2 * math.pi)
        kept = ((turns - 1) / 31).clamp(0, 1)
        frequencies = frequencies * (old / new + kept * (1 - old / new))
    return frequencies

def yarn_attn_scale(scale: float, windows: tuple[int, ...]) -> float:
    """The factor of q.k, which grows with the window, too."""
    for old, new in zip(windows, windows[1:]):
        scale *= 1 + 0.2 * math.log(new / old)
    return scale

# The gradient of a table is an operation of its own, PyTorch's: torch.compile would add up the rows in a
# float32 table and round that to the table's dtype, which moves several times the bytes. Record 30, above,
# has F.embedding, with which it was measured on a GPU.

@torch.library.custom_op("train_gpt::table_gradient", mutates_args=())
def table_gradient(row_grads: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(row_grads, ids, num_rows, -1, False)

@table_gradient.register_fake
def _(row_grads, ids, num_rows):
    return row_grads.new_empty(num_rows, row_grads.size(-1))

class LookUp(torch.autograd.Function):
    """The rows `ids` of a table."""
    @staticmethod
    def forward(ctx, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = len(table)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, row_grads: Tensor):
        return table_gradient(row_grads.contiguous(), ctx.saved_tensors[0], ctx.num_rows), None

def smear(e: Tensor, gate: Tensor, factor: Tensor) -> Tensor:
    """Each embedding, plus a gated share of the one before it, across documents (record 34,
    @classiclarryd)."""
    share = factor * torch.sigmoid(F.linear(e[1:, :GATE_CHANNELS], gate))
    return torch.cat((e[:1], e[1:] + share * e[:-1]))

def bigram_rows(inputs: Tensor, num_rows: int) -> Tensor:
    """The row of each token and the one before it, (T,) int32, by a hash in 32 bits (record 62,
    @classiclarryd). The first token has the last row, which is also the second one's predecessor."""
    last = num_rows - 1
    first = torch.full_like(inputs[:1], last)
    before = torch.cat((first, inputs[1:-1]))
    rows = (HASH_FACTORS[0] * inputs[1:]) ^ (HASH_FACTORS[1] * before)
    return torch.cat((first, rows % last))

def skip_share(x0: Tensor, gate: Tensor, factor: Tensor) -> Tensor:
    """(T, 1): how much of the stream after block 3 each token takes (record 45; gate: 55, @classiclarryd)."""
    return 2 * torch.sigmoid(factor) * torch.sigmoid(F.linear(x0[:, :GATE_CHANNELS], gate))

def gated_values(a: Tensor, ve: Tensor, gate: Tensor) -> Tensor:
    """A value embedding, (T, H, K), times a share for each head. Half of a gate's channels read the
    attention's input, and half the value embedding (records 55 and 70)."""
    half = GATE_CHANNELS // 2
    share = 2 * torch.sigmoid(F.linear(torch.cat((a[:, :half], ve[:, :half]), dim=1), gate))
    return share.unsqueeze(-1) * ve.unflatten(1, (gate.size(0), -1))

def leave_out_own_value(y: Tensor, v: Tensor, strength: Tensor) -> Tensor:
    """Attention's output, (T, H, K), without a learned share of its part along the token's own value: the
    residual stream has that already (Zhai, 2026; record 82, @djdumpling). strength: (H,)."""
    v = v.float()
    direction = v / v.norm(dim=-1, keepdim=True).clamp_min(1e-4)
    along = (y * direction).sum(-1, keepdim=True)
    return (y - torch.tanh(strength).unsqueeze(-1) * along * direction).type_as(y)

# MUDD (Xiao et al., 2025; record 81, @Lisennlp): the last block and the head mix streams that were saved,
# each token by coefficients of its own.

def mudd_coefficients(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """n coefficients, (T, 1) float32 each, by a small MLP. x: (T, D); w_in: (MUDD_DIM, D)."""
    hidden = F.gelu(F.linear(x, w_in.type_as(x)))
    return (0.1 * (F.linear(hidden, w_out.type_as(x)).float() + bias)).split(1, dim=1)

def mix_last_block(m: tuple[Tensor, ...], c0: Tensor, c7: Tensor, x: Tensor, ve: Tensor):
    """What is added to the values of the last attention, and the stream beside it, (T, D) each. c0, c7:
    streams before block 0 and after block 7; ve: a value embedding, whose halves have a coefficient each."""
    first, second = ve.chunk(2, dim=1)
    u = torch.cat((m[6] * first, m[7] * second), dim=1) + m[0] * c0 + m[1] * c7 + m[2] * x
    return u.type_as(x), ((1 + m[5]) * x + m[3] * c0 + m[4] * c7).type_as(x)

def lifted_logits(x: Tensor, weight: Tensor) -> Tensor:
    """23 * sigmoid((x @ weight.T + 5) / 7.5), float32: a cap with more room below zero (record 54,
    @classiclarryd). x: (..., D) in the activations' dtype; weight: (V, D), the float32 master."""
    return 23 * torch.sigmoid((F.linear(x, weight.type_as(x)).float() + 5) / 7.5)

def multi_token_loss(x: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    """The cross-entropies of the next, second next, ... token, each times its weight, and that of the next
    one alone; both summed over the tokens, float32 (record 53, @varunneal). The same logits predict all of
    them; the last rows have fewer. x: (T, D); targets: (T,) int64; token_weights: (n,) float32."""
    logits = lifted_logits(x, weight)
    log_sums = logits.logsumexp(-1)
    losses = []
    for ahead in range(len(token_weights)):
        num_rows = len(x) - ahead
        target_logits = logits[:num_rows].gather(1, targets[ahead:, None]).squeeze(1)
        losses.append((log_sums[:num_rows] - target_logits).sum())
    return (token_weights * torch.stack(losses)).sum(), losses[0].detach()

def frontier_adam(s: Settings, lr_mult: float, betas: tuple[float, float], decay: float = 0.0) -> Adam:
    """The rule of everything but the matrices: an update every two steps (record 39, @classiclarryd), betas
    for each kind (records 52 to 57, @chrisjmccormick and others), cautious decay (record 50, @shenberg)."""
    return Adam(s.adam_lr * lr_mult, betas, 0.005 * decay, every=2)

class BlockWeights(NamedTuple):
    """The matrices of one block of FrontierGPT, in the activations' dtype."""
    up: Tensor  # (hidden, D)
    down: Tensor  # (hidden, D)
    qkv: Tensor | None = None  # (3 D, D)
    out: Tensor | None = None  # (D, D)
    gate: Tensor | None = None  # (H, GATE_CHANNELS)

    def mlp(self, x: Tensor) -> Tensor:
        return ReluSquared.apply(F.linear(norm(x), self.up)) @ self.down

class FrontierGPT(Network):
    """Record 82's network: eleven blocks, no. 6 without attention."""
    plain_kernels = Kernels(head_loss=multi_token_loss)
    positions_per_token = 2  # for paired heads

    @staticmethod
    def declare_parameters(s: Settings, kernels: Kernels) -> dict[str, Row]:
        """name -> row, in the order in which initial values are drawn. Tables and their state have the
        activations' dtype, as in record 30; all other parameters and their state are float32."""
        dim = s.model_dim
        vocab = s.padded_vocab
        num_blocks = len(ATTENTIONS)
        num_attn = num_blocks - ATTENTIONS.count("-")
        bound = 3**0.5 * 0.5 * dim**-0.5  # uniform within +-bound has std 0.5 / sqrt(D)

        mlp_factors = (1.0, 2.0) * num_blocks  # the rate of the second matrix is twice that of the first
        head = frontier_adam(s, 1, (0.5, 0.95), 150)._replace(cautious_adam=kernels.cautious_adam)
        tables = frontier_adam(s, 75, (0.75, 0.95), 5)._replace(cautious_adam=kernels.cautious_adam)
        muon = Muon(s.muon_lr, s.torch_dtype, kernels.XXT, POLAR_EXPRESS, beta2=0.9, cautious_decay=1.2)
        return {
            "lm_head": Row((vocab, dim), head, normal(0.005)),
            "embed": Row((vocab, dim), head, zeros, copy_of="lm_head"),  # tied: record 51, @varunneal
            "value_embeds": Row((5 * vocab, dim), tables, normal(0.01), s.torch_dtype),
            "bigram_embed": Row((5 * vocab, dim), tables, zeros, s.torch_dtype),
            # queries and keys of each attention; Muon takes them in pairs of heads (record 80, @samacqua)
            "qk_bank": Row((num_attn * s.num_heads, 2 * dim // s.num_heads, dim), muon, uniform(bound)),
            "vo_bank": Row((2 * num_attn, dim, dim), muon, uniform(bound)),
            # both matrices of each MLP as (hidden, D)
            "mlp_bank": Row((2 * num_blocks, s.mlp_dim, dim), muon, uniform_first(bound),
                            factors=mlp_factors),
            **FrontierGPT.declare_small_parameters(s, num_attn, num_blocks - 1),
        }

    @staticmethod
    def declare_small_parameters(s: Settings, num_attn: int, num_before_last: int) -> dict[str, Row]:
        """The gates (which left Muon in record 56, @chrisjmccormick) and scalars.
        num_before_last: the blocks before the last one, which mixes its streams by coefficients instead."""
        heads = s.num_heads
        num_own = num_attn - ATTENTIONS.count("P")
        gates = frontier_adam(s, 1, (0.9, 0.99), 1)
        scalars = frontier_adam(s, 5, (0.9, 0.99))
        residuals = frontier_adam(s, 5, (0.9, 0.95))
        additions = frontier_adam(s, 1, (0.9, 0.95))
        small_mlp = frontier_adam(s, 0.25, (0.9, 0.99), 1)
        mudd_bias = frontier_adam(s, 0.25, (0.9, 0.99))
        smear_gate = frontier_adam(s, 0.01, (0.9, 0.99))
        skip_gate = frontier_adam(s, 0.05, (0.9, 0.99))
        rows = {
            "attn_gates": Row((num_attn, heads, GATE_CHANNELS), gates, zeros),
            "value_gates": Row((len(VALUE_TABLES), heads, GATE_CHANNELS), gates, zeros),
            "smear_gate": Row((1, GATE_CHANNELS), smear_gate, zeros),
            "skip_gate": Row((1, GATE_CHANNELS), skip_gate, zeros),
            "qkv_factors": Row((num_attn,), scalars, constant(0.5)),
            "out_factors": Row((num_attn,), scalars, constant(1.0)),
            "smear_factor": Row((1,), scalars, zeros),
            "skip_factor": Row((1,), scalars, constant(-1.5)),
            # of the stream, and of what attention and MLP add to it
            "resid_factors": Row((num_before_last, 2), residuals, constant(1.1**0.5)),
            "post_factors": Row((num_before_last, 2), additions, constant(1.0)),
            "x0_factors": Row((num_before_last,), additions, zeros),
            "bigram_factors": Row((num_before_last,), additions, constant(0.05)),
            "own_value_strengths": Row((num_own, heads), additions, zeros),
            # the last block's, then the head's
            "mudd_in": Row((2, MUDD_DIM, s.model_dim), small_mlp, uniform(s.model_dim**-0.5)),
            "mudd_out": Row((len(MUDD_STARTS), MUDD_DIM), small_mlp, zeros),
            "mudd_bias": Row((len(MUDD_STARTS),), mudd_bias, constant(MUDD_STARTS)),
        }
        return {name: row._replace(tiny=True) for name, row in rows.items()}

    @torch.no_grad()
    def enter_stage(self, stage: Stage) -> None:
        """The rotary tables follow the long window."""
        head_dim = self.settings.model_dim // self.settings.num_heads
        frequencies = yarn(rotary_frequencies(head_dim).to(self.device), stage.yarn_windows)
        for table, new in zip((self.cos, self.sin), rotary_cos_sin(len(self.cos), frequencies)):
            table.copy_(new)

    def logits(self, x: Tensor) -> Tensor:
        return lifted_logits(x, self.lm_head)

    def training_loss(self, batch: "Batch", step: Step) -> tuple[Tensor, Tensor]:
        x = self.hidden(batch.inputs, batch.cu_seqlens, batch.max_seqlen, step.stage)
        weights = torch.stack([torch.full((), w, device=self.device) for w in step.token_weights])
        return self.kernels.head_loss(x, self.lm_head, batch.targets, weights)

    def hidden(self, inputs: Tensor, cu_seqlens: Tensor, max_seqlen: int, stage: Stage) -> Tensor:
        """The blocks: token ids (T,) -> the head's input (T, D), in the activations' dtype."""
        dtype = self.settings.torch_dtype
        attend = self.prepare_attention(len(inputs), cu_seqlens, max_seqlen, stage)
        weights = self.split_banks()
        ve = self.look_up_value_embeds(inputs)
        bigrams = LookUp.apply(self.bigram_embed, bigram_rows(inputs, self.rows["bigram_embed"].shape[0]))
        e = LookUp.apply(self.embed, inputs).to(dtype)
        x0 = norm(smear(e, self.smear_gate.to(dtype), self.smear_factor[0]))
        resid_attn, resid_mlp = self.resid_factors.unbind(1)
        post_attn, post_mlp = self.post_factors.unbind(1)

        def block(i: int, x: Tensor, a: Tensor) -> Tensor:
            """Attention, which reads a, then the MLP. x0 and the bigrams enter each block."""
            u = None
            if i in VALUE_TABLES:
                table = VALUE_TABLES[i]
                u = gated_values(a, ve[table], self.value_gates[table].to(dtype))
            y = self.attention(i, a, u, weights[i], attend)
            x = resid_attn[i] * x + post_attn[i] * y + self.x0_factors[i] * x0
            if i > 0:  # block 0 starts with them
                x = x + self.bigram_factors[i] * bigrams
            return mlp_half(i, x)

        def mlp_half(i: int, x: Tensor) -> Tensor:
            return resid_mlp[i] * x + post_mlp[i] * weights[i].mlp(x)

        x = c0 = x0 + self.bigram_factors[0] * bigrams
        for i in (0, 1, 2, 3):
            x = block(i, x, norm(x))
        c3 = x
        for i in (4, 5):
            x = block(i, x, norm(x))
        skip = skip_share(x0, self.skip_gate.to(dtype), self.skip_factor[0])
        x = mlp_half(6, x + skip * c3)  # block 6 has no attention
        x = block(7, x, norm(x))
        c7 = x
        a7 = norm(c7)  # the last three attentions read the stream after block 7 (record 77)
        for i in (8, 9):
            x = block(i, x, a7)
        c9 = x

        # the last block and the head's input
        out_last, out_head = self.mudd_out.split(MUDD_COUNTS)
        bias_last, bias_head = self.mudd_bias.split(MUDD_COUNTS)
        m = mudd_coefficients(c9, self.mudd_in[0], out_last, bias_last)
        u, x = mix_last_block(m, c0, c7, c9, ve[4])
        y = self.attention(10, a7, u, weights[10], attend)
        x = (m[8] * x + m[9] * y + m[10] * c0 + m[11] * bigrams).to(dtype)
        x = (m[12] * x + m[13] * weights[10].mlp(x)).to(dtype)
        k = mudd_coefficients(x, self.mudd_in[1], out_head, bias_head)
        return norm((x + k[0] * c0 + k[1] * c7 + k[2] * c9 + k[3] * ve[0] + k[4] * c3).to(dtype))

    def look_up_value_embeds(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The rows of the five value embeddings, (T, D) each; all tables in one look-up."""
        first_rows = self.settings.padded_vocab * torch.arange(5, dtype=torch.int32, device=inputs.device)
        return LookUp.apply(self.value_embeds, inputs + first_rows[:, None]).unbind()

    def prepare_attention(self, num_tokens: int, cu_seqlens: Tensor, max_seqlen: int, stage: Stage):
        """The function (kind, q, k, v) -> y for the kinds of ATTENTIONS. Paired heads have two entries for
        each token, and a window of as many entries as others have tokens."""
        dtype = self.settings.torch_dtype
        scale = yarn_attn_scale(self.settings.attn_scale, stage.yarn_windows)
        packings = {
            "P": (2 * cu_seqlens, 2 * num_tokens, stage.short_window, 2 * max_seqlen, dtype),
            "S": (cu_seqlens, num_tokens, stage.short_window, max_seqlen, dtype),
            "L": (cu_seqlens, num_tokens, stage.long_window, max_seqlen, dtype),
        }
        attn_args = {kind: self.kernels.attn_args(*packing) for kind, packing in packings.items()}

        def attend(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.kernels.attention(q, k, v, attn_args[kind], scale)

        return attend

    def attention(self, i: int, a: Tensor, u: Tensor | None, weights: BlockWeights, attend) -> Tensor:
        """The attention of block i. a: (T, D), normalised; u: what is added to the values, of T x D."""
        num_tokens = len(a)
        heads = self.settings.num_heads
        kind = ATTENTIONS[i]
        qkv, gate_logits = GatedQKV.apply(a, weights.qkv, weights.gate)
        q, k, v = qkv.view(num_tokens, 3 * heads, -1).chunk(3, dim=1)
        if u is not None:
            v = v + u.view_as(v)
        if kind == "P":
            # Two heads share a softmax over the keys of both (record 58): head h of token t is entry
            # 2t + h // (H/2) of sequence h mod H/2, and turns as if it were at position 2t + h mod 2.
            cos = self.cos[:2 * num_tokens].unflatten(0, (-1, 1, 2)).squeeze(3)
            sin = self.sin[:2 * num_tokens].unflatten(0, (-1, 1, 2)).squeeze(3)
            q, k = (norm_and_rotate(x.unflatten(1, (-1, 2)), cos, sin) for x in (q, k))
            q, k, v = (x.reshape(2 * num_tokens, heads // 2, -1) for x in (q, k, v))
            y = attend(kind, q, k, v).view(num_tokens, heads, -1)
        else:
            q, k = (norm_and_rotate(x, self.cos[:num_tokens], self.sin[:num_tokens]) for x in (q, k))
            if kind == "L":
                k = offset_keys(k)
            y = attend(kind, q, k, v)
            number = i - ATTENTIONS[:i].count("P") - ATTENTIONS[:i].count("-")
            y = leave_out_own_value(y, v, self.own_value_strengths[number])
        y = y * torch.sigmoid(gate_logits).unsqueeze(-1)
        return F.linear(y.flatten(1), weights.out)

    def split_banks(self) -> list[BlockWeights]:
        """The matrices of each block, cast, and multiplied by their factors, which are far smaller than the
        activations. Why split and unbind: see GPT.split_banks."""
        dim = self.settings.model_dim
        dtype = self.settings.torch_dtype
        qk = self.qk_bank.flatten(0, 1).split(2 * dim)
        vo = self.vo_bank.unbind()
        mlp = self.mlp_bank.unbind()
        gates = self.attn_gates.unbind()
        weights = []
        number = 0  # of the attention
        for i, kind in enumerate(ATTENTIONS):
            block = BlockWeights(mlp[2 * i].to(dtype), mlp[2 * i + 1].to(dtype))
            if kind != "-":
                qkv = self.qkv_factors[number] * torch.cat((qk[number], vo[2 * number]))
                out = self.out_factors[number] * vo[2 * number + 1]
                block = block._replace(qkv=qkv.to(dtype), out=out.to(dtype), gate=gates[number].to(dtype))
                number += 1
            weights.append(block)
        return weights

NETWORKS = {"gpt": GPT, "frontier": FrontierGPT}

@torch.no_grad()
def init_weights(model: Network, seed: int) -> None:
    """Fill every parameter. Numbers are drawn on the CPU, so that all devices and world sizes start alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, row in model.rows.items():
        p = getattr(model, name)
        if row.copy_of:
            p.copy_(getattr(model, row.copy_of))
            continue
        values = torch.zeros(row.shape)
        row.init(values, generator)
        p.zero_()
        p[:len(values)] = values.to(p)

# ----------------------------------------------------------------------------------------------------------
# Optimizer: the rules, sharded over the ranks
#
# A rank owns an equal slice of each parameter's first axis, and keeps the rule's state for it alone. A step:
#   1. reduce_scatter: each rank gets the sum over ranks of its own slice of every gradient; that of the head,
#      which the backward pass completes first, is under way while the rest of the backward pass runs;
#   2. step: it updates its slice of each parameter, as soon as its gradient has arrived;
#   3. all_gather: the updated slices are gathered, so that all ranks hold the same parameters, bit for bit.
# Tiny parameters are not sliced: their gradients, end to end, take one all_reduce; every rank updates all.

# PyTorch 2.13 renamed both collectives, and warns about the old names, which are all that 2.11 has.
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

def of_all_ranks(x) -> list:
    """x of each rank, by rank: any object that can be pickled. Called by all ranks."""
    if not dist.is_initialized():
        return [x]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found

@dataclass
class ShardedParam:
    """One parameter as the optimizer sees it on this rank."""
    name: str
    param: nn.Parameter
    row: Row
    p_slice: Tensor  # this rank's slice of the parameter; all of it if it is tiny
    state: dict[str, Tensor]  # the rule's; the first axis is that of p_slice
    factors: Tensor | None  # of the learning rate, (n, 1, ...)
    original: "ShardedParam | None" = None  # the parameter that this one is tied to, as a copy
    copy: "ShardedParam | None" = None  # the copy that is tied to this one
    grad_slice: Tensor | None = None  # the summed gradient of p_slice
    handle: dist.Work | None = None  # the collective in progress

    def wait(self) -> None:
        if self.handle is not None:
            self.handle.wait()
            self.handle = None

    def due(self, step: Step) -> bool:
        """Whether its rule takes this step; else its gradients add up in p.grad, on each rank."""
        return (step.number + 1) % self.row.rule.every == 0

class ShardedOptimizer:
    """The three phases, for parameters that are updated by a rule each."""
    def __init__(self, params: dict[str, nn.Parameter], rows: dict[str, Row], rank: int, world_size: int):
        """rows: name -> row. Raises KeyError for a parameter without a row. Muon's parameters come first,
        since the other gradients arrive while it works, and the tiny ones last."""
        if missing := params.keys() - rows.keys():
            raise KeyError(f"declare_parameters has no row for {missing}")
        self.rank = rank
        self.world_size = world_size
        self.completing = None  # the step whose gradients the backward pass under way completes
        self.sharded_params = []

        def order(item: tuple[str, Row]) -> tuple[bool, bool]:
            row = item[1]
            return row.tiny, not isinstance(row.rule, Muon)

        for name, row in sorted(rows.items(), key=order):
            p = params[name]
            p_slice = p.data if row.tiny else p.data.chunk(world_size)[rank]
            state = row.rule.init_state(p_slice)
            factors = self.slice_of_factors(row, p)
            self.sharded_params.append(ShardedParam(name, p, row, p_slice, state, factors))
        by_name = {sp.name: sp for sp in self.sharded_params}
        for sp in self.sharded_params:
            if sp.row.copy_of:
                sp.original = by_name[sp.row.copy_of]
                sp.original.copy = sp

    def slice_of_factors(self, row: Row, p: Tensor) -> Tensor | None:
        """Those of this rank's slice, float32; padding has 1."""
        if not row.factors:
            return None
        factors = torch.ones(len(p), *[1] * (p.dim() - 1), device=p.device)
        factors[:len(row.factors)] = torch.tensor(row.factors).view(-1, *[1] * (p.dim() - 1))
        return factors if row.tiny else factors.chunk(self.world_size)[self.rank]

    def reduce_scatter_early(self, name: str) -> None:
        """From now on, phase 1 of this parameter starts in the backward pass that completes its gradient."""
        sp, = (sp for sp in self.sharded_params if sp.name == name)

        def start_if_complete(_):
            if self.completing and sp.due(self.completing):
                self.start_reduce_scatter(sp)

        sp.param.register_post_accumulate_grad_hook(start_if_complete)

    def start_reduce_scatter(self, sp: ShardedParam) -> None:
        """Phase 1 of one parameter. Clears its gradient."""
        grad = sp.param.grad.contiguous()
        sp.param.grad = None
        if self.world_size > 1:
            sp.grad_slice = torch.empty_like(sp.p_slice)
            sp.handle = reduce_scatter_tensor(sp.grad_slice, grad, async_op=True)
        else:
            sp.grad_slice = grad

    def start_all_reduce(self, step: Step) -> None:
        """Phase 1 of all tiny parameters, in float32. Clears their gradients."""
        tiny = [sp for sp in self.sharded_params if sp.row.tiny and sp.due(step)]
        if not tiny:
            return
        grads = torch.cat([sp.param.grad.float().flatten() for sp in tiny])
        handle = dist.all_reduce(grads, async_op=True) if self.world_size > 1 else None
        for sp, grad in zip(tiny, grads.split([sp.param.numel() for sp in tiny])):
            sp.param.grad = None
            sp.grad_slice = grad.view_as(sp.param)
            sp.handle = handle

    def reduce_scatter(self, step: Step) -> None:
        """Phase 1, started for every parameter that is due and for which it has not started yet."""
        for sp in self.sharded_params:
            if sp.grad_slice is None and not sp.row.tiny and sp.due(step):
                self.start_reduce_scatter(sp)
        self.start_all_reduce(step)

    @torch.no_grad()
    def step(self, step: Step) -> list[Tensor]:
        """Phase 2; starts phase 3. Returns a flag for each parameter: gradient not finite."""
        flags = []
        for sp in self.sharded_params:
            if not sp.due(step):
                flags.append(torch.zeros((), dtype=torch.bool, device=sp.param.device))
                continue
            sp.wait()
            flags.append(~sp.grad_slice.sum().isfinite())  # faster than by a maximum
            self.update(sp, step)
            sp.grad_slice = None
            if self.world_size > 1 and not sp.row.tiny:
                sp.handle = all_gather_tensor(sp.param.data, sp.p_slice, async_op=True)
        return flags

    def update(self, sp: ShardedParam, step: Step) -> None:
        """Phase 2 of one parameter. While two are tied, the original, which comes first, is updated with both
        gradients, and the other becomes a copy, with its state: so they can part at any step (record 53,
        @classiclarryd)."""
        if step.tied and sp.original is not None:
            sp.p_slice.copy_(sp.original.p_slice)
            for key, x in sp.original.state.items():
                sp.state[key].copy_(x)
            return
        grad = sp.grad_slice.to(sp.p_slice.dtype)
        if step.tied and sp.copy is not None:
            sp.copy.wait()
            grad = grad + sp.copy.grad_slice
        sp.row.rule.update(sp.p_slice, grad, sp.state, step, sp.factors)

    @property
    def waiting(self) -> bool:
        """Whether gradients of past steps wait in p.grad: they are in no checkpoint."""
        return any(sp.param.grad is not None for sp in self.sharded_params)

    def all_gather(self) -> None:
        """Phase 3 ends: the parameters may be read."""
        for sp in self.sharded_params:
            sp.wait()

def make_optimizer(model: Network, rank: int, world_size: int) -> ShardedOptimizer:
    optimizer = ShardedOptimizer(dict(model.named_parameters()), model.rows, rank, world_size)
    optimizer.reduce_scatter_early("lm_head")
    return optimizer

# ----------------------------------------------------------------------------------------------------------
# Fast kernels for GPUs: each is used only if its results agree with its plain version's
#
# Softcapped logits lie between 0 and CAP = 30 (23 in record 82), so float32 can sum their exponentials as
# they are. With s = sigmoid((z + SHIFT) / 7.5), exp(CAP s) = exp2(CAP / log(2) s). The loss of a row has a
# term, with a weight, for each of the next NUM_WEIGHTS tokens; the last rows have fewer.

LN2 = math.log(2)

@triton.jit
def softcap_sigmoid(z, SHIFT: tl.constexpr, TANH: tl.constexpr):
    """sigmoid((z + SHIFT) / 7.5), float32. TANH: by the GPU's approximation of tanh (relative error 2^-11),
    one special function instead of two: their rate would bound both kernels."""
    if SHIFT != 0:
        z += SHIFT
    if TANH:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * (1 / 15)], dtype=tl.float32,
                                         is_pure=True, pack=1)
        return 0.5 + 0.5 * half
    else:
        r = tl.rsqrt(1 + tl.exp2(z * (-1 / (7.5 * 0.6931471805599453))))  # log(2)
        return r * r  # divisions are slow on a GPU

@triton.jit
def softcap_loss_kernel(logits, targets, token_weights, losses, next_losses, log_sums, num_rows, num_columns,
                        CAP: tl.constexpr, SHIFT: tl.constexpr, LN2: tl.constexpr,
                        NUM_WEIGHTS: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: log2 of the sum of the exponentials, the loss, and the next token's loss alone."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < num_columns, other=0.0).to(tl.float32)
        exponential = tl.exp2((CAP / LN2) * softcap_sigmoid(z, SHIFT, TANH))
        total += tl.where(column < num_columns, exponential, 0.0)
    log_sum = tl.log2(tl.sum(total, 0))
    tl.store(log_sums + row, log_sum)
    loss = 0.0
    for ahead in tl.static_range(NUM_WEIGHTS):
        inside = row + ahead < num_rows
        z = tl.load(logits + tl.load(targets + row + ahead, mask=inside, other=0)).to(tl.float32)
        term = log_sum * LN2 - CAP * softcap_sigmoid(z, SHIFT, TANH)
        if ahead == 0:
            tl.store(next_losses + row, term)
        loss += tl.where(inside, tl.load(token_weights + ahead) * term, 0.0)
    tl.store(losses + row, loss)

@triton.jit
def softcap_grad_kernel(logits, targets, token_weights, log_sums, scale, grads, grads_t, num_rows,
                        num_columns, CAP: tl.constexpr, SHIFT: tl.constexpr, LN2: tl.constexpr,
                        NUM_WEIGHTS: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr):
    """One program per tile: scale times the loss's gradient by the logits, and its transpose."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    log_sum = tl.load(log_sums + row, mask=row < num_rows, other=0.0)
    s = softcap_sigmoid(tl.load(logits + place, mask=inside, other=0.0).to(tl.float32), SHIFT, TANH)
    chosen = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_weight = tl.zeros((ROWS,), tl.float32)
    for ahead in tl.static_range(NUM_WEIGHTS):
        target = tl.load(targets + row + ahead, mask=row + ahead < num_rows, other=-1)
        weight = tl.where(row + ahead < num_rows, tl.load(token_weights + ahead), 0.0)
        chosen += tl.where(column[None, :] == target[:, None], weight[:, None], 0.0)
        total_weight += weight
    grad = total_weight[:, None] * tl.exp2((CAP / LN2) * s - log_sum[:, None]) - chosen
    grad = (grad * (s - s * s) * (CAP / 7.5 * scale)).to(grads.dtype.element_ty)
    tl.store(grads + place, grad, mask=inside)
    place = column.to(tl.int64)[:, None] * num_rows + row[None, :]
    tl.store(grads_t + place, tl.trans(grad), mask=tl.trans(inside))

@triton.jit
def cast_fp8_kernel(x, out, out_t, factor, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per tile: factor * x as e4m3 (which has no infinity: clamped to +-448), and transposed.
    The tile is read twice: with tl.trans, a quarter of the transposed numbers was wrong if x was float32 and
    the ptxas of Triton 3.6 (12.8) compiled the kernel (records/2026-11-26_H200)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    y = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out + place, tl.minimum(tl.maximum(y, -448.0), 448.0).to(out.dtype.element_ty), mask=inside)
    inside = (column < num_columns)[:, None] & (row < num_rows)[None, :]
    place = row.to(tl.int64)[None, :] * num_columns + column[:, None]
    y = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor
    place = column.to(tl.int64)[:, None] * num_rows + row[None, :]
    tl.store(out_t + place, tl.minimum(tl.maximum(y, -448.0), 448.0).to(out.dtype.element_ty), mask=inside)

TILE = dict(ROWS=64, COLUMNS=128, num_warps=8)

def tile_grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.size(0), TILE["ROWS"]), triton.cdiv(x.size(1), TILE["COLUMNS"])

def empty_pair(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Empty tensors of x's shape and of its transpose's."""
    return [torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape, x.mT.shape)]

def cast_fp8(x: Tensor, scale: float) -> list[Tensor]:
    """x / scale and its transpose in float8 e4m3. x: (rows, cols), contiguous."""
    pair = empty_pair(x, torch.float8_e4m3fn)
    cast_fp8_kernel[tile_grid(x)](x, *pair, 1 / scale, *x.shape, **TILE)
    return pair

class Softcap(NamedTuple):
    """cap * sigmoid((z + shift) / 7.5)"""
    cap: float = 30.0
    shift: float = 0.0

def softcap_loss(logits: Tensor, targets: Tensor, token_weights: Tensor, softcap: Softcap):
    """Losses, those of the next token alone, and log2 of the sums of exponentials, (T,) float32 each. logits:
    (T, V), contiguous; token_weights: (n,) float32."""
    losses, next_losses, log_sums = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    block = min(4096, triton.next_power_of_2(logits.size(1)))
    constants = *softcap, LN2, len(token_weights), logits.is_cuda
    softcap_loss_kernel[len(logits),](logits, targets, token_weights, losses, next_losses, log_sums,
                                      *logits.shape, *constants, block, num_warps=8)
    return losses, next_losses, log_sums

def softcap_grad(logits: Tensor, targets: Tensor, token_weights: Tensor, log_sums: Tensor, softcap: Softcap,
                 scale: float, dtype: torch.dtype):
    """scale times the gradient of the summed losses by the logits, (T, V) of `dtype`, and its transpose."""
    grads, grads_t = empty_pair(logits, dtype)
    constants = *softcap, LN2, len(token_weights), logits.is_cuda
    softcap_grad_kernel[tile_grid(logits)](logits, targets, token_weights, log_sums, scale, grads, grads_t,
                                           *logits.shape, *constants, **TILE)
    return grads, grads_t

class Float8HeadLoss(torch.autograd.Function):
    """What multi_token_loss gives, with products in float8 and a fused loss (@YouJiacheng). x and weight are
    e4m3, the gradient of the logits is e5m2, each divided by a fixed scale. Logits and x's gradient are
    bfloat16, the weight's gradient is float32; fast accumulation for the logits only."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, softcap: Softcap,
                scales: tuple[float, float, float]):
        """scales: of x, of weight, of the gradient."""
        x8, x8_t = cast_fp8(x, scales[0])
        w8, w8_t = cast_fp8(weight, scales[1])
        ctx.softcap = softcap
        ctx.grad_factor = 1 / scales[2]
        ctx.scales = x_scale, w_scale, _ = [torch.full((), scale, device=x.device) for scale in scales]
        logits = torch._scaled_mm(x8, w8.mT, x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        losses, next_losses, log_sums = softcap_loss(logits, targets, token_weights, softcap)
        ctx.save_for_backward(x8_t, w8_t, targets, token_weights, logits, log_sums)
        next_loss = next_losses.sum()
        ctx.mark_non_differentiable(next_loss)
        return losses.sum(), next_loss

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x8_t, w8_t, targets, token_weights, logits, log_sums = ctx.saved_tensors
        x_scale, w_scale, grad_scale = ctx.scales
        grads, grads_t = softcap_grad(logits, targets, token_weights, log_sums, ctx.softcap, ctx.grad_factor,
                                      torch.float8_e5m2)
        grad_scale = grad_scale * grad  # the loss may be divided by the number of microbatches
        x_grad = torch._scaled_mm(grads, w8_t.mT, grad_scale, w_scale, out_dtype=torch.bfloat16)
        w_grad = torch._scaled_mm(grads_t, x8_t.mT, grad_scale, x_scale, out_dtype=torch.float32)
        return x_grad, w_grad, None, None, None, None

def float8_softcapped_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What softcapped_loss gives."""
    scales = x.size(1) ** 0.5 / 448, 2.0**-9, 1 / 448
    return Float8HeadLoss.apply(x, weight, targets, x.new_ones(1, dtype=torch.float32), Softcap(), scales)[0]

def float8_multi_token_loss(x: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor):
    """What multi_token_loss gives, with the scales of record 55."""
    scales = 100 / 448, 1.6 / 448, 0.75 / 448
    return Float8HeadLoss.apply(x, weight, targets, token_weights, Softcap(23.0, 5.0), scales)

XXT_TILES = [triton.Config(dict(BLOCK=block, COLS=cols), num_warps=warps, num_stages=3)
             for block, cols, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))]

@triton.autotune(XXT_TILES, key=["rows", "cols"], cache_results=True)
@triton.jit
def XXT_kernel(x, base, out, rows, cols, alpha, beta, ADD: tl.constexpr, BLOCK: tl.constexpr,
               COLS: tl.constexpr):
    """One program per tile of alpha * x @ x.T + beta * base at or below the diagonal, and its mirror."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    if i >= j:
        x += matrix * rows * cols
        out += matrix * rows * rows
        row_i = i * BLOCK + tl.arange(0, BLOCK)
        row_j = j * BLOCK + tl.arange(0, BLOCK)
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            mask_i = (row_i < rows)[:, None] & (col < cols)[None, :]
            mask_j = (row_j < rows)[:, None] & (col < cols)[None, :]
            x_i = tl.load(x + row_i[:, None] * cols + col[None, :], mask=mask_i, other=0.0)
            x_j = tl.load(x + row_j[:, None] * cols + col[None, :], mask=mask_j, other=0.0)
            product = tl.dot(x_i, tl.trans(x_j), product, input_precision="ieee")
        product *= alpha
        place = row_i[:, None] * rows + row_j[None, :]
        inside = (row_i < rows)[:, None] & (row_j < rows)[None, :]
        if ADD:
            base += matrix * rows * rows
            product += beta * tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
        result = product.to(out.dtype.element_ty)
        tl.store(out + place, result, mask=inside)
        if i > j:
            tl.store(out + row_j[:, None] * rows + row_i[None, :], tl.trans(result), mask=tl.trans(inside))

def symmetric_XXT(X: Tensor, base: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """What XXT gives, by half of the tiles and their mirror images (@byronxu99, PR 109)."""
    X = X.contiguous()
    count, rows, cols = X.shape
    out = X.new_empty(count, rows, rows)
    XXT_kernel[lambda tile: (triton.cdiv(rows, tile["BLOCK"]), triton.cdiv(rows, tile["BLOCK"]), count)](
        X, out if base is None else base, out, rows, cols, alpha, beta, ADD=base is not None)
    return out

def varlen_args(cu_seqlens: Tensor, num_tokens: int, window: int, max_seqlen: int, dtype: torch.dtype):
    """What FlashAttention needs to know of the packing."""
    return cu_seqlens, max_seqlen, window

def flash_attention(q: Tensor, k: Tensor, v: Tensor, attn_args, scale: float) -> Tensor:
    """What banded_attention gives, by FlashAttention (Dao, 2023; in this race: @varunneal, PR 118)."""
    from torch.nn.attention.varlen import varlen_attn  # whose window counts the keys before the query's own
    cu_seqlens, max_seqlen, window = attn_args
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return varlen_attn(q, k, v, *lengths, scale=scale, window_size=(window, 0))

def compile_blocks(model: Network) -> None:
    """torch.compile for the blocks: a graph for each stage, in training and in validation. Sets the limit of
    graphs in this process."""
    num_graphs = 1 + 2 * len(make_stages(model.settings))  # and one in KernelTrial
    torch._dynamo.config.recompile_limit = max(8, num_graphs)
    model.hidden = torch.compile(model.hidden, dynamic=False, fullgraph=True)

def count_graphs() -> int:
    """How many graphs torch.compile has made in this process. Does not load it."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]

class KernelTrial:
    """A network with random weights and tokens, and random matrices: a small case, on which a kernel is
    compared with the one that it would replace. Of GPT, one block."""
    def __init__(self, device: torch.device, s: Settings):
        self.settings = s = replace(s, layout="AM", value_embeds="0", window_pattern="L",
                                    batch_tokens=(1024,), microbatches=1, val_slice_tokens=1024)
        stage = make_stages(s)[0]
        self.step = make_schedule(s)[0]._replace(stage=stage._replace(long_window=384, short_window=384))
        torch.manual_seed(0)
        with device:  # 120 million random numbers: a GPU draws them at once, a CPU in three seconds
            self.model = NETWORKS[s.network](s, NETWORKS[s.network].plain_kernels)
        for name, row in self.model.rows.items():  # logits and gates get values in their useful range
            p = getattr(self.model, name).data
            p.normal_(0, 1 if "embed" in name or name == "scalars" else 0.04)
            if s.network == "frontier" and row.tiny:  # its scalars stay near their starting values
                start = torch.zeros(row.shape)
                row.init(start, torch.Generator())
                p.add_(start.to(device))
            elif s.network == "frontier" and "bank" in name:  # so that rounding grows little in eleven blocks
                p.mul_(0.25)
        tokens = torch.randint(s.vocab_size, (1025,), device=device)
        starts = torch.tensor([0, 7, 300, 301, 900, 1024, 1024], dtype=torch.int32, device=device)
        self.batch = Batch(tokens[:-1].int(), tokens[1:], starts, 640)
        self.matrices = torch.randn(3, s.model_dim, s.mlp_dim, device=device)

    def results(self, kind: str, kernels: Kernels) -> dict[str, Tensor]:
        """What the kernels of a kind give: Newton-Schulz and Adam a matrix, the others loss and gradients.
        Compiled blocks stay compiled: try them last."""
        if kind == "Newton-Schulz":
            return {"matrix": newton_schulz(self.matrices, self.settings.torch_dtype, kernels.XXT)}
        if kind == "Adam":
            p, grad, *moments = (x.clone() for x in (*self.matrices[:2], *self.matrices[1:].square()))
            rate = torch.full((), 0.1, device=p.device)
            kernels.cautious_adam(p, grad, *moments, rate, rate, (0.5, 0.95), 0.75)
            return {"weights": p}
        model = self.model
        model.kernels = kernels
        model.zero_grad()
        if kernels.compiled:
            compile_blocks(model)
        loss, _ = model.training_loss(self.batch, self.step)
        loss.backward()
        names = [name for name, row in model.rows.items() if not row.tiny and name != "value_embeds"]
        gradients = {f"gradient of {name}": getattr(model, name).grad for name in names}
        return {"loss": loss.detach()} | gradients

def largest_error(results: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[Tensor, str]:
    """The largest relative error among some results, float32, (), with inf for nan; and its name."""
    errors = [(results[name] - x.float()).norm() / x.float().norm() for name, x in expected.items()]
    errors = torch.stack(errors).nan_to_num(nan=math.inf, posinf=math.inf)
    return errors.max(), list(expected)[int(errors.argmax())]

class Candidate(NamedTuple):
    """A fast kernel that a run may take."""
    kind: str  # what it computes
    name: str
    fields: dict  # of Kernels
    tolerance: float  # of the relative error on KernelTrial, against the kernel that it would replace
    prepare: Callable = lambda: None  # is called before the trial
    advice: str = ""  # for the log if this is taken: what would be faster

FASTER_ATTENTION = {  # major compute capability -> what to install
    9: ("; faster on this GPU: python -m pip install flash-attn-3 --index-url "
        "https://download.pytorch.org/whl/cu130 (or cu126)"),
    10: "; faster on this GPU, from PyTorch 2.14 on: python -m pip install 'flash-attn-4>=4.0.0b36'",
}

def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that the module is in
        return False

def list_attentions(capability: tuple[int, int]) -> list[Candidate]:
    """Versions of FlashAttention, the fastest first. Which PyTorch can train with one, the trial shows."""
    activate = torch.nn.attention.activate_flash_attention_impl
    flash = dict(attn_args=varlen_args, attention=flash_attention)
    found = []
    if capability[0] == 9 and is_installed("flash_attn_interface"):
        found.append(Candidate("attention", "FlashAttention 3", flash, 0.03, lambda: activate("FA3")))
    if capability[0] in (9, 10) and is_installed("flash_attn.cute"):
        found.append(Candidate("attention", "FlashAttention 4", flash, 0.03, lambda: activate("FA4")))
    found.append(Candidate("attention", "FlashAttention 2 of PyTorch", flash, 0.03,
                           restore_flash_attention_2, FASTER_ATTENTION.get(capability[0], "")))
    return found

def list_candidates(capability: tuple[int, int], s: Settings) -> list[Candidate]:
    """The fast kernels for a GPU; of a kind, the fastest first. capability: NVIDIA's, (0, 0) for others."""
    found = []
    bfloat16 = s.dtype == "bfloat16"
    if bfloat16:  # FlashAttention has no float32, and tiles of float32 need more shared memory than there is
        found += list_attentions(capability)
    if (s.fp8_head and bfloat16 and capability >= (8, 9)
            and s.padded_vocab % 16 == 0 and s.model_dim % 16 == 0):
        float8_loss = dict(gpt=float8_softcapped_loss, frontier=float8_multi_token_loss)[s.network]
        found.append(Candidate("head", "float8, fused loss", dict(head_loss=float8_loss), 0.1))
    if s.torch_compile:
        compiled = torch.compile(NETWORKS[s.network].plain_kernels.head_loss, dynamic=False)
        found.append(Candidate("head", f"{s.dtype}, torch.compile", dict(head_loss=compiled), 0.03))
    if bfloat16:
        half = "half of each symmetric product"
        found.append(Candidate("Newton-Schulz", half, dict(XXT=symmetric_XXT), 0.1))
    if s.torch_compile and s.network == "frontier":
        compiled_adam = torch.compile(cautious_adam, dynamic=False, fullgraph=True)
        found.append(Candidate("Adam", "torch.compile", dict(cautious_adam=compiled_adam), 1e-3))
    if s.torch_compile:  # the last, with the attention that was chosen
        found.append(Candidate("blocks", "torch.compile", dict(compiled=True), 0.1))
    return found

def nvidia_capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) of another: AMD's have numbers like NVIDIA's, and other units."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)

def restore_flash_attention_2() -> None:
    torch.nn.attention.restore_flash_attention_impl(False)  # False: no warning if it is active already

def candidates_of_all_ranks(device: torch.device, s: Settings) -> list[Candidate]:
    """Those that every rank can try, since each trial ends with a collective: GPUs may differ."""
    candidates = list_candidates(nvidia_capability(device), s)
    names = [(candidate.kind, candidate.name) for candidate in candidates]
    shared = set(names).intersection(*of_all_ranks(names))
    return [candidate for candidate, name in zip(candidates, names) if name in shared]

def try_candidate(trial: KernelTrial, candidate: Candidate, kernels: Kernels, expected) -> tuple[float, str]:
    """How far its results are from the expected ones, over all ranks, and where; if it fails, inf and why."""
    error = torch.full((), math.inf, device=trial.matrices.device)
    try:
        candidate.prepare()
        error, where = largest_error(trial.results(candidate.kind, kernels), expected)
    except Exception as raised:  # whatever fails, use another
        where = repr(raised)
    if dist.is_initialized():
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return error.item(), where

def require_compiler() -> None:
    """Raises UserError (exit code 2) if torch.compile does not work on this machine's CPU."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except Exception as error:  # it has many classes of them
        found = (str(error) or repr(error)).splitlines()[0]
        raise UserError("TORCH_COMPILE: expected a C++ compiler, which torch.compile needs on a CPU, found: "
                        f"{found}; install one, such as g++, or set TORCH_COMPILE=0.", exit_code=2,
                        rank=dist.get_rank() if dist.is_initialized() else None) from None

def choose_kernels(device: torch.device, s: Settings) -> tuple[Kernels, list[str]]:
    """The kernels for `device`, and a line for each kind that gives the choice and its reason. On a GPU, a
    fast kernel must agree on KernelTrial, on all ranks, with the plain one in its place, beside those chosen
    before it. Draws random numbers, and switches PyTorch to the FlashAttention that it takes."""
    if device.type == "cpu":
        if s.torch_compile:
            require_compiler()
        plain = NETWORKS[s.network].plain_kernels
        return plain._replace(compiled=s.torch_compile), ["kernels: plain PyTorch (the device is a CPU)"]
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave nan for some masks (pytorch issue 196678)
    candidates = candidates_of_all_ranks(device, s)
    trial = KernelTrial(device, s) if candidates else None
    chosen = NETWORKS[s.network].plain_kernels
    lines = []
    kinds = ["attention", "head", "Newton-Schulz", "Adam", "blocks"]
    if s.network == "gpt":
        kinds.remove("Adam")  # it takes PyTorch's fused kernel
    for kind in kinds:
        taken = ""
        warning = ""
        rejected = []
        of_kind = [candidate for candidate in candidates if candidate.kind == kind]
        expected = trial.results(kind, chosen) if of_kind else {}
        for candidate in of_kind:
            tried = chosen._replace(**candidate.fields)
            error, where = try_candidate(trial, candidate, tried, expected)
            fits = error <= candidate.tolerance
            if candidate.advice or not fits:
                warning = "WARNING: "
            if fits:
                chosen = tried
                taken = f"{candidate.name}; {error:.1e} from what it replaces{candidate.advice}"
                break
            rejected.append(f"; {candidate.name} was {error:.1e} from what it would replace, "
                            f"more than {candidate.tolerance:g} ({where})")
        if not taken and rejected:
            taken = "plain PyTorch, much slower"
        elif not taken:
            taken = f"plain PyTorch (nothing else for DTYPE={s.dtype} and TORCH_COMPILE={s.torch_compile:d})"
        lines.append(f"{kind}: {warning}{taken}{''.join(rejected)}")
    del trial
    gc.collect()  # a compiled model refers to itself, and would keep its memory
    return chosen, lines

# ----------------------------------------------------------------------------------------------------------
# Data: token shards, the packing plan, the loader's thread, validation
#
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens as uint16.
# Before step 0, plan_packing checks every token that the run needs, and finds where each microbatch begins.

SHARD_KIND = [20240520, 1]
HEADER_BYTES = 1024
REMAKE = ("make shards from text with python data/tokenize_text.py, fetch FineWeb's with "
          "python data/cached_fineweb10B.py, or name other files")
OTHER_IDS = "set PRESET, or VOCAB_SIZE and BOS_ID, to match these files, or name other files"
FIRST_BYTES = {  # of files that are sometimes taken for shards
    b"\x1f\x8b": "a gzip file",
    b"PK\3\4": "a zip file",
    b"\x93NUMPY": "a NumPy file",
    b"PAR1": "a Parquet file",
    (20240801).to_bytes(4, "little"): "a shard of llm.c for Llama 3, with ids of 32 bits",
}

def describe_file(path: Path) -> str:
    """What a file that does not begin like a shard most likely is. Raises OSError."""
    with open(path, "rb") as file:
        head = file.read(8192)
    for first_bytes, kind in FIRST_BYTES.items():
        if head.startswith(first_bytes):
            return kind
    if not head:
        return "an empty file"
    if not {*range(9)} & {*head}:  # no control bytes
        return "text"
    words = np.frombuffer(head[:len(head) // 8 * 8], "<u4")
    if len(words) and words[0] == SHARD_KIND[0]:
        return f"a shard of version {words[1]}"
    for bits, most_ids in ((32, 2**18), (16, 50_304)):  # vocabularies that are common
        ids = words.view(f"<u{bits // 8}")
        if any(words[:2]) and ids.max() < most_ids:
            return f"token ids of {bits} bits without a header, as of nanoGPT and old versions of llm.c"
    return f"a file of another kind, which begins with the bytes {head[:8].hex(' ')}"

class TokenShard:
    """One shard file. `checksum` is that of its tokens once document_starts has read them."""
    def __init__(self, path: Path, s: Settings):
        """Raises UserError, with file, expected, found and remedy, if header or size are wrong."""
        self.path = path
        self.vocab_size = s.vocab_size
        self.bos_id = s.bos_id
        self.checksum = None
        header = np.fromfile(path, "<i4", count=256).tolist()
        if header[:2] != SHARD_KIND:
            self.expect(False, f"a token shard, which begins with {SHARD_KIND}", describe_file(path))
        self.expect(len(header) == 256, f"a header of {HEADER_BYTES:,} bytes", f"{4 * len(header):,}")
        self.num_tokens = header[2]
        size = path.stat().st_size
        expected = HEADER_BYTES + 2 * self.num_tokens
        self.expect(self.num_tokens > 0, "at least 1 token", self.num_tokens)
        found = f"{size:,}"
        if size == HEADER_BYTES + 4 * self.num_tokens:
            found += ", as for ids of 32 bits"
        elif size < expected:
            found += ", as of a file that was cut"
        self.expect(size == expected, f"{expected:,} bytes for {self.num_tokens:,} tokens", found)

    def expect(self, ok: bool, expected: str, found, remedy: str = REMAKE) -> None:
        if not ok:
            raise UserError(f"{self.path}: expected {expected}, found {found}; {remedy}.")

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens start to end, uint16. Raises UserError if the file lacks them or an id is out of range."""
        tokens = np.fromfile(self.path, "<u2", count=end - start, offset=HEADER_BYTES + 2 * start)
        self.expect(len(tokens) == end - start, f"tokens {start:,} to {end:,}", f"{len(tokens):,} of them")
        for i in np.flatnonzero(tokens >= self.vocab_size)[:1]:
            found = f"{tokens[i]} at token {start + i:,}"
            self.expect(False, f"ids below VOCAB_SIZE={self.vocab_size}", found, OTHER_IDS)
        return tokens

    def document_starts(self) -> np.ndarray:
        """(documents,) int64: where each begins. Reads and checks every token."""
        tokens = self.read(0, self.num_tokens)
        self.checksum = zlib.crc32(tokens)
        starts = np.flatnonzero(tokens == self.bos_id)
        self.expect(len(starts), f"documents that open with BOS_ID={self.bos_id}", "no such token", OTHER_IDS)
        return starts

def open_shards(s: Settings, name: str) -> list[TokenShard]:
    """The shards that the pattern in setting `name` matches, headers checked. Raises UserError."""
    root = Path(s.data_path or HERE)
    pattern = getattr(s, name)
    paths = find_files(root, pattern)
    if not paths:
        raise UserError(f"{name.upper()}: expected token shards at {root / pattern}, found none; correct it, "
                        "unset it, or fetch FineWeb with python data/cached_fineweb10B.py.")
    return [TokenShard(path, s) for path in paths]

class PackingPlan(NamedTuple):
    """Which documents each microbatch of the run takes. Documents are numbered over all shards and passes."""
    shards: list[TokenShard]
    shard: np.ndarray  # (documents,) int64: number of the shard that holds it
    start: np.ndarray  # (documents,) int64: its first token there
    size: np.ndarray  # (documents,) int64: its tokens
    first_document: np.ndarray  # (steps x microbatches + 1,) int64: the one that opens each microbatch
    schedule: list[Step]
    num_microbatches: int  # of a step
    summary: str

    def microbatches_of(self, stage: Stage) -> range:
        """The numbers of a stage's microbatches in the run."""
        steps = [step.number for step in self.schedule[:-1] if step.stage is stage]
        return range(steps[0] * self.num_microbatches, (steps[-1] + 1) * self.num_microbatches)

def read_documents(shards: list[TokenShard], epochs: int):
    """Yields a (3, documents) int64 array for each shard of each pass: number of the shard, first token and
    tokens of its documents. Reads and checks a shard when it is asked for."""
    known = []
    for n, shard in enumerate(shards):
        starts = shard.document_starts()
        sizes = np.diff(starts, append=shard.num_tokens)
        known.append(np.stack((np.full_like(starts, n), starts, sizes)))
        yield known[-1]
    for _ in range(epochs - 1):
        yield from known

def plan_packing(shards: list[TokenShard], s: Settings, schedule: list[Step],
                 num_microbatches: int) -> PackingPlan:
    """Pack the documents of the planned steps; reads shard after shard until there are enough.
    A microbatch of T tokens takes T + 1, since targets are shifted by one: documents from their BOS, each cut
    at its stage's max_seq_len, the last where the microbatch is full. The rest of a cut document is dropped,
    and the next document opens the next microbatch, also at a stage's border (BOS alignment: @classiclarryd,
    @varunneal). Raises UserError."""
    most_of_one = max(min(stage.max_seq_len, stage.batch_tokens // num_microbatches + 1)
                      for stage in stages_of(schedule[:-1]))
    source = read_documents(shards, s.epochs)
    documents = []  # what came from the source
    first_document = [0]
    used = 0
    pending = np.empty(0, dtype=np.int64)  # sizes of the documents from first_document[-1] on
    for stage, steps in groupby(schedule[:-1], key=lambda step: step.stage):
        room = stage.batch_tokens // num_microbatches + 1
        ends = np.cumsum(np.minimum(pending, stage.max_seq_len))  # of pending documents, end to end
        taken = 0  # pending documents that microbatches have
        for _ in range(len(list(steps)) * num_microbatches):
            while True:
                begin = ends[taken - 1] if taken else 0
                last = int(np.searchsorted(ends, begin + room))  # the document that fills the microbatch
                if last < len(ends):
                    break
                more = next(source, None)
                if more is None:
                    steps_done = (len(first_document) - 1) // num_microbatches
                    problem = describe_long_documents(shards, documents, s, most_of_one)
                    raise UserError(describe_shortage(shards, s, steps_done, problem))
                documents.append(more)
                pending = np.concatenate((pending[taken:], more[2]))
                ends = np.cumsum(np.minimum(pending, stage.max_seq_len))
                taken = 0
            first_document.append(first_document[-1] + last + 1 - taken)
            taken = last + 1
            used += room
        pending = pending[taken:]
    shard, start, size = np.concatenate(documents, axis=1)
    read = int(size[:first_document[-1]].sum())
    passes = math.ceil(len(documents) / len(shards))
    summary = (f"data: {describe_shards(shards)}; the run reads {read:,} in {counted(passes, 'pass')}, uses "
               f"{used:,} ({used / read:.1%}) and drops the ends of cut documents")
    if problem := describe_long_documents(shards, documents, s, most_of_one):
        summary += f"\ndata: WARNING: {problem}"
    return PackingPlan(shards, shard, start, size, np.array(first_document), schedule, num_microbatches,
                       summary)

def describe_shards(shards: list[TokenShard]) -> str:
    return f"{sum(shard.num_tokens for shard in shards):,} tokens in {counted(len(shards), 'shard')}"

def describe_long_documents(shards: list[TokenShard], documents: list[np.ndarray], s: Settings,
                            most_of_one: int) -> str:
    """What is to be said if most of the tokens that were read lie behind the ends of cut documents; '' if
    not. documents: as read_documents gave them; most_of_one: the most tokens that a run uses of one."""
    first_pass = documents[:len(shards)]
    tokens = sum(shard.num_tokens for shard in shards[:len(first_pass)])
    usable = sum(int(np.minimum(sizes, most_of_one).sum()) for _, _, sizes in first_pass)
    if usable >= tokens / 2:
        return ""
    return (f"only {usable:,} of {tokens:,} tokens can be used ({usable / tokens:.1%}), the same ones in "
            f"every pass, since a run uses at most {most_of_one:,} tokens of a document, from "
            f"BOS_ID={s.bos_id} on; cut long documents, as python data/tokenize_text.py does, or raise "
            "MAX_SEQ_LEN and BATCH_TOKENS")

def describe_shortage(shards: list[TokenShard], s: Settings, steps: int, long_documents: str) -> str:
    """A sentence for shards that are enough for `steps` steps only."""
    advice = long_documents
    if not advice:
        advice = ("raise EPOCHS or " * (steps > 0) + "add text (python data/tokenize_text.py, or for FineWeb "
                  "python data/cached_fineweb10B.py)")
    return (f"TRAIN_FILES: expected documents for NUM_ITERATIONS={s.num_iterations} steps of "
            f"{setting_text(s.batch_tokens)} tokens, found {describe_shards(shards)}, in "
            f"{counted(s.epochs, 'pass')} enough for {counted(steps, 'step')}; {advice}.")

def read_validation(s: Settings) -> np.ndarray:
    """The validation tokens, (VAL_TOKENS + 1,) uint16. Raises UserError for missing or wrong files."""
    needed = s.val_tokens + 1
    parts = []
    missing = needed
    for shard in open_shards(s, "val_files"):
        if missing:
            shard.document_starts()  # for its checks, as in training
            parts.append(shard.read(0, min(missing, shard.num_tokens)))
            missing -= len(parts[-1])
    tokens = np.concatenate(parts)
    if missing:
        raise UserError(f"VAL_FILES: expected VAL_TOKENS + 1 = {needed:,} tokens, found {len(tokens):,}; "
                        "lower VAL_TOKENS or add shards.")
    return tokens

class Batch(NamedTuple):
    """One packed sequence, as Network.forward takes it."""
    inputs: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (S,) int32: where documents begin, ascending, padded with T: shapes stay static
    max_seqlen: int  # an upper bound of the documents' lengths; one number for the whole stage

    def to(self, device: torch.device) -> "Batch":
        if device.type == "cpu":
            return self
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self[:3]), self.max_seqlen)

def make_batch(tokens: np.ndarray, starts: np.ndarray, most_starts: int, max_seqlen: int) -> Batch:
    """A batch from T + 1 tokens and where their documents begin. S is T // 300, as in record 30, or what
    most_starts needs, rounded up to a multiple of 128."""
    num_tokens = len(tokens) - 1
    cu_seqlens = np.full(round_up(max(num_tokens // 300, most_starts + 1), 128), num_tokens, dtype=np.int32)
    cu_seqlens[:len(starts)] = starts
    arrays = tokens[:-1].astype(np.int32), tokens[1:].astype(np.int64), cu_seqlens
    return Batch(*map(torch.from_numpy, arrays), max_seqlen)

def train_batches(plan: PackingPlan, numbers, device: torch.device, rank: int = 0):
    """Yields the training batches of these microbatches of the run, in this order. A thread, which never
    touches a GPU, assembles them five ahead. Raises UserError, with the rank, if a shard was cut while in
    use."""
    most_starts = {}  # stage -> the most documents in a microbatch
    for stage in stages_of(plan.schedule[:-1]):
        microbatches = plan.microbatches_of(stage)
        counts = np.diff(plan.first_document[microbatches.start:microbatches.stop + 1])
        most_starts[stage] = int(counts.max())

    def assemble(number: int) -> Batch:
        """In the thread."""
        stage = plan.schedule[number // plan.num_microbatches].stage
        num_tokens = stage.batch_tokens // plan.num_microbatches
        room = num_tokens + 1
        parts = []
        for document in range(plan.first_document[number], plan.first_document[number + 1]):
            start = int(plan.start[document])
            length = min(int(plan.size[document]), stage.max_seq_len, room)
            parts.append(plan.shards[plan.shard[document]].read(start, start + length))
            room -= length
        starts = np.cumsum([0, *map(len, parts[:-1])])
        max_seqlen = min(stage.max_seq_len, num_tokens)
        return make_batch(np.concatenate(parts), starts, most_starts[stage], max_seqlen)

    thread = ThreadPoolExecutor(1, "loader")
    numbers = iter(numbers)
    ahead = deque(thread.submit(assemble, number) for number in islice(numbers, 5))
    while ahead:
        try:
            batch = ahead.popleft().result()
        except (UserError, OSError) as error:
            raise UserError(str(error), rank=rank) from None
        ahead.extend(thread.submit(assemble, number) for number in islice(numbers, 1))
        yield batch.to(device)

def microbatches_of_rank(plan: PackingPlan, first_step: int, rank: int, world_size: int) -> range:
    """From step first_step on: of a step's microbatches, rank r of w takes numbers r, r + w, ..."""
    return range(first_step * plan.num_microbatches + rank, len(plan.first_document) - 1, world_size)

def validation_batches(tokens: np.ndarray, s: Settings, rank: int, world_size: int, device: torch.device):
    """Yields (number, batch) for this rank's validation slices: every world_size-th of VAL_SLICE_TOKENS."""
    cuts = np.arange(0, s.val_tokens + 1, s.val_slice_tokens)
    starts = np.union1d(cuts, np.flatnonzero(tokens[:-1] == s.bos_id))
    places = np.searchsorted(starts, cuts)
    most_starts = int(np.diff(places).max())
    max_seqlen = int(np.diff(starts).max())
    for n in range(rank, len(cuts) - 1, world_size):
        own = starts[places[n]:places[n + 1]] - cuts[n]
        yield n, make_batch(tokens[cuts[n]:cuts[n + 1] + 1], own, most_starts, max_seqlen).to(device)

# ----------------------------------------------------------------------------------------------------------
# Run: processes and device, clock, log

# What a scheduler, a terminal that closes or a person sends to stop a run, or to warn it of its end. SIGQUIT
# still ends a run at once.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

def handle_stop_signals(handler) -> dict:
    """Set the handler of these signals, but for those that the process was started to ignore, as by nohup.
    Returns the handlers before, by signal."""
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN}

START_ANEW = "start with torchrun, or unset WORLD_SIZE."

class Launcher(NamedTuple):
    """What torchrun tells a process, in variables of these names."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

def read_launcher(environ) -> Launcher:
    """One process if there is no WORLD_SIZE, and what torchrun says if there is. Raises UserError (exit code
    2) if a variable is missing or no number in its range."""
    if "WORLD_SIZE" not in environ:
        return Launcher()
    numbers = []
    for name in Launcher._fields:
        text = environ.get(name.upper(), "")
        if not text.isdecimal():
            raise UserError(f"{name.upper()}: expected a whole number beside WORLD_SIZE, found {text!r}; "
                            f"{START_ANEW}", exit_code=2)
        numbers.append(int(text))
    launched = Launcher(*numbers)
    if not (launched.rank < launched.world_size and launched.local_rank < launched.local_world_size):
        raise UserError("RANK: expected a rank below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, "
                        f"found {launched}; {START_ANEW}", exit_code=2)
    if launched.world_size > 1:
        if not environ.get("MASTER_ADDR"):
            raise UserError("MASTER_ADDR: expected where rank 0 is, beside WORLD_SIZE, found none; "
                            f"{START_ANEW}", exit_code=2)
        port = environ.get("MASTER_PORT", "")
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError("MASTER_PORT: expected the port of rank 0, 1 to 65535, beside WORLD_SIZE, found "
                            f"{port!r}; {START_ANEW}", exit_code=2)
    return launched

def count_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0

def choose_device(s: Settings, launched: Launcher) -> tuple[torch.device, str]:
    """The device of this process, which becomes PyTorch's current one, and a line that says why. Raises
    UserError (exit code 2) if there are too few GPUs, if they cannot compute in bfloat16 as DTYPE says, or if
    so many ranks cannot share a step."""
    if problem := world_size_problem(s, launched.world_size):
        raise UserError(problem, exit_code=2)
    gpus = count_gpus()
    if s.device == "cpu" or (s.device == "auto" and not gpus):
        why = "as DEVICE says" if s.device == "cpu" else "no CUDA GPU is here"
        return torch.device("cpu"), f"device: cpu ({why})"
    processes = max(launched.local_world_size, s.nproc)
    if processes > gpus:
        fewer = "start fewer (NPROC), or " * (gpus > 0)
        raise UserError(f"DEVICE: expected a CUDA GPU for each process ({processes}), found {gpus}; {fewer}"
                        "set DEVICE=cpu.", exit_code=2)
    device = torch.device("cuda", launched.local_rank)
    torch.cuda.set_device(device)
    capability = nvidia_capability(device)
    if (0, 0) < capability < (8, 0) and s.dtype == "bfloat16":
        raise UserError(f"DTYPE: expected a GPU that computes in bfloat16 (NVIDIA's from Ampere on), found "
                        f"{torch.cuda.get_device_name(device)}; the demo runs on it (PRESET=demo), and other "
                        "runs do with DTYPE=float32, without FlashAttention and slowly.", exit_code=2)
    return device, "device: cuda (a CUDA GPU is here)"

def count_cores() -> int:
    """Of the CPU: those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

def count_processes(s: Settings, device: torch.device) -> int:
    """How many processes to start on this machine if nobody has started them: NPROC; else one per GPU, or per
    core of a CPU, as far as they can share a step. On a CPU, several processes of few threads are not slowed
    by other programs as one process of many threads is, whose threads wait for the last of them after each
    small operation."""
    if s.nproc:
        return s.nproc
    most = count_gpus() if device.type == "cuda" else min(count_cores(), s.microbatches)
    counts = [count for count in range(1, most + 1) if can_share(s, count)]
    return max(counts, default=1)

def idle_gpus(s: Settings, device: torch.device, count: int) -> list[str]:
    """A line that says so if `count` processes here leave GPUs idle, which cannot share a step."""
    gpus = count_gpus()
    if device.type == "cpu" or s.nproc or count >= gpus or can_share(s, gpus):
        return []
    line = f"GPUs: WARNING: {count} of {gpus} are used, since {gpus} ranks cannot share a step"
    microbatches = math.lcm(s.microbatches, gpus)
    if can_share(replace(s, microbatches=microbatches), gpus):
        line += f"; MICROBATCHES={microbatches} uses all"
    return [line]

def threads_of_each(count: int) -> int:
    """Threads of one of `count` processes that share the CPU: OMP_NUM_THREADS, or its share of the cores."""
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()  # as PyTorch has read it
    return max(1, count_cores() // count)

@contextmanager
def other_ranks(count: int):
    """Start ranks 1 to count - 1 on this machine's CPU, by the command that started this process, which
    becomes rank 0. Each gets its share of the cores. At the end they are waited for, and killed if this rank
    failed. Raises UserError if a collective fails here because one of them has ended."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    threads = threads_of_each(count)
    torch.set_num_threads(threads)
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS=str(threads),
        GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo",
    )
    command = [sys.executable, *sys.orig_argv[1:]]
    ranks = range(1, count)
    processes = []

    def end(number, frame):
        """Until training catches the signals."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    handle_stop_signals(end)
    try:
        for rank in ranks:
            numbers = dict(RANK=str(rank), LOCAL_RANK=str(rank))
            processes.append(subprocess.Popen(command, env=os.environ | numbers, stdin=subprocess.DEVNULL))
        yield
        for process in processes:
            process.wait()
    except RuntimeError:  # of a collective, perhaps because another rank has ended
        for rank, process in zip(ranks, processes):
            with suppress(subprocess.TimeoutExpired):
                if code := process.wait(1):
                    raise UserError(f"rank {rank} ended with exit code {code}") from None
        raise
    finally:
        for process in processes:
            process.kill()
            process.wait()

def watch_connecting(launched: Launcher, connected: threading.Event) -> None:
    """A thread: say where this rank waits if it waits for long, and end it if its parent has died."""
    seconds = 0
    while not connected.wait(1):
        seconds += 1
        if seconds == 10:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            who = f"rank {launched.rank} still waits for the others of {launched.world_size} ranks"
            print(f"{who} at {place}", file=sys.stderr, flush=True)
        if os.getppid() != PARENT:
            os._exit(128 + signal.SIGHUP)

def connect(device: torch.device, launched: Launcher) -> None:
    """Wait for all ranks, and make their process group. Raises UserError if they cannot meet."""
    if launched.world_size == 1:
        return
    connected = threading.Event()
    threading.Thread(target=watch_connecting, args=(launched, connected), daemon=True).start()
    # Python's handlers would be called only when all ranks have come: until then, signals end this one
    handlers = handle_stop_signals(signal.SIG_DFL)
    cuda = device.type == "cuda"
    try:
        store, rank, world_size = next(dist.rendezvous("env://"))
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"MASTER_ADDR, MASTER_PORT: expected {launched.world_size} ranks to meet at {place}, "
                        f"found: {error}; correct them, or start all ranks.", rank=launched.rank) from None
    # torchrun keeps its store over restarts, with the addresses of dead ranks: use a prefix for each
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
                            device_id=device if cuda else None)
    dist.barrier()  # a rank that ends with an error must not do so while others still connect
    connected.set()
    for number, handler in handlers.items():
        signal.signal(number, handler)

class Clock:
    """Training time in seconds: runs between start() and stop(), each of which waits for the device first."""
    def __init__(self, device: torch.device):
        self.device = device
        self.total = 0.0
        self.started = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        self.total += self.now() - self.started
        self.started = None

    def times(self, step: int) -> str:
        """Training time so far, for a log line. Does not wait for the device while the clock runs."""
        running = 0.0 if self.started is None else time.perf_counter() - self.started
        milliseconds = 1000 * (self.total + running)
        return f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(step, 1):.2f}ms"

class Console(io.FileIO):
    """The file under stdout or stderr. The log is the record, so what this one does not take is dropped."""
    problems = []  # of both, which nobody has been told yet

    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)  # None: a pipe that does not block is full
        except OSError as error:
            if not hasattr(self, "error"):
                self.problems.append(f"{self.label} could not be written: {error}")
            self.error = error
            return len(data)

def open_console(stream, label: str, errors: str):
    """A stream that writes where stdout or stderr does, and never fails."""
    if stream is None:  # the process was started without one
        return open(os.devnull, "w")
    try:
        console = Console(stream.fileno(), "w", closefd=False)
    except OSError:  # no file, as in a notebook
        return stream
    console.label = label
    return io.TextIOWrapper(io.BufferedWriter(console), stream.encoding, errors, line_buffering=True)

@contextmanager
def best_effort_console():
    """What is printed in here may fail: a disk is full, the reader of a pipe has gone, a terminal was closed,
    an encoding lacks a character. Nothing is left for Python to write when it ends."""
    streams = sys.stdout, sys.stderr
    sys.stdout = open_console(sys.stdout, "stdout", "replace")
    sys.stderr = open_console(sys.stderr, "stderr", "backslashreplace")
    try:
        yield
    finally:
        sys.stdout.flush()
        while Console.problems:
            print(Console.problems.pop(), file=sys.stderr, flush=True)
        sys.stdout, sys.stderr = streams

class Log:
    """Output of rank 0: every line goes to LOG_DIR/RUN/log.txt and the console; other ranks are silent. On a
    terminal, steps move one live line; in a pipe each prints its line."""
    def __init__(self, s: Settings, rank: int, estimated_peak: int = 0):
        """Makes the run's folder. estimated_peak: of a GPU's memory [bytes]. Raises UserError."""
        self.settings = s
        self.estimated_peak = estimated_peak
        self.file = None
        self.bar = None
        self.val_loss = math.nan
        if rank:
            return
        self.folder = Path(s.log_dir).resolve() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}"
        try:
            self.folder.mkdir(parents=True)
            self.file = open(self.folder / "log.txt", "x", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"LOG_DIR: expected a folder for logs at {s.log_dir}, found: {error}; name "
                            "another.") from None
        print(f"log: {self.folder / 'log.txt'}", flush=True)

    def write(self, *lines: str, console: bool = True) -> None:
        if self.file is None:
            return
        for line in lines:
            self.write_to_file(line)
            if console:
                tqdm.write(line, file=sys.stdout)  # above the live line, if there is one
                sys.stdout.flush()
        while Console.problems:
            line = f"WARNING: {Console.problems.pop()}; the run goes on, and its log is {self.file.name}"
            self.write_to_file(line)
            print(line, file=sys.stderr, flush=True)

    def write_to_file(self, line: str) -> None:
        try:
            print(line, file=self.file, flush=True)
        except OSError as error:  # a full disk does not stop training
            print(f"{self.folder}: a line of the log could not be written: {error}", file=sys.stderr)

    def step(self, step: int, loss: float, clock: Clock) -> None:
        steps = self.settings.num_iterations
        times = clock.times(step)
        live = sys.stdout.isatty()
        self.write(f"step:{step}/{steps} {times} train_loss:{loss:.4f}", console=not live)
        if live and self.file is not None:
            if self.bar is None:
                self.bar = tqdm(total=steps, initial=step, file=sys.stdout, dynamic_ncols=True, leave=False,
                                bar_format="step {n_fmt}/{total_fmt} {bar} {postfix}, {remaining} left")
            speed = times.split(":")[-1]
            self.bar.set_postfix_str(f"train {loss:.3f}, val {self.val_loss:.3f}, {speed}/step")
            self.bar.update(step - self.bar.n)

    def validation(self, step: int, val_loss: float, clock: Clock) -> None:
        self.val_loss = val_loss
        self.write(f"step:{step}/{self.settings.num_iterations} val_loss:{val_loss:.4f} {clock.times(step)}")

    def ended(self, step: int, val_loss: float, clock: Clock) -> None:
        """The lines that programs read: how the race ended, and the GPU's peak memory."""
        target = self.settings.target_loss
        self.write(f"target_reached:{int(val_loss <= target)} target_loss:{target:g} val_loss:{val_loss:.4f} "
                   f"final_step:{step} {clock.times(step)}", console=False)
        memory = (f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
                  f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")
        if self.estimated_peak:
            memory += f" estimated: {self.estimated_peak >> 20} MiB"
        self.write(memory, console=clock.device.type == "cuda")

# ----------------------------------------------------------------------------------------------------------
# Checkpoints: one file in the safetensors layout, LOG_DIR/RUN/step_NNNNNN.safetensors
#
# An 8-byte length, a JSON header, raw bytes: the safetensors package reads it, and nothing in it can execute.
# Tensors are whole (gathered from the ranks), so that other numbers of ranks can resume from it. The header's
# metadata hold step, training seconds, what identifies the run, and a SHA-256 of everything else.

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
# Settings that may differ from rank to rank: where it runs. Of the data, the tokens count, not the places.
OF_A_MACHINE = {"device", "nproc", "log_dir", "data_path", "train_files", "val_files"}
# And when a run goes on: also when it looks, saves and stops.
FREE_TO_CHANGE = OF_A_MACHINE | {"checkpoint_every", "resume", "sample_tokens", "target_loss",
                                 "val_loss_every"}
SIZES = "microbatches", "val_slice_tokens"  # are fitted to the GPU's memory, unless the environment sets them

def checkpoint_hash(header: dict, payload: list) -> str:
    """SHA-256 of the header (without this hash) and the payload's parts."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for raw in payload:
        digest.update(raw)
    return digest.hexdigest()

def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under another name, flush, then rename: the file is whole or absent. Raises OSError."""
    metadata = {name: text for name, text in metadata.items() if name != "sha256"}  # of a file that was read
    names = {dtype: name for name, dtype in DTYPES.items()}
    offset = 0
    header = dict(__metadata__=metadata)
    payload = []
    for name, x in tensors.items():
        payload.append(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
        span = [offset, offset + payload[-1].size]
        header[name] = dict(dtype=names[x.dtype], shape=list(x.shape), data_offsets=span)
        offset = span[1]
    header["__metadata__"] = metadata | dict(sha256=checkpoint_hash(header, payload))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    unfinished = path.with_name("unfinished")  # after a full disk, the next checkpoint overwrites it
    with open(unfinished, "wb") as file:
        file.writelines([len(head).to_bytes(8, "little"), head, *payload])
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)

def read_header(path: Path) -> tuple[dict, int]:
    """The header of a file of write_safetensors, and its size [bytes] in the file. Raises OSError, and
    ValueError if the file is none."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size < path.stat().st_size else b""
    try:
        header = json.loads(text)
        header["__metadata__"]["sha256"]  # files of other programs lack it
        return header, 8 + size
    except (ValueError, KeyError, TypeError):
        raise ValueError("a file of another kind, or a part of one") from None

def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file of write_safetensors. Raises UserError unless every byte is right."""
    try:
        header, begin = read_header(path)
        data = np.fromfile(path, dtype=np.uint8, offset=begin)
        tensors = {}
        expected = header["__metadata__"].pop("sha256")
        if checkpoint_hash(header, [data]) != expected:
            raise ValueError(f"a SHA-256 other than {expected}")
        metadata = header.pop("__metadata__") | dict(sha256=expected)
        for name, about in header.items():
            first, last = about["data_offsets"]
            raw = torch.from_numpy(data[first:last].copy())  # copied for its alignment
            tensors[name] = raw.view(DTYPES[about["dtype"]]).view(about["shape"])
        return tensors, metadata
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a whole checkpoint, found {error}; name another.") from None

@cache
def read_source() -> str:
    """This script, as it was when it was started, since launch() calls this first."""
    return Path(__file__).read_text(encoding="utf-8")

def hash_of(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()

def settings_of_race(s: Settings) -> dict:
    """Those that must be the same for a run to continue from a checkpoint, as a checkpoint has them."""
    return json.loads(json.dumps({name: x for name, x in asdict(s).items() if name not in FREE_TO_CHANGE}))

def read_saved_sizes(s: Settings) -> dict[str, int]:
    """SIZES in the checkpoint from which RESUME goes on: that of the highest step whose other settings are
    these, and if it is to be found, whose source is this one. Empty if there is none. Whether the file is
    whole is checked when it is loaded."""
    paths = []
    if s.resume == "auto":
        paths = checkpoints_in(s.log_dir)
    elif s.resume:
        paths = [Path(s.resume)]
    for path in paths:
        with suppress(OSError, ValueError, KeyError, TypeError):
            header, _ = read_header(path)
            theirs = json.loads(header["__metadata__"]["run"])
            sizes = {name: theirs[name] for name in SIZES}
            expected = settings_of_race(replace(s, **sizes))
            if s.resume == "auto":
                expected["source"] = hash_of(read_source())
            if expected.items() <= theirs.items():
                return sizes
    return {}

def identify_run(s: Settings, source: str, plan: PackingPlan, val_tokens: np.ndarray, world_size: int):
    """What must be the same for a run to continue from a checkpoint, by name."""
    same = settings_of_race(s)
    same |= dict(source=hash_of(source),
                 training_data=[shard.checksum for shard in plan.shards if shard.checksum is not None],
                 validation_data=zlib.crc32(val_tokens),
                 microbatches_of_a_step=s.num_microbatches(world_size))
    return same

def require_same_run(identity: dict, s: Settings) -> None:
    """Raises UserError on all ranks unless what identify_run says, and all settings but those of a machine,
    are the same on all."""
    mine = identity | {name: x for name, x in asdict(s).items() if name not in OF_A_MACHINE}
    first, *others = of_all_ranks(mine)
    for rank, other in enumerate(others, 1):
        names = [name for name in first if other.get(name) != first[name]]
        if names:
            remedy = "start all nodes with the same"
            if s.resume and set(names) <= {*SIZES, "microbatches_of_a_step"}:  # those of other checkpoints
                remedy = "LOG_DIR must be one folder for all ranks"
            raise UserError(f"rank {rank}: expected the settings, script and data of rank 0, found another "
                            f"{', '.join(names)}; {remedy}.")

def save_checkpoint(log: Log, model: Network, optimizer: ShardedOptimizer, step: int, seconds: float,
                    identity: dict) -> None:
    """Write the run's state after `step` steps; keep the newest two. Called by all ranks; rank 0 writes."""
    tensors = {name: getattr(model, name).data[:row.shape[0]] for name, row in model.rows.items()}
    for sp in optimizer.sharded_params:
        for key, x in sp.state.items():
            whole = x
            if dist.is_initialized() and not sp.row.tiny:
                whole = x.new_empty(len(sp.param), *x.shape[1:])
                all_gather_tensor(whole, x, async_op=True).wait()
            if log.file is not None:
                tensors[f"{key}.{sp.name}"] = whole[:sp.row.shape[0]].cpu()
    if log.file is None:
        return
    path = log.folder / f"step_{step:06d}.safetensors"
    try:
        metadata = dict(step=str(step), seconds=repr(seconds), run=json.dumps(identity))
        write_safetensors(path, tensors, metadata)
        log.write(f"checkpoint: {path}")
        for old in sorted(log.folder.glob("step_*.safetensors"), key=step_and_folder)[:-2]:
            old.unlink(missing_ok=True)
    except OSError as error:  # the checkpoints that are there stay
        log.write(f"checkpoint: WARNING: {path} could not be written: {error}; training goes on")

def step_and_folder(path: Path) -> tuple[int, str]:
    """The order of checkpoints; folders are named after the time when the run began."""
    number = path.stem.removeprefix("step_")
    return int(number) if number.isdecimal() else -1, path.parent.name

def checkpoints_in(log_dir: str) -> list[Path]:
    """Those of all runs there, from the highest step down."""
    paths = Path(log_dir).resolve().glob("*/step_*.safetensors")
    return sorted(paths, key=step_and_folder, reverse=True)

class Found(NamedTuple):
    """A checkpoint to go on from."""
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

def find_checkpoint(log: Log, identity: dict) -> Found | None:
    """The checkpoint that RESUME names. auto: that of the highest step of this race, or None if LOG_DIR has
    none; those of another source do not count. Raises UserError if there are some, and none is whole and of
    this race."""
    s = log.settings
    if s.resume != "auto":
        path = Path(s.resume)
        tensors, metadata = read_safetensors(path)
        theirs = json.loads(metadata["run"])
        require_same_race(path, theirs, identity)
        if theirs.get("source") != identity["source"]:
            log.write(f"checkpoint: WARNING: {path} is of another train_gpt.py; this one goes on from it")
        return Found(path, tensors, metadata)
    problem = None
    for path in checkpoints_in(s.log_dir):
        try:
            tensors, metadata = read_safetensors(path)
            theirs = json.loads(metadata["run"])
            if theirs.get("source") != identity["source"]:
                log.write(f"checkpoint: skipped: {path} is of another train_gpt.py")
                continue
            require_same_race(path, theirs, identity)
            return Found(path, tensors, metadata)
        except UserError as error:
            log.write(f"checkpoint: skipped: {error}")
            problem = problem or error
    if problem:
        raise problem
    log.write(f"checkpoint: none in {Path(s.log_dir).resolve()} to go on from, starting anew")
    return None

def require_same_race(path: Path, theirs: dict, identity: dict) -> None:
    """Raises UserError with the differences between two runs' identities, but for the source."""
    changed = []
    for name in sorted((theirs | identity).keys() - {"source"}):
        if theirs.get(name) != identity.get(name):
            changed.append(f"{name} {theirs.get(name)!r} (here {identity.get(name)!r})")
    if changed:
        raise UserError(f"{path}: expected a checkpoint of this race, found {', '.join(changed)}; undo the "
                        "change, or unset RESUME to start anew.")

def agree_on_checkpoint(found: Found | None, problem: UserError | None) -> None:
    """Compare what the ranks found. Raises UserError on all of them if it is not the same everywhere."""
    mine = "none"
    if problem:
        mine = "an error"
    elif found:
        mine = f"step {found.metadata['step']}, SHA-256 {found.metadata['sha256'][:12]}"
    theirs = of_all_ranks(mine)
    if problem:
        alone = len({*theirs}) > 1
        raise UserError(str(problem), exit_code=2, rank=dist.get_rank() if alone else None)
    if len({*theirs}) > 1:
        ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(theirs))
        raise UserError(f"RESUME: expected one checkpoint for all ranks, found {ranks}; LOG_DIR must be one "
                        "folder for all.", exit_code=2)

@torch.no_grad()
def load_checkpoint(log: Log, model: Network, optimizer: ShardedOptimizer, clock: Clock,
                    identity: dict) -> int:
    """Load the checkpoint that RESUME means; returns the number of steps done. Called by all ranks. Raises
    UserError."""
    found = None
    problem = None
    try:
        found = find_checkpoint(log, identity)
    except UserError as error:
        problem = UserError(f"RESUME: {error}", exit_code=2)
    agree_on_checkpoint(found, problem)
    if found is None:
        return 0
    expected = {sp.name: list(sp.row.shape) for sp in optimizer.sharded_params}
    for sp in optimizer.sharded_params:
        for key, x in sp.state.items():
            expected[f"{key}.{sp.name}"] = [sp.row.shape[0], *x.shape[1:]]
    there = {name: list(x.shape) for name, x in found.tensors.items()}
    differing = [f"{name} {there.get(name)} (here {expected.get(name)})"
                 for name in sorted(expected | there) if there.get(name) != expected.get(name)]
    if differing:  # of another train_gpt.py
        raise UserError(f"RESUME: {found.path}: expected this model's tensors, found {', '.join(differing)}; "
                        "take the train_gpt.py that wrote it.", exit_code=2)
    for sp in optimizer.sharded_params:
        num_rows = sp.row.shape[0]
        sp.param.data[:num_rows] = found.tensors[sp.name].to(sp.param.data)
        for key, x in sp.state.items():
            whole = x.new_zeros(len(sp.param), *x.shape[1:])
            whole[:num_rows] = found.tensors[f"{key}.{sp.name}"].to(whole)
            x.copy_(whole if sp.row.tiny else whole.chunk(optimizer.world_size)[optimizer.rank])
    clock.total = float(found.metadata["seconds"])
    step = int(found.metadata["step"])
    log.write(f"resumed: {found.path}, step {step}, after {clock.total:.1f} s of training")
    incomplete = any(step % sp.row.rule.every for sp in optimizer.sharded_params)
    if incomplete and step < log.settings.num_iterations:  # the run met its target there
        log.write(f"resumed: WARNING: Adam's gradients of step {step}, which waited for the next, are lost")
    return step

# ----------------------------------------------------------------------------------------------------------
# Memory: into how many microbatches a step is cut, so that it fits the GPU
#
# A step is tried on tensors without values (PyTorch's meta device), and the bytes of all tensors are counted
# while they live. That takes a second, and no formula has to follow the network. Two operations are replaced
# by others that keep what the fast kernels keep. What torch.compile computes again is counted as kept.

MEMORY_FACTOR = 1.1  # of the peak, for gaps between tensors (H200 record: 1.07)
MEMORY_SPARE = 2**30  # [bytes] for CUDA, NCCL and cuBLAS

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made, as long as they live."""
    def __init__(self):
        super().__init__()
        self.storages = weakref.WeakSet()
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage() not in self.storages:
                self.add(x.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        self.storages.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, storage.nbytes())

    def remove(self, size: int) -> None:
        self.live -= size

class KeptByAttention(torch.autograd.Function):
    """The tensors of FlashAttention, without its work."""
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(v)
        log_sums = q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, y, log_sums)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

class KeptByHead(torch.autograd.Function):
    """The tensors of the fast heads, without their work: logits, and their gradient, which takes as much, in
    float8 with its transpose."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        logits = x.new_empty(len(x), len(weight))
        ctx.save_for_backward(logits, x, weight)
        return x.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, *grads = [torch.empty_like(x) for x in ctx.saved_tensors]
        return tuple(grads)

class Card(NamedTuple):
    """What a run has to know of a GPU."""
    name: str
    memory: int  # [bytes]
    capability: tuple[int, int]  # nvidia_capability

def read_card(device: torch.device) -> Card | None:
    """None: the device is no GPU, and nothing is fitted to its memory."""
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    return Card(about.name, about.total_memory, nvidia_capability(device))

def kernels_without_work(s: Settings, card: Card) -> Kernels:
    """For tensors without values: what the kernels keep that a run takes on this card."""
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_args, scale: float) -> Tensor:
        return KeptByAttention.apply(q, k, v)

    def head_loss(x: Tensor, weight: Tensor, targets: Tensor, *token_weights: Tensor):
        loss = KeptByHead.apply(x, weight)
        return (loss, loss.detach()) if token_weights else loss

    kernels = NETWORKS[s.network].plain_kernels._replace(attn_args=varlen_args, attention=attention)
    if any(candidate.kind == "head" for candidate in list_candidates(card.capability, s)):
        kernels = kernels._replace(head_loss=head_loss)
    return kernels

@cache
def estimate_memory(s: Settings, world_size: int, card: Card) -> tuple[int, int]:
    """A rank's peak bytes in training and in validation."""
    step = max(make_schedule(s)[:-1], key=lambda step: step.stage.batch_tokens)
    stage = step.stage
    count = s.num_microbatches(world_size)

    def batch(num_tokens: int) -> Batch:
        targets = torch.empty(num_tokens, dtype=torch.int64)
        starts = torch.empty(num_tokens // 16, dtype=torch.int32)
        return Batch(targets.int(), targets, starts, stage.max_seq_len)

    with torch.device("meta"), LiveBytes() as memory:
        model = NETWORKS[s.network](s, kernels_without_work(s, card), world_size)
        optimizer = make_optimizer(model, 0, world_size)  # its state counts
        for _ in range(min(count // world_size, 2)):  # the second beside the gradients of the first
            loss, _ = model.training_loss(batch(stage.batch_tokens // count), step)
            loss.backward()
        training = memory.peak
        del loss
        model.zero_grad()
        memory.peak = memory.live
        with torch.no_grad():
            model(*batch(s.val_slice_tokens), stage)
        del optimizer
    return training, memory.peak

def microbatch_options(s: Settings, world_size: int) -> list[int]:
    """MICROBATCHES and its multiples, as far as they cut the steps of all stages into equal microbatches in
    which the longest document fits."""
    most = min(s.batch_tokens) // max(s.max_seq_len)
    counts = range(2 * s.microbatches, most + 1, s.microbatches)
    equal = [n for n in counts if can_share(replace(s, microbatches=n), world_size)]
    return [s.microbatches, *equal]

def slice_options(s: Settings) -> list[int]:
    """VAL_SLICE_TOKENS, its half, its quarter and so on, as long as the longest document fits."""
    options = [s.val_slice_tokens]
    while options[-1] % 32 == 0 and options[-1] // 2 >= max(s.max_seq_len):
        options.append(options[-1] // 2)
    return options

class Fitted(NamedTuple):
    """Settings that fit the GPUs."""
    settings: Settings
    about: list[str]  # lines for the log
    peak: int  # [bytes] estimated, of memory

def fit_memory(s: Settings, overrides: list[str], world_size: int, cards: list[Card | None]) -> Fitted:
    """The fewest microbatches and the largest validation slices whose estimated peaks fit the smallest of the
    ranks' cards. Of the two, one that the environment sets stays; both are the checkpoint's if the run
    resumes."""
    card = min((card for card in cards if card), key=lambda card: card.memory, default=None)
    if card is None:
        return Fitted(s, [], 0)

    def fits(peak: int) -> bool:
        return MEMORY_FACTOR * peak + MEMORY_SPARE <= card.memory

    options = dict(microbatches=microbatch_options(s, world_size), val_slice_tokens=slice_options(s))
    saved = read_saved_sizes(s)
    for number, name in enumerate(SIZES):  # the first decides training's peak, the second validation's
        if name in overrides:
            options[name] = [getattr(s, name)]
        elif name in saved:
            options[name] = [saved[name]]
        for value in options[name]:
            s = replace(s, **{name: value})
            peaks = estimate_memory(s, world_size, card)
            if fits(peaks[number]):
                break
    training, validation, there = (size / 2**30 for size in (*peaks, card.memory))
    warning = "" if fits(max(peaks)) else "WARNING: more than fits: "
    line = (f"memory: {warning}{training:.1f} GiB in training and {validation:.1f} GiB in validation, by an "
            f"estimate, of {there:.1f} GiB ({card.name})")
    chosen = [f"{name.upper()}={getattr(s, name)}" for name in SIZES if name not in overrides]
    if chosen:
        line += f"; {'as in the checkpoint' if saved else 'chosen to fit'}: {', '.join(chosen)}"
    return Fitted(s, [line], max(peaks))

# ----------------------------------------------------------------------------------------------------------
# Training

class Status(NamedTuple):
    """What a step tells the host, when it has arrived."""
    step: Step
    values: Tensor  # float32 on the host, over all ranks: mean loss, requests to stop, a flag a parameter
    arrived: torch.cuda.Event | None  # of the values; None on a CPU

    def wait(self) -> tuple[float, bool, list[bool]]:
        """(mean loss, whether a rank asks to stop, by parameter whether its gradient was not finite)."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, stops, *flags = self.values.tolist()
        return loss, stops > 0, [flag > 0 for flag in flags]

def train_step(model: Network, optimizer: ShardedOptimizer, batches, step: Step,
               stop: Callable[[], int] = lambda: 0) -> Status:
    """One optimizer step. The host need not wait for it. stop: whether this rank asks to stop, not 0."""
    s = model.settings
    device = model.device
    num_microbatches = s.num_microbatches(optimizer.world_size)
    loss_sum = torch.zeros((), device=device)
    count = num_microbatches // optimizer.world_size
    for number in range(count):
        optimizer.completing = step if number == count - 1 else None
        loss, logged_loss = model.training_loss(next(batches), step)
        (loss / num_microbatches).backward()  # ranks add up: all tokens' losses / num_microbatches
        loss_sum += logged_loss / num_microbatches
    optimizer.reduce_scatter(step)
    flags = optimizer.step(step)
    mean_loss = loss_sum / (step.stage.batch_tokens // num_microbatches)
    values = torch.stack([mean_loss, torch.full_like(loss_sum, stop() > 0), *flags])
    if dist.is_initialized():
        dist.all_reduce(values)
    optimizer.all_gather()
    values = values.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
    arrived = torch.cuda.current_stream().record_event() if device.type == "cuda" else None
    return Status(step, values, arrived)

def warm_up(model: Network, optimizer: ShardedOptimizer, plan: PackingPlan, val_tokens: np.ndarray) -> int:
    """Untimed steps in every stage (and validation passes, if compiled), undone bit for bit. Returns how
    many. A stage's steps take its first batch."""
    s = model.settings
    device = model.device
    if not s.warmup_steps:
        return 0
    states = [x for sp in optimizer.sharded_params for x in sp.state.values()]
    tensors = [*(p.data for p in model.parameters()), *model.buffers(), *states]
    before = [x.to("cpu", copy=True) for x in tensors]  # not in the GPU's memory
    if model.kernels.compiled:
        _, val_batch = next(validation_batches(val_tokens, s, 0, 1, device))
    trained = stages_of(plan.schedule[:-1])  # the last stage may be one that is only validated
    every = max(sp.row.rule.every for sp in optimizer.sharded_params)  # all rules take the last step
    steps_of_stage = round_up(-(-s.warmup_steps // len(trained)), every)
    for stage in stages_of(plan.schedule):
        model.enter_stage(stage)
        if stage in trained:
            first = plan.microbatches_of(stage).start + optimizer.rank
            batch = next(train_batches(plan, [first], device, optimizer.rank))
            for number in range(steps_of_stage):
                step = plan.schedule[stage.first_step]._replace(number=number)
                train_step(model, optimizer, repeat(batch), step)
        if model.kernels.compiled:
            with torch.no_grad():
                model(*val_batch, stage)
    for x, saved in zip(tensors, before):
        x.copy_(saved)
    return steps_of_stage * len(trained)

@torch.no_grad()
def validate(model: Network, val_tokens: np.ndarray, s: Settings, rank: int, world_size: int,
             stage: Stage) -> float:
    """Mean loss over all validation tokens, each counted once; the same number on every rank."""
    device = model.device
    losses = torch.zeros(s.val_tokens // s.val_slice_tokens, device=device)
    for number, batch in validation_batches(val_tokens, s, rank, world_size, device):
        losses[number] = model(*batch, stage) / s.val_slice_tokens
    if world_size > 1:  # each slice's loss is on one rank and zero on the others, so the sum is exact
        dist.all_reduce(losses)
    return losses.double().mean().item()

def catch_signals() -> Callable[[], int]:
    """Catch STOP_SIGNALS, so that the run can finish its step. The function returned gives the number of the
    signal, 0 for none; the death of torchrun counts as SIGHUP."""
    received = []
    handle_stop_signals(lambda number, frame: received.append(number))

    def signal_number() -> int:
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
        return received[0] if received else signal.SIGHUP * orphaned

    return signal_number

def finish_step(status: Status, optimizer: ShardedOptimizer, log: Log, clock: Clock) -> bool:
    """Wait for a step and log it; returns whether a rank asked to stop. Raises UserError if the loss or a
    gradient is not finite."""
    loss, stop, not_finite = status.wait()
    spoiled = [] if math.isfinite(loss) else ["the loss"]
    for sp, flag in zip(optimizer.sharded_params, not_finite):
        if flag:
            spoiled.append(f"the gradient of {sp.name}")
    steps_done = status.step.number + 1
    if spoiled:
        raise UserError(f"step {steps_done}: expected finite numbers, found inf or nan in "
                        f"{', '.join(spoiled)}; lower the learning rates, or go on from a checkpoint.")
    log.step(steps_done, loss, clock)
    return stop

class Ending(NamedTuple):
    """How training ended."""
    code: int  # exit code: 0, or 128 + the number of the signal that stopped it
    num_steps: int  # that the model has been trained
    stage: Stage  # at the end
    text: str  # for people

def train(model: Network, optimizer: ShardedOptimizer, batches, schedule: list[Step], val_tokens: np.ndarray,
          log: Log, clock: Clock, identity: dict, first_step: int) -> Ending:
    """The race: train and validate until the target or the last step; the clock stops during validation.
    Raises UserError."""
    s = model.settings
    rank = optimizer.rank
    world_size = optimizer.world_size
    signal_number = catch_signals()
    saving = False  # a checkpoint is due. It waits, as a stop does, for a step after which no gradient waits.
    stopping = False
    running = deque()  # the Status of each step that the host has not waited for
    stage = None
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would stop the loop for up to half a second
    if world_size > 1:
        dist.barrier()  # the clock starts when the last rank is ready
    clock.start()
    # The state after step.number steps is validated and saved, and only then is the step itself trained.
    for step in schedule[first_step:]:
        if step.stage is not stage:
            for entered in stages_between(schedule, stage, step.stage):
                model.enter_stage(entered)
            stage = step.stage
        last_step = step is schedule[-1]
        validating = last_step or (s.val_loss_every and step.number % s.val_loss_every == 0)
        if s.checkpoint_every and step.number > first_step and step.number % s.checkpoint_every == 0:
            saving = True
        whole = not optimizer.waiting
        if validating or (whole and (saving or stopping)):
            clock.stop()
            while running:
                stopping |= finish_step(running.popleft(), optimizer, log, clock)
            if validating:
                val_loss = validate(model, val_tokens, s, rank, world_size, step.stage)
                log.validation(step.number, val_loss, clock)
                last_step = last_step or val_loss <= s.target_loss
            ends = last_step or (whole and stopping)
            if s.checkpoint_every and step.number > first_step and (ends or (whole and saving)):
                save_checkpoint(log, model, optimizer, step.number, clock.total, identity)
                saving = False
            if ends:
                break
            clock.start()
        running.append(train_step(model, optimizer, batches, step, signal_number))
        if clock.device.type == "cpu" or len(running) > 1:  # a GPU works while the step before is logged
            stopping |= finish_step(running.popleft(), optimizer, log, clock)
    steps = f"step {step.number} of {s.num_iterations}"
    if last_step:
        if first_step and step.number == first_step:
            log.write("finished: the checkpoint is of a run that has ended; no step was trained")
        log.ended(step.number, val_loss, clock)
        reached = "target reached" if val_loss <= s.target_loss else "target not reached"
        text = f"{reached}: validation loss {val_loss:.4f}, target {s.target_loss:g}, after {steps}"
        return Ending(0, step.number, stage, text)
    number = signal_number() or signal.SIGTERM  # another rank got the signal: say SIGTERM
    text = f"stopped by {signal.Signals(number).name} after {steps}"
    if not s.checkpoint_every:
        text += "; not saved, since CHECKPOINT_EVERY=0"
    return Ending(128 + number, step.number, stage, text)

# ----------------------------------------------------------------------------------------------------------
# Main: what a log opens with, text from a model, the command line

UTF8 = dict(encoding="utf-8", errors="replace")  # how what other programs print is read, in every locale

def require_places(s: Settings) -> None:
    """Raises UserError (exit code 2) if DATA_PATH, RESUME or LOG_DIR cannot be what it should be."""
    problems = []
    if s.data_path and not os.path.isdir(s.data_path):
        problems.append(f"DATA_PATH: expected a folder, found none at {s.data_path}; make or correct it.")
    if s.resume not in ("", "auto") and not os.path.isfile(s.resume):
        problems.append(f"RESUME: expected a checkpoint, found no file at {s.resume}; correct it.")
    place = Path(s.log_dir).resolve()
    while not place.exists():
        place = place.parent
    writes = os.environ.get("RANK", "0") == "0"
    if writes and not (place.is_dir() and os.access(place, os.W_OK)):
        problems.append(f"LOG_DIR: expected a folder that can be written, found {place}; name another.")
    if problems:
        raise UserError(*problems, exit_code=2)

def ensure_demo_data(s: Settings) -> None:
    """Build the demo's shards if its own patterns find none. Raises UserError if that fails."""
    root = Path(s.data_path or HERE)
    own = [pattern for pattern in (s.train_files, s.val_files) if pattern.startswith(DEMO_DATA)]
    if not all(find_files(root, pattern) for pattern in own):
        command = [sys.executable, HERE / "data" / "demo_corpus.py", root / DEMO_DATA]
        done = subprocess.run(command, capture_output=True, **UTF8)
        print(done.stdout, end="", file=sys.stderr)
        if done.returncode:
            raise UserError(done.stderr.strip().split("\n")[-1])

def describe_environment() -> list[str]:
    """Versions, hardware and git commit. No environment variable is shown."""
    versions = f"CUDA {torch.version.cuda}, Triton {getattr(triton, '__version__', 'none')}"
    cores = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads"  # report.py reads this
    lines = [f"Python {sys.version}", f"PyTorch {torch.__version__}, {versions}",
             f"platform: {platform.platform()}, {cores}"]
    for command in ("git rev-parse HEAD", "git status --short --untracked-files=no", "nvidia-smi"):
        try:
            output = subprocess.run(command.split(), cwd=HERE, capture_output=True, **UTF8).stdout.strip()
        except OSError:
            output = "not found"
        lines.append(f"{command}: {output}")
    return lines

def describe_run(s: Settings, world_size: int) -> list[str]:
    """Batch and parameter counts, a line each."""
    rows = NETWORKS[s.network].declare_parameters(s, Kernels())
    counts = {name: math.prod(row.shape) for name, row in rows.items()}
    lines = []
    count = s.num_microbatches(world_size)
    shown = None
    for stage in make_stages(s):
        batch = (f"batch: {counted(world_size, 'rank')} x {counted(count // world_size, 'microbatch')} x "
                 f"{stage.batch_tokens // count:,} tokens = {stage.batch_tokens:,} tokens/step")
        if batch != shown:
            lines.append(batch + f", from step {stage.first_step} on" * (stage.first_step > 0))
        shown = batch
    groups = " + ".join(f"{n:,} {name}" for name, n in counts.items())
    return [*lines, f"parameters: {sum(counts.values()):,} = {groups}"]

@torch.no_grad()
def generate(model: Network, stage: Stage, ids: list[int], length: int, seed: int = 0):
    """Yields up to `length` tokens that the model draws after `ids`, one by one, at a temperature of 0.8."""
    s = model.settings
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(ids)
    for _ in range(length):
        inputs = torch.tensor([s.bos_id, *ids], dtype=torch.int32, device=device)[-model.most_tokens:]
        cu_seqlens = torch.tensor([0, len(inputs)], dtype=torch.int32, device=device)
        hidden = type(model).hidden  # never the compiled version
        x = hidden(model, inputs, cu_seqlens, len(inputs), stage)[-1]
        logits = model.logits(x)[:s.vocab_size].cpu()
        token = int(torch.multinomial(torch.softmax(logits / 0.8, 0), 1, generator=generator))
        if token == s.bos_id:  # the document ends
            break
        ids.append(token)
        yield token

GOOD_STEPS = 600  # of the demo, after which its text looks like Python; they take about three minutes

def write_sample(log: Log, model: Network, stage: Stage, val_tokens: np.ndarray, seen: str) -> None:
    """Log how a model of bytes goes on with the first SAMPLE_TOKENS of the validation tokens. seen: how much
    the model has read."""
    s = model.settings
    if not s.sample_tokens or s.vocab_size != 257:
        return
    prompt = [int(x) for x in val_tokens[:s.sample_tokens] if x != s.bos_id]
    text = list(generate(model, stage, prompt, s.sample_tokens))
    before, after = (bytes(x).decode(errors="replace") for x in (prompt, text))
    end = "---"
    if s.num_iterations < GOOD_STEPS:
        more = f"NUM_ITERATIONS={GOOD_STEPS} VAL_LOSS_EVERY=100 TARGET_LOSS=0"
        end += f" better with more steps: put {more} before the command"
    log.write("--- a text that the model has not seen:", before,
              f"--- how it goes on, after training on {seen}:", after, end)

class Prepared(NamedTuple):
    """What is read and checked before a run."""
    val_tokens: np.ndarray  # (VAL_TOKENS + 1,) uint16
    plan: PackingPlan
    settings: list[str]  # a line for each
    about: list[str]  # the run in a few lines

def prepare(s: Settings, overrides: list[str], about: list[str], world_size: int) -> Prepared:
    """Read and check the data, and describe the run. about: its first lines. Raises UserError."""
    settings = [f"{name}: {setting_text(value)}{'  (overridden)' * (name in overrides)}"
                for name, value in asdict(s).items()]
    val_tokens = read_validation(s)
    train_shards = open_shards(s, "train_files")
    plan = plan_packing(train_shards, s, make_schedule(s), s.num_microbatches(world_size))
    return Prepared(val_tokens, plan, settings, [*about, *describe_run(s, world_size), plan.summary])

def race(s: Settings, prepared: Prepared, identity: dict, log: Log, device: torch.device, rank: int,
         world_size: int) -> Ending:
    """A rank's part of the race, from the kernels to the sample. Raises UserError."""
    separator = "=" * 100
    if rank == 0:
        environment = describe_environment()
        head = [read_source(), separator, *environment, separator, *prepared.settings, separator]
        log.write(*head, console=False)
    kernels, why_kernels = choose_kernels(device, s)
    log.write(*prepared.about, *why_kernels)
    graphs_of_trials = count_graphs()
    model = NETWORKS[s.network](s, kernels, world_size)
    init_weights(model, s.seed)
    model.to(device)
    optimizer = make_optimizer(model, rank, world_size)
    clock = Clock(device)
    first_step = load_checkpoint(log, model, optimizer, clock, identity) if s.resume else 0
    if kernels.compiled:
        compile_blocks(model)
    plan, val_tokens = prepared.plan, prepared.val_tokens
    num_steps = warm_up(model, optimizer, plan, val_tokens)
    numbers = microbatches_of_rank(plan, first_step, rank, world_size)
    batches = train_batches(plan, numbers, device, rank)
    graphs = count_graphs()
    log.write(f"ready after {time.monotonic() - START:.1f} s: {counted(num_steps, 'warm-up step')}, "
              f"{counted(graphs - graphs_of_trials, 'graph')} compiled")
    ending = train(model, optimizer, batches, plan.schedule, val_tokens, log, clock, identity, first_step)
    if kernels.compiled:
        late = count_graphs() - graphs
        warning = "WARNING, while timed: " * (late > 0)
        log.write(f"{warning}compiled since the warm-up: {counted(late, 'graph')}")
    tokens = sum(step.stage.batch_tokens for step in plan.schedule[:ending.num_steps])
    seen = f"{tokens:,} tokens in {clock.total:.1f} s"
    if ending.code == 0 and rank == 0:
        write_sample(log, model, ending.stage, val_tokens, seen)
    log.write(ending.text, f"training: {seen}, {tokens / max(clock.total, 1e-9):,.0f} a second; "
                           f"from start to end: {time.monotonic() - START:.1f} s")
    return ending

def run(s: Settings, overrides: list[str], notes: list[str]) -> int:
    """A rank's run, from settings to the end of the race; returns the exit code. Raises UserError."""
    launched = read_launcher(os.environ)
    rank = launched.rank
    world_size = launched.world_size
    device, why_device = choose_device(s, launched)
    if launched.local_rank == 0:
        ensure_demo_data(s)  # the other ranks wait for this one in connect
    if s.torch_compile:  # loaded later, it would keep the group and its threads, which may abort at the end
        importlib.import_module("torch._dynamo")
    connect(device, launched)
    cards = of_all_ranks(read_card(device))
    notes = [*notes, why_device, *idle_gpus(s, device, launched.local_world_size)]
    s, about_memory, peak = fit_memory(s, overrides, world_size, cards)
    prepared = prepare(s, overrides, [*notes, *about_memory], world_size)
    identity = identify_run(s, read_source(), prepared.plan, prepared.val_tokens, world_size)
    require_same_run(identity, s)
    log = Log(s, rank, peak)
    try:
        ending = race(s, prepared, identity, log, device, rank, world_size)
    except BaseException as error:
        log.write(f"ended by {type(error).__name__}: {error}", console=False)
        raise
    if world_size > 1:  # not after an error: a rank that failed must not wait for the others
        dist.destroy_process_group()
    return ending.code

def launch(s: Settings, overrides: list[str], notes: list[str], dry_run: bool) -> int:
    """Run with as many processes as fit this machine, unless torchrun has started this one; returns the exit
    code. dry_run: check all that can be checked without training, show the plan, and stop. Raises
    UserError."""
    read_source()
    require_places(s)
    if "WORLD_SIZE" in os.environ and not dry_run:
        return run(s, overrides, notes)
    device, why_device = choose_device(s, read_launcher(os.environ))
    count = count_processes(s, device)
    if device.type == "cpu" and count > 1:
        cores = counted(count_cores(), "core")
        threads = counted(threads_of_each(count), "thread")
        notes = [*notes, f"processes: {count}, of {threads} each, on {cores}; else set NPROC"]
    if dry_run or (device.type == "cuda" and count > 1):  # what is wrong is told here, once
        ensure_demo_data(s)
        gpus = range(count if device.type == "cuda" else 0)
        fitted = fit_memory(s, overrides, count, [read_card(torch.device("cuda", i)) for i in gpus])
        notes_of_all = [*notes, why_device, *idle_gpus(s, device, count), *fitted.about]
        prepared = prepare(fitted.settings, overrides, notes_of_all, count)
    if dry_run:
        settings = ["  " + setting for setting in prepared.settings]
        print("settings:", *settings, *prepared.about, "dry run: settings and data can be used", sep="\n")
        return 0
    if count == 1:
        return run(s, overrides, notes)
    if device.type == "cuda":  # torchrun ends all ranks if one fails; NCCL would wait for it
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])
    with other_ranks(count):
        return run(s, overrides, notes)

def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line. Ends with --help, or with exit code 2 if it is wrong."""
    presets = [f"PRESET: one of {', '.join(PRESETS)}. speedrun has the defaults above. Without PRESET, a run "
               "takes speedrun\nif a CUDA GPU and FineWeb shards are here, else demo."]
    for preset, changes in list(PRESETS.items())[1:]:
        presets += [f"\nPRESET={preset} changes:", *(f"    {name} = {x!r}" for name, x in changes.items())]
    settings = inspect.getsource(Settings).partition("    padded_vocab")[0]
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a GPT-2-sized model to a target loss. Every setting is an environment variable: "
                    "MUON_LR=0.05 ./run.sh",
        epilog="\n".join([settings, *presets]))
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, show the plan, stop")
    return parser.parse_args(argv)

def launch_or_explain(dry_run: bool) -> int:
    """Launch with the settings of the environment; returns the exit code. A fault that a user can mend is
    told in one sentence on stderr."""
    try:
        return launch(*read_settings(os.environ), dry_run)
    except torch.OutOfMemoryError as error:
        print("MICROBATCHES: expected a step to fit in the GPU's memory; set more microbatches than the log "
              f"shows, or, in validation, a smaller VAL_SLICE_TOKENS. {error}", file=sys.stderr)
        return 1
    except (UserError, OSError) as error:
        rank = getattr(error, "rank", None)
        if rank is not None or os.environ.get("LOCAL_RANK", "0") == "0":  # what every rank finds is told once
            where = "expected usable files, found " * isinstance(error, OSError)
            print(f"{'' if rank is None else f'rank {rank}: '}{where}{error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks get it
            print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as stop:  # by a signal, before training catches them
        return stop.code

def main(argv=None) -> int:
    """Returns the exit code: 0; 2 for settings, 1 for other user errors; 128 + the signal that stopped it. A
    rank that failed among others ends here at once: destroying its process group would wait for them, and
    while Python ends in order, threads of a group that is left may abort the process."""
    with best_effort_console():
        try:
            code = launch_or_explain(parse_arguments(argv).dry_run)
        except Exception:  # a fault of the program
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            code = 1
    if dist.is_initialized():
        os._exit(code)
    return code

if __name__ == "__main__":
    sys.exit(main())
