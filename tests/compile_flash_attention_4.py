"""Compiles FlashAttention 4 for Hopper as train_gpt.py calls it; needs its package, but no GPU.

    python -m pip install "flash-attn-4[cu13]==4.0.0b36"
    FLASH_ATTENTION_ARCH=sm_90a CUTE_DSL_ARCH=sm_90a FLASH_ATTENTION_NUM_SMS=132 \\
        python tests/compile_flash_attention_4.py

Prints shapes, strides and dtypes of what it would give for a sequence of 1000 tokens.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt  # noqa: E402


def told(*tensors):
    return [(tuple(x.shape), x.stride(), x.dtype) for x in tensors]


with FakeTensorMode():  # tensors without storage, which that package compiles for and does not launch
    def tensor(*shape, strides, dtype=torch.bfloat16):
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")

    q, k = (tensor(1000, 6, 128, strides=(1536, 128, 1)) for _ in range(2))  # one beside the other
    v, grad = (tensor(1000, 6, 128, strides=(768, 128, 1)) for _ in range(2))
    forward, backward = (op._init_fn for op in (train_gpt.flash_attention_4,
                                                train_gpt.flash_attention_4_backward))
    contiguous = [((1000, 6, 128), (768, 128, 1), torch.bfloat16)]
    for places in (7, 300):  # it has other kernels for more than 256 pieces
        rest = tensor(places, strides=(1,), dtype=torch.int32), 600, 384, 0.12
        y, lse = forward(q, k, v, *rest)
        grads = backward(grad, q, k, v, y, lse, *rest)
        print(f"{places - 1} pieces, forward:", told(y, lse))
        print(f"{places - 1} pieces, backward:", told(*grads))
        if told(y, lse, *grads) != contiguous + [((6, 1000), (1000, 1), torch.float32)] + 3 * contiguous:
            sys.exit("these are not what the operators promise to torch.compile")
