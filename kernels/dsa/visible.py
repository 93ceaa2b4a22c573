"""What each query sees: its own choice of keys, or its tile's, and the tile's tokens up to itself besides."""

from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from loopline.kernels.dsa.bitmask import Bitmask, n_words, words_of
from loopline.kernels.dsa.blocks import PerQuery
from loopline.kernels.tables import boundaries_on, pieces_on


@dataclass(frozen=True, eq=False)
class TileSelection:
    """One choice of keys for each tile of neighbouring queries, which see each other's tokens besides.

    Attributes:
        lists: [NT, K], int32: positions before each tile's first token, rising, then -1; see tile_op.py.
        tile: tokens of a tile, counted from the start of its document.
        cu_seqlens: N + 1 document boundaries.
        as_bits: whether `visible` is a Bitmask, as the kernels take it.
    """

    lists: Tensor
    tile: int
    cu_seqlens: list[int]
    as_bits: bool

    @property
    def visible(self) -> PerQuery:
        """The same for each query. Made when asked for: at 128k tokens it is gigabytes, where lists are megabytes."""
        make = visible_bits if self.as_bits else tile_selection
        return make(self.lists, tile=self.tile, cu_seqlens=self.cu_seqlens)


Selection = PerQuery | TileSelection


@overload
def per_query(selection: Selection) -> PerQuery: ...


@overload
def per_query(selection: Selection | None) -> PerQuery | None: ...


def per_query(selection: Selection | None) -> PerQuery | None:
    """The keys of each query; None means all of the past."""
    return selection.visible if isinstance(selection, TileSelection) else selection


def tile_selection(lists: Tensor, *, tile: int, cu_seqlens: list[int], first_token: int = 0) -> Tensor:
    """The keys of each query, its tile's list and its tile's tokens up to itself, as index lists.

    Args:
        lists: [NT, K], from `tile_op.tile_lists`.
        tile, cu_seqlens, first_token: as there.
    Returns:
        [T - first_token, K + tile], int32: positions in the row, rising, then -1.
    """
    where = places(tile, cu_seqlens, lists.device, first_token)
    own = where.firsts[where.tiles, None] + torch.arange(tile, device=lists.device)  # [T, tile]
    own = own.masked_fill(own > where.tokens[:, None], -1)
    selection = torch.cat([lists[where.tiles], own.int()], dim=1)
    # Empty slots last: a stable sort keeps the rising order of the rest.
    order = (selection < 0).int().sort(dim=1, stable=True).indices
    return selection.gather(1, order)


def visible_bits(lists: Tensor, *, tile: int, cu_seqlens: list[int]) -> Bitmask:
    """`tile_selection` as bits, a tile's list spread out once and not once a query."""
    where, width = places(tile, cu_seqlens, lists.device), n_words(cu_seqlens)
    before = where.firsts - where.begins  # [NT], tokens of the document
    words = words_of(lists, where.begins, before - 1, width)[where.tiles]  # [T, W]
    # The tile's own tokens are a run of bits, in few words.
    start, end = before[where.tiles], where.tokens + 1 - where.begins[where.tiles]
    for i in range((tile - 1) // 32 + 2):
        column = start // 32 + i
        low, high = ((x - 32 * column).clamp(0, 32) for x in (start, end))
        run = torch.where(high > low, (1 << high) - (1 << low), 0)
        run = torch.where(run >= 2**31, run - 2**32, run).int()  # as the word's sign has it
        column = column.clamp_max(width - 1)[:, None]  # past the last word the run is empty
        words.scatter_(1, column, words.gather(1, column) | run[:, None])
    return Bitmask(words)


class Places(NamedTuple):
    """Tokens [T'] of a row, from some token on, and their tiles [NT']; numbers are int64.

    Attributes:
        tokens: [T'], places in the row.
        tiles: [T'], each token's tile: a row of `firsts` and `begins`.
        firsts: [NT'], each tile's first token.
        begins: [NT'], where its document begins.
    """

    tokens: Tensor
    tiles: Tensor
    firsts: Tensor
    begins: Tensor


def places(tile: int, cu_seqlens: list[int], device: torch.device, first_token: int = 0) -> Places:
    """The tokens from `first_token` on and their tiles; it is 0 where there are several documents."""
    tokens = torch.arange(first_token, cu_seqlens[-1], device=device)
    if len(cu_seqlens) == 2:  # no table: a decoder comes with another length at every token
        first_tile = first_token // tile
        firsts = torch.arange(first_tile * tile, cu_seqlens[-1], tile, device=device)
        return Places(tokens, tokens // tile - first_tile, firsts, torch.zeros_like(firsts))
    pieces = pieces_on(tuple(cu_seqlens), tile, device).long()  # [NT, 2]
    begins = boundaries_on(tuple(cu_seqlens), device).long()[pieces[:, 0]]
    firsts = begins + pieces[:, 1] * tile
    return Places(tokens, torch.bucketize(tokens, firsts, right=True) - 1, firsts, begins)
