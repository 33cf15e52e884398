"""Checks of the optimizers that several ranks make together, each against a plain version of the same step.

    torchrun --standalone --nproc_per_node=8 tests/distributed_checks.py FOLDER

First it makes a whole run of train_gpt.py, with the settings that it finds in the environment. Then it makes
every check below and leaves FOLDER/results.json: a check's name, and null or what was found wrong.
test_optimizers.py starts it, and makes the checks of LOCAL_CHECKS in one process without it.
"""

import json
import os
import sys
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import SMALL, fresh_model

import train_gpt

CHECKS, LOCAL_CHECKS = {}, {}  # LOCAL_CHECKS also mean something in a world of one


def check(function, local=False):
    CHECKS[function.__name__] = function
    if local:
        LOCAL_CHECKS[function.__name__] = function
    return function


def local_check(function):
    return check(function, local=True)


# ---------------------------------------------------------------------------------------------------
# The plain versions: one process, whole tensors, float64


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
        self.param, self.lr = param.detach().double().clone(), lr
        self.buffer = torch.zeros_like(self.param)

    def step(self, grad, lr_scale, momentum):
        grad = grad.double()
        self.buffer = momentum * self.buffer + (1 - momentum) * grad
        update = (1 - momentum) * grad + momentum * self.buffer
        rows, cols = update.shape[1:]
        for i, matrix in enumerate(update):
            self.param[i] -= self.lr * lr_scale * max(1, rows / cols) ** 0.5 * plain_orthogonal(matrix)


class PlainAdam:
    """m and v the running averages: lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)."""

    def __init__(self, param, lr, betas, eps):
        self.param, self.lr, self.betas, self.eps, self.t = param.detach().double().clone(), lr, betas, eps, 0
        self.mean, self.square = torch.zeros_like(self.param), torch.zeros_like(self.param)

    def step(self, grad, lr_scale, momentum):
        grad, (beta1, beta2), self.t = grad.double(), self.betas, self.t + 1
        self.mean = beta1 * self.mean + (1 - beta1) * grad
        self.square = beta2 * self.square + (1 - beta2) * grad**2
        correction = (1 - beta2**self.t) ** 0.5 / (1 - beta1**self.t)
        self.param -= self.lr * lr_scale * correction * self.mean / (self.square.sqrt() + self.eps)


# ---------------------------------------------------------------------------------------------------
# What the checks share

SCHEDULE = [(1.0, 0.85), (0.7, 0.88), (0.4, 0.91), (0.1, 0.95)]  # (lr_scale, momentum) of the steps
MATRICES = dict(five_tall=(5, 6, 4), seven_wide=(7, 3, 8), one_square=(1, 4, 4), sixteen=(16, 8, 2))
VECTORS = dict(seven=(7, 3), one=(1, 5), twelve=(12, 5), stacked=(3, 2, 4))
MULTIPLES = dict(
    five_tall=1.0, seven_wide=2.0, one_square=1.0, sixteen=0.5, seven=75.0, one=1.0, twelve=5.0, stacked=75.0
)


def random_grad(shape, *seed, whole=False):
    """A gradient that every rank can draw for any rank; whole numbers average exactly in bfloat16."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    if whole:
        return torch.randint(-15, 16, shape, generator=generator).float()
    return torch.randn(shape, generator=generator) + seed[-1] / 4


def from_all_ranks(x, world_size):
    if world_size == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x)
    return parts


def differing_bits(params, world_size):
    """Names of parameters that are not bit for bit the same on every rank."""
    found = []
    for name, p in params.items():
        parts = from_all_ranks(p.detach().contiguous().flatten().view(torch.uint8), world_size)
        found += [name] * any(not torch.equal(parts[0], part) for part in parts[1:])
    return found


def run_against_plain(shapes, make, plain, rank, world_size, dtype=torch.float32):
    """Steps of an optimizer, and of plain ones on the average gradient: (shards, plain ones, differing).

    make(params) builds the optimizer from name -> (parameter, multiple); plain(param, multiple) a plain one.
    """
    params = {
        name: torch.nn.Parameter(random_grad(shape, i, 99, 0).to(dtype))
        for i, (name, shape) in enumerate(shapes.items())
    }
    references = {name: plain(p, MULTIPLES[name]) for name, p in params.items()}
    optimizer, differing = make({name: (p, MULTIPLES[name]) for name, p in params.items()}), []
    for step, (lr_scale, momentum) in enumerate(SCHEDULE):
        for i, (name, p) in enumerate(params.items()):
            whole = dtype is torch.bfloat16
            grads = [random_grad(p.shape, i, step, r, whole=whole) for r in range(world_size)]
            p.grad = grads[rank].to(dtype)
            references[name].step(sum(grad.double() for grad in grads) / world_size, lr_scale, momentum)
        train_gpt.optimizer_step([optimizer], lr_scale=lr_scale, momentum=momentum)
        differing += [(step, name) for name in differing_bits(params, world_size)]
    return optimizer.shards, references, differing


def own_part(whole, shard, rank):
    """The rows of a plain tensor that a rank owns, with rows of zeros behind the last."""
    rows = whole.view(-1, *shard.own.shape[1:])
    size = len(shard.own)
    own = torch.zeros(shard.own.shape, dtype=torch.float64)
    mine = rows[rank * size : (rank + 1) * size]
    own[: len(mine)] = mine
    return own


def assert_close(found, expected, what, rtol=0.0, atol=2e-5):
    difference = (found.double() - expected).abs() - rtol * expected.abs()
    assert difference.max() <= atol, f"{what}: off by {difference.max():.3g}"


def muon(rank, world_size):
    def make(params):
        return train_gpt.Muon(params, rank, world_size, 0.05, train_gpt.newton_schulz, torch.float32)

    return make, lambda p, multiple: PlainMuon(p, 0.05 * multiple)


def adam(rank, world_size, eps=0.05):
    """Such an eps shows where it joins, and that gradients are averaged, not summed."""

    def make(params):
        return train_gpt.DistAdam(params, rank, world_size, 0.008, (0.8, 0.95), eps)

    return make, lambda p, multiple: PlainAdam(p, 0.008 * multiple, (0.8, 0.95), eps)


def small_model(**changes):
    s = replace(train_gpt.Settings(), **{**SMALL, "vocab_multiple": 1, **changes})
    return fresh_model(s, seed=1), s


def step_on_random_grads(model, optimizers, rank, step):
    for i, p in enumerate(model.parameters()):
        p.grad = random_grad(p.shape, i, step, rank).to(p.dtype)
    lr_scale, momentum = SCHEDULE[step % len(SCHEDULE)]
    train_gpt.optimizer_step(optimizers, lr_scale=lr_scale, momentum=momentum)


# ---------------------------------------------------------------------------------------------------
# The checks


@local_check
def muon_steps_like_one_plain_process(rank, world_size):
    shards, references, differing = run_against_plain(MATRICES, *muon(rank, world_size), rank, world_size)
    assert not differing, f"ranks differ at (step, name) {differing}"
    for shard in shards:
        reference = references[shard.name]
        assert_close(shard.param.detach(), reference.param, shard.name)
        buffer = own_part(reference.buffer, shard, rank)
        assert_close(shard.state["momentum"], buffer, f"momentum of {shard.name}")


@local_check
def adam_steps_like_one_plain_process(rank, world_size):
    shards, references, differing = run_against_plain(VECTORS, *adam(rank, world_size), rank, world_size)
    assert not differing, f"ranks differ at (step, name) {differing}"
    for shard in shards:
        reference = references[shard.name]
        assert_close(shard.param.detach(), reference.param, shard.name)
        for name in ("mean", "square"):
            expected = own_part(getattr(reference, name), shard, rank)
            assert_close(shard.state[name], expected, f"{name} of {shard.name}")


@local_check
def adam_keeps_bfloat16_state_for_bfloat16_tables(rank, world_size):
    shards, references, differing = run_against_plain(
        VECTORS, *adam(rank, world_size, eps=1.0), rank, world_size, dtype=torch.bfloat16
    )
    assert not differing, f"ranks differ at (step, name) {differing}"
    for shard in shards:
        reference = references[shard.name]
        assert shard.param.dtype == torch.bfloat16
        assert_close(shard.param.detach(), reference.param, shard.name, rtol=0.03, atol=0.03)
        for name in ("mean", "square"):
            assert shard.state[name].dtype == torch.bfloat16
            expected = own_part(getattr(reference, name), shard, rank)
            assert_close(shard.state[name], expected, f"{name}, {shard.name}", rtol=0.03, atol=0.03)


@check
def a_whole_model_stays_the_same_on_every_rank(rank, world_size):
    model, s = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = train_gpt.make_optimizers(model, s, rank, world_size)
    for step in range(3):
        step_on_random_grads(model, optimizers, rank, step)
        differing = differing_bits(dict(model.named_parameters()), world_size)
        assert not differing, f"ranks differ after step {step + 1} in {differing}"
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"not moved at all: {still}"


@check
def a_rank_keeps_state_for_its_own_rows_alone_and_padding_stays_zero(rank, world_size):
    makers = [(MATRICES, *muon(rank, world_size)), (VECTORS, *adam(rank, world_size))]
    all_shards = [run_against_plain(*maker, rank, world_size)[0] for maker in makers]
    padded = 0
    for shards, row_dims in zip(all_shards, (2, 1)):
        for shard in shards:
            row = shard.param.shape[-row_dims:].numel()
            per_rank = -(-shard.param.numel() // row // world_size)
            sizes = {x.numel() for x in shard.state.values() if x.ndim}
            assert sizes == {per_rank * row}, f"{shard.name}: state of {sizes}, not {per_rank * row}"
            behind = shard.rows.flatten()[shard.param.numel() :]
            padded += len(behind)
            assert not behind.any(), f"{shard.name}: padding {behind}"
            missing = max(0, min(per_rank, (rank + 1) * per_rank - shard.param.numel() // row))
            for name, x in shard.state.items():
                if x.ndim and missing:
                    assert not x[-missing:].any(), f"{name} of {shard.name}: padding {x[-missing:]}"
    assert padded


@check
def collectives_a_step_do_not_grow_with_the_blocks(rank, world_size):
    group = dist.distributed_c10d._get_default_group()
    counts = {}
    four = dict(num_layers=4, skip_attn="", value_embeds="0120", window_pattern="LSSL")
    for num_layers, changes in ((4, four), (12, {})):
        model, s = small_model(**changes)
        optimizers = train_gpt.make_optimizers(model, s, rank, world_size)
        before = group._get_sequence_number_for_group()  # counts the collectives of every kind
        step_on_random_grads(model, optimizers, rank, 0)
        counts[num_layers] = group._get_sequence_number_for_group() - before
    tensors = len(list(model.parameters()))
    assert counts[4] == counts[12] == 2 * tensors, f"by number of blocks {counts}, {tensors} tensors"


@check
def the_head_is_on_its_way_before_the_backward_pass_ends(rank, world_size):
    model, s = small_model()
    optimizers = train_gpt.make_optimizers(model, s, rank, world_size)
    (head,) = (shard for optimizer in optimizers for shard in optimizer.shards if shard.name == "lm_head")
    sent = []
    model.embed.register_post_accumulate_grad_hook(lambda _: sent.append(head.work is not None))
    tokens = torch.randint(s.bos_id, (65,), generator=torch.Generator().manual_seed(rank)).numpy()
    batch = train_gpt.make_batch(tokens, [0, 20], 128, 44, torch.device("cpu"))
    with train_gpt.reducing_head(optimizers):
        model(*batch, (12, 4)).backward()
    own = head.sent.clone()
    assert sent == [True] and own.any()
    train_gpt.optimizer_step(optimizers, lr_scale=0.0, momentum=0.9)
    total = sum(from_all_ranks(own, world_size)) / world_size
    mean = own_part(total.double(), head, rank)
    assert_close(head.state["mean"], (1 - s.adam_beta1) * mean, "first moment of the head", atol=1e-6)


@check
def all_ranks_take_the_first_kernel_that_agrees_on_each_of_them(rank, world_size):
    last = world_size - 1
    candidates = [("here and there", dict, lambda _: 1.0 if rank == last else 0.0, 0.5),
                  ("raises on one", dict, lambda _: 1 / (last - rank), 2.0),
                  ("everywhere", dict, lambda _: rank / world_size, 1.0),
                  ("later", dict, lambda _: 0.0, 1.0)]
    _, name, why = train_gpt.first_that_agrees(candidates, "plain", torch.device("cpu"))
    other = "1.0e+00 from plain PyTorch on a small case, more than 0.5; raises on one: ZeroDivisionError"
    expected = other if rank == last else "failed on another rank; raises on one: "
    assert name == "everywhere" and f"here and there: {expected}" in why, why
    assert why.startswith(f"{last / world_size:.1e} from plain"), why


@check
def all_ranks_take_the_tiles_that_rank_0_has_found_fastest(rank, world_size):
    asked, real, attn, mlp = [], train_gpt.fastest_tile, -(-44 // world_size), -(-22 // world_size)

    def fastest_tile(stack, *_):
        asked.append(stack)
        return train_gpt.TILES[len(asked)] if works else 1 / 0

    s = replace(small_model()[1], model_dim=128, mlp_dim=256)
    train_gpt.fastest_tile = fastest_tile
    try:
        works = True
        tiles, _ = train_gpt.choose_tiles(s, torch.device("cpu"))
        works = False
        none, why = train_gpt.choose_tiles(s, torch.device("cpu"))
    finally:
        train_gpt.fastest_tile = real
    stacks = [(attn, 128, 128), (mlp, 128, 128), (mlp, 128, 256)]
    assert tiles == dict(zip(stacks, train_gpt.TILES[1:])), tiles
    assert asked == ([*stacks, stacks[0]] if rank == 0 else []), asked
    assert none == {} and why == "not timed: ZeroDivisionError, division by zero", why


threads_after_run = []  # names; none where there is no /proc


@check
def a_run_ends_the_threads_of_its_process_group(rank, world_size):
    """One that outlives the interpreter may abort a run that went well."""
    assert not [name for name in threads_after_run if "gloo" in name], threads_after_run


def main(folder):
    if train_gpt.main([]):
        return 1
    threads_after_run.extend(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    world = train_gpt.World.from_environ(os.environ)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world.size),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, function in CHECKS.items():
        found = None
        try:
            function(world.rank, world.size)
        except Exception:
            found = f"rank {world.rank}: {traceback.format_exc()}"
        by_rank = [None] * world.size
        dist.all_gather_object(by_rank, found)
        results[name] = next(filter(None, by_rank), None)
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
