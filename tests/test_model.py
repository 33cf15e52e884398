"""The model against a plain float64 one, its layout switch by switch, its parameters and initial weights."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, fresh_model

import train_gpt

EPS = torch.finfo(torch.float32).eps  # what F.rms_norm adds to the mean square if it is not told otherwise

# Documents of 53 tokens: no multiple of the windows, one longer than the long window, one of a single token.
STARTS, NUM_TOKENS, WINDOWS = [0, 7, 8, 30], 53, (12, 4)

# ---------------------------------------------------------------------------------------------------
# A plain model


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


def plain_attention(x, wq, wk, wv, wo, gate, sigma, ve, document, window, num_heads):
    """Token by token and head by head; gate: (H, channels) or None; ve: (T, D) or None."""
    num_tokens, dim = x.shape
    size, heads = dim // num_heads, []
    for h in range(num_heads):
        own = slice(h * size, (h + 1) * size)
        q, k = (turned(rms((x @ w.T)[:, own])) for w in (wq, wk))
        v = sigma[0] * (x @ wv.T)[:, own]
        if ve is not None:
            v = v + sigma[1] * ve[:, own]
        rows = []
        for i in range(num_tokens):
            seen = [j for j in range(max(0, i - window), i + 1) if document[j] == document[i]]
            row = torch.softmax(0.12 * (k[seen] @ q[i]), dim=0) @ v[seen]
            if gate is not None:
                row = row / (1 + torch.exp(-(gate[h] @ x[i, : gate.size(1)])))
            rows.append(row)
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ wo.T


def plain_loss(
    p,
    inputs,
    targets,
    starts,
    windows,
    *,
    layers=12,
    no_attn=(7,),
    no_mlp=(0,),
    tables="012......012",
    long=(0, 4, 7, 11),
    num_heads=2,
):
    """Summed loss of the model, from float64 parameters that have GPT's names and shapes."""
    document = [max(n for n, start in enumerate(starts) if start <= t) for t in range(len(inputs))]
    attn = iter(p["attn_bank"].split(4)) if "attn_bank" in p else None
    gates = iter(p["gate_bank"]) if "gate_bank" in p else None
    mlp = iter(p["mlp_bank"].split(2)) if "mlp_bank" in p else None
    vocab = len(p["embed"])
    x = x0 = rms(p["embed"][inputs])
    pushed = []
    for i in range(layers):
        skip, lambda_x, lambda_x0, *sigma = p["scalars"][i]
        if i >= layers - layers // 2:
            x = x + skip * pushed.pop()
        x = lambda_x * x + lambda_x0 * x0
        if i not in no_attn:
            ve = None if tables[i] == "." else p["value_embeds"][int(tables[i]) * vocab + inputs]
            window = windows[0] if i in long else windows[1]
            x = x + plain_attention(
                rms(x), *next(attn), next(gates) if gates else None, sigma, ve, document, window, num_heads
            )
        if i not in no_mlp:
            up, down = next(mlp)
            x = x + (rms(x) @ up).clamp(min=0) ** 2 @ down.T
        if i < layers // 2:
            pushed.append(x)
    logits = 30 / (1 + torch.exp(-(rms(x) @ p["lm_head"].T) / 7.5))
    return (logits.logsumexp(dim=1) - logits[range(len(targets)), targets]).sum()


# ---------------------------------------------------------------------------------------------------
# Shared


def random_model(s, seed=0):
    """A model all of whose parameters are random and of a size that tells: gates, head, scalars too."""
    model = train_gpt.GPT(s, train_gpt.plain_kernels())
    generator = torch.Generator().manual_seed(seed)
    size = dict(
        embed=1.0,
        value_embeds=1.0,
        lm_head=1.0,
        gate_bank=1.0,
        attn_bank=s.model_dim**-0.5,
        mlp_bank=0.7 * s.model_dim**-0.5,
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=generator)
            p.copy_(0.8 + 0.3 * values if name == "scalars" else size[name] * values)
    return model


def batch_of(s, num_tokens=NUM_TOKENS, starts=STARTS, padding=4, seed=1):
    """inputs, targets, padded cu_seqlens and a bound of the pieces' lengths, with the model's dtypes."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(s.vocab_size, (num_tokens + 1,), generator=generator)
    cu_seqlens = torch.tensor([*starts, *[num_tokens] * padding], dtype=torch.int32)
    return tokens[:-1].int(), tokens[1:], cu_seqlens, num_tokens


def in_double(model):
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def difference(found, expected):
    """Size of the difference of two tensors, relative to the expected one."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def loss_of(model, s, windows=WINDOWS):
    with torch.no_grad():
        return model(*batch_of(s), windows).item()


def with_weights(model, **changed):
    """The model, once the named parameters are changed in place: name=function of the tensor."""
    with torch.no_grad():
        for name, change in changed.items():
            change(getattr(model, name))
    return model


# ---------------------------------------------------------------------------------------------------
# The whole model


@pytest.mark.parametrize("windows", [(12, 4), (28, 12), (1000, 1), (8, 8)])
def test_loss_and_gradients_are_those_of_the_plain_model(small, windows):
    model, (inputs, targets, cu_seqlens, longest) = random_model(small), batch_of(small)
    loss = model(inputs, targets, cu_seqlens, longest, windows)
    loss.backward()
    p = in_double(model)
    expected = plain_loss(p, inputs.long(), targets, STARTS, windows)
    expected.backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, param in model.named_parameters():
        assert difference(param.grad, p[name].grad) < 2e-4, name


LAYOUTS = [  # settings, and the same in the plain model's words
    (dict(skip_mlp=""), dict(no_mlp=())),
    (dict(skip_mlp="0,5,11"), dict(no_mlp=(0, 5, 11))),
    (dict(skip_attn=""), dict(no_attn=())),
    (dict(skip_attn="3,7,8"), dict(no_attn=(3, 7, 8))),
    (dict(value_embeds="............"), dict(tables="............")),
    (dict(value_embeds="20.1..0.1..2"), dict(tables="20.1..0.1..2")),
    (dict(window_pattern="SSLLSSSSSLLS"), dict(long=(2, 3, 9, 10))),
    (dict(gate_channels=0), {}),
    (dict(gate_channels=32), {}),
    (dict(num_heads=1), dict(num_heads=1)),
    (dict(skip_mlp="0,1,2,3,4,5,6,7,8,9,10,11"), dict(no_mlp=range(12))),
    (dict(skip_attn="0,1,2,3,4,5,6,7,8,9,10,11", value_embeds="." * 12), dict(no_attn=range(12))),
    (
        dict(num_layers=5, skip_mlp="0", skip_attn="3", value_embeds="01..0", window_pattern="LSSSL"),
        dict(layers=5, no_attn=(3,), tables="01..0", long=(0, 4)),
    ),  # block 2, in the middle, has no skip
]


@pytest.mark.parametrize("overrides, words", LAYOUTS, ids=[str(overrides) for overrides, _ in LAYOUTS])
def test_every_layout_is_that_of_the_plain_model(small, overrides, words):
    s = replace(small, **overrides)
    model, (inputs, targets, cu_seqlens, longest) = random_model(s), batch_of(s)
    with torch.no_grad():
        loss = model(inputs, targets, cu_seqlens, longest, WINDOWS)
        expected = plain_loss(in_double(model), inputs.long(), targets, STARTS, WINDOWS, **words)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_summed_in_training_and_averaged_in_evaluation(small):
    model = random_model(small)
    training = model(*batch_of(small), WINDOWS)
    evaluation = model.eval()(*batch_of(small), WINDOWS)
    assert evaluation.item() == pytest.approx(training.item() / NUM_TOKENS, rel=1e-6)


def test_a_packed_sequence_costs_what_its_documents_cost_alone(small):
    """Documents do not see one another and, rotation being relative, do not notice where they stand."""
    model, (inputs, targets, _, longest) = random_model(small), batch_of(small)
    starts = torch.tensor([*STARTS, NUM_TOKENS], dtype=torch.int32)
    with torch.no_grad():
        packed = model(inputs, targets, starts, longest, WINDOWS)
        alone = [
            model(inputs[a:b], targets[a:b], torch.tensor([0, b - a], dtype=torch.int32), b - a, WINDOWS)
            for a, b in zip(STARTS, [*STARTS[1:], NUM_TOKENS])
        ]
    assert packed.item() == pytest.approx(sum(alone).item(), rel=1e-5)


@pytest.mark.parametrize("num_parts", [2, 3, 7])
def test_a_microbatch_in_parts_has_the_loss_and_the_gradients_of_the_whole(small, num_parts):
    """Windows cross no piece, positions count only within one, and padding does not count."""
    starts, windows = np.array([0, 30, 31, 70, 100]), (24, 8)
    small = replace(small, batch_tokens=960)
    tokens = np.random.default_rng(0).integers(0, 49, size=121).astype(np.uint16)
    losses, grads = [], []
    for s in (small, replace(small, microbatch_parts=num_parts)):
        model, room, loss = random_model(s), train_gpt.part_tokens(120, s), 0.0
        for part in train_gpt.split_batch(tokens, starts, s.microbatch_parts):
            part_loss = model(*train_gpt.make_batch(*part, 16, 40, CPU, room), windows)
            part_loss.backward()
            loss += part_loss.item()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert max(difference(b, a.double()) for a, b in zip(*grads)) < 1e-4


def test_how_far_the_piece_starts_are_padded_does_not_matter(small):
    model = random_model(small)
    losses = [model(*batch_of(small, padding=padding), WINDOWS).item() for padding in (0, 1, 100)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-7)


def test_in_bfloat16_activations_are_bfloat16_and_the_loss_is_float32(small):
    s, seen = replace(small, dtype="bfloat16"), {}
    model = random_model(s)

    def spy(name):
        kernel = getattr(model.kernels, name)

        def called(*args):
            seen[name] = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
            return kernel(*args)

        return called

    model.kernels = model.kernels._replace(attention=spy("attention"), head_loss=spy("head_loss"))
    loss = model(*batch_of(s), WINDOWS)
    assert seen == dict(attention=[torch.bfloat16] * 4, head_loss=[torch.bfloat16, torch.float32])
    assert loss.dtype == torch.float32
    inputs, targets, *_ = batch_of(s)
    with torch.no_grad():
        expected = plain_loss(in_double(model), inputs.long(), targets, STARTS, WINDOWS)
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)


def test_the_model_compiles_in_one_graph_with_the_same_loss_and_gradients(small):
    """fullgraph=True raises at a graph break; aot_eager traces backward too, and needs no C compiler."""
    model = random_model(small)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")):
        model.zero_grad(set_to_none=True)
        loss = forward(*batch_of(small), WINDOWS)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.compiler.reset()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    for name, grad in results[0][1].items():
        assert difference(results[1][1][name], grad.double()) < 1e-5, name


# ---------------------------------------------------------------------------------------------------
# Norm and rotary


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm_is_the_rms_norm_over_the_last_axis_without_a_gain(size):
    x = size * torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(train_gpt.norm(x).double(), rms(x.double()), rtol=1e-5, atol=1e-6)


def test_half_of_the_pairs_turn_with_frequencies_from_1_to_1_in_1024():
    """Of a head of 128 channels, pairs 0 to 31 turn by (1/1024)^(j/31) a token, and 32 to 63 stand still."""
    cos, sin = train_gpt.rotary_tables(3, 128)
    assert cos.shape == sin.shape == (3, 1, 64) and cos.dtype == sin.dtype == torch.float32
    angle = torch.atan2(sin[1, 0].double(), cos[1, 0].double()).tolist()
    assert angle[0] == pytest.approx(1.0, rel=1e-6)
    assert angle[31] == pytest.approx(1 / 1024, rel=1e-6)
    assert angle[:32] == pytest.approx([1024 ** (-j / 31) for j in range(32)], rel=1e-5)
    assert torch.equal(cos[:, :, 32:], torch.ones(3, 1, 32)) and not sin[:, :, 32:].any()
    assert torch.equal(cos[0], torch.ones(1, 64)) and not sin[0].any()  # position 0 does not turn


def test_rotation_multiplies_a_plus_ib_by_a_unit_complex_number():
    """(a cos + b sin, -a sin + b cos), with a and b the halves of the head."""
    x = torch.randn(200, 3, 128, generator=torch.Generator().manual_seed(0))
    rotated = train_gpt.rotate(x, *train_gpt.rotary_tables(200, 128))
    for h in range(3):
        torch.testing.assert_close(rotated[:, h].double(), turned(x[:, h].double()), rtol=0, atol=1e-4)
    standing = [*range(32, 64), *range(96, 128)]
    assert torch.equal(rotated[:, :, standing], x[:, :, standing])


def test_rotation_is_computed_in_float32_whatever_the_dtype():
    """The only rounding to bfloat16 is that of the result."""
    x = torch.randn(300, 2, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    tables = train_gpt.rotary_tables(300, 16)
    rotated = train_gpt.rotate(x, *tables)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, train_gpt.rotate(x.float(), *tables).bfloat16())


def test_the_longest_sequence_of_training_or_validation_has_its_rotary_angles(small):
    for overrides, longest in ((dict(val_slice_tokens=16), 64), (dict(val_slice_tokens=128), 128)):
        s = replace(small, **overrides)
        model = random_model(s)
        assert len(model.cos) == len(model.sin) == longest
        assert model(*batch_of(s, num_tokens=longest), WINDOWS).isfinite()


# ---------------------------------------------------------------------------------------------------
# The layout: each switch does what it says, and nothing else


def test_the_default_layout_is_that_of_the_race():
    """No MLP in block 0, no attention in block 7, tables 012 at both ends, long windows at 0, 4, 7, 11."""
    blocks = train_gpt.Settings().blocks
    assert [b.attn for b in blocks] == [0, 1, 2, 3, 4, 5, 6, None, 7, 8, 9, 10]
    assert [b.mlp for b in blocks] == [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [b.table for b in blocks] == [0, 1, 2] + [None] * 6 + [0, 1, 2]
    assert [i for i, b in enumerate(blocks) if b.long] == [0, 4, 7, 11]


@pytest.mark.parametrize("block", [1, 6, 11])
def test_to_skip_an_mlp_is_to_have_one_whose_down_matrix_is_zero(small, block):
    full = random_model(small)
    before = loss_of(full, small)
    s = replace(small, skip_mlp=f"0,{block}")
    row = 2 * (block - 1)  # block 0 has none
    skipping = random_model(s)
    for name, p in full.named_parameters():
        without = torch.cat((p.data[:row], p.data[row + 2 :])) if name == "mlp_bank" else p.data
        with_weights(skipping, **{name: lambda q, without=without: q.copy_(without)})
    zeroed = loss_of(with_weights(full, mlp_bank=lambda p: p[row + 1].zero_()), small)
    assert loss_of(skipping, s) == pytest.approx(zeroed, rel=1e-6)
    assert zeroed != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("block", [3, 5, 8])
def test_to_skip_attention_is_to_have_one_whose_output_projection_is_zero(small, block):
    full = random_model(small)
    before = loss_of(full, small)
    s = replace(small, skip_attn=f"7,{block}")
    place = block - (block > 7)  # block 7 has none
    skipping = random_model(s)
    rows = dict(attn_bank=4, gate_bank=1)
    for name, p in full.named_parameters():
        n = rows.get(name, 0)
        without = torch.cat((p.data[: n * place], p.data[n * (place + 1) :]))
        with_weights(skipping, **{name: lambda q, without=without: q.copy_(without)})
    zeroed = loss_of(with_weights(full, attn_bank=lambda p: p[4 * place + 3].zero_()), small)
    assert loss_of(skipping, s) == pytest.approx(zeroed, rel=1e-6)
    assert zeroed != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("block", [0, 2, 10])
def test_a_block_without_a_value_embedding_is_one_that_weighs_it_by_zero(small, block):
    full = random_model(small)
    before = loss_of(full, small)
    pattern = "".join("." if i == block else table for i, table in enumerate("012......012"))
    s = replace(small, value_embeds=pattern)
    without = loss_of(random_model(s), s)
    zeroed = loss_of(with_weights(full, scalars=lambda p: p[block, 4].zero_()), small)
    assert without == pytest.approx(zeroed, rel=1e-6)
    assert without != pytest.approx(before, rel=1e-3)


def test_attention_without_gates_is_twice_that_with_gates_of_zero(small):
    """sigmoid(0) is a half."""
    gated, s = random_model(small), replace(small, gate_channels=0)
    before = loss_of(gated, small)
    gateless = random_model(s)
    for name in dict(gateless.named_parameters()):
        with_weights(gateless, **{name: lambda q, name=name: q.copy_(getattr(gated, name))})
    zeroed = with_weights(gated, gate_bank=torch.zero_, attn_bank=lambda p: p[3::4].mul_(2))
    assert loss_of(gateless, s) == pytest.approx(loss_of(zeroed, small), rel=1e-6)
    assert loss_of(gateless, s) != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("block", range(12))
def test_a_letter_of_the_window_pattern_counts_where_there_is_attention_and_two_windows(small, block):
    pattern = "LSSSLSSLSSSL"
    other = pattern[:block] + {"L": "S", "S": "L"}[pattern[block]] + pattern[block + 1 :]
    s, model = replace(small, window_pattern=other), random_model(small)
    changed = random_model(s)
    assert loss_of(changed, s, (8, 8)) == loss_of(model, small, (8, 8))
    same = loss_of(changed, s, (12, 2)) == pytest.approx(loss_of(model, small, (12, 2)), rel=1e-6)
    assert same == (block == 7)


# ---------------------------------------------------------------------------------------------------
# Parameters


def test_the_parameters_of_the_race_have_their_shapes_and_dtypes():
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Settings(), train_gpt.plain_kernels())
    found = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    assert found == dict(
        embed=((50_304, 768), torch.bfloat16),
        value_embeds=((3 * 50_304, 768), torch.bfloat16),
        attn_bank=((44, 768, 768), torch.float32),
        gate_bank=((11, 6, 12), torch.float32),
        mlp_bank=((22, 768, 3072), torch.float32),
        lm_head=((50_304, 768), torch.float32),
        scalars=((12, 5), torch.float32),
    )
    assert sum(p.numel() for p in model.parameters()) == 271_024_980


def test_a_layout_without_a_part_has_no_parameter_for_it(small):
    s = replace(small, skip_attn=",".join(map(str, range(12))), value_embeds="." * 12)
    names = {name for name, _ in random_model(s).named_parameters()}
    assert names == {"embed", "mlp_bank", "lm_head", "scalars"}


def test_the_gradient_reaches_every_matrix_gate_table_and_scalar_that_is_used(small):
    model, (inputs, targets, cu_seqlens, longest) = random_model(small), batch_of(small)
    model(inputs, targets, cu_seqlens, longest, WINDOWS).backward()
    for bank in (model.attn_bank, model.gate_bank, model.mlp_bank):
        assert (bank.grad.abs().amax(dim=(1, 2)) > 1e-4).all()
        assert (bank.grad.flatten(1) != 0).float().mean() > 0.9
    assert (model.lm_head.grad != 0).any(dim=1).all()
    read = torch.zeros(small.padded_vocab, dtype=torch.bool).index_fill(0, inputs.long(), True)
    assert torch.equal((model.embed.grad != 0).any(dim=1), read)
    assert torch.equal((model.value_embeds.grad != 0).any(dim=1), read.repeat(3))
    used = torch.tensor([[i >= 6, True, True, i != 7, i in (0, 1, 2, 9, 10, 11)] for i in range(12)])
    assert torch.equal(model.scalars.grad != 0, used)


# ---------------------------------------------------------------------------------------------------
# Initial weights


@pytest.mark.parametrize("model_dim", [32, 64])
def test_qkv_and_mlp_up_start_uniform_with_standard_deviation_half_over_root_of_the_width(small, model_dim):
    model = fresh_model(replace(small, model_dim=model_dim))
    std = 0.5 / math.sqrt(model_dim)
    qkv = model.attn_bank.detach().unflatten(0, (11, 4))[:, :3]
    up = model.mlp_bank.detach().unflatten(0, (11, 2))[:, 0]
    for values in (qkv[:, 0], qkv[:, 1], qkv[:, 2], up):
        assert values.std().item() == pytest.approx(std, rel=0.03)
        assert values.mean().item() == pytest.approx(0, abs=0.05 * std)
        assert 0.99 * 3**0.5 * std < values.abs().max().item() <= 1.000001 * 3**0.5 * std
        quarters = torch.histc(values, 4, -(3**0.5) * std, 3**0.5 * std) / values.numel()
        assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_output_projections_mlp_down_head_and_gates_start_at_zero(small):
    model = fresh_model(small)
    for zero in (model.attn_bank[3::4], model.mlp_bank[1::2], model.lm_head, model.gate_bank):
        assert zero.numel() and not zero.any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_and_value_embeddings_start_standard_normal(small, dtype):
    model = fresh_model(replace(small, vocab_size=500, dtype=dtype))
    for table in (model.embed, *model.value_embeds.split(504)):
        assert len(table) == 504 and table.dtype == getattr(torch, dtype)
        values = table.detach().float()
        assert values.mean().item() == pytest.approx(0, abs=0.03)
        assert values.std().item() == pytest.approx(1, abs=0.03)
        assert (values.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.01)


def test_scalars_start_at_their_neutral_values(small):
    """Skip 1, lambda (1, 0), sigma (0.5, 0.5), in every block."""
    assert fresh_model(small).scalars.tolist() == [[1.0, 1.0, 0.0, 0.5, 0.5]] * 12


def test_no_two_matrices_or_tables_start_alike(small):
    model = fresh_model(small)
    drawn = [
        *model.attn_bank.unflatten(0, (11, 4))[:, :3].flatten(0, 1),
        *model.mlp_bank[::2],
        model.embed,
        *model.value_embeds.chunk(3),
    ]
    firsts = {tuple(matrix.flatten()[:4].tolist()) for matrix in drawn}
    assert len(firsts) == len(drawn) == 33 + 11 + 4


def test_a_fresh_model_is_indifferent_between_all_ids_of_the_padded_vocabulary(small):
    loss = fresh_model(small).eval()(*batch_of(small), WINDOWS)
    assert loss.item() == pytest.approx(math.log(small.padded_vocab), rel=1e-6)


def test_the_seed_alone_decides_the_initial_weights(small):
    torch.manual_seed(1)
    first = fresh_model(small, seed=5)
    torch.manual_seed(2)
    second, other = fresh_model(small, seed=5), fresh_model(small, seed=6)
    for name, p in first.named_parameters():
        assert torch.equal(p, getattr(second, name)), name
        drawn = name in ("embed", "value_embeds", "attn_bank", "mlp_bank")
        assert torch.equal(p, getattr(other, name)) != drawn, name


def test_a_parameter_without_initial_weights_is_an_error(small):
    model = train_gpt.GPT(small, train_gpt.plain_kernels())
    model.register_parameter("novelty", torch.nn.Parameter(torch.empty(3)))
    with pytest.raises(KeyError, match="novelty"):
        train_gpt.init_weights(model, 0)
