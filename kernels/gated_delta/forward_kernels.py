"""Triton kernels of the gated delta rule's forward pass, and what its backward pass shares with them.

Names follow README.md. What each token needs of the others in its chunk is computed first, for all chunks at once; a
scan then walks the chunks of a segment (a document, or a part of one) with a block of the state's columns in registers.
It holds the state's K rows in a tile of K0 rows and, where K is no power of two, one of K1.
"""

import triton
import triton.language as tl

# Rows of the gates, [GATES, HV, T]: what every token scales by.
HIGH = tl.constexpr(0)  # running log decay G of its chunk in base 2, as fp32
LOW = tl.constexpr(1)  # and what that leaves of fp64
DECAY = tl.constexpr(2)  # E = exp(G)
ERASE = tl.constexpr(3)  # beta E / ||k||: X = beta V - erase (K S)
WRITE = tl.constexpr(4)  # exp(G_C - G) / ||k||: S <- exp(G_C) S + K^T (write V')
READ = tl.constexpr(5)  # scale E / ||q||: O = read (Q S) + P V'


@triton.jit(do_not_specialize=["scale", "n_tokens"])
def gated_delta_fwd_chunk_kernel(
    p_q,  # [T, H, K]
    p_k,  # [T, H, K]
    p_g,  # [T, HV]
    p_beta,  # [T, HV]
    p_inverse,  # [T, HV, 64], out
    p_scores,  # [T, HV, 64], out
    p_gates,  # [GATES, HV, T], out
    p_norms,  # [2, H, T], out: of q, of k; None: q and k are used as they are
    p_boundaries,  # [NS + 1]
    p_pieces,  # [NT, 2]
    scale,
    n_tokens,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(I + A)^-1 and P = tril(R o Q K^T) of one chunk for the value heads of a key head, and the gates of its tokens.

    A chunk is four blocks of 16 tokens, and every product one of blocks: nothing above the diagonal is computed.
    """
    i_piece = tl.program_id(0)
    i_h = tl.program_id(1)
    start, end = chunk_of_piece(p_boundaries, p_pieces, i_piece)
    n_left = (end - start).to(tl.int32)
    o_0 = tl.arange(0, 16)
    o_1, o_2, o_3 = 16 + o_0, 32 + o_0, 48 + o_0
    m_0, m_1, m_2, m_3 = o_0 < n_left, o_1 < n_left, o_2 < n_left, o_3 < n_left
    p_k += (start * H + i_h) * K
    p_q += (start * H + i_h) * K
    n_gate = n_tokens.to(tl.int64) * HV

    b_zero = tl.zeros([16, 16], tl.float32)
    b_kk00, b_kk10, b_kk11, b_kk20, b_kk21 = b_zero, b_zero, b_zero, b_zero, b_zero
    b_kk22, b_kk30, b_kk31, b_kk32, b_kk33 = b_zero, b_zero, b_zero, b_zero, b_zero
    b_nk0 = tl.zeros([16], tl.float32)
    b_nk1, b_nk2, b_nk3 = b_nk0, b_nk0, b_nk0
    for i_k in range(0, K, BK):
        b_k0, b_k1 = load_rows(p_k + i_k, o_0, m_0, H * K, BK), load_rows(p_k + i_k, o_1, m_1, H * K, BK)
        b_k2, b_k3 = load_rows(p_k + i_k, o_2, m_2, H * K, BK), load_rows(p_k + i_k, o_3, m_3, H * K, BK)
        b_kk00 = tl.dot(b_k0, tl.trans(b_k0), b_kk00, input_precision=PRECISION)
        b_kk10 = tl.dot(b_k1, tl.trans(b_k0), b_kk10, input_precision=PRECISION)
        b_kk11 = tl.dot(b_k1, tl.trans(b_k1), b_kk11, input_precision=PRECISION)
        b_kk20 = tl.dot(b_k2, tl.trans(b_k0), b_kk20, input_precision=PRECISION)
        b_kk21 = tl.dot(b_k2, tl.trans(b_k1), b_kk21, input_precision=PRECISION)
        b_kk22 = tl.dot(b_k2, tl.trans(b_k2), b_kk22, input_precision=PRECISION)
        b_kk30 = tl.dot(b_k3, tl.trans(b_k0), b_kk30, input_precision=PRECISION)
        b_kk31 = tl.dot(b_k3, tl.trans(b_k1), b_kk31, input_precision=PRECISION)
        b_kk32 = tl.dot(b_k3, tl.trans(b_k2), b_kk32, input_precision=PRECISION)
        b_kk33 = tl.dot(b_k3, tl.trans(b_k3), b_kk33, input_precision=PRECISION)
        b_nk0, b_nk1 = b_nk0 + sum_of_squares(b_k0), b_nk1 + sum_of_squares(b_k1)
        b_nk2, b_nk3 = b_nk2 + sum_of_squares(b_k2), b_nk3 + sum_of_squares(b_k3)
    p_norm = p_norms
    if p_norms is not None:
        p_norm = p_norms + (H + i_h).to(tl.int64) * n_tokens + start
    b_nk0, b_nk1 = inverse_norm(b_nk0, p_norm, o_0, m_0), inverse_norm(b_nk1, p_norm, o_1, m_1)
    b_nk2, b_nk3 = inverse_norm(b_nk2, p_norm, o_2, m_2), inverse_norm(b_nk3, p_norm, o_3, m_3)

    for i_group in range(HV // H):
        i_hv = i_h * (HV // H) + i_group
        p_head = p_g + start * HV + i_hv
        b_g0, b_l0, b_sum = running_decay(p_head, o_0, m_0, HV, 0.0)
        b_g1, b_l1, b_sum = running_decay(p_head, o_1, m_1, HV, b_sum)
        b_g2, b_l2, b_sum = running_decay(p_head, o_2, m_2, HV, b_sum)
        b_g3, b_l3, b_sum = running_decay(p_head, o_3, m_3, HV, b_sum)
        p_head = p_beta + start * HV + i_hv
        b_beta0, b_beta1 = load_beta(p_head, o_0, m_0, HV), load_beta(p_head, o_1, m_1, HV)
        b_beta2, b_beta3 = load_beta(p_head, o_2, m_2, HV), load_beta(p_head, o_3, m_3, HV)
        p_head = p_gates + i_hv.to(tl.int64) * n_tokens + start
        store_gates(p_head, n_gate, o_0, m_0, b_g0, b_l0, b_sum, b_beta0, b_nk0)
        store_gates(p_head, n_gate, o_1, m_1, b_g1, b_l1, b_sum, b_beta1, b_nk1)
        store_gates(p_head, n_gate, o_2, m_2, b_g2, b_l2, b_sum, b_beta2, b_nk2)
        store_gates(p_head, n_gate, o_3, m_3, b_g3, b_l3, b_sum, b_beta3, b_nk3)
        # The low parts of G go into the factors of rows and columns, so that blocks need one difference.
        b_e0, b_e1, b_e2, b_e3 = tl.exp2(b_l0), tl.exp2(b_l1), tl.exp2(b_l2), tl.exp2(b_l3)
        b_c0, b_c1, b_c2, b_c3 = b_nk0 / b_e0, b_nk1 / b_e1, b_nk2 / b_e2, b_nk3 / b_e3
        b_r0, b_r1 = b_beta0 * b_nk0 * b_e0, b_beta1 * b_nk1 * b_e1
        b_r2, b_r3 = b_beta2 * b_nk2 * b_e2, b_beta3 * b_nk3 * b_e3
        b_t00 = inverse_of_block(weighted(b_kk00, b_r0, b_c0, b_g0, b_g0, True), PRECISION)
        b_t11 = inverse_of_block(weighted(b_kk11, b_r1, b_c1, b_g1, b_g1, True), PRECISION)
        b_t22 = inverse_of_block(weighted(b_kk22, b_r2, b_c2, b_g2, b_g2, True), PRECISION)
        b_t33 = inverse_of_block(weighted(b_kk33, b_r3, b_c3, b_g3, b_g3, True), PRECISION)
        # Substitution by blocks, row after row: as stable as by single rows, which powers of A are not.
        b_a10 = weighted(b_kk10, b_r1, b_c0, b_g1, b_g0, False)
        b_t10 = -product(b_t11, product(b_a10, b_t00, PRECISION), PRECISION)
        b_a21 = weighted(b_kk21, b_r2, b_c1, b_g2, b_g1, False)
        b_t21 = -product(b_t22, product(b_a21, b_t11, PRECISION), PRECISION)
        b_a32 = weighted(b_kk32, b_r3, b_c2, b_g3, b_g2, False)
        b_t32 = -product(b_t33, product(b_a32, b_t22, PRECISION), PRECISION)
        b_a20 = weighted(b_kk20, b_r2, b_c0, b_g2, b_g0, False)
        b_x = product(b_a20, b_t00, PRECISION) + product(b_a21, b_t10, PRECISION)
        b_t20 = -product(b_t22, b_x, PRECISION)
        b_a31 = weighted(b_kk31, b_r3, b_c1, b_g3, b_g1, False)
        b_x = product(b_a31, b_t11, PRECISION) + product(b_a32, b_t21, PRECISION)
        b_t31 = -product(b_t33, b_x, PRECISION)
        b_a30 = weighted(b_kk30, b_r3, b_c0, b_g3, b_g0, False)
        b_x = product(b_a30, b_t00, PRECISION) + product(b_a31, b_t10, PRECISION) + product(b_a32, b_t20, PRECISION)
        b_t30 = -product(b_t33, b_x, PRECISION)
        p_head = p_inverse + (start * HV + i_hv) * 64
        store_blocks(p_head, o_0, m_0, HV, b_t00, b_zero, b_zero, b_zero)  # a scan loads the whole tile
        store_blocks(p_head, o_1, m_1, HV, b_t10, b_t11, b_zero, b_zero)
        store_blocks(p_head, o_2, m_2, HV, b_t20, b_t21, b_t22, b_zero)
        store_blocks(p_head, o_3, m_3, HV, b_t30, b_t31, b_t32, b_t33)

    # The same of Q K^T, in the registers that K K^T has left.
    b_qk00, b_qk10, b_qk11, b_qk20, b_qk21 = b_zero, b_zero, b_zero, b_zero, b_zero
    b_qk22, b_qk30, b_qk31, b_qk32, b_qk33 = b_zero, b_zero, b_zero, b_zero, b_zero
    b_nq0 = tl.zeros([16], tl.float32)
    b_nq1, b_nq2, b_nq3 = b_nq0, b_nq0, b_nq0
    for i_k in range(0, K, BK):
        b_k0, b_k1 = load_rows(p_k + i_k, o_0, m_0, H * K, BK), load_rows(p_k + i_k, o_1, m_1, H * K, BK)
        b_k2, b_k3 = load_rows(p_k + i_k, o_2, m_2, H * K, BK), load_rows(p_k + i_k, o_3, m_3, H * K, BK)
        b_q0, b_q1 = load_rows(p_q + i_k, o_0, m_0, H * K, BK), load_rows(p_q + i_k, o_1, m_1, H * K, BK)
        b_q2, b_q3 = load_rows(p_q + i_k, o_2, m_2, H * K, BK), load_rows(p_q + i_k, o_3, m_3, H * K, BK)
        b_qk00 = tl.dot(b_q0, tl.trans(b_k0), b_qk00, input_precision=PRECISION)
        b_qk10 = tl.dot(b_q1, tl.trans(b_k0), b_qk10, input_precision=PRECISION)
        b_qk11 = tl.dot(b_q1, tl.trans(b_k1), b_qk11, input_precision=PRECISION)
        b_qk20 = tl.dot(b_q2, tl.trans(b_k0), b_qk20, input_precision=PRECISION)
        b_qk21 = tl.dot(b_q2, tl.trans(b_k1), b_qk21, input_precision=PRECISION)
        b_qk22 = tl.dot(b_q2, tl.trans(b_k2), b_qk22, input_precision=PRECISION)
        b_qk30 = tl.dot(b_q3, tl.trans(b_k0), b_qk30, input_precision=PRECISION)
        b_qk31 = tl.dot(b_q3, tl.trans(b_k1), b_qk31, input_precision=PRECISION)
        b_qk32 = tl.dot(b_q3, tl.trans(b_k2), b_qk32, input_precision=PRECISION)
        b_qk33 = tl.dot(b_q3, tl.trans(b_k3), b_qk33, input_precision=PRECISION)
        b_nq0, b_nq1 = b_nq0 + sum_of_squares(b_q0), b_nq1 + sum_of_squares(b_q1)
        b_nq2, b_nq3 = b_nq2 + sum_of_squares(b_q2), b_nq3 + sum_of_squares(b_q3)
    if p_norms is not None:
        p_norm = p_norms + i_h.to(tl.int64) * n_tokens + start
    b_nq0, b_nq1 = inverse_norm(b_nq0, p_norm, o_0, m_0) * scale, inverse_norm(b_nq1, p_norm, o_1, m_1) * scale
    b_nq2, b_nq3 = inverse_norm(b_nq2, p_norm, o_2, m_2) * scale, inverse_norm(b_nq3, p_norm, o_3, m_3) * scale

    for i_group in range(HV // H):
        i_hv = i_h * (HV // H) + i_group
        p_head = p_g + start * HV + i_hv
        b_g0, b_l0, b_sum = running_decay(p_head, o_0, m_0, HV, 0.0)
        b_g1, b_l1, b_sum = running_decay(p_head, o_1, m_1, HV, b_sum)
        b_g2, b_l2, b_sum = running_decay(p_head, o_2, m_2, HV, b_sum)
        b_g3, b_l3, b_sum = running_decay(p_head, o_3, m_3, HV, b_sum)
        p_head = p_gates + READ * n_gate + i_hv.to(tl.int64) * n_tokens + start
        tl.store(p_head + o_0, b_nq0 * tl.exp2(b_g0), mask=m_0)
        tl.store(p_head + o_1, b_nq1 * tl.exp2(b_g1), mask=m_1)
        tl.store(p_head + o_2, b_nq2 * tl.exp2(b_g2), mask=m_2)
        tl.store(p_head + o_3, b_nq3 * tl.exp2(b_g3), mask=m_3)
        b_e0, b_e1, b_e2, b_e3 = tl.exp2(b_l0), tl.exp2(b_l1), tl.exp2(b_l2), tl.exp2(b_l3)
        b_c0, b_c1, b_c2, b_c3 = b_nk0 / b_e0, b_nk1 / b_e1, b_nk2 / b_e2, b_nk3 / b_e3
        b_r0, b_r1, b_r2, b_r3 = b_nq0 * b_e0, b_nq1 * b_e1, b_nq2 * b_e2, b_nq3 * b_e3
        b_p00 = weighted(b_qk00, b_r0, b_c0, b_g0, b_g0, True)
        b_p10 = weighted(b_qk10, b_r1, b_c0, b_g1, b_g0, False)
        b_p11 = weighted(b_qk11, b_r1, b_c1, b_g1, b_g1, True)
        b_p20 = weighted(b_qk20, b_r2, b_c0, b_g2, b_g0, False)
        b_p21 = weighted(b_qk21, b_r2, b_c1, b_g2, b_g1, False)
        b_p22 = weighted(b_qk22, b_r2, b_c2, b_g2, b_g2, True)
        b_p30 = weighted(b_qk30, b_r3, b_c0, b_g3, b_g0, False)
        b_p31 = weighted(b_qk31, b_r3, b_c1, b_g3, b_g1, False)
        b_p32 = weighted(b_qk32, b_r3, b_c2, b_g3, b_g2, False)
        b_p33 = weighted(b_qk33, b_r3, b_c3, b_g3, b_g3, True)
        p_head = p_scores + (start * HV + i_hv) * 64
        store_blocks(p_head, o_0, m_0, HV, b_p00, b_zero, b_zero, b_zero)
        store_blocks(p_head, o_1, m_1, HV, b_p10, b_p11, b_zero, b_zero)
        store_blocks(p_head, o_2, m_2, HV, b_p20, b_p21, b_p22, b_zero)
        store_blocks(p_head, o_3, m_3, HV, b_p30, b_p31, b_p32, b_p33)


@triton.jit(do_not_specialize=["n_tokens"])
def gated_delta_fwd_kernel(
    p_q,  # [T, H, K]
    p_k,  # [T, H, K]
    p_v,  # [T, HV, V]
    p_beta,  # [T, HV]
    p_inverse,  # [T, HV, 64]
    p_scores,  # [T, HV, 64]
    p_gates,  # [GATES, HV, T]
    p_initial,  # [NS, HV, K, V] or None
    p_o,  # [T, HV, V], out
    p_final,  # [NS, HV, K, V], out, or None
    p_boundaries,  # [NS + 1]
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
    """Outputs of one segment for a block of V, and the state after it. Nothing else is written."""
    i_v, i_hv, i_segment, i_h, start, end = scan_program(p_boundaries, H, HV, V // BV)
    o_k0, o_k1 = tl.arange(0, K0), K0 + tl.arange(0, K1 if K1 else 1)
    o_v = i_v * BV + tl.arange(0, BV)
    dtype = p_k.dtype.element_ty
    o_state = (i_segment * HV + i_hv) * (K * V) + o_v[None, :]
    b_s0 = tl.zeros([K0, BV], tl.float32)
    if p_initial is not None:
        b_s0 = tl.load(p_initial + o_state + o_k0[:, None] * V)
    if K1:
        b_s1 = tl.zeros([K1, BV], tl.float32)
        if p_initial is not None:
            b_s1 = tl.load(p_initial + o_state + o_k1[:, None] * V, mask=o_k1[:, None] < K, other=0.0)

    p_gates += i_hv.to(tl.int64) * n_tokens
    n_gate = n_tokens.to(tl.int64) * HV
    o_c = tl.arange(0, 64)
    o_rows_k, o_rows_v = o_c[:, None] * (H * K), o_c[:, None] * (HV * V) + o_v[None, :]
    for i_t in range(start, end, 64):
        m_t = o_c < (end - i_t).to(tl.int32)
        o_chunk_k, o_chunk_v = i_t * (H * K) + i_h * K, i_t * (HV * V) + i_hv * V
        b_k0 = tl.load(p_k + o_chunk_k + o_rows_k + o_k0[None, :], mask=m_t[:, None], other=0.0)
        b_q0 = tl.load(p_q + o_chunk_k + o_rows_k + o_k0[None, :], mask=m_t[:, None], other=0.0)
        b_v = tl.load(p_v + o_chunk_v + o_rows_v, mask=m_t[:, None], other=0.0)
        b_t = load_tile(p_inverse, i_t, m_t, i_hv, HV)
        b_p = load_tile(p_scores, i_t, m_t, i_hv, HV)
        b_beta = load_beta(p_beta + i_t * HV + i_hv, o_c, m_t, HV)
        b_erase = tl.load(p_gates + ERASE * n_gate + i_t + o_c, mask=m_t, other=0.0)
        b_write = tl.load(p_gates + WRITE * n_gate + i_t + o_c, mask=m_t, other=0.0)
        b_read = tl.load(p_gates + READ * n_gate + i_t + o_c, mask=m_t, other=0.0)
        whole = tl.load(p_gates + DECAY * n_gate + tl.minimum(i_t + 64, end) - 1)  # the chunk's last token's

        b_ks = tl.dot(b_k0, b_s0.to(dtype), input_precision=PRECISION)
        b_qs = tl.dot(b_q0, b_s0.to(dtype), input_precision=PRECISION)
        if K1:
            m_k1 = m_t[:, None] & (o_k1[None, :] < K)
            b_k1 = tl.load(p_k + o_chunk_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_q1 = tl.load(p_q + o_chunk_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_ks = tl.dot(b_k1, b_s1.to(dtype), b_ks, input_precision=PRECISION)
            b_qs = tl.dot(b_q1, b_s1.to(dtype), b_qs, input_precision=PRECISION)
        b_x = b_beta[:, None] * b_v.to(tl.float32) - b_erase[:, None] * b_ks
        b_new = tl.dot(b_t, b_x.to(dtype), input_precision=PRECISION)  # V'
        b_o = tl.dot(b_p, b_new.to(dtype), b_read[:, None] * b_qs, input_precision=PRECISION)
        tl.store(p_o + o_chunk_v + o_rows_v, b_o.to(p_o.dtype.element_ty), mask=m_t[:, None])
        b_new = (b_write[:, None] * b_new).to(dtype)
        b_s0 = tl.dot(tl.trans(b_k0), b_new, whole * b_s0, input_precision=PRECISION)
        if K1:
            b_s1 = tl.dot(tl.trans(b_k1), b_new, whole * b_s1, input_precision=PRECISION)

    if p_final is not None:
        tl.store(p_final + o_state + o_k0[:, None] * V, b_s0)
        if K1:
            tl.store(p_final + o_state + o_k1[:, None] * V, b_s1, mask=o_k1[:, None] < K)


@triton.jit(do_not_specialize=["n_tokens"])
def gated_delta_fwd_states_kernel(
    p_k,  # [T, H, K]
    p_v,  # [T, HV, V]
    p_beta,  # [T, HV]
    p_inverse,  # [T, HV, 64]
    p_gates,  # [GATES, HV, T]
    p_initial,  # [NS, HV, K, V] or None
    p_states,  # [NT, HV, K, V], out, [NT - NS, HV, K, V] from zero; None: only the segment's map is asked for
    p_new,  # [T, HV, V], out, with p_states
    p_map,  # [NS, HV, K, V + K], out, without p_states
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
    """The forward scan without outputs: for the backward pass the state before each chunk and V'; or, with `p_map`,
    what the segment makes of a state, S -> M S + S_ext: first the columns of S_ext, the state that starts from zero,
    then those of M, which starts from the identity and is given no values.
    """
    n_columns: tl.constexpr = V if p_map is None else V + K
    i_v, i_hv, i_segment, i_h, start, end = scan_program(p_boundaries, H, HV, (n_columns + BV - 1) // BV)
    o_k0, o_k1 = tl.arange(0, K0), K0 + tl.arange(0, K1 if K1 else 1)
    o_v = i_v * BV + tl.arange(0, BV)
    dtype = p_k.dtype.element_ty
    o_state = (i_segment * HV + i_hv) * (K * n_columns) + o_v[None, :]
    b_s0 = tl.zeros([K0, BV], tl.float32)
    if p_map is not None:
        b_s0 += tl.where(o_k0[:, None] + V == o_v[None, :], 1.0, 0.0)
    elif p_initial is not None:
        b_s0 = tl.load(p_initial + o_state + o_k0[:, None] * V)
    if K1:
        b_s1 = tl.zeros([K1, BV], tl.float32)
        if p_map is not None:
            b_s1 += tl.where(o_k1[:, None] + V == o_v[None, :], 1.0, 0.0)
        elif p_initial is not None:
            b_s1 = tl.load(p_initial + o_state + o_k1[:, None] * V, mask=o_k1[:, None] < K, other=0.0)

    i_before, first_kept = tl.load(p_first_pieces + i_segment).to(tl.int64), start
    if p_initial is None:  # a state of zero before the first chunk has no place
        i_before, first_kept = i_before - i_segment - 1, start + 64
    o_before = (i_before * HV + i_hv) * (K * V) + o_v[None, :]
    p_gates += i_hv.to(tl.int64) * n_tokens
    n_gate = n_tokens.to(tl.int64) * HV
    o_c = tl.arange(0, 64)
    o_rows_k, o_rows_v = o_c[:, None] * (H * K), o_c[:, None] * (HV * V) + o_v[None, :]
    for i_t in range(start, end, 64):
        if p_states is not None:
            n_rows = tl.where(i_t < first_kept, 0, K)
            tl.store(p_states + o_before + o_k0[:, None] * V, b_s0.to(dtype), mask=o_k0[:, None] < n_rows)
            if K1:
                tl.store(p_states + o_before + o_k1[:, None] * V, b_s1.to(dtype), mask=o_k1[:, None] < n_rows)
            o_before += HV * K * V
        m_t = o_c < (end - i_t).to(tl.int32)
        o_chunk_k, o_chunk_v = i_t * (H * K) + i_h * K, i_t * (HV * V) + i_hv * V
        b_k0 = tl.load(p_k + o_chunk_k + o_rows_k + o_k0[None, :], mask=m_t[:, None], other=0.0)
        b_v = tl.load(p_v + o_chunk_v + o_rows_v, mask=m_t[:, None] & (o_v[None, :] < V), other=0.0)
        b_t = load_tile(p_inverse, i_t, m_t, i_hv, HV)
        b_beta = load_beta(p_beta + i_t * HV + i_hv, o_c, m_t, HV)
        b_erase = tl.load(p_gates + ERASE * n_gate + i_t + o_c, mask=m_t, other=0.0)
        b_write = tl.load(p_gates + WRITE * n_gate + i_t + o_c, mask=m_t, other=0.0)
        whole = tl.load(p_gates + DECAY * n_gate + tl.minimum(i_t + 64, end) - 1)

        b_ks = tl.dot(b_k0, b_s0.to(dtype), input_precision=PRECISION)
        if K1:
            m_k1 = m_t[:, None] & (o_k1[None, :] < K)
            b_k1 = tl.load(p_k + o_chunk_k + o_rows_k + o_k1[None, :], mask=m_k1, other=0.0)
            b_ks = tl.dot(b_k1, b_s1.to(dtype), b_ks, input_precision=PRECISION)
        b_x = b_beta[:, None] * b_v.to(tl.float32) - b_erase[:, None] * b_ks
        b_new = tl.dot(b_t, b_x.to(dtype), input_precision=PRECISION)  # V'
        if p_states is not None:
            tl.store(p_new + o_chunk_v + o_rows_v, b_new.to(dtype), mask=m_t[:, None])
        b_new = (b_write[:, None] * b_new).to(dtype)
        b_s0 = tl.dot(tl.trans(b_k0), b_new, whole * b_s0, input_precision=PRECISION)
        if K1:
            b_s1 = tl.dot(tl.trans(b_k1), b_new, whole * b_s1, input_precision=PRECISION)

    if p_map is not None:
        m_v = o_v[None, :] < n_columns
        tl.store(p_map + o_state + o_k0[:, None] * n_columns, b_s0, mask=m_v)
        if K1:
            tl.store(p_map + o_state + o_k1[:, None] * n_columns, b_s1, mask=m_v & (o_k1[:, None] < K))


@triton.jit(do_not_specialize=["i_step"])
def gated_delta_merge_kernel(
    p_map,  # [NS, HV, K, V + K]
    p_added,  # [NS, HV, K, *], what the segment adds
    p_states,  # [NS, HV, K, V], in and out
    p_first_segments,  # [N + 1]
    i_step,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ADDED: tl.constexpr,  # columns of p_added
    IS_REVERSE: tl.constexpr,
):
    """The state a document's segment number i_step starts from, by the map of the segment before it; in reverse, the
    gradient of the state after the segment that far from the end, by the transposed map of the one behind it."""
    BK: tl.constexpr = 32
    i_row = (tl.program_id(0) % (K // BK)) * BK
    i_hv = (tl.program_id(0) // (K // BK)) % HV
    i_document = tl.program_id(0) // (K // BK) // HV
    first = tl.load(p_first_segments + i_document)
    n_segments = tl.load(p_first_segments + i_document + 1) - first
    if i_step < n_segments:
        if IS_REVERSE:
            i_from = first + n_segments - i_step
            i_to = i_from - 1
        else:
            i_from = first + i_step - 1
            i_to = i_from + 1
        o_row, o_v = i_row + tl.arange(0, BK), tl.program_id(1) * 32 + tl.arange(0, 32)
        i_from, i_to = (i_from.to(tl.int64) * HV + i_hv) * K, (i_to.to(tl.int64) * HV + i_hv) * K
        b_s = tl.load(p_added + (i_from + o_row[:, None]) * ADDED + o_v[None, :])
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            if IS_REVERSE:
                b_m = tl.load(p_map + (i_from + o_k[None, :]) * (V + K) + V + o_row[:, None])
            else:
                b_m = tl.load(p_map + (i_from + o_row[:, None]) * (V + K) + V + o_k[None, :])
            b_before = tl.load(p_states + (i_from + o_k[:, None]) * V + o_v[None, :])
            b_s = tl.dot(b_m, b_before, b_s, input_precision="ieee")
        tl.store(p_states + (i_to + o_row[:, None]) * V + o_v[None, :], b_s)


@triton.jit
def scan_program(p_boundaries, H: tl.constexpr, HV: tl.constexpr, N_BLOCKS: tl.constexpr):
    """Block of columns, value head, segment, key head, first token and end of a scan's program. Blocks of one head are
    neighbours, so that they find its q and k in the cache."""
    i_v = tl.program_id(0) % N_BLOCKS
    i_hv = (tl.program_id(0) // N_BLOCKS) % HV
    i_segment = (tl.program_id(0) // N_BLOCKS // HV).to(tl.int64)
    start = tl.load(p_boundaries + i_segment).to(tl.int64)
    end = tl.load(p_boundaries + i_segment + 1).to(tl.int64)
    return i_v, i_hv, i_segment, i_hv // (HV // H), start, end


@triton.jit
def chunk_of_piece(p_boundaries, p_pieces, i_piece):
    """First token of a chunk, and the end of its segment."""
    i_segment = tl.load(p_pieces + 2 * i_piece)
    start = tl.load(p_boundaries + i_segment).to(tl.int64) + tl.load(p_pieces + 2 * i_piece + 1) * 64
    return start, tl.load(p_boundaries + i_segment + 1).to(tl.int64)


@triton.jit
def load_rows(p_x, o_t, m_t, stride: tl.constexpr, BK: tl.constexpr):
    """BK columns of some of a chunk's rows, zero behind the segment's end."""
    return tl.load(p_x + o_t[:, None] * stride + tl.arange(0, BK)[None, :], mask=m_t[:, None], other=0.0)


@triton.jit
def load_tile(p_tiles, i_t, m_t, i_hv, HV: tl.constexpr):
    """The chunk's [64, 64] of [T, HV, 64], zero in rows behind the segment's end."""
    return load_rows(p_tiles + (i_t * HV + i_hv) * 64, tl.arange(0, 64), m_t, HV * 64, 64)


@triton.jit
def load_beta(p_beta, o_t, m_t, HV: tl.constexpr):
    """beta of some of a chunk's tokens, in fp32."""
    return tl.load(p_beta + o_t * HV, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def running_decay(p_g, o_t, m_t, HV: tl.constexpr, before):
    """Sum of log decays up to each of 16 tokens on top of `before`, in base 2, and its end.

    Summed in fp64 and given as two fp32 parts, each [16]: behind a decay of exp(-1000), differences of fp32 sums miss
    the small ones, and conversions from fp64 are slow where every pair of tokens needs one.
    """
    # exp(-1e6) is as good a zero as exp(-inf), whose differences are NaN.
    b_g = tl.maximum(tl.load(p_g + o_t * HV, mask=m_t, other=0.0), -1e6, propagate_nan=tl.PropagateNan.ALL)
    b_g = b_g.to(tl.float64) * 1.4426950408889634
    b_sum = tl.cumsum(b_g, axis=0) + before
    b_high = b_sum.to(tl.float32)
    return b_high, (b_sum - b_high.to(tl.float64)).to(tl.float32), tl.sum(b_g, axis=0) + before


@triton.jit
def store_gates(p_gates, n_gate, o_t, m_t, b_high, b_low, whole, b_beta, b_nk):
    """Every gate but READ of 16 tokens; `whole` is G of the chunk's last token, `n_gate` the length of a gate's row."""
    b_decay = tl.exp2(b_high)
    whole_high = whole.to(tl.float32)
    b_until_end = (whole_high - b_high) + ((whole - whole_high.to(tl.float64)).to(tl.float32) - b_low)
    tl.store(p_gates + HIGH * n_gate + o_t, b_high, mask=m_t)
    tl.store(p_gates + LOW * n_gate + o_t, b_low, mask=m_t)
    tl.store(p_gates + DECAY * n_gate + o_t, b_decay, mask=m_t)
    tl.store(p_gates + ERASE * n_gate + o_t, b_beta * b_decay * b_nk, mask=m_t)
    tl.store(p_gates + WRITE * n_gate + o_t, tl.exp2(b_until_end) * b_nk, mask=m_t)


@triton.jit
def weighted(b_x, b_row, b_column, b_high, b_high_j, IS_DIAGONAL: tl.constexpr):
    """row_i column_j exp(G_i - G_j) x_ij of a block of 16 tokens against an earlier one, or against itself for i >= j.

    Masked before exp: above the diagonal the difference is positive and could overflow.
    """
    b_difference = b_high[:, None] - b_high_j[None, :]
    if IS_DIAGONAL:
        m_lower = tl.arange(0, 16)[:, None] >= tl.arange(0, 16)[None, :]
        b_difference = tl.where(m_lower, b_difference, float("-inf"))
    return b_x * b_row[:, None] * b_column[None, :] * tl.exp2(b_difference)


@triton.jit
def inverse_of_block(b_a, PRECISION: tl.constexpr):
    """(I + A)^-1 of 16 tokens, [16, 16], from that of blocks of 1, then 2, 4, 8; A is what lies below the diagonal.

    With T the inverse inside blocks and L what lies between the two halves of a block twice as long, the inverse inside
    that one is T - T L T. Powers of A, which may grow to 1e6 before they cancel, do not occur.
    """
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    b_a = tl.where(i > j, b_a, 0.0)
    b_t = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, b_a, 0.0)
    for i_level in tl.static_range(1, 4):
        b_l = tl.where(((i >> (i_level + 1)) == (j >> (i_level + 1))) & ((i >> i_level) != (j >> i_level)), b_a, 0.0)
        b_t -= product(b_t, product(b_l, b_t, PRECISION), PRECISION)
    return b_t


@triton.jit
def product(b_x, b_y, PRECISION: tl.constexpr):
    """x y of fp32 blocks; for 16-bit inputs in fp16, which has tf32's ten bits in half the registers."""
    if PRECISION == "tf32":
        return tl.dot(b_x.to(tl.float16), b_y.to(tl.float16))
    else:
        return tl.dot(b_x, b_y, input_precision=PRECISION)


@triton.jit
def store_blocks(p_tile, o_t, m_t, HV: tl.constexpr, b_0, b_1, b_2, b_3):
    """16 rows of a chunk's [64, 64] in [T, HV, 64], from four blocks side by side."""
    dtype = p_tile.dtype.element_ty
    p_rows = p_tile + o_t[:, None] * (HV * 64) + tl.arange(0, 16)[None, :]
    tl.store(p_rows, b_0.to(dtype), mask=m_t[:, None])
    tl.store(p_rows + 16, b_1.to(dtype), mask=m_t[:, None])
    tl.store(p_rows + 32, b_2.to(dtype), mask=m_t[:, None])
    tl.store(p_rows + 48, b_3.to(dtype), mask=m_t[:, None])


@triton.jit
def sum_of_squares(b_x):
    """Over the last axis, in fp32."""
    b_x = b_x.to(tl.float32)
    return tl.sum(b_x * b_x, axis=1)


@triton.jit
def inverse_norm(b_squares, p_norm, o_t, m_t):
    """1 / sqrt(x^2 + 1e-6), which is `l2_normalize`'s factor, stored; ones where x is used as it is."""
    if p_norm is None:
        return tl.full([16], 1.0, tl.float32)
    else:
        b_norm = tl.rsqrt(b_squares + 1e-6)
        tl.store(p_norm + o_t, b_norm, mask=m_t)
        return b_norm
