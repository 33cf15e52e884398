"""Banded attention against a full T x T mask in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt

SCALE = 0.12
HEADS, CHANNELS = 2, 4


def full_attention(q, k, v, starts, window, scale):
    """Softmax attention in q's dtype: query i sees key j where 0 <= i - j <= window, in one document."""
    num_tokens = len(q)
    document = [max(number for number, start in enumerate(starts) if start <= t) for t in range(num_tokens)]
    seen = torch.tensor(
        [
            [0 <= i - j <= window and document[i] == document[j] for j in range(num_tokens)]
            for i in range(num_tokens)
        ]
    )
    heads = []
    for h in range(q.size(1)):
        scores = scale * q[:, h] @ k[:, h].T
        heads.append(torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=1) @ v[:, h])
    return torch.stack(heads, dim=1)


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
