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
    dtype = v.dtype
    q, k, v = (wide(x[0]) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # [T, H, D]
    document, position = document_and_position(cu_seqlens, q.device)
    back = position[:, None] - position[None, :]  # [T, T], how far key s lies behind query t
    visible = (document[:, None] == document[None, :]) & (back >= 0)
    if window is not None:
        visible &= back < window
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hts,shd->thd", masked_softmax(scores, visible), v)[None].to(dtype)


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
