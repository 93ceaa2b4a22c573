"""Gated linear attention, public op: one signature over the torch reference and fla's Triton kernels."""

from torch import Tensor

from loopline.kernels.backends import check_boundaries, check_state, cu_seqlens_on, imported, unknown
from loopline.kernels.gla.reference import chunked

BACKENDS = ("fla", "reference")  # preferred first


def gla(
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
    """Gated linear attention: S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, H, K], bf16 or fp32; HGRN2 gives k = 1 - exp(g).
        v: [1, T, H, V], same dtype as q.
        g: [1, T, H, K], fp32, log decay of each key channel, finite, <= 0.
        scale: factor on q.
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T, rising; state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
        backend: "reference" or "fla"; resolve "auto" once with `kernels.backends.check_backend`.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Raises:
        ValueError: shapes disagree, or cu_seqlens does not run from 0 to T in rising order.
        BackendError: unknown backend.
    Reference: Yang et al., Gated Linear Attention, arXiv:2312.06635; Qin et al., HGRN2, arXiv:2404.07904.
    """
    _check_shapes(q, k, v, g, cu_seqlens)
    check_state(initial_state, (len(cu_seqlens) - 1, *q.shape[2:], v.shape[3]))
    if backend == "reference":
        return chunked(q, k, v, g=g, scale=scale, cu_seqlens=cu_seqlens, initial_state=initial_state)
    if backend == "fla":
        return _fla(q, k, v, g, scale, cu_seqlens, initial_state)
    raise unknown("gla", backend, BACKENDS)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: list[int]) -> None:
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want [1, T, H, K|V] alike")
    if g.shape != q.shape:
        raise ValueError(f"g {tuple(g.shape)} must be [1, T, H, K] = {tuple(q.shape)}")
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
    # Keywords only: fla's forms name the gate g here and gk in the recurrent ones.
    chunk_gla = imported("fla.ops.gla", "chunk_gla")
    return chunk_gla(
        q=q,
        k=k,
        v=v,
        g=g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens_on(tuple(cu_seqlens), q.device),
    )
