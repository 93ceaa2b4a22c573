"""Linear attention with one decay per head, public op: one signature over the torch reference and fla's kernels."""

from torch import Tensor

from loopline.kernels.backends import check_boundaries, check_state, cu_seqlens_on, imported, unknown
from loopline.kernels.simple_gla.reference import chunked

BACKENDS = ("fla", "reference")  # preferred first


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Linear attention with one decay per head: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, G, K], bf16 or fp32; group i serves heads i * H/G to (i + 1) * H/G - 1. fla has no bf16
            gradient for odd K or V.
        v: [1, T, H, V], same dtype as q.
        g: [1, T, H], fp32, log decay, finite, <= 0; or [H], the same at every token.
        scale: factor on q.
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T, rising; state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
        backend: "reference" or "fla"; resolve "auto" once with `kernels.backends.check_backend`.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Raises:
        ValueError: shapes disagree, G does not divide H, or cu_seqlens does not run from 0 to T in rising order.
        BackendError: unknown backend.
    Reference: Dao and Gu, Transformers are SSMs (Mamba2), arXiv:2405.21060; Sun et al., RetNet, arXiv:2307.08621.
    """
    _check_shapes(q, k, v, g, cu_seqlens)
    check_state(initial_state, (len(cu_seqlens) - 1, v.shape[2], k.shape[3], v.shape[3]))
    if backend == "reference":
        return chunked(q, k, v, g=g, scale=scale, cu_seqlens=cu_seqlens, initial_state=initial_state)
    if backend == "fla":
        return _fla(q, k, v, g, scale, cu_seqlens, initial_state)
    raise unknown("simple_gla", backend, BACKENDS)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: list[int]) -> None:
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want [1, T, G, K] twice and [1, T, H, V]"
        )
    n_groups, n_heads = q.shape[2], v.shape[2]
    if n_heads % n_groups != 0:
        raise ValueError(f"{n_groups} groups of q and k do not divide the {n_heads} heads of v")
    if g.shape != v.shape[:3] and g.shape != (n_heads,):
        raise ValueError(f"g {tuple(g.shape)} must be [1, T, H] = {tuple(v.shape[:3])} or [H] = {(n_heads,)}")
    check_boundaries(cu_seqlens, q.shape[0], q.shape[1])


def _fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    chunk_simple_gla = imported("fla.ops.simple_gla", "chunk_simple_gla")
    # fla reads one q and k head per v head and with fewer returns NaN without an error.
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    # fla gives g_gamma no gradient, so a constant decay that learns is spelled out at every token.
    if g.dim() == 1 and g.requires_grad:
        g = g.expand(1, v.shape[1], -1)
    return chunk_simple_gla(
        q=q,
        k=k,
        v=v,
        g=g if g.dim() == 3 else None,
        g_gamma=g if g.dim() == 1 else None,
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens_on(tuple(cu_seqlens), q.device),
    )
