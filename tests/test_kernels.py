"""The head's loss and Newton-Schulz, against float64 formulas, and the choice of kernels."""

import math

import pytest
import torch
from conftest import CPU
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

# ---------------------------------------------------------------------------------------------------
# Head


def head_loss_by_formula(x, weight, targets):
    """Cross-entropy of 30 * sigmoid(logits / 7.5), token by token in float64, and summed."""
    total = x.new_zeros((), dtype=torch.float64)
    for row, target in zip(x.double(), targets.tolist()):
        logits = 30 / (1 + torch.exp(-(weight.double() @ row) / 7.5))
        total = total + torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[target]
    return total


def head_case(num_tokens, dim=6, vocab=11, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, dim, generator=generator)
    weight = size * torch.randn(vocab, dim, generator=generator)  # logits far into the bend of the softcap
    return x, weight, torch.randint(vocab, (num_tokens,), generator=generator)


@pytest.mark.parametrize("num_tokens", [1, 2, 37])
def test_the_head_loss_is_the_sum_over_tokens_of_the_softcapped_cross_entropy(num_tokens):
    x, weight, targets = head_case(num_tokens)
    loss = train_gpt.softcapped_head_loss(x, weight, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), head_loss_by_formula(x, weight, targets), rtol=1e-5, atol=0)


def test_the_softcap_bounds_the_loss_of_a_token_by_30_nats_and_the_vocabulary():
    """Logits of any size come to between 0 and 30, so the worst is 30 + log(1 + (V - 1) / e^30)."""
    x, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0], [-1.0]])
    worst = train_gpt.softcapped_head_loss(x, weight, torch.tensor([1])).item()
    assert worst == pytest.approx(30.0, abs=1e-4)
    assert train_gpt.softcapped_head_loss(x, weight, torch.tensor([0])).item() == pytest.approx(0.0, abs=1e-4)


def test_a_zero_head_is_indifferent():
    x, weight, targets = head_case(5, vocab=13)
    loss = train_gpt.softcapped_head_loss(x, torch.zeros_like(weight), targets)
    assert loss.item() == pytest.approx(5 * math.log(13), rel=1e-6)


def test_the_head_loss_has_the_gradients_of_its_formula():
    inputs = head_case(19)
    grads = []
    for function, dtype in (
        (train_gpt.softcapped_head_loss, torch.float32),
        (head_loss_by_formula, torch.float64),
    ):
        x, weight = (t.to(dtype).requires_grad_() for t in inputs[:2])
        grads.append([g.double() for g in torch.autograd.grad(function(x, weight, inputs[2]), (x, weight))])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [100, 8192, 8193, 20_001])
def test_without_gradients_the_head_loss_is_the_same_at_every_length(num_tokens):
    """The chunks of the path without gradients leave out no token and count none twice."""
    x, weight, targets = head_case(num_tokens, dim=2, vocab=5)
    with_gradients = train_gpt.softcapped_head_loss(x, weight, targets)
    with torch.no_grad():
        without = train_gpt.softcapped_head_loss(x, weight, targets)
    torch.testing.assert_close(without, with_gradients, rtol=1e-5, atol=0)
    logits = 30 * torch.sigmoid(x.double() @ weight.double().T / 7.5)
    expected = (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).sum()
    torch.testing.assert_close(without.double(), expected, rtol=1e-5, atol=0)


def test_the_head_loss_of_bfloat16_is_float32_and_softcaps_in_float32():
    """Only the product is rounded to bfloat16; a loss softcapped in bfloat16 would be off by about 1 %."""
    x, weight, targets = head_case(200, size=1.0)
    x = x.bfloat16()
    loss = train_gpt.softcapped_head_loss(x, weight, targets)  # the weight is the float32 master
    logits = 30 * torch.sigmoid((x @ weight.bfloat16().T).double() / 7.5)
    expected = (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)


# ---------------------------------------------------------------------------------------------------
# Newton-Schulz


def matrix_with(values, rows, cols, seed=0):
    """U, V and U diag(values) V^T in float64, with random orthonormal columns in U and V."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(n):
        return torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q

    u, v = orthonormal(rows), orthonormal(cols)
    return u, v, u @ torch.diag(values) @ v.T


def quintic(values):
    """Singular values after five steps: the quintic of the Frobenius-normalised ones."""
    x = values / (values.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


SHAPES = [(12, 12), (24, 8), (8, 24)]


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_newton_schulz_is_five_steps_of_the_quintic_on_the_singular_values(rows, cols):
    values = torch.logspace(-3, 0.5, min(rows, cols), dtype=torch.float64)
    u, v, matrix = matrix_with(values, rows, cols)
    result = train_gpt.newton_schulz(matrix, torch.float64)
    torch.testing.assert_close(result, u @ torch.diag(quintic(values)) @ v.T, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_newton_schulz_keeps_singular_vectors_and_brings_the_values_near_one(rows, cols, dtype, tolerance):
    values = torch.linspace(0.5, 2.0, min(rows, cols), dtype=torch.float64)
    u, v, matrix = matrix_with(values, rows, cols, seed=1)
    result = train_gpt.newton_schulz(matrix, dtype)
    assert result.dtype == dtype and result.shape == (rows, cols)
    inner = u.T @ result.double() @ v
    assert inner.diagonal().min() > 0.6 and inner.diagonal().max() < 1.3
    assert (inner - torch.diag(inner.diagonal())).abs().max() < tolerance
    outside = result.double() - u @ inner @ v.T  # nothing beyond the row and column spaces
    assert outside.abs().max() < tolerance


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_newton_schulz_does_not_see_the_scale_of_a_matrix(scale):
    _, _, matrix = matrix_with(torch.linspace(0.5, 2.0, 8, dtype=torch.float64), 8, 16)
    torch.testing.assert_close(
        train_gpt.newton_schulz(scale * matrix, torch.float64),
        train_gpt.newton_schulz(matrix, torch.float64),
        rtol=0,
        atol=1e-3,
    )


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_each_matrix_of_a_stack_is_orthogonalised_on_its_own(rows, cols):
    """As for q, k, v and output projection in one bank: neither neighbours nor their sizes matter."""
    stack = torch.randn(2, 3, rows, cols, generator=torch.Generator().manual_seed(2))
    stack = stack * torch.tensor([1.0, 100.0, 0.01]).view(3, 1, 1)
    together = train_gpt.newton_schulz(stack, torch.float32)
    for i in range(2):
        for j in range(3):
            alone = train_gpt.newton_schulz(stack[i, j].clone(), torch.float32)
            torch.testing.assert_close(together[i, j], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols", SHAPES)
def test_zero_stays_zero_and_does_not_spoil_its_neighbours(rows, cols, dtype):
    stack = torch.randn(2, rows, cols, generator=torch.Generator().manual_seed(3))
    stack[0] = 0
    result = train_gpt.newton_schulz(stack, dtype)
    assert torch.equal(result[0], torch.zeros(rows, cols, dtype=dtype))
    assert result[1].isfinite().all() and result[1].float().norm() > 1


def test_a_tall_matrix_takes_no_more_work_than_a_wide_one():
    """It is transposed, so that X X^T is the smaller of the two products."""
    work = []
    for shape in ((40, 4), (4, 40)):
        with FlopCounterMode(display=False) as counter:
            train_gpt.newton_schulz(torch.ones(2, *shape), torch.float32)
        work.append(counter.get_total_flops())
    assert work[0] == work[1] > 0


def test_newton_schulz_leaves_its_argument_alone():
    matrix = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    before = matrix.clone()
    train_gpt.newton_schulz(matrix, torch.float32)
    assert torch.equal(matrix, before)


# ---------------------------------------------------------------------------------------------------
# The choice


def test_the_cpu_gets_the_plain_kernel_of_every_kind_and_the_reason():
    kernels, reasons = train_gpt.choose_kernels(torch.device("cpu"), train_gpt.Settings())
    plain = (train_gpt.banded_plan, train_gpt.banded_attention, train_gpt.softcapped_head_loss)
    assert kernels == (*plain, train_gpt.newton_schulz)
    for subject in ("attention", "head", "newton_schulz"):
        assert any(line.startswith(f"{subject}: ") and "cpu" in line for line in reasons), subject


def missing():
    raise ImportError("no such package\nand more")


@pytest.mark.parametrize(
    "candidates, name, reason",
    [
        ([("fast", lambda: {"k": 1}, lambda kernels: 0.01, 0.03)], "fast", "1.0e-02 from plain PyTorch"),
        ([("absent", missing, None, 0.03), ("next", lambda: {"k": 1}, lambda kernels: 0.0, 0.03)], "next",
         "absent: ImportError, no such package"),
        ([("wrong", lambda: {"k": 1}, lambda kernels: 0.04, 0.03)], "plain one", "wrong: 4.0e-02 from plain"),
        ([("wild", lambda: {"k": 1}, lambda kernels: math.nan, 0.03)], "plain one", "wild: nan from plain"),
        ([("broken", lambda: {"k": 1}, lambda kernels: 1 / 0, 0.03)], "plain one", "broken: ZeroDivision"),
        ([], "plain one", "in plain PyTorch"),
    ],
)
def test_the_first_kernel_that_agrees_is_taken_and_the_log_says_why(candidates, name, reason):
    kernels, chosen, why = train_gpt.first_that_agrees(candidates, "plain one", CPU)
    assert (chosen, kernels) == (name, {} if name == "plain one" else {"k": 1})
    assert reason in why and "\n" not in why


def test_a_candidate_that_breaks_the_device_ends_the_run_by_its_name(monkeypatch):
    """An illegal access of memory, say, after which a GPU does nothing more for its process."""
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", broken)
        with pytest.raises(RuntimeError, match="wild failed .ZeroDivisionError, .*, and cpu does not work"):
            train_gpt.first_that_agrees([("wild", dict, lambda kernels: 1 / 0, 1.0)], "plain", CPU)


def test_the_distance_of_two_functions_is_that_of_their_results_or_of_their_gradients():
    x = torch.tensor([3.0, 4.0])
    assert train_gpt.distance(lambda x: x, lambda x: x, x) == 0
    assert train_gpt.distance(lambda x: 1.5 * x, lambda x: x, x, gradients=False) == pytest.approx(0.5)
    # the same result, with twice the gradient
    assert train_gpt.distance(lambda x: 2 * x - x.detach(), lambda x: x, x) == pytest.approx(1.0)
    assert train_gpt.distance(lambda x: x / 0, lambda x: x, x) == math.inf
    assert train_gpt.distance(lambda x: x * math.nan, lambda x: x, x) > 1e30
    with torch.no_grad():  # as where text is drawn
        assert train_gpt.distance(lambda x: 2 * x - x.detach(), lambda x: x, x) == pytest.approx(1.0)
    assert x.grad is None and not x.requires_grad
