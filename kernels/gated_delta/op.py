"""Gated delta rule, public op: one signature over the torch reference, our Triton kernels and fla's."""

from typing import Any

from torch import Tensor

from loopline.kernels.backends import (
    Boundaries,
    check_boundaries,
    check_state,
    cu_seqlens_on,
    imported,
    listed,
    unknown,
)
from loopline.kernels.gated_delta.reference import chunked
from loopline.kernels.precision import l2_normalize

BACKENDS = ("fla", "triton", "reference")  # preferred first


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float,
    cu_seqlens: Boundaries,
    initial_state: Tensor | None = None,
    normalize: bool = False,
    output_final_state: bool = False,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale * S_t^T q_t.

    Args:
        q, k: [1, T, H, K], bf16 or fp32, L2-normalised over K by the caller unless `normalize`; K <= 256 with fla.
        v: [1, T, HV, V], same dtype as q; HV a multiple of H: value head h reads key head h // (HV / H).
        g: [1, T, HV], fp32, log decay, <= 0.
        beta: [1, T, HV], in (0, 1), or (0, 2) with negative eigenvalues.
        scale: factor on q.
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T, rising; state restarts at each. A tensor makes
            one graph of torch.compile serve rows with any boundaries, with "triton".
        initial_state: [N, HV, K, V], fp32; None means zeros.
        normalize: divide q and k by their length over K, as `kernels.precision.l2_normalize` does.
        output_final_state: whether the states after the documents are asked for: 4 K V bytes a document and head, and
            as many for their gradient.
        backend: "reference", "triton" (K and V multiples of 32 up to 256) or "fla"; resolve "auto" once with
            `kernels.backends.check_backend`.
    Returns:
        o: [1, T, HV, V] in v.dtype; final_state: [N, HV, K, V], fp32, or None.
    Raises:
        ValueError: shapes disagree, cu_seqlens does not run from 0 to T in rising order, or the triton kernels cannot
            serve the head sizes, dtypes or devices.
        BackendError: unknown backend.
    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464.
    """
    _check_shapes(q, k, v, g, beta, cu_seqlens)
    check_state(initial_state, (len(cu_seqlens) - 1, v.shape[2], q.shape[3], v.shape[3]))
    if backend == "triton":
        from loopline.kernels.gated_delta.launch import gated_delta_triton

        return gated_delta_triton(
            q,
            k,
            v,
            g=g,
            beta=beta,
            scale=scale,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            normalize=normalize,
            output_final_state=output_final_state,
        )
    if normalize:
        q, k = l2_normalize(q), l2_normalize(k)
    rest: Any = {"g": g, "beta": beta, "scale": scale, "cu_seqlens": listed(cu_seqlens), "initial_state": initial_state}
    if backend == "reference":
        o, final_state = chunked(q, k, v, **rest)
        return o, final_state if output_final_state else None
    if backend == "fla":
        return _fla(q, k, v, output_final_state=output_final_state, **rest)
    raise unknown("gated_delta", backend, BACKENDS)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Boundaries) -> None:
    if q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want q and k [1, T, H, K] and "
            "v [1, T, HV, V], HV a multiple of H"
        )
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise ValueError(f"g {tuple(g.shape)} and beta {tuple(beta.shape)} must be [1, T, HV] = {tuple(v.shape[:3])}")
    check_boundaries(cu_seqlens, q.shape[0], q.shape[1])


def _fla(q, k, v, *, g, beta, scale, cu_seqlens, initial_state, output_final_state):  # type: ignore[no-untyped-def]
    # Keywords only: fla's chunk, naive and recurrent forms order g and beta differently, and a swap gives NaN without
    # an error.
    chunk_gated_delta_rule = imported("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    return chunk_gated_delta_rule(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens_on(tuple(cu_seqlens), q.device),
    )
