"""The model and its attention against plain float64 ones; its layouts, parameters and initial weights."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import fresh_model, relative, stage_of, training_loss
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt

EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds to the mean square if it is not told otherwise

# Documents of 53 tokens: no multiple of the windows, one longer than the long window, one of a single token.
STARTS, NUM_TOKENS, WINDOWS = [0, 7, 8, 30], 53, (12, 4)

# ---- The plain model

def rms(x):
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def turned(x):
    """Rotary: pair j of (T, K) is a complex number that turns by -position x frequency."""
    half = x.size(1) // 2
    turning = half // 2
    frequency = [1024 ** (-j / (turning - 1)) for j in range(turning)] + [0.0] * (half - turning)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor(frequency, dtype=torch.float64)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((z.real, z.imag), dim=1)


def plain_heads(q, k, v, starts, window, scale):
    """Attention token by token, (T, H, K): each sees itself and `window` tokens before, in its document."""
    document, rows = [max(n for n, start in enumerate(starts) if start <= t) for t in range(len(q))], []
    for i in range(len(q)):
        seen = [j for j in range(max(0, i - window), i + 1) if document[j] == document[i]]
        weights = torch.softmax(scale * torch.einsum("jhk,hk->hj", k[seen], q[i]), dim=1)
        rows.append(torch.einsum("hj,jhk->hk", weights, v[seen]))
    return torch.stack(rows)


def plain_attention(x, wq, wk, wv, wo, gate, sigma, ve, starts, window, s, offset):
    """gate: (H, channels) or None; ve: (T, D) or None; offset: whether keys look one token back."""
    size, heads = s.model_dim // s.num_heads, []
    for h in range(s.num_heads):
        own = slice(h * size, (h + 1) * size)
        q, k = (turned(rms((x @ w.T)[:, own])) for w in (wq, wk))
        if offset:  # pairs are a half apart, and the first half of them turns
            standing = torch.arange(size) % (size // 2) >= size // 4
            k = torch.stack([torch.where(standing, k[max(t - 1, 0)], k[t]) for t in range(len(k))])
        v = sigma[0] * (x @ wv.T)[:, own]
        if ve is not None:
            v = v + sigma[1] * ve[:, own]
        y = plain_heads(q[:, None], k[:, None], v[:, None], starts, window, 0.12)[:, 0]
        if gate is not None:
            y = y / (1 + torch.exp(-(x[:, :gate.size(1)] @ gate[h])))[:, None]
        heads.append(y)
    return torch.cat(heads, dim=1) @ wo.T


def plain_ngrams(table, ids, t, s):
    """What the hashes of 2, 3, ... tokens that end at t add to the embedding, (D,)."""
    total = torch.zeros(s.model_dim, dtype=torch.float64)
    for n in range(2, s.ngram_max + 1):
        row = 0
        for back, factor in zip(range(n), (36313, 27191, 51787, 70937, 91493)):
            row ^= factor * (ids[t - back] if t >= back else 0)
        total[:s.ngram_dim] += table[row % s.ngram_rows]
    return total


def plain_loss(p, inputs, targets, starts, windows, s):
    """Summed loss of the model, from float64 parameters that have GPT's names and shapes."""
    words = s.layout.split()
    attn, mlp = iter(p["attn_bank"].split(4)), iter(p["mlp_bank"].split(2))
    gates = iter(p["gate_bank"]) if "gate_bank" in p else None
    x = p["embed"][inputs]
    if s.ngram_rows:
        x = torch.stack([x[t] + plain_ngrams(p["ngrams"], inputs.tolist(), t, s) for t in range(len(x))])
    x = x0 = rms(x)
    pushed = []
    for i, word in enumerate(words):
        skip, lambda_x, lambda_x0, *sigma = p["scalars"][i]
        if i >= len(words) - len(words) // 2:
            x = x + skip * pushed.pop()
        x = lambda_x * x + lambda_x0 * x0
        table = s.value_embeds[i]
        ve = None if table == "." else p["value_embeds"][int(table) * len(p["embed"]) + inputs]
        for before, letter in zip(" " + word, word):
            if letter != "+" and before != "+":  # after a plus, the letter reads what the last one read
                x_in = rms(x)
            if letter == "A":
                gate = next(gates) if gates else None
                window = windows["LS".index(s.window_pattern[i])]
                offset = s.key_offset and s.window_pattern[i] == "L"
                x = x + plain_attention(x_in, *next(attn), gate, sigma, ve, starts, window, s, offset)
            elif letter == "M":
                up, down = next(mlp)
                x = x + (x_in @ up).clamp(min=0) ** 2 @ down.T
        if i < len(words) // 2:
            pushed.append(x)
    logits = 30 / (1 + torch.exp(-(rms(x) @ p["lm_head"].T) / 7.5))
    return (logits.logsumexp(dim=1) - logits[range(len(targets)), targets]).sum()


# ---- Shared

def random_model(s):
    """A model all of whose parameters are random and of a size that tells: gates, head, scalars too."""
    model, generator = train_gpt.GPT(s, train_gpt.Kernels()), torch.Generator().manual_seed(0)
    size = dict(attn_bank=s.model_dim**-0.5, mlp_bank=0.7 * s.model_dim**-0.5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(0.8 + 0.3 * values if name == "scalars" else size.get(name, 1.0) * values)
    return model


def batch_of(s, num_tokens=NUM_TOKENS, starts=STARTS, padding=4):
    """A Batch as a tuple: inputs, targets, padded cu_seqlens, a bound of the documents' lengths."""
    tokens = torch.randint(s.vocab_size, (num_tokens + 1,), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([*starts, *[num_tokens] * padding], dtype=torch.int32)
    return tokens[:-1].int(), tokens[1:], cu_seqlens, num_tokens


def in_double(model):
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


# ---- The whole model

LAYOUTS = [  # windows, settings
    (WINDOWS, {}),
    ((28, 12), {}),
    ((1000, 1), {}),  # longer than the sequence, and the shortest
    (WINDOWS, dict(value_embeds="20.1..0.1..2", window_pattern="SSLLSSSSSLLS")),
    (WINDOWS, dict(num_heads=1, gate_channels=32)),
    (WINDOWS, dict(ngram_rows=40, ngram_dim=20, ngram_max=4, key_offset=True)),
    # of five blocks the one in the middle has no skip; a block of each kind, and letters that share an input
    (WINDOWS, dict(layout="A M AA A+M MA+AM", value_embeds="1.00.", window_pattern="LSSLS")),
    (WINDOWS, dict(layout="A+A+M A+M", value_embeds="..", window_pattern="LS", gate_channels=0)),
    (WINDOWS, dict(layout="MA", value_embeds="0", window_pattern="S")),
]


@pytest.mark.parametrize("windows, changes", LAYOUTS, ids=str)
def test_loss_and_gradients_are_those_of_the_plain_model(small, windows, changes):
    s = replace(small, **changes)
    model, (inputs, targets, cu_seqlens, longest) = random_model(s), batch_of(s)
    loss = training_loss(model, (inputs, targets, cu_seqlens, longest), stage_of(s, *windows))
    loss.backward()
    p = in_double(model)
    expected = plain_loss(p, inputs.long(), targets, STARTS, windows, s)
    expected.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, param in model.named_parameters():
        assert relative(param.grad, p[name].grad) < 2e-4, name


def test_in_validation_the_loss_is_summed_over_chunks_of_8192_tokens(small):
    """Which leave out no token and count none twice."""
    s = replace(small, layout="AM", value_embeds="0", window_pattern="L", val_slice_tokens=16_400)
    model, batch = random_model(s), batch_of(s, num_tokens=16_400)
    with torch.no_grad():
        in_validation = model(*batch, stage_of(s, *WINDOWS)).item()
    assert in_validation == pytest.approx(training_loss(model, batch, stage_of(s, *WINDOWS)).item(), rel=1e-5)


def test_in_bfloat16_activations_are_bfloat16_and_the_loss_is_float32(small):
    s, seen = replace(small, dtype="bfloat16"), {}
    model = random_model(s)

    def spy(name):
        def called(*args):
            seen[name] = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            return getattr(train_gpt.Kernels(), name)(*args)

        return called

    model.kernels = train_gpt.Kernels(attention=spy("attention"), head_loss=spy("head_loss"))
    loss = training_loss(model, batch_of(s), stage_of(s, *WINDOWS))
    assert seen == dict(attention=[torch.bfloat16] * 4, head_loss=[torch.bfloat16, torch.float32])
    inputs, targets, *_ = batch_of(s)
    with torch.no_grad():
        expected = plain_loss(in_double(model), inputs.long(), targets, STARTS, WINDOWS, s)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.03)


def test_norm_and_rotation_are_computed_in_float32_whatever_the_dtype():
    """The only rounding to bfloat16 is that of the result."""
    x = torch.randn(300, 2, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    tables = train_gpt.rotary_cos_sin(300, train_gpt.rotary_frequencies(16))
    narrow, wide = (train_gpt.norm_and_rotate(y, *tables) for y in (x, x.float()))
    assert torch.equal(narrow, wide.bfloat16())


def test_the_blocks_compile_in_one_graph_with_the_same_loss_and_gradients(small):
    """fullgraph=True raises at a graph break; aot_eager traces the backward pass too, without a compiler."""
    later = dict(ngram_rows=40, ngram_dim=20, key_offset=True)
    s = replace(small, layout="AM A+M AM", value_embeds="0.0", window_pattern="LSS", **later)
    model, results = random_model(s), []
    compiled = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend="aot_eager")
    for hidden in (model.hidden, compiled):
        model.hidden = hidden
        loss = training_loss(model, batch_of(s), stage_of(s, *WINDOWS))
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    torch.compiler.reset()
    assert max(relative(b, a.double()) for a, b in zip(*results)) < 1e-5


@pytest.mark.parametrize("val_slice_tokens, longest", [(16, 64), (128, 128)])
def test_the_longest_sequence_has_its_rotary_angles(small, val_slice_tokens, longest):
    s = replace(small, val_slice_tokens=val_slice_tokens)
    assert random_model(s)(*batch_of(s, num_tokens=longest), stage_of(s, *WINDOWS)).isfinite()


# ---- Attention

@st.composite
def packings(draw):
    """Tokens, where documents begin, window, padding of cu_seqlens, scale."""
    num_tokens = draw(st.integers(1, 45))
    starts = sorted({0} | draw(st.sets(st.integers(0, num_tokens - 1), max_size=8)))
    window = draw(st.integers(1, num_tokens + 5))
    padding, scale = draw(st.sampled_from([0, 1, 128])), draw(st.sampled_from([0.0, 0.12, 1.0]))
    return num_tokens, starts, window, padding, scale


@settings(max_examples=40, deadline=None, derandomize=True)
@given(packings())
@example((1, [0], 1, 0, 0.12))
@example((12, [0], 4, 1, 0.12))  # a multiple of the window; then one token more, and one less
@example((13, [0], 4, 1, 0.12))
@example((11, [0], 4, 1, 0.12))
@example((6, [0, 2], 6, 1, 0.12))  # one band, as long as the window
@example((40, [0, 4, 8, 12, 36], 4, 1, 0.12))  # documents that start where bands do
@example((40, [0, 3, 7, 11, 35], 4, 1, 0.12))  # and just before
@example((40, [0, 5, 9, 13, 37], 4, 1, 0.12))  # and just after
@example((30, list(range(30)), 7, 1, 0.12))  # every token its own document
def test_attention_and_its_gradients_are_those_of_the_full_mask(packing):
    num_tokens, starts, window, padding, scale = packing
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v, weight = torch.randn(4, num_tokens, 2, 4, generator=generator, dtype=torch.float64)
    qkv = [x.requires_grad_() for x in (4 * q, 4 * k, v)]  # a softmax that is far from flat
    cu_seqlens = torch.tensor([*starts, *[num_tokens] * padding], dtype=torch.int32)
    mask = train_gpt.banded_mask(cu_seqlens, num_tokens, window, num_tokens, torch.float64)
    found, expected = train_gpt.banded_attention(*qkv, mask, scale), plain_heads(*qkv, starts, window, scale)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad((y * weight).sum(), qkv) for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


def test_the_mask_holds_two_windows_of_keys_for_each_query_and_not_the_whole_sequence():
    """Its memory grows as T x 2W."""
    cu_seqlens = torch.tensor([0, 100], dtype=torch.int32)
    assert train_gpt.banded_mask(cu_seqlens, 100, 8, 100, torch.float32).shape == (13, 1, 8, 16)
    assert train_gpt.banded_mask(cu_seqlens, 100, 300, 100, torch.float32).shape == (1, 1, 100, 200)


# ---- Parameters and initial weights

def test_the_parameters_of_the_race():
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Settings(), train_gpt.Kernels())
    assert {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()} == dict(
        embed=((50_304, 768), torch.bfloat16),
        value_embeds=((3 * 50_304, 768), torch.bfloat16),
        attn_bank=((44, 768, 768), torch.float32),
        gate_bank=((11, 6, 12), torch.float32),
        mlp_bank=((22, 768, 3072), torch.float32),
        lm_head=((50_304, 768), torch.float32),
        scalars=((12, 5), torch.float32),
    )


@pytest.mark.parametrize("model_dim, dtype", [(32, "float32"), (64, "bfloat16")])
def test_initial_weights(small, model_dim, dtype):
    """q, k, v and MLP up: uniform, of standard deviation 0.5 / sqrt(D); tables: standard normal."""
    s = replace(small, vocab_size=500, model_dim=model_dim, dtype=dtype)
    model, std = fresh_model(s), 0.5 / math.sqrt(model_dim)
    attn, mlp = model.attn_bank.view(11, 4, -1), model.mlp_bank.view(11, 2, -1)
    tables = model.value_embeds.chunk(3)
    for values in (attn[:, 0], attn[:, 1], attn[:, 2], mlp[:, 0]):
        assert values.std().item() == pytest.approx(std, rel=0.03)
        assert 0.99 * 3**0.5 * std < values.abs().max().item() <= 1.000001 * 3**0.5 * std
    for table in (model.embed, *tables):
        assert len(table) == 504 and table.dtype == s.torch_dtype
        assert table.float().mean().item() == pytest.approx(0, abs=0.03)
        assert (table.float().abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.01)
    drawn = [*attn[:, :3].flatten(0, 1), *mlp[:, 0], model.embed, *tables]
    assert len({tuple(x.flatten()[:4].tolist()) for x in drawn}) == 33 + 11 + 4, "no two start alike"
    for zero in (attn[:, 3], mlp[:, 1], model.lm_head, model.gate_bank):
        assert not zero.any()
    # skip weight 1, lambdas (1, 0), lambdas of the value and its embedding (0.5, 0.5)
    assert model.scalars.tolist() == [[1.0, 1.0, 0.0, 0.5, 0.5]] * 12


def test_queries_and_keys_can_start_equal_in_the_channels_that_do_not_rotate_but_have_an_offset(small):
    s = replace(small, key_offset=True, equal_qk_start=True)
    size = s.model_dim // s.num_heads
    standing = torch.arange(s.model_dim) % (size // 2) >= size // 4
    with_attention = [s.window_pattern[i] for i, word in enumerate(s.layout.split()) if "A" in word]
    for window, (wq, wk, *_) in zip(with_attention, fresh_model(s).attn_bank.detach().split(4), strict=True):
        assert torch.equal((wq == wk).all(dim=1), standing & (window == "L"))
