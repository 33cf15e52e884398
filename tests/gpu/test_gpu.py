"""On a GPU: each attention against a brute-force mask, and a compiled model with the kernels chosen there."""

import pytest
import torch

import train_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
GPU = torch.device("cuda")


def by_mask(q, k, v, starts, window, scale):
    """Attention in float64 with a mask made pair by pair; (T, H, K)."""
    places = torch.arange(len(q), device=q.device)
    piece = torch.searchsorted(starts, places.int(), right=True)
    back = places[:, None] - places
    seen = (back >= 0) & (back <= window) & (piece[:, None] == piece)
    scores = scale * torch.einsum("ihk,jhk->hij", q, k).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhk->ihk", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [0, 1, 7, 64, 128, 300, 5000])
@pytest.mark.parametrize("padding", [0, 300])  # FlashAttention 4 has other kernels for more than 256 pieces
@pytest.mark.parametrize("package, generations, make", [
    ("flash_attn_interface", [9], lambda: train_gpt.varlen_kernels("FA3")),
    ("flash_attn.cute", [9, 10, 11], train_gpt.flash_attention_4_kernels),
    ("torch", range(8, 99), train_gpt.varlen_kernels),
])
def test_attention_is_that_of_the_mask(package, generations, make, padding, window):
    pytest.importorskip(package)
    if torch.cuda.get_device_capability()[0] not in generations:
        pytest.skip("another generation of GPU")
    kernels = make()
    generator = torch.Generator(GPU).manual_seed(window)
    q, k, v, dy = torch.randn(4, 1000, 6, 128, generator=generator, device=GPU).bfloat16()
    starts = [0, 1, 130, 400, 401, 999, 1000, 1000] + padding * [1000]
    starts = torch.tensor(starts, dtype=torch.int32, device=GPU)
    results = []
    for exact in (False, True):
        leaves = [(x.double() if exact else x).detach().requires_grad_() for x in (q, k, v)]
        if exact:
            y = by_mask(*leaves, starts, window, 0.12)
        else:
            plan = kernels["attention_plan"](starts, 1000, window, torch.bfloat16, 600)
            y = kernels["attention"](*leaves, plan, 0.12)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for found, exact in zip(*results):  # a token that sees itself alone has no gradient by q and k
        assert (found.double() - exact).norm() < 0.01 * max(exact.norm(), 0.1 * dy.norm())


def test_every_kind_of_kernel_has_a_fast_one_on_a_recent_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("an older GPU")
    kernels, reasons = train_gpt.choose_kernels(GPU, train_gpt.Settings())
    plain = train_gpt.plain_kernels()
    assert all(a is not b for a, b in zip(kernels, plain)), reasons


def test_the_fastest_tile_is_one_that_this_gpu_can_do():
    times = train_gpt.time_tiles((3, 768, 1536), torch.bfloat16, GPU)
    assert train_gpt.TILES[0] in times and min(times.values()) > 0
    assert train_gpt.fastest_tile((3, 768, 1536), torch.bfloat16, GPU) in times


@pytest.mark.parametrize("fp8_head, loss_tolerance, tolerance", [(False, 1e-3, 0.05), (True, 3e-3, 0.2)])
def test_the_compiled_model_agrees_with_the_plain_one(fp8_head, loss_tolerance, tolerance):
    s = train_gpt.Settings(model_dim=256, num_heads=2, mlp_dim=512, batch_tokens=8 * 2048, fp8_head=fp8_head)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(s.vocab_size, (2049,), generator=generator).numpy()
    batch = train_gpt.make_batch(tokens, [0, 5, 700, 1500], 128, 1000, GPU)
    results = []
    for device in (GPU, torch.device("cpu")):  # the kernels that are chosen there, both run on the GPU
        model = train_gpt.GPT(s, train_gpt.choose_kernels(device, s)[0])
        train_gpt.init_weights(model, 0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype))
        model.to(GPU)
        forward = train_gpt.compiled(model, s) if device is GPU else model
        loss = forward(*batch, (384, 128))
        loss.backward()
        results.append((loss.item(), model.attn_bank.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=loss_tolerance)
    assert ((results[0][1] - results[1][1]).norm() / results[1][1].norm()).item() < tolerance
