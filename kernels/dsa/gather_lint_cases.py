"""Launches of the gather kernels that a GPU must be able to run, for kernels/lint.py."""

import itertools
from collections.abc import Callable, Iterator

import torch

from loopline.kernels.dsa.gather_launch import gather_attention
from loopline.kernels.lint import Budget

BUDGETS: dict[str, Budget] = {
    "gather_attention_fwd_kernel": Budget(stack_bytes=144),  # 128 rows; 0 to 64
    "gather_attention_bwd_walk_kernel": Budget(stack_bytes=256),  # 64 rows, D 128
    "gather_attention_bwd_sum_kernel": Budget(needs_wgmma=False),
}


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward: head sizes x rows of a program, 4 query heads a key head."""
    for d_head, tile in [(64, 4), (64, 8), (64, 16), (64, 32), (128, 4), (128, 8), (128, 16)]:
        yield f"gather D {d_head}, {4 * tile} rows, bf16", _call(d_head, tile, torch.bfloat16)
    yield "gather D 192, V 128, 32 rows, bf16", _call(192, 8, torch.bfloat16, d_value=128)


def fp32_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The same in fp32, whose products have no tensor-core form without rounding: no wgmma is to be expected."""
    for d_head, tile in itertools.product((64, 128), (4, 16)):
        yield f"gather D {d_head}, {4 * tile} rows, fp32", _call(d_head, tile, torch.float32)


def _call(d_head: int, tile: int, dtype: torch.dtype, d_value: int | None = None) -> Callable[[], object]:
    def call() -> None:
        n_tokens = 2 * tile
        shapes = [(1, n_tokens, 8, d_head), (1, n_tokens, 2, d_head), (1, n_tokens, 2, d_value or d_head)]
        q, k, v = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        lists = torch.zeros(2, 16, dtype=torch.int32)
        o, lse = gather_attention(q, k, v, lists, cu_seqlens=[0, n_tokens], tile=tile)
        torch.autograd.grad(o.float().sum() + lse.sum(), (q, k, v))

    return call
