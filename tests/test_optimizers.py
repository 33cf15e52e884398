"""Muon, Adam and the steps around them, on one rank and on several, against plain float64 versions."""

import traceback
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import CPU, ROOT, SMALL, before, fresh_model, normal, random_documents, server, stage_of
from conftest import step_of, training_loss, write_shard

import train_gpt

SCHEDULE = [(1.0, 0.85), (0.7, 0.88), (0.4, 0.91), (0.1, 0.95)]  # (lr_scale, momentum) of the steps

# ---- The plain versions: one process, whole tensors, float64

def plain_orthogonal(x):
    """One matrix through five Newton-Schulz steps."""
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class PlainMuon:
    """A stack of matrices, each orthogonalised on its own."""

    def __init__(self, param, lr):
        self.param, self.lr, self.buffer = param.detach().double(), lr, torch.zeros(param.shape).double()

    def step(self, grad, lr_scale, momentum):
        self.buffer = momentum * self.buffer + (1 - momentum) * grad
        ahead = (1 - momentum) * grad + momentum * self.buffer
        rows, cols = ahead.shape[1:]
        update = torch.stack([plain_orthogonal(matrix) for matrix in ahead])
        self.param = self.param - self.lr * lr_scale * max(1, rows / cols) ** 0.5 * update
        return self.param, self.buffer


class PlainAdam:
    """m and v the running averages: lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)."""

    def __init__(self, param, lr, betas=(0.8, 0.95), eps=0.05):
        self.param, self.lr, self.betas, self.eps, self.t = param.detach().double(), lr, betas, eps, 0
        self.mean = self.square = torch.zeros_like(self.param)

    def step(self, grad, lr_scale, momentum):
        (beta1, beta2), self.t = self.betas, self.t + 1
        self.mean = beta1 * self.mean + (1 - beta1) * grad
        self.square = beta2 * self.square + (1 - beta2) * grad**2
        correction = (1 - beta2**self.t) ** 0.5 / (1 - beta1**self.t)
        update = correction * self.mean / (self.square.sqrt() + self.eps)
        self.param = self.param - self.lr * lr_scale * update
        return self.param, self.mean, self.square


# ---- Checks that one rank or several make together

def start(folder, s, rank=0, world_size=1):
    """Model, optimizer and batches of a run on a rank, away from the zeros that hide gradients."""
    model = fresh_model(s, world_size=world_size)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            num_rows = model.rows[name].shape[0]
            p[:num_rows] += 0.02 * normal(num_rows, *p.shape[1:], seed=i)
    shard = train_gpt.TokenShard(folder / "train.bin", s)
    plan = train_gpt.plan_packing([shard], s, train_gpt.make_schedule(s), s.num_microbatches(world_size))
    numbers = train_gpt.microbatches_of_rank(plan, 0, rank, world_size)
    batches = train_gpt.train_batches(plan, numbers, CPU, rank)
    return model, train_gpt.make_optimizer(model, rank, world_size), batches


def settings(**changes):
    return replace(train_gpt.Settings(), **SMALL | changes)


def train_steps_are_those_of_one_rank(rank, world_size, folder):
    """But for rounding. Collectives are two for each parameter, in one order on all ranks."""
    s, runs, called = settings(), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "ADAM_EPS", 1e-3)  # so that Adam does not follow the sign of rounding alone
        for owner, name in ((train_gpt, "reduce_scatter_tensor"), (train_gpt, "all_gather_tensor"),
                            (dist, "all_reduce")):
            patch.setattr(owner, name, getattr(owner, name))  # put back at the end
            before(owner, name, lambda x, *_, name=name, **__: called.append((name, tuple(x.shape))))
        for r, n in ((0, 1), (rank, world_size)):
            model, optimizer, batches = start(folder, s, r, n)
            if n == 1:
                patch.setattr(dist, "is_initialized", lambda: False)
            stops = [int, int, lambda last=r == n - 1: 15 * last]
            statuses = [train_gpt.train_step(model, optimizer, batches, step_of(s, i, *SCHEDULE[i]), stop)
                        for i, stop in enumerate(stops)]
            patch.setattr(dist, "is_initialized", lambda: True)
            runs.append((model, [status.values.tolist() for status in statuses]))
    (one, expected), (model, found) = runs
    assert [status[0] for status in found] == pytest.approx([status[0] for status in expected], rel=1e-5)
    flags = [0] * len(one.rows)
    assert [status[1:] for status in found] == [[0, *flags], [0, *flags], [1, *flags]], "one asks, all hear"
    for name, p in one.named_parameters():
        q, rows = getattr(model, name).detach(), len(p)
        torch.testing.assert_close(q[:rows], p.detach(), rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")
        assert not q[rows:].any(), f"rows added to {name}"
        bits = train_gpt.of_all_ranks(q.numpy().tobytes())
        assert len(set(bits)) == 1, f"ranks differ in {name}"
    orders = train_gpt.of_all_ranks(called)
    head = tuple(s_ // world_size if i == 0 else s_ for i, s_ in enumerate(one.lm_head.shape))
    assert called[0] == ("reduce_scatter_tensor", head), "the head's is under way first"
    # two for each parameter, but one for the tiny ones together, and one for the status
    sharded = [row for row in one.rows.values() if not row.tiny]
    assert len(called) == 3 * (2 * len(sharded) + 2) and all(order == orders[0] for order in orders), orders


def a_kernel_that_disagrees_on_one_rank_is_taken_by_none(rank, world_size, folder):
    from test_kernels import OnCPU, plain_varlen

    error = 0.5 if rank == world_size - 1 else 0.0
    with pytest.MonkeyPatch.context() as patch, OnCPU():
        patch.setattr(torch, "compile", lambda function, **_: function)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        patch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
        patch.setattr(train_gpt, "symmetric_XXT", lambda X, **more: (1 + error) * train_gpt.XXT(X, **more))
        kernels, lines = train_gpt.choose_kernels(torch.device("cuda"), settings(dtype="bfloat16"))
    assert kernels.XXT is train_gpt.XXT and kernels.attention is train_gpt.flash_attention, lines


def unlike_gpus_try_what_all_of_them_have(rank, world_size, folder):
    """Each trial ends with a collective: one more on a rank would wait for ever."""
    from test_kernels import OnCPU, plain_varlen

    with pytest.MonkeyPatch.context() as patch, OnCPU():
        patch.setattr(torch, "compile", lambda function, **_: function)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9 if rank else 6))
        patch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
        patch.setattr(train_gpt, "symmetric_XXT", train_gpt.XXT)
        s = settings(dtype="bfloat16", vocab_multiple=16)
        names = [candidate.name for candidate in train_gpt.list_candidates((8, 9), s)]
        assert "float8, fused loss" in names, "which rank 0 lacks"
        _, lines = train_gpt.choose_kernels(torch.device("cuda"), s)
    assert lines[1].startswith("head: plain PyTorch "), lines
    assert len({*train_gpt.of_all_ranks("".join(lines))}) == 1


def make_check(check, rank, world_size, folder, store, wrong):
    """A rank's process: makes a check and writes what was wrong to a file."""
    torch.set_num_threads(1)
    store, patience = dist.FileStore(str(store), world_size), timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    try:
        check(rank, world_size, folder)
        dist.barrier()
    except BaseException:
        wrong.write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """It holds the training data."""
    folder = tmp_path_factory.mktemp("run")
    write_shard(folder / "train.bin", np.concatenate(random_documents(seed=4, count=400)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("check", [train_steps_are_those_of_one_rank,
                                   a_kernel_that_disagrees_on_one_rank_is_taken_by_none,
                                   unlike_gpus_try_what_all_of_them_have])
def test_several_ranks(folder, tmp_path, monkeypatch, world_size, check):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # a path on which the server finds conftest.py
    wrong, ranks = [tmp_path / f"rank_{rank}" for rank in range(world_size)], []
    for rank, path in enumerate(wrong):
        arguments = (check, rank, world_size, folder, tmp_path / "store", path)
        ranks.append(server.Process(target=make_check, args=arguments, daemon=True))
        ranks[-1].start()
    for process in ranks:
        process.join(120)
        process.kill()
        process.join()
    told = [path.read_text() for path in wrong if path.exists()]
    assert [process.exitcode for process in ranks] == [0] * world_size, "\n".join(told)


# ---- One rank

def optimizer_of(params, rule, lrs, **columns):
    """Of parameters with this rule at these rates."""
    rows = {name: train_gpt.Row(p.shape, rule._replace(lr=lrs[name]), train_gpt.zeros, **columns)
            for name, p in params.items()}
    return train_gpt.ShardedOptimizer(params, rows, 0, 1)


def take_step(optimizer, step):
    """Of the gradients that are in p.grad."""
    optimizer.reduce_scatter(step)
    optimizer.step(step)
    optimizer.all_gather()


MUON = train_gpt.Muon(0.0, torch.float32)
ADAM = train_gpt.Adam(0.0, (0.8, 0.95))


@pytest.mark.parametrize("columns", [{}, dict(tiny=True)])
@pytest.mark.parametrize("rule, plain, shapes", [
    (MUON, PlainMuon, dict(tall=(16, 6, 4), wide=(8, 3, 8), square=(8, 4, 4))),
    (ADAM, PlainAdam, dict(a=(8, 3), b=(16, 5), c=(24, 2))),
])
def test_steps_of_an_optimizer_are_those_of_the_plain_one(rule, plain, shapes, columns, monkeypatch):
    monkeypatch.setattr(train_gpt, "ADAM_EPS", 0.05)  # such an eps shows where it is added
    params = {name: torch.nn.Parameter(normal(*shape)) for name, shape in shapes.items()}
    lrs = {name: 0.025 + 0.1 * i for i, name in enumerate(shapes)}
    references = {name: plain(p, lrs[name]) for name, p in params.items()}
    optimizer = optimizer_of(params, rule, lrs, **columns)
    for step, (lr_scale, momentum) in enumerate(SCHEDULE):
        expected = {}
        for i, (name, p) in enumerate(params.items()):
            p.grad = normal(*p.shape, seed=100 * step + i)
            expected[name] = references[name].step(p.grad.double(), lr_scale, momentum)
        told = train_gpt.Step(step, None, lr_scale, momentum)
        optimizer.reduce_scatter(told)
        assert all(p.grad is None for p in params.values()), "the gradients are used up"
        optimizer.step(told)
        optimizer.all_gather()
        for sp in optimizer.sharded_params:
            found = [sp.param.detach(), *sp.state.values()]
            for x, state in zip(found, expected[sp.name], strict=True):
                torch.testing.assert_close(x.double(), state, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
def test_1000_steps_of_adam_in_bfloat16_round_once_a_step_and_stay_near_float64():
    p = torch.nn.Parameter(normal(64, 8).bfloat16())
    adam = optimizer_of({"p": p}, ADAM, {"p": 0.1})
    (sp,), far = adam.sharded_params, PlainAdam(p, 0.1, eps=1e-10)
    held, unequal = [p.data, *sp.state.values()], 0
    for i in range(1000):
        grad = (0.01 * normal(64, 8, seed=i) + (0.004 if i < 500 else -0.002)).bfloat16()
        near = PlainAdam(p, 0.1, eps=1e-10)  # this one goes on from bfloat16
        near.mean, near.square, near.t = held[1].double(), held[2].double(), i
        right, expected = far.step(grad.double(), 1.0, 0.0), near.step(grad.double(), 1.0, 0.0)
        p.grad = grad
        take_step(adam, train_gpt.Step(i, None, 1.0, 0.0))
        unequal += sum(int((x != y.bfloat16()).sum()) for x, y in zip(held, expected))
    assert all(x.dtype == torch.bfloat16 for x in held)
    assert unequal < 1e-3 * 3 * 1000 * p.numel(), "float32 and float64 round alike, save for near ties"
    for x, y in zip(held[1:], right[1:]):  # the parameter keeps what it lost by rounding
        assert (x.double() - y).norm() < 0.01 * y.norm()


def test_adam_written_out_is_the_fused_kernel():
    """The lines that a row with factors or decay takes, with factors of 1 and no decay."""
    fused, written = (torch.nn.Parameter(normal(32, 8)) for _ in range(2))
    optimizers = [optimizer_of({"p": fused}, ADAM, {"p": 0.02}),
                  optimizer_of({"p": written}, ADAM, {"p": 0.02}, factors=(1.0,) * 32)]
    for i in range(30):
        for p, optimizer in zip((fused, written), optimizers):
            p.grad = normal(32, 8, seed=i)
            take_step(optimizer, train_gpt.Step(i, None, 1.0 - i / 60, 0.0))
    torch.testing.assert_close(written, fused, rtol=1e-6, atol=1e-6)


def test_decay_is_cautious_and_factors_are_of_the_rate_of_each_row():
    """Decay shrinks only weights that the step shrinks, too, by the square of the rate."""
    p, plain = (torch.nn.Parameter(normal(6, 12)) for _ in range(2))
    before, factors = p.detach().clone(), torch.tensor([1.0, 2.0, 1.0, 0.5, 0.0, 1.0])
    rule = ADAM._replace(cautious_decay=3.0)
    optimizers = [optimizer_of({"p": p}, rule, {"p": 0.1}, factors=tuple(factors.tolist())),
                  optimizer_of({"p": plain}, ADAM, {"p": 0.1})]
    for parameter, optimizer in zip((p, plain), optimizers):
        parameter.grad = normal(6, 12, seed=9)
        take_step(optimizer, train_gpt.Step(0, None, 1.0, 0.0))
    update = (before - plain.detach()) * factors[:, None]
    decay = (0.1 * factors[:, None]) ** 2 * 3.0 * before * (update * before > 0)
    torch.testing.assert_close(p.detach(), before - update - decay)
    assert torch.equal(p[4], before[4]) and (decay != 0).any() and (decay == 0).any()


def test_each_matrix_of_a_bank_can_have_a_factor_of_the_rate():
    twice, once = (torch.nn.Parameter(normal(3, 8, 4)) for _ in range(2))
    before = once.detach().clone()
    for p, columns in ((twice, dict(factors=(1.0, 2.0, 1.0))), (once, {})):
        p.grad = normal(3, 8, 4, seed=5)
        optimizer = optimizer_of({"p": p}, MUON, {"p": 0.1}, **columns)
        take_step(optimizer, train_gpt.Step(0, None, 1.0, 0.9))
    steps = [p.detach() - before for p in (twice, once)]
    torch.testing.assert_close(steps[0], steps[1] * torch.tensor([1.0, 2.0, 1.0]).view(3, 1, 1))


@pytest.mark.parametrize(
    "changes", [{}, dict(value_embeds="." * 12, gate_channels=0), dict(ngram_rows=40, ngram_dim=8)])
def test_every_parameter_is_trained_once(small, changes):
    s = replace(small, **changes)
    model = fresh_model(s)
    trained = [sp.param for sp in train_gpt.make_optimizer(model, 0, 1).sharded_params]
    assert sorted(map(id, trained)) == sorted(map(id, model.parameters()))


def test_a_parameter_without_a_row_in_the_table_raises_key_error(small):
    model = fresh_model(small)
    model.register_parameter("newcomer", torch.nn.Parameter(torch.zeros(3, 3)))
    with pytest.raises(KeyError, match="newcomer"):
        train_gpt.make_optimizer(model, 0, 1)


def test_who_trains_what_at_which_rate_and_dtype():
    s = train_gpt.Settings()
    with torch.device("meta"):
        optimizer = train_gpt.make_optimizer(train_gpt.GPT(s, train_gpt.Kernels()), 0, 1)
    found = {sp.name: (sp.row.rule, {x.dtype for x in sp.state.values()}) for sp in optimizer.sharded_params}
    muon, single, half = train_gpt.Muon(0.05, torch.bfloat16), {torch.float32}, {torch.bfloat16}

    def adam(lr):
        return train_gpt.Adam(pytest.approx(lr), (0.8, 0.95))

    assert train_gpt.ADAM_EPS == 1e-10
    assert found | dict(
        attn_bank=(muon, single), gate_bank=(muon, single), mlp_bank=(muon, single),
        embed=(adam(0.6), half), value_embeds=(adam(0.6), half), lm_head=(adam(0.008), single),
        scalars=(adam(0.04), single)) == found


def test_a_train_step_takes_the_mean_over_microbatches_of_losses_and_gradients(folder):
    (model, _, batches), (*_, others) = (start(folder, settings()) for _ in range(2))
    stage = stage_of(model.settings, 12, 4)
    losses = [training_loss(model, next(others), stage) for _ in range(8)]
    expected = torch.autograd.grad(sum(losses) / 8, list(model.parameters()))
    calls = []

    class Recorder:
        world_size = 1

        def reduce_scatter(self, step):
            calls.append("reduce_scatter")
            found = tuple(p.grad for p in model.parameters())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

        def step(self, *arguments):
            calls.append(arguments)
            return []

        def all_gather(self):
            calls.append("all_gather")

    step = step_of(model.settings, 6, 0.5, 0.9)
    status = train_gpt.train_step(model, Recorder(), batches, step)
    assert calls == ["reduce_scatter", (step,), "all_gather"]
    assert status.wait() == (pytest.approx(sum(losses).item() / 512, rel=1e-5), False, [])
