"""Causal softmax attention over packed documents, whole or within a window: one function over its backends."""

import functools
import itertools

import torch
from torch import Tensor, cat
from torch.nn import functional as F

from loopline.kernels.attention import reference
from loopline.kernels.backends import (
    Boundaries,
    check_boundaries,
    check_heads,
    cu_seqlens_on,
    imported,
    listed,
    unknown,
)

BACKENDS = ("sdpa", "fla", "triton", "flex", "reference")  # preferred first

# Queries to a call under a small window: below this a call costs more to start than to run.
_MIN_QUERIES = 128


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Boundaries, *, window: int | None = None, backend: str = "sdpa"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal, inside each document; under a window each query sees its last `window` keys.

    Args:
        q: [1, T, H, D].
        k, v: [1, T, G, D], G divides H (grouped queries).
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T. A tensor makes one graph of torch.compile serve
            rows with any boundaries, with "triton".
        window: keys t - window < s <= t are seen by query t, itself included; None means the whole document.
        backend: one of BACKENDS; resolve "auto" once with `kernels.backends.check_backend`.
    Returns:
        [1, T, H, D] in v.dtype.
    Raises:
        ValueError: shapes disagree, G does not divide H, window < 1, or cu_seqlens does not rise from 0 to T.
        BackendError: unknown backend.
    Reference: Vaswani et al., arXiv:1706.03762; GQA: Ainslie et al., arXiv:2305.13245; window: Beltagy et al.,
    Longformer, arXiv:2004.05150.
    """
    _check(q, k, v, cu_seqlens, window)
    if backend == "triton":
        from loopline.kernels.attention.launch import flash_attention

        return flash_attention(q, k, v, cu_seqlens=cu_seqlens, window=window)[0]
    cu_seqlens = listed(cu_seqlens)
    if backend == "sdpa":
        lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        if window is None or window >= max(lengths):
            return _causal(q, k, v, lengths)
        return _windowed(q, k, v, lengths, window)
    if backend == "fla":
        return _fla(q, k, v, cu_seqlens, window)
    if backend == "flex":
        from loopline.kernels.attention.flex_backend import flex

        return flex(q, k, v, cu_seqlens, window)
    if backend == "reference":
        return reference.dense_attention(q, k, v, cu_seqlens, window=window)
    raise unknown("packed_attention", backend, BACKENDS)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Boundaries, window: int | None) -> None:
    check_heads(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must have as many tokens")
    check_boundaries(cu_seqlens, q.shape[0], q.shape[1])
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1, the query's own key, or None for no window")


def _causal(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    # Document by document: nothing of size T x T over the packed row is held, and torch picks its flash kernel.
    is_grouped = q.shape[2] != k.shape[2]
    if len(set(lengths)) == 1:  # equal documents are a plain batch
        q, k, v = (x.unflatten(1, (-1, lengths[0])).squeeze(0).transpose(1, 2) for x in (q, k, v))  # [N, H, T/N, D]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        return o.transpose(1, 2).flatten(0, 1)[None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [1, H, T, D]
    parts = [
        F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, enable_gqa=is_grouped)
        for qd, kd, vd in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
    ]
    return cat(parts, dim=2).transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int) -> Tensor:
    """Blocks of queries, each against the band of keys it can see: at most BQ x (BQ + window) scores at a time."""
    is_grouped = q.shape[2] != k.shape[2]
    n_queries = max(window, _MIN_QUERIES)

    @functools.cache  # all inner blocks share one mask, in memory too
    def band(n_q: int, n_k: int) -> Tensor:
        """[BQ, BK] of a block whose last query is its last key."""
        offset = n_k - n_q
        return torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(offset).triu(offset - window + 1)

    parts = []
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [1, H, T, D]
    for qd, kd, vd in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2)):
        for start in range(0, qd.shape[2], n_queries):
            end = min(start + n_queries, qd.shape[2])
            first = max(0, start - window + 1)
            is_inside = end <= window  # the window reaches back to the document's start for every query
            parts.append(
                F.scaled_dot_product_attention(
                    qd[:, :, start:end],
                    kd[:, :, first:end],
                    vd[:, :, first:end],
                    attn_mask=None if is_inside else band(end - start, end - first),
                    is_causal=is_inside,
                    enable_gqa=is_grouped,
                )
            )
    return cat(parts, dim=2).transpose(1, 2)


def _fla(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], window: int | None) -> Tensor:
    parallel_attn = imported("fla.ops.attn.parallel", "parallel_attn")
    return parallel_attn(
        q=q,
        k=k,
        v=v,
        scale=q.shape[-1] ** -0.5,
        window_size=window,  # fla too counts the query's own key
        cu_seqlens=cu_seqlens_on(tuple(cu_seqlens), q.device),
    )
