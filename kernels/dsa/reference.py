"""DeepSeek sparse attention by loops over queries, T x T and with autograd: the judges of op.py, never run in training.

Argument shapes are those of op.py. Everything is computed in fp32, or in fp64 where the inputs are.
"""

import itertools

import torch
from torch import Tensor

from loopline.kernels.precision import wide


def past(cu_seqlens: list[int]) -> list[list[int]]:
    """For each token, the positions of its document up to itself."""
    return [list(range(start, t + 1)) for start, end in itertools.pairwise(cu_seqlens) for t in range(start, end)]


def index_scores(q_index: Tensor, k_index: Tensor, weights: Tensor) -> Tensor:
    """I_ts = sum_j w_tj relu(q_tj . k_s), eq. 1 of arXiv:2512.02556; [T, HI, DI], [S, DI], [T, HI] -> [T, S]."""
    q_index, k_index, weights = wide(q_index), wide(k_index), wide(weights)
    rows = []
    for t in range(q_index.shape[0]):
        row = k_index.new_zeros(k_index.shape[0])
        for j in range(q_index.shape[1]):
            row = row + weights[t, j] * torch.relu(k_index @ q_index[t, j])
        rows.append(row)
    return torch.stack(rows)


def select(q_index: Tensor, k_index: Tensor, weights: Tensor, *, top_k: int, cu_seqlens: list[int]) -> Tensor:
    """The top_k positions of each query's past by (score, highest first; position, lowest first); see op.select."""
    scores = index_scores(q_index[0], k_index[0], weights[0]).tolist()
    n_slots = min(top_k, max(end - start for start, end in itertools.pairwise(cu_seqlens)))
    rows = []
    for row, positions in zip(scores, past(cu_seqlens)):
        best = sorted(positions, key=lambda s: (-row[s], s))[:top_k]
        rows.append(sorted(best) + [-1] * (n_slots - len(best)))
    return torch.tensor(rows, dtype=torch.int32)


def key_sets(selection: Tensor | None, cu_seqlens: list[int]) -> list[list[int]]:
    """For each query the keys it attends to: its past, or what is selected of it."""
    if selection is None:
        return past(cu_seqlens)
    return [[s for s in row if s >= 0] for row in selection.tolist()]


def probabilities(q: Tensor, k: Tensor, selection: Tensor | None, *, cu_seqlens: list[int], scale: float) -> Tensor:
    """softmax(scale q_t k^T) over each query's keys, 0 elsewhere: [H, T, T]."""
    q, k = wide(q[0]), wide(k[0])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    mask = torch.zeros(q.shape[0], q.shape[0], dtype=torch.bool)
    for t, keys in enumerate(key_sets(selection, cu_seqlens)):
        mask[t, keys] = True
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor | None, *, cu_seqlens: list[int], scale: float
) -> Tensor:
    """softmax(scale q k^T) v over the selected keys; see op.sparse_attention."""
    p = probabilities(q, k, selection, cu_seqlens=cu_seqlens, scale=scale)
    values = wide(v[0]).repeat_interleave(q.shape[2] // v.shape[2], dim=1)
    return torch.einsum("hts,shv->thv", p, values)[None].to(v.dtype)


def indexer_loss(
    target: Tensor,
    selection: Tensor | None,
    *,
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    cu_seqlens: list[int],
) -> Tensor:
    """sum_t KL(p_t || softmax(I_t)) over each query's keys, differentiable in the indexer's tensors.

    Args:
        target: [T, T], p up to a factor per query, e.g. `probabilities` summed over heads; not differentiated.
    """
    scores = index_scores(q_index[0], k_index[0], weights[0])
    loss = scores.new_zeros(())
    for t, keys in enumerate(key_sets(selection, cu_seqlens)):
        p = target[t, keys].detach() / target[t, keys].detach().sum()
        loss = loss + (torch.xlogy(p, p) - p * scores[t, keys].log_softmax(-1)).sum()
    return loss


def attention_recall(
    q: Tensor, k: Tensor, selection: Tensor, *, cu_seqlens: list[int], scale: float
) -> tuple[float, float]:
    """Mass of dense attention on the selected keys and on the best as many; see op.attention_recall."""
    mass = probabilities(q, k, None, cu_seqlens=cu_seqlens, scale=scale).mean(0).tolist()
    selected, best = 0.0, 0.0
    for row, keys in zip(mass, key_sets(selection, cu_seqlens)):
        selected += sum(row[s] for s in keys)
        best += sum(sorted(row, reverse=True)[: selection.shape[1]])
    return selected, best
