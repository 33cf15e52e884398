"""
Time single operations of a step alone, at the sizes of one microbatch of the speedrun: for the rates that
roofline.py assumes, and to see which of two ways to compute something is faster. A part of prove.py.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from phases import milliseconds, take_time, train_gpt
from train_gpt import triton

def time_call(function) -> float:
    """ms of a call, the mean of 10, launched while the GPU sleeps: in a step, too, launches are hidden."""
    for _ in range(3):
        function()
    if torch.cuda.is_initialized():
        torch.cuda._sleep(50_000_000)  # cycles, about 30 ms
    begun = take_time()
    for _ in range(10):
        function()
    ended = take_time()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return milliseconds(begun, ended) / 10

def time_operations(s: train_gpt.Settings, device: torch.device) -> list[str]:
    """A table, by line. Each operation is timed in three rounds of all; one that fails is told in its row."""
    tokens, dim, bfloat16 = s.batch_tokens[0] // s.microbatches, s.model_dim, torch.bfloat16
    on_gpu = device.type == "cuda"

    def randn(*shape, dtype=bfloat16):
        return torch.randn(*shape, device=device).to(dtype)

    operations = []  # (operation, function, unit, amount of it in a call)

    def measure(operation, function, unit="", amount=0.0):
        operations.append((operation, function, unit, amount))

    size = 8192 if on_gpu else 64
    square, big = randn(size, size), randn(4 * size, size)
    measure("copy within memory", lambda: big.clone(), "TB/s", 2 * big.nbytes / 1e12)
    measure(f"product of {size} x {size} in bfloat16", lambda: square @ square, "TFLOP/s", 2 * size**3 / 1e12)
    x, hidden, up = randn(tokens, dim), randn(tokens, s.mlp_dim), randn(dim, s.mlp_dim)
    product = 2 * tokens * dim * s.mlp_dim / 1e12
    measure("MLP: x @ c_fc", lambda: x @ up, "TFLOP/s", product)
    measure("MLP: h @ c_proj.T", lambda: F.linear(hidden, up), "TFLOP/s", product)
    measure("MLP: weight gradient, x.T @ h", lambda: x.mT @ hidden, "TFLOP/s", product)

    gate_grad, columns = randn(tokens, s.num_heads), x[:, :s.gate_channels]
    blocks = 48 if on_gpu else 2
    measure("gates: weight gradient, grad.T @ x[:, :C]", lambda: gate_grad.mT @ columns)
    measure(f"gates: the same in {blocks} parts", lambda: torch.bmm(
        gate_grad.unflatten(0, (blocks, -1)).mT, columns.unflatten(0, (blocks, -1))).sum(0))

    def residual(x, hidden, up):
        return train_gpt.norm(x + F.linear(hidden, up))

    def residual_in_float32(x, hidden, up):  # not an addmm, which copies x first
        return train_gpt.norm((x.float() + F.linear(hidden, up).float()).to(x.dtype))

    def compiled(function):
        return torch.compile(function, dynamic=False) if on_gpu else function

    for function in (residual, residual_in_float32):
        measure(f"norm(x + h @ c_proj.T), {function.__name__}", partial(compiled(function), x, hidden, up))
    heads = x.view(tokens, s.num_heads, -1).clone().requires_grad_()
    frequencies = train_gpt.rotary_frequencies(dim // s.num_heads).to(device)
    cos, sin = train_gpt.rotary_cos_sin(tokens, frequencies)
    rotate = compiled(train_gpt.norm_and_rotate)
    moved = 2 * x.nbytes / 1e12
    forward = torch.no_grad()(partial(rotate, heads, cos, sin))
    measure("norm of heads, rotated, forward", forward, "TB/s", moved)
    backward = partial(torch.autograd.grad, rotate(heads, cos, sin), heads, torch.randn_like(heads),
                       retain_graph=True)
    measure("norm of heads, rotated, backward", backward, "TB/s", 1.5 * moved)

    if on_gpu:  # attention of the speedrun's heads in documents of 560 tokens, both windows of each stage
        starts = torch.arange(0, tokens + 560, 560, device=device, dtype=torch.int32).clamp(max=tokens)
        q, k, v = (randn(tokens, s.num_heads, dim // s.num_heads).requires_grad_() for _ in range(3))
        flash = torch.nn.attention.current_flash_attention_impl() or "FA2"
        for window in (384, 896, 1408):
            keys = 1 + sum(min(window, i) for i in range(560)) / 560
            args = train_gpt.varlen_args(starts, tokens, window, s.max_seq_len[0], bfloat16)
            attention = partial(train_gpt.flash_attention, q, k, v, args, s.attn_scale)
            amount = 4 * tokens * dim * keys / 1e12
            measure(f"{flash}, window {window}, forward", torch.no_grad()(attention), "TFLOP/s", amount)
            y = attention()
            backward = partial(torch.autograd.grad, y, (q, k, v), torch.randn_like(y), retain_graph=True)
            measure(f"{flash}, window {window}, backward", backward, "TFLOP/s", 2.5 * amount)

    with torch.device("meta"):
        model = train_gpt.GPT(s, train_gpt.Kernels(), 8)
    for bank in ("attn_bank", "mlp_bank"):
        case = randn(*getattr(model, bank).chunk(8)[0].shape, dtype=torch.float32), s.torch_dtype
        measure(f"Newton-Schulz, {bank} of one rank of 8, whole products",
                partial(train_gpt.newton_schulz, *case))
        if on_gpu:
            measure(f"Newton-Schulz, {bank} of one rank of 8, symmetric products",
                    partial(train_gpt.newton_schulz, *case, train_gpt.symmetric_XXT))

    one, vocab = torch.ones((), device=device), s.padded_vocab
    x8, x8_t = in_float8(x)
    w8, w8_t = in_float8(randn(vocab, dim))
    logits = randn(tokens, vocab)
    grads = torch.empty(tokens, vocab, device=device, dtype=torch.float8_e5m2).copy_(logits)
    grads_t = grads.mT.contiguous()
    scaled = partial(torch._scaled_mm, scale_a=one, scale_b=one)
    amount = 2 * tokens * vocab * dim / 1e12
    logits_in_float8 = partial(scaled, x8, w8.mT, out_dtype=bfloat16, use_fast_accum=True)
    measure("head: logits", logits_in_float8, "TFLOP/s", amount)
    measure("head: x's gradient", partial(scaled, grads, w8_t.mT, out_dtype=bfloat16), "TFLOP/s", amount)
    float32 = partial(scaled, out_dtype=torch.float32)
    measure("head: weight gradient, (x.T @ grads).T, copied",
            lambda: float32(x8_t, grads_t.mT).T.contiguous(), "TFLOP/s", amount)
    measure("head: weight gradient, grads.T @ x", partial(float32, grads_t, x8_t.mT), "TFLOP/s", amount)
    if on_gpu:
        targets = torch.randint(vocab, (tokens,), device=device)
        one = torch.ones(1, device=device)
        *_, log_sums = train_gpt.softcap_loss(logits, targets, one, train_gpt.Softcap())
        for tanh in (True, False):
            losses = [torch.empty_like(log_sums) for _ in range(3)]
            constants = tokens, vocab, *train_gpt.Softcap(), train_gpt.LN2, 1, tanh
            call = partial(train_gpt.softcap_loss_kernel[tokens,], logits, targets, one, *losses, *constants,
                           4096, num_warps=8)
            measure(f"head: loss kernel, TANH={tanh}", call, "TB/s", logits.nbytes / 1e12)
            for rows, columns, warps in ((64, 128, 8), (64, 128, 4), (64, 64, 4), (32, 128, 4)):
                grid = triton.cdiv(tokens, rows), triton.cdiv(vocab, columns)
                call = partial(train_gpt.softcap_grad_kernel[grid], logits, targets, one, log_sums, 448.0,
                               grads, grads_t, *constants, ROWS=rows, COLUMNS=columns, num_warps=warps)
                about = f"TANH={tanh}, tiles of {rows} x {columns}, {warps} warps"
                measure(f"head: gradient kernel, {about}", call, "TB/s", 2 * logits.nbytes / 1e12)

    times = [[] for _ in operations]
    for _ in range(3):
        for found, (operation, function, *_) in zip(times, operations):
            try:
                found.append(time_call(function))
            except Exception as error:
                found.append(str(error).splitlines()[0][:80])
    lines = ["| operation | ms, median of 3 | rate |", "| --- | --- | --- |"]
    for found, (operation, _, unit, amount) in zip(times, operations):
        errors = [x for x in found if isinstance(x, str)]
        ms = errors[0] if errors else f"{np.median(found):.3f}"
        rate = "-" if errors or not unit else f"{1000 * amount / np.median(found):.2f} {unit}"
        lines.append(f"| {operation} | {ms} | {rate} |")
    return lines

def in_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and its transpose in float8 e4m3."""
    y = x.to(torch.float8_e4m3fn)
    return y, y.mT.contiguous()
