"""Gated linear attention in plain torch: the recurrence as written in the paper, and the same thing in chunks.

`recurrent` is the definition, one token at a time. `chunked` does the same work with matrix products and is what
CPU runs train with. Both compute in fp32, or in fp64 where the inputs are. Fast kernels are held to these.
"""

import itertools

import torch
from torch import Tensor

from loopline.kernels.chunks import Chunks
from loopline.kernels.precision import wide


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T,  o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, H, K]; HGRN2 gives k = 1 - exp(g).
        v: [1, T, H, V].
        g: [1, T, H, K], log decay of each key channel, finite, <= 0.
        scale: factor on q, usually K ** -0.5.
        cu_seqlens: document boundaries over T, N + 1 numbers from 0 to T; the state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Reference: Yang et al., Gated Linear Attention, arXiv:2312.06635, section 4 (recurrent form).
    """
    dtype = v.dtype
    q, k, v, g = (wide(x[0]) for x in (q, k, v, g))
    outputs, states = [], []
    for doc, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if initial_state is None:
            state = q.new_zeros(k.shape[1], k.shape[2], v.shape[2])  # [H, K, V]
        else:
            state = wide(initial_state[doc])
        for t in range(start, end):
            state = state * g[t].exp()[..., None] + torch.einsum("hk,hv->hkv", k[t], v[t])
            outputs.append(torch.einsum("hk,hkv->hv", q[t] * scale, state))
        states.append(state)
    return torch.stack(outputs)[None].to(dtype), torch.stack(states)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """The same recurrence with matrix products inside chunks of `chunk_size` tokens and a scan over chunks.

    Arguments and results are those of `recurrent`. With G_i [K] the running sum of g inside a chunk:
        A_ij = sum_c q_ic k_jc exp(G_ic - G_jc)  (i >= j),
        O = (exp(G) Q) S + A V,   S <- Diag(exp(G_C)) S + (exp(G_C - G) K)^T V.
    exp(G_i - G_j) is spelled out, T * chunk_size * H * K numbers: the usual product of exp(G) Q and exp(-G) K
    overflows once a channel has decayed by exp(-88). Hence the short chunk.
    Reference: Yang et al., arXiv:2312.06635, section 4 (chunkwise form; the ratio as in secondary-level chunking).
    """
    dtype = v.dtype
    n_heads, d_k, d_v = k.shape[2], k.shape[3], v.shape[3]
    chunks = Chunks.of(cu_seqlens, chunk_size, q.device)
    q, k, v, g = (chunks.split(x) for x in (q, k, v, g))  # [NT, H, C, K|V], g [NT, H, C, K]
    q = q * scale
    # Sums in fp64: after a decay of exp(-1000), fp32 differences of sums, and their gradients, miss the small decays.
    decay = g.double().cumsum(-2)  # [NT, H, C, K]
    lower = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril()
    # Mask before exp: above the diagonal the difference is positive and could overflow, and inf * 0 has no gradient.
    difference = (decay[..., :, None, :] - decay[..., None, :, :]).to(q.dtype)
    ratio = difference.masked_fill(~lower[..., None], float("-inf")).exp()  # [NT, H, C, C, K]
    scores = ((k[..., None, :, :] * ratio) @ q[..., None]).squeeze(-1)  # [NT, H, C, C]
    o_intra = scores @ v
    decay = decay.to(q.dtype)
    q_in = q * decay.exp()
    k_out = k * ratio[..., -1, :, :]
    kept = decay[..., -1, :, None].exp()  # [NT, H, K, 1]

    def step(rows: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        return o_intra[rows] + q_in[rows] @ state, state * kept[rows] + k_out[rows].mT @ v[rows]

    if initial_state is None:
        initial_state = q.new_zeros(len(cu_seqlens) - 1, n_heads, d_k, d_v)
    o, final_state = chunks.scan(wide(initial_state), step)
    return o.to(dtype), final_state
