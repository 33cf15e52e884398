"""On a GPU: attention against a brute-force mask, and a compiled model with the kernels chosen there."""

from dataclasses import replace

import pytest
import torch

import train_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
GPU = torch.device("cuda")


def attention_by_mask(q, k, v, starts, window, scale):
    """Attention in float64 with a mask made pair by pair; (T, H, K)."""
    places = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(starts, places.int(), right=True)
    back = places[:, None] - places
    seen = (back >= 0) & (back <= window) & (document[:, None] == document)
    scores = scale * torch.einsum("ihk,jhk->hij", q, k).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhk->ihk", scores.softmax(-1), v)


@pytest.fixture(scope="module")
def chosen():
    """The speedrun's kernels, and the lines about them. Activates FlashAttention 3 where it is installed."""
    return train_gpt.choose_kernels(GPU, train_gpt.Settings())


@pytest.mark.parametrize("window", [1, 7, 64, 128, 300, 5000])
def test_attention_is_that_of_the_mask(window, chosen):
    generator = torch.Generator(GPU).manual_seed(window)
    q, k, v, dy = torch.randn(4, 1000, 6, 128, generator=generator, device=GPU).bfloat16()
    starts = torch.tensor([0, 1, 130, 400, 401, 999, 1000, 1000], dtype=torch.int32, device=GPU)
    results = []
    for exact in (False, True):
        leaves = [(x.double() if exact else x).detach().requires_grad_() for x in (q, k, v)]
        if exact:
            y = attention_by_mask(*leaves, starts, window, 0.12)
        else:
            args = train_gpt.varlen_args(starts, 1000, window, 600, torch.bfloat16)
            y = train_gpt.flash_attention(*leaves, args, 0.12)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for found, exact in zip(*results):
        assert (found.double() - exact).norm() < 0.01 * max(exact.norm(), 0.1 * dy.norm())


def test_every_kernel_of_a_recent_gpu_is_a_fast_one(chosen):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("an older GPU")
    kernels, lines = chosen
    assert all(fast is not plain for fast, plain in zip(kernels[:5], train_gpt.Kernels())), lines
    assert kernels.head_loss == train_gpt.float8_softcapped_loss, lines


def test_record_82_takes_a_fast_kernel_of_each_kind(chosen, monkeypatch):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("an older GPU")
    everything = train_gpt.list_candidates

    def but_for_blocks(*case):
        return [candidate for candidate in everything(*case) if candidate.kind != "blocks"]

    monkeypatch.setattr(train_gpt, "list_candidates", but_for_blocks)  # they take a minute to compile
    _, lines = train_gpt.choose_kernels(GPU, replace(train_gpt.Settings(), **train_gpt.PRESETS["frontier"]))
    assert "Adam: torch.compile; " in "\n".join(lines) and "much slower" not in "\n".join(lines)


@pytest.mark.parametrize("fp8_head, loss_tolerance, tolerance", [(False, 1e-3, 0.05), (True, 3e-3, 0.2)])
def test_the_compiled_model_agrees_with_the_plain_one(fp8_head, loss_tolerance, tolerance, chosen):
    s = train_gpt.Settings(model_dim=256, num_heads=2, mlp_dim=512, batch_tokens=(8 * 2048,),
                           layout="A AM M AM", value_embeds="01.0", window_pattern="LSSL")
    head_loss = chosen[0].head_loss if fp8_head else torch.compile(train_gpt.softcapped_loss)
    stage = train_gpt.make_stages(s)[0]  # windows of 384 and 128
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(s.vocab_size, (2049,), generator=generator).numpy()
    batch = train_gpt.make_batch(tokens, [0, 5, 700, 1500], 128, 1000).to(GPU)
    results = []
    for kernels in (chosen[0]._replace(head_loss=head_loss), train_gpt.Kernels()):
        model = train_gpt.GPT(s, kernels)
        train_gpt.init_weights(model, 0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype))
        model.to(GPU)
        if kernels.compiled:
            train_gpt.compile_blocks(model)
        loss, _ = model.training_loss(batch, train_gpt.Step(0, stage, 1.0, 0.0))
        loss.backward()
        results.append((loss.item(), model.attn_bank.grad))
    (loss, grad), (plain_loss, plain_grad) = results
    assert loss == pytest.approx(plain_loss, rel=loss_tolerance)
    assert ((grad - plain_grad).norm() / plain_grad.norm()).item() < tolerance
