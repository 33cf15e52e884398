"""Compiles every Triton kernel of train_gpt.py for Ampere, Ada and Hopper; needs Triton, but no GPU.

Prints a line a kernel: its name, the GPU's capability, bytes of shared memory, the matrix instruction used.
Kernels that a GPU tries before it takes them are marked with a star, and made for Hopper alone.
"""

import sys
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt  # noqa: E402

LOSS = dict(logits="*bf16", targets="*i64", losses="*fp32", sums="*fp32", num_columns="i32")
GRADIENT = dict(logits="*bf16", targets="*i64", sums="*fp32", num_rows="i32", num_columns="i32", scale="fp32")
SYMMETRIC = dict(x="*bf16", base="*bf16", out="*bf16", rows="i32", cols="i32", alpha="fp32", beta="fp32")
TILE, FIRST = dict(ROWS=64, COLUMNS=64), train_gpt.TILES[0]
BUILDS = [  # as train_gpt.py launches them: kernel, types, constants, options, least capability, mark
    (train_gpt.softcap_loss_kernel, LOSS, dict(BLOCK=4096), dict(num_warps=8), 80, ""),
    (train_gpt.softcap_gradient_kernel, GRADIENT | dict(grads="*bf16", grads_t="*bf16"),
     TILE | dict(TRANSPOSED=False), {}, 80, ""),
    (train_gpt.softcap_gradient_kernel, GRADIENT | dict(grads="*fp8e5", grads_t="*fp8e5"),
     TILE | dict(TRANSPOSED=True), {}, 89, ""),
    (train_gpt.symmetric_kernel, SYMMETRIC, dict(BLOCK=FIRST.block, COLS=FIRST.cols, ADD=False),
     dict(num_warps=FIRST.warps, num_stages=FIRST.stages), 80, ""),
    *((train_gpt.symmetric_kernel, SYMMETRIC, dict(BLOCK=tile.block, COLS=tile.cols, ADD=True),
       dict(num_warps=tile.warps, num_stages=tile.stages), *((80, "") if tile == FIRST else (90, "*")))
      for tile in train_gpt.TILES),
    (train_gpt.symmetric_kernel, SYMMETRIC | dict(x="*fp32", base="*fp32", out="*fp32"),
     dict(BLOCK=FIRST.block, COLS=FIRST.cols, ADD=True), dict(num_warps=FIRST.warps, num_stages=FIRST.stages),
     80, "-float32"),
]

for kernel, types, constants, options, least, mark in BUILDS:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*") or signature[name] == "i32"}
    for capability in (80, 89, 90):
        if capability >= least:
            source = ASTSource(kernel, signature, constants, aligned)
            built = compile(source, GPUTarget("cuda", capability, 32), options)
            used = [name for name in ("wgmma", "mma.sync") if name in built.asm["ptx"]]
            print(kernel.__name__ + mark, capability, built.metadata.shared, *used[:1])
