"""The kernels against float64 formulas, their choice, and their compilation for Hopper.

Without a GPU the Triton kernels run in Triton's interpreter on the CPU (conftest.py sees to it). Run as a
program, this file compiles each of them for sm_90a, without a GPU.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from conftest import CPU, SMALL, before, environment, normal, relative
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class RoundedByTorch:
    """A kernel whose float8 results PyTorch rounds: the interpreter loses a carry into the exponent."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **constants):
            wide = [x.float() if getattr(x, "dtype", None) in FLOAT8 else x for x in args]
            self.kernel[grid](*wide, **constants)
            for x, result in zip(args, wide):
                if result is not x:
                    x.copy_(result)

        return launch


@pytest.fixture(autouse=DEVICE == "cpu")
def interpreter(monkeypatch):
    """What the interpreter lacks: exact rounding to float8, and a GPU's driver, which times tiles."""
    for name in ("cast_fp8_kernel", "softcap_grad_kernel"):
        monkeypatch.setattr(train_gpt, name, RoundedByTorch(getattr(train_gpt, name)))
    monkeypatch.setitem(vars(train_gpt.XXT_kernel), "do_bench", lambda call, quantiles: [1.0] * 3)


# ---------------------------------------------------------------------------------------------------
# Loss of the head


def exact_losses(logits, targets, softcap=train_gpt.Softcap(), token_weights=(1.0,)):
    """Cross-entropies of each row's capped logits with the next tokens, each times its weight, in float64."""
    z = softcap.cap * torch.sigmoid((logits.double() + softcap.shift) / 7.5)
    log_sums, losses = z.exp().sum(1).log(), torch.zeros(len(z)).double()
    for ahead, weight in enumerate(token_weights[:len(z)]):
        rows = len(z) - ahead
        chosen = z[:rows].gather(1, targets[ahead:, None])[:, 0]
        losses = losses + weight * torch.nn.functional.pad(log_sums[:rows] - chosen, (0, ahead))
    return losses


CAPS = [(train_gpt.Softcap(), (1.0,)), (train_gpt.Softcap(23.0, 5.0), (1.0, 0.5, 0.25)),
        (train_gpt.Softcap(23.0, 5.0), (1.0, 0.0, 0.0))]


def test_the_plain_loss_is_softcapped_in_float32_whatever_the_dtype():
    """Only products are rounded to bfloat16: a loss softcapped in it would be off by about 1 %."""
    x, weight, targets = normal(130, 32).bfloat16(), 0.5 * normal(70, 32, seed=1), torch.arange(130) % 70
    loss = train_gpt.softcapped_loss(x, weight, targets)  # the weight is the float32 master
    logits = x @ weight.bfloat16().T
    assert loss.dtype == torch.float32 and relative(loss, exact_losses(logits, targets).sum()) < 2e-5


@pytest.mark.filterwarnings("ignore:overflow")  # to infinity, whose reciprocal is right
@pytest.mark.parametrize("softcap, weights", CAPS)
@pytest.mark.parametrize("rows, columns", [(1, 2), (65, 130), (3, 4100), (64, 256)])
def test_the_loss_kernels_give_losses_gradients_and_their_transpose(
    rows, columns, softcap, weights, monkeypatch
):
    """Every element of them is written. A GPU's tanh is off by 2^-11 at most: by 30 / 2^12 in a loss."""
    empty_pair, exactly = train_gpt.empty_pair, DEVICE == "cpu"

    def poisoned(*case):
        return [x.fill_(torch.nan) for x in empty_pair(*case)]

    monkeypatch.setattr(train_gpt, "empty_pair", poisoned)
    logits, targets = 15 * normal(rows, columns), torch.arange(rows) % columns
    logits[0] = torch.where(torch.arange(columns) % 2 == 0, 1e4, -1e4)  # far beyond the softcap
    leaf = logits.double().requires_grad_()
    exact = exact_losses(leaf, targets, softcap, weights)
    exact_next = exact_losses(logits, targets, softcap)
    logits, targets, weights = logits.to(DEVICE), targets.to(DEVICE), torch.tensor(weights, device=DEVICE)
    losses, next_losses, log_sums = train_gpt.softcap_loss(logits, targets, weights, softcap)
    atol = 1e-5 if exactly else 0.015
    torch.testing.assert_close(losses.cpu().double(), exact.detach(), rtol=1e-5, atol=2 * atol)
    torch.testing.assert_close(next_losses.cpu().double(), exact_next, rtol=1e-5, atol=atol)
    case = logits, targets, weights, log_sums, softcap
    out, out_t = train_gpt.softcap_grad(*case, 7.0, torch.float32)
    grads = 7 * torch.autograd.grad(exact.sum(), leaf)[0]
    torch.testing.assert_close(out.cpu().double(), grads, rtol=1e-4 if exactly else 0.02,
                               atol=1e-5 if exactly else 0.005)
    assert torch.equal(out_t.T, out)


@pytest.mark.parametrize("rows, columns", [(65, 130), (128, 256)])  # the second: whole, aligned tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_fp8_divides_by_the_scale_clamps_and_transposes(rows, columns, dtype):
    x = (100 * normal(rows, columns)).to(dtype)
    x[0, :2] = torch.tensor([1e9, -1e9])
    out, out_t = train_gpt.cast_fp8(x.to(DEVICE), 0.25)
    assert torch.equal(out.cpu().float(), (4 * x.float()).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(out_t.float(), out.float().T) and out_t.is_contiguous()


def fused(*case, token_weights=torch.tensor((1.0, 0.5, 0.25))):
    return train_gpt.float8_multi_token_loss(*case, token_weights.to(DEVICE))[0]


@pytest.mark.parametrize("head_loss, softcap, weights, scales", [
    (train_gpt.float8_softcapped_loss, *CAPS[0], (32**0.5 / 448, 2.0**-9, 1 / 448)),
    (fused, *CAPS[1], (100 / 448, 1.6 / 448, 0.75 / 448))])
def test_the_float8_head_is_the_formula_on_rounded_factors(head_loss, softcap, weights, scales):
    """The input and the weight are e4m3, the gradient is e5m2, each divided by its scale."""
    def rounded(x, scale, dtype):
        return (x.float() / scale).to(dtype).double() * scale

    x, weight = train_gpt.Norm.apply(normal(48, 32)).bfloat16(), 0.1 * normal(80, 32, seed=1)
    leaves, targets = [t.to(DEVICE).requires_grad_() for t in (x, weight)], torch.arange(48) % 5
    loss = head_loss(*leaves, targets.to(DEVICE))
    x_grad, weight_grad = (t.cpu() for t in torch.autograd.grad(loss / 8, leaves))
    x8, w8 = rounded(x, scales[0], FLOAT8[0]), rounded(weight, scales[1], FLOAT8[0])
    logits = (x8 @ w8.T).bfloat16().double().requires_grad_()
    exact = exact_losses(logits, targets, softcap, weights).sum()
    grad = torch.autograd.grad(exact, logits)[0]
    grad = rounded(grad, scales[2], FLOAT8[1]) / 8  # not before it is rounded
    assert relative(loss.detach(), exact.detach()) < (1e-5 if DEVICE == "cpu" else 1e-3)
    assert x_grad.dtype == torch.bfloat16 and relative(x_grad, grad @ w8) < 0.01
    assert weight_grad.dtype == torch.float32 and relative(weight_grad, grad.T @ x8) < 0.005


# ---------------------------------------------------------------------------------------------------
# Newton-Schulz


@pytest.mark.parametrize("tile", train_gpt.XXT_TILES, ids=str)
@pytest.mark.parametrize("rows, cols", [(3, 5), (130, 150)])
def test_every_tile_gives_the_product_and_its_mirror(tile, rows, cols):
    """In bfloat16 on a GPU: the largest tile of float32 needs more shared memory than an H100 has."""
    dtype, tolerance = (torch.float32, 1e-6) if DEVICE == "cpu" else (torch.bfloat16, 5e-3)
    x, base = (normal(2, rows, n, seed=n).to(DEVICE, dtype) for n in (cols, rows))
    base, blocks = base + base.mT, -(-rows // tile.kwargs["BLOCK"])
    kernel = train_gpt.XXT_kernel.fn[blocks, blocks, 2]
    for add in (False, True):
        out = torch.full_like(base, torch.nan)
        try:
            kernel(x, base, out, rows, cols, 0.5, -2.0, add, **tile.kwargs, num_warps=tile.num_warps)
        except OutOfResources as error:  # as in autotuning, which passes over such a tile
            pytest.skip(str(error))
        exact = 0.5 * x.cpu().double() @ x.cpu().double().mT - 2 * add * base.cpu().double()
        assert relative(out, exact) < tolerance
        assert torch.equal(out[:, 128:, :128], out[:, :128, 128:].mT)


@pytest.mark.parametrize("XXT", [train_gpt.XXT, train_gpt.symmetric_XXT])
@pytest.mark.parametrize("rows, cols", [(12, 12), (24, 8), (8, 24)])
def test_newton_schulz_is_five_steps_of_the_quintic_on_the_singular_values_of_each_matrix(rows, cols, XXT):
    values = torch.logspace(-2, 0.5, min(rows, cols), dtype=torch.float64)
    u, v = (torch.linalg.qr(normal(n, len(values), seed=n).double()).Q for n in (rows, cols))
    matrix = (u * values) @ v.T
    stack = torch.stack((matrix, torch.zeros_like(matrix), -1000 * matrix)).float()  # each on its own
    given = stack.to(DEVICE, copy=True)
    found = train_gpt.newton_schulz(given, torch.float32, XXT).cpu()
    assert torch.equal(given.cpu(), stack), "its memory is not used"
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert relative(found[0], (u * values) @ v.T) < 1e-4 and relative(found[2], -(u * values) @ v.T) < 1e-4
    assert not found[1].any(), "zero stays zero"


def test_a_tall_matrix_takes_no_more_work_than_a_wide_one():
    """It is transposed, so that X X^T is the smaller of the two products."""
    work = []
    for shape in ((40, 4), (4, 40)):
        with FlopCounterMode(display=False) as counter:
            train_gpt.newton_schulz(torch.ones(2, *shape), torch.float32)
        work.append(counter.get_total_flops())
    assert work[0] == work[1] > 0


# ---------------------------------------------------------------------------------------------------
# The choice


class OnCPU(TorchFunctionMode):
    """What is meant for a GPU is made on, and moved to, the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [CPU if isinstance(x, torch.device) else x for x in args]
        kwargs = {name: CPU if isinstance(x, torch.device) else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)


def plain_varlen(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, *, scale, window_size, **_):
    """What PyTorch documents of varlen_attn, for the causal windows of the model."""
    assert cu_seqlens is cu_seqlens_k and longest == longest_k >= cu_seqlens.diff().max()
    assert window_size[1] == 0
    mask = train_gpt.banded_mask(cu_seqlens, len(q), window_size[0], longest, q.dtype)
    return train_gpt.banded_attention(q, k, v, mask, scale)


symmetric_XXT = train_gpt.symmetric_XXT


def symmetric_in_float32(X, base=None, **factors):
    """The symmetric product, whose factors the interpreter cannot read in bfloat16."""
    base = None if base is None else base.float()
    return symmetric_XXT(X.float(), base, **factors).type_as(X)


def head_of(change):
    return lambda *case: change(train_gpt.softcapped_loss(*case))


def test_flash_attention_gets_the_window_and_the_documents_of_the_plain_one(monkeypatch):
    """The check before a run would not see a window that is too short by one token of 384."""
    monkeypatch.setattr(varlen, "varlen_attn", create_autospec(varlen.varlen_attn, side_effect=plain_varlen))
    q, k, v = normal(3, 30, 2, 8)
    case = torch.tensor([0, 9, 30, 30], dtype=torch.int32), 30, 4, 21, torch.float32
    found = train_gpt.flash_attention(q, k, v, train_gpt.varlen_args(*case), 0.5)
    assert torch.equal(found, train_gpt.banded_attention(q, k, v, train_gpt.banded_mask(*case), 0.5))


@pytest.fixture
def choose(small, monkeypatch):
    """choose(s, **changes): what a fake H100 takes, and a line for each kind, once functions are replaced."""
    if DEVICE == "cuda":
        pytest.skip("there is a real GPU: tests/gpu/test_gpu.py")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda _: None)
    monkeypatch.setattr(train_gpt, "is_installed", lambda module: True)
    real_varlen, in_bfloat16 = varlen.varlen_attn, replace(small, dtype="bfloat16")

    def run(s=in_bfloat16, attention=plain_varlen, head=lambda f: f, blocks=lambda f: f,
            XXT=symmetric_in_float32, torch_compile=True):
        def compile(function, dynamic, fullgraph=False):
            return head(function) if function is train_gpt.softcapped_loss else blocks(function)

        s = replace(s, torch_compile=torch_compile)
        # with the signature of the real one
        monkeypatch.setattr(varlen, "varlen_attn", create_autospec(real_varlen, side_effect=attention))
        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(train_gpt, "symmetric_XXT", XXT)
        with OnCPU():
            kernels, lines = train_gpt.choose_kernels(torch.device("cuda"), s)
        kinds = ["attention", "head", "Newton-Schulz", *["Adam"] * (s.network == "frontier"), "blocks"]
        assert [line.split(":")[0] for line in lines] == kinds
        return kernels, lines

    return run


def test_fast_kernels_that_agree_are_taken(choose):
    kernels, lines = choose(head=lambda function: head_of(lambda x: x))
    fast = train_gpt.varlen_args, train_gpt.flash_attention, kernels.head_loss, symmetric_in_float32, True
    assert kernels == (*fast, train_gpt.cautious_adam) and kernels.head_loss is not train_gpt.softcapped_loss
    assert not [line for line in lines if "WARNING" in line] and "FlashAttention 3" in lines[0]


def missing(*_, **__):
    raise ImportError("no such kernel")


def failing_once_compiled(monkeypatch):
    """varlen_attn that works, but not once torch.compile was called."""
    compiled = []

    def attention(*qkv, **more):
        return missing() if compiled else plain_varlen(*qkv, **more)

    return dict(attention=attention, blocks=lambda f: compiled.append(f) or f)


DISAGREEING = [  # the line that tells, the kernel that stays plain, the fast one instead, what is found
    (0, "attention", dict(attention=missing), "no such kernel"),
    (0, "attention", dict(attention=lambda *qkv, **more: 1.2 * plain_varlen(*qkv, **more)), "e-01 from"),
    (1, "head_loss", dict(head=lambda f: head_of(lambda x: 1.3 * x - 0.3 * x.detach())), "e-01 from"),
    (1, "head_loss", dict(head=lambda f: head_of(lambda x: x * torch.nan)), "inf from"),
    (1, "head_loss", dict(head=lambda f: head_of(lambda x: x * torch.inf)), "inf from"),
    (2, "XXT", dict(XXT=lambda X, **more: 1.2 * train_gpt.XXT(X, **more)), "e-01 from"),
    (3, "compiled", dict(blocks=lambda f: lambda *args: f(*args).detach() + 0 * f(*args)), "1.0e+00 from"),
    (3, "compiled", failing_once_compiled, "no such kernel"),
]


@pytest.mark.parametrize("line, field, changes, found", DISAGREEING)
def test_a_fast_kernel_that_fails_or_disagrees_is_not_taken(choose, monkeypatch, line, field, changes, found):
    kernels, lines = choose(**(changes(monkeypatch) if callable(changes) else changes))
    assert getattr(kernels, field) is getattr(train_gpt.Kernels(), field)
    assert [i for i, text in enumerate(lines) if "WARNING: plain PyTorch" in text] == [line]
    assert found in lines[line]


def test_the_trials_build_one_model_and_no_fast_kernel_is_tried_twice(choose, monkeypatch):
    built, tried = [], []
    before(train_gpt.GPT, "__init__", lambda *_: built.append(1), monkeypatch)
    before(train_gpt.KernelTrial, "results", lambda _, *case: tried.append(case), monkeypatch)
    choose()
    kinds = ["attention", "head", "Newton-Schulz", "blocks"]
    assert len(built) == 1 and [kind for kind, _ in tried] == [kind for kind in kinds for _ in range(2)]
    for fast, replaced in zip(tried[1::2], tried[2::2]):
        assert fast[1] == replaced[1], "beside those that were chosen before"
    assert [fast.compiled for _, fast in tried] == [False] * 7 + [True]
    assert tried[-1][1].attention is train_gpt.flash_attention


def test_torch_compile_on_a_cpu_without_a_compiler_is_one_sentence(small, monkeypatch):
    def no_compiler(x):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    with pytest.raises(train_gpt.UserError, match=r"^TORCH_COMPILE: .*No working C.. compiler found; "):
        train_gpt.choose_kernels(CPU, replace(small, torch_compile=True))


@pytest.mark.parametrize("network", ["gpt", "frontier"])
def test_a_kernel_is_not_blamed_for_the_rounding_of_those_before_it(choose, small, network):
    """On an H200, FlashAttention was 5e-3 from the plain one, and the float8 head 3e-2; record 82's compiled
    Adam may differ by 1e-3."""
    s = replace(small, dtype="bfloat16")
    if network == "frontier":
        changes = train_gpt.PRESETS["frontier"] | SMALL | dict(num_heads=4, max_seq_len=(40,) * 4)
        s = replace(s, **changes | dict(dtype="bfloat16", batch_tokens=(512,) * 4))
    kernels, lines = choose(s, attention=lambda *qkv, **more: 1.01 * plain_varlen(*qkv, **more),
                            XXT=train_gpt.XXT)
    assert re.search(r": FlashAttention 3; (\d\.\de-03|1\..e-02) from what it replaces", lines[0])
    for line in lines[2:-1]:
        assert line.endswith("; 0.0e+00 from what it replaces"), line
    assert "WARNING" not in "".join(lines) and kernels.compiled


@pytest.mark.parametrize("changes, capability, fp8", [
    ({}, (9, 0), True), ({}, (8, 9), True), ({}, (8, 0), False), (dict(fp8_head=False), (9, 0), False),
    (dict(vocab_multiple=8), (9, 0), False)])
def test_float8_is_used_where_it_can_be(choose, small, monkeypatch, changes, capability, fp8):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    kernels, lines = choose(replace(small, **dict(dtype="bfloat16", vocab_multiple=16) | changes))
    expected = train_gpt.float8_softcapped_loss if fp8 else train_gpt.softcapped_loss
    assert kernels.head_loss == expected and ("float8" in lines[1]) == fp8


def test_float32_takes_neither_flash_attention_nor_tiles_and_warns_of_nothing(choose, small, monkeypatch):
    kernels, lines = choose(small, attention=missing, XXT=missing)
    assert kernels == train_gpt.Kernels(compiled=True) and "WARNING" not in "".join(lines)
    kernels, lines = choose(small, attention=missing, XXT=missing, torch_compile=False)
    assert kernels == train_gpt.Kernels() and "WARNING" not in "".join(lines)
    assert "nothing else for DTYPE=float32 and TORCH_COMPILE=0" in lines[0]


@pytest.mark.parametrize("capability, advice", [
    ((9, 0), "pip install flash-attn-3 "), ((10, 0), "pip install 'flash-attn-4>="),
    ((8, 9), ""), ((12, 0), "")])
def test_without_a_newer_flash_attention_a_gpu_that_could_use_one_says_so_loudly(
        choose, monkeypatch, capability, advice):
    monkeypatch.setattr(train_gpt, "is_installed", lambda module: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    kernels, lines = choose()
    assert kernels.attention is train_gpt.flash_attention and "FlashAttention 2 of PyTorch; " in lines[0]
    assert lines[0].startswith("attention: WARNING: ") == bool(advice) and advice in lines[0]


def test_of_the_flash_attentions_the_fastest_that_passes_its_trial_is_taken(choose, monkeypatch):
    """Each is tried in turn; here version 3 is wrong, and PyTorch is too old to train with version 4."""
    active = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda warn: active.clear())

    def attention(*qkv, wrong=(), failing=(), **more):
        if active and active[-1] in failing:
            raise RuntimeError("no windows here")
        return (1.2 if active and active[-1] in wrong else 1) * plain_varlen(*qkv, **more)

    _, lines = choose(attention=partial(attention, wrong=["FA3"]))
    assert lines[0].startswith("attention: WARNING: FlashAttention 4; 0.0e+00 from")
    assert active == ["FA3", "FA4"]
    assert "FlashAttention 3 was 2.0e-01 from" in lines[0]
    active.clear()
    _, lines = choose(attention=partial(attention, wrong=["FA3"], failing=["FA4"]))
    assert lines[0].startswith("attention: WARNING: FlashAttention 2 of PyTorch; ") and not active
    assert "FlashAttention 4 was inf from" in lines[0] and "no windows here" in lines[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    _, lines = choose(attention=partial(attention, wrong=["FA3"]))
    assert lines[0].startswith("attention: FlashAttention 4; 0.0e+00 from") and active == ["FA4"]


def test_a_package_that_is_not_there_is_not_installed():
    assert train_gpt.is_installed("torch.nn") and not train_gpt.is_installed("torch.no_such_module")
    assert not train_gpt.is_installed("no_such_package.module")


def test_amds_gpus_get_nothing_that_only_nvidias_have(choose, small, monkeypatch):
    """Their capabilities have numbers like those of Hopper."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    candidates = train_gpt.list_candidates((0, 0), replace(small, dtype="bfloat16"))
    names = [candidate.name for candidate in candidates]
    assert "FlashAttention 2 of PyTorch" in names and not any("float8" in name for name in names)
    _, lines = choose(attention=missing)
    assert lines[0].startswith("attention: WARNING: plain PyTorch, much slower; FlashAttention 2 ")
    assert lines[1].startswith("head: bfloat16, torch.compile; ")


@pytest.mark.parametrize("capability, dtype, fits", [
    ((7, 5), "bfloat16", False), ((7, 0), "bfloat16", False), ((7, 5), "float32", True),
    ((8, 0), "bfloat16", True)])
def test_a_gpu_before_ampere_is_refused_in_bfloat16_with_what_to_set(
        small, pretend_gpus, capability, dtype, fits):
    pretend_gpus(1, capability)
    s, launcher = replace(small, dtype=dtype), train_gpt.read_launcher({})
    if fits:
        assert train_gpt.choose_device(s, launcher)[0].type == "cuda"
        return
    with pytest.raises(train_gpt.UserError, match=r"found a GPU; .*PRESET=demo.*DTYPE=float32") as raised:
        train_gpt.choose_device(s, launcher)
    assert raised.value.exit_code == 2


def test_plain_attention_never_runs_on_cudnn(choose):
    torch.backends.cuda.enable_cudnn_sdp(True)
    choose()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ---------------------------------------------------------------------------------------------------
# Compilation


def compile_for_hopper(folder):
    """Compile every kernel as the script launches it; prints what came of each as JSON."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler
    from triton.compiler import ASTSource, compile

    constants = dict(LN2=train_gpt.LN2, TANH=True)
    networks = [dict(CAP=30.0, SHIFT=0.0, NUM_WEIGHTS=1), dict(CAP=23.0, SHIFT=5.0, NUM_WEIGHTS=3)]
    tile = {name: value for name, value in train_gpt.TILE.items() if name != "num_warps"}
    loss = dict(logits="*bf16", targets="*i64", token_weights="*fp32", losses="*fp32", next_losses="*fp32",
                log_sums="*fp32", num_rows="i32", num_columns="i32")
    grad = loss | dict(scale="fp32", grads="*fp8e5", grads_t="*fp8e5")
    cast = dict(x="*bf16", out="*fp8e4nv", out_t="*fp8e4nv", factor="fp32", num_rows="i32", num_columns="i32")
    XXT = dict(x="*bf16", base="*bf16", out="*bf16", rows="i32", cols="i32", alpha="fp32", beta="fp32")
    builds = []
    for network in networks:
        given = constants | network | dict(BLOCK=4096)
        builds.append(("loss", train_gpt.softcap_loss_kernel, loss, given, dict(num_warps=8)))
    for name, kernel, types, given in (
        *(("grad", train_gpt.softcap_grad_kernel, grad, constants | network | tile) for network in networks),
        ("cast", train_gpt.cast_fp8_kernel, cast, tile),
        ("cast", train_gpt.cast_fp8_kernel, cast | dict(x="*fp32"), tile),
    ):
        builds.append((name, kernel, types, given, dict(num_warps=train_gpt.TILE["num_warps"])))
    for config in train_gpt.XXT_TILES:
        for add in (False, True):
            options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
            builds.append(("XXT", train_gpt.XXT_kernel.fn, XXT, config.kwargs | dict(ADD=add), options))
    found = []
    for name, kernel, types, given, options in builds:
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names)
                   if signature[argument].startswith("*") or signature[argument] == "i32"}
        built = compile(ASTSource(kernel, signature, given, aligned), GPUTarget("cuda", 90, 32), options)
        ptx = folder / "kernel.ptx"
        ptx.write_text(built.asm["ptx"])
        ptxas = Path(compiler.__file__).parent / "bin" / "ptxas"
        done = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", ptx, "-o", folder / "kernel.cubin"],
                              capture_output=True, text=True, check=True)
        found.append((name, built.metadata.shared, built.asm["ptx"], done.stderr))
    print(json.dumps(found))


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_spills_or_slow_divisions(tmp_path):
    changes = dict(TRITON_INTERPRET=0, TRITON_CACHE_DIR=tmp_path)
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True,
                          env=environment(**changes))
    assert done.returncode == 0, done.stderr[-2000:]
    builds = json.loads(done.stdout)
    assert len(builds) == 6 + 2 * len(train_gpt.XXT_TILES)
    for name, shared, ptx, report in builds:
        assert "0 bytes spill stores, 0 bytes spill loads" in report, (name, report)
        assert shared <= 227 << 10, name  # what a block of a Hopper GPU may have
        assert not [word for word in ("div.full", "div.rn", "sqrt.rn") if word in ptx], name
        assert ("wgmma" in ptx) == (name == "XXT"), "products use Hopper's own instruction"


if __name__ == "__main__":
    compile_for_hopper(Path(sys.argv[1]))
