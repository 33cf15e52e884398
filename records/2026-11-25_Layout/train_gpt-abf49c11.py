"""
Train a GPT-2-sized model on FineWeb to a validation loss of 3.28, in the least wall-clock time on 8 H100s.

    ./run.sh                      # picks preset, device and processes for this machine
    NUM_ITERATIONS=200 ./run.sh   # any setting, from the environment; --help lists them, --dry-run checks
    torchrun --standalone --nproc_per_node=8 train_gpt.py    # the race: 8 H100 GPUs of one node

The race: 1705 steps of 393,216 tokens; the mean cross-entropy over the first 10,485,760 tokens of the
validation shard must be at most 3.28 nats. Compilation, warm-up and validation are not timed. It starts from
record 30 of github.com/KellerJordan/modded-nanogpt (September 2025, 163 s); who had which idea is said where
it is used. Without a GPU, PRESET=demo runs the same race in small: the same twelve blocks, 128 wide, on the
source code of Python's standard library. Measured: the demo only (records/); no GPU has run this version yet.

Tensor layouts: T tokens of a packed sequence, D model width, H heads, K channels of a head, V padded
vocabulary, N bands of W tokens (plain attention). A microbatch is one packed sequence: documents or their
beginnings, end to end; cu_seqlens holds where each begins.
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
from itertools import repeat
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
    exit_code: 2 for settings, 1 for everything else. rank: set if only this rank has found the error."""
    def __init__(self, *problems: str, exit_code: int = 1, rank: int | None = None):
        super().__init__("\n".join(problems))
        self.exit_code, self.rank = exit_code, rank

@dataclass(frozen=True)
class Settings:
    """All settings; the defaults are the speedrun's. NAME in the environment overrides `name`."""

    # where it runs
    device: str = "auto"  # auto, cuda or cpu; auto takes CUDA if there is a GPU
    nproc: int = 0  # [processes] for run.sh to start; 0: one for each GPU, or as many as can share the batch
    dtype: str = "bfloat16"  # bfloat16 or float32: activations, embedding tables, Newton-Schulz
    fp8_head: bool = True  # [0 or 1] train the head in float8 if the GPU can and DTYPE is bfloat16
    torch_compile: bool = True  # [0 or 1] compile the blocks with torch.compile (needs a C++ compiler)
    seed: int = 0  # of the initial weights
    data_path: str = ""  # [folder] where the next two patterns start; empty: beside train_gpt.py
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # [pattern] training shards, by name
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"  # [pattern] validation shards, by name
    log_dir: str = "logs"  # [folder] each run makes a folder in it, for its log and checkpoints
    checkpoint_every: int = 0  # [steps] save every so many steps and at the end; two stay; 0: never
    resume: str = ""  # checkpoint to continue from; auto: the newest of this race in LOG_DIR, if any
    # the race
    num_iterations: int = 1705  # [steps] length of the run and of its schedules
    target_loss: float = 3.28  # [nats/token] stop at the first validation loss at or below it
    val_loss_every: int = 125  # [steps] validate every so many steps, and at the end; 0: only at the end
    val_tokens: int = 10_485_760  # [tokens] to validate on, from the start of the validation shards
    val_slice_tokens: int = 262_144  # [tokens] of one forward pass in validation; less needs less memory
    warmup_steps: int = 30  # [steps] untimed and then undone; at least one for each window size; 0: none
    sample_tokens: int = 0  # [tokens] that a model of bytes adds to as many unseen ones at the end of its run
    # a training step's batch
    batch_tokens: int = 393_216  # [tokens] of a step, over all ranks
    microbatches: int = 8  # packed sequences of a step, over all ranks; more need less GPU memory
    max_seq_len: int = 2048  # [tokens] longest piece taken of one document; the rest is dropped
    epochs: int = 1  # [passes] most passes over the training shards
    # the model
    vocab_size: int = 50_257  # [ids] that may occur in the data
    vocab_multiple: int = 128  # [ids] the vocabulary is padded to a multiple of this
    bos_id: int = 50_256  # [id] of the token that opens every document
    layout: str = "A AM AM AM AM AM AM M AM AM AM AM"  # a word a block: A attention, M MLP; A+M: side by side
    value_embeds: str = "012......012"  # a character a block: the number of its value embedding, or a dot
    window_pattern: str = "LSSSLSSLSSSL"  # a character a block: L long attention window, S short
    window_schedule: str = "3,7,11"  # [WINDOW_BLOCK] long windows, for a share of the run each; short: half
    window_block: int = 128  # [tokens] unit of WINDOW_SCHEDULE
    model_dim: int = 768  # [channels] D
    num_heads: int = 6  # [heads] H
    mlp_dim: int = 3072  # [channels] of an MLP's hidden layer
    attn_scale: float = 0.12  # factor of q.k before the softmax
    gate_channels: int = 12  # [channels] of a block's input that gate its attention heads; 0: no gate
    ngram_rows: int = 0  # [rows] of a table for hashes of the last tokens, added to the embedding; 0: none
    ngram_dim: int = 64  # [channels] of such a row
    ngram_max: int = 2  # [tokens] that a hash takes in: there is one of 2, of 3, ... of NGRAM_MAX tokens
    key_offset: bool = False  # [0 or 1] long windows: what does not rotate in a key is of the token before
    equal_qk_start: bool = False  # [0 or 1] queries and keys start equal in the channels that do not rotate
    # the optimizers
    muon_lr: float = 0.05  # Muon's learning rate, for the blocks' matrices
    muon_momentum_start: float = 0.85  # Muon's momentum at step 0
    muon_momentum_end: float = 0.95  # Muon's momentum after MUON_MOMENTUM_STEPS
    muon_momentum_steps: int = 300  # [steps] of a linear change from the first to the second
    adam_lr: float = 0.008  # Adam's learning rate, for all else, before the multiples below
    adam_beta1: float = 0.8  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    adam_eps: float = 1e-10  # added to the root of the second moment
    embed_lr_mult: float = 75.0  # [x ADAM_LR] for the embedding and the value embeddings
    head_lr_mult: float = 1.0  # [x ADAM_LR] for the head
    scalar_lr_mult: float = 5.0  # [x ADAM_LR] for the blocks' scalars
    cooldown_frac: float = 0.45  # [of the run] last part, in which the learning rates fall linearly
    final_lr_frac: float = 0.1  # [of the rate] what the learning rates fall to

    padded_vocab = property(lambda s: round_up(s.vocab_size, s.vocab_multiple))  # V: rows of tables and head
    torch_dtype = property(lambda s: getattr(torch, s.dtype))

    def num_microbatches(self, world_size: int) -> int:
        """Packed sequences of a step; if there are more ranks, each takes one shorter sequence."""
        return max(self.microbatches, world_size)

# The demo: the same blocks, narrow, on the standard library of the Python that runs this. Bytes are the ids
# 0-255, and 256 is BOS. The folder bears Python's version, since other versions have other texts.
DEMO_DATA = f"data/stdlib-{platform.python_version()}"
PRESETS = {
    "speedrun": {},
    "demo": dict(
        dtype="float32", torch_compile=False,
        train_files=f"{DEMO_DATA}/stdlib_train_*.bin", val_files=f"{DEMO_DATA}/stdlib_val_*.bin",
        num_iterations=44, target_loss=1.50, val_loss_every=11, val_tokens=49_152, val_slice_tokens=8192,
        warmup_steps=3, sample_tokens=200, batch_tokens=1280, microbatches=2,
        vocab_size=257, vocab_multiple=8, bos_id=256, model_dim=128, num_heads=2, mlp_dim=128,
        window_schedule="11,11,20", window_block=16,
        ngram_rows=65_536, ngram_max=5, key_offset=True, equal_qk_start=True,
        muon_lr=0.06, muon_momentum_start=0.7, muon_momentum_end=0.85, muon_momentum_steps=50,
        adam_lr=0.014, adam_beta1=0.7, embed_lr_mult=15.0, scalar_lr_mult=2.0,
    ),
    # The speedrun with what has won in the demo, at the size that later records gave it; never run on a GPU
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
    stages: list[str]  # in order: "A", "M", or parts that read one input side by side, such as "A+M"
    table: int | None  # number of its value embedding
    long_window: bool

def parse_layout(s: Settings) -> list[Block]:
    """The network's blocks, from the three layout strings (no MLP in block 0: @EmelyanenkoK, PR 120)."""
    blocks = []
    for word, table, window in zip(s.layout.split(), s.value_embeds, s.window_pattern):
        stages = re.findall(r"[AM](?:\+[AM])*", word)
        blocks.append(Block(stages, None if table == "." else int(table), window == "L"))
    return blocks

def world_size_problem(s: Settings, world_size: int) -> str:
    """Why so many ranks cannot share a step, or ''."""
    parts = s.num_microbatches(world_size)
    if parts % world_size == s.batch_tokens % (16 * parts) == s.padded_vocab % world_size == 0:
        return ""
    return (f"NPROC: expected ranks that share {parts} microbatches (equal multiples of 16 of BATCH_TOKENS="
            f"{s.batch_tokens}) and a padded vocabulary of {s.padded_vocab} ids equally, found {world_size}.")

def find_contradictions(s: Settings) -> list[str]:
    """A sentence for every setting that is out of range or does not fit the others."""
    words = s.layout.split()
    stages = [int(x) if x.isdecimal() else 0 for x in s.window_schedule.split(",")]
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
        ("window_schedule", min(stages) >= 2, "whole numbers of at least 2, separated by commas"),
        ("bos_id", s.bos_id < s.vocab_size, f"an id below VOCAB_SIZE={s.vocab_size}"),
        ("val_tokens", s.val_tokens % s.val_slice_tokens == 0,
         f"a multiple of VAL_SLICE_TOKENS={s.val_slice_tokens}"),
        ("model_dim", s.model_dim % (4 * s.num_heads) == 0,
         f"a multiple of 4 x NUM_HEADS = {4 * s.num_heads} (half of a head's channels rotate, in pairs)"),
        *((name, getattr(s, name) <= s.model_dim, f"at most MODEL_DIM={s.model_dim}")
          for name in ("gate_channels", "ngram_dim") if name != "ngram_dim" or s.ngram_rows),
        ("ngram_max", 2 <= s.ngram_max <= len(HASH_FACTORS), f"2 to {len(HASH_FACTORS)}"),
        *((name, getattr(s, name) < 1, "a number below 1")
          for name in ("muon_momentum_start", "muon_momentum_end", "adam_beta1", "adam_beta2")),
    ]
    found = [f"{name.upper()}: expected {expected}, found {getattr(s, name)!r}."
             for name, fits, expected in rows if not fits]
    return found + [problem for problem in [world_size_problem(s, s.nproc or 1)] if problem]

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
        return environ["PRESET"], f"preset: {environ['PRESET']}, as PRESET says"
    root = Path(environ.get("DATA_PATH") or HERE)
    shards = find_files(root, environ.get("TRAIN_FILES", Settings.train_files))
    missing = ["no CUDA GPU"] * (not torch.cuda.is_available()) + ["no FineWeb shards"] * (not shards)
    if not missing:
        return "speedrun", "preset: speedrun (a CUDA GPU and FineWeb shards are here); the other: PRESET=demo"
    return "demo", (f"preset: demo ({' and '.join(missing)} here); the other: PRESET=speedrun, after "
                    "python data/cached_fineweb10B.py")

# ----------------------------------------------------------------------------------------------------------
# Model

HASH_FACTORS = 36313, 27191, 51787, 70937, 91493  # of the newest token of an n-gram, the one before it, ...

class Norm(torch.autograd.Function):
    """RMS norm over the last axis, without a gain. Keeps its result, as the next product does, and not x."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + 2**-23).rsqrt()
        y = (x * scale).type_as(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        radial = (grad.float() * y).mean(-1, keepdim=True)
        return (torch.addcmul(grad.float(), radial, y.float(), value=-1) * scale).type_as(y)

norm = Norm.apply

def rotary_cos_sin(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, (T, 1, K) float32 each; sin is negative in the second half.
    Half-truncated RoPE: of the K // 2 pairs, the first half have the frequencies (1/1024)^(j/(n-1)) radians a
    token, j = 0 .. n-1; the others do not rotate (modded-nanogpt, @YouJiacheng)."""
    n = head_dim // 4
    frequencies = torch.cat(((1 / 1024) ** torch.linspace(0, 1, n), torch.zeros(head_dim // 2 - n)))
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32), frequencies)[:, None]
    return angles.cos().repeat(1, 1, 2), torch.cat((angles, -angles), dim=-1).sin()

def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) in float32; x: (T, H, K), pairs across K's halves."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin).type_as(x)

def offset_keys(k: Tensor) -> Tensor:
    """Keys (T, H, K) whose channels that do not rotate are those of the token before: a query can find what
    followed its own token earlier in the text, in one layer (record 49 of modded-nanogpt)."""
    rotating, standing = k.unflatten(-1, (2, 2, -1)).unbind(-2)  # of both halves of K, (T, H, 2, K // 4)
    return torch.stack((rotating, torch.cat((standing[:1], standing[:-1]))), dim=-2).flatten(-3)

# Attention in plain PyTorch: the sequence is cut into N bands as long as the window, W tokens. A query then
# finds every key that it may see in its own band and the one before: scores take T x 2W, not T x T.

def banded_mask(cu_seqlens: Tensor, num_tokens: int, window: int, max_seqlen: int, dtype: torch.dtype):
    """The additive mask of banded_attention, made once for all blocks that share a window.
    cu_seqlens: (S,) int32, ascending, padded with num_tokens. Query i may see key j if both are of the same
    document and 0 <= i - j <= window. Returns (N, 1, W, 2W) of 0 and -inf."""
    band = min(window, num_tokens)
    num_bands = -(-num_tokens // band)
    query = torch.arange(num_bands * band, device=cu_seqlens.device).view(num_bands, band, 1)
    key = query.view(num_bands, 1, band)
    key = torch.cat((key - band, key), dim=2)
    # The number of starts at or before a position tells documents apart; it is 0 before the first token.
    query_document, key_document = (torch.searchsorted(cu_seqlens, x.int(), right=True) for x in (query, key))
    visible = (key <= query) & (query - key <= band) & (key_document == query_document)
    mask = torch.zeros(visible.shape, dtype=dtype, device=cu_seqlens.device)
    return mask.masked_fill_(~visible, -torch.inf).unsqueeze(1)

class WithPreviousBand(torch.autograd.Function):
    """(T, H, K) -> (N, 2W, H, K), a view: each band behind the one before it. What is before the first band
    and after the last token is zero, and the mask hides it."""
    @staticmethod
    def forward(ctx, x: Tensor, num_bands: int, band: int) -> Tensor:
        ctx.band, ctx.num_tokens = band, len(x)
        padded = F.pad(x, (0, 0, 0, 0, band, num_bands * band - len(x)))
        return padded.unfold(0, 2 * band, band).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        total = grad[:, ctx.band:].clone()
        total[:-1] += grad[1:, :ctx.band]
        return total.flatten(0, 1)[:ctx.num_tokens], None, None

def banded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T + mask) v of a packed sequence. q, k, v and the result: (T, H, K)."""
    num_tokens, num_bands, band = len(q), mask.size(0), mask.size(2)
    q = F.pad(q, (0, 0, 0, 0, 0, num_bands * band - num_tokens)).unflatten(0, (num_bands, band))
    k, v = (WithPreviousBand.apply(x, num_bands, band) for x in (k, v))
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale=scale)
    return y.transpose(1, 2).flatten(0, 1)[:num_tokens]

class ReluSquared(torch.autograd.Function):
    """relu(x)^2 (So et al., 2021). Keeps only its result, of which the backward pass takes the root."""
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.relu().square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0].clamp_min(1e-30).sqrt()  # the root of 0 is slow on a CPU

def softcapped_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of 30 * sigmoid(x @ weight.T / 7.5), a float32 scalar.
    x: (T, D) in the activations' dtype; weight: (V, D), the float32 master, cast here; targets: (T,) int64.
    Logits are capped as in Gemma 2 (@KoszarskyB); sigmoid and constants: @YouJiacheng."""
    logits = 30 * torch.sigmoid(F.linear(x, weight.type_as(x)).float() / 7.5)
    return F.cross_entropy(logits, targets, reduction="sum")

class GPT(nn.Module):
    """The model. The matrices of all blocks lie in banks: Muon needs one reduce-scatter, Newton-Schulz and
    all-gather for each bank. A parameter's rows, its first axis, are rounded up to a multiple of world_size:
    each rank owns an equal share, and the rows added stay zero. A parameter that is not used is None."""
    def __init__(self, s: Settings, kernels: "Kernels", world_size: int = 1):
        super().__init__()
        self.settings, self.kernels, self.blocks = s, kernels, parse_layout(s)
        parts = "".join("".join(block.stages) for block in self.blocks)
        self.num_attn, self.num_mlp, self.num_rows = parts.count("A"), parts.count("M"), {}
        dim, num_tables = s.model_dim, max(-1 if b.table is None else b.table for b in self.blocks) + 1

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
        parameter("mlp_bank", 3 * self.num_mlp, dim, s.mlp_dim)  # c_fc and c_proj of each MLP, in one shape
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
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        x = x0 = norm(self.look_up_embed(inputs))
        value_embeds = self.look_up_value_embeds(inputs)
        attentions, mlps = self.split_banks()
        # A copy for each token: the gradient is summed over channels first, where they are read in any case.
        scalars = self.scalars.view(-1, 1, 1).expand(-1, num_tokens, 1).unbind()
        num_blocks, outputs = len(self.blocks), []
        for i, block in enumerate(self.blocks):
            # skip_weight: U-net skips (@brendanh0gan); lambdas: the embedding again (@KoszarskyB)
            skip_weight, lambda_x, lambda_x0, *sa_lambdas = scalars[5 * i:5 * i + 5]
            if i >= num_blocks - num_blocks // 2:
                x = x + skip_weight * outputs.pop()
            x = (lambda_x * x + lambda_x0 * x0).type_as(x0)
            ve = None if block.table is None else value_embeds[block.table]
            args = attn_args[windows[0] if block.long_window else windows[1]]
            for stage in block.stages:
                x_in = norm(x)
                for part in stage.split("+"):
                    if part == "A":
                        x = x + self.attention(x_in, *next(attentions), sa_lambdas, ve, args, cos, sin,
                                               offset=s.key_offset and block.long_window)
                    else:
                        c_fc, c_gate, c_proj = next(mlps)  # both (D, hidden) (@byronxu99, PR 109)
                        x = x + F.linear(F.silu(x_in @ c_gate) * (x_in @ c_fc), c_proj)
            if i < num_blocks // 2:
                outputs.append(x)
        return norm(x)

    def attention(self, x: Tensor, w_qkv: Tensor, w_o: Tensor, gate: Tensor | None, sa_lambdas,
                  ve: Tensor | None, attn_args, cos: Tensor, sin: Tensor, offset: bool) -> Tensor:
        """One attention; x: (T, D), normalised; w_qkv: (3D, D); gate: (H, channels); ve: (T, D)."""
        s = self.settings
        qkv = F.linear(x, w_qkv).view(len(x), 3 * s.num_heads, -1)
        q, k, v = qkv.chunk(3, dim=1)
        q, k = (norm(apply_rotary(x, cos, sin)) for x in (q, k))  # the same as the rotation of the norm
        if offset:
            k = offset_keys(k)
        lambda_v, lambda_ve = (x.unsqueeze(-1) for x in sa_lambdas)
        factor = 1
        if gate is not None:  # sparse attention gate, one for each head and token (@classiclarryd, PR 117)
            factor = torch.sigmoid(F.linear(x[:, :s.gate_channels], gate)).unsqueeze(-1)
        if ve is None:
            factor = lambda_v * factor  # of y instead of v: the same, and cheaper
        else:  # value embeddings (Zhou et al., 2024; @KoszarskyB)
            v = (lambda_v * v + lambda_ve * ve.view_as(v)).type_as(v)
        y = (self.kernels.attention(q, k, v, attn_args, s.attn_scale) * factor).type_as(x)
        return F.linear(y.flatten(1), w_o)

    def look_up_embed(self, inputs: Tensor) -> Tensor:
        """The embedding, (T, D), and in its first channels the sum of the rows for the last 2, 3, ... tokens.
        (Bigrams: record 62 of modded-nanogpt, which adds them before every block. Longer n-grams stand for
        the words that bytes are not. Their hashes share one table, and documents' borders are ignored.)"""
        x = F.embedding(inputs, self.embed)
        if self.ngrams is None:
            return x
        ids, hashes = inputs.long(), []
        total = HASH_FACTORS[0] * ids
        for back in range(1, self.settings.ngram_max):
            total = total ^ HASH_FACTORS[back] * F.pad(ids[:-back], (back, 0))
            hashes.append(total % self.num_rows["ngrams"])
        rows = F.embedding(torch.stack(hashes), self.ngrams).sum(0)
        return x + F.pad(rows, (0, x.size(1) - rows.size(1)))

    def look_up_value_embeds(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Each table's rows for the inputs, (T, D) each, in one look-up."""
        if self.value_embeds is None:
            return ()
        num_rows, vocab = self.num_rows["value_embeds"], self.settings.padded_vocab
        first_rows = torch.arange(0, num_rows, vocab, device=inputs.device)
        return F.embedding(inputs + first_rows[:, None], self.value_embeds).unbind()

    def split_banks(self):
        """Iterators over (w_qkv, w_o, gate) and (c_fc, c_proj), in the activations' dtype."""
        dim, dtype = self.settings.model_dim, self.settings.torch_dtype
        rows, sizes = self.attn_bank.to(dtype).flatten(0, 1), (3 * dim, dim) * self.num_attn
        attn = rows.split((*sizes, len(rows) - sum(sizes)))
        gates = repeat(None) if self.gate_bank is None else self.gate_bank.to(dtype).unbind()
        mlp = self.mlp_bank.to(dtype).unbind()
        return zip(attn[:-1:2], attn[1::2], gates), zip(mlp[0::3], mlp[1::3], mlp[2::3])

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
        elif name == "mlp_bank":  # up; down starts at zero
            values.unflatten(0, (-1, 3))[:, :2].uniform_(-bound, bound, generator=generator)
        elif name == "scalars":  # skip weight, lambdas of x and x0, lambdas of v and its embedding
            values[:] = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.5])
        elif name not in ("gate_bank", "lm_head", "ngrams"):
            raise KeyError(f"init_weights has no initial values for parameter {name}")
        p.zero_()[:len(values)] = values.to(p)

# ----------------------------------------------------------------------------------------------------------
# Optimizers: Muon for the blocks' matrices, Adam for the rest, both sharded over the ranks
#
# A rank owns an equal run of each parameter's rows, and keeps optimizer state for those alone. A step:
#   1. reduce_scatter: each rank gets the sum over ranks of its own rows of every gradient;
#   2. step: it updates its rows of each parameter, as soon as their gradient is there;
#   3. all_gather: the updated rows travel back, so that all ranks hold the same parameters, bit for bit.

# PyTorch 2.13 renamed both collectives, and warns about the old names, which are all that 2.11 has.
reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

def XXT(X: Tensor, base: Tensor | None = None, alpha=1.0, beta=0.0, out: Tensor | None = None) -> Tensor:
    """X @ X.T, or alpha * X @ X.T + beta * base, of matrices, in `out` if given. X: (n, rows, cols)."""
    return (torch.bmm(X, X.mT, out=out) if base is None else
            torch.baddbmm(base, X, X.mT, beta=beta, alpha=alpha, out=out))

def newton_schulz(G: Tensor, dtype: torch.dtype, XXT: Callable = XXT) -> Tensor:
    """Nearly orthogonal matrices with the row and column spaces of G, (n, rows, cols), in `dtype`.
    Five steps of Muon's quintic (kellerjordan.github.io/posts/muon) bring singular values to 1 +- 0.3."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero among the quintics whose values stay near 1
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).to(dtype)  # so that X @ X.T is the smaller product
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    A = B = spare = None  # memory that is used again: a seventh less time on a CPU
    for _ in range(5):
        A = XXT(X, out=A)
        B = XXT(A, base=A, alpha=c, beta=b, out=B)
        X, spare = torch.baddbmm(X, B, X, beta=a, out=spare), X
    return X.mT if tall else X

@dataclass
class ShardedParam:
    """One parameter as its optimizer sees it on this rank."""
    name: str
    param: nn.Parameter
    lr_mult: float
    p_slice: Tensor  # this rank's rows of the parameter
    state: dict[str, Tensor]  # of the shape and dtype of p_slice
    grad_slice: Tensor | None = None  # the summed gradient of p_slice
    handle: dist.Work | None = None  # the collective under way

class ShardedOptimizer:
    """The three phases; a subclass names its state and updates a slice."""
    state_names: tuple[str, ...] = ()

    def __init__(self, params: dict[str, tuple[nn.Parameter, float]], rank: int, world_size: int, lr: float):
        """params: name -> (parameter, multiple of the learning rate)."""
        self.world_size, self.lr, self.sharded_params = world_size, lr, []
        for name, (p, lr_mult) in params.items():
            p_slice = p.data.chunk(world_size)[rank]
            state = {key: torch.zeros_like(p_slice) for key in self.state_names}
            self.sharded_params.append(ShardedParam(name, p, lr_mult, p_slice, state))

    def reduce_scatter(self) -> None:
        """Phase 1, started for every parameter. Clears the parameters' gradients."""
        for sp in self.sharded_params:
            grad = sp.grad_slice = sp.param.grad.contiguous()
            sp.param.grad = None
            if self.world_size > 1:
                sp.grad_slice = torch.empty_like(sp.p_slice)
                sp.handle = reduce_scatter_tensor(sp.grad_slice, grad, async_op=True)

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float, step: int) -> list[Tensor]:
        """Phase 2, and phase 3 started. step counts from 1. Returns whether each gradient is not finite."""
        flags = []
        for sp in self.sharded_params:
            self.wait(sp)
            flags.append(~sp.grad_slice.sum().isfinite())  # on a CPU, 20 times as fast as a maximum
            self.update(sp, self.lr * sp.lr_mult * lr_scale, momentum, step)
            sp.grad_slice = None
            if self.world_size > 1:
                sp.handle = all_gather_tensor(sp.param.data, sp.p_slice, async_op=True)
        return flags

    def all_gather(self) -> None:
        """The end of phase 3: the parameters may be read."""
        for sp in self.sharded_params:
            self.wait(sp)

    def wait(self, sp: ShardedParam) -> None:
        if sp.handle is not None:
            sp.handle.wait()
            sp.handle = None

class Muon(ShardedOptimizer):
    """Nesterov momentum, then orthogonalisation of each matrix on its own (Keller Jordan et al., 2024)."""
    state_names = ("momentum_buffer",)

    def __init__(self, params, rank: int, world_size: int, lr: float, dtype: torch.dtype, XXT=XXT):
        super().__init__(params, rank, world_size, lr)
        self.dtype, self.XXT = dtype, XXT

    def update(self, sp: ShardedParam, lr: float, momentum: float, step: int) -> None:
        buffer = sp.state["momentum_buffer"].lerp_(sp.grad_slice, 1 - momentum)
        direction = newton_schulz(sp.grad_slice.lerp_(buffer, momentum), self.dtype, self.XXT)
        rows, cols = direction.shape[-2:]
        sp.p_slice.add_(direction, alpha=-lr * max(1, rows / cols) ** 0.5)

class DistAdam(ShardedOptimizer):
    """Adam (Kingma and Ba, 2015) in PyTorch's fused kernel: one pass, in float32, and rounded once when it is
    stored. State has the parameter's dtype. eps joins the root of the uncorrected second moment."""
    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, params, rank: int, world_size: int, lr: float, betas, eps: float):
        super().__init__(params, rank, world_size, lr)
        self.betas, self.eps = betas, eps

    def update(self, sp: ShardedParam, lr: float, momentum: float, step: int) -> None:
        beta1, beta2 = self.betas
        eps = self.eps / (1 - beta2**step) ** 0.5  # the kernel adds it to the root of the corrected moment
        steps_done = torch.full((), step - 1.0, device=sp.p_slice.device)
        adam([sp.p_slice], [sp.grad_slice], *([x] for x in sp.state.values()), [], [steps_done], fused=True,
             amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=0.0, eps=eps, maximize=False)

def make_optimizers(model: GPT, s: Settings, rank: int, world_size: int) -> list[ShardedOptimizer]:
    """Both optimizers, from the table of who trains what and at which multiple of its learning rate."""
    table = dict(
        attn_bank=("muon", 1.0),
        gate_bank=("muon", 1.0),
        mlp_bank=("muon", 1.0),
        embed=("adam", s.embed_lr_mult),
        ngrams=("adam", s.embed_lr_mult),
        value_embeds=("adam", s.embed_lr_mult),
        lm_head=("adam", s.head_lr_mult),
        scalars=("adam", s.scalar_lr_mult),
    )
    groups, betas = dict(muon={}, adam={}), (s.adam_beta1, s.adam_beta2)
    for name, p in model.named_parameters():
        group, lr_mult = table[name]  # a KeyError: a new parameter needs a row above
        groups[group][name] = (p, lr_mult)
    return [Muon(groups["muon"], rank, world_size, s.muon_lr, s.torch_dtype, model.kernels.XXT),
            DistAdam(groups["adam"], rank, world_size, s.adam_lr, betas, s.adam_eps)]

# ----------------------------------------------------------------------------------------------------------
# Fast kernels for GPUs: each does what its plain version does, and is taken only if it agrees with it
#
# Softcapped logits lie between 0 and 30, so their exponentials can be summed in float32 without a shift. With
# s = sigmoid(z / 7.5), exp(30 s) = exp2(EXP * s). Divisions are slow on a GPU: 1 / u is rsqrt(u)^2.

EXP, RATE = 30 / math.log(2), -1 / (7.5 * math.log(2))

@triton.jit
def softcap_loss_kernel(logits, targets, losses, log_sums, num_columns, EXP: tl.constexpr, RATE: tl.constexpr,
                        BLOCK: tl.constexpr):
    """One program per row: log2 of the sum of the exponentials, and the loss."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < num_columns, other=0.0).to(tl.float32)
        r = tl.rsqrt(1 + tl.exp2(RATE * z))
        total += tl.where(column < num_columns, tl.exp2(EXP * r * r), 0.0)
    log_sum = tl.log2(tl.sum(total, 0))
    r = tl.rsqrt(1 + tl.exp2(RATE * tl.load(logits + tl.load(targets + row)).to(tl.float32)))
    tl.store(log_sums + row, log_sum)
    tl.store(losses + row, log_sum * (30 / EXP) - 30 * r * r)

@triton.jit
def softcap_grad_kernel(logits, targets, log_sums, scale, grads, grads_t, num_rows, num_columns,
                        EXP: tl.constexpr, RATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per tile: scale times the loss's gradient by the logits, and its transpose."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    target = tl.load(targets + row, mask=row < num_rows, other=0)
    log_sum = tl.load(log_sums + row, mask=row < num_rows, other=0.0)
    r = tl.rsqrt(1 + tl.exp2(RATE * tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)))
    s = r * r
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
    """Contiguous room for something of x's shape, and for its transpose."""
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
    softcap_loss_kernel[len(logits),](logits, targets, losses, log_sums, logits.size(1), EXP, RATE, block,
                                      num_warps=8)
    return losses, log_sums

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
        grads, grads_t = empty_pair(logits, torch.float8_e5m2)
        softcap_grad_kernel[tile_grid(logits)](logits, targets, log_sums, 448.0, grads, grads_t,
                                               *logits.shape, EXP, RATE, **TILE)
        grad_scale = grad_scale * grad  # the loss may be divided by the number of microbatches
        x_grad = torch._scaled_mm(grads, w8_t.mT, grad_scale, w_scale, out_dtype=torch.bfloat16)
        w_grad = torch._scaled_mm(x8_t, grads_t.mT, x_scale, grad_scale, out_dtype=torch.float32)
        return x_grad, w_grad.T, None  # record 30 found this order of the product the faster one

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

def symmetric_XXT(X: Tensor, base: Tensor | None = None, alpha=1.0, beta=0.0, out: Tensor | None = None):
    """What XXT gives, by half of the tiles and their mirror images (@byronxu99, PR 109)."""
    X = X.contiguous()
    count, rows, cols = X.shape
    out = X.new_empty(count, rows, rows) if out is None else out
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
    """The functions that a run uses where there is a choice; the defaults are plain PyTorch."""
    attn_args: Callable = banded_mask
    attention: Callable = banded_attention
    head_loss: Callable = softcapped_loss
    XXT: Callable = XXT

def trial_run(kernels: Kernels, device: torch.device, s: Settings) -> list[Tensor]:
    """Loss and gradients of one block on random weights and tokens, and orthogonalised random matrices."""
    s = replace(s, layout="AM", value_embeds="0", window_pattern="L", batch_tokens=1024, microbatches=1)
    model, generator = GPT(s, kernels), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():  # of a size that keeps logits and gates in their useful range
        p.data.normal_(0, 1 if "embed" in name or name == "scalars" else 0.04, generator=generator)
    tokens = torch.randint(s.vocab_size, (1025,), generator=generator).to(device)
    cu_seqlens = torch.tensor([0, 7, 300, 301, 900, 1024, 1024], dtype=torch.int32, device=device)
    loss = model.to(device)(tokens[:-1].int(), tokens[1:], cu_seqlens, 640, (384, 384))
    loss.backward()
    G = torch.randn(3, s.model_dim, s.mlp_dim, generator=generator).to(device)
    gradients = [model.embed.grad, model.attn_bank.grad, model.mlp_bank.grad, model.lm_head.grad]
    return [loss.detach(), *gradients, newton_schulz(G, s.torch_dtype, kernels.XXT)]

def choose_kernels(device: torch.device, s: Settings) -> tuple[Kernels, list[str]]:
    """The kernels for `device`, and a line for each that gives the choice and its reason. A fast kernel must
    agree with the plain one on a small case on the run's own GPU, on every rank."""
    chosen, lines = Kernels(), []
    if device.type == "cpu":
        return chosen, ["kernels: plain PyTorch (the device is a CPU)"]
    capability, attention = torch.cuda.get_device_capability(device), "FlashAttention 2 of PyTorch"
    if capability[0] == 9:
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
            attention = "FlashAttention 3"
        except Exception as error:  # whatever it is, version 2 does the work
            attention += (f" (WARNING: version 3 is faster on this GPU; python -m pip install flash-attn-3 "
                          f"--index-url https://download.pytorch.org/whl/cu130, or cu126; found {error!r})")
    fp8 = (s.fp8_head and s.dtype == "bfloat16" and capability >= (8, 9)
           and s.padded_vocab % 16 == s.model_dim % 16 == 0)
    compiled = torch.compile(softcapped_loss, dynamic=False) if s.torch_compile else softcapped_loss
    head = ("float8, fused loss", Float8HeadLoss.apply, 0.1) if fp8 else (s.dtype, compiled, 0.03)
    rows = [("attention", attention, dict(attn_args=varlen_args, attention=flash_attention), 0.03),
            ("head", head[0], dict(head_loss=head[1]), head[2]),
            ("Newton-Schulz", "half of each symmetric product", dict(XXT=symmetric_XXT), 0.1)]
    plain = trial_run(chosen, device, s)
    for kind, name, functions, tolerance in rows:
        error, why = torch.tensor(math.inf, device=device), ""
        try:
            pairs = zip(trial_run(Kernels(**functions), device, s), plain)
            error = torch.stack([(x - y.float()).norm() / y.float().norm() for x, y in pairs]).max()
        except Exception as raised:  # whatever it is, the plain version does the work
            why = repr(raised)
        error = error.nan_to_num(math.inf)
        if dist.is_initialized():
            dist.all_reduce(error, op=dist.ReduceOp.MAX)
        if error <= tolerance:
            chosen = chosen._replace(**functions)
            lines.append(f"{kind}: {name}; {error:.1e} from plain PyTorch on a small case")
        else:
            lines.append(f"{kind}: WARNING: plain PyTorch, much slower; {name} was {error:.1e} from it on "
                         f"a small case, more than {tolerance:g} {why}")
    return chosen, lines

# ----------------------------------------------------------------------------------------------------------
# Data: token shards, the packing plan, the loader's thread, validation
#
# A shard is 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens as uint16.
# Before step 0, plan_packing checks every token that the run needs, and finds where each microbatch begins.

SHARD_KIND, HEADER_BYTES = [20240520, 1], 1024
REMAKE = "delete it and make it again (FineWeb: python data/cached_fineweb10B.py), or name other files"
OTHER_IDS = "set PRESET, or VOCAB_SIZE and BOS_ID, to what these files hold"

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
        starts, chunk, self.checksum = [], 1 << 22, 0
        for first in range(0, self.num_tokens, chunk):
            tokens = self.read(first, min(first + chunk, self.num_tokens))
            starts.append(first + np.flatnonzero(tokens == self.bos_id))
            self.checksum = zlib.crc32(tokens, self.checksum)
        starts = np.concatenate(starts)
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
    length: np.ndarray  # (documents,) int64: most tokens that are used of it
    first: np.ndarray  # (steps x microbatches + 1,) int64: the document that opens each microbatch
    summary: str

def plan_packing(shards: list[TokenShard], s: Settings, num_microbatches: int) -> PackingPlan:
    """Pack the documents of the planned steps; reads shard after shard until the run is fed.
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
        end = np.cumsum(length)  # of each document, if they lay end to end
        while len(first) <= needed:
            begin = end[first[-1] - 1] if first[-1] else 0
            last = int(np.searchsorted(end, begin + room))  # the document in which the microbatch gets full
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
               f"({used / read:.1%}) and drops the rests of cut documents")
    return PackingPlan(shards, shard, start, length, np.array(first), summary)

def read_validation(s: Settings) -> np.ndarray:
    """The validation tokens, (VAL_TOKENS + 1,) uint16. Raises UserError for what is wrong."""
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
    """A batch from T + 1 tokens and where their documents begin. S is the next multiple of 128 at or above a
    document every 300 tokens, or what most_starts needs."""
    num_tokens = len(tokens) - 1
    cu_seqlens = np.full(round_up(max(num_tokens // 300, most_starts + 1), 128), num_tokens, dtype=np.int32)
    cu_seqlens[:len(starts)] = starts
    arrays = tokens[:-1].astype(np.int32), tokens[1:].astype(np.int64), cu_seqlens
    return Batch(*map(torch.from_numpy, arrays), max_seqlen)

class TrainLoader:
    """This rank's training batches, assembled a few ahead by a thread that never touches a GPU. Of a step's
    microbatches, rank r of w takes numbers r, r + w, ... seek comes before the first next_batch."""
    def __init__(self, plan: PackingPlan, s: Settings, rank: int, world_size: int, device: torch.device):
        self.plan, self.rank, self.world_size, self.device = plan, rank, world_size, device
        self.num_microbatches = s.num_microbatches(world_size)
        self.num_tokens = s.batch_tokens // self.num_microbatches
        self.max_seqlen = min(s.max_seq_len, self.num_tokens)
        self.most_starts = int(np.diff(plan.first).max())
        self.thread, self.ahead = ThreadPoolExecutor(1, "loader"), deque()

    def seek(self, step: int) -> None:
        """Go on with the first batch of a step."""
        for future in self.ahead:
            future.cancel()
        self.ahead.clear()
        self.next = step * self.num_microbatches + self.rank

    def next_batch(self) -> Batch:
        """The next batch, on the device. Raises UserError if a shard no longer holds what it held."""
        while len(self.ahead) < 5 and self.next < len(self.plan.first) - 1:
            self.ahead.append(self.thread.submit(self.assemble, self.next))
            self.next += self.world_size
        try:
            return self.ahead.popleft().result().to(self.device)
        except (UserError, OSError) as error:
            raise UserError(str(error), rank=self.rank) from None

    def assemble(self, number: int) -> Batch:
        """In the thread: microbatch `number` of the run."""
        plan, room, parts = self.plan, self.num_tokens + 1, []
        for document in range(plan.first[number], plan.first[number + 1]):
            start, length = int(plan.start[document]), min(int(plan.length[document]), room)
            parts.append(plan.shards[plan.shard[document]].read(start, start + length))
            room -= length
        starts = np.cumsum([0, *map(len, parts[:-1])])
        return make_batch(np.concatenate(parts), starts, self.most_starts, self.max_seqlen)

def validation_batches(tokens: np.ndarray, s: Settings, rank: int, world_size: int, device: torch.device):
    """Yields (number, batch) for this rank's validation slices: every world_size-th, cut at fixed places."""
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
    stages = [int(x) for x in s.window_schedule.split(",")]
    stage = stages[len(stages) * step // (s.num_iterations + 1)]
    return stage * s.window_block, stage // 2 * s.window_block

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
        # torchrun's store outlives its restarts, and so do the addresses of dead ranks in it: use a prefix
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size,
                                device_id=device if cuda else None)
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
# metadata hold step, training seconds, what identifies the run, and a SHA-256 of all the rest.

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
            raise ValueError(f"other bytes than SHA-256 {expected} says")
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

def save_checkpoint(log: Log, model: GPT, optimizers, step: int, seconds: float, identity: dict) -> None:
    """Write the run's state after `step` steps; the newest two stay. Called by all ranks; rank 0 writes."""
    tensors = {name: p.data[:model.num_rows[name]] for name, p in model.named_parameters()}
    for sp in (sp for optimizer in optimizers for sp in optimizer.sharded_params):
        for key, x in sp.state.items():
            whole = x
            if dist.is_initialized():
                whole = torch.empty_like(sp.param.data)
                all_gather_tensor(whole, x, async_op=True).wait()
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
def load_checkpoint(log: Log, model: GPT, optimizers, clock: Clock, identity: dict) -> int:
    """Put back the state that RESUME means; returns the number of steps done. Called by all ranks. auto takes
    the newest whole checkpoint of this race, or starts anew if LOG_DIR has none. Raises UserError."""
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
            log.write(f"checkpoint: passed over: {error}")
            problem = problem or error
    else:
        if problem:
            raise UserError(f"RESUME: {problem}", exit_code=2)
        log.write(f"checkpoint: none in {s.log_dir}, starting anew")
        return 0
    for sp in (sp for optimizer in optimizers for sp in optimizer.sharded_params):
        num_rows, whole = model.num_rows[sp.name], torch.zeros_like(sp.param.data)
        sp.param.data[:num_rows] = tensors[sp.name].to(whole)
        for key, x in sp.state.items():
            whole[:num_rows] = tensors[f"{key}.{sp.name}"].to(whole)
            x.copy_(whole.chunk(len(whole) // len(x))[dist.get_rank() if dist.is_initialized() else 0])
    clock.total = float(metadata["seconds"])
    log.write(f"resumed: {path}, step {metadata['step']}, after {clock.total:.1f} s of training")
    return int(metadata["step"])

# ----------------------------------------------------------------------------------------------------------
# Training

def copy_to_host(x: Tensor) -> Callable[[], list[float]]:
    """Start copying a vector to the host; the function returned waits for it, but not for later work."""
    if x.device.type == "cpu":
        return x.tolist
    host, arrived = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return host.tolist()
    return wait

def train_step(model: GPT, optimizers, loader: TrainLoader, step: int, lr_scale: float, momentum: float,
               windows: tuple[int, int], stop: Callable[[], int] = int) -> Callable[[], list[float]]:
    """One optimizer step, number `step` from 1. The function returned waits for it and gives, for all ranks,
    mean loss, number of requests to stop, and for each parameter whether its gradient was not finite."""
    loss_sum = torch.zeros((), device=loader.device)
    for _ in range(loader.num_microbatches // loader.world_size):
        loss = model(*loader.next_batch(), windows) / loader.num_microbatches
        loss.backward()  # gradients summed over ranks are those of the mean over the step's microbatches
        loss_sum += loss.detach()
    for optimizer in optimizers:
        optimizer.reduce_scatter()
    flags = [flag for optimizer in optimizers for flag in optimizer.step(lr_scale, momentum, step)]
    status = torch.stack([loss_sum / loader.num_tokens, torch.full_like(loss_sum, stop() > 0), *flags])
    if dist.is_initialized():
        dist.all_reduce(status)
    for optimizer in optimizers:
        optimizer.all_gather()
    return copy_to_host(status)

def warm_up(model: GPT, optimizers, loader: TrainLoader, val_tokens: np.ndarray, s: Settings) -> int:
    """Untimed steps at every window size (and evaluations, if compiled), undone bit for bit."""
    if not s.warmup_steps:
        return 0
    states = [x for o in optimizers for sp in o.sharded_params for x in sp.state.values()]
    tensors = [*(p.data for p in model.parameters()), *states]
    before = [x.to("cpu", copy=True) for x in tensors]  # not in the GPU's memory
    windows = sorted({attention_windows(step, s) for step in range(s.num_iterations + 1)})
    num_steps = max(s.warmup_steps, len(windows))
    for i in range(num_steps):
        loader.seek(0)
        train_step(model, optimizers, loader, i + 1, 1.0, s.muon_momentum_start, windows[i % len(windows)])
    if s.torch_compile:
        _, batch = next(validation_batches(val_tokens, s, 0, 1, loader.device))
        with torch.no_grad():
            for pair in windows:
                model(*batch, pair)
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
    if world_size > 1:  # a slice's loss is a number on one rank and zero on the others, so the sum is exact
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

def train(model: GPT, optimizers, loader: TrainLoader, val_tokens: np.ndarray, s: Settings, log: Log,
          clock: Clock, identity: dict, first_step: int) -> int:
    """The race: train and validate until the target or the last step, on a clock that validation stops.
    Returns the exit code. Raises UserError if the loss or a gradient is not finite."""
    rank, world_size, stop = loader.rank, loader.world_size, catch_signals()
    stopping, running = False, deque()
    names = ["the loss", *(f"the gradient of {sp.name}" for o in optimizers for sp in o.sharded_params)]

    def finish_step() -> bool:
        """Wait for the oldest running step and log it; returns whether a rank asked to stop."""
        step, wait = running.popleft()
        loss, stops, *flags = wait()
        spoiled = [name for name, flag in zip(names, [not math.isfinite(loss), *flags]) if flag]
        if spoiled:
            raise UserError(f"step {step}: expected finite numbers, found others in {', '.join(spoiled)}; "
                            "lower the learning rates, or go on from a checkpoint.")
        log.step(step, loss, clock)
        return stops > 0

    loader.seek(first_step)
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
                save_checkpoint(log, model, optimizers, step, clock.total, identity)
            if last_step or stopping:
                break
            clock.start()
        running.append((step + 1, train_step(
            model, optimizers, loader, step + 1, lr_scale(step, s), muon_momentum(step, s),
            attention_windows(step, s), stop)))
        if loader.device.type == "cpu" or len(running) > 1:  # a GPU works while the step before is logged
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
    """What, besides source and settings, it takes to run this again. No environment variable is shown."""
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
    parts, groups = s.num_microbatches(world_size), " + ".join(f"{n:,} {name}" for name, n in counts.items())
    return [f"device: {device.type} ({why_device})",
            f"batch: {world_size} ranks x {parts // world_size} microbatches x {s.batch_tokens // parts:,} "
            f"tokens = {s.batch_tokens:,} tokens/step",
            f"parameters: {sum(counts.values()):,} = {groups}"]

def run(s: Settings, overrides: list[str], why_preset: str, dry_run: bool) -> int:
    """From settings to the end of the race; returns the exit code. Raises UserError.
    dry_run: check all that can be checked without training, show the plan, and stop."""
    begun, source, line = time.monotonic(), Path(__file__).read_text(encoding="utf-8"), "=" * 100
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
        log.write(source, line, *describe_environment(), line, *settings, line, console=False)
        kernels, why_kernels = choose_kernels(device, s)
        log.write(*about, *why_kernels)
        model = GPT(s, kernels, world_size)
        init_weights(model, s.seed)
        model.to(device)
        optimizers = make_optimizers(model, s, rank, world_size)
        loader, clock = TrainLoader(plan, s, rank, world_size, device), Clock(device)
        identity = identify_run(s, source, plan, val_tokens, world_size)
        first_step = load_checkpoint(log, model, optimizers, clock, identity) if s.resume else 0
        graphs = torch._dynamo.utils.counters["stats"]
        if s.torch_compile:  # a graph for each window size in training, and another in evaluation
            torch._dynamo.config.recompile_limit = max(8, 2 * len(s.window_schedule.split(",")))
            model.hidden = torch.compile(model.hidden, dynamic=False, fullgraph=True)
        num_steps = warm_up(model, optimizers, loader, val_tokens, s)
        ready, compiled = f"ready after {time.monotonic() - begun:.1f} s", graphs["unique_graphs"]
        log.write(f"{ready}: {num_steps} warm-up steps, {compiled} graphs compiled")
        code = train(model, optimizers, loader, val_tokens, s, log, clock, identity, first_step)
        if s.sample_tokens and s.vocab_size == 257 and code == rank == 0:
            seen = [int(x) for x in val_tokens[:s.sample_tokens] if x != s.bos_id]
            text = generate(model, attention_windows(s.num_iterations, s), seen, s.sample_tokens)
            before, after = (bytes(x).decode(errors="replace") for x in (seen, text[len(seen):]))
            log.write("--- a text that the model has not seen:", before, "--- how it goes on:", after)
        if s.torch_compile:
            late = graphs["unique_graphs"] - compiled
            log.write(f"{'WARNING, on the clock: ' * (late > 0)}compiled since the warm-up: {late} graphs")
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
        logits = 30 * torch.sigmoid((model.lm_head.type_as(x) @ x).float() / 7.5)[:s.vocab_size].cpu()
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
