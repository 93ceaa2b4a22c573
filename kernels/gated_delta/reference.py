"""Gated delta rule in plain torch: the recurrence as written in the paper, and the same thing in chunks.

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
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, H, K], L2-normalised over K by the caller.
        v: [1, T, HV, V], HV a multiple of H: value head h reads key head h // (HV / H).
        g: [1, T, HV], log decay, <= 0.
        beta: [1, T, HV], in (0, 1), or (0, 2) with negative eigenvalues.
        scale: factor on q, usually K ** -0.5.
        cu_seqlens: document boundaries over T, N + 1 numbers from 0 to T; the state restarts at each.
        initial_state: [N, HV, K, V], fp32; None means zeros.
    Returns:
        o: [1, T, HV, V] in v.dtype; final_state: [N, HV, K, V], fp32.
    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464, eq. 10.
    """
    dtype = v.dtype
    q, k, v, g, beta = (wide(x[0]) for x in (q, k, v, g, beta))
    q, k = (x.repeat_interleave(v.shape[1] // k.shape[1], dim=1) for x in (q, k))
    outputs, states = [], []
    for doc, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if initial_state is None:
            state = q.new_zeros(k.shape[1], k.shape[2], v.shape[2])  # [H, K, V]
        else:
            state = wide(initial_state[doc])
        for t in range(start, end):
            state = state * g[t].exp()[:, None, None]
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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same recurrence with the WY form inside chunks of `chunk_size` tokens and a scan over chunks.

    Arguments and results are those of `recurrent`. With G_i the running sum of g inside a chunk:
        A_ij = beta_i exp(G_i - G_j) k_i.k_j  (i > j),   (I + A) U = beta V,   (I + A) W = beta exp(G) K,
        V' = U - W S,   O = exp(G) Q S + tril(exp(G_i - G_j) Q K^T) V',   S <- exp(G_C) S + (exp(G_C - G) K)^T V'.
    Reference: Yang et al., arXiv:2412.06464, section 3.3 (extended WY representation).
    """
    dtype = v.dtype
    n_heads, d_k, d_v = v.shape[2], k.shape[3], v.shape[3]
    chunks = Chunks.of(cu_seqlens, chunk_size, q.device)
    q, k, v, g, beta = (chunks.split(x) for x in (q, k, v, g, beta))  # [NT, H, C, K|V], g and beta [NT, H, C]
    q, k = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (q, k))
    q = q * scale
    # Sums in fp64: after a decay of exp(-1000), fp32 differences of sums, and their gradients, miss the small decays.
    decay = g.double().cumsum(-1)  # [NT, H, C]
    lower = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril()
    # Mask before exp: above the diagonal the difference is positive and could overflow, and inf * 0 has no gradient.
    difference = (decay[..., :, None] - decay[..., None, :]).to(q.dtype)
    ratio = difference.masked_fill(~lower, float("-inf")).exp()  # [NT, H, C, C]
    from_start = decay.to(q.dtype).exp()[..., None]  # [NT, H, C, 1]
    k_beta = k * beta[..., None]
    a = (k_beta @ k.mT * ratio).tril(-1)
    rhs = torch.cat([v * beta[..., None], k_beta * from_start], dim=-1)
    u, w = torch.linalg.solve_triangular(a, rhs, upper=False, unitriangular=True).split([d_v, d_k], dim=-1)
    scores = q @ k.mT * ratio
    q_in = q * from_start
    k_out = k * ratio[..., -1, :, None]
    whole = from_start[..., -1:, :]  # [NT, H, 1, 1]

    def step(rows: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        v_new = u[rows] - w[rows] @ state
        o = q_in[rows] @ state + scores[rows] @ v_new
        return o, state * whole[rows] + k_out[rows].mT @ v_new

    if initial_state is None:
        initial_state = q.new_zeros(len(cu_seqlens) - 1, n_heads, d_k, d_v)
    o, final_state = chunks.scan(wide(initial_state), step)
    return o.to(dtype), final_state
