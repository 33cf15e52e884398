"""The GPU's kernels against float64 formulas: on a GPU, or on the CPU under Triton's interpreter.

conftest.py chooses; TRITON_INTERPRET=1 or 0 overrides it.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, environment
from test_kernels import head_case, head_loss_by_formula, matrix_with, quintic

import train_gpt

pytest.importorskip("triton")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def poison(monkeypatch):
    """Have what a kernel is to fill hold NaN before."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **more: nan_filled(make(*args, **more)))
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: nan_filled(make(*args, **more)))


def nan_filled(x):
    return x.fill_(math.nan) if x.dtype.is_floating_point else x


# ---------------------------------------------------------------------------------------------------
# Head


def by_formula(x, weight, targets):
    """Loss and gradients in float64, on the CPU; targets below 0 do not count."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    counts = targets >= 0
    loss = head_loss_by_formula(x[counts], weight, targets[counts])
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def fused(x, weight, targets, fp8=False, factor=1.0):
    """Loss and gradients of the fused head."""
    x, weight = (t.detach().to(DEVICE).requires_grad_() for t in (x, weight))
    head = train_gpt.fused_head(train_gpt.Settings(), fp8)["head_loss"]
    loss = head(x, weight, targets.to(DEVICE))
    return [t.detach().cpu() for t in (loss, *torch.autograd.grad(factor * loss, (x, weight)))]


def relative(x, y):
    return float((x.cpu().double() - y.double()).norm() / y.double().norm())


@pytest.mark.parametrize("num_tokens, vocab", [(1, 2), (7, 5), (64, 64), (65, 63), (130, 200), (20, 4100)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fused_head_has_the_loss_and_gradients_of_the_formula(num_tokens, vocab, seed, monkeypatch):
    x, weight, targets = head_case(num_tokens, vocab=vocab, seed=seed, size=1.0)
    expected = by_formula(x, weight, targets)
    poison(monkeypatch)
    for found, right in zip(fused(x, weight, targets), expected):
        assert found.dtype == torch.float32 and relative(found, right) < 1e-5


def test_the_fused_head_goes_on_from_chunk_to_chunk(monkeypatch):
    monkeypatch.setattr(train_gpt, "HEAD_CHUNK", 16)
    x, weight, targets = head_case(53)
    for found, right in zip(fused(x, weight, targets), by_formula(x, weight, targets)):
        assert relative(found, right) < 1e-5


def test_the_backward_pass_of_the_fused_head_multiplies_by_the_gradient_of_the_loss():
    case = head_case(10)
    once, thrice = fused(*case), fused(*case, factor=3.0)
    for a, b in zip(once[1:], thrice[1:]):
        torch.testing.assert_close(3 * a, b)


def test_tokens_without_a_target_have_no_loss_and_no_gradient():
    x, weight, targets = head_case(9)
    targets[[0, 4, 8]] = train_gpt.NO_TARGET
    loss, x_grad, weight_grad = fused(x, weight, targets)
    right = by_formula(x, weight, targets)
    assert relative(loss, right[0]) < 1e-5 and relative(weight_grad, right[2]) < 1e-5
    assert x_grad[[0, 4, 8]].count_nonzero() == 0 and x_grad[[1, 2, 3]].count_nonzero()
    plain = train_gpt.softcapped_head_loss(x, weight, targets)
    assert relative(plain, right[0]) < 1e-5


@pytest.mark.parametrize("num_tokens", [1, 20, 33])
def test_without_gradients_the_fused_head_gives_the_same_loss(num_tokens, monkeypatch):
    monkeypatch.setattr(train_gpt, "HEAD_CHUNK", 16)
    x, weight, targets = head_case(num_tokens)
    with torch.no_grad():
        head = train_gpt.fused_head(train_gpt.Settings(), True)["head_loss"]
        loss = head(x.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE))
    assert loss.dtype == torch.float32 and relative(loss, by_formula(x, weight, targets)[0]) < 1e-5


def test_in_bfloat16_the_fused_head_is_as_near_to_the_formula_as_the_plain_one():
    x, weight, targets = head_case(100, dim=32, vocab=70, size=0.5)
    x = x.bfloat16()
    right = by_formula(x, weight, targets)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    plain = train_gpt.softcapped_head_loss(*leaves, targets)
    plain = plain.detach(), *torch.autograd.grad(plain, leaves)
    for found, other, exact in zip(fused(x, weight, targets), plain, right):
        assert found.dtype == other.dtype and relative(found, exact) < 2 * relative(other, exact) + 1e-4


def rounded(x, scale, dtype):
    """As the product in float8 sees it, in float64."""
    return (x / scale).to(dtype).double() * scale


@pytest.fixture
def torch_rounds_to_float8(monkeypatch):
    """The gradient kernel writes float32 and PyTorch rounds it.

    Triton 3.9's interpreter loses the carry where rounding to e5m2 reaches the next power of two.
    """
    if not INTERPRETED:
        return
    exact = train_gpt.softcap_gradient

    def gradient(logits, targets, sums, grads, grads_t=None, scale=1.0):
        wide = torch.empty(logits.shape), torch.empty(logits.shape[::-1])
        exact(logits, targets, sums, *wide, scale=scale)
        for narrow, values in zip((grads, grads_t), wide):
            narrow.copy_(values)

    monkeypatch.setattr(train_gpt, "softcap_gradient", gradient)


@pytest.mark.parametrize("num_tokens", [16, 21, 64])
@pytest.mark.usefixtures("torch_rounds_to_float8")
def test_the_float8_head_is_the_formula_on_rounded_factors(num_tokens):
    """Scales: sqrt(D) / 448 for the input, 2^-9 for the weight, both e4m3; 1 / 448 for the gradient, e5m2."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = train_gpt.norm(torch.randn(num_tokens, 32, generator=generator)).bfloat16()
    weight = 0.1 * torch.randn(48, 32, generator=generator)
    targets = torch.randint(48, (num_tokens,), generator=generator)
    loss, x_grad, weight_grad = fused(x, weight, targets, fp8=True)

    x8 = rounded(x, 32**0.5 / 448, torch.float8_e4m3fn)
    w8 = rounded(weight, 2.0**-9, torch.float8_e4m3fn)
    logits = (x8 @ w8.T).bfloat16().double().requires_grad_()
    right = torch.nn.functional.cross_entropy(30 * torch.sigmoid(logits / 7.5), targets, reduction="sum")
    exact = torch.autograd.grad(right, logits)[0]
    grad = rounded(exact, 1 / 448, torch.float8_e5m2)
    # the hardware sums the products of the logits in less than float32
    assert relative(loss, right.detach()) < (1e-5 if INTERPRETED else 2e-4)
    assert x_grad.dtype == torch.bfloat16 and relative(x_grad, grad @ w8) < 0.01
    assert weight_grad.dtype == torch.float32 and relative(weight_grad, grad.T @ x8) < 0.005
    plain = by_formula(x, weight, targets)
    assert all(relative(a, b) < 0.1 for a, b in zip((loss, x_grad, weight_grad), plain))


def test_weights_too_large_for_float8_are_clamped():
    x, weight = torch.ones(16, 16).bfloat16(), torch.full((16, 16), 1e4)
    assert all(t.isfinite().all() for t in fused(x, weight, torch.zeros(16, dtype=torch.int64), fp8=True))


def test_float8_refuses_sizes_that_the_hardware_does_not_take(small):
    with pytest.raises(ValueError, match="multiples of 16, not 32 channels and 56 ids"):
        train_gpt.fused_head(small, fp8=True)


def test_the_fused_head_is_one_graph_for_the_compiler():
    """Its custom operators tell the compiler shapes and gradients, and run as they are."""
    case = [t.to(DEVICE) for t in head_case(12)]
    train_head = train_gpt.fused_head(train_gpt.Settings(), False)["head_loss"]
    compiled = torch.compile(lambda x, w: train_head(2 * x, w, case[2]), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, lambda x, w: train_head(2 * x, w, case[2])):
        x, weight = (t.detach().requires_grad_() for t in case[:2])
        loss = function(x, weight)
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, weight))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_the_head_operators_are_sound():
    """torch.library's own check: schema, fake implementations, autograd registration."""
    x, weight, targets = (t.to(DEVICE) for t in head_case(12))
    leaves = [t.requires_grad_() for t in (x, weight)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(train_gpt.head_gradients_op, (*leaves, targets, False), test_utils=tests)
    torch.library.opcheck(train_gpt.head_loss_op, (x.detach(), weight.detach(), targets), test_utils=tests)


# ---------------------------------------------------------------------------------------------------
# Newton-Schulz


STACKS = [(3, 5), (1, 1), (128, 64), (130, 70), (2, 129, 10), (2, 2, 20, 200), (300, 65)]


@pytest.mark.parametrize("shape", STACKS)
def test_the_symmetric_product_is_the_product(shape, monkeypatch):
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator)
    base = torch.randn(*shape[:-1], shape[-2], generator=generator)
    base = base + base.mT
    right = x.double() @ x.double().mT
    poison(monkeypatch)
    x, base = x.to(DEVICE), base.to(DEVICE)
    found = train_gpt.symmetric_product(x)
    combined = train_gpt.symmetric_product(x, 0.5, base, -2.0)
    assert relative(found, right) < 1e-6 and relative(combined, 0.5 * right - 2 * base.cpu().double()) < 1e-6
    for product in (found, combined):  # beyond the tiles on the diagonal it is symmetric to the last bit
        assert torch.equal(product[..., 128:, :128], product[..., :128, 128:].mT)


def test_the_symmetric_product_reads_any_strides_and_keeps_its_arguments():
    whole = torch.randn(70, 3, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x = whole[:, 1].T
    before = whole.clone()
    assert relative(train_gpt.symmetric_product(x), x.cpu().double() @ x.cpu().double().T) < 1e-6
    assert torch.equal(whole, before)


@pytest.mark.parametrize("tile", train_gpt.TILES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 130, 150)])
def test_every_tile_gives_the_product(tile, shape, monkeypatch):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    right = 3 * x.double() @ x.double().mT
    poison(monkeypatch)
    x = x.to(DEVICE)
    try:
        found = train_gpt.symmetric_product(x, 2.0, (right / 3).float().to(DEVICE), 1.0, tile)
    except train_gpt.triton.runtime.errors.OutOfResources:
        pytest.skip("this GPU has less shared memory")
    assert relative(found, right) < 1e-6


@pytest.fixture
def stopwatch(monkeypatch, tmp_path):
    """Instead of a GPU's: times by tile, which a test may change, and calls. One without is too big."""
    times, calls = dict(zip(train_gpt.TILES, (5.0, 3.0, 4.0))), []

    def time_of(call, **_):
        calls.append(call)
        with monkeypatch.context() as patched:
            patched.setattr(train_gpt, "symmetric_product", lambda *arguments: arguments[-1])
            tile = call()
        if tile not in times:
            raise train_gpt.triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        if isinstance(times[tile], Exception):
            raise times[tile]
        return times[tile]

    monkeypatch.setattr("triton.testing.do_bench", time_of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(train_gpt.triton.knobs.cache, "dir", str(tmp_path))
    return times, calls


def fastest(rows=8):
    return train_gpt.fastest_tile((2, rows, 12), torch.float32, torch.device("cpu"))


def test_the_fastest_tile_is_taken_and_its_time_not_taken_again(stopwatch):
    times, calls = stopwatch
    first, second, *_ = train_gpt.TILES
    assert fastest() == second and len(calls) == len(train_gpt.TILES)
    times[first] = 1.0
    assert fastest() == second and len(calls) == len(train_gpt.TILES)
    assert fastest(9) == first, "another shape has times of its own"


@pytest.mark.parametrize("damage", ["", "[[1, 2]]", "[[[128, 64], 1.0]]", "{", "7"])
def test_damaged_times_of_tiles_are_taken_again(damage, stopwatch, tmp_path):
    times, calls = stopwatch
    second = fastest()
    (kept,) = tmp_path.rglob("tile_times.json")
    kept.write_text(damage)
    assert fastest() == second and len(calls) == 2 * len(train_gpt.TILES)
    assert fastest() == second and len(calls) == 2 * len(train_gpt.TILES)


def test_where_tiles_cannot_be_timed_the_first_are_taken_and_the_next_run_tries_again(stopwatch, small):
    times, _ = stopwatch
    wide, second = replace(small, model_dim=128, mlp_dim=256), train_gpt.TILES[1]
    times[second] = RuntimeError("CUDA out of memory")
    tiles, why = train_gpt.choose_tiles(wide, torch.device("cpu"))
    assert (tiles, why) == ({}, "not timed: RuntimeError, CUDA out of memory")
    times[second] = 3.0
    tiles, why = train_gpt.choose_tiles(wide, torch.device("cpu"))
    assert set(tiles.values()) == {second} and why == "timed here, or in an earlier run"


def test_a_cache_that_cannot_be_written_costs_no_run(stopwatch, small, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_gpt.triton.knobs.cache, "dir", str(tmp_path / "file"))
    tiles, why = train_gpt.choose_tiles(replace(small, model_dim=128, mlp_dim=256), torch.device("cpu"))
    assert tiles == {} and why.startswith("not timed: NotADirectoryError, ")


def test_tiles_are_chosen_for_all_that_muon_multiplies_but_the_gates(monkeypatch, small):
    s, asked, second = replace(small, model_dim=128, mlp_dim=96), [], train_gpt.TILES[1]
    monkeypatch.setattr(train_gpt, "fastest_tile", lambda stack, *_: asked.append(stack) or second)
    tiles, _ = train_gpt.choose_tiles(s, torch.device("cpu"))
    assert asked == [(44, 128, 128), (22, 96, 96), (22, 96, 128)]
    products = set()

    def watched(x, alpha=1.0, base=None, beta=0.0, tile=None):
        products.add((tuple(x.shape), tile))
        return alpha * x @ x.mT + (0 if base is None else beta * base)

    monkeypatch.setattr(train_gpt, "symmetric_product", watched)
    orthogonalize = train_gpt.half_newton_schulz(tiles)["orthogonalize"]
    for stack in train_gpt.muon_stacks(s, 1):
        orthogonalize(torch.randn(stack), torch.float32)
    assert products == {(stack, second) for stack in asked} | {
        ((11, 2, 12), train_gpt.TILES[0]), ((11, 2, 2), train_gpt.TILES[0])}


@pytest.mark.parametrize("rows, cols", [(12, 12), (24, 8), (8, 24), (130, 140)])
def test_newton_schulz_by_halves_is_five_steps_of_the_quintic(rows, cols):
    values = torch.logspace(-2, 0.5, min(rows, cols), dtype=torch.float64)
    u, v, matrix = matrix_with(values, rows, cols)
    found = train_gpt.half_newton_schulz({})["orthogonalize"](matrix.float().to(DEVICE), torch.float32)
    assert relative(found, u @ torch.diag(quintic(values)) @ v.T) < 1e-4
    stack = torch.stack((matrix, torch.zeros_like(matrix), -matrix)).float()
    # in float16, since the interpreter's dot takes bfloat16 for integers
    found = train_gpt.half_newton_schulz({})["orthogonalize"](stack.to(DEVICE), torch.float16)
    plain = train_gpt.newton_schulz(stack, torch.float16)
    assert found.dtype == torch.float16 and found[1].count_nonzero() == 0 and relative(found, plain) < 0.01


# ---------------------------------------------------------------------------------------------------
# Compilation


PRODUCTS = {"symmetric_kernel", "symmetric_kernel*"}  # which matrix units do in bfloat16


@pytest.mark.slow
def test_every_kernel_compiles_for_ampere_ada_and_hopper_and_fits_in_their_shared_memory(tmp_path):
    """Without a GPU, down to machine code; products on Hopper use its own matrix instruction."""
    changes = dict(TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, ROOT / "tests" / "compile_kernels.py"], capture_output=True,
                          text=True, env=environment(**changes))
    assert done.returncode == 0, done.stderr[-2000:]
    builds = [line.split() for line in done.stdout.splitlines()]
    assert len(builds) == 8 + 3 * 3 + len(train_gpt.TILES) - 1
    room = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10}  # bytes a block may have
    for name, capability, shared, *instruction in builds:
        assert int(shared) <= room[capability], (name, capability)
        expected = "wgmma" if capability == "90" else "mma.sync"
        assert instruction == ([expected] if name in PRODUCTS else []), (name, capability)
