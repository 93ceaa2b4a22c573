"""Triton kernels of flash attention: forward, gradient of the queries, gradient of keys and values.

Positions count from the start of their document. `start` is where a document begins in the row, L its length. A head
size D that is no power of two is worked on as D1 + D2 columns where that pads less than one tile would (D2 = 0: one
tile); V likewise. HG is H / G, the query heads to a key head.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(p_x, start, row, L, stride, D: tl.constexpr, FIRST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Rows row, row + 1, .. of a document and columns FIRST, FIRST + 1, .. of D: [BR, BC], zero beyond L and D."""
    o_r, o_c = tl.arange(0, BR), FIRST + tl.arange(0, BC)
    m_x = (row + o_r < L)[:, None]
    if FIRST + BC > D:
        m_x = m_x & (o_c < D)[None, :]
    return tl.load(p_x + (start + row) * stride + o_r[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)


@triton.jit
def store_tile(
    p_x, b_x, start, row, L, stride, D: tl.constexpr, FIRST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """The inverse of load_tile, in the type of p_x."""
    o_r, o_c = tl.arange(0, BR), FIRST + tl.arange(0, BC)
    m_x = (row + o_r < L)[:, None]
    if FIRST + BC > D:
        m_x = m_x & (o_c < D)[None, :]
    p_x += (start + row) * stride + o_r[:, None] * stride + o_c[None, :]
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def lowest_bits(n):
    """Words with their n lowest bits set: none for n <= 0, all for n >= 32."""
    return tl.where(n >= 32, -1, tl.where(n <= 0, 0, (1 << (n & 31)) - 1))


@triton.jit
def seen_bits(o_t, o_s, window, HAS_WINDOW: tl.constexpr):
    """Of the word that stands for keys o_s to o_s + 31, the bits query o_t may see whatever is selected."""
    b_seen = lowest_bits(o_t + 1 - o_s)
    if HAS_WINDOW:
        b_seen = b_seen & ~lowest_bits(o_t + 1 - window - o_s)
    return b_seen


@triton.jit
def selected(
    p_bits,
    start,
    row,
    column,
    L,
    W,
    window,
    IS_QUERY: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Which of BC columns, from `column`, a multiple of 32, BR rows have selected: [BR, BC], bool.

    Words are loaded a row and spread over their 32 columns in registers, where a thread's columns are known when the
    kernel is compiled. IS_QUERY: rows are queries, columns keys, and what a query may not see is taken off here, 32
    keys at a time; else the words are those of `attention_transpose_kernel`, where it is off already.
    """
    o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
    b_words = tl.zeros([BR, BC], tl.int32)
    for i_w in tl.static_range(BC // 32):
        o_w = column // 32 + i_w
        m_r = row + o_r < tl.where(o_w * 32 < L, L, 0)
        b_word = tl.load(p_bits + (start + row) * W + o_r * W + o_w, mask=m_r, other=0)
        if IS_QUERY:
            b_word = b_word & seen_bits(row + o_r, o_w * 32, window, HAS_WINDOW)
        b_words = tl.where((o_c // 32 == i_w)[None, :], b_word[:, None], b_words)
    # A thread's columns differ by 1 and by multiples of 8: two shifts by what it alone knows bring its bits to places
    # that are constants. To the left, which takes fewer registers than to the right.
    return ((b_words << (7 - o_c % 8)[None, :]) & (128 << (o_c % 32 // 8 * 8))[None, :]) != 0


@triton.jit(do_not_specialize=["window", "T", "W", "NL"])
def attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_o,
    p_lse,
    p_bits,
    p_list,
    p_count,
    p_boundaries,
    p_pieces,
    scale,
    window,
    T,
    W,
    NL,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    HG: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of BM queries of one head; a program goes over the key tiles they see."""
    i_piece, i_h = tl.program_id(0), tl.program_id(1)
    i_d, i_m = tl.load(p_pieces + i_piece * 2), tl.load(p_pieces + i_piece * 2 + 1)
    start = tl.load(p_boundaries + i_d).to(tl.int64)
    L = (tl.load(p_boundaries + i_d + 1) - start).to(tl.int32)
    o_m = i_m * BM
    p_q += i_h.to(tl.int64) * stride_qh
    p_k += (i_h // HG).to(tl.int64) * stride_kh
    p_v += (i_h // HG).to(tl.int64) * stride_vh
    if HAS_BITS:
        p_list += i_piece.to(tl.int64) * NL
        i_first, i_end = 0, tl.load(p_count + i_piece)
    else:
        i_first, i_end = 0, tl.cdiv(tl.minimum(o_m + BM, L), BN)
        if HAS_WINDOW:
            i_first = tl.maximum(o_m - window + 1, 0) // BN

    o_t = o_m + tl.arange(0, BM)
    b_q = load_tile(p_q, start, o_m, L, stride_qt, D, 0, BM, D1)
    if D2 > 0:
        b_q2 = load_tile(p_q, start, o_m, L, stride_qt, D, D1, BM, D2)
    b_o = tl.zeros([BM, V1], tl.float32)
    if V2 > 0:
        b_o2 = tl.zeros([BM, V2], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    scale_log2 = scale * LOG2E
    for i in range(i_first, i_end):
        if HAS_BITS:
            o_n = tl.load(p_list + i) * BN
        else:
            o_n = i * BN
        b_k = load_tile(p_k, start, o_n, L, stride_kt, D, 0, BN, D1)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if D2 > 0:
            b_k2 = load_tile(p_k, start, o_n, L, stride_kt, D, D1, BN, D2)
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
        if HAS_BITS:
            m_s = selected(p_bits, start, o_m, o_n, L, W, window, True, HAS_WINDOW, BM, BN)
            b_s = tl.where(m_s, b_s, float("-inf"))
        else:
            is_edge = o_n + BN > o_m + 1
            if HAS_WINDOW:
                is_edge = is_edge | (o_n < o_m + BM - window)
            if is_edge:
                b_back = o_t[:, None] - (o_n + tl.arange(0, BN))[None, :]
                m_s = b_back >= 0
                if HAS_WINDOW:
                    m_s = m_s & (b_back < window)
                b_s = tl.where(m_s, b_s, float("-inf"))
        b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        # A row that has seen no key yet is at -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_max_new == float("-inf"), 0.0, b_max_new)
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_max_new
        b_v = load_tile(p_v, start, o_n, L, stride_vt, V, 0, BN, V1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision=PRECISION)
        if V2 > 0:
            b_v2 = load_tile(p_v, start, o_n, L, stride_vt, V, V1, BN, V2)
            b_o2 = tl.dot(b_p.to(b_v.dtype), b_v2, b_o2 * b_decay[:, None], input_precision=PRECISION)

    m_empty = b_sum == 0.0
    b_lse = tl.where(m_empty, float("-inf"), b_max * LN2 + tl.log(tl.where(m_empty, 1.0, b_sum)))
    b_norm = tl.where(m_empty, 0.0, 1.0 / tl.where(m_empty, 1.0, b_sum))
    p_o += i_h * V
    store_tile(p_o, b_o * b_norm[:, None], start, o_m, L, H * V, V, 0, BM, V1)
    if V2 > 0:
        store_tile(p_o, b_o2 * b_norm[:, None], start, o_m, L, H * V, V, V1, BM, V2)
    tl.store(p_lse + i_h.to(tl.int64) * T + start + o_t, b_lse, mask=o_t < L)


@triton.jit(do_not_specialize=["window", "T", "W", "NL"])
def attention_bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_o,
    p_do,
    p_lse,
    p_dq,
    p_rows,
    p_bits,
    p_list,
    p_count,
    p_boundaries,
    p_pieces,
    scale,
    window,
    T,
    W,
    NL,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    HG: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of BM queries of one head, and for the other kernel what it needs to know of each query, p_rows [2, H, T].

    The first of them is lse in base 2, infinite for queries that see nothing or are beyond the document: exp2(s - inf)
    is 0 without a mask. The second is delta = sum over V of o do.
    """
    i_piece, i_h = tl.program_id(0), tl.program_id(1)
    i_d, i_m = tl.load(p_pieces + i_piece * 2), tl.load(p_pieces + i_piece * 2 + 1)
    start = tl.load(p_boundaries + i_d).to(tl.int64)
    L = (tl.load(p_boundaries + i_d + 1) - start).to(tl.int32)
    o_m = i_m * BM
    p_q += i_h.to(tl.int64) * stride_qh
    p_k += (i_h // HG).to(tl.int64) * stride_kh
    p_v += (i_h // HG).to(tl.int64) * stride_vh
    p_o += i_h * V
    p_do += i_h * V
    if HAS_BITS:
        p_list += i_piece.to(tl.int64) * NL
        i_first, i_end = 0, tl.load(p_count + i_piece)
    else:
        i_first, i_end = 0, tl.cdiv(tl.minimum(o_m + BM, L), BN)
        if HAS_WINDOW:
            i_first = tl.maximum(o_m - window + 1, 0) // BN

    o_t = o_m + tl.arange(0, BM)
    m_t = o_t < L
    o_row = i_h.to(tl.int64) * T + start + o_t
    b_do = load_tile(p_do, start, o_m, L, H * V, V, 0, BM, V1)
    b_o = load_tile(p_o, start, o_m, L, H * V, V, 0, BM, V1)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    if V2 > 0:
        b_do2 = load_tile(p_do, start, o_m, L, H * V, V, V1, BM, V2)
        b_o2 = load_tile(p_o, start, o_m, L, H * V, V, V1, BM, V2)
        b_delta += tl.sum(b_o2.to(tl.float32) * b_do2.to(tl.float32), 1)
    b_lse = tl.load(p_lse + o_row, mask=m_t, other=float("-inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    tl.store(p_rows + o_row, b_lse, mask=m_t)
    tl.store(p_rows + H * T.to(tl.int64) + o_row, b_delta, mask=m_t)

    b_q = load_tile(p_q, start, o_m, L, stride_qt, D, 0, BM, D1)
    b_dq = tl.zeros([BM, D1], tl.float32)
    if D2 > 0:
        b_q2 = load_tile(p_q, start, o_m, L, stride_qt, D, D1, BM, D2)
        b_dq2 = tl.zeros([BM, D2], tl.float32)
    scale_log2 = scale * LOG2E
    for i in range(i_first, i_end):
        if HAS_BITS:
            o_n = tl.load(p_list + i) * BN
        else:
            o_n = i * BN
        b_k = load_tile(p_k, start, o_n, L, stride_kt, D, 0, BN, D1)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if D2 > 0:
            b_k2 = load_tile(p_k, start, o_n, L, stride_kt, D, D1, BN, D2)
            b_s = tl.dot(b_q2, tl.trans(b_k2), b_s, input_precision=PRECISION)
        b_v = load_tile(p_v, start, o_n, L, stride_vt, V, 0, BN, V1)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if V2 > 0:
            b_v2 = load_tile(p_v, start, o_n, L, stride_vt, V, V1, BN, V2)
            b_dp = tl.dot(b_do2, tl.trans(b_v2), b_dp, input_precision=PRECISION)
        # Before exp2: what a query does not see may be larger than its lse by any amount.
        if HAS_BITS:
            m_s = selected(p_bits, start, o_m, o_n, L, W, window, True, HAS_WINDOW, BM, BN)
            b_s = tl.where(m_s, b_s, float("-inf"))
        else:
            is_edge = o_n + BN > o_m + 1
            if HAS_WINDOW:
                is_edge = is_edge | (o_n < o_m + BM - window)
            if is_edge:
                b_back = o_t[:, None] - (o_n + tl.arange(0, BN))[None, :]
                m_s = b_back >= 0
                if HAS_WINDOW:
                    m_s = m_s & (b_back < window)
                b_s = tl.where(m_s, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        if D2 > 0:
            b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)

    p_dq += i_h * D
    store_tile(p_dq, b_dq * scale, start, o_m, L, H * D, D, 0, BM, D1)
    if D2 > 0:
        store_tile(p_dq, b_dq2 * scale, start, o_m, L, H * D, D, D1, BM, D2)


@triton.jit(do_not_specialize=["window", "T", "W", "NL"])
def attention_bwd_dkv_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_dk,
    p_dv,
    p_rows,
    p_bits,
    p_list,
    p_count,
    p_boundaries,
    p_pieces,
    scale,
    window,
    T,
    W,
    NL,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    HG: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BN keys of one key head, over every query tile that sees them and every query head of the group.

    Scores are computed as k q^T, so that no product takes the transpose of another's result.
    """
    i_piece, i_g = tl.program_id(0), tl.program_id(1)
    i_d, i_n = tl.load(p_pieces + i_piece * 2), tl.load(p_pieces + i_piece * 2 + 1)
    start = tl.load(p_boundaries + i_d).to(tl.int64)
    L = (tl.load(p_boundaries + i_d + 1) - start).to(tl.int32)
    o_n = i_n * BN
    p_k += i_g.to(tl.int64) * stride_kh
    p_v += i_g.to(tl.int64) * stride_vh
    if HAS_BITS:
        p_list += i_piece.to(tl.int64) * NL
        i_first, n_tiles = 0, tl.load(p_count + i_piece)
    else:
        i_first, o_end = o_n // BM, L
        if HAS_WINDOW:
            o_end = tl.minimum(L, o_n + BN - 1 + window)
        n_tiles = tl.cdiv(o_end, BM) - i_first

    b_k = load_tile(p_k, start, o_n, L, stride_kt, D, 0, BN, D1)
    b_v = load_tile(p_v, start, o_n, L, stride_vt, V, 0, BN, V1)
    b_dk = tl.zeros([BN, D1], tl.float32)
    b_dv = tl.zeros([BN, V1], tl.float32)
    if D2 > 0:
        b_k2 = load_tile(p_k, start, o_n, L, stride_kt, D, D1, BN, D2)
        b_dk2 = tl.zeros([BN, D2], tl.float32)
    if V2 > 0:
        b_v2 = load_tile(p_v, start, o_n, L, stride_vt, V, V1, BN, V2)
        b_dv2 = tl.zeros([BN, V2], tl.float32)
    scale_log2 = scale * LOG2E
    # One loop over heads and tiles: its loads run ahead across heads.
    i_h, i_m = i_g * HG, 0
    for _ in range(0, n_tiles * HG):
        if HAS_BITS:
            o_m = tl.load(p_list + i_m) * BM
        else:
            o_m = (i_first + i_m) * BM
        o_t = o_m + tl.arange(0, BM)
        o_row = i_h.to(tl.int64) * T + start + o_t
        p_q_h = p_q + i_h.to(tl.int64) * stride_qh
        p_do_h = p_do + i_h * V
        b_q = load_tile(p_q_h, start, o_m, L, stride_qt, D, 0, BM, D1)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if D2 > 0:
            b_q2 = load_tile(p_q_h, start, o_m, L, stride_qt, D, D1, BM, D2)
            b_s = tl.dot(b_k2, tl.trans(b_q2), b_s, input_precision=PRECISION)
        if not HAS_BITS:
            is_edge = o_m < o_n + BN - 1
            if HAS_WINDOW:
                is_edge = is_edge | (o_m + BM > o_n + window)
            if is_edge:
                b_back = o_t[None, :] - (o_n + tl.arange(0, BN))[:, None]
                m_s = b_back >= 0
                if HAS_WINDOW:
                    m_s = m_s & (b_back < window)
                b_s = tl.where(m_s, b_s, float("-inf"))
        b_lse = tl.load(p_rows + o_row, mask=o_t < L, other=float("inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        if HAS_BITS:
            m_s = selected(p_bits, start, o_n, o_m, L, W, window, False, HAS_WINDOW, BN, BM)
            b_p = tl.where(m_s, b_p, 0.0)
        b_do = load_tile(p_do_h, start, o_m, L, H * V, V, 0, BM, V1)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        if V2 > 0:
            b_do2 = load_tile(p_do_h, start, o_m, L, H * V, V, V1, BM, V2)
            b_dp = tl.dot(b_v2, tl.trans(b_do2), b_dp, input_precision=PRECISION)
            b_dv2 = tl.dot(b_p.to(b_do.dtype), b_do2, b_dv2, input_precision=PRECISION)
        b_delta = tl.load(p_rows + H * T.to(tl.int64) + o_row, mask=o_t < L, other=0.0)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        if D2 > 0:
            b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)
        i_m += 1
        if i_m == n_tiles:
            i_h, i_m = i_h + 1, 0

    p_dk += i_g * D
    p_dv += i_g * V
    stride_dkt = H // HG * D
    stride_dvt = H // HG * V
    store_tile(p_dk, b_dk * scale, start, o_n, L, stride_dkt, D, 0, BN, D1)
    store_tile(p_dv, b_dv, start, o_n, L, stride_dvt, V, 0, BN, V1)
    if D2 > 0:
        store_tile(p_dk, b_dk2 * scale, start, o_n, L, stride_dkt, D, D1, BN, D2)
    if V2 > 0:
        store_tile(p_dv, b_dv2, start, o_n, L, stride_dvt, V, V1, BN, V2)
