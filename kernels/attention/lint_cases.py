"""Calls that the attention kernels are compiled for: head sizes, types, and a window or a bitmask or neither."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch

from loopline.kernels.attention.launch import flash_attention
from loopline.kernels.lint import Budget

_BOUNDS = [0, 96, 128]
_WINDOW = 40
_HEADS = ((64, 64), (96, 96), (96, 64), (128, 128), (192, 128), (192, 192), (256, 256))
_FP32_HEADS = ((64, 64), (128, 128))

# At most, of 255 registers: 16 bytes in the forward kernel at 192/192 under a window (Triton 3.7.1; 8 by 3.6.0); 32 in
# the dkv kernel at 128/128 under a bitmask (3.6.0); 8 to 96 in the dkv kernel at 256/256 (3.9.0). Nothing elsewhere.
BUDGETS = {
    "attention_fwd_kernel": Budget(stack_bytes=16),
    "attention_bwd_dkv_kernel": Budget(stack_bytes=96),
    "attention_tiles_kernel": Budget(needs_wgmma=False),
    "attention_transpose_kernel": Budget(needs_wgmma=False),
}


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of each."""
    yield from _cases(torch.bfloat16, _HEADS)


def fp32_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """In fp32, whose exact products have no tensor-core form: no wgmma is to be expected, and dq spills at D = 128."""
    yield from _cases(torch.float32, _FP32_HEADS)


def _cases(dtype: torch.dtype, heads: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, Callable[[], object]]]:
    for (d_head, d_value), variant in itertools.product(heads, ("plain", "window", "bitmask")):
        name = f"{str(dtype).removeprefix('torch.')} {d_head}/{d_value} {variant}"
        yield name, partial(_call, d_head, d_value, dtype, variant)


def _call(d_head: int, d_value: int, dtype: torch.dtype, variant: str) -> None:
    n_tokens, n_heads, n_kv_heads = _BOUNDS[-1], 4, 2
    shapes = ((n_heads, d_head), (n_kv_heads, d_head), (n_kv_heads, d_value))
    q, k, v = (torch.zeros(1, n_tokens, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    longest = max(end - start for start, end in itertools.pairwise(_BOUNDS))
    o, _ = flash_attention(
        q,
        k,
        v,
        cu_seqlens=_BOUNDS,
        window=_WINDOW if variant == "window" else None,
        bitmask=torch.zeros(n_tokens, -(-longest // 32), dtype=torch.int32) if variant == "bitmask" else None,
    )
    o.float().sum().backward()
