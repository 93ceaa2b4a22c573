"""The walk over a packed row in blocks of queries, and which keys each query of a block may see.

Everything in DSA is computed block by block, so that nothing of size T x T is ever held.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loopline.kernels.dsa.bitmask import Bitmask, spread

ROW_TILE = 64  # queries that enter a sampled loss, or stay out of it, together

PerQuery = Tensor | Bitmask  # [Tq, K], positions in the row, -1 empty; or bits


@dataclass(frozen=True)
class Block:
    """Up to BT queries of one document, and its keys from the document's start to the last of these queries.

    Attributes:
        queries: rows of q, BT of them.
        keys: rows of k, S of them; the last belongs to the last query's token.
    """

    queries: slice
    keys: slice

    @property
    def n_queries(self) -> int:
        """BT."""
        return int(self.queries.stop - self.queries.start)

    @property
    def n_keys(self) -> int:
        """S."""
        return int(self.keys.stop - self.keys.start)

    def causal(self, device: torch.device) -> Tensor:
        """[BT, S], bool: keys at or before each query, in its document."""
        mask = torch.ones(self.n_queries, self.n_keys, dtype=torch.bool, device=device)
        return mask.tril(self.n_keys - self.n_queries)

    def allowed(self, selection: PerQuery | None, device: torch.device) -> Tensor:
        """[BT, S], bool: the causal keys in `selection`; None means all."""
        causal = self.causal(device)
        if selection is None:
            return causal
        if isinstance(selection, Bitmask):
            return spread(selection.words[self.queries, : -(-self.n_keys // 32)])[:, : self.n_keys] & causal
        local = selection[self.queries].long() - self.keys.start
        local = local.masked_fill((local < 0) | (local >= self.n_keys), self.n_keys)  # one spare column takes the rest
        return causal.new_zeros(self.n_queries, self.n_keys + 1).scatter_(1, local, True)[:, :-1] & causal


def blocks(cu_seqlens: list[int], n_queries: int, block_size: int) -> Iterator[Block]:
    """Blocks of at most `block_size` queries over all documents, in order.

    Args:
        cu_seqlens: document boundaries over the keys.
        n_queries: tokens in q; fewer than keys means the last ones of a single document (decoding).
    """
    n_past = cu_seqlens[-1] - n_queries
    for start, end in itertools.pairwise(cu_seqlens):
        for first in range(max(start, n_past), end, block_size):
            last = min(first + block_size, end)
            yield Block(slice(first - n_past, last - n_past), slice(start, last))


def sampled_blocks(
    cu_seqlens: list[int], n_queries: int, block_size: int, row_stride: int, row_offset: int
) -> Iterator[Block]:
    """`blocks` over every `row_stride`-th tile of ROW_TILE queries of the row, from tile `row_offset` on.

    Tiles are cut from the start of each document and numbered through the row.
    """
    if row_stride == 1:
        yield from blocks(cu_seqlens, n_queries, block_size)
        return
    tiles = blocks(cu_seqlens, n_queries, ROW_TILE)
    for tile in itertools.islice(tiles, row_offset, None, row_stride):
        for first in range(tile.queries.start, tile.queries.stop, block_size):
            last = min(first + block_size, tile.queries.stop)
            yield Block(slice(first, last), slice(tile.keys.start, tile.keys.stop - (tile.queries.stop - last)))
