"""Kimi Delta Attention in plain torch: the recurrence as written in the paper, and the same thing in chunks.

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
    beta: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, H, K], L2-normalised over K by the caller.
        v: [1, T, H, V].
        g: [1, T, H, K], log decay of each key channel, <= 0.
        beta: [1, T, H], in (0, 1), or (0, 2) with negative eigenvalues.
        scale: factor on q, usually K ** -0.5.
        cu_seqlens: document boundaries over T, N + 1 numbers from 0 to T; the state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Reference: Kimi Team, Kimi Linear, arXiv:2510.26692, section 3.
    """
    dtype = v.dtype
    q, k, v, g, beta = (wide(x[0]) for x in (q, k, v, g, beta))
    outputs, states = [], []
    for doc, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if initial_state is None:
            state = q.new_zeros(k.shape[1], k.shape[2], v.shape[2])  # [H, K, V]
        else:
            state = wide(initial_state[doc])
        for t in range(start, end):
            state = state * g[t].exp()[:, :, None]
            read = torch.einsum("hk,hkv->hv", k[t], state)
            state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v[t] - read))
            outputs.append(torch.einsum("hk,hkv->hv", q[t] * scale, state))
        states.append(state)
    return torch.stack(outputs)[None].to(dtype), torch.stack(states)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """The same recurrence with the WY form inside chunks of `chunk_size` tokens and a scan over chunks.

    Arguments and results are those of `recurrent`. With D_ij = exp(g_{j+1} + ... + g_i) and G_i the sum of g from the
    chunk's start to i, both [K]:
        A_ij = beta_i sum_K(k_i k_j D_ij)  (i > j),   (I + A) U = beta V,   (I + A) W = beta exp(G) K,   V' = U - W S,
        O = exp(G) Q S + P V', P_ij = sum_K(q_i k_j D_ij)  (i >= j),   S <- Diag(exp(G_C)) S + (D_C. K)^T V'.
    D is [C, C, K] a chunk, T * chunk_size * H * K numbers in all: hence the small chunks.
    Reference: Kimi Team, arXiv:2510.26692, section 3 (chunkwise form).
    """
    dtype = v.dtype
    n_heads, d_k, d_v = k.shape[2], k.shape[3], v.shape[3]
    chunks = Chunks.of(cu_seqlens, chunk_size, q.device)
    q, k, v, g, beta = (chunks.split(x) for x in (q, k, v, g, beta))  # [NT, H, C, K|V], beta [NT, H, C]
    q = q * scale
    k_beta = k * beta[..., None]
    below = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril(-1)
    # Each span is summed by itself. As differences of running sums, spans after a strong decay would be left with the
    # rounding of sums near 1000. On and above the diagonal the sum is empty, so exp never overflows.
    spans = torch.where(below[..., None], g[..., :, None, :], 0.0).cumsum(-3)  # [NT, H, C, C, K], sum over j < s <= i
    ratio = spans.exp()
    pairs = (ratio * k[..., None, :, :]) @ torch.stack([k_beta, q], dim=-1)  # [NT, H, C, C, 2]
    a, scores = pairs[..., 0].tril(-1), pairs[..., 1].tril()
    from_start = g.cumsum(-2).exp()  # [NT, H, C, K]
    rhs = torch.cat([v * beta[..., None], k_beta * from_start], dim=-1)
    u, w = torch.linalg.solve_triangular(a, rhs, upper=False, unitriangular=True).split([d_v, d_k], dim=-1)
    q_in = q * from_start
    k_out = k * ratio[..., -1, :, :]
    whole = from_start[..., -1, :, None]  # [NT, H, K, 1]

    def step(rows: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        v_new = u[rows] - w[rows] @ state
        o = q_in[rows] @ state + scores[rows] @ v_new
        return o, state * whole[rows] + k_out[rows].mT @ v_new

    if initial_state is None:
        initial_state = q.new_zeros(len(cu_seqlens) - 1, n_heads, d_k, d_v)
    o, final_state = chunks.scan(wide(initial_state), step)
    return o.to(dtype), final_state
