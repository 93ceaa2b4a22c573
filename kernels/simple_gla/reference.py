"""Linear attention with one decay per head, in plain torch: the recurrence, and the same thing in chunks.

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
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, G, K]; each of the G groups serves H/G neighbouring heads of v.
        v: [1, T, H, V].
        g: [1, T, H], log decay, finite, <= 0; or [H], the same at every token.
        scale: factor on q.
        cu_seqlens: document boundaries over T, N + 1 numbers from 0 to T; the state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Reference: Dao and Gu, Transformers are SSMs, arXiv:2405.21060, the SSM with scalar times identity A, where q = C,
        k = B, v = dt x, g = dt A; Sun et al., RetNet, arXiv:2307.08621, recurrent form, where g is constant.
    """
    dtype = v.dtype
    n_tokens, n_heads, d_v = v.shape[1:]
    q, k, v, g = (wide(x[0]) for x in (q, k, v, _per_token(g, n_tokens)))
    q, k = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (q, k))  # [T, H, K]
    outputs, states = [], []
    for doc, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if initial_state is None:
            state = q.new_zeros(n_heads, k.shape[2], d_v)  # [H, K, V]
        else:
            state = wide(initial_state[doc])
        for t in range(start, end):
            state = state * g[t].exp()[:, None, None] + torch.einsum("hk,hv->hkv", k[t], v[t])
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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same recurrence with matrix products inside chunks of `chunk_size` tokens and a scan over chunks.

    Arguments and results are those of `recurrent`. With G_i the running sum of g inside a chunk:
        O = exp(G) (Q S) + tril(exp(G_i - G_j) Q K^T) V,   S <- exp(G_C) S + K^T (exp(G_C - G) V).
    Decays stand on the side of v, so that q and k are used once per group and never copied to its heads.
    Reference: Dao and Gu, arXiv:2405.21060, section 6 (block decomposition of the semiseparable matrix).
    """
    dtype = v.dtype
    n_tokens, n_heads, d_v = v.shape[1:]
    n_groups, d_k = k.shape[2:]
    chunks = Chunks.of(cu_seqlens, chunk_size, q.device)
    q, k, v, g = (chunks.split(x) for x in (q, k, v, _per_token(g, n_tokens)))
    q = q * scale  # [NT, G, C, K], as k
    v, g = (x.unflatten(1, (n_groups, n_heads // n_groups)) for x in (v, g))  # [NT, G, H/G, C, V], [NT, G, H/G, C]
    # Sums in fp64: after a decay of exp(-1000), fp32 differences of sums, and their gradients, miss the small decays.
    decay = g.double().cumsum(-1)  # [NT, G, H/G, C]
    lower = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).tril()
    # Mask before exp: above the diagonal the difference is positive and could overflow, and inf * 0 has no gradient.
    difference = (decay[..., :, None] - decay[..., None, :]).to(q.dtype)
    ratio = difference.masked_fill(~lower, float("-inf")).exp()  # [NT, G, H/G, C, C]
    o_intra = (q @ k.mT)[:, :, None] * ratio @ v  # [NT, G, H/G, C, V]
    decay = decay.to(q.dtype).exp()[..., None]
    kept = decay[..., -1:, :]  # [NT, G, H/G, 1, 1]
    v_out = v * ratio[..., -1, :, None]

    def step(rows: list[int], state: Tensor) -> tuple[Tensor, Tensor]:
        read = torch.einsum("ngck,ngpkv->ngpcv", q[rows], state)
        written = torch.einsum("ngck,ngpcv->ngpkv", k[rows], v_out[rows])
        return (o_intra[rows] + decay[rows] * read).flatten(1, 2), state * kept[rows] + written

    if initial_state is None:
        initial_state = q.new_zeros(len(cu_seqlens) - 1, n_heads, d_k, d_v)
    state = wide(initial_state).unflatten(1, (n_groups, n_heads // n_groups))
    o, final_state = chunks.scan(state, step)
    return o.to(dtype), final_state.flatten(1, 2)


def _per_token(g: Tensor, n_tokens: int) -> Tensor:
    """g [1, T, H] as it is, g [H] at every token."""
    return g if g.dim() == 3 else g.expand(1, n_tokens, -1)
