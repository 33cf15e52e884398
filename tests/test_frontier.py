"""PRESET=frontier beyond its figures: starting values, settings, and small runs, killed and on ranks."""

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, before, environment, fresh_model, ran, random_documents, write_shard
from test_checkpoints import checkpoints, content, kept_aside, losses
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt

RACE = replace(train_gpt.Settings(), **train_gpt.PRESETS["frontier"])
# Stages from steps 0, 3, 5 and 8; tied up to step 7, so that head and embedding part at step 9, the last.
TINY = dict(
    model_dim=32, num_heads=4, mlp_dim=64, vocab_size=257, vocab_multiple=8, bos_id=256, dtype="float32",
    torch_compile=False, device="cpu", num_iterations=10, extension_steps=2, microbatches=8,
    batch_tokens=(128, 256, 384, 384), max_seq_len=(16, 40, 40, 40), window_block=4, val_tokens=64,
    val_slice_tokens=32, val_loss_every=4, target_loss=0.0, warmup_steps=0, checkpoint_every=1,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "train_0.bin", np.concatenate(random_documents(1, 400, vocab_size=257, bos=256)))
    write_shard(folder / "val_0.bin", np.concatenate(random_documents(2, 40, vocab_size=257, bos=256)))
    files = dict(data_path=str(folder), train_files="train_*.bin", val_files="val_*.bin")
    return replace(RACE, **TINY | files)


@pytest.fixture
def s(shared, tmp_path):
    return replace(shared, log_dir=str(tmp_path / "logs"))


# ---- Starting values and settings


def test_starting_values_are_those_of_record_82():
    s = replace(RACE, vocab_size=3000, dtype="float32", batch_tokens=(1024,), val_slice_tokens=1024)
    model = fresh_model(s)
    dim = s.model_dim
    assert torch.equal(model.lm_head, model.embed) and model.lm_head.dtype == torch.float32
    for p, std in ((model.lm_head, 0.005), (model.value_embeds, 0.01)):
        assert p.std().item() == pytest.approx(std, rel=0.01) and abs(p.mean().item()) < 0.01 * std
        assert p.abs().max() > 3.5 * std, "a normal distribution"
    bound = 3**0.5 * 0.5 * dim**-0.5
    for p, most in ((model.qk_bank, bound), (model.vo_bank, bound), (model.mlp_bank[::2], bound),
                    (model.mudd_in, dim**-0.5)):
        assert 0.99 * most < p.abs().max() <= most
        assert p.std().item() == pytest.approx(most / 3**0.5, rel=0.01)
    zero = ("bigram_embed", "attn_gates", "value_gates", "smear_gate", "skip_gate", "smear_factor",
            "x0_factors", "own_value_strengths", "mudd_out")
    assert not any(getattr(model, name).any() for name in zero) and not model.mlp_bank[1::2].any()
    root = 1.1**0.5
    starts = dict(qkv_factors=0.5, out_factors=1.0, skip_factor=-1.5, post_factors=1.0, resid_factors=root,
                  bigram_factors=0.05)
    for name, start in starts.items():
        p = getattr(model, name)
        assert torch.equal(p, torch.full_like(p, start)), name
    effective = [0, 0, 0, 0, 0, 0, 2, 2, root, 1, 0, 0.05, root, 1, 0, -0.5, 0, 0, 0]
    assert (0.1 * model.mudd_bias).tolist() == pytest.approx(effective)


def test_tables_have_the_dtype_of_activations_and_all_else_is_float32():
    with torch.device("meta"):
        optimizer = train_gpt.make_optimizer(train_gpt.FrontierGPT(RACE, train_gpt.Kernels()), 0, 1)
    for sp in optimizer.sharded_params:
        expected = torch.bfloat16 if sp.name in ("value_embeds", "bigram_embed") else torch.float32
        assert {x.dtype for x in (sp.param, *sp.state.values())} == {expected}, sp.name
        assert sp.row.rule.every == (1 if sp.name.endswith("bank") else 2)


@pytest.mark.parametrize("changes, expected", [
    (dict(LAYOUT="AM"), "LAYOUT: expected no value, since NETWORK=frontier does not read it, found 'AM'"),
    (dict(ADAM_BETA1="0.9"), "ADAM_BETA1: expected no value, since NETWORK=frontier "),
    (dict(NETWORK="gpt", TOKEN_WEIGHTS="1,1"), "TOKEN_WEIGHTS: expected no value, since NETWORK=gpt "),
    (dict(NETWORK="other"), "NETWORK: expected gpt or frontier, found 'other'."),
    (dict(NUM_HEADS="3"), "NUM_HEADS: expected an even number, "),
    (dict(MODEL_DIM="8", NUM_HEADS="2"), "MODEL_DIM: expected at least 12, "),
    (dict(NUM_ITERATIONS="10"), "EXTENSION_STEPS: expected below NUM_ITERATIONS=10, found 10."),
])
def test_settings_that_the_network_does_not_read_or_cannot_take_are_refused(changes, expected):
    with pytest.raises(train_gpt.UserError) as error:
        train_gpt.read_settings({"PRESET": "frontier"} | changes)
    assert expected in str(error.value)


# ---- Small runs


def run_of(s, folder, *faults, **more):
    ran(replace(s, log_dir=str(folder)), *faults, **more)
    return folder


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory):
    """A run that nothing happened to; all its checkpoints are kept aside."""
    return run_of(shared, tmp_path_factory.mktemp("whole") / "logs", kept_aside)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_last_pair_of_steps_bit_for_bit(s, whole, tmp_path):
    """Across the borders of stages and the untying. A checkpoint is due after each step, and is written after
    every second one, when no gradient waits."""
    kept = sorted(whole.glob("*/step_*.kept"))
    assert [path.stem for path in kept] == [f"step_{step:06}" for step in (2, 4, 6, 8, 10)]
    for path in kept[:-1]:
        own = tmp_path / path.stem
        (own / "before").mkdir(parents=True)
        shutil.copy(path, own / "before" / f"{path.stem}.safetensors")
        run_of(replace(s, resume="auto"), own)
        step = int(path.stem[-6:])
        expected = {key: loss for key, loss in losses(whole).items() if key > (step, "train")}
        assert losses(own) == expected and content(own) == content(whole), step


def asked_to_stop(rank):
    """SIGTERM in the third step."""
    def stop(model, batch, step):
        if step.number == 2:
            signal.raise_signal(signal.SIGTERM)

    before(train_gpt.FrontierGPT, "training_loss", stop)


def test_a_stop_finishes_the_pair_of_steps_first(s, whole):
    run = Run(s, asked_to_stop)
    assert run.wait() == [143]
    assert "stopped by SIGTERM after step 4 of 10" in run.text()
    assert checkpoints(s.log_dir)[0].stem == "step_000004"
    ran(replace(s, resume="auto"))
    assert losses(s.log_dir) == losses(whole) and content(s.log_dir) == content(whole)


@pytest.mark.slow
def test_a_run_on_several_ranks_is_that_of_one_up_to_rounding(s, whole, tmp_path):
    one = {key: float(loss) for key, loss in losses(whole).items()}
    assert len(one) == 10 + 4
    for ranks in (2, 8):
        folder = run_of(s, tmp_path / f"{ranks}", ranks=ranks)
        found = {key: float(loss) for key, loss in losses(folder).items()}
        assert found == pytest.approx(one, abs=2e-3), ranks


@pytest.mark.slow
def test_the_warm_up_is_undone_with_the_gradients_that_wait(s, whole, tmp_path):
    folder = run_of(replace(s, warmup_steps=8), tmp_path / "warm")
    assert losses(folder) == losses(whole) and content(folder) == content(whole)


def tells_how_many_tokens_the_loss_has(rank):
    """In the warm-up and in training."""
    before(train_gpt.FrontierGPT, "training_loss", lambda model, batch, step: print(
        f"weights: {len(step.token_weights)}"))


def test_the_warm_up_compiles_the_loss_that_training_takes(s):
    shown = ran(replace(s, warmup_steps=4, checkpoint_every=0), tells_how_many_tokens_the_loss_has)
    assert "warm-up steps" in shown and {*re.findall(r"weights: (\d+)", shown)} == {"3"}


def test_head_and_embedding_part_after_the_untying(whole):
    parted = {}
    for path in whole.glob("*/step_*.kept"):
        tensors, _ = train_gpt.read_safetensors(path)
        parted[path.stem] = not torch.equal(tensors["lm_head"], tensors["embed"])
    assert parted == {f"step_{step:06}": step == 10 for step in (2, 4, 6, 8, 10)}


def test_the_tool_that_samples_reads_a_checkpoint_of_this_network(whole):
    arguments = checkpoints(whole)[0], "--prompt", "def", "--length", 20
    command = [sys.executable, ROOT / "records" / "sample.py", *arguments]
    done = subprocess.run(map(str, command), capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and done.stdout.startswith("def"), done.stderr


# ---- Compiled, and in bfloat16


def small_case(dtype):
    """A network away from the zeros that hide gradients, a batch, and its step."""
    s = replace(RACE, **TINY | dict(dtype=dtype, batch_tokens=(64,), microbatches=1, val_slice_tokens=64))
    model = fresh_model(s)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += (0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))).to(p)
    tokens = np.random.default_rng(0).integers(0, 257, 65).astype(np.uint16)
    return model, train_gpt.make_batch(tokens, [0, 20, 50], 16, 40), train_gpt.make_schedule(s)[1]


def loss_and_gradients(model, batch, step):
    model.zero_grad()
    loss, _ = model.training_loss(batch, step)
    loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters()} | dict(loss=loss.detach())


def test_compiled_without_a_graph_break_it_is_the_same():
    model, batch, step = small_case("float32")
    expected = loss_and_gradients(model, batch, step)
    model.hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend="aot_eager")
    found = loss_and_gradients(model, batch, step)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_adam_compiled_is_one_graph_whatever_the_step():
    """And it is the same. The head's and the tables' are compiled on a GPU."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train_gpt.cautious_adam, backend=counter, fullgraph=True, dynamic=False)
    rule = train_gpt.frontier_adam(RACE, 75, (0.75, 0.95), 5)
    p, q = (torch.full((6, 4), 0.5) for _ in range(2))
    state, other = rule.init_state(p), rule.init_state(q)
    for number in range(1, 9, 2):
        step = train_gpt.Step(number, None, 1 - number / 10, 0.95)
        grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        rule.update(p, grad.clone(), state, step)
        rule._replace(cautious_adam=compiled).update(q, grad.clone(), other, step)
        torch.testing.assert_close(q, p)
    assert counter.frame_count == 1 and not torch.equal(p, torch.full((6, 4), 0.5))


def test_in_bfloat16_it_is_the_same_up_to_rounding():
    """All activations are bfloat16: where one was not, a product would fail."""
    model, batch, step = small_case("bfloat16")
    x = model.hidden(batch.inputs, batch.cu_seqlens, batch.max_seqlen, step.stage)
    assert x.dtype == torch.bfloat16
    found = loss_and_gradients(model, batch, step)
    wide, batch, step = small_case("float32")
    for p, q in zip(wide.parameters(), model.parameters()):
        p.data.copy_(q)
    expected = loss_and_gradients(wide, batch, step)
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-3)
    for name in ("lm_head", "embed", "value_embeds", "bigram_embed", "qk_bank", "vo_bank", "mlp_bank"):
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, (name, error)
