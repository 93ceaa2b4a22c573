"""The walk over a packed row in blocks of queries, and which keys each query of a block may see.

Everything in DSA is computed block by block, so that nothing of size T x T is ever held.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def allowed(self, selection: Tensor | None, device: torch.device) -> Tensor:
        """[BT, S], bool: the causal keys in `selection` ([Tq, K], positions in the row, -1 empty); None means all."""
        causal = self.causal(device)
        if selection is None:
            return causal
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
