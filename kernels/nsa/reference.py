"""Native Sparse Attention in plain torch: with every mask written out, and by blocks of queries.

`dense_nsa` is the definition. `blocked` does the same work a few queries at a time and is what training runs. Both
compute in fp32, or in fp64 where the inputs are, and take the selected blocks as given.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopline.kernels.attention.reference import document_and_position, masked_softmax
from loopline.kernels.nsa.blocks import NsaSizes, block_probabilities, documents
from loopline.kernels.precision import wide

Pooled = tuple[Tensor, Tensor]


def dense_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Tensor,
    pooled: Pooled,
    selection: Tensor,
    sizes: NsaSizes,
    cu_seqlens: list[int],
    scale: float,
) -> Tensor:
    """o_t = g_cmp o_cmp + g_sel o_sel + g_win o_win, each o a softmax attention of q_t under a mask over the whole row.

    Args:
        q: [1, T, H, D].
        k, v: [1, T, G, D].
        gates: [1, T, H, 3], in the order compressed, selected, window.
        pooled: keys and values of complete blocks, [1, NB, G, D] each.
        selection: [1, T, G, S], blocks each query reads, counted in its document; -1 is none.
        sizes: of the branches.
        cu_seqlens: N + 1 document boundaries, from 0 to T.
        scale: factor on q.
    Returns:
        [1, T, H, D] in v.dtype.
    Reference: Yuan et al., Native Sparse Attention, arXiv:2502.11089, section 3.
    """
    dtype, size, n_tokens = v.dtype, sizes.block_size, cu_seqlens[-1]
    group = q.shape[2] // k.shape[2]
    q, k, v, gates, selection = (x[0] for x in (q, k, v, gates, selection))
    q, k, v, gates, k_pool, v_pool = (wide(x) for x in (q, k, v, gates, pooled[0][0], pooled[1][0]))

    document, position = document_and_position(cu_seqlens, q.device)
    is_last = position % size == size - 1  # the token that completes a block
    at_block, at_token = torch.arange(n_tokens, device=q.device)[is_last], torch.arange(n_tokens, device=q.device)
    is_past = (document[:, None] == document[None, :]) & (at_token[:, None] >= at_token[None, :])  # [T, T]
    back = at_token[:, None] - at_token[None, :]
    is_chosen = (selection[:, :, None, :] == (position // size)[None, None, :, None]).any(-1)  # [T, G, T]

    def attend(keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """[T, H, D] of q against keys [S, G, D], where visible [H or 1, T, S]."""
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q, keys) * scale
        return torch.einsum("hts,shd->thd", masked_softmax(scores, visible), values)

    compressed = attend(k_pool, v_pool, is_past[None, :, at_block])
    selected = attend(k, v, is_past & is_chosen.repeat_interleave(group, dim=1).transpose(0, 1))
    window = attend(k, v, (is_past & (back < sizes.window))[None])
    o = gates[..., 0:1] * compressed + gates[..., 1:2] * selected + gates[..., 2:3] * window
    return o[None].to(dtype)


def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Tensor,
    pooled: Pooled,
    selection: Tensor,
    sizes: NsaSizes,
    cu_seqlens: list[int],
    scale: float,
    n_rows: int = 64,
) -> Tensor:
    """The same, `n_rows` queries of one document at a time against the keys up to the last of them.

    Arguments and result are those of `dense_nsa`, and q, gates and selection may hold only the last T_q queries of a
    row with one document. Scores are recomputed backward, so no more than [H, n_rows, T] of them exist at once.
    """
    outputs = []
    for document in documents(cu_seqlens, q.shape[1], sizes.block_size):
        k_doc, v_doc = wide(k[0, document.keys]), wide(v[0, document.keys])  # [L, G, D]
        k_pool, v_pool = (wide(x[0, document.pooled]) for x in pooled)
        rows = [x[0, document.queries].split(n_rows) for x in (q, gates, selection)]
        first = document.first
        for q_rows, gate_rows, selection_rows in zip(*rows):
            end = first + len(q_rows)
            n_complete = end // sizes.block_size
            outputs.append(
                checkpoint(
                    _attend_rows,
                    q_rows,
                    k_doc[:end],
                    v_doc[:end],
                    gate_rows,
                    k_pool[:n_complete],
                    v_pool[:n_complete],
                    selection_rows,
                    sizes,
                    scale,
                    use_reentrant=False,
                    preserve_rng_state=False,  # nothing random inside
                )
            )
            first = end
    return torch.cat(outputs)[None].to(v.dtype)


def _attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    selection: Tensor,
    sizes: NsaSizes,
    scale: float,
) -> Tensor:
    """[n, H, D] of n queries, the last of which stands at the last of k [L, G, D]."""
    q = wide(q).unflatten(1, (k.shape[1], -1))  # [n, G, R, D]
    gates = wide(gates).unflatten(1, (k.shape[1], -1))  # [n, G, R, 3]
    token = torch.arange(len(k), device=q.device)
    positions = token[-len(q) :]
    back = positions[:, None] - token  # [n, L]

    p = block_probabilities(q, k_pool, positions=positions, block_size=sizes.block_size, scale=scale)
    compressed = torch.einsum("grnb,bgd->ngrd", p, v_pool)

    scores = torch.einsum("ngrd,sgd->grns", q, k) * scale
    block = torch.arange((len(k) - 1) // sizes.block_size + 1, device=q.device)
    is_chosen = (selection[..., None] == block).any(-2)[..., token // sizes.block_size]  # [n, G, L]
    visible = is_chosen.transpose(0, 1)[:, None] & (back >= 0)  # [G, 1, n, L]
    selected = torch.einsum("grns,sgd->ngrd", masked_softmax(scores, visible), v)

    band = slice(max(0, len(k) - len(q) - sizes.window + 1), None)
    visible = ((back >= 0) & (back < sizes.window))[:, band]
    window = torch.einsum("grns,sgd->ngrd", masked_softmax(scores[..., band], visible), v[band])

    o = gates[..., 0:1] * compressed + gates[..., 1:2] * selected + gates[..., 2:3] * window
    return o.flatten(1, 2)
