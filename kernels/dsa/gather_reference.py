"""Attention over one list of keys for a tile of queries, T x T: the judge of gather_launch.py."""

import torch
from torch import Tensor

from loopline.kernels.dsa.visible import places
from loopline.kernels.precision import wide


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, *, cu_seqlens: list[int], tile: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys of each query's tile and its tile's tokens up to itself, by a T x T mask.

    Arguments and results as in gather_launch.py; computed in fp32, in fp64 where the inputs are, lse stays in it.
    """
    where = places(tile, cu_seqlens, q.device)
    tokens = where.tokens
    # [T, T]: key s is in query t's tile and not after it, or listed and before the tile in its document.
    visible = (where.tiles[:, None] == where.tiles) & (tokens[:, None] >= tokens)
    begins = where.begins[where.tiles]
    is_before = (begins[:, None] == begins) & (where.tiles[:, None] > where.tiles)
    listed = lists.new_zeros(lists.shape[0], len(tokens) + 1, dtype=torch.bool)
    listed = listed.scatter_(1, lists.long().masked_fill(lists < 0, len(tokens)), True)[:, :-1]
    visible |= listed[where.tiles] & is_before
    dtype, scale = v.dtype, q.shape[3] ** -0.5 if scale is None else scale
    q, k, v = (wide(x[0]) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    o = torch.einsum("hts,shv->thv", scores.softmax(-1), v)
    return o[None].to(dtype), scores.logsumexp(-1)
