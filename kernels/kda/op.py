"""Kimi Delta Attention, public op: one signature over the torch reference and fla's Triton kernels."""

from torch import Tensor

from loopline.kernels.backends import check_boundaries, check_state, cu_seqlens_on, imported, unknown
from loopline.kernels.kda.reference import chunked

BACKENDS = ("fla", "reference")  # preferred first


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float,
    cu_seqlens: list[int],
    initial_state: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, H, K], bf16 or fp32, L2-normalised over K by the caller; K <= 256 with fla.
        v: [1, T, H, V], same dtype as q.
        g: [1, T, H, K], fp32, log decay of each key channel, <= 0.
        beta: [1, T, H], in (0, 1), or (0, 2) with negative eigenvalues.
        scale: factor on q.
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T, rising; state restarts at each.
        initial_state: [N, H, K, V], fp32; None means zeros.
        backend: "reference" or "fla"; resolve "auto" once with `kernels.backends.check_backend`.
    Returns:
        o: [1, T, H, V] in v.dtype; final_state: [N, H, K, V], fp32.
    Raises:
        ValueError: shapes disagree, or cu_seqlens does not run from 0 to T in rising order.
        BackendError: unknown backend.
    Reference: Kimi Team, Kimi Linear, arXiv:2510.26692, section 3.
    """
    _check_shapes(q, k, v, g, beta, cu_seqlens)
    check_state(initial_state, (len(cu_seqlens) - 1, *q.shape[2:], v.shape[3]))
    if backend == "reference":
        return chunked(q, k, v, g=g, beta=beta, scale=scale, cu_seqlens=cu_seqlens, initial_state=initial_state)
    if backend == "fla":
        return _fla(q, k, v, g=g, beta=beta, scale=scale, cu_seqlens=cu_seqlens, initial_state=initial_state)
    raise unknown("kda", backend, BACKENDS)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: list[int]) -> None:
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want [1, T, H, K|V] alike")
    if g.shape != q.shape:
        raise ValueError(f"g {tuple(g.shape)} must be [1, T, H, K] = {tuple(q.shape)}: one decay a key channel")
    if beta.shape != q.shape[:3]:
        raise ValueError(f"beta {tuple(beta.shape)} must be [1, T, H] = {tuple(q.shape[:3])}")
    check_boundaries(cu_seqlens, q.shape[0], q.shape[1])


def _fla(q, k, v, *, g, beta, scale, cu_seqlens, initial_state):  # type: ignore[no-untyped-def]
    # Keywords only, like every call of fla: its forms do not agree on the order of arguments. g is already a log decay,
    # so fla's own gate stays off.
    chunk_kda = imported("fla.ops.kda", "chunk_kda")
    return chunk_kda(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens_on(tuple(cu_seqlens), q.device),
    )
