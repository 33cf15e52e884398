"""The same as the published record 30: its figures on canonical weights and tokens, by train_gpt.py.

golden/record30.json has what the published script (modded-nanogpt, 2025-09-05_SkipMLPBlocks) gives on a CPU
in float32, with attention as a masked softmax, without compilation and float8: losses, norms of gradients and
of parameters, ten optimizer steps at width 256, and hashes of 75 microbatches.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, stage_of, training_loss, write_shard

import train_gpt

GOLDEN = json.loads((ROOT / "tests/golden/record30.json").read_text(encoding="utf-8"))
NUM_TOKENS = 1024


def canonical(name, scale, *shape):
    """scale sin(0.7390851 i + k) cos(0.0173 i + 0.5 k), with k from the name, computed in float64."""
    k = 7919 * sum(map(ord, name)) % 100_003
    i = np.arange(np.prod(shape), dtype=np.float64)
    values = scale * np.sin(0.7390851 * i + k) * np.cos(0.0173 * i + 0.5 * k)
    return torch.from_numpy(values.astype(np.float32)).view(shape)


def tokens_of(seed):
    """The inputs, the targets, and where documents begin."""
    i = np.arange(NUM_TOKENS + 1)
    ids = (31 * i**2 + 17 * i * seed + 7 * seed) % 997 * (1 + i // 97 % 5) % 50_256
    ids[::311] = 50_256
    return train_gpt.make_batch(ids.astype(np.uint16), i[:NUM_TOKENS:311], 128, NUM_TOKENS)


class Canonical:
    """The model with canonical weights, and its parameters by the published script's names."""

    def __init__(self):
        self.s = replace(train_gpt.Settings(), model_dim=256, num_heads=2, mlp_dim=1024, dtype="float32",
                         batch_tokens=(NUM_TOKENS,), microbatches=1, num_iterations=10,
                         val_slice_tokens=NUM_TOKENS)
        self.model = train_gpt.GPT(self.s, train_gpt.Kernels())
        train_gpt.init_weights(self.model, 0)
        for name, x in self.parts(lambda p: p.data).items():
            self.fill(name, x)

    def parts(self, of):
        """name -> of(parameter), or of those of its rows that belong to it."""
        model, s = self.model, self.s
        dim = s.model_dim
        found = dict(embed=of(model.embed), head=of(model.lm_head), scalars=of(model.scalars))
        tables = of(model.value_embeds).view(3, -1, dim)
        found |= {f"ve{i}": table for i, table in enumerate(tables)}
        words = s.layout.split()
        with_attention = [i for i, word in enumerate(words) if "A" in word]
        for number, block in enumerate(with_attention):
            found[f"qkvo{block}"] = of(model.attn_bank)[4 * number:4 * number + 4]
            found[f"gate{block}"] = of(model.gate_bank)[number]
        for number, block in enumerate(i for i, word in enumerate(words) if "M" in word):
            found[f"fc{block}"] = of(model.mlp_bank)[2 * number]
            found[f"proj{block}"] = of(model.mlp_bank)[2 * number + 1]
        return found

    def fill(self, name, x):
        if name.startswith("qkvo"):
            for part, letter in zip(x, "qkvo"):
                part.copy_(canonical(letter + name[4:], 0.05, *part.shape))
        elif name == "scalars":  # published: 12 skip weights, block i >= 6 takes the (i - 6)th; then pairs
            given = canonical("scalars", 0.1, 60)
            x[6:, 0] += given[:6]
            x[:6, 0] += given[6:12]  # not used
            x[:, 1:3] += given[12:36].view(12, 2)
            x[:, 3:5] += given[36:60].view(12, 2)
        else:
            scales = dict(embed=1.0, head=0.02, gate=0.3, fc=0.05, proj=0.05, ve=1.0)
            scale = scales[name.rstrip("0123456789")]
            x.copy_(canonical(name, scale, *x.shape))

    def stage(self, long):
        return stage_of(self.s, 128 * long, long // 2 * 128)


def norms(parts):
    return {name: x.norm().item() for name, x in parts.items()}


@pytest.fixture(scope="module")
def run():
    return Canonical()


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_record_30(run):
    for long in (3, 7):
        run.model.zero_grad()
        loss = training_loss(run.model, tokens_of(1), run.stage(long))
        assert loss.item() == pytest.approx(GOLDEN["math"][f"train_loss_sum_ws{long}"], rel=2e-7)
        loss.backward()
        found = norms(run.parts(lambda p: p.grad))
        assert found == pytest.approx(GOLDEN["math"][f"grad_norm_ws{long}"], rel=2e-4)
    with torch.no_grad():
        loss = run.model(*tokens_of(1), run.stage(3)) / NUM_TOKENS
    assert loss.item() == pytest.approx(GOLDEN["math"]["eval_loss_mean_ws3"], rel=2e-7)


@pytest.mark.slow
def test_ten_optimizer_steps_are_those_of_record_30(run):
    run = Canonical()
    optimizer = train_gpt.make_optimizer(run.model, 0, 1)
    losses = []
    for step in train_gpt.make_schedule(run.s)[:10]:
        step = step._replace(stage=run.stage(3))
        status = train_gpt.train_step(run.model, optimizer, iter([tokens_of(step.number + 1)]), step)
        losses.append(status.values[0].item())
        if step.number == 0:
            found = norms(run.parts(lambda p: p.data))
            for name, norm in GOLDEN["math"]["param_norm_after_1"].items():
                # a gate is nearly singular, and so sensitive to rounding when it is orthogonalised
                assert found[name] == pytest.approx(norm, rel=5e-3 if "gate" in name else 2e-4), name
    assert losses == pytest.approx(GOLDEN["math"]["loss_per_token_steps"], rel=1e-3)
    found = norms(run.parts(lambda p: p.data))
    for name, norm in GOLDEN["math"]["param_norm_after_10"].items():
        assert found[name] == pytest.approx(norm, rel=5e-2 if "gate" in name else 2e-3), name


def short_hash(x):
    return hashlib.sha256(x.numpy().astype(np.int64).tobytes()).hexdigest()[:16]


def test_75_microbatches_are_those_of_record_30(tmp_path):
    for k in (1, 2, 3):
        rng = np.random.default_rng(k)
        tokens = rng.integers(0, 50_256, 50_000).astype(np.uint16)
        place = 0
        while place < 50_000:
            tokens[place] = 50_256
            place += rng.integers(20, 900)
        write_shard(tmp_path / f"fineweb_train_{k:06}.bin", tokens)
    compared = 0
    for key, expected in GOLDEN["loader"].items():
        world_size, grad_accum, rank = (int(x) for x in key[1:].replace("ga", " ").replace("r", " ").split())
        s = replace(train_gpt.Settings(), batch_tokens=(8192,), microbatches=world_size * grad_accum,
                    max_seq_len=(512,), num_iterations=3, data_path=str(tmp_path),
                    train_files="fineweb_train_*.bin")
        shards, schedule = train_gpt.open_shards(s, "train_files"), train_gpt.make_schedule(s)
        plan = train_gpt.plan_packing(shards, s, schedule, s.microbatches)
        numbers = train_gpt.microbatches_of_rank(plan, 0, rank, world_size)
        batches = train_gpt.train_batches(plan, numbers, CPU)
        for batch, figures in zip(batches, expected, strict=True):
            documents = int((batch.cu_seqlens < len(batch.inputs)).sum())
            assert [short_hash(batch.inputs), short_hash(batch.targets), documents] == figures
            compared += 1
    assert compared == 75
