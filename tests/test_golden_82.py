"""The same as the published record 82: its figures on canonical weights and tokens, by train_gpt.py.

golden/record82.json has what the published script of record 82 (modded-nanogpt, 81.2 s) gives on a CPU in
float32, without compilation and float8, on formulas for weights and tokens. main is 192 wide, micro 96.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_golden import canonical

import train_gpt

GOLDEN = json.loads((ROOT / "tests/golden/record82.json").read_text(encoding="utf-8"))
ALONE = GOLDEN["alone"]
RACE = train_gpt.read_settings({"PRESET": "frontier"})[0]
SIZES = dict(
    main=dict(model_dim=192, vocab_size=5001, vocab_multiple=1024, tokens=1024, document=311),
    micro=dict(model_dim=96, vocab_size=100, vocab_multiple=128, tokens=256, document=150),
)


def canonical2(name, scale, *shape):
    """scale sin(0.7390851 i + 0.0123457 i^2 + k): of full rank."""
    k = 7919 * sum(map(ord, name)) % 100_003
    i = np.arange(np.prod(shape), dtype=np.float64)
    values = scale * np.sin(0.7390851 * i + 0.0123457 * i**2 + k)
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def close(found, figures, rel=1e-5):
    """Whether a tensor has this norm and these first five numbers."""
    first5 = torch.tensor(figures["first5"])
    assert found.norm().item() == pytest.approx(figures["norm"], rel=rel)
    size = found.norm().item() / found.numel() ** 0.5
    torch.testing.assert_close(found.flatten()[:5], first5[:found.numel()], rtol=rel, atol=rel * size)


# ---- Rules

SHAPES = [(kind, shape) for kind in ("canon", "canon2") for shape in ((64, 192), (192, 64), (192, 192))]
CANON = dict(canon=canonical, canon2=canonical2)


@pytest.mark.parametrize("kind, shape", SHAPES)
def test_polar_express_alone(kind, shape):
    G = CANON[kind]("pe", 1.0, *shape)
    X = train_gpt.newton_schulz(G[None], torch.float32, method=train_gpt.POLAR_EXPRESS)[0]
    close(X, ALONE["polar_express"][f"{kind}_{shape[0]}x{shape[1]}"], rel=1e-4)


def frontier_rule(name):
    rows = train_gpt.FrontierGPT.declare_parameters(replace(RACE, dtype="float32"), train_gpt.Kernels())
    return rows[name].rule


@pytest.mark.parametrize("kind, shape", SHAPES)
def test_two_steps_of_normuon_alone(kind, shape):
    make = CANON[kind]
    rule = frontier_rule("vo_bank")
    W = make("nm_w", 0.05, *shape)[None].clone()
    start = W.clone()
    state = rule.init_state(W)
    for number, figures in enumerate(ALONE["normuon_two_steps"][f"{kind}_{shape[0]}x{shape[1]}"]):
        grad = make(f"nm_g{number + 1}", 0.01, *shape)[None].clone()
        before = W.clone()
        rule.update(W, grad, state, train_gpt.Step(number, None, 1.0, figures["momentum"]))
        close(state["second_moment"], figures["second_moment"], rel=1e-4)
        close(W, figures["weight"], rel=1e-4)
        assert (W - start).norm().item() == pytest.approx(figures["moved"], rel=1e-4)
        rate = rule.lr * max(1, shape[0] / shape[1]) ** 0.5
        update = (before - W) / rate  # and the decay, where both have one sign
        alone = update - rule.lr * rule.cautious_decay * before * (update * before > 0)
        assert alone.norm().item() == pytest.approx(figures["update"]["norm"], rel=1e-3)


@pytest.mark.parametrize("kind, name", [("head", "lm_head"), ("tables", "value_embeds"),
                                        ("scalars", "qkv_factors"), ("factors", "post_factors")])
def test_three_steps_of_cautious_adam_alone(kind, name):
    rule = frontier_rule(name)
    figures = ALONE["cautious_adam"][kind]
    assert list(rule.betas) == figures["betas"]
    w = canonical("adam_p", 0.5, 6, 12).clone()
    state = rule.init_state(w)
    for n, expected in enumerate(figures["after_steps"]):
        grad = canonical(f"adam_g{n + 1}", 0.1, 6, 12).clone()
        rule.update(w, grad, state, train_gpt.Step(2 * n + 1, None, 1.0, 0.95))  # on odd steps
        close(w, expected)


# ---- The network


def own_order(head_dim):
    """Of a head's channels: the published pairs are neighbours, ours are half a head apart."""
    quarter = head_dim // 4
    first, second = range(0, 2 * quarter, 2), range(1, 2 * quarter, 2)
    return [*first, *range(2 * quarter, 3 * quarter), *second, *range(3 * quarter, head_dim)]


def published_loss(x, weight, targets, token_weights):
    """multi_token_loss with the published gradient, which in the last rows is not its derivative: there, too,
    the softmax's part is multiplied by the sum of all weights."""
    loss, next_loss = train_gpt.multi_token_loss(x, weight, targets, token_weights)
    logits = train_gpt.lifted_logits(x, weight)
    with_that_gradient = token_weights.sum() * logits.logsumexp(-1).sum()
    for ahead, w in enumerate(token_weights):
        chosen = logits[:len(x) - ahead].gather(1, targets[ahead:, None])
        with_that_gradient = with_that_gradient - w * chosen.sum()
    return loss.detach() + with_that_gradient - with_that_gradient.detach(), next_loss


class Canonical:
    """The network with canonical weights, and its parameters by the names of the figures."""

    def __init__(self, size, kernels=train_gpt.FrontierGPT.plain_kernels):
        self.size = SimpleNamespace(**SIZES[size])
        sizes = {name: x for name, x in SIZES[size].items() if name not in ("tokens", "document")}
        self.matrices = canonical2 if size == "micro" else canonical
        self.s = replace(RACE, **sizes, mlp_dim=4 * sizes["model_dim"], bos_id=sizes["vocab_size"] - 1,
                         dtype="float32", batch_tokens=(self.size.tokens,), microbatches=1,
                         val_slice_tokens=2 * self.size.tokens)
        self.model = train_gpt.FrontierGPT(self.s, kernels)
        train_gpt.init_weights(self.model, 0)
        with torch.no_grad():
            for name, x in self.parts(lambda p: p.data).items():
                self.fill(name, x)

    def parts(self, of):
        """name -> of(parameter), or of what belongs to the name."""
        model, s = self.model, self.s
        found = dict(head=of(model.lm_head), embed=of(model.embed), bigram=of(model.bigram_embed))
        found |= {f"ve{k}": table for k, table in enumerate(of(model.value_embeds).chunk(5))}
        attentions = [i for i in range(11) if i != 6]
        for k, i in enumerate(attentions):
            pairs = of(model.qk_bank).unflatten(0, (-1, s.num_heads // 2))
            found |= {f"q{i}": pairs[2 * k].flatten(0, 1), f"key{i}": pairs[2 * k + 1].flatten(0, 1)}
            found |= {f"value{i}": of(model.vo_bank)[2 * k], f"out{i}": of(model.vo_bank)[2 * k + 1]}
            found[f"gate{i}"] = of(model.attn_gates)[k]
        for i in range(11):
            found |= {f"up{i}": of(model.mlp_bank)[2 * i], f"down{i}": of(model.mlp_bank)[2 * i + 1]}
        for k, i in enumerate((1, 3, 4, 7, 8, 10)):
            found[f"xsa_strength{i}"] = of(model.own_value_strengths)[k]
        found |= {f"vegate{k}": of(model.value_gates)[k] for k in range(4)}
        for name in ("smear_gate", "skip_gate", "smear_factor", "skip_factor"):
            found[name] = of(getattr(model, name))
        found |= dict(qkv_factor=of(model.qkv_factors), o_factor=of(model.out_factors))
        for k, half in enumerate(("attn", "mlp")):
            found[f"resid_{half}"] = of(model.resid_factors)[:, k]
            found[f"post_{half}"] = of(model.post_factors)[:, k]
        found |= dict(x0_factor=of(model.x0_factors), bigram_factor=of(model.bigram_factors))
        for k, rows in enumerate((slice(0, 14), slice(14, 19))):
            found[f"mudd_in{k}"] = of(model.mudd_in)[k]
            found[f"mudd_out{k}"] = of(model.mudd_out)[rows]
            found[f"mudd_bias{k}"] = of(model.mudd_bias)[rows]
        return found

    def fill(self, name, x):
        kind = name.rstrip("0123456789")
        scales = dict(head=0.1, embed=0.1, ve=0.5, bigram=0.5, gate=0.3, vegate=0.3, smear_gate=2.0,
                      skip_gate=0.3, smear_factor=0.4, skip_factor=0.4, xsa_strength=0.5, mudd_out=0.3,
                      mudd_bias=0.5, q=0.05, key=0.05, value=0.05, out=0.05, up=0.05, down=0.05)
        scale = scales.get(kind, 0.1)
        if kind in ("q", "key"):
            heads = self.matrices(name, scale, *x.shape).unflatten(0, (self.s.num_heads, -1))
            x.copy_(heads[:, own_order(heads.size(1))].flatten(0, 1))
        elif kind == "down":
            x.copy_(self.matrices(name, scale, x.size(1), x.size(0)).T)
        elif kind in ("value", "out", "up"):
            x.copy_(self.matrices(name, scale, *x.shape))
        elif name in ("qkv_factor", "o_factor"):  # one for each attention
            x += canonical(name, scale, 11)[[i for i in range(11) if i != 6]]
        elif kind in ("resid_attn", "resid_mlp", "post_attn", "post_mlp", "x0_factor", "bigram_factor"):
            x += canonical(name, scale, 11)[:10]  # those of block 10 are MUDD's
        elif kind == "embed":
            x.copy_(canonical("head", scale, *x.shape))
        else:  # what starts at a value is there already
            start = x.clone() if kind in ("skip_factor", "mudd_bias") else 0
            x.copy_(start + canonical(name, scale, *x.shape))

    def norms(self, of):
        """Of the entries that are used."""
        found = {}
        for name, x in self.parts(of).items():
            if name in ("resid_attn", "post_attn", "x0_factor", "bigram_factor"):
                x = x[[i for i in range(10) if i != 6]]
            found[name] = x.norm().item()
        return found

    def batch(self, seed, long=False):
        num_tokens = self.size.tokens * (2 if long else 1)
        i = np.arange(num_tokens + 1)
        ids = (31 * i**2 + 17 * i * seed + 7 * seed) % 997 * (1 + i // 97 % 5) % (self.s.vocab_size - 1)
        ids[::self.size.document] = self.s.vocab_size - 1
        starts = i[:1] if long else i[:num_tokens:self.size.document]
        return train_gpt.make_batch(ids.astype(np.uint16), starts, 128, num_tokens)

    def step(self, number, windows, yarn_windows, token_weights=(1.0, 0.0, 0.0)):
        """Step `number` of the race with these windows; enters its stage."""
        short, long = windows
        step = SCHEDULE[number]
        stage = step.stage._replace(batch_tokens=self.size.tokens, short_window=short, long_window=long,
                                    yarn_windows=yarn_windows)
        self.model.enter_stage(stage)
        return step._replace(stage=stage, token_weights=token_weights)

    def of_pass(self, name, figures):
        """The batch and the step of a pass of the figures."""
        yarn = [384] if name.endswith("stage1") else [384, 896, 1408]
        if name.endswith("final"):
            yarn.append(1664)
        weights = (*figures.get("multi_token_weights", [1.0]), 0.0, 0.0)[:3]
        return (self.batch(1, "long" in name),
                self.step(0, figures["windows_tokens"], tuple(yarn), tuple(weights)))


SCHEDULE = train_gpt.make_schedule(RACE)
PUBLISHED = train_gpt.Kernels(head_loss=published_loss)


def check_pass(run, name, figures, rel):
    """Loss and norms of gradients; what Adam sees while tied is the sum of two gradients."""
    batch, step = run.of_pass(name, figures)
    if "validation" in name:
        with torch.no_grad():
            loss = run.model(*batch, step.stage)
        assert loss.item() == pytest.approx(figures["loss_sum"], rel=1e-6)
        return
    run.model.zero_grad()
    loss, next_loss = run.model.training_loss(batch, step)
    loss.backward()
    assert loss.item() == pytest.approx(figures["loss_sum"], rel=1e-6)
    with torch.no_grad():
        assert next_loss.item() == pytest.approx(run.model(*batch, step.stage).item(), rel=1e-6)
    found = run.norms(lambda p: p.grad)
    found["head_plus_embed"] = (run.model.lm_head.grad + run.model.embed.grad).norm().item()
    assert found == pytest.approx(figures["grad_norm"], rel=rel)


MICRO_PASSES = [name for name in GOLDEN["micro"] if "step" not in name]


@pytest.mark.parametrize("name", MICRO_PASSES)
def test_micro_passes_are_those_of_record_82(name):
    check_pass(Canonical("micro", PUBLISHED), name, GOLDEN["micro"][name], rel=1e-4)


@pytest.mark.parametrize("name", ["train_stage1", "long_document_stage1"])
def test_micro_passes_with_the_true_derivative_are_those_of_record_82(name):
    check_pass(Canonical("micro"), name, GOLDEN["micro_autograd"][name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("section, name", [*(("main", name) for name in GOLDEN["main"]),
                                           *(("main_autograd", name) for name in GOLDEN["main_autograd"])])
def test_main_passes_are_those_of_record_82(section, name):
    published = section == "main" and name == "train_stage1"
    run = Canonical("main", PUBLISHED if published else train_gpt.FrontierGPT.plain_kernels)
    check_pass(run, name, GOLDEN[section][name], rel=5e-4)


# ---- Steps


def ten_steps(run, tied_to=917):
    """Steps 0 to 9 on seeds 1 to 10; after each, yields the loss and the optimizer."""
    optimizer = train_gpt.make_optimizer(run.model, 0, 1)
    for number in range(10):
        step = run.step(number, (128, 384), (384,), SCHEDULE[number].token_weights)
        step = step._replace(tied=number <= tied_to)
        batch = run.batch(number + 1)
        with torch.no_grad():
            loss = run.model.training_loss(batch, step)[0].item()
        train_gpt.train_step(run.model, optimizer, iter([batch]), step)
        yield number, loss, optimizer


def check_ten_steps(run, figures):
    before = {name: x.clone() for name, x in run.parts(lambda p: p.data).items()}
    for number, loss, _ in ten_steps(run):
        assert loss == pytest.approx(figures["steps"][number]["loss_sum"], rel=3e-5), number
        rels = {0: (1e-6, 1e-4), 1: (1e-4, 2e-4), 9: (5e-4, 2e-3)}
        if number not in rels:
            continue
        norms_rel, moved_rel = rels[number]
        if f"param_norm_after_{number + 1}" in figures:
            found = run.norms(lambda p: p.data)
            assert found == pytest.approx(figures[f"param_norm_after_{number + 1}"], rel=norms_rel)
        after = run.parts(lambda p: p.data)
        moved = {name: (x - before[name]).norm().item() for name, x in after.items()}
        for name, norm in figures[f"moved_norm_after_{number + 1}"].items():
            assert moved[name] == pytest.approx(norm, rel=moved_rel), (number, name)


def test_ten_steps_are_those_of_record_82():
    check_ten_steps(Canonical("micro", PUBLISHED), GOLDEN["micro"]["ten_steps"])


def test_ten_steps_with_the_true_derivative_are_those_of_record_82():
    check_ten_steps(Canonical("micro"), GOLDEN["micro_autograd"]["ten_steps"])


def test_untying_moved_to_step_5_is_that_of_record_82():
    """Step 5 is still tied. Head and embedding part at step 7, with the state that they shared."""
    run = Canonical("micro", PUBLISHED)
    for number, loss, optimizer in ten_steps(run, tied_to=5):
        figures = GOLDEN["micro"]["untie_at_step_5"][number]
        assert loss == pytest.approx(figures["loss_sum"], rel=3e-5)
        head, embed = run.model.lm_head.data, run.model.embed.data
        difference = (head - embed).norm().item()
        assert difference == pytest.approx(figures["difference_norm"], rel=1e-3)
        assert (difference == 0) == (number < 7)
        for name, x in (("head", head), ("embed", embed)):
            assert x.norm().item() == pytest.approx(figures[f"{name}_norm"], rel=3e-5)
            first5 = torch.tensor(figures[f"{name}_first5"])
            torch.testing.assert_close(x[5, :5], first5, rtol=1e-3, atol=1e-5)
        for name, own in (("head", "lm_head"), ("embed", "embed")):
            expected = figures.get(f"adam_state_{name}")
            if expected and number >= 5:
                sp, = (sp for sp in optimizer.sharded_params if sp.name == own)
                for key in ("exp_avg", "exp_avg_sq"):
                    assert sp.state[key].norm().item() == pytest.approx(expected[key], rel=1e-4)
                assert expected["step"] == (number + 1) // sp.row.rule.every


# ---- The schedule


def test_the_schedule_is_that_of_record_82():
    golden = GOLDEN["schedules"]
    stages = train_gpt.make_stages(RACE)
    starts = [stage.first_step for stage in stages]
    assert starts == [first for first, _ in golden["boundaries"]] + [golden["total_steps"]]
    assert sum(step.stage.batch_tokens for step in SCHEDULE[:-1]) == golden["tokens_in_all"]
    adam = frontier_rule("lm_head")
    assert len(range(adam.every - 1, golden["total_steps"], adam.every)) == golden["adam_steps_in_all"]
    assert [step.number for step in SCHEDULE if step.tied][-1] == golden["split_step"]
    for row in golden["rows"]:
        step = SCHEDULE[row["step"]]
        stage = step.stage
        if step is not SCHEDULE[-1]:
            assert [stage.short_window, stage.long_window] == row["windows_tokens"]
            assert row["adam_steps"] == (step.number % 2 == 1)
        assert (stage.batch_tokens, stage.max_seq_len) == (row["batch_tokens"], row["document_cut"])
        figures = step.lr_factor, step.momentum
        assert figures == pytest.approx((row["rate_factor"], row["momentum"]), rel=1e-8)
        weights = row["multi_token_weights"]
        assert step.token_weights == pytest.approx((*weights, 0.0, 0.0)[:3], abs=1e-7)
        assert step.tied or not row["tied_in_forward"]
        scale = train_gpt.yarn_attn_scale(RACE.attn_scale, stage.yarn_windows)
        assert scale == pytest.approx(row["attention_scale"], rel=1e-8)
        found = train_gpt.yarn(train_gpt.rotary_frequencies(32), stage.yarn_windows)
        assert found.tolist() == pytest.approx(row["frequencies_head32_all8"], rel=2e-6)
    last = golden["final_validation"]
    assert [stages[-1].short_window, stages[-1].long_window] == last["windows_tokens"]
    for stage, name in zip(stages, ("start", "from_458", "from_917", "from_1375")):
        found = train_gpt.yarn(train_gpt.rotary_frequencies(128), stage.yarn_windows)
        assert found.tolist() == pytest.approx(golden["frequencies_head128_all32"][name], rel=2e-6)
    found = train_gpt.yarn(train_gpt.rotary_frequencies(128), stages[-1].yarn_windows)
    assert found.tolist() == pytest.approx(last["frequencies_head128_all32"], rel=2e-6)


# ---- Parts of the network alone


@pytest.mark.parametrize("form, block, window", [
    ("plain", 1, 5), ("xsa", 1, 5), ("key_offset", 3, 12), ("key_offset_and_xsa", 3, 12), ("paired", 0, 7)])
def test_attention_alone(form, block, window):
    """32 tokens, documents from 0 and 20. Without exclusive attention: strengths of 0."""
    s = replace(RACE, **{name: x for name, x in SIZES["main"].items() if name not in ("tokens", "document")},
                bos_id=5000, dtype="float32", batch_tokens=(32,), microbatches=1, val_slice_tokens=32)
    model = train_gpt.FrontierGPT(s, train_gpt.Kernels())
    matrices = {name: canonical2(f"att_{name}", 0.07, 192, 192) for name in ("q", "key", "value", "out")}
    order = own_order(32)
    for name in ("q", "key"):
        matrices[name] = matrices[name].unflatten(0, (6, 32))[:, order].flatten(0, 1)
    qkv = torch.cat([matrices[name] for name in ("q", "key", "value")])
    gate = canonical2("att_gate", 0.3, 6, 12)
    weights = train_gpt.BlockWeights(None, None, 0.6 * qkv, 0.9 * matrices["out"], gate)
    model.own_value_strengths.data[:] = canonical2("att_xsa", 0.5, 6) if "xsa" in form else 0.0
    a = train_gpt.norm(canonical2("att_x", 1.0, 32, 192))
    stage = train_gpt.make_stages(s)[0]._replace(long_window=window, short_window=window)
    attend = model.prepare_attention(32, torch.tensor([0, 20, 32], dtype=torch.int32), 32, stage)
    seen = {}

    def spy(kind, q, k, v):
        y = attend(kind, q, k, v)
        undo = torch.tensor(order).argsort()  # to the published order of channels
        seen.update(q=q[..., undo], k=k[..., undo], v=v, y=y)
        return y

    out = model.attention(block, a, canonical2("att_aux", 0.5, 32, 192), weights, spy)
    figures = ALONE[f"attention_{form}"]
    for name in ("q", "k", "v", "y"):
        close(seen[name], figures[name])
    close(out, figures["out"])
    norms = out[:8].norm(dim=1).tolist()
    assert norms == pytest.approx(figures["out_per_token_norm_first8"], rel=1e-5)


def test_exclusive_attention_alone():
    v = canonical2("xsa_v", 0.5, 16, 6, 32).clone()
    v[3, 2] = 0
    y = canonical2("xsa_y", 1.0, 16, 6, 32)
    close(train_gpt.leave_out_own_value(y, v, canonical2("xsa_a", 1.0, 6)), ALONE["xsa"])


def test_smear_skip_gate_and_value_gates_alone():
    e = canonical2("smear_x", 0.01, 16, 192)
    close(train_gpt.smear(e, canonical2("smear_g", 10.0, 1, 12), torch.tensor([0.3])), ALONE["smear"])
    x0 = train_gpt.norm(canonical2("skip_x", 1.0, 16, 192))
    skip = train_gpt.skip_share(x0, canonical2("skip_g", 0.5, 1, 12), torch.tensor([-1.3]))
    close(skip, ALONE["skip_gate"])
    a = train_gpt.norm(canonical2("vg_x", 1.0, 16, 192))
    u = train_gpt.gated_values(a, canonical2("vg_ve", 0.5, 16, 192), canonical2("vg_g", 0.3, 6, 12))
    close(u, ALONE["value_gate"])


def test_mudd_alone():
    m = train_gpt.mudd_coefficients(canonical2("mudd_x", 1.5, 16, 192), canonical2("mudd_1", 0.1, 64, 192),
                                    canonical2("mudd_2", 0.3, 14, 64), canonical2("mudd_b", 0.5, 14))
    close(torch.cat(m, dim=1), ALONE["mudd_coefficients"])
    c0, c7, x, ve = (canonical2(f"mb_{name}", 1.0, 16, 192) for name in ("c0", "c7", "x", "ve"))
    u, stream = train_gpt.mix_last_block(m, c0, c7, x, ve)
    close(u, ALONE["mudd_last_block"]["extra_value"])
    close(stream, ALONE["mudd_last_block"]["stream"])


def test_the_rows_of_bigrams_alone():
    i = np.arange(1025)
    ids = (31 * i**2 + 17 * i + 7) % 997 * (1 + i // 97 % 5) % 50_256
    ids[::311] = 50_256
    rows = train_gpt.bigram_rows(torch.from_numpy(ids[:1024].astype(np.int32)), 251_520).tolist()
    figures = ALONE["bigram_hash_rows_251520_seed1"]
    assert rows[:10] == figures["first10"] and rows[-5:] == figures["last5"]
    assert (sum(rows), rows[311], rows[312]) == (figures["sum"], figures["at_311"], figures["at_312"])


@pytest.mark.parametrize("name", ["weights_1_.5_.25_autograd", "weights_1_.5_autograd", "weights_1_autograd"])
def test_the_loss_alone(name):
    x = canonical2("ce_x", 1.0, 8, 16).requires_grad_()
    weight = canonical2("ce_w", 0.5, 64, 16).requires_grad_()
    targets = torch.tensor([3, 7, 7, 60, 3, 3, 12, 0])
    weights = {3: (1.0, 0.5, 0.25), 2: (1.0, 0.5, 0.0), 1: (1.0, 0.0, 0.0)}[name.count("_") - 1]
    loss, next_loss = train_gpt.multi_token_loss(x, weight, targets, torch.tensor(weights))
    loss.backward()
    figures = ALONE["loss"][name]
    assert loss.item() == pytest.approx(sum(figures["loss"]), rel=1e-6)
    alone = sum(ALONE["loss"]["weights_1_autograd"]["loss"])
    assert next_loss.item() == pytest.approx(alone, rel=1e-6)
    close(x.grad, figures["grad_x"])
    close(weight.grad, figures["grad_w"])
    assert x.grad.norm(dim=1).tolist() == pytest.approx(figures["grad_x_row_norms"], rel=1e-5)


# ---- What these figures see: built wrongly, they are others


def wrong_windows(change, doubled=None):
    """Kernels whose windows are changed, in all attentions or in those of paired heads only."""
    def attn_args(cu_seqlens, num_tokens, window, *rest):
        if doubled in (None, num_tokens):
            window = change(window)
        return train_gpt.banded_mask(cu_seqlens, num_tokens, window, *rest)
    return PUBLISHED._replace(attn_args=attn_args)


def adjacent_heads_share_a_sequence(q, k, v, *rest):
    if len(q) == 256:
        return train_gpt.banded_attention(q, k, v, *rest)
    q, k, v = (x.view(-1, 3, 2, 16).transpose(1, 2).reshape(-1, 3, 16) for x in (q, k, v))
    return train_gpt.banded_attention(q, k, v, *rest).view(-1, 2, 3, 16).transpose(1, 2).reshape(-1, 3, 16)


def positions_by_entry(x, cos, sin, rotate=train_gpt.norm_and_rotate):
    if x.dim() == 3:
        return rotate(x, cos, sin)
    x = x.flatten(1, 2).unflatten(1, (2, -1))
    return rotate(x, cos.transpose(1, 2), sin.transpose(1, 2)).flatten(1, 2).unflatten(1, (-1, 2))


def smear_in_a_chain(e, gate, factor):
    rows = [e[0]]
    for row in e[1:]:
        rows.append(row + factor * torch.sigmoid(gate @ row[:12]) * rows[-1])
    return torch.stack(rows)


SKIP, GELU, MUDD, LEAVE_OUT = (train_gpt.skip_share, torch.nn.functional.gelu, train_gpt.mudd_coefficients,
                               train_gpt.leave_out_own_value)
TABLES, BIGRAMS, COS_SIN = (train_gpt.FrontierGPT.look_up_value_embeds, train_gpt.bigram_rows,
                            train_gpt.rotary_cos_sin)
WRONG_NETWORKS = {  # what is wrong: kernels, or (owner, name, what stands there instead)
    "window one shorter": wrong_windows(lambda window: window - 1),
    "paired heads: window of half the entries": wrong_windows(lambda window: window // 2, doubled=512),
    "paired heads: adjacent heads share a slot and alternate":
        PUBLISHED._replace(attention=adjacent_heads_share_a_sequence),
    "gradient by autograd at the end": train_gpt.FrontierGPT.plain_kernels,
    "paired heads: positions by entry": (train_gpt, "norm_and_rotate", positions_by_entry),
    "no key offset": (train_gpt, "offset_keys", lambda k: k),
    "attention scale 1/sqrt(K)": (train_gpt, "yarn_attn_scale", lambda *_: 0.25),
    "rotation the other way":
        (train_gpt, "rotary_cos_sin", lambda *case: (COS_SIN(*case)[0], -COS_SIN(*case)[1])),
    "smear chain": (train_gpt, "smear", smear_in_a_chain),
    "skip added without factor 2": (train_gpt, "skip_share", lambda *case: SKIP(*case) / 2),
    "tanh-gelu in MUDD": (torch.nn.functional, "gelu", lambda x: GELU(x, approximate="tanh")),
    "MUDD reads normalised x":
        (train_gpt, "mudd_coefficients", lambda x, *weights: MUDD(train_gpt.norm(x), *weights)),
    "no exclusive attention": (train_gpt, "leave_out_own_value", lambda y, v, a: y + 0 * a.sum()),
    "exclusive attention adds": (train_gpt, "leave_out_own_value", lambda y, v, a: LEAVE_OUT(y, v, -a)),
    "value tables in another order":
        (train_gpt.FrontierGPT, "look_up_value_embeds", lambda *case: TABLES(*case)[::-1]),
    "the second token's bigram has the first token": (
        train_gpt, "bigram_rows", lambda x, n: torch.where(
            torch.arange(len(x)) == 1, (36313 * x ^ 27191 * x[0]) % (n - 1), BIGRAMS(x, n))),
    "logit cap offset 0": (
        train_gpt, "lifted_logits", lambda x, weight: 23 * torch.sigmoid(x @ weight.T / 7.5)),
}


@pytest.mark.parametrize("what", WRONG_NETWORKS)
def test_the_figures_see_a_network_that_is_built_wrongly(what, monkeypatch):
    wrong = WRONG_NETWORKS[what]
    kernels = wrong if isinstance(wrong, train_gpt.Kernels) else PUBLISHED
    if kernels is not wrong:
        monkeypatch.setattr(*wrong)
    with pytest.raises(AssertionError):
        check_pass(Canonical("micro", kernels), "train_stage1", GOLDEN["micro"]["train_stage1"], rel=1e-4)


def whole_queries_and_keys(G, *rest, newton_schulz=train_gpt.newton_schulz):
    if G.shape[1:] != (32, 96):
        return newton_schulz(G, *rest)
    return newton_schulz(G.view(-1, 96, 96), *rest).view_as(G)


WRONG_STEPS = {  # what is wrong: changes of the rows' columns or rules, or (owner, name, what stands there)
    "Muon: Q and K whole, not in pairs": (train_gpt, "newton_schulz", whole_queries_and_keys),
    "Muon: Newton-Schulz": dict(mlp_bank=dict(method=train_gpt.NEWTON_SCHULZ)),
    "Muon: beta2 0.95": dict(mlp_bank=dict(beta2=0.95)),
    "Muon: decay not multiplied by the rate": dict(vo_bank=dict(cautious_decay=1.2 / 0.023)),
    "Muon: down-projection not twice the rate": dict(mlp_bank=dict(factors=())),
    "NorMuon: no rescaling to the old norm": (
        train_gpt.Muon, "even_out", lambda rule, X, moment: X * moment.lerp_(
            train_gpt.mean_square(X), 0.1).clamp_min(1e-10).rsqrt()),
    "Adam: decay linear in the rate": dict(lm_head=dict(cautious_decay=150 * 0.005 / 0.008)),
    "Adam: other betas": dict(mudd_bias=dict(betas=(0.9, 0.95))),
    "Adam on every step": dict(value_embeds=dict(every=1)),
    "head and embedding not added while tied": dict(embed=dict(copy_of="")),
}


@pytest.mark.parametrize("what", WRONG_STEPS)
def test_the_figures_see_steps_that_are_built_wrongly(what, monkeypatch):
    wrong = WRONG_STEPS[what]
    run = Canonical("micro", PUBLISHED)
    if isinstance(wrong, tuple):
        monkeypatch.setattr(*wrong)
    else:
        (name, changes), = wrong.items()
        row = run.model.rows[name]
        in_row = {key: x for key, x in changes.items() if key in row._fields}
        in_rule = {key: x for key, x in changes.items() if key not in row._fields}
        run.model.rows[name] = row._replace(rule=row.rule._replace(**in_rule), **in_row)
    with pytest.raises(AssertionError):
        check_ten_steps(run, GOLDEN["micro"]["ten_steps"])
