"""Triton kernels of the indexer's loss: what it differs by from attention, and the gradients of its tensors.

They share the workspace of index_kernels.py: scores come in, and their gradient takes their place. It is H (pi - p) of
this rank's H heads, so that ranks add up and one division by all heads ends it.
"""

import triton
import triton.language as tl

from loopline.kernels.dsa.index_kernels import load_rows, piece_of, seen, stored_piece

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first", "W", "T"])
def index_loss_kernel(
    p_q,
    p_k,
    p_lse,
    p_index_lse,
    p_bits,
    p_scores,
    p_losses,
    p_boundaries,
    p_stored,
    scale,
    first,
    W,
    T,
    H: tl.constexpr,
    HG: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    SW: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    HAS_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """H times the loss of BM queries over BN keys, and its gradient in their scores."""
    i_piece, i_n = first + tl.program_id(0), tl.program_id(1)
    start, L, i_m, p_rows, LS = stored_piece(p_boundaries, p_stored, p_scores, first, i_piece, BM, SW)
    o_m, o_n = i_m * BM, i_n * BN
    if o_n < tl.minimum(o_m + BM, L):
        o_r, o_s = tl.arange(0, BM), o_n + tl.arange(0, BN)
        o_t = o_m + o_r
        b_index_lse = tl.load(p_index_lse + start + o_t, mask=o_t < L, other=float("-inf"))
        m_s = seen(p_bits, start, o_t, o_s, L, W, HAS_BITS) & (b_index_lse != float("-inf"))[:, None]
        b_p = tl.zeros([BM, BN], tl.float32)
        if tl.max(tl.max(m_s.to(tl.int32), 1), 0) > 0:
            for i_g in range(0, H // HG):
                b_k = load_rows(p_k + i_g * D, start, o_s, L, H // HG * D, D, BD)
                for i_r in range(0, HG):
                    i_h = i_g * HG + i_r
                    b_q = load_rows(p_q + i_h * D, start, o_t, L, H * D, D, BD)
                    b_lse = tl.load(p_lse + i_h * T.to(tl.int64) + start + o_t, mask=o_t < L, other=0.0) * LOG2E
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
                    # A key outside the set may be above lse by any amount.
                    b_p += tl.exp2(tl.where(m_s, b_s - b_lse[:, None], 0.0))
        p_x = p_rows + o_r.to(tl.int64)[:, None] * LS + o_s[None, :]
        b_log = tl.where(m_s, tl.load(p_x) - b_index_lse[:, None], 0.0)  # log pi
        m_p = m_s & (b_p != 0)
        b_loss = tl.where(m_p, b_p * (tl.log(tl.where(m_p, b_p, H) / H) - b_log), 0.0)
        p_loss = p_losses + tl.load(p_stored + i_piece * 3 + 2).to(tl.int64) * (SW // BN) + i_n
        tl.store(p_loss, tl.sum(tl.sum(b_loss, 1), 0))
        b_di = tl.where(m_s, H * tl.exp(b_log) - b_p, 0.0)
        tl.store(p_x, b_di)


@triton.jit(do_not_specialize=["first"])
def index_loss_dq_kernel(
    p_q,
    p_k,
    p_w,
    p_dscores,
    p_dq,
    p_dw,
    p_boundaries,
    p_stored,
    first,
    HI: tl.constexpr,
    DI: tl.constexpr,
    HG: tl.constexpr,
    BM: tl.constexpr,
    SW: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq_index and dweights of BR rows: HG heads of BR / HG queries, so that they read a gradient of scores once."""
    NR: tl.constexpr = BM * HG // BR
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries have most to do, and start first
    i_piece, i_r = first + i_program // NR, (i_program % NR) * (BR // HG)
    start, L, i_m, p_rows, LS = stored_piece(p_boundaries, p_stored, p_dscores, first, i_piece, BM, SW)
    o_first = i_m * BM + i_r
    if o_first < L:
        o_r = tl.arange(0, BR)
        o_t, o_j = o_first + o_r // HG, tl.program_id(1) * HG + o_r % HG
        m_r = (o_t < L) & (o_j < HI)
        o_d = tl.arange(0, BD)
        o_qw = (start + o_t) * HI + o_j
        m_q = m_r[:, None] & (o_d < DI)[None, :]
        b_q = tl.load(p_q + o_qw[:, None] * DI + o_d[None, :], mask=m_q, other=0.0)
        b_dq = tl.zeros([BR, BD], tl.float32)
        b_dw = tl.zeros([BR], tl.float32)
        p_row = p_rows + (i_r + o_r // HG).to(tl.int64)[:, None] * LS
        for i_s in range(0, tl.minimum(o_first + BR // HG, L), BN):
            o_s = i_s + tl.arange(0, BN)
            b_k = load_rows(p_k, start, o_s, L, DI, DI, BD)
            b_di = tl.load(p_row + o_s[None, :])  # 0 where a query does not see a key, or is beyond its document
            b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_dw += tl.sum(b_di * tl.where(b_r < 0, 0.0, b_r), 1)
            b_dr = tl.where(b_r > 0, b_di, 0.0).to(b_k.dtype)
            b_dq = tl.dot(b_dr, b_k, b_dq, input_precision=PRECISION)
        b_w = tl.load(p_w + o_qw, mask=m_r, other=0.0).to(tl.float32)
        tl.store(p_dq + o_qw[:, None] * DI + o_d[None, :], b_dq * b_w[:, None], mask=m_q)
        tl.store(p_dw + o_qw, b_dw, mask=m_r)


@triton.jit(do_not_specialize=["first", "end", "row_stride", "row_offset"])
def index_loss_dk_kernel(
    p_q,
    p_k,
    p_w,
    p_dscores,
    p_dk,
    p_boundaries,
    p_key_pieces,
    p_first_pieces,
    p_stored,
    first,
    end,
    row_stride,
    row_offset,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BM: tl.constexpr,
    SW: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk_index of BK keys: += that of the pieces of queries `first` to `end`, those of the workspace.

    Scores are computed as k q^T, so that no product takes the transpose of another's result.
    """
    i_piece = tl.program_id(0)
    start, L, o_n = piece_of(p_boundaries, p_key_pieces, i_piece, BK)
    i_d = tl.load(p_key_pieces + i_piece * 2)
    i_first = tl.load(p_first_pieces + i_d)
    # Pieces of this document that see a key, as entries of the sampled ones: no numerator here is negative.
    i_begin = (i_first + o_n // BM - row_offset + row_stride - 1) // row_stride
    i_end = (tl.load(p_first_pieces + i_d + 1) - row_offset + row_stride - 1) // row_stride
    i_begin, i_end = tl.maximum(i_begin, first), tl.minimum(i_end, end)
    if i_begin < i_end:
        o_s, o_r = o_n + tl.arange(0, BK), tl.arange(0, BM)
        o_d = tl.arange(0, BD)
        b_k = load_rows(p_k, start, o_s, L, DI, DI, BD)
        b_dk = tl.zeros([BK, BD], tl.float32)
        for i in range(i_begin, i_end):
            _, _, i_m, p_rows, LS = stored_piece(p_boundaries, p_stored, p_dscores, first, i, BM, SW)
            o_t = i_m * BM + o_r
            b_di = tl.load(p_rows + o_r.to(tl.int64)[None, :] * LS + o_s[:, None])
            for j in range(0, HI):
                b_q = load_rows(p_q + j * DI, start, o_t, L, HI * DI, DI, BD)
                b_w = tl.load(p_w + (start + o_t) * HI + j, mask=o_t < L, other=0.0).to(tl.float32)
                b_r = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
                b_dr = tl.where(b_r > 0, b_di * b_w[None, :], 0.0).to(b_q.dtype)
                b_dk = tl.dot(b_dr, b_q, b_dk, input_precision=PRECISION)
        p_out = p_dk + (start + o_s)[:, None] * DI + o_d[None, :]
        m_out = (o_s < L)[:, None] & (o_d < DI)[None, :]
        tl.store(p_out, tl.load(p_out, mask=m_out, other=0.0) + b_dk, mask=m_out)
