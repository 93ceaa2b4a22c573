"""Delta rule (DeltaNet) in plain torch: the recurrence as written in the paper, and the same thing in chunks.

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
    beta: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, H, K], L2-normalised over K by the caller.
        v: [1, T, H, V].
        beta: [1, T, H], in (0, 1), or (0, 2) with negative eigenvalues.
        scale: factor on q, usually K ** -0.5.
        cu_seqlens: document boundaries over T, N + 1 numbers from 0 to T; the state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Reference: Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484, section 2.2.
    """
    dtype = v.dtype
    q, k, v, beta = (wide(x[0]) for x in (q, k, v, beta))
    outputs, states = [], []
    for doc, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if initial_state is None:
            state = q.new_zeros(k.shape[1], k.shape[2], v.shape[2])  # [H, K, V]
        else:
            state = wide(initial_state[doc])
        for t in range(start, end):
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
    beta: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same recurrence with the WY form inside chunks of `chunk_size` tokens and a scan over chunks.

    Arguments and results are those of `recurrent`:
        A_ij = beta_i k_i.k_j  (i > j),   (I + A) U = beta V,   (I + A) W = beta K,
        V' = U - W S,   O = Q S + tril(Q K^T) V',   S <- S + K^T V'.
    Reference: Yang et al., arXiv:2406.06484, section 3.
    """
    dtype = v.dtype
    n_heads, d_k, d_v = k.shape[2], k.shape[3], v.shape[3]
    chunks = Chunks.of(cu_seqlens, chunk_size, q.device)
    q, k, v, beta = (chunks.split(x) for x in (q, k, v, beta))  # [NT, H, C, K|V], beta [NT, H, C]
    q = q * scale
    k_beta = k * beta[..., None]
    a = (k_beta @ k.mT).tril(-1)  # [NT, H, C, C]
    rhs = torch.cat([v * beta[..., None], k_beta], dim=-1)
    u, w = torch.linalg.solve_triangular(a, rhs, upper=False, unitriangular=True).split([d_v, d_k], dim=-1)
    scores = (q @ k.mT).tril()

    def step(rows: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        v_new = u[rows] - w[rows] @ state
        return q[rows] @ state + scores[rows] @ v_new, state + k[rows].mT @ v_new

    if initial_state is None:
        initial_state = q.new_zeros(len(cu_seqlens) - 1, n_heads, d_k, d_v)
    o, final_state = chunks.scan(wide(initial_state), step)
    return o.to(dtype), final_state
