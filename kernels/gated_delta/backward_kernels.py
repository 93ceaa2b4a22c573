"""Triton kernels of the gated delta rule's backward pass: a scan in reverse, and the gradients of all chunks at once.

README.md derives the equations; names are those of forward_kernels.py. A gradient is written `d_` before a name.
"""

import triton
import triton.language as tl

from loopline.kernels.gated_delta.forward_kernels import (
    DECAY,
    ERASE,
    HIGH,
    LOW,
    READ,
    WRITE,
    chunk_of_piece,
    load_beta,
    load_rows,
    load_tile,
    scan_program,
)


@triton.jit(do_not_specialize=["n_tokens"])
def gated_delta_bwd_scan_kernel(
    p_q,  # [T, H, K]
    p_k,  # [T, H, K]
    p_d_o,  # [T, HV, V]
    p_inverse,  # [T, HV, 64]
    p_scores,  # [T, HV, 64]
    p_gates,  # [GATES, HV, T]
    p_d_after,  # [NS, HV, K, V], of the state after each segment; None: zero
    p_d_states,  # [NT, HV, K, V], out, of the state after each chunk; [NT - NS, HV, K, V] without p_d_after; or None
    p_d_x,  # [T, HV, V], out, with p_d_states
    p_d_before,  # [NS, HV, K, V], out, of the state before each segment, or None
    p_boundaries,  # [NS + 1]
    p_first_pieces,  # [NS + 1]
    n_tokens,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the state, from a segment's last chunk to its first, for a block of V; dX on the way."""
    i_v, i_hv, i_segment, i_h, start, end = scan_program(p_boundaries, H, HV, V // BV)
    o_k0, o_k1 = tl.arange(0, K0), K0 + tl.arange(0, K1 if K1 else 1)
    o_v = i_v * BV + tl.arange(0, BV)
    dtype = p_k.dtype.element_ty
    o_state = (i_segment * HV + i_hv) * (K * V) + o_v[None, :]
    b_ds0 = tl.zeros([K0, BV], tl.float32)
    if p_d_after is not None:
        b_ds0 = tl.load(p_d_after + o_state + o_k0[:, None] * V)
    if K1:
        b_ds1 = tl.zeros([K1, BV], tl.float32)
        if p_d_after is not None:
            b_ds1 = tl.load(p_d_after + o_state + o_k1[:, None] * V, mask=o_k1[:, None] < K, other=0.0)

    n_chunks = tl.cdiv(end - start, 64)
    i_after, end_kept = tl.load(p_first_pieces + i_segment) + n_chunks, end
    if p_d_after is None:  # a gradient of zero after the last chunk has no place
        i_after, end_kept = i_after - i_segment, end - 64
    o_after = (i_after * HV + i_hv) * (K * V) + o_v[None, :]
    p_gates += i_hv.to(tl.int64) * n_tokens
    n_gate = n_tokens.to(tl.int64) * HV
    o_c = tl.arange(0, 64)
    o_rows_k, o_rows_v = o_c[:, None] * (H * K), o_c[:, None] * (HV * V) + o_v[None, :]
    for i_back in range(1, n_chunks + 1):
        i_t = start + (n_chunks - i_back) * 64
        if p_d_states is not None:
            o_after -= HV * K * V
            n_rows = tl.where(i_t < end_kept, K, 0)
            tl.store(p_d_states + o_after + o_k0[:, None] * V, b_ds0.to(dtype), mask=o_k0[:, None] < n_rows)
            if K1:
                tl.store(p_d_states + o_after + o_k1[:, None] * V, b_ds1.to(dtype), mask=o_k1[:, None] < n_rows)
        m_t = o_c < (end - i_t).to(tl.int32)
        o_chunk_k, o_chunk_v = i_t * (H * K) + i_h * K, i_t * (HV * V) + i_hv * V
        b_k0 = tl.load(p_k + o_chunk_k + o_rows_k + o_k0[None, :], mask=m_t[:, None], other=0.0)
        b_q0 = tl.load(p_q + o_chunk_k + o_rows_k + o_k0[None, :], mask=m_t[:, None], other=0.0)
        b_do = tl.load(p_d_o + o_chunk_v + o_rows_v, mask=m_t[:, None], other=0.0)
        b_t = load_tile(p_inverse, i_t, m_t, i_hv, HV)
        b_p = load_tile(p_scores, i_t, m_t, i_hv, HV)
        b_erase = tl.load(p_gates + ERASE * n_gate + i_t + o_c, mask=m_t, other=0.0)
        b_write = tl.load(p_gates + WRITE * n_gate + i_t + o_c, mask=m_t, other=0.0)
        b_read = tl.load(p_gates + READ * n_gate + i_t + o_c, mask=m_t, other=0.0)
        whole = tl.load(p_gates + DECAY * n_gate + tl.minimum(i_t + 64, end) - 1)

        b_dnew = tl.dot(b_k0, b_ds0.to(dtype), input_precision=PRECISION)
        if K1:
            m_k1 = m_t[:, None] & (o_k1[None, :] < K)
            b_k1 = tl.load(p_k + o_chunk_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_q1 = tl.load(p_q + o_chunk_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_dnew = tl.dot(b_k1, b_ds1.to(dtype), b_dnew, input_precision=PRECISION)
        b_dnew = tl.dot(tl.trans(b_p), b_do, b_write[:, None] * b_dnew, input_precision=PRECISION)
        b_dx = tl.dot(tl.trans(b_t), b_dnew.to(dtype), input_precision=PRECISION)
        if p_d_states is not None:
            tl.store(p_d_x + o_chunk_v + o_rows_v, b_dx.to(dtype), mask=m_t[:, None])
        b_dx = (-b_erase[:, None] * b_dx).to(dtype)
        b_do = (b_read[:, None] * b_do.to(tl.float32)).to(dtype)
        b_ds0 = tl.dot(tl.trans(b_q0), b_do, whole * b_ds0, input_precision=PRECISION)
        b_ds0 = tl.dot(tl.trans(b_k0), b_dx, b_ds0, input_precision=PRECISION)
        if K1:
            b_ds1 = tl.dot(tl.trans(b_q1), b_do, whole * b_ds1, input_precision=PRECISION)
            b_ds1 = tl.dot(tl.trans(b_k1), b_dx, b_ds1, input_precision=PRECISION)

    if p_d_before is not None:
        tl.store(p_d_before + o_state + o_k0[:, None] * V, b_ds0)
        if K1:
            tl.store(p_d_before + o_state + o_k1[:, None] * V, b_ds1, mask=o_k1[:, None] < K)


@triton.jit(do_not_specialize=["scale", "n_tokens"])
def gated_delta_bwd_gradients_kernel(
    p_q,  # [T, H, K]
    p_k,  # [T, H, K]
    p_v,  # [T, HV, V]
    p_d_o,  # [T, HV, V]
    p_beta,  # [T, HV]
    p_scores,  # [T, HV, 64]
    p_gates,  # [GATES, HV, T]
    p_norms,  # [2, H, T] or None
    p_states,  # [NT, HV, K, V], before each chunk, or [NT - NS, HV, K, V]
    p_new,  # [T, HV, V], V'
    p_d_states,  # [NT, HV, K, V], after each chunk, or [NT - NS, HV, K, V]
    p_d_x,  # [T, HV, V]
    p_d_q,  # [T, H, K], out
    p_d_k,  # [T, H, K], out
    p_d_v,  # [T, HV, V], out
    p_d_g,  # [T, HV], out
    p_d_beta,  # [T, HV], out
    p_boundaries,  # [NS + 1]
    p_pieces,  # [NT, 2]
    scale,
    n_tokens,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    IS_FROM_ZERO: tl.constexpr,  # the state before a segment's first chunk is zero, and has no place in p_states
    IS_TO_ZERO: tl.constexpr,  # the same of the gradient after its last chunk
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every gradient of one chunk, summed over the value heads of a key head.

    Products that are needed transposed are computed so: Triton 3.4 to 3.7.0 reads a transposed product wrong on Hopper
    (fla issue 640).
    """
    i_piece = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    start, end = chunk_of_piece(p_boundaries, p_pieces, i_piece)
    n_rows, n_d_rows = K, K  # to read of the state before the chunk, and of the gradient after it
    i_before, i_after = i_piece, i_piece
    if IS_FROM_ZERO:
        n_rows = tl.where(tl.load(p_pieces + 2 * i_piece + 1) == 0, 0, K)
        i_before -= tl.load(p_pieces + 2 * i_piece) + 1
    if IS_TO_ZERO:
        n_d_rows = tl.where(end - start <= 64, 0, K)
        i_after -= tl.load(p_pieces + 2 * i_piece)
    o_c = tl.arange(0, 64)
    m_t = o_c < (end - start).to(tl.int32)
    m_i = m_t[:, None]
    dtype = p_k.dtype.element_ty
    o_k0, o_k1 = tl.arange(0, K0), K0 + tl.arange(0, K1 if K1 else 1)
    o_key = start * (H * K) + i_h * K
    o_rows_k = o_key + o_c[:, None] * (H * K)
    b_dq0, b_dk0 = tl.zeros([64, K0], tl.float32), tl.zeros([64, K0], tl.float32)
    if K1:
        m_k1 = m_i & (o_k1[None, :] < K)
        b_dq1, b_dk1 = tl.zeros([64, K1], tl.float32), tl.zeros([64, K1], tl.float32)
    if p_norms is None:
        b_nq, b_nk = tl.full([64], 1.0, tl.float32), tl.full([64], 1.0, tl.float32)
    else:
        p_norm = p_norms + i_h.to(tl.int64) * n_tokens + start
        b_nq = tl.load(p_norm + o_c, mask=m_t, other=0.0)
        b_nk = tl.load(p_norm + n_tokens.to(tl.int64) * H + o_c, mask=m_t, other=0.0)

    for i_group in range(HV // H):
        i_hv = i_h * (HV // H) + i_group
        p_gate = p_gates + i_hv.to(tl.int64) * n_tokens + start
        n_gate = n_tokens.to(tl.int64) * HV
        b_beta = load_beta(p_beta + start * HV + i_hv, o_c, m_t, HV)
        o_rows_v = start * (HV * V) + i_hv * V + o_c[:, None] * (HV * V)
        p_s, p_ds = p_states + (i_before * HV + i_hv) * (K * V), p_d_states + (i_after * HV + i_hv) * (K * V)

        # What goes through the states before and after the chunk.
        b_dos0, b_dxs0 = tl.zeros([64, K0], tl.float32), tl.zeros([64, K0], tl.float32)  # dO S^T, dX S^T
        b_nds0 = tl.zeros([64, K0], tl.float32)  # V' dS+^T
        if K1:
            b_dos1, b_dxs1 = tl.zeros([64, K1], tl.float32), tl.zeros([64, K1], tl.float32)
            b_nds1 = tl.zeros([64, K1], tl.float32)
        inner = 0.0  # <dS+, S>
        b_dbeta = tl.zeros([64], tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_do = tl.load(p_d_o + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            b_new = tl.load(p_new + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            b_dx = tl.load(p_d_x + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            o_rows_s = o_k0[:, None] * V + o_v[None, :]
            b_s = tl.load(p_s + o_rows_s, mask=o_k0[:, None] < n_rows, other=0.0)
            b_ds = tl.load(p_ds + o_rows_s, mask=o_k0[:, None] < n_d_rows, other=0.0)
            b_dos0 = tl.dot(b_do, tl.trans(b_s), b_dos0, input_precision=PRECISION)
            b_dxs0 = tl.dot(b_dx, tl.trans(b_s), b_dxs0, input_precision=PRECISION)
            b_nds0 = tl.dot(b_new, tl.trans(b_ds), b_nds0, input_precision=PRECISION)
            inner += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32))
            if K1:
                o_rows_s = o_k1[:, None] * V + o_v[None, :]
                b_s = tl.load(p_s + o_rows_s, mask=o_k1[:, None] < n_rows, other=0.0)
                b_ds = tl.load(p_ds + o_rows_s, mask=o_k1[:, None] < n_d_rows, other=0.0)
                b_dos1 = tl.dot(b_do, tl.trans(b_s), b_dos1, input_precision=PRECISION)
                b_dxs1 = tl.dot(b_dx, tl.trans(b_s), b_dxs1, input_precision=PRECISION)
                b_nds1 = tl.dot(b_new, tl.trans(b_ds), b_nds1, input_precision=PRECISION)
                inner += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32))
            b_v = tl.load(p_v + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            b_dx32 = b_dx.to(tl.float32)
            b_dbeta += tl.sum(b_dx32 * b_v.to(tl.float32), axis=1)
            b_dv = b_beta[:, None] * b_dx32
            tl.store(p_d_v + o_rows_v + o_v[None, :], b_dv.to(p_d_v.dtype.element_ty), mask=m_i)
        # q and k, like the gates, are read where they are used: held in registers they would push out the sums.
        b_erase = tl.load(p_gate + ERASE * n_gate + o_c, mask=m_t, other=0.0)
        b_write = tl.load(p_gate + WRITE * n_gate + o_c, mask=m_t, other=0.0)
        b_read = tl.load(p_gate + READ * n_gate + o_c, mask=m_t, other=0.0)
        b_q0 = tl.load(p_q + o_rows_k + o_k0[None, :], mask=m_i, other=0.0)
        b_k0 = tl.load(p_k + o_rows_k + o_k0[None, :], mask=m_i, other=0.0)
        b_q_dos = tl.sum(b_q0.to(tl.float32) * b_dos0, axis=1)
        b_k_dxs = tl.sum(b_k0.to(tl.float32) * b_dxs0, axis=1)
        b_k_nds = tl.sum(b_k0.to(tl.float32) * b_nds0, axis=1)
        b_dq0 += b_read[:, None] * b_dos0
        b_dk_s0 = b_write[:, None] * b_nds0 - b_erase[:, None] * b_dxs0
        if K1:
            b_q1 = tl.load(p_q + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_k1 = tl.load(p_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_q_dos += tl.sum(b_q1.to(tl.float32) * b_dos1, axis=1)
            b_k_dxs += tl.sum(b_k1.to(tl.float32) * b_dxs1, axis=1)
            b_k_nds += tl.sum(b_k1.to(tl.float32) * b_nds1, axis=1)
            b_dq1 += b_read[:, None] * b_dos1
            b_dk_s1 = b_write[:, None] * b_nds1 - b_erase[:, None] * b_dxs1

        # What goes from token to token through A: W = dA o R and its transpose, side by side about the diagonal.
        b_da, b_da_t = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)  # dX V'^T, and transposed
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_new = tl.load(p_new + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            b_dx = tl.load(p_d_x + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            b_da = tl.dot(b_dx, tl.trans(b_new), b_da, input_precision=PRECISION)
            b_da_t = tl.dot(b_new, tl.trans(b_dx), b_da_t, input_precision=PRECISION)
        # A loop: two products in a row would be held twice, as are those further down.
        b_kk = tl.zeros([64, 64], tl.float32)
        for i_k in range(0, K, 32):
            b_k = load_rows(p_k + o_key + i_k, o_c, m_t, H * K, 32)
            b_kk = tl.dot(b_k, tl.trans(b_k), b_kk, input_precision=PRECISION)
        b_high = tl.load(p_gate + HIGH * n_gate + o_c, mask=m_t, other=0.0)
        b_low = tl.load(p_gate + LOW * n_gate + o_c, mask=m_t, other=0.0)
        b_decay = tl.load(p_gate + DECAY * n_gate + o_c, mask=m_t, other=0.0)
        # Of a pair's decay the sign tells above from below the diagonal: R is symmetric here.
        b_ratio = tl.exp2(-tl.abs((b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])))
        b_ratio = b_ratio * b_nk[:, None] * b_nk[None, :]
        m_below, m_above = o_c[:, None] > o_c[None, :], o_c[:, None] < o_c[None, :]
        b_w = tl.where(m_below, -b_da * b_ratio, 0.0)
        b_dbeta += tl.sum(b_w * b_kk, axis=1) - b_decay * b_nk * b_k_dxs
        b_w = b_w * b_beta[:, None]
        b_aa = b_w * b_kk  # dA o A
        # A pair of tokens adds to the decay at one and takes as much, of the same bits, from that at the other.
        b_dg = tl.sum(b_aa, axis=1) - tl.sum(b_aa, axis=0) + b_read * b_q_dos - b_erase * b_k_dxs
        b_w += tl.where(m_above, -b_da_t * b_ratio * b_beta[None, :], 0.0)
        b_k0 = tl.load(p_k + o_rows_k + o_k0[None, :], mask=m_i, other=0.0)
        b_dk_s0 = tl.dot(b_w.to(dtype), b_k0, b_dk_s0, input_precision=PRECISION)
        if K1:
            b_k1 = tl.load(p_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_dk_s1 = tl.dot(b_w.to(dtype), b_k1, b_dk_s1, input_precision=PRECISION)

        # And through P.
        b_dp, b_dp_t = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)  # dO V'^T, and transposed
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_do = tl.load(p_d_o + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            b_new = tl.load(p_new + o_rows_v + o_v[None, :], mask=m_i, other=0.0)
            b_dp = tl.dot(b_do, tl.trans(b_new), b_dp, input_precision=PRECISION)
            b_dp_t = tl.dot(b_new, tl.trans(b_do), b_dp_t, input_precision=PRECISION)
        b_pp = b_dp * load_tile(p_scores, start, m_t, i_hv, HV).to(tl.float32)  # dP o P
        b_dg += tl.sum(b_pp, axis=1) - tl.sum(b_pp, axis=0)
        b_ratio = tl.exp2(-tl.abs((b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :]))) * scale
        b_f = tl.where(m_above, 0.0, b_dp * b_ratio * b_nq[:, None] * b_nk[None, :])
        b_f_t = tl.where(m_below, 0.0, b_dp_t * b_ratio * b_nk[:, None] * b_nq[None, :])
        b_q0 = tl.load(p_q + o_rows_k + o_k0[None, :], mask=m_i, other=0.0)
        b_k0 = tl.load(p_k + o_rows_k + o_k0[None, :], mask=m_i, other=0.0)
        b_dq0 = tl.dot(b_f.to(dtype), b_k0, b_dq0, input_precision=PRECISION)
        # Two sums, not one through both products: 8 warps lie along the rows of products in a row, and hold them twice.
        b_dk0 = b_dk_s0 + tl.dot(b_f_t.to(dtype), b_q0, b_dk0, input_precision=PRECISION)
        if K1:
            b_q1 = tl.load(p_q + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_k1 = tl.load(p_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_dq1 = tl.dot(b_f.to(dtype), b_k1, b_dq1, input_precision=PRECISION)
            b_dk1 = b_dk_s1 + tl.dot(b_f_t.to(dtype), b_q1, b_dk1, input_precision=PRECISION)

        b_until_end = b_write * b_k_nds
        whole = tl.load(p_gate + DECAY * n_gate + tl.minimum(64, end - start) - 1)
        b_dg = (b_dg - b_until_end).to(tl.float64)
        total = tl.sum(b_dg, axis=0) + tl.sum(b_until_end, axis=0) + whole * inner
        b_dg += total - tl.cumsum(b_dg, axis=0)  # over the token itself and those behind it
        tl.store(p_d_g + (start + o_c) * HV + i_hv, b_dg.to(tl.float32), mask=m_t)
        tl.store(p_d_beta + (start + o_c) * HV + i_hv, b_dbeta.to(p_d_beta.dtype.element_ty), mask=m_t)

    if p_norms is not None:  # what points along q or k changes nothing but its length
        b_q0 = tl.load(p_q + o_rows_k + o_k0[None, :], mask=m_i, other=0.0)
        b_k0 = tl.load(p_k + o_rows_k + o_k0[None, :], mask=m_i, other=0.0)
        b_along_q = tl.sum(b_q0.to(tl.float32) * b_dq0, axis=1)
        b_along_k = tl.sum(b_k0.to(tl.float32) * b_dk0, axis=1)
        if K1:
            b_q1 = tl.load(p_q + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_k1 = tl.load(p_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_along_q += tl.sum(b_q1.to(tl.float32) * b_dq1, axis=1)
            b_along_k += tl.sum(b_k1.to(tl.float32) * b_dk1, axis=1)
        b_along_q, b_along_k = b_along_q * b_nq * b_nq, b_along_k * b_nk * b_nk
        b_dq0 -= b_along_q[:, None] * b_q0.to(tl.float32)
        b_dk0 -= b_along_k[:, None] * b_k0.to(tl.float32)
        if K1:
            b_dq1 -= b_along_q[:, None] * b_q1.to(tl.float32)
            b_dk1 -= b_along_k[:, None] * b_k1.to(tl.float32)
    tl.store(p_d_q + o_rows_k + o_k0[None, :], b_dq0.to(dtype), mask=m_i)
    tl.store(p_d_k + o_rows_k + o_k0[None, :], b_dk0.to(dtype), mask=m_i)
    if K1:
        tl.store(p_d_q + o_rows_k + o_k1[None, :], b_dq1.to(dtype), mask=m_k1)
        tl.store(p_d_k + o_rows_k + o_k1[None, :], b_dk1.to(dtype), mask=m_k1)
