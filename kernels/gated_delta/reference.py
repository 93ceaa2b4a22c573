"""Gated delta rule in plain torch: the recurrence as written in the paper, and the same thing in chunks.

`recurrent` is the definition, one token at a time. `chunked` does the same work with matrix products and is what
CPU runs train with. Both compute in fp32. Fast kernels live elsewhere and are held to these.
"""

import functools
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


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
        v: [1, T, H, V].
        g: [1, T, H], log decay, <= 0.
        beta: [1, T, H], in (0, 1), or (0, 2) with negative eigenvalues.
        scale: factor on q, usually K ** -0.5.
        cu_seqlens: document boundaries over T, N + 1 numbers from 0 to T; the state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464, eq. 10.
    """
    dtype = v.dtype
    q, k, v, g, beta = (x[0].float() for x in (q, k, v, g, beta))
    outputs, states = [], []
    for doc, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if initial_state is None:
            state = q.new_zeros(k.shape[1], k.shape[2], v.shape[2])  # [H, K, V]
        else:
            state = initial_state[doc].float()
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
    n_heads, d_k, d_v = k.shape[2], k.shape[3], v.shape[3]
    longest = max(e - s for s, e in itertools.pairwise(cu_seqlens))
    size = min(chunk_size, longest)
    gather, chunk_rows = _chunk_layout(tuple(cu_seqlens), size, q.device)

    def to_chunks(x: Tensor) -> Tensor:
        # One zero row stands for padding: k = v = beta = g = 0 leaves the state as it is.
        padded = F.pad(x[0].float(), (0, 0) * (x.dim() - 2) + (0, 1))
        return padded[gather].movedim(2, 1)  # [NT, H, C, ...]

    q, k, v, g, beta = to_chunks(q) * scale, to_chunks(k), to_chunks(v), to_chunks(g), to_chunks(beta)
    decay = g.cumsum(-1)  # [NT, H, C]
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # Mask before exp: above the diagonal the difference is positive and could overflow, and inf * 0 has no gradient.
    ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, float("-inf")).exp()  # [NT, H, C, C]
    k_beta = k * beta[..., None]
    a = (k_beta @ k.mT * ratio).tril(-1)
    rhs = torch.cat([v * beta[..., None], k_beta * decay.exp()[..., None]], dim=-1)
    u, w = torch.linalg.solve_triangular(a, rhs, upper=False, unitriangular=True).split([d_v, d_k], dim=-1)
    scores = q @ k.mT * ratio
    q_in = q * decay.exp()[..., None]
    last = decay[..., -1:]  # [NT, H, 1]
    k_out = k * (last - decay).exp()[..., None]

    # Scan over chunk number j, all documents that still have a j-th chunk at once.
    n_docs = len(cu_seqlens) - 1
    if initial_state is None:
        state = q.new_zeros(n_docs, n_heads, d_k, d_v)
    else:
        state = initial_state.float()
    outputs: list[Tensor] = []
    final: list[Tensor | None] = [None] * n_docs
    alive = list(range(n_docs))  # documents in `state`, longest first
    order: list[int] = []
    alive.sort(key=lambda d: -len(chunk_rows[d]))
    state = state[alive]
    for j in range(len(chunk_rows[alive[0]])):
        while len(chunk_rows[alive[-1]]) <= j:
            final[alive[-1]] = state[len(alive) - 1]
            alive.pop()
        state = state[: len(alive)]
        rows = [chunk_rows[d][j] for d in alive]
        order += rows
        v_new = u[rows] - w[rows] @ state
        outputs.append(q_in[rows] @ state + scores[rows] @ v_new)
        state = state * last[rows].exp()[..., None] + k_out[rows].mT @ v_new
    for i, d in enumerate(alive):
        final[d] = state[i]

    o = torch.cat(outputs).movedim(1, 2).flatten(0, 1)  # [NT * C, H, V], in scan order
    source = gather[order].flatten()  # token each row stands for; T marks padding
    rows_of_token = torch.empty(cu_seqlens[-1] + 1, dtype=torch.long, device=q.device)
    rows_of_token[source] = torch.arange(len(source), device=q.device)
    return o[rows_of_token[:-1]][None].to(dtype), torch.stack([s for s in final if s is not None])


@functools.lru_cache(maxsize=16)  # one row's layout serves every block and loop
def _chunk_layout(cu_seqlens: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, list[list[int]]]:
    """Tokens of each chunk, [NT, C] with T for padding, and the chunk numbers of each document."""
    total = cu_seqlens[-1]
    rows: list[list[int]] = []
    chunk_rows: list[list[int]] = []
    for start, end in itertools.pairwise(cu_seqlens):
        chunk_rows.append([])
        for first in range(start, end, size):
            chunk_rows[-1].append(len(rows))
            rows.append([t if t < end else total for t in range(first, first + size)])
    return torch.tensor(rows, device=device), chunk_rows
