"""Causal softmax attention written out, masks over the whole packed row, any window: the slow judge of the others."""

import torch
from torch import Tensor

from loopline.kernels.precision import wide


def dense_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], *, window: int | None = None) -> Tensor:
    """o_t = sum_s softmax_s(q_t k_s / sqrt(D)) v_s over s <= t of t's document, and t - window < s where given.

    Args:
        q: [1, T, H, D].
        k, v: [1, T, G, D]; query head h reads key/value head h // (H / G).
        cu_seqlens: N + 1 document boundaries, from 0 to T.
        window: keys a query sees, itself included; None means all of its document.
    Returns:
        [1, T, H, D] in v.dtype.
    Reference: Vaswani et al., arXiv:1706.03762, eq. 1.
    """
    visible = visible_keys(cu_seqlens, window, q.device)
    return masked_attention(q, k, v, visible, scale=q.shape[-1] ** -0.5)[0]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """o_t = sum_s softmax_s(scale q_t k_s) v_s over the keys each query sees, whichever they are.

    Args:
        q: [1, T, H, D].
        k: [1, T, G, D]; v: [1, T, G, V]; query head h reads key/value head h // (H / G).
        visible: [T, T], bool: query t (row) sees key s. A query that sees none gives 0, and no gradient.
    Returns:
        o: [1, T, H, V] in v.dtype; lse: [H, T], log sum_s exp(scale q_t k_s), -inf for a query that sees none.
    """
    dtype = v.dtype
    q, k, v = (wide(x[0]) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # [T, H, D]
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    lse = scores.detach().masked_fill(~visible, float("-inf")).logsumexp(-1)
    return torch.einsum("hts,shd->thd", masked_softmax(scores, visible), v)[None].to(dtype), lse


def visible_keys(cu_seqlens: list[int], window: int | None, device: torch.device) -> Tensor:
    """Keys of each query's document up to itself, within its window where given: [T, T], bool."""
    document, position = document_and_position(cu_seqlens, device)
    back = position[:, None] - position[None, :]  # [T, T], how far key s lies behind query t
    visible = (document[:, None] == document[None, :]) & (back >= 0)
    return visible if window is None else visible & (back < window)


def selected_keys(bitmask: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Keys each query selects by a bitmask [T, W] int32, as kernels/attention/launch.py takes it: [T, T], bool.

    Bit s % 32 of word [t, s // 32] stands for key s of t's document, counted from its start. Keys after t are included.
    """
    document, position = document_and_position(cu_seqlens, bitmask.device)
    bits = bitmask[:, position // 32] >> (position % 32) & 1  # [T, T]
    return (bits == 1) & (document[:, None] == document[None, :])


def document_and_position(cu_seqlens: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Document of each token of the row and its position in that document, [T] each."""
    bounds = torch.tensor(cu_seqlens, device=device)
    tokens = torch.arange(cu_seqlens[-1], device=device)
    document = torch.bucketize(tokens, bounds[1:], right=True)
    return document, tokens - bounds[document]


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible entries of the last dim; rows without one are zero, and so are their gradients.

    Args:
        scores: [..., S], fp32 or fp64.
        visible: [..., S], bool, broadcast to scores.
    Returns:
        Probabilities shaped as scores.
    """
    # The lowest finite number, not -inf: a row of -inf is NaN forward, and NaN * 0 backward.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0)
