"""Banded attention, and the operators around FlashAttention 4, against a full T x T mask in float64."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from conftest import ROOT, environment
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt

SCALE = 0.12
HEADS, CHANNELS = 2, 4


def attention_weights(q, k, starts, window, scale):
    """(H, T, T), in q's dtype: query i sees key j where 0 <= i - j <= window, in one document."""
    num_tokens = len(q)
    document = [max(number for number, start in enumerate(starts) if start <= t) for t in range(num_tokens)]
    seen = torch.tensor(
        [
            [0 <= i - j <= window and document[i] == document[j] for j in range(num_tokens)]
            for i in range(num_tokens)
        ]
    )
    scores = scale * torch.einsum("ihk,jhk->hij", q, k)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=2)


def full_attention(q, k, v, starts, window, scale):
    return torch.einsum("hij,jhk->ihk", attention_weights(q, k, starts, window, scale), v)


def random_qkv(num_tokens, seed=0):
    """q and k large enough for a softmax that is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, num_tokens, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
    return 4 * q, 4 * k, v


def banded(q, k, v, starts, window, padding=1, scale=SCALE):
    """The code under test, called as the model calls it: piece starts padded with the number of tokens."""
    cu_seqlens = torch.tensor([*starts, *[len(q)] * padding], dtype=torch.int32)
    plan = train_gpt.banded_plan(cu_seqlens, len(q), window, q.dtype)
    return train_gpt.banded_attention(q, k, v, plan, scale)


CASES = [  # tokens, piece starts, window
    (1, [0], 1),
    (1, [0], 7),
    (2, [0, 1], 1),
    (12, [0], 4),  # a multiple of the window
    (13, [0], 4),  # one more: the last block holds one token
    (11, [0], 4),  # one less
    (5, [0, 2], 5),  # as long as the window
    (6, [0, 2], 5),
    (5, [0, 2], 6),  # shorter than the window
    (5, [0], 1000),
    (40, [0], 1),  # a token and the one before it
    (40, [0, 1, 2, 3, 20, 39], 1),
    (40, [0, 4, 8, 12, 36], 4),  # documents that start where blocks do
    (40, [0, 3, 7, 11, 35], 4),  # and just before
    (40, [0, 5, 9, 13, 37], 4),  # and just after
    (50, [0, 1, 30], 7),
    (50, list(range(50)), 7),  # every token its own document
]


@pytest.mark.parametrize("num_tokens, starts, window", CASES)
def test_a_token_sees_itself_and_window_tokens_before_it_in_its_document(num_tokens, starts, window):
    q, k, v = random_qkv(num_tokens)
    expected = full_attention(q, k, v, starts, window, SCALE)
    torch.testing.assert_close(banded(q, k, v, starts, window), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_documents_window_and_padding_give_what_the_full_mask_gives(data):
    num_tokens = data.draw(st.integers(1, 45))
    window = data.draw(st.integers(1, num_tokens + 5))
    starts = sorted({0} | data.draw(st.sets(st.integers(0, num_tokens - 1), max_size=8)))
    padding = data.draw(st.sampled_from([0, 1, 2, 128]))
    q, k, v = random_qkv(num_tokens, seed=data.draw(st.integers(0, 99)))
    expected = full_attention(q, k, v, starts, window, SCALE)
    torch.testing.assert_close(banded(q, k, v, starts, window, padding), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "num_tokens, starts, window", [(23, [0, 1, 9], 4), (24, [0, 13], 6), (9, [0, 4], 20)]
)
def test_gradients_are_those_of_the_full_mask(num_tokens, starts, window):
    weight = torch.randn(num_tokens, HEADS, CHANNELS, generator=torch.Generator().manual_seed(9))
    grads = []
    for attention in (banded, full_attention):
        q, k, v = (x.requires_grad_() for x in random_qkv(num_tokens))
        y = attention(q, k, v, starts, window, scale=SCALE)
        grads.append(torch.autograd.grad((y * weight).sum(), (q, k, v)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 0.12, 1.0])
def test_the_scale_multiplies_the_scores(scale):
    q, k, v = random_qkv(20)
    expected = full_attention(q, k, v, [0, 8], 5, scale)
    torch.testing.assert_close(banded(q, k, v, [0, 8], 5, scale=scale), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [1, 3, 8, 100])
def test_nothing_leaks_from_one_document_into_another(window):
    """Whatever the tokens of other documents are, outputs and gradients of this one do not depend on them."""
    starts, begin, end, num_tokens = [0, 5, 16], 5, 16, 30
    q, k, v = (x.requires_grad_() for x in random_qkv(num_tokens))
    y = banded(q, k, v, starts, window)
    changed = [x.detach() * 50 + 7 for x in (q, k, v)]
    for x, kept in zip(changed, (q, k, v)):
        x[begin:end] = kept.detach()[begin:end]
    torch.testing.assert_close(
        banded(*changed, starts, window)[begin:end], y.detach()[begin:end], rtol=0, atol=1e-12
    )
    for grad in torch.autograd.grad(y[begin:end].square().sum(), (q, k, v)):
        assert grad[begin:end].any()
        grad[begin:end] = 0
        assert not grad.any()


def test_nothing_leaks_from_the_future():
    q, k, v = (x.requires_grad_() for x in random_qkv(30))
    y = banded(q, k, v, [0], 8)
    for position in (0, 7, 8, 15, 29):
        for grad in torch.autograd.grad(y[position].square().sum(), (k, v), retain_graph=True):
            assert not grad[position + 1 :].any()
            assert not grad[: max(position - 8, 0)].any()


def test_a_document_of_one_token_gets_its_own_value():
    q, k, v = random_qkv(10)
    torch.testing.assert_close(banded(q, k, v, [0, 3, 4], 4)[3], v[3])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_lower_precision_keeps_its_dtype_and_stays_near(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in random_qkv(50))
    y = banded(q, k, v, [0, 17, 20], 8)
    assert y.dtype == dtype and y.shape == (50, HEADS, CHANNELS)
    expected = full_attention(*(x.double() for x in (q, k, v)), [0, 17, 20], 8, SCALE)
    assert (y.double() - expected).abs().max() < tolerance


def test_the_plan_holds_two_windows_of_keys_for_each_query_and_not_the_whole_sequence():
    """The memory of the plan grows as T x 2W. One block needs no block before it."""
    cu_seqlens = torch.tensor([0, 100], dtype=torch.int32)
    assert train_gpt.banded_plan(cu_seqlens, 100, 8, torch.float32).shape == (13, 1, 8, 16)
    assert train_gpt.banded_plan(cu_seqlens, 100, 300, torch.float32).shape == (1, 1, 100, 100)


# ---------------------------------------------------------------------------------------------------
# FlashAttention 4: its package needs a GPU, so a stand-in with its signatures takes its place


@pytest.fixture
def flash_attention_4(monkeypatch):
    """The kernels. The package's functions compute by the full mask, the second from what the first gave."""
    given = []

    def weights(q, k, softmax_scale, window_size_left, window_size_right, cu_seqlens_q, cu_seqlens_k,
                max_seqlen_q, max_seqlen_k):
        lengths = cu_seqlens_q.diff()
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        assert window_size_right == 0 and max_seqlen_q == max_seqlen_k >= lengths.max() and q.stride(-1) == 1
        return attention_weights(q, k, cu_seqlens_q[:-1][lengths > 0], window_size_left, softmax_scale)

    def forward(q, k, v, *, return_lse, **arguments):
        assert return_lse
        y = torch.einsum("hij,jhk->ihk", weights(q, k, **arguments), v)
        given[:] = y.clone(), torch.rand(q.size(1), len(q))
        return y.contiguous(), given[1].clone(), None, None, None

    def backward(q, k, v, y, grad, lse, *, dq, dk, dv, **arguments):
        assert torch.equal(y, given[0]) and torch.equal(lse, given[1])
        p = weights(q, k, **arguments)
        grad_p = p * (torch.einsum("ihk,jhk->hij", grad, v) - (grad * y).sum(2).T[:, :, None])
        dq.copy_(arguments["softmax_scale"] * torch.einsum("hij,jhk->ihk", grad_p, k))
        dk.copy_(arguments["softmax_scale"] * torch.einsum("hij,ihk->jhk", grad_p, q))
        dv.copy_(torch.einsum("hij,ihk->jhk", p, grad))
        return dq, dk, dv

    package = ModuleType("flash_attn.cute.interface")
    package._flash_attn_fwd, package._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, package)
    return train_gpt.flash_attention_4_kernels()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("num_tokens, starts, window", [(23, [0, 1, 9], 4), (24, [0, 13], 6), (9, [0], 20)])
def test_flash_attention_4_gives_result_and_gradients_of_the_full_mask(
    num_tokens, starts, window, compile, flash_attention_4
):
    cu_seqlens = torch.tensor([*starts, num_tokens, num_tokens], dtype=torch.int32)

    def attend(q, k, v):
        plan = flash_attention_4["attention_plan"](cu_seqlens, num_tokens, window, q.dtype, 20)
        return 2 * flash_attention_4["attention"](q, k, v, plan, SCALE)

    if compile:
        torch._dynamo.reset()
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    qkv = torch.stack(random_qkv(num_tokens), dim=1).requires_grad_()  # one beside the other, as in the model
    expected = 2 * full_attention(*qkv.unbind(1), starts, window, SCALE)
    y = attend(*qkv.unbind(1))
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (y, expected)]
    torch.testing.assert_close(*grads)


def test_the_operators_of_flash_attention_4_are_sound(flash_attention_4):
    """torch.library's own check: schema, fake implementation, autograd registration."""
    qkv = [x.requires_grad_() for x in random_qkv(9)]
    arguments = (*qkv, torch.tensor([0, 4, 9], dtype=torch.int32), 5, 3, SCALE)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(train_gpt.flash_attention_4, arguments, test_utils=tests)


def test_without_its_package_flash_attention_4_is_no_candidate(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    kernels = train_gpt.flash_attention_4_kernels()
    plan = kernels["attention_plan"](torch.tensor([0, 9], dtype=torch.int32), 9, 4, torch.float32, 9)
    with pytest.raises(ImportError):
        kernels["attention"](*random_qkv(9), plan, SCALE)


@pytest.mark.slow
def test_flash_attention_4_compiles_for_hopper_where_its_package_is():
    pytest.importorskip("flash_attn.cute")
    changes = dict(FLASH_ATTENTION_ARCH="sm_90a", CUTE_DSL_ARCH="sm_90a", FLASH_ATTENTION_NUM_SMS=132)
    done = subprocess.run([sys.executable, ROOT / "tests" / "compile_flash_attention_4.py"], text=True,
                          capture_output=True, env=environment(**changes))
    assert done.returncode == 0 and done.stdout.count("backward:") == 2, done.stderr[-2000:]
