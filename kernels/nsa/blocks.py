"""Blocks of Native Sparse Attention: their sizes, their pooled keys and values, and which of them a query reads.

Blocks are counted inside each document: block b covers its tokens b * B to b * B + B - 1 and is complete at the last.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.attention.reference import masked_softmax
from loopline.kernels.precision import wide

N_FORCED = 3  # blocks always selected: the document's first, the query's own and the one before that


@dataclass(frozen=True)
class NsaSizes:
    """Sizes of the three branches.

    Attributes:
        block_size: tokens in a block, B.
        n_selected: blocks a query reads in full, the three forced ones included.
        window: last keys a query reads, its own included.
    Raises:
        ValueError: a size is too small.
    """

    block_size: int = 64
    n_selected: int = 16
    window: int = 512

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.window < 1:
            raise ValueError(f"block_size {self.block_size} and window {self.window} must be at least 1")
        if self.n_selected < N_FORCED:
            raise ValueError(
                f"n_selected {self.n_selected} must be at least {N_FORCED}: the first block, the query's own and the"
                " one before it are always taken"
            )


@dataclass(frozen=True)
class Document:
    """Where one document lies.

    Attributes:
        queries: its rows of q.
        keys: its rows of k and v.
        pooled: its rows of the pooled keys and values.
        first: position in the document of its first query: 0, or more where only the last queries are given.
    """

    queries: slice
    keys: slice
    pooled: slice
    first: int


def documents(cu_seqlens: list[int], n_queries: int, block_size: int) -> Iterator[Document]:
    """The documents of a row. Fewer queries than keys are the last ones of a row with one document."""
    missing = cu_seqlens[-1] - n_queries
    n_pooled = 0
    for start, end in itertools.pairwise(cu_seqlens):
        n_complete = (end - start) // block_size
        yield Document(slice(start, end - missing), slice(start, end), slice(n_pooled, n_pooled + n_complete), missing)
        n_pooled += n_complete


def n_complete_blocks(cu_seqlens: list[int], block_size: int) -> int:
    """NB, complete blocks of all documents of a row."""
    return sum((end - start) // block_size for start, end in itertools.pairwise(cu_seqlens))


def pool_blocks(x: Tensor, *, cu_seqlens: list[int], block_size: int, weights: Tensor | None = None) -> Tensor:
    """Each complete block as one row: pooled_b = sum_j weights_j * x_{b B + j}, per channel.

    Args:
        x: [1, T, G, D], keys or values.
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T.
        block_size: B.
        weights: [G, D, B]; None means 1 / B, the mean.
    Returns:
        [1, NB, G, D], fp32 (fp64 where x is), blocks of all documents end to end.
    Raises:
        ValueError: weights of another shape.
    Reference: Yuan et al., Native Sparse Attention, arXiv:2502.11089, section 3.3.1, with a linear map per channel in
    place of its MLP and blocks that do not overlap.
    """
    want = (x.shape[2], x.shape[3], block_size)
    if weights is not None and weights.shape != want:
        raise ValueError(f"weights {tuple(weights.shape)} must be [G, D, B] = {want}")
    bounds = itertools.pairwise(cu_seqlens)
    complete = torch.cat([wide(x[0, start : end - (end - start) % block_size]) for start, end in bounds])
    rows = complete.unflatten(0, (n_complete_blocks(cu_seqlens, block_size), block_size))  # [NB, B, G, D]
    pooled = rows.mean(1) if weights is None else torch.einsum("bjgd,gdj->bgd", rows, wide(weights))
    return pooled[None]


def block_probabilities(q: Tensor, k_pool: Tensor, *, positions: Tensor, block_size: int, scale: float) -> Tensor:
    """Attention of queries over the pooled keys of their document's blocks that are complete when they come.

    Args:
        q: [n, G, R, D], R = H / G query heads to a key/value head.
        k_pool: [NB, G, D], of the same document.
        positions: [n], position of each query in the document.
    Returns:
        [G, R, n, NB]; rows without a complete block are zero.
    """
    last = (torch.arange(k_pool.shape[0], device=q.device) + 1) * block_size - 1
    scores = torch.einsum("ngrd,bgd->grnb", q, k_pool) * scale
    return masked_softmax(scores, last <= positions[:, None])


def choose_blocks(probabilities: Tensor, *, positions: Tensor, sizes: NsaSizes) -> Tensor:
    """The n_selected blocks of highest importance, the sum of the probabilities of a group's query heads.

    The document's first block, the query's own and the one before it come first of all; no block after the query's own
    is taken; of equal blocks the lower one is.

    Args:
        probabilities: [G, R, n, NB], of `block_probabilities`.
        positions: [n].
    Returns:
        [n, G, S], int64, rising, S = n_selected; -1 fills up where there are fewer blocks.
    """
    own = (positions // sizes.block_size)[:, None]  # [n, 1]
    importance = F.pad(probabilities.sum(1), (0, 1))  # [G, n, NB + 1]: the last block may be incomplete
    block = torch.arange(importance.shape[-1], device=positions.device)
    is_forced = (block == 0) | (block == own) | (block == own - 1)
    importance = importance.masked_fill(is_forced, float("inf")).masked_fill(block > own, float("-inf"))
    order = importance.argsort(dim=-1, descending=True, stable=True)[..., : sizes.n_selected]  # topk breaks ties freely
    beyond = len(block)  # sorts behind every block
    chosen = order.masked_fill(order > own, beyond).sort(-1).values
    chosen = F.pad(chosen, (0, sizes.n_selected - chosen.shape[-1]), value=beyond)
    return chosen.masked_fill(chosen == beyond, -1).transpose(0, 1)


@torch.no_grad()
def select(q: Tensor, k_pool: Tensor, *, sizes: NsaSizes, cu_seqlens: list[int], scale: float, n_rows: int) -> Tensor:
    """`select_blocks` of kernels/nsa/op.py, `n_rows` queries at a time. Nothing here has a gradient."""
    chosen = []
    for document in documents(cu_seqlens, q.shape[1], sizes.block_size):
        k_doc = wide(k_pool[0, document.pooled])
        q_doc = wide(q[0, document.queries]).unflatten(1, (k_pool.shape[2], -1))  # [n, G, R, D]
        positions = torch.arange(document.first, document.first + len(q_doc), device=q.device)
        for rows, at in zip(q_doc.split(n_rows), positions.split(n_rows)):
            p = block_probabilities(rows, k_doc, positions=at, block_size=sizes.block_size, scale=scale)
            chosen.append(choose_blocks(p, positions=at, sizes=sizes))
    return torch.cat(chosen)[None]
