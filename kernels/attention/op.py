"""Causal softmax attention over packed documents, on torch's scaled_dot_product_attention."""

import itertools

from torch import Tensor, cat
from torch.nn import functional as F


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal, inside each document.

    Documents are attended one by one, so nothing of size T x T over the packed row is ever held, and torch picks its
    flash kernel for each.

    Args:
        q: [1, T, H, D].
        k, v: [1, T, G, D], G divides H (grouped queries).
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T.
    Returns:
        [1, T, H, D].
    Reference: Vaswani et al., arXiv:1706.03762; GQA: Ainslie et al., arXiv:2305.13245.
    """
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
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
