"""Calls that the kernels of DSA are compiled for: index and attention head sizes, numbers of index heads, types."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loopline.kernels.dsa import gather_lint_cases
from loopline.kernels.dsa.bitmask import Bitmask, n_words
from loopline.kernels.dsa.launch import loss_sums, select_bits
from loopline.kernels.dsa.tile_op import tile_lists
from loopline.kernels.dsa.tiles import LONG
from loopline.kernels.lint import Budget

_BOUNDS = [0, 96, 128]
_LONG_BOUNDS = [0, LONG]

BUDGETS = {
    name: Budget(needs_wgmma=False) for name in ("index_select_kernel", "index_lse_kernel", "tile_select_kernel")
}
BUDGETS |= gather_lint_cases.BUDGETS


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """The choice and the loss over it, at every combination of index head size, index heads and head size; lists of
    tiles, and attention over them."""
    for d_index, n_index_heads, d_head in itertools.product((64, 128), (4, 16), (64, 128)):
        name = f"index {n_index_heads} x {d_index}, D {d_head}, bf16"
        yield name, _call(d_index, n_index_heads, d_head, torch.bfloat16)
    yield "index 4 x 64, D 128, bf16, dense", _call(64, 4, 128, torch.bfloat16, is_dense=True)
    yield "index 1 x 64, D 128, bf16", _call(64, 1, 128, torch.bfloat16)
    yield "index 4 x 64, D 192, bf16", _call(64, 4, 192, torch.bfloat16)
    yield "index 4 x 64, D 128, bf16, long", _call(64, 4, 128, torch.bfloat16, bounds=_LONG_BOUNDS)
    for d_index, n_index_heads, tile in [(64, 4, 8), (64, 4, 16), (64, 4, 12), (64, 4, 100), (128, 16, 16)]:
        yield f"lists index {n_index_heads} x {d_index}, tile {tile}, bf16", _lists(d_index, n_index_heads, tile)
    yield from gather_lint_cases.cases()


def fp32_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """In fp32, whose exact products have no tensor-core form: no wgmma is to be expected."""
    for d_index, d_head in itertools.product((64, 128), (64, 128)):
        yield f"index 4 x {d_index}, D {d_head}, fp32", _call(d_index, 4, d_head, torch.float32)
    yield "lists index 4 x 64, tile 16, fp32", _lists(64, 4, 16, torch.float32)
    yield from gather_lint_cases.fp32_cases()


def _call(
    d_index: int,
    n_index_heads: int,
    d_head: int,
    dtype: torch.dtype,
    *,
    is_dense: bool = False,
    bounds: list[int] = _BOUNDS,
) -> Callable[[], object]:
    def call() -> None:
        n_tokens, n_heads, n_kv_heads = bounds[-1], 4, 2
        q, k = (torch.zeros(1, n_tokens, n, d_head, dtype=dtype) for n in (n_heads, n_kv_heads))
        index = _index(n_tokens, n_index_heads, d_index, dtype)
        select_bits(*index, top_k=16, cu_seqlens=bounds)
        loss_sums(
            q,
            k,
            None if is_dense else Bitmask(torch.zeros(n_tokens, n_words(bounds), dtype=torch.int32)),
            lse=torch.zeros(n_heads, n_tokens),
            q_index=index[0],
            k_index=index[1],
            weights=index[2],
            cu_seqlens=bounds,
            scale=d_head**-0.5,
        )

    return call


def _lists(d_index: int, n_index_heads: int, tile: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    def call() -> None:
        bounds = [0, 96, 256]  # a document of two tiles of 100, as nothing is launched for first ones
        index = _index(bounds[-1], n_index_heads, d_index, dtype)
        tile_lists(*index, top_k=16, tile=tile, cu_seqlens=bounds, scored_by="past", backend="triton")

    return call


def _index(n_tokens: int, n_index_heads: int, d_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(1, n_tokens, n_index_heads, d_index, dtype=dtype),
        torch.zeros(1, n_tokens, d_index, dtype=dtype),
        torch.zeros(1, n_tokens, n_index_heads),
    )
