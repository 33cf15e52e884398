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
PRESET=frontier is the race with those ideas. Only the demo has been measured (records/); no GPU has run this
version yet.

Tensor layouts: T tokens of a packed sequence, D model width, H heads, K channels of a head, V padded
vocabulary, N bands of W tokens (plain attention), S document starts. A microbatch is one packed sequence:
whole or cut documents, one after the other; cu_seqlens holds where each begins.
"""

import argparse
import difflib
import gc
import glob
import hashlib
import inspect
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adam import adam
from tqdm import tqdm

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
        self.exit_code, self.rank = exit_code, rank

@dataclass(frozen=True)
class Settings:
    """All settings; the defaults are the speedrun's. The environment variable NAME sets field `name`."""

    # where it runs
    device: str = "auto"  # auto, cuda or cpu; auto takes CUDA if there is a GPU
    nproc: int = 0  # [processes] for run.sh to start; 0: one per GPU, or fewer if they cannot share the batch
    dtype: str = "bfloat16"  # bfloat16 or float32: activations, embedding tables, Newton-Schulz
    fp8_head: bool = True  # [0 or 1] train the head in float8 if the GPU can and DTYPE is bfloat16
    torch_compile: bool = True  # [0 or 1] compile the blocks with torch.compile (needs a C++ compiler)
    seed: int = 0  # seed of the initial weights
    data_path: str = ""  # [folder] in which the next two patterns start; empty: the script's
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # [pattern] training shards, in name order
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"  # [pattern] validation shards, likewise
    log_dir: str = "logs"  # [folder] each run makes a folder in it, for its log and checkpoints
    checkpoint_every: int = 0  # [steps] save every so many steps and at the end; keep two; 0: never
    resume: str = ""  # checkpoint to continue from; auto: the newest of this race in LOG_DIR, if any
    # the race
    num_iterations: int = 1705  # [steps] length of the run and of its schedules
    target_loss: float = 3.28  # [nats/token] stop at the first validation loss at or below it
    val_loss_every: int = 125  # [steps] validate every so many steps, and at the end; 0: only at the end
    val_tokens: int = 10_485_760  # [tokens] to validate on, from the start of the validation shards
    val_slice_tokens: int = 262_144  # [tokens] of one forward pass in validation; less needs less memory
    warmup_steps: int = 30  # [steps] untimed and then undone; at least one for each window size; 0: none
    sample_tokens: int = 0  # [tokens] to write after an unseen text when the run ends (models of bytes only)
    # a training step's batch
    batch_tokens: int = 393_216  # [tokens] per step, over all ranks
    microbatches: int = 8  # packed sequences per step, over all ranks; raise it to save GPU memory
    max_seq_len: int = 2048  # [tokens] most tokens used of one document; the rest is dropped
    epochs: int = 1  # [passes] maximum number of passes over the training shards
    # the model
    vocab_size: int = 50_257  # [ids] that may occur in the data
    vocab_multiple: int = 128  # [ids] the vocabulary is padded to a multiple of this
    bos_id: int = 50_256  # [id] of the token that opens every document
    layout: str = "A AM AM AM AM AM AM M AM AM AM AM"  # one word per block: A attention, M MLP; A+M: parallel
    value_embeds: str = "012......012"  # one character per block: the number of its value embedding, or a dot
    window_pattern: str = "LSSSLSSLSSSL"  # one character per block: L long attention window, S short
    window_schedule: str = "3,7,11"  # [WINDOW_BLOCK] long windows, each for an equal part; short: half
    window_block: int = 128  # [tokens] unit of WINDOW_SCHEDULE
    model_dim: int = 768  # [channels] D
    num_heads: int = 6  # [heads] H
    mlp_dim: int = 3072  # [channels] of an MLP's hidden layer
    attn_scale: float = 0.12  # factor of q.k in the softmax
    gate_channels: int = 12  # [channels] of a block's input that its attention gates read; 0: no gates
    ngram_rows: int = 0  # [rows] of the n-gram table, found by a hash of the last tokens; 0: no table
    ngram_dim: int = 64  # [channels] of the n-gram table, added to the embedding's first channels
    ngram_max: int = 2  # [tokens] of the longest n-gram; the last 2, 3, ... tokens have a row each
    key_offset: bool = False  # [0 or 1] long windows: keys' non-rotary channels are of the token before
    equal_qk_start: bool = False  # [0 or 1] initialise queries and keys as equal in the non-rotary channels
    # the optimizers
    muon_lr: float = 0.05  # Muon's learning rate, for the blocks' matrices
    muon_momentum_start: float = 0.85  # Muon's momentum at step 0
    muon_momentum_end: float = 0.95  # Muon's momentum after MUON_MOMENTUM_STEPS
    muon_momentum_steps: int = 300  # [steps] of a linear change from the first to the second
    adam_lr: float = 0.008  # Adam's learning rate, for all other parameters, before the multiples below
    adam_beta1: float = 0.8  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    adam_eps: float = 1e-10  # added to the root of the second moment
    embed_lr_mult: float = 75.0  # [x ADAM_LR] for the embedding, the value embeddings and the n-gram table
    head_lr_mult: float = 1.0  # [x ADAM_LR] for the head
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
DEMO_DATA = f"data/stdlib-{platform.python_version()}"
PRESETS = {
    "speedrun": {},
    "demo": dict(
        dtype="float32", torch_compile=False,
        train_files=f"{DEMO_DATA}/stdlib_train_*.bin", val_files=f"{DEMO_DATA}/stdlib_val_*.bin",
        num_iterations=44, target_loss=1.50, val_loss_every=11, val_tokens=49_152, val_slice_tokens=8192,
        warmup_steps=3, sample_tokens=200, batch_tokens=1280, microbatches=2,
        vocab_size=257, vocab_multiple=8, bos_id=256, model_dim=128, num_heads=2, mlp_dim=256,
        window_schedule="11,11,20", window_block=16,
        gate_channels=0, ngram_rows=65_536, ngram_max=5, key_offset=True, equal_qk_start=True,
        muon_lr=0.06, muon_momentum_start=0.7, muon_momentum_end=0.85, muon_momentum_steps=50,
        adam_lr=0.014, adam_beta1=0.7, embed_lr_mult=15.0, scalar_lr_mult=2.0,
    ),
    # The speedrun with changes that won in the demo, at the sizes of later records; never run on a GPU
    "frontier": dict(
        num_iterations=2420, batch_tokens=262_144, adam_beta1=0.7,  # record 39
        ngram_rows=251_520, ngram_dim=768,  # record 62
        key_offset=True,  # record 49
        equal_qk_start=True,  # no published record
    ),
}
POSITIVE = {"num_iterations", "val_tokens", "val_slice_tokens", "batch_tokens", "microbatches", "max_seq_len",
            "epochs", "vocab_size", "vocab_multiple", "window_block", "model_dim", "num_heads", "mlp_dim",
            "ngram_dim"}
PARSERS = {int: (int, "a whole number of at least {}"), float: (float, "a number of at least {}"),
           bool: ({"0": False, "1": True}.__getitem__, "0 or 1"), str: (str, "text")}

def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple

class Block(NamedTuple):
    """One block of the network."""
    sublayers: list[str]  # in order: "A", "M", or parallel parts with one input, such as "A+M"
    value_embed: int | None  # number of its value embedding
    long_window: bool

def parse_layout(s: Settings) -> list[Block]:
    """The network's blocks, from the three layout strings (no MLP in block 0: @EmelyanenkoK, PR 120)."""
    blocks = []
    for word, value_embed, window in zip(s.layout.split(), s.value_embeds, s.window_pattern):
        sublayers = re.findall(r"[AM](?:\+[AM])*", word)
        blocks.append(Block(sublayers, None if value_embed == "." else int(value_embed), window == "L"))
    return blocks

def world_size_problem(s: Settings, world_size: int) -> str:
    """Why `world_size` ranks cannot share a step, or ''."""
    count = s.num_microbatches(world_size)
    if count % world_size == s.batch_tokens % (16 * count) == s.padded_vocab % world_size == 0:
        return ""
    return (f"NPROC: expected ranks that share {count} microbatches (equal multiples of 16 of BATCH_TOKENS="
            f"{s.batch_tokens}) and a padded vocabulary of {s.padded_vocab} ids equally, found {world_size}.")

def find_contradictions(s: Settings) -> list[str]:
    """A sentence for every setting that is out of range or does not fit the others."""
    words = s.layout.split()
    long_windows = [int(x) if x.isdecimal() else 0 for x in s.window_schedule.split(",")]
    no_attn = [i for i, word in enumerate(words) if "A" not in word and s.value_embeds[i:i + 1].isdecimal()]
    word, each = r"[AM](\+?[AM])*", f"for each of the {len(words)} words of LAYOUT"
    rows = [  # (setting, whether it fits, what is expected)
        ("device", s.device in ("auto", "cuda", "cpu"), "auto, cuda or cpu"),
        ("dtype", s.dtype in ("bfloat16", "float32"), "bfloat16 or float32"),
        ("layout", {*"AM"} <= {*s.layout} and all(re.fullmatch(word, w) for w in words),
         "words such as A, M, AM and A+M, with at least one A and one M"),
        ("value_embeds", re.fullmatch(f"[0-9.]{{{len(words)}}}", s.value_embeds), f"a digit or a dot {each}"),
        ("value_embeds", not no_attn, f"a dot for the blocks without attention, {no_attn}"),
        ("window_pattern", re.fullmatch(f"[LS]{{{len(words)}}}", s.window_pattern), f"L or S {each}"),
        ("window_schedule", min(long_windows) >= 2, "whole numbers of at least 2, separated by commas"),
        ("bos_id", s.bos_id < s.vocab_size, f"an id below VOCAB_SIZE={s.vocab_size}"),
        ("batch_tokens", s.batch_tokens % (16 * s.microbatches) == 0,
         f"a multiple of 16 x MICROBATCHES = {16 * s.microbatches}"),
        ("val_tokens", s.val_tokens % s.val_slice_tokens == 0,
         f"a multiple of VAL_SLICE_TOKENS={s.val_slice_tokens}"),
        ("model_dim", s.model_dim % (4 * s.num_heads) == 0,
         f"a multiple of 4 x NUM_HEADS = {4 * s.num_heads} (half of a head's channels rotate, in pairs)"),
        ("gate_channels", s.gate_channels <= s.model_dim, f"at most MODEL_DIM={s.model_dim}"),
        ("ngram_dim", not s.ngram_rows or s.ngram_dim <= s.model_dim, f"at most MODEL_DIM={s.model_dim}"),
        ("adam_eps", s.adam_eps > 0, "a number above 0"),
        ("ngram_max", 2 <= s.ngram_max <= len(HASH_FACTORS), f"2 to {len(HASH_FACTORS)}"),
        *((name, getattr(s, name) < 1, "a number below 1")
          for name in ("muon_momentum_start", "muon_momentum_end", "adam_beta1", "adam_beta2")),
    ]
    found = [f"{name.upper()}: expected {expected}, found {getattr(s, name)!r}."
             for name, fits, expected in rows if not fits]
    if s.nproc and (problem := world_size_problem(s, s.nproc)):
        found.append(problem)
    return found

def read_settings(environ) -> tuple[Settings, list[str], str]:
    """The settings, the names of those that the environment sets, and a line on the choice of the preset.
    Raises UserError (exit code 2) with a sentence for every unknown preset, wrong value, near miss of a
    setting's name, and contradiction."""
    preset, why_preset = choose_preset(environ)
    kinds = {f.name.upper(): f.type for f in fields(Settings)}
    known = [*(name for name in kinds if len(name) >= 6), "PRESET"]  # shorter names resemble too many words
    values, overrides, problems, wrong = dict(PRESETS.get(preset, {})), [], [], set()
    for name in sorted(environ):
        upper = name.upper()
        meant = [upper] if upper in kinds else difflib.get_close_matches(upper, known, n=1, cutoff=0.87)
        if meant and name not in (*meant, "PRESET"):
            problems.append(f"{name}: unknown setting; did you mean {meant[0]}? Otherwise unset {name}.")
        if name not in kinds:
            continue
        (parse, expected), low = PARSERS[kinds[name]], int(name.lower() in POSITIVE)
        try:
            value = parse(environ[name])
            if kinds[name] in (int, float) and not low <= value < 2**31:  # NaN is refused here, too
                raise ValueError
            values[name.lower()] = value
            overrides.append(name.lower())
        except (ValueError, KeyError):
            problems.append(f"{name}: expected {expected.format(low)}, found {environ[name]!r}.")
            wrong.add(name)
    settings = Settings(**values)
    if preset in PRESETS:  # skip cross-checks that involve a value which failed to parse
        problems += [c for c in find_contradictions(settings) if not wrong & set(re.findall(r"\w+", c))]
    else:
        problems.append(f"PRESET: expected one of {', '.join(PRESETS)}, found {preset!r}.")
    if problems:
        raise UserError(*problems, exit_code=2)
    return settings, overrides, why_preset

def choose_preset(environ) -> tuple[str, str]:
    """The preset's name, and a line that says why and how to get the other."""
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
# Model

HASH_FACTORS = 36313, 27191, 51787, 70937, 91493  # of an n-gram's newest token, the one before it, ...

def rotary_cos_sin(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos, (T, 1, 1, K // 2), and sin and -sin, (T, 1, 2, K // 2), of every position's angles, float32.
    Half-truncated RoPE: of the K // 2 pairs, the first half have the frequencies (1/1024)^(j/(n-1)) radians a
    token, j = 0 .. n-1; the others do not rotate (modded-nanogpt, @YouJiacheng)."""
    n = head_dim // 4
    frequencies = torch.cat(((1 / 1024) ** torch.linspace(0, 1, n), torch.zeros(head_dim // 2 - n)))
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32), frequencies)[:, None, None]
    sin = angles.sin()
    return angles.cos(), torch.cat((sin, -sin), dim=-2)

def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021); x: (T, H, K), float32; channel j pairs with j + K // 2.
    With the halves (a, b) of x: (a cos + b sin, b cos - a sin). One formula for both halves, since
    torch.compile would compute each of two formulas for all channels."""
    x = x.unflatten(-1, (2, -1))
    return (x * cos).addcmul_(x.flip(-2), sin).flatten(-2)

class Norm(torch.autograd.Function):
    """RMS norm without a gain, in float32, of x or of x rotated. For the backward pass, keep the result."""
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        x32 = x.float() if cos is None else apply_rotary(x.float(), cos, sin)
        scale = (x32.square().mean(-1, keepdim=True) + 2**-23).rsqrt()
        y = (x32 * scale).type_as(x)
        ctx.save_for_backward(y, scale, cos, sin)
        return y.view_as(y)  # y itself may have no gradient under torch.compile of PyTorch 2.11

    @staticmethod
    def backward(ctx, grad: Tensor):
        (y, scale, cos, sin), grad = ctx.saved_tensors, grad.float()
        along = (grad * y).mean(-1, keepdim=True)  # x's length has no effect: no gradient along y
        x_grad = torch.addcmul(grad, along, y.float(), value=-1).mul_(scale)
        return (x_grad if cos is None else apply_rotary(x_grad, cos, -sin)).type_as(y), None, None

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
    num_tokens, num_bands, band = len(q), mask.size(0), mask.size(2)
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

class GPT(nn.Module):
    """The model. The matrices of all blocks lie in banks: Muon needs one reduce-scatter, Newton-Schulz and
    all-gather for each bank. A parameter's rows, its first axis, are rounded up to a multiple of world_size:
    each rank owns an equal share, and the rows added stay zero. A parameter that is not used is None."""
    def __init__(self, s: Settings, kernels: "Kernels", world_size: int = 1):
        super().__init__()
        self.settings, self.kernels, self.blocks = s, kernels, parse_layout(s)
        self.num_attn, self.num_mlp, self.num_rows = s.layout.count("A"), s.layout.count("M"), {}
        dim, num_tables = s.model_dim, max(map(int, re.findall(r"\d", s.value_embeds)), default=-1) + 1

        def parameter(name: str, num_rows: int, *row: int, dtype=torch.float32):
            self.num_rows[name] = num_rows
            shape = (round_up(num_rows, world_size), *row)
            values = None if 0 in shape else nn.Parameter(torch.empty(shape, dtype=dtype))
            self.register_parameter(name, values)

        parameter("embed", s.padded_vocab, dim, dtype=s.torch_dtype)
        parameter("ngrams", s.ngram_rows, s.ngram_dim, dtype=s.torch_dtype)
        parameter("value_embeds", num_tables * s.padded_vocab, dim, dtype=s.torch_dtype)  # tables end to end
        parameter("attn_bank", 4 * self.num_attn, dim, dim)  # q, k, v and output projection of each attention
        parameter("gate_bank", self.num_attn, s.num_heads, s.gate_channels)
        parameter("mlp_bank", 2 * self.num_mlp, dim, s.mlp_dim)  # c_fc and c_proj of each MLP, in one shape
        parameter("lm_head", s.padded_vocab, dim)
        parameter("scalars", len(self.blocks), 5)  # as `hidden` unpacks them
        most_tokens = max(s.batch_tokens // s.microbatches, s.val_slice_tokens)
        for name, x in zip(("cos", "sin"), rotary_cos_sin(most_tokens, dim // s.num_heads)):
            self.register_buffer(name, x, persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                windows: tuple[int, int]) -> Tensor:
        """Cross-entropy in nats, summed over the tokens, a float32 scalar. The first four arguments are a
        Batch; windows: (long, short) attention windows in tokens."""
        x = self.hidden(inputs, cu_seqlens, max_seqlen, windows)
        if torch.is_grad_enabled():
            return self.kernels.head_loss(x, self.lm_head, targets)
        chunks = zip(x.split(8192), targets.split(8192))  # in validation, to save memory
        return torch.stack([softcapped_loss(part, self.lm_head, target) for part, target in chunks]).sum()

    def hidden(self, inputs: Tensor, cu_seqlens: Tensor, max_seqlen: int, windows) -> Tensor:
        """The blocks: token ids (T,) -> the head's input (T, D), in the activations' dtype."""
        s, num_tokens = self.settings, len(inputs)
        attn_args = {window: self.kernels.attn_args(cu_seqlens, num_tokens, window, max_seqlen, s.torch_dtype)
                     for window in dict.fromkeys(windows)}
        x = x0 = Norm.apply(self.look_up_embed(inputs))
        if self.value_embeds is not None:  # the rows of all tables in one look-up
            first_rows = torch.arange(0, self.num_rows["value_embeds"], s.padded_vocab, device=inputs.device)
            value_embeds = F.embedding(inputs + first_rows[:, None], self.value_embeds).unbind()
        attentions, mlps = self.split_banks()
        scalars = self.scalars.flatten().unbind()
        num_blocks, outputs = len(self.blocks), []
        for i, block in enumerate(self.blocks):
            # skip_weight: U-net skips (@brendanh0gan); lambdas: mix the embedding back in (@KoszarskyB)
            skip_weight, lambda_x, lambda_x0, *sa_lambdas = scalars[5 * i:5 * i + 5]
            if i >= num_blocks - num_blocks // 2:
                x = x + skip_weight * outputs.pop()
            x = lambda_x * x + lambda_x0 * x0
            ve = None if block.value_embed is None else value_embeds[block.value_embed]
            args = attn_args[windows[0] if block.long_window else windows[1]]
            for sublayer in block.sublayers:
                x_in = Norm.apply(x)
                for part in sublayer.split("+"):
                    if part == "A":
                        x = x + self.attention(x_in, *next(attentions), sa_lambdas, ve, args,
                                               offset=s.key_offset and block.long_window)
                    else:
                        c_fc, c_proj = next(mlps)  # both (D, hidden) (@byronxu99, PR 109)
                        x = x + F.linear(ReluSquared.apply(x_in @ c_fc), c_proj)
            if i < num_blocks // 2:
                outputs.append(x)
        return Norm.apply(x)

    def attention(self, x: Tensor, w_qkv: Tensor, w_o: Tensor, gate: Tensor | None, sa_lambdas,
                  ve: Tensor | None, attn_args, offset: bool) -> Tensor:
        """One attention; x: (T, D), normalised; w_qkv: (3D, D); gate: (H, channels); ve: (T, D)."""
        s = self.settings
        qkv, gate_logits = (F.linear(x, w_qkv), None) if gate is None else GatedQKV.apply(x, w_qkv, gate)
        q, k, v = qkv.view(len(x), 3 * s.num_heads, -1).chunk(3, dim=1)
        q, k = (Norm.apply(part, self.cos[:len(x)], self.sin[:len(x)]) for part in (q, k))
        if offset:
            k = offset_keys(k)
        if ve is None:
            w_o = sa_lambdas[0] * w_o  # the same as a factor of v, which has far more elements
        else:  # value embeddings (Zhou et al., 2024; @KoszarskyB)
            v = sa_lambdas[0] * v + sa_lambdas[1] * ve.view_as(v)
        y = self.kernels.attention(q, k, v, attn_args, s.attn_scale)
        if gate is not None:  # sparse attention gate, one for each head and token (@classiclarryd, PR 117)
            y = y * torch.sigmoid(gate_logits).unsqueeze(-1)
        return F.linear(y.flatten(1), w_o)

    def look_up_embed(self, inputs: Tensor) -> Tensor:
        """The embedding, (T, D), and in its first channels the sum of the rows for the last 2, 3, ... tokens.
        (Bigrams: record 62 of modded-nanogpt, which adds them before every block. In the demo, whose tokens
        are bytes, longer n-grams play the part of words. Documents' borders are ignored.)"""
        x = F.embedding(inputs, self.embed)
        if self.ngrams is None:
            return x
        ids, hashes = inputs.long(), []
        total = HASH_FACTORS[0] * ids
        for back in range(1, self.settings.ngram_max):
            total = total ^ HASH_FACTORS[back] * F.pad(ids, (back, 0))[:len(ids)]
            hashes.append(total % self.num_rows["ngrams"])
        rows = F.embedding(torch.stack(hashes), self.ngrams).sum(0)
        return x + F.pad(rows, (0, x.size(1) - rows.size(1)))

    def split_banks(self):
        """Iterators over (w_qkv, w_o, gate) and (c_fc, c_proj), each cast to the activations' dtype."""
        dim, dtype = self.settings.model_dim, self.settings.torch_dtype
        rows, sizes = self.attn_bank.flatten(0, 1), (3 * dim, dim) * self.num_attn
        attn = [w.to(dtype) for w in rows.split((*sizes, len(rows) - sum(sizes)))]
        gates = repeat(None) if self.gate_bank is None else [w.to(dtype) for w in self.gate_bank.unbind()]
        mlp = [w.to(dtype) for w in self.mlp_bank.unbind()]  # a loop over the bank compiles to a slow gradient
        return zip(attn[:-1:2], attn[1::2], gates), zip(mlp[0::2], mlp[1::2])

@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """Fill every parameter. Numbers are drawn on the CPU, so that all devices and world sizes start alike."""
    generator = torch.Generator().manual_seed(seed)
    bound = 3**0.5 * 0.5 * model.settings.model_dim**-0.5  # uniform within +-bound has std 0.5 / sqrt(D)
    for name, p in model.named_parameters():
        values = torch.zeros(model.num_rows[name], *p.shape[1:])
        if name in ("embed", "value_embeds"):
            values.normal_(generator=generator)
        elif name == "attn_bank":  # q, k, v of every attention; the output projections start at zero
            values.unflatten(0, (-1, 4))[:, :3].uniform_(-bound, bound, generator=generator)
            if model.settings.equal_qk_start:  # a query finds its own token before anything is learned
                w = values.unflatten(0, (-1, 4)).unflatten(2, (model.settings.num_heads, 2, 2, -1))
                w[:, 1, :, :, 1] = w[:, 0, :, :, 1]
        elif name == "mlp_bank":  # c_fc; c_proj starts at zero
            values.unflatten(0, (-1, 2))[:, 0].uniform_(-bound, bound, generator=generator)
        elif name == "scalars":  # skip weight, lambdas of x and x0, lambdas of v and its embedding
            values[:] = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.5])
        elif name not in ("gate_bank", "lm_head", "ngrams"):
            raise KeyError(f"init_weights has no initial values for parameter {name}")
        p.zero_()[:len(values)] = values.to(p)

# ----------------------------------------------------------------------------------------------------------
# Optimizers: Muon for the blocks' matrices, Adam for the rest, both sharded over the ranks
#
# A rank owns an equal slice of each parameter's rows, and keeps optimizer state for it alone. A step:
#   1. reduce_scatter: each rank gets the sum over ranks of its own rows of every gradient; that of the head,
#      which the backward pass completes first, is under way while the rest of the backward pass runs;
#   2. step: it updates its rows of each parameter, as soon as their gradient has arrived;
#   3. all_gather: the updated rows are gathered, so that all ranks hold the same parameters, bit for bit.

# PyTorch 2.13 renamed both collectives, and warns about the old names, which are all that 2.11 has.
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

def XXT(X: Tensor, base: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """X @ X.T, or alpha * X @ X.T + beta * base, of matrices. X: (n, rows, cols)."""
    return X @ X.mT if base is None else torch.baddbmm(base, X, X.mT, beta=beta, alpha=alpha)

def newton_schulz(G: Tensor, dtype: torch.dtype, XXT: Callable = XXT) -> Tensor:
    """Nearly orthogonal matrices with the row and column spaces of G, (n, rows, cols), in `dtype`.
    Five steps of Muon's quintic (kellerjordan.github.io/posts/muon) bring singular values to 1 +- 0.3."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero among the quintics whose values stay near 1
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).to(dtype)  # so that X @ X.T is the smaller product
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = XXT(X)
        B = XXT(A, base=A, alpha=c, beta=b)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X

class Muon(NamedTuple):
    """Nesterov momentum, then orthogonalisation of each matrix on its own (Keller Jordan et al., 2024)."""
    dtype: torch.dtype  # of Newton-Schulz
    XXT: Callable
    state_names = ("momentum_buffer",)

    def update(self, p: Tensor, grad: Tensor, state, lr: float, momentum: float, step: int) -> None:
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        direction = newton_schulz(grad.lerp_(buffer, momentum), self.dtype, self.XXT)
        rows, cols = direction.shape[-2:]
        p.add_(direction, alpha=-lr * max(1, rows / cols) ** 0.5)

class Adam(NamedTuple):
    """Adam (Kingma and Ba, 2015) in PyTorch's fused kernel: one pass, in float32, and rounded once when it is
    stored. State has the parameter's dtype. eps is added to the root of the uncorrected second moment."""
    beta1: float
    beta2: float
    eps: float
    state_names = ("exp_avg", "exp_avg_sq")

    def update(self, p: Tensor, grad: Tensor, state, lr: float, momentum: float, step: int) -> None:
        eps = self.eps / (1 - self.beta2**step) ** 0.5  # the kernel adds it to the corrected moment's root
        steps_done = torch.full((), step - 1.0, device=p.device)
        adam([p], [grad], *([x] for x in state.values()), [], [steps_done], fused=True, amsgrad=False,
             beta1=self.beta1, beta2=self.beta2, lr=lr, weight_decay=0.0, eps=eps, maximize=False)

@dataclass
class ShardedParam:
    """One parameter as the optimizer sees it on this rank."""
    name: str
    param: nn.Parameter
    rule: Muon | Adam
    lr: float
    p_slice: Tensor  # this rank's rows of the parameter
    state: dict[str, Tensor]  # of the shape and dtype of p_slice
    grad_slice: Tensor | None = None  # the summed gradient of p_slice
    handle: dist.Work | None = None  # the collective in progress

    def wait(self) -> None:
        if self.handle is not None:
            self.handle.wait()
            self.handle = None

class ShardedOptimizer:
    """The three phases, for parameters that are updated by a rule each."""
    def __init__(self, params: dict[str, tuple], rank: int, world_size: int):
        """params: name -> (parameter, rule, learning rate)."""
        self.rank, self.world_size, self.sharded_params = rank, world_size, []
        for name, (p, rule, lr) in params.items():
            p_slice = p.data.chunk(world_size)[rank]
            state = {key: torch.zeros_like(p_slice) for key in rule.state_names}
            self.sharded_params.append(ShardedParam(name, p, rule, lr, p_slice, state))
        self.last_microbatch = False  # whether the backward pass under way completes the step's gradients

    def reduce_scatter_early(self, name: str) -> None:
        """From now on, phase 1 of this parameter starts within the backward pass that completes its gradient."""
        sp, = (sp for sp in self.sharded_params if sp.name == name)

        def start_if_complete(_):
            if self.last_microbatch:
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

    def reduce_scatter(self) -> None:
        """Phase 1, started for every parameter for which it has not started yet."""
        for sp in self.sharded_params:
            if sp.grad_slice is None:
                self.start_reduce_scatter(sp)

    @torch.no_grad()
    def step(self, lr_factor: float, momentum: float, step: int) -> list[Tensor]:
        """Phase 2; starts phase 3. step counts from 1. Returns a flag per parameter: gradient not finite."""
        flags = []
        for sp in self.sharded_params:
            sp.wait()
            flags.append(~sp.grad_slice.sum().isfinite())  # faster than by a maximum
            sp.rule.update(sp.p_slice, sp.grad_slice, sp.state, sp.lr * lr_factor, momentum, step)
            sp.grad_slice = None
            if self.world_size > 1:
                sp.handle = all_gather_tensor(sp.param.data, sp.p_slice, async_op=True)
        return flags

    def all_gather(self) -> None:
        """Phase 3 ends: the parameters may be read."""
        for sp in self.sharded_params:
            sp.wait()

def make_optimizer(model: GPT, s: Settings, rank: int, world_size: int) -> ShardedOptimizer:
    """The optimizer, from the table of what trains each parameter, in the order of the updates."""
    muon, adam = Muon(s.torch_dtype, model.kernels.XXT), Adam(s.adam_beta1, s.adam_beta2, s.adam_eps)
    table = dict(  # name -> (rule, learning rate)
        attn_bank=(muon, s.muon_lr),
        gate_bank=(muon, s.muon_lr),
        mlp_bank=(muon, s.muon_lr),
        embed=(adam, s.adam_lr * s.embed_lr_mult),
        ngrams=(adam, s.adam_lr * s.embed_lr_mult),
        value_embeds=(adam, s.adam_lr * s.embed_lr_mult),
        lm_head=(adam, s.adam_lr * s.head_lr_mult),
        scalars=(adam, s.adam_lr * s.scalar_lr_mult),
    )
    params = dict(model.named_parameters())
    if new := params.keys() - table.keys():
        raise KeyError(f"make_optimizer has no row for {new}")
    rows = {name: (params[name], *row) for name, row in table.items() if name in params}
    optimizer = ShardedOptimizer(rows, rank, world_size)
    optimizer.reduce_scatter_early("lm_head")
    return optimizer

# ----------------------------------------------------------------------------------------------------------
# Fast kernels for GPUs: each is used only if its results agree with its plain version's
#
# Softcapped logits lie between 0 and 30, so float32 can sum their exponentials as they are. With
# s = sigmoid(z / 7.5), exp(30 s) = exp2(EXP * s).

EXP = 30 / math.log(2)

@triton.jit
def softcap_sigmoid(z, TANH: tl.constexpr):
    """sigmoid(z / 7.5), float32. TANH: by the GPU's own approximation of tanh (relative error 2^-11), one
    special function instead of two; their rate bounds the loss kernel."""
    if TANH:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * (1 / 15)], dtype=tl.float32,
                                         is_pure=True, pack=1)
        return 0.5 + 0.5 * half
    else:
        r = tl.rsqrt(1 + tl.exp2(z * (-1 / (7.5 * 0.6931471805599453))))  # divisions are slow: 1/u = rsqrt(u)^2
        return r * r

@triton.jit
def softcap_loss_kernel(logits, targets, losses, log_sums, num_columns, EXP: tl.constexpr, TANH: tl.constexpr,
                        BLOCK: tl.constexpr):
    """One program per row: log2 of the sum of the exponentials, and the loss."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < num_columns, other=0.0).to(tl.float32)
        total += tl.where(column < num_columns, tl.exp2(EXP * softcap_sigmoid(z, TANH)), 0.0)
    log_sum = tl.log2(tl.sum(total, 0))
    target_logit = tl.load(logits + tl.load(targets + row)).to(tl.float32)
    tl.store(log_sums + row, log_sum)
    tl.store(losses + row, log_sum * (30 / EXP) - 30 * softcap_sigmoid(target_logit, TANH))

@triton.jit
def softcap_grad_kernel(logits, targets, log_sums, scale, grads, grads_t, num_rows, num_columns,
                        EXP: tl.constexpr, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per tile: scale times the loss's gradient by the logits, and its transpose."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    target = tl.load(targets + row, mask=row < num_rows, other=0)
    log_sum = tl.load(log_sums + row, mask=row < num_rows, other=0.0)
    s = softcap_sigmoid(tl.load(logits + place, mask=inside, other=0.0).to(tl.float32), TANH)
    grad = tl.exp2(EXP * s - log_sum[:, None]) - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    grad = (grad * (s - s * s) * (4 * scale)).to(grads.dtype.element_ty)
    tl.store(grads + place, grad, mask=inside)
    place = column.to(tl.int64)[:, None] * num_rows + row[None, :]
    tl.store(grads_t + place, tl.trans(grad), mask=tl.trans(inside))

@triton.jit
def cast_fp8_kernel(x, out, out_t, factor, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per tile: factor * x as e4m3 (which has no infinity: clamped to +-448), and transposed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    y = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor
    y = tl.minimum(tl.maximum(y, -448.0), 448.0).to(out.dtype.element_ty)
    tl.store(out + place, y, mask=inside)
    place = column.to(tl.int64)[:, None] * num_rows + row[None, :]
    tl.store(out_t + place, tl.trans(y), mask=tl.trans(inside))

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

def softcap_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and log2 of the sums of exponentials, (T,) float32 each. logits: (T, V), contiguous."""
    losses, log_sums = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    block = min(4096, triton.next_power_of_2(logits.size(1)))
    softcap_loss_kernel[len(logits),](logits, targets, losses, log_sums, logits.size(1), EXP, logits.is_cuda,
                                      block, num_warps=8)
    return losses, log_sums

def softcap_grad(logits: Tensor, targets: Tensor, log_sums: Tensor, scale: float, dtype: torch.dtype):
    """scale times the gradient of the sum of the losses by the logits, (T, V) of `dtype`, and its transpose."""
    grads, grads_t = empty_pair(logits, dtype)
    softcap_grad_kernel[tile_grid(logits)](logits, targets, log_sums, scale, grads, grads_t, *logits.shape, EXP,
                                           logits.is_cuda, **TILE)
    return grads, grads_t

class Float8HeadLoss(torch.autograd.Function):
    """softcapped_loss with products in float8 and a fused loss (@YouJiacheng). x and weight are e4m3, the
    gradient of the logits is e5m2, each divided by a fixed scale. Logits and x's gradient are bfloat16, the
    weight's gradient is float32; fast accumulation for the logits only."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        scales = x.size(1) ** 0.5 / 448, 2.0**-9, 1 / 448
        (x8, x8_t), (w8, w8_t) = cast_fp8(x, scales[0]), cast_fp8(weight, scales[1])
        ctx.scales = x_scale, w_scale, _ = [torch.full((), scale, device=x.device) for scale in scales]
        logits = torch._scaled_mm(x8, w8.mT, x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        losses, log_sums = softcap_loss(logits, targets)
        ctx.save_for_backward(x8_t, w8_t, targets, logits, log_sums)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        x8_t, w8_t, targets, logits, log_sums = ctx.saved_tensors
        x_scale, w_scale, grad_scale = ctx.scales
        grads, grads_t = softcap_grad(logits, targets, log_sums, 448.0, torch.float8_e5m2)
        grad_scale = grad_scale * grad  # the loss may be divided by the number of microbatches
        x_grad = torch._scaled_mm(grads, w8_t.mT, grad_scale, w_scale, out_dtype=torch.bfloat16)
        w_grad = torch._scaled_mm(grads_t, x8_t.mT, grad_scale, x_scale, out_dtype=torch.float32)
        return x_grad, w_grad, None

XXT_TILES = [triton.Config(dict(BLOCK=block, COLS=cols), num_warps=warps, num_stages=3)
             for block, cols, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 8), (128, 128, 8))]

@triton.autotune(XXT_TILES, key=["rows", "cols"], cache_results=True)
@triton.jit
def XXT_kernel(x, base, out, rows, cols, alpha, beta, ADD: tl.constexpr, BLOCK: tl.constexpr,
               COLS: tl.constexpr):
    """One program per tile of alpha * x @ x.T + beta * base at or below the diagonal, and its mirror."""
    i, j, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if i >= j:
        x += matrix * rows * cols
        out += matrix * rows * rows
        row_i, row_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
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

class Kernels(NamedTuple):
    """What a run uses where there is a choice; the defaults are plain PyTorch."""
    attn_args: Callable = banded_mask
    attention: Callable = banded_attention
    head_loss: Callable = softcapped_loss
    XXT: Callable = XXT
    compiled: bool = False  # whether torch.compile writes the blocks' kernels

def compile_blocks(model: GPT) -> None:
    """torch.compile for the blocks: a graph for each pair of windows, in training and in validation."""
    num_graphs = 1 + 2 * len(model.settings.window_schedule.split(","))  # and one in KernelTrial
    torch._dynamo.config.recompile_limit = max(8, num_graphs)
    model.hidden = torch.compile(model.hidden, dynamic=False, fullgraph=True)

class KernelTrial:
    """One block with random weights and tokens, and random matrices: a case on which kernels are compared."""
    def __init__(self, device: torch.device, s: Settings):
        self.settings = s = replace(s, layout="AM", value_embeds="0", window_pattern="L", batch_tokens=1024,
                                    microbatches=1, val_slice_tokens=1024)
        torch.manual_seed(0)
        with device:  # 120 million random numbers: a GPU draws them at once, a CPU in three seconds
            self.model = GPT(s, Kernels())
        for name, p in self.model.named_parameters():  # logits and gates get values in their useful range
            p.data.normal_(0, 1 if "embed" in name or name == "scalars" else 0.04)
        tokens = torch.randint(s.vocab_size, (1025,), device=device)
        starts = torch.tensor([0, 7, 300, 301, 900, 1024, 1024], dtype=torch.int32, device=device)
        self.batch = Batch(tokens[:-1].int(), tokens[1:], starts, 640)
        self.matrices = torch.randn(3, s.model_dim, s.mlp_dim, device=device)
        self.expected = self.results(Kernels())

    def results(self, kernels: Kernels) -> dict[str, Tensor]:
        """Loss, gradients and orthogonalised matrices. Compiled kernels stay compiled: try them last."""
        model = self.model
        model.kernels = kernels
        model.zero_grad()
        if kernels.compiled:
            compile_blocks(model)
        loss = model(*self.batch, (384, 384))
        loss.backward()
        names = "embed", "attn_bank", "mlp_bank", "lm_head"
        results = {f"gradient of {name}": getattr(model, name).grad for name in names}
        results["loss"] = loss.detach()
        results["Newton-Schulz"] = newton_schulz(self.matrices, self.settings.torch_dtype, kernels.XXT)
        return results

    def error(self, kernels: Kernels) -> tuple[Tensor, str]:
        """The largest relative error among the results, a float32 scalar (inf for nan), and that result's name."""
        results, names = self.results(kernels), list(self.expected)
        errors = [(results[name] - x.float()).norm() / x.float().norm() for name, x in self.expected.items()]
        errors = torch.stack(errors).nan_to_num(nan=math.inf, posinf=math.inf)
        return errors.max(), names[int(errors.argmax())]

class Candidate(NamedTuple):
    """A fast kernel that a run may take."""
    kind: str  # what it computes
    name: str
    fields: dict  # of Kernels
    tolerance: float  # of the relative error on KernelTrial
    prepare: Callable = int  # is called before the trial
    advice: str = ""  # for the log if this is not taken

FA3_ADVICE = ("; version 3 is faster on this GPU: python -m pip install flash-attn-3 --index-url "
              "https://download.pytorch.org/whl/cu130, or cu126")

def list_candidates(capability: tuple[int, int], s: Settings) -> list[Candidate]:
    """The fast kernels for a GPU; of a kind, the fastest first."""
    found, bfloat16 = [], s.dtype == "bfloat16"
    if bfloat16:  # FlashAttention has no float32, and tiles of float32 need more shared memory than there is
        activate, restore = torch.nn.attention.activate_flash_attention_impl, restore_flash_attention_2
        flash = dict(attn_args=varlen_args, attention=flash_attention)
        if capability[0] == 9:
            found.append(Candidate("attention", "FlashAttention 3", flash, 0.03, lambda: activate("FA3"),
                                   FA3_ADVICE))
        found.append(Candidate("attention", "FlashAttention 2 of PyTorch", flash, 0.03, restore))
    if (s.fp8_head and bfloat16 and capability >= (8, 9)
            and s.padded_vocab % 16 == 0 and s.model_dim % 16 == 0):
        found.append(Candidate("head", "float8, fused loss", dict(head_loss=Float8HeadLoss.apply), 0.1))
    if s.torch_compile:
        compiled = torch.compile(softcapped_loss, dynamic=False)
        found.append(Candidate("head", f"{s.dtype}, torch.compile", dict(head_loss=compiled), 0.03))
    if bfloat16:
        found.append(Candidate("Newton-Schulz", "half of each symmetric product", dict(XXT=symmetric_XXT), 0.1))
    if s.torch_compile:  # the last, with the attention that was chosen
        found.append(Candidate("blocks", "torch.compile", dict(compiled=True), 0.1))
    return found

def restore_flash_attention_2() -> None:
    torch.nn.attention.restore_flash_attention_impl(False)  # False: no warning if it is active already

def choose_kernels(device: torch.device, s: Settings) -> tuple[Kernels, list[str]]:
    """The kernels for `device`, and a line for each kind that gives the choice and its reason. On a GPU, a fast
    kernel must agree with the plain ones on KernelTrial on every rank; each joins those chosen before it."""
    if device.type == "cpu":
        return Kernels(compiled=s.torch_compile), ["kernels: plain PyTorch (the device is a CPU)"]
    torch.backends.cuda.enable_cudnn_sdp(False)  # gave nan for some masks (pytorch issue 196678)
    candidates = list_candidates(torch.cuda.get_device_capability(device), s)
    trial = KernelTrial(device, s) if candidates else None
    chosen, lines = Kernels(), []
    for kind in ("attention", "head", "Newton-Schulz", "blocks"):
        taken, rejected = "", []
        for candidate in candidates:
            if candidate.kind != kind or taken:
                continue
            tried = chosen._replace(**candidate.fields)
            error, where = torch.tensor(math.inf, device=device), ""
            try:
                candidate.prepare()
                error, where = trial.error(tried)
            except Exception as raised:  # whatever fails, use another
                where = repr(raised)
            if dist.is_initialized():
                dist.all_reduce(error, op=dist.ReduceOp.MAX)
            if error <= candidate.tolerance:
                chosen = tried
                taken = f"{candidate.name}; {error:.1e} from plain PyTorch on a small case"
            else:
                rejected.append(f"; {candidate.name} was {error:.1e} from plain PyTorch on a small case, more "
                                f"than {candidate.tolerance:g} ({where}){candidate.advice}")
        if not rejected:
            reason = f"nothing else for DTYPE={s.dtype} and TORCH_COMPILE={s.torch_compile:d}"
            lines.append(f"{kind}: {taken or f'plain PyTorch ({reason})'}")
        else:
            lines.append(f"{kind}: WARNING: {taken or 'plain PyTorch, much slower'}{''.join(rejected)}")
    return chosen, lines

# ----------------------------------------------------------------------------------------------------------
# Data: token shards, the packing plan, the loader's thread, validation
#
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens as uint16.
# Before step 0, plan_packing checks every token that the run needs, and finds where each microbatch begins.

SHARD_KIND, HEADER_BYTES = [20240520, 1], 1024
REMAKE = "delete it and make it again (FineWeb: python data/cached_fineweb10B.py), or name other files"
OTHER_IDS = "set PRESET, or VOCAB_SIZE and BOS_ID, to match these files"

class TokenShard:
    """One shard file. `checksum` is that of its tokens once document_starts has read them."""
    def __init__(self, path: Path, s: Settings):
        """Raises UserError, with file, expected, found and remedy, if header or size are wrong."""
        self.path, self.vocab_size, self.bos_id, self.checksum = path, s.vocab_size, s.bos_id, None
        kind, count = np.fromfile(path, "<i4", count=2).tolist(), np.fromfile(path, "<i4", count=1, offset=8)
        self.expect(kind == SHARD_KIND and len(count), f"magic number and version {SHARD_KIND}", kind)
        self.num_tokens, size = int(count[0]), path.stat().st_size
        expected = HEADER_BYTES + 2 * self.num_tokens
        self.expect(self.num_tokens > 0, "at least 1 token", self.num_tokens)
        self.expect(size == expected, f"{expected:,} bytes for {self.num_tokens:,} tokens", f"{size:,}")

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
        self.checksum, starts = zlib.crc32(tokens), np.flatnonzero(tokens == self.bos_id)
        self.expect(len(starts), f"documents that open with BOS_ID={self.bos_id}", "no such token", OTHER_IDS)
        return starts

def find_files(root: Path, pattern: str) -> list[Path]:
    """Files that match, in name order; an absolute pattern stands for itself."""
    paths = map(Path, glob.glob(os.path.join(glob.escape(str(root)), pattern)))
    return sorted(path for path in paths if not path.is_dir())

def open_shards(s: Settings, name: str) -> list[TokenShard]:
    """The shards that the pattern in setting `name` matches, headers checked. Raises UserError."""
    root, pattern = Path(s.data_path or HERE), getattr(s, name)
    paths = find_files(root, pattern)
    if not paths:
        raise UserError(f"{name.upper()}: expected token shards at {root / pattern}, found none; correct it, "
                        "fetch FineWeb with python data/cached_fineweb10B.py, or set PRESET=demo.")
    return [TokenShard(path, s) for path in paths]

class PackingPlan(NamedTuple):
    """Which documents each microbatch of the run takes. Documents are numbered over all shards and passes."""
    shards: list[TokenShard]
    shard: np.ndarray  # (documents,) int64: number of the shard that holds it
    start: np.ndarray  # (documents,) int64: its first token there
    length: np.ndarray  # (documents,) int64: its tokens, at most MAX_SEQ_LEN
    first: np.ndarray  # (steps x microbatches + 1,) int64: the document that opens each microbatch
    summary: str

def plan_packing(shards: list[TokenShard], s: Settings, num_microbatches: int) -> PackingPlan:
    """Pack the documents of the planned steps; reads shard after shard until there are enough.
    A microbatch of T tokens takes T + 1, since targets are shifted by one: documents from their BOS, each cut
    at MAX_SEQ_LEN, the last where the microbatch is full. The rest of a cut document is dropped, and the next
    document opens the next microbatch (BOS alignment: @classiclarryd, @varunneal). Raises UserError."""
    room, needed = s.batch_tokens // num_microbatches + 1, s.num_iterations * num_microbatches
    documents, first = [], [0]  # documents: rows of shard, start and size, for each shard and pass
    for n in range(s.epochs * len(shards)):
        if n < len(shards):
            starts = shards[n].document_starts()
            sizes = np.diff(starts, append=shards[n].num_tokens)
            documents.append(np.stack((np.full_like(starts, n), starts, sizes)))
        else:
            documents.append(documents[n - len(shards)])
        shard, start, size = np.concatenate(documents, axis=1)
        length = np.minimum(size, s.max_seq_len)
        end = np.cumsum(length)  # of each document, if all were concatenated
        while len(first) <= needed:
            begin = end[first[-1] - 1] if first[-1] else 0
            last = int(np.searchsorted(end, begin + room))  # the document that fills the microbatch
            if last == len(end):
                break
            first.append(last + 1)
        if len(first) > needed:
            break
    available = f"{sum(x.num_tokens for x in shards):,} tokens in {len(shards)} shards"
    if len(first) <= needed:
        steps = (len(first) - 1) // num_microbatches
        shards_needed = math.ceil(len(shards) * s.num_iterations / max(steps, 1))
        raise UserError(f"TRAIN_FILES: expected documents for NUM_ITERATIONS={s.num_iterations} steps of "
                        f"{s.batch_tokens:,} tokens, found {available}, enough for {steps} steps; raise "
                        f"EPOCHS or add shards ({shards_needed} in all; python data/cached_fineweb10B.py N).")
    used, read = needed * room, int(size[:first[-1]].sum())
    summary = (f"data: {available}; the run reads {read:,} in {n // len(shards) + 1} passes, uses {used:,} "
               f"({used / read:.1%}) and drops the ends of cut documents")
    return PackingPlan(shards, shard, start, length, np.array(first), summary)

def read_validation(s: Settings) -> np.ndarray:
    """The validation tokens, (VAL_TOKENS + 1,) uint16. Raises UserError for missing or wrong files."""
    needed, parts = s.val_tokens + 1, []
    for shard in open_shards(s, "val_files"):
        parts.append(shard.read(0, min(needed - sum(map(len, parts)), shard.num_tokens)))
    tokens = np.concatenate(parts)
    if len(tokens) < needed:
        raise UserError(f"VAL_FILES: expected VAL_TOKENS + 1 = {needed:,} tokens, found {len(tokens):,}; "
                        "lower VAL_TOKENS or add shards.")
    return tokens

class Batch(NamedTuple):
    """One packed sequence, as GPT.forward takes it."""
    inputs: Tensor  # (T,) int32
    targets: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (S,) int32: where documents begin, ascending, padded with T: shapes stay static
    max_seqlen: int  # an upper bound of the documents' lengths; one number for the whole run

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

def train_batches(plan: PackingPlan, s: Settings, rank: int, world_size: int, device: torch.device,
                  first_step: int):
    """Yields this rank's training batches, those of step first_step (from 0) first. Of a step's microbatches,
    rank r of w takes numbers r, r + w, ... A thread, which never touches a GPU, assembles them five ahead.
    Raises UserError if a shard was cut while in use."""
    num_microbatches = s.num_microbatches(world_size)
    num_tokens, most_starts = s.batch_tokens // num_microbatches, int(np.diff(plan.first).max())

    def assemble(number: int) -> Batch:
        """In the thread: microbatch `number` of the run."""
        room, parts = num_tokens + 1, []
        for document in range(plan.first[number], plan.first[number + 1]):
            start, length = int(plan.start[document]), min(int(plan.length[document]), room)
            parts.append(plan.shards[plan.shard[document]].read(start, start + length))
            room -= length
        starts = np.cumsum([0, *map(len, parts[:-1])])
        return make_batch(np.concatenate(parts), starts, most_starts, min(s.max_seq_len, num_tokens))

    thread = ThreadPoolExecutor(1, "loader")
    numbers = iter(range(first_step * num_microbatches + rank, len(plan.first) - 1, world_size))
    ahead = deque(thread.submit(assemble, number) for number in islice(numbers, 5))
    while ahead:
        try:
            batch = ahead.popleft().result()
        except (UserError, OSError) as error:
            raise UserError(str(error), rank=rank) from None
        ahead.extend(thread.submit(assemble, number) for number in islice(numbers, 1))
        yield batch.to(device)

def validation_batches(tokens: np.ndarray, s: Settings, rank: int, world_size: int, device: torch.device):
    """Yields (number, batch) for this rank's validation slices: every world_size-th of VAL_SLICE_TOKENS."""
    cuts = np.arange(0, s.val_tokens + 1, s.val_slice_tokens)
    starts = np.union1d(cuts, np.flatnonzero(tokens[:-1] == s.bos_id))
    places = np.searchsorted(starts, cuts)
    most_starts, max_seqlen = int(np.diff(places).max()), int(np.diff(starts).max())
    for n in range(rank, len(cuts) - 1, world_size):
        own = starts[places[n]:places[n + 1]] - cuts[n]
        yield n, make_batch(tokens[cuts[n]:cuts[n + 1] + 1], own, most_starts, max_seqlen).to(device)

# ----------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step

def lr_scale(step: int, s: Settings) -> float:
    """Factor of every learning rate: 1, then linear down to final_lr_frac over the last cooldown_frac."""
    left = (s.num_iterations - step) / s.num_iterations
    if left >= s.cooldown_frac:
        return 1.0
    return s.final_lr_frac + (1 - s.final_lr_frac) * left / s.cooldown_frac

def muon_momentum(step: int, s: Settings) -> float:
    """Muon's momentum, linear over the first muon_momentum_steps."""
    done = min(step / s.muon_momentum_steps, 1) if s.muon_momentum_steps else 1
    return (1 - done) * s.muon_momentum_start + done * s.muon_momentum_end

def attention_windows(step: int, s: Settings) -> tuple[int, int]:
    """(long, short) attention windows in tokens (long and short: @leloykun; growing: @varunneal)."""
    long_windows = [int(x) for x in s.window_schedule.split(",")]
    window = long_windows[len(long_windows) * step // (s.num_iterations + 1)]
    return window * s.window_block, window // 2 * s.window_block

# ----------------------------------------------------------------------------------------------------------
# Run: processes and device, clock, log

def choose_device(s: Settings) -> tuple[torch.device, str]:
    """The device of this process and the reason. Raises UserError (exit code 2) if there are too few GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if s.device == "cpu" or (s.device == "auto" and not gpus):
        return torch.device("cpu"), "as DEVICE says" if s.device == "cpu" else "no CUDA GPU is here"
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), s.nproc)
    if processes > gpus:
        raise UserError(f"DEVICE: expected a CUDA GPU for each of {processes} processes, found {gpus} GPUs; "
                        "start fewer (NPROC=... ./run.sh) or set DEVICE=cpu.", exit_code=2)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "a CUDA GPU is here"

def init_distributed(s: Settings) -> tuple[torch.device, str, int, int]:
    """(device, reason, rank, world_size), as torchrun's variables say. Raises UserError."""
    device, why = choose_device(s)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if problem := world_size_problem(s, world_size):
        raise UserError(problem, exit_code=2)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        ensure_demo_data(s)
    if world_size > 1:  # waits for every rank, and so for the demo's data
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun keeps its store over restarts, with the addresses of dead ranks: use a prefix for each
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
                                device_id=device if cuda else None)
        dist.barrier()  # a rank that ends with an error must not do so while others still connect
    return device, why, rank, world_size

class Clock:
    """Training time in seconds: runs between start() and stop(), each of which waits for the device first."""
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

    def times(self, step: int) -> str:
        """Training time so far, for a log line. Does not wait for the device while the clock runs."""
        running = 0.0 if self.started is None else time.perf_counter() - self.started
        milliseconds = 1000 * (self.total + running)
        return f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(step, 1):.2f}ms"

class Log:
    """Output of rank 0: every line goes to LOG_DIR/RUN/log.txt and the console; other ranks are silent. On a
    terminal, steps move one live line; in a pipe each prints its line."""
    def __init__(self, s: Settings, rank: int):
        """Makes the run's folder. Raises OSError if it cannot."""
        self.settings, self.file, self.bar, self.val_loss = s, None, None, math.nan
        if rank:
            return
        self.folder = Path(s.log_dir) / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}"
        self.folder.mkdir(parents=True)
        self.file = open(self.folder / "log.txt", "x", encoding="utf-8", errors="backslashreplace")
        print(f"log: {self.folder / 'log.txt'}", flush=True)

    def write(self, *lines: str, console: bool = True) -> None:
        if self.file is None:
            return
        for line in lines:
            try:
                print(line, file=self.file, flush=True)
            except OSError as error:  # a full disk does not stop training
                print(f"{self.folder}: a line of the log could not be written: {error}", file=sys.stderr)
            if console:
                tqdm.write(line, file=sys.stdout)  # above the live line, if there is one
                sys.stdout.flush()

    def step(self, step: int, loss: float, clock: Clock) -> None:
        steps, times, live = self.settings.num_iterations, clock.times(step), sys.stdout.isatty()
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

    def result(self, step: int, val_loss: float, clock: Clock) -> None:
        """The final lines, for people and for programs."""
        target, reached = self.settings.target_loss, val_loss <= self.settings.target_loss
        self.write(f"target {'' if reached else 'not '}reached: validation loss {val_loss:.4f}, target "
                   f"{target:g}, at step {step}, after {clock.total:.1f} s of training",
                   f"target_reached:{int(reached)} target_loss:{target:g} val_loss:{val_loss:.4f} "
                   f"final_step:{step} {clock.times(step)}",
                   f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
                   f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB")

# ----------------------------------------------------------------------------------------------------------
# Checkpoints: one file in the safetensors layout, LOG_DIR/RUN/step_NNNNNN.safetensors
#
# An 8-byte length, a JSON header, raw bytes: the safetensors package reads it, and nothing in it can execute.
# Tensors are whole (gathered from the ranks), so that other numbers of ranks can resume from it. The header's
# metadata hold step, training seconds, what identifies the run, and a SHA-256 of everything else.

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
FREE_TO_CHANGE = {"device", "nproc", "log_dir", "data_path", "checkpoint_every", "resume", "sample_tokens"}

def checkpoint_hash(header: dict, payload: list) -> str:
    """SHA-256 of the header (without this hash) and the payload's parts."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for raw in payload:
        digest.update(raw)
    return digest.hexdigest()

def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under another name, flush, then rename: the file is whole or absent. Raises OSError."""
    names, offset = {dtype: name for name, dtype in DTYPES.items()}, 0
    header, payload = dict(__metadata__=metadata), []
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

def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file of write_safetensors. Raises UserError unless every byte is right."""
    try:
        data, tensors = np.fromfile(path, dtype=np.uint8), {}
        begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:begin].tobytes())
        expected = header["__metadata__"].pop("sha256")
        if checkpoint_hash(header, [data[begin:]]) != expected:
            raise ValueError(f"a SHA-256 other than {expected}")
        metadata = header.pop("__metadata__")
        for name, about in header.items():
            first, last = about["data_offsets"]
            raw = torch.from_numpy(data[begin + first:begin + last].copy())  # copied for its alignment
            tensors[name] = raw.view(DTYPES[about["dtype"]]).view(about["shape"])
        return tensors, metadata
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a whole checkpoint, found {error!r}; name another.") from None

def identify_run(s: Settings, source: str, plan: PackingPlan, val_tokens: np.ndarray, world_size: int):
    """What must be the same for a run to continue from a checkpoint, by name."""
    same = {name: value for name, value in asdict(s).items() if name not in FREE_TO_CHANGE}
    return same | dict(source=hashlib.sha256(source.encode()).hexdigest(),
                       training_data={x.path.name: x.checksum for x in plan.shards if x.checksum is not None},
                       validation_data=zlib.crc32(val_tokens),
                       microbatches_of_a_step=s.num_microbatches(world_size))

def save_checkpoint(log: Log, model: GPT, optimizer: ShardedOptimizer, step: int, seconds: float,
                    identity: dict) -> None:
    """Write the run's state after `step` steps; keep the newest two. Called by all ranks; rank 0 writes."""
    tensors = {name: p.data[:model.num_rows[name]] for name, p in model.named_parameters()}
    for sp in optimizer.sharded_params:
        for key, x in sp.state.items():
            whole = x
            if dist.is_initialized():
                whole = torch.empty_like(sp.param.data)
                all_gather_tensor(whole, x, async_op=True).wait()
            if log.file is not None:
                tensors[f"{key}.{sp.name}"] = whole[:model.num_rows[sp.name]].cpu()
    if log.file is None:
        return
    path = log.folder / f"step_{step:06d}.safetensors"
    try:
        metadata = dict(step=str(step), seconds=repr(seconds), run=json.dumps(identity))
        write_safetensors(path, tensors, metadata)
        log.write(f"checkpoint: {path}")
        for old in sorted(log.folder.glob("step_*.safetensors"))[:-2]:
            old.unlink(missing_ok=True)
    except OSError as error:  # the checkpoints that are there stay
        log.write(f"checkpoint: WARNING: {path} could not be written: {error}; training goes on")

@torch.no_grad()
def load_checkpoint(log: Log, model: GPT, optimizer: ShardedOptimizer, clock: Clock, identity: dict) -> int:
    """Load the checkpoint that RESUME names; returns the number of steps done. Called by all ranks. auto is
    the newest whole one of this race, or a new start if LOG_DIR has no checkpoints. Raises UserError."""
    s, problem, paths = log.settings, None, [Path(log.settings.resume)]
    if s.resume == "auto":
        paths = sorted(Path(s.log_dir).glob("*/step_*.safetensors"), key=os.path.getmtime, reverse=True)
    for path in paths:
        try:
            tensors, metadata = read_safetensors(path)
            theirs = json.loads(metadata["run"])
            changed = [f"{name} {theirs.get(name)!r} (here {identity.get(name)!r})"
                       for name in sorted(theirs | identity) if theirs.get(name) != identity.get(name)]
            if not changed:
                break
            raise UserError(f"{path}: expected a checkpoint of this race, found {', '.join(changed)}; undo "
                            "the change, or unset RESUME to start anew.")
        except UserError as error:
            log.write(f"checkpoint: skipped: {error}")
            problem = problem or error
    else:
        if problem:
            raise UserError(f"RESUME: {problem}", exit_code=2)
        log.write(f"checkpoint: none in {s.log_dir}, starting anew")
        return 0
    for sp in optimizer.sharded_params:
        num_rows, whole = model.num_rows[sp.name], torch.zeros_like(sp.param.data)
        sp.param.data[:num_rows] = tensors[sp.name].to(whole)
        for key, x in sp.state.items():
            whole[:num_rows] = tensors[f"{key}.{sp.name}"].to(whole)
            x.copy_(whole.chunk(optimizer.world_size)[optimizer.rank])
    clock.total = float(metadata["seconds"])
    log.write(f"resumed: {path}, step {metadata['step']}, after {clock.total:.1f} s of training")
    return int(metadata["step"])

# ----------------------------------------------------------------------------------------------------------
# Training

def train_step(model: GPT, optimizer: ShardedOptimizer, batches, step: int, lr_factor: float, momentum: float,
               windows: tuple[int, int], stop: Callable[[], int] = int):
    """One optimizer step, number `step` from 1. Returns its status over all ranks, float32 on the host: mean
    loss, number of requests to stop, and for each parameter whether its gradient was not finite; and the CUDA
    event of its arrival there (None on a CPU), so that the host need not wait for later steps."""
    s, device = model.settings, model.scalars.device
    num_microbatches = s.num_microbatches(optimizer.world_size)
    loss_sum = torch.zeros((), device=device)
    count = num_microbatches // optimizer.world_size
    for number in range(count):
        optimizer.last_microbatch = number == count - 1
        loss = model(*next(batches), windows) / num_microbatches
        loss.backward()  # gradients summed over ranks are those of the mean over the step's microbatches
        loss_sum += loss.detach()
    optimizer.reduce_scatter()
    flags = optimizer.step(lr_factor, momentum, step)
    mean_loss = loss_sum / (s.batch_tokens // num_microbatches)
    status = torch.stack([mean_loss, torch.full_like(loss_sum, stop() > 0), *flags])
    if dist.is_initialized():
        dist.all_reduce(status)
    optimizer.all_gather()
    status = status.to("cpu", non_blocking=True)  # from a GPU: into pinned memory
    return status, torch.cuda.current_stream().record_event() if device.type == "cuda" else None

def warm_up(model: GPT, optimizer: ShardedOptimizer, batches, val_tokens: np.ndarray) -> int:
    """Untimed steps at every window size (and validation passes, if compiled), undone bit for bit. Returns
    how many. All take the first batch."""
    s = model.settings
    if not s.warmup_steps:
        return 0
    batch = next(batches)
    states = [x for sp in optimizer.sharded_params for x in sp.state.values()]
    tensors = [*(p.data for p in model.parameters()), *states]
    before = [x.to("cpu", copy=True) for x in tensors]  # not in the GPU's memory
    window_pairs = sorted({attention_windows(step, s) for step in range(s.num_iterations + 1)})
    num_steps = max(s.warmup_steps, len(window_pairs))
    for i in range(num_steps):
        windows = window_pairs[i % len(window_pairs)]
        train_step(model, optimizer, repeat(batch), i + 1, 1.0, s.muon_momentum_start, windows)
    if model.kernels.compiled:
        _, val_batch = next(validation_batches(val_tokens, s, 0, 1, model.scalars.device))
        with torch.no_grad():
            for windows in window_pairs:
                model(*val_batch, windows)
    for x, saved in zip(tensors, before):
        x.copy_(saved)
    return num_steps

@torch.no_grad()
def validate(model: GPT, val_tokens: np.ndarray, s: Settings, rank: int, world_size: int,
             windows: tuple[int, int]) -> float:
    """Mean loss over all validation tokens, each counted once; the same number on every rank."""
    device = model.scalars.device
    losses = torch.zeros(s.val_tokens // s.val_slice_tokens, device=device)
    for number, batch in validation_batches(val_tokens, s, rank, world_size, device):
        losses[number] = model(*batch, windows) / s.val_slice_tokens
    if world_size > 1:  # each slice's loss is on one rank and zero on the others, so the sum is exact
        dist.all_reduce(losses)
    return losses.double().mean().item()

def catch_signals() -> Callable[[], int]:
    """Catch SIGTERM and Ctrl-C, so that the run can finish its step. The function returned gives the number
    of the signal, 0 for none; the death of torchrun counts as SIGHUP."""
    received, parent = [], os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))

    def signal_number() -> int:
        orphaned = parent is not None and os.getppid() != parent
        return received[0] if received else signal.SIGHUP * orphaned

    return signal_number

def train(model: GPT, optimizer: ShardedOptimizer, batches, val_tokens: np.ndarray, s: Settings, log: Log,
          clock: Clock, identity: dict, first_step: int) -> int:
    """The race: train and validate until the target or the last step; the clock stops during validation.
    Returns the exit code. Raises UserError if the loss or a gradient is not finite."""
    rank, world_size, stop = optimizer.rank, optimizer.world_size, catch_signals()
    stopping, running = False, deque()
    names = ["the loss", *(f"the gradient of {sp.name}" for sp in optimizer.sharded_params)]

    def finish_step() -> bool:
        """Wait for the oldest running step and log it; returns whether a rank asked to stop."""
        step, (status, arrived) = running.popleft()
        if arrived is not None:
            arrived.synchronize()
        loss, stops, *flags = status.tolist()
        spoiled = [name for name, flag in zip(names, [not math.isfinite(loss), *flags]) if flag]
        if spoiled:
            raise UserError(f"step {step}: expected finite numbers, found inf or nan in {', '.join(spoiled)};"
                            " lower the learning rates, or go on from a checkpoint.")
        log.step(step, loss, clock)
        return stops > 0

    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would stop the loop for up to half a second
    if world_size > 1:
        dist.barrier()  # the clock starts when the last rank is ready
    clock.start()
    for step in range(first_step, s.num_iterations + 1):
        last_step = step == s.num_iterations
        validating = last_step or (s.val_loss_every and step % s.val_loss_every == 0)
        saving = s.checkpoint_every and step % s.checkpoint_every == 0
        if validating or saving or stopping:
            clock.stop()
            while running:
                stopping |= finish_step()
            if validating:
                val_loss = validate(model, val_tokens, s, rank, world_size, attention_windows(step, s))
                log.validation(step, val_loss, clock)
                last_step = last_step or val_loss <= s.target_loss
            if s.checkpoint_every and step > first_step and (saving or stopping or last_step):
                save_checkpoint(log, model, optimizer, step, clock.total, identity)
            if last_step or stopping:
                break
            clock.start()
        running.append((step + 1, train_step(
            model, optimizer, batches, step + 1, lr_scale(step, s), muon_momentum(step, s),
            attention_windows(step, s), stop)))
        if clock.device.type == "cpu" or len(running) > 1:  # a GPU works while the step before is logged
            stopping |= finish_step()
    if last_step:
        log.result(step, val_loss, clock)
        return 0
    number = stop() or signal.SIGTERM  # another rank got the signal: say SIGTERM
    log.write(f"stopped by {signal.Signals(number).name} after step {step} of {s.num_iterations}")
    return 128 + number

# ----------------------------------------------------------------------------------------------------------
# Main: what a log opens with, text from a model, the command line

def ensure_demo_data(s: Settings) -> None:
    """Build the demo's shards if its own patterns find none. Raises UserError if that fails."""
    root = Path(s.data_path or HERE)
    own = [pattern for pattern in (s.train_files, s.val_files) if pattern.startswith(DEMO_DATA)]
    if not all(find_files(root, pattern) for pattern in own):
        command = [sys.executable, HERE / "data" / "demo_corpus.py", root / DEMO_DATA]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip().split("\n")[-1])

def describe_environment() -> list[str]:
    """Versions, hardware and git commit. No environment variable is shown."""
    versions = f"CUDA {torch.version.cuda}, Triton {getattr(triton, '__version__', 'none')}"
    lines = [f"Python {sys.version}", f"PyTorch {torch.__version__}, {versions}",
             f"platform: {platform.platform()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"]
    for command in ("git rev-parse HEAD", "git status --short --untracked-files=no", "nvidia-smi"):
        try:
            output = subprocess.run(command.split(), cwd=HERE, capture_output=True, text=True).stdout.strip()
        except OSError:
            output = "not found"
        lines.append(f"{command}: {output}")
    return lines

def describe_run(s: Settings, device: torch.device, why_device: str, world_size: int) -> list[str]:
    """Device, batch and parameter counts, a line each."""
    with torch.device("meta"):
        counts = {name: p.numel() for name, p in GPT(s, Kernels()).named_parameters()}
    count, groups = s.num_microbatches(world_size), " + ".join(f"{n:,} {name}" for name, n in counts.items())
    return [f"device: {device.type} ({why_device})",
            f"batch: {world_size} ranks x {count // world_size} microbatches x {s.batch_tokens // count:,} "
            f"tokens = {s.batch_tokens:,} tokens/step",
            f"parameters: {sum(counts.values()):,} = {groups}"]

def run(s: Settings, overrides: list[str], why_preset: str, dry_run: bool) -> int:
    """From settings to the end of the race; returns the exit code. Raises UserError.
    dry_run: check all that can be checked without training, show the plan, and stop."""
    begun, source, rule = time.monotonic(), Path(__file__).read_text(encoding="utf-8"), "=" * 100
    device, why_device, rank, world_size = init_distributed(s)
    if dry_run:
        gpus = torch.cuda.device_count() if device.type == "cuda" else 1
        world_size = s.nproc or max(w for w in range(1, gpus + 1) if w == 1 or not world_size_problem(s, w))
    settings = [f"{k}: {value!r}{'  (overridden)' * (k in overrides)}" for k, value in asdict(s).items()]
    val_tokens = read_validation(s)
    plan = plan_packing(open_shards(s, "train_files"), s, s.num_microbatches(world_size))
    about = [why_preset, *describe_run(s, device, why_device, world_size), plan.summary]
    if dry_run:
        print("settings:", *("  " + setting for setting in settings), *about, sep="\n")
        return 0
    log = Log(s, rank)
    try:
        log.write(source, rule, *describe_environment(), rule, *settings, rule, console=False)
        kernels, why_kernels = choose_kernels(device, s)
        log.write(*about, *why_kernels)
        model = GPT(s, kernels, world_size)
        init_weights(model, s.seed)
        model.to(device)
        optimizer, clock = make_optimizer(model, s, rank, world_size), Clock(device)
        identity = identify_run(s, source, plan, val_tokens, world_size)
        first_step = load_checkpoint(log, model, optimizer, clock, identity) if s.resume else 0
        graphs = torch._dynamo.utils.counters["stats"]
        if kernels.compiled:
            compile_blocks(model)
        num_steps = warm_up(model, optimizer, train_batches(plan, s, rank, world_size, device, 0), val_tokens)
        batches = train_batches(plan, s, rank, world_size, device, first_step)
        ready, compiled = f"ready after {time.monotonic() - begun:.1f} s", graphs["unique_graphs"]
        log.write(f"{ready}: {num_steps} warm-up steps, {compiled} graphs compiled")
        code = train(model, optimizer, batches, val_tokens, s, log, clock, identity, first_step)
        if s.sample_tokens and s.vocab_size == 257 and code == rank == 0:
            prompt = [int(x) for x in val_tokens[:s.sample_tokens] if x != s.bos_id]
            text = generate(model, attention_windows(s.num_iterations, s), prompt, s.sample_tokens)
            before, after = (bytes(x).decode(errors="replace") for x in (prompt, text[len(prompt):]))
            log.write("--- a text that the model has not seen:", before, "--- how it goes on:", after)
        if kernels.compiled:
            late = graphs["unique_graphs"] - compiled
            log.write(f"{'WARNING, while timed: ' * (late > 0)}compiled since the warm-up: {late} graphs")
    except BaseException as error:
        log.write(f"ended by {type(error).__name__}: {error}", console=False)
        raise
    if world_size > 1:  # not after an error: a rank that failed must not wait for the others
        dist.destroy_process_group()
    return code

@torch.no_grad()
def generate(model: GPT, windows: tuple[int, int], ids: list[int], length: int, seed: int = 0):
    """`ids` and up to `length` tokens that the model draws after them, at a temperature of 0.8."""
    s, device, generator = model.settings, model.scalars.device, torch.Generator().manual_seed(seed)
    for _ in range(length):
        inputs = torch.tensor([s.bos_id, *ids], dtype=torch.int32, device=device)[-len(model.cos):]
        cu_seqlens = torch.tensor([0, len(inputs)], dtype=torch.int32, device=device)
        x = GPT.hidden(model, inputs, cu_seqlens, len(inputs), windows)[-1]  # never the compiled version
        logits = softcapped_logits(x, model.lm_head)[:s.vocab_size].cpu()
        token = int(torch.multinomial(torch.softmax(logits / 0.8, 0), 1, generator=generator))
        if token == s.bos_id:  # the document ends
            break
        ids = [*ids, token]
    return ids

def main(argv=None) -> int:
    """Returns the exit code: 0; 2 for settings, 1 for other user errors; 128 + the signal that stopped it."""
    presets = []
    for preset, changes in list(PRESETS.items())[1:]:  # the speedrun's are the defaults
        presets += [f"\nPRESET={preset} changes:", *(f"    {name} = {x!r}" for name, x in changes.items())]
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.strip().split("\n")[0],
        epilog="\n".join([inspect.getsource(Settings), *presets]))
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, show the plan, stop")
    args = parser.parse_args(argv)
    try:
        return run(*read_settings(os.environ), args.dry_run)
    except torch.OutOfMemoryError as error:
        print("MICROBATCHES: expected a step to fit in the GPU's memory; set MICROBATCHES=16 or more, or, in "
              f"validation, a smaller VAL_SLICE_TOKENS. {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has gone, as in `train_gpt.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        rank = getattr(error, "rank", None)
        if rank is not None or os.environ.get("LOCAL_RANK", "0") == "0":  # what every rank finds is told once
            where = "expected usable files, found " * isinstance(error, OSError)
            print(f"{'' if rank is None else f'rank {rank}: '}{where}{error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT

if __name__ == "__main__":
    sys.exit(main())
