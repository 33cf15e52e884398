"""Muon, DistAdam and the steps around them, at one rank and at several."""

import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, SMALL, fresh_model, launch, overrides, random_documents, write_shard
from distributed_checks import CHECKS, LOCAL_CHECKS, plain_orthogonal

import train_gpt

NO_VALIDATION = None  # tokens for a warm-up that compiles nothing


def one_parameter(kind, value, *settings, lr_mult=1.0):
    p = torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float32).clone())
    return p, kind({"p": (p, lr_mult)}, 0, 1, *settings)


def step(optimizer, p, grad, lr_scale=1.0, momentum=0.0):
    p.grad = torch.as_tensor(grad, dtype=p.dtype).clone()
    train_gpt.optimizer_step([optimizer], lr_scale=lr_scale, momentum=momentum)
    return p.detach().clone()


# ---------------------------------------------------------------------------------------------------
# One rank


@pytest.mark.parametrize("name", LOCAL_CHECKS)
def test_one_rank_keeps_every_promise_of_the_optimizers(name):
    """The checks of distributed_checks.py that also mean something in a world of one."""
    LOCAL_CHECKS[name](0, 1)


def test_the_first_adam_step_is_the_learning_rate_times_its_multiple_against_the_sign_of_the_gradient():
    """So t counts from 1: from 0 the correction would be 0 / 0, from 2 the step would be another."""
    p, optimizer = one_parameter(train_gpt.DistAdam, [[1.0, 2.0, 3.0]], 0.008, (0.8, 0.95), 0.0, lr_mult=75.0)
    moved = step(optimizer, p, [[1e-3, -5.0, 100.0]], lr_scale=0.5)
    torch.testing.assert_close(moved, torch.tensor([[1.0 - 0.3, 2.0 + 0.3, 3.0 - 0.3]]))


def test_eps_joins_the_root_of_the_uncorrected_second_moment():
    p, optimizer = one_parameter(train_gpt.DistAdam, [[0.0]], 0.008, (0.8, 0.95), 1.0)
    moved = step(optimizer, p, [[1.0]])
    expected = -0.008 * (1 - 0.95) ** 0.5 / (1 - 0.8) * 0.2 / (0.05**0.5 + 1)
    assert moved.item() == pytest.approx(expected, rel=1e-5)


def test_the_scale_of_the_gradients_does_not_matter_to_adam():
    steps = []
    for scale in (1.0, 1 / 8):
        p, optimizer = one_parameter(train_gpt.DistAdam, [[1.0, 2.0, 3.0]], 0.008, (0.8, 0.95), 1e-10)
        for grad in ([[0.5, -0.01, 3.0]], [[0.2, 0.02, -1.0]], [[-4.0, 0.0, 1.0]]):
            moved = step(optimizer, p, scale * torch.tensor(grad))
        steps.append(moved)
    torch.testing.assert_close(*steps, rtol=1e-6, atol=0)


def muon_step(grad, momentum=0.0, param=None, dtype=torch.float32):
    grad = torch.as_tensor(grad)
    param = torch.zeros(grad.shape) if param is None else param
    p, optimizer = one_parameter(train_gpt.Muon, param, 0.05, train_gpt.newton_schulz, dtype)
    return step(optimizer, p, grad, momentum=momentum)


def test_a_tall_matrix_moves_further_by_the_root_of_its_shape_and_a_wide_one_does_not():
    grad = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    tall, wide = muon_step(grad), muon_step(grad.mT)
    torch.testing.assert_close(tall, 2 * wide.mT, rtol=1e-4, atol=1e-6)
    expected = -0.05 * plain_orthogonal(grad[0].mT.double())
    torch.testing.assert_close(wide[0].double(), expected, rtol=1e-3, atol=1e-5)


def test_each_of_q_k_v_and_output_projection_is_orthogonalised_on_its_own(small):
    model = fresh_model(small)
    muon = train_gpt.make_optimizers(model, small, 0, 1)[0]
    torch.manual_seed(0)
    grad = torch.randn_like(model.attn_bank)
    factors = 10.0 ** torch.randint(-2, 3, (len(grad), 1, 1))  # would show if matrices were taken together
    before = model.attn_bank.detach().clone()
    for p in (model.attn_bank, model.gate_bank, model.mlp_bank):
        p.grad = torch.zeros_like(p)
    model.attn_bank.grad = factors * grad
    gates = model.gate_bank.detach().clone()
    train_gpt.optimizer_step([muon], lr_scale=1.0, momentum=0.9)
    assert before.shape == (4 * 11, 32, 32)
    for i in range(len(grad)):
        expected = -0.05 * plain_orthogonal(grad[i].double())
        moved = (model.attn_bank[i] - before[i]).detach().double()
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5)
    assert torch.equal(model.gate_bank, gates), "a zero gradient must not move a matrix"


def test_muon_looks_ahead_of_its_momentum():
    """The update is lerp(g, buffer, m), which after two steps is along neither g nor the buffer."""
    torch.manual_seed(1)
    first, second, momentum = torch.randn(1, 3, 3), torch.randn(1, 3, 3), 0.8
    p, optimizer = one_parameter(
        train_gpt.Muon, torch.zeros(1, 3, 3), 0.05, train_gpt.newton_schulz, torch.float32
    )
    before = step(optimizer, p, first, momentum=momentum)
    after = step(optimizer, p, second, momentum=momentum)
    buffer = momentum * (1 - momentum) * first + (1 - momentum) * second
    update = (1 - momentum) * second + momentum * buffer
    torch.testing.assert_close(
        (after - before)[0].double(), -0.05 * plain_orthogonal(update[0].double()), rtol=0, atol=2e-5
    )


def test_muon_orthogonalises_in_the_dtype_that_the_settings_name(small):
    used = []
    for dtype in ("bfloat16", "float32"):
        s = replace(small, dtype=dtype)
        model = fresh_model(s)
        model.kernels = model.kernels._replace(
            orthogonalize=lambda x, dtype: used.append(dtype) or train_gpt.newton_schulz(x, dtype)
        )
        muon = train_gpt.make_optimizers(model, s, 0, 1)[0]
        for p in (model.attn_bank, model.gate_bank, model.mlp_bank):
            p.grad = torch.ones_like(p)
        train_gpt.optimizer_step([muon], lr_scale=1.0, momentum=0.9)
        kept = [x for shard in muon.shards for x in (shard.param, *shard.state.values())]
        assert {x.dtype for x in kept} == {torch.float32}
    assert used == 3 * [torch.bfloat16] + 3 * [torch.float32]


def test_a_step_uses_the_gradients_up(small):
    model = fresh_model(small)
    optimizers = train_gpt.make_optimizers(model, small, 0, 1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    train_gpt.optimizer_step(optimizers, lr_scale=1.0, momentum=0.9)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []


# ---------------------------------------------------------------------------------------------------
# Who trains what


@pytest.mark.parametrize(
    "changes",
    [{}, dict(value_embeds="." * 12, gate_channels=0), dict(skip_mlp=",".join(map(str, range(12))))],
)
def test_every_parameter_has_exactly_one_optimizer(small, changes):
    s = replace(small, **changes)
    model = fresh_model(s)
    optimizers = train_gpt.make_optimizers(model, s, 0, 1)
    trained = [shard.param for optimizer in optimizers for shard in optimizer.shards]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


def test_a_parameter_that_no_optimizer_knows_raises_key_error(small):
    model = fresh_model(small)
    model.register_parameter("newcomer", torch.nn.Parameter(torch.zeros(3, 3)))
    with pytest.raises(KeyError, match="newcomer"):
        train_gpt.make_optimizers(model, small, 0, 1)


def test_the_defaults_are_the_races_rates_and_multiples(small):
    defaults = train_gpt.Settings()
    rates = {
        f.name: getattr(defaults, f.name)
        for f in fields(defaults)
        if re.match("muon_lr|adam_|embed_lr|head_lr|scalar_lr", f.name)
    }
    s = replace(small, dtype="bfloat16", **rates)
    muon, adam = train_gpt.make_optimizers(fresh_model(s), s, 0, 1)
    assert (muon.lr, muon.dtype) == (0.05, torch.bfloat16)
    assert (adam.lr, adam.betas, adam.eps) == (0.008, (0.8, 0.95), 1e-10)
    assert {shard.name: shard.lr_mult for shard in muon.shards} == dict(attn_bank=1, gate_bank=1, mlp_bank=1)
    assert {shard.name: shard.lr_mult for shard in adam.shards} == dict(
        embed=75, value_embeds=75, lm_head=1, scalars=5
    )
    states = {shard.name: {x.dtype for x in shard.state.values() if x.ndim} for shard in adam.shards}
    tables = {torch.bfloat16}
    assert states == dict(embed=tables, value_embeds=tables, lm_head={torch.float32}, scalars={torch.float32})


# ---------------------------------------------------------------------------------------------------
# The steps around them


@pytest.fixture
def start(small, tmp_path):
    """A function that gives model, optimizers and loader at the start of a run on one rank."""
    tokens = np.concatenate(random_documents(seed=4, count=400))
    shard = train_gpt.TokenShard(write_shard(tmp_path / "train.bin", tokens), small)
    batch = train_gpt.plan_batch(small, 1)

    def build():
        model = fresh_model(small)
        with torch.no_grad():  # away from the zeros that hide gradients
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        plan = train_gpt.plan_data([shard], batch, small)
        loader = train_gpt.TrainLoader([shard], small, batch, plan, 0, CPU)
        return model, train_gpt.make_optimizers(model, small, 0, 1), loader

    return build


def snapshot(model, optimizers):
    tensors = {f"parameter {name}": p for name, p in model.named_parameters()}
    tensors |= {
        f"{key} of {shard.name}": x
        for o in optimizers
        for shard in o.shards
        for key, x in shard.state.items()
    }
    return {name: x.detach().clone() for name, x in tensors.items()}


def unequal(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_warm_up_puts_everything_back_bit_for_bit_after_moving_it(small, start, monkeypatch):
    model, optimizers, loader = start()
    loader.next_batch()  # not at the very beginning, so that a mere reset would show
    position, before, drawn = loader.position, snapshot(model, optimizers), torch.get_rng_state()
    moved, batches, windows = [], [], []
    real_step, real_batch = train_gpt.optimizer_step, loader.next_batch

    def watched_step(*args, **kwargs):
        real_step(*args, **kwargs)
        moved.append(unequal(before, snapshot(model, optimizers)))

    def watched_forward(*batch_and_window):
        windows.append(batch_and_window[-1])
        torch.rand(())  # as dropout would
        return model(*batch_and_window)

    def watched_batch():
        batch = real_batch()
        batches.append(loader.position)
        return batch

    monkeypatch.setattr(train_gpt, "optimizer_step", watched_step)
    monkeypatch.setattr(loader, "next_batch", watched_batch)
    train_gpt.warm_up(model, watched_forward, optimizers, loader, NO_VALIDATION, small)
    assert moved == small.warmup_steps * [set(before)], "each step must move everything"
    assert position not in batches and len(set(batches)) > 1
    assert set(windows) == {(12, 4), (28, 12), (44, 20)}, "3, 7 and 11 times 4 tokens, and their halves"
    assert unequal(before, snapshot(model, optimizers)) == set()
    assert loader.position == position and torch.get_rng_state().equal(drawn)
    assert all(p.grad is None for p in model.parameters())


def test_a_run_after_a_warm_up_is_the_run_without_one(small, start):
    losses = {}
    for warm in (False, True):
        model, optimizers, loader = start()
        if warm:
            train_gpt.warm_up(model, model, optimizers, loader, NO_VALIDATION, small)
        losses[warm] = [train_gpt.train_step(model, optimizers, loader, i, small)().loss for i in range(3)]
    assert losses[True] == losses[False] and len(set(losses[True])) == 3


def test_warmup_steps_0_leaves_everything_alone(small, start, monkeypatch):
    model, optimizers, loader = start()
    monkeypatch.setattr(train_gpt, "train_step", lambda *_: pytest.fail("a step without being asked"))
    train_gpt.warm_up(model, model, optimizers, loader, NO_VALIDATION, replace(small, warmup_steps=0))


def test_a_train_step_sums_gradients_over_microbatches_and_reports_the_mean_loss(small, start, monkeypatch):
    model, optimizers, loader = start()
    _, _, other = start()
    losses, expected = [], {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(8):
        loss = model(*other.next_batch(), (12, 4))
        losses.append(loss.item())
        for grad, total in zip(torch.autograd.grad(loss, list(model.parameters())), expected.values()):
            total += grad
    found = {}

    def keep(optimizers, lr_scale, momentum):
        for shard in (shard for optimizer in optimizers for shard in optimizer.shards):
            grad = shard.param.grad if shard.sent is None else shard.sent.view(shard.param.shape)
            found[shard.name] = grad.clone()
        found["rates"] = lr_scale, momentum

    monkeypatch.setattr(train_gpt, "optimizer_step", keep)
    report = train_gpt.train_step(model, optimizers, loader, 1, small, stop_signal=lambda: 15)
    assert found.pop("rates") == (1.0, pytest.approx(0.85 + 0.1 / 300))
    assert report() == (pytest.approx(sum(losses) / 512, rel=1e-5), 15)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile", [False, True])
def test_the_head_is_reduced_while_the_blocks_gradients_are_made(small, start, compile, monkeypatch):
    """And in a step's last backward pass alone, when its gradient is whole."""
    model, optimizers, loader = start()
    (head,) = (shard for o in optimizers for shard in o.shards if shard.name == "lm_head")
    started, whole = [], []
    model.attn_bank.register_post_accumulate_grad_hook(lambda _: started.append(head.sent is not None))
    monkeypatch.setattr(train_gpt, "optimizer_step", lambda *_, **__: whole.append(head.sent.clone()))
    torch._dynamo.reset()
    forward = train_gpt.compiled(model, small, backend="aot_eager") if compile else model
    train_gpt.train_step(forward, optimizers, loader, 0, small)
    assert started == 7 * [False] + [True] and head.param.grad is None and head.work is None
    torch._dynamo.reset()
    _, _, again = start()
    for _ in range(8):
        model(*again.next_batch(), (12, 4)).backward()
    torch.testing.assert_close(whole[0], head.param.grad, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------
# Several ranks


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """worlds(n): what n ranks found, as (results of the checks, the log file's text); started once each.

    The scalars hardly learn here. While all blocks add nothing to their input, as at the start, the norm
    behind them hides its scale; the scalars' gradients are zero but for rounding, whose sign Adam follows.
    """
    data, made = tmp_path_factory.mktemp("data"), {}
    for name, seed, count in (("train_0", 1, 100), ("train_1", 2, 90), ("val_0", 3, 12)):
        write_shard(data / f"{name}.bin", np.concatenate(random_documents(seed, count)))

    s = replace(train_gpt.Settings(), **SMALL, device="cpu", target_loss=0.0, scalar_lr_mult=0.01)
    s = replace(s, train_files=str(data / "train_*.bin"), val_files=str(data / "val_*.bin"))

    def settings(folder):
        return overrides(replace(s, log_dir=str(folder)))

    def start(world_size, repetition=0):
        if (world_size, repetition) not in made:
            folder = tmp_path_factory.mktemp(f"world{world_size}")
            program = ROOT / "tests" / "distributed_checks.py"
            made[world_size, repetition] = done = (
                launch(cwd=folder, **settings(folder))
                if world_size == 1
                else launch(folder, nproc=world_size, cwd=folder, script=program, **settings(folder))
            )
            if done.returncode == 0:
                found = folder / "results.json"
                made[world_size, repetition] = (
                    json.loads(found.read_text()) if found.exists() else {},
                    next(folder.glob("*.txt")).read_text(),
                )
        result = made[world_size, repetition]
        assert isinstance(result, tuple), result.stdout[-3000:] + result.stderr[-3000:]
        return result

    return start


def losses_of(log):
    """{(step, 'train' or 'val'): loss} of a log's lines."""
    lines = re.findall(r"^step:(\d+)/6 .*?\b(train|val)_loss:(\S+)", log, flags=re.MULTILINE)
    return {(int(step), kind): float(loss) for step, kind, loss in lines}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("name", CHECKS)
def test_several_ranks_keep_every_promise_of_the_optimizers(worlds, world_size, name):
    """The checks of distributed_checks.py, with rows that do not divide and other gradients on each rank."""
    results, _ = worlds(world_size)
    assert results[name] is None, results[name]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_same_seed_gives_the_same_losses_at_every_world_size(worlds, world_size):
    expected, found = losses_of(worlds(1)[1]), losses_of(worlds(world_size)[1])
    assert set(expected) == {(i, "train") for i in range(1, 7)} | {(i, "val") for i in (0, 3, 6)}
    assert expected[6, "train"] < expected[1, "train"] and len(set(expected.values())) > 5
    assert found == pytest.approx(expected, abs=1.1e-4)  # the last printed digit, rounding aside


@pytest.mark.slow
def test_two_runs_write_the_same_log_but_for_times(worlds):
    def timeless(log):
        assert "val_loss" in log and "train_time:" in log
        log = re.sub(r"train_time:\d+ms step_avg:[\d.]+ms", "", log)
        log = re.sub(r"after [\d.]+ s(?= of training|, with)", "", log)
        return [line for line in log.splitlines() if not line.startswith("log_dir:")]

    assert timeless(worlds(1)[1]) == timeless(worlds(1, repetition=1)[1])
