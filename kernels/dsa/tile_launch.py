"""`tile_lists` on Triton: one list of keys for each tile of queries, as a custom op without a graph."""

from typing import Any

import torch
import triton
from torch import Tensor

from loopline.kernels.devices import on_its_device
from loopline.kernels.dsa.bitmask import longest
from loopline.kernels.dsa.blocks import ROW_TILE
from loopline.kernels.dsa.launch import SELECT_BYTES, check_index, chosen_tiles, options, padded, precision
from loopline.kernels.dsa.tile_kernels import tile_scores_kernel, tile_select_kernel
from loopline.kernels.dsa.tiles import BY_DIGITS, IndexTiles
from loopline.kernels.dsa.workspace import chunks, most_tiles, stored_tiles, stored_tiles_on
from loopline.kernels.tables import boundaries_on, first_pieces_on, numbers_of, on_host, pieces


def tile_lists_by_kernels(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    tile: int,
    cu_seqlens: list[int],
    is_past: bool,
    workspace_bytes: int = SELECT_BYTES,
    tiles: IndexTiles | None = None,
) -> Tensor:
    """`tile_op.tile_lists`, whose arguments are checked. Inputs that are not contiguous are copied.

    Args:
        q_index: [1, T, HI, DI], bf16, fp16 or fp32; DI at most 128.
        k_index: [1, T, DI], in q_index's dtype.
        weights: [1, T, HI], fp32 or in q_index's dtype.
        is_past: scored by the queries up to the tile's first token, else by the tile's own.
        workspace_bytes: of scores held at once; at least 8 pieces of up to 64 queries are.
        tiles: for tests and tuning; None means those of `index_tiles`.
    Returns:
        [NT, K], int32.
    Raises:
        ValueError: dtypes, devices or sizes that no kernel serves.
    """
    check_index(q_index, k_index, weights)
    index = (x.contiguous() for x in (q_index, k_index, weights))
    numbers = None if tiles is None else tiles.numbers()
    return sparse_tile_lists(*index, on_host(cu_seqlens), top_k, tile, is_past, workspace_bytes, numbers)


@torch.library.custom_op("loopline::sparse_tile_lists", mutates_args=())
@on_its_device
def sparse_tile_lists(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    top_k: int,
    tile: int,
    is_past: bool,
    workspace_bytes: int,
    tiles: list[int] | None,
) -> Tensor:
    """[NT, K], int32: rising positions in the row, then -1; `tiles` None are those of `index_tiles`."""
    bounds, device = numbers_of(cu_seqlens, q_index.shape[1]), q_index.device
    scores = chosen_tiles(tiles, q_index, q_index.element_size(), bounds).scores
    n_slots = min(top_k, longest(bounds))
    group = ROW_TILE // min(ROW_TILE, triton.next_power_of_2(tile))
    where = (bounds, scores.columns, tile, group)
    stored = stored_tiles(*where)
    held = chunks(stored, workspace_bytes // (4 * group * scores.columns))
    workspace = q_index.new_empty(most_tiles(held) * group * scores.columns, dtype=torch.int32)
    tables = (boundaries_on(bounds, device), stored_tiles_on(*where, device))
    first_tiles = first_pieces_on(bounds, tile, device)
    lists = q_index.new_full((len(pieces(bounds, tile)), n_slots), -1, dtype=torch.int32)
    n_heads, d_index = q_index.shape[2:]
    for chunk in held:
        if chunk.n_tiles == 0:
            continue  # first tiles of documents: no key is before them
        tile_scores_kernel[(chunk.n_pieces, chunk.widest)](
            q_index, k_index, weights, workspace, *tables, chunk.first, HI=n_heads, DI=d_index, TILE=tile,
            OFFSET=1 - tile if is_past else 0, GROUP=group, BM=ROW_TILE, BN=scores.columns, BD=padded(d_index),
            PRECISION=precision(q_index), **options(scores),
        )  # fmt: skip
        tile_select_kernel[(chunk.n_pieces * group,)](
            workspace, lists, *tables, first_tiles, chunk.first, n_slots, TILE=tile, GROUP=group, SW=scores.columns,
            BS=BY_DIGITS.columns, **options(BY_DIGITS),
        )  # fmt: skip
    return lists


@sparse_tile_lists.register_fake
def _(q_index: Tensor, *_: Any) -> Tensor:
    context = torch.library.get_ctx()
    n_tiles, n_slots = context.new_dynamic_size(min=1), context.new_dynamic_size(min=1)
    return q_index.new_empty(n_tiles, n_slots, dtype=torch.int32)
