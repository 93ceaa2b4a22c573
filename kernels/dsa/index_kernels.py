"""Triton kernels of the indexer's forward pass: scores, the choice of keys by radix selection, log-sum-exps.

A workspace holds the scores of some pieces of BM queries: a row of keys a query, counted from the start of its
document, as long as the piece sees in tiles of SW keys. `p_stored` is a table of workspace.py and says where each piece
begins; the workspace starts with piece `first`. Loads and stores of it are unmasked where a tile is written as a whole
and what reads it goes over no more keys, so that they are vectors.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-2147483648)


@triton.jit
def piece_of(p_boundaries, p_pieces, i_piece, BM: tl.constexpr):
    """Where a piece's document begins in the row, the document's length, and the piece's first query in it."""
    i_d = tl.load(p_pieces + i_piece * 2)
    start = tl.load(p_boundaries + i_d).to(tl.int64)
    L = (tl.load(p_boundaries + i_d + 1) - start).to(tl.int32)
    return start, L, tl.load(p_pieces + i_piece * 2 + 1) * BM


@triton.jit
def stored_piece(p_boundaries, p_stored, p_scores, first, i_piece, ROWS: tl.constexpr, SW: tl.constexpr):
    """Of a piece in the workspace: its document's begin and length, its number there; where its ROWS rows of scores
    begin, and how long one is."""
    p_piece = p_stored + i_piece * 3
    i_d = tl.load(p_piece)
    start = tl.load(p_boundaries + i_d).to(tl.int64)
    L = (tl.load(p_boundaries + i_d + 1) - start).to(tl.int32)
    i_tile = tl.load(p_piece + 2)
    p_rows = p_scores + (i_tile - tl.load(p_stored + first * 3 + 2)).to(tl.int64) * (ROWS * SW)
    return start, L, tl.load(p_piece + 1), p_rows, (tl.load(p_piece + 5) - i_tile) * SW


@triton.jit
def load_rows(p_x, start, o_r, L, stride, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Rows o_r of a document, WIDTH contiguous values each: [rows, BW], zero beyond."""
    o_c = tl.arange(0, BW)
    m_x = (o_r < L)[:, None]
    if WIDTH < BW:
        m_x = m_x & (o_c < WIDTH)[None, :]
    return tl.load(p_x + (start + o_r)[:, None] * stride + o_c[None, :], mask=m_x, other=0.0)


@triton.jit
def seen(p_bits, start, o_t, o_s, L, W, HAS_BITS: tl.constexpr):
    """Which of the keys o_s each query o_t sees: of its past, and of its row of the bitmask."""
    m_s = (o_s[None, :] <= o_t[:, None]) & (o_t < L)[:, None]
    if HAS_BITS:
        b_w = tl.load(p_bits + (start + o_t)[:, None] * W + (o_s // 32)[None, :], mask=m_s, other=0)
        m_s = m_s & (((b_w >> (o_s % 32)[None, :]) & 1) != 0)
    return m_s


@triton.jit
def scores_of(
    p_q,
    p_k,
    p_w,
    start,
    o_t,
    o_s,
    L,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """I_ts of queries o_t and keys o_s of a document."""
    b_k = load_rows(p_k, start, o_s, L, DI, DI, BD)
    b_i = tl.zeros([BM, BN], tl.float32)
    for j in range(0, HI):
        b_q = load_rows(p_q + j * DI, start, o_t, L, HI * DI, DI, BD)
        b_w = tl.load(p_w + (start + o_t) * HI + j, mask=o_t < L, other=0.0).to(tl.float32)
        b_r = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_i += b_w[:, None] * tl.where(b_r < 0, 0.0, b_r)  # keeps NaN, as torch's relu does
    return b_i


@triton.jit
def in_order(b_i, m_i):
    """Scores as integers in their order, in which NaN is inf and those where m_i is false are below all."""
    b_x = tl.where(b_i != b_i, float("inf"), b_i).to(tl.int32, bitcast=True)
    # Of negative numbers the larger is the one with the smaller bits below the sign. A sum from 0 is never -0.
    b_x = b_x ^ ((b_x >> 31) & 0x7FFFFFFF)
    return tl.where(m_i, b_x, LOWEST)


@triton.jit(do_not_specialize=["first"])
def index_scores_kernel(
    p_q,
    p_k,
    p_w,
    p_scores,
    p_boundaries,
    p_stored,
    first,
    HI: tl.constexpr,
    DI: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    AS_ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """I_ts of BM queries and BN keys, a tile of the workspace.

    AS_ORDER: as integers in the order of the scores, keys after the query below all; else as they are.
    """
    o_n = tl.program_id(1) * BN
    start, L, i_m, p_rows, LS = stored_piece(p_boundaries, p_stored, p_scores, first, first + tl.program_id(0), BM, BN)
    if o_n < LS:
        o_r, o_s = tl.arange(0, BM), o_n + tl.arange(0, BN)
        o_t = i_m * BM + o_r
        b_x = scores_of(p_q, p_k, p_w, start, o_t, o_s, L, HI, DI, BM, BN, BD, PRECISION)
        if AS_ORDER:
            b_x = in_order(b_x, o_s[None, :] <= o_t[:, None])
        tl.store(p_rows + o_r.to(tl.int64)[:, None] * LS + o_s[None, :], b_x)


@triton.jit
def load_scores(p_row, o_s, LS, IS_WHOLE: tl.constexpr):
    """Scores of a row, or of a column of rows, of length LS; IS_WHOLE: o_s is within it. Beyond, below all."""
    if IS_WHOLE:
        return tl.load(p_row + o_s)
    return tl.load(p_row + o_s, mask=o_s < LS, other=LOWEST)


@triton.jit
def threshold_by_counts(p_rows, n_keys, b_n, BR: tl.constexpr, BS: tl.constexpr):
    """Of each of BR rows the n-th highest score, and how many are above it.

    Two bits at a time from the highest: the count of keys at or above each of three candidates says which to take. A
    row is read 16 times, from a cache.
    """
    b_least = tl.full([BR], LOWEST, tl.int32)  # at least n keys are at or above it
    b_above = tl.zeros([BR], tl.int32)  # keys at or above the next candidate, fewer than n
    for i in range(0, 16):
        b_step = tl.full([BR], 1, tl.int32) << (30 - 2 * i)
        b_one = b_least + b_step
        b_two = b_one + b_step
        b_three = b_two + b_step
        b_n1 = tl.zeros([BR, BS], tl.int32)
        b_n2 = tl.zeros([BR, BS], tl.int32)
        b_n3 = tl.zeros([BR, BS], tl.int32)
        for i_s in range(0, n_keys, BS):
            b_x = tl.load(p_rows + (i_s + tl.arange(0, BS))[None, :])
            b_n1 += (b_x >= b_one[:, None]).to(tl.int32)
            b_n2 += (b_x >= b_two[:, None]).to(tl.int32)
            b_n3 += (b_x >= b_three[:, None]).to(tl.int32)
        b_c1, b_c2, b_c3 = tl.sum(b_n1, 1), tl.sum(b_n2, 1), tl.sum(b_n3, 1)
        m_1, m_2, m_3 = b_c1 >= b_n, b_c2 >= b_n, b_c3 >= b_n  # each implies the one before
        b_above = tl.where(m_3, b_above, tl.where(m_2, b_c3, tl.where(m_1, b_c2, b_c1)))
        b_least = tl.where(m_3, b_three, tl.where(m_2, b_two, tl.where(m_1, b_one, b_least)))
    return b_least, b_above


@triton.jit
def threshold_by_digits(p_row, n_keys, LS, n, BS: tl.constexpr):
    """As `threshold_by_counts` of one row, which is read four times: the n-th highest score is found eight bits at a
    time, by a histogram of the keys that agree with it so far. Counts are integers, so that the order in which a
    histogram adds does not matter."""
    BINS: tl.constexpr = 256
    least = tl.full([], LOWEST, tl.int32)
    above = tl.zeros([], tl.int32)  # keys above the bins of this pass
    for i in range(0, 4):
        shift = 24 - 8 * i
        b_bins = tl.zeros([BINS], tl.int32)
        for i_s in range(0, n_keys, BS):
            b_x = load_scores(p_row, i_s + tl.arange(0, BS), LS, False)
            # Counted round 2^32 from the first bin, so that what is outside the bins is beyond them on either side.
            b_bin = (b_x - least).to(tl.uint32, bitcast=True) >> shift
            b_bins += tl.histogram(b_bin.to(tl.int32), BINS, mask=b_bin < BINS)
        b_from = above + tl.cumsum(b_bins, 0, reverse=True)  # keys in each bin or above it
        i_bin = tl.sum((b_from >= n).to(tl.int32), 0) - 1
        above += tl.sum(tl.where(tl.arange(0, BINS) > i_bin, b_bins, 0), 0)
        least += i_bin << shift
    return least, above


@triton.jit
def chosen(b_x, b_least, b_above, b_tied, b_n):
    """[rows, keys], 1 where a score is above its row's threshold, or at it and no more than n are until there; and the
    ties so far, b_tied with these."""
    b_tie = (b_x == b_least[:, None]).to(tl.int32)
    b_rank = b_above[:, None] + b_tied[:, None] + tl.cumsum(b_tie, 1)
    m_x = (b_x > b_least[:, None]) | ((b_tie != 0) & (b_rank <= b_n[:, None]))
    return m_x.to(tl.int32), b_tied + tl.sum(b_tie, 1)


@triton.jit(do_not_specialize=["first", "W", "top_k"])
def index_select_kernel(
    p_scores,
    p_words,
    p_boundaries,
    p_stored,
    first,
    W,
    top_k,
    BM: tl.constexpr,
    SW: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
):
    """Bits of the top_k highest scores of BR queries; of equal ones, the lowest positions. One query: by digits."""
    NR: tl.constexpr = BM // BR
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries have most to do, and start first
    i_piece, i_r = first + i_program // NR, (i_program % NR) * BR
    start, L, i_m, p_piece, LS = stored_piece(p_boundaries, p_stored, p_scores, first, i_piece, BM, SW)
    o_first = i_m * BM + i_r
    o_t = o_first + tl.arange(0, BR)
    n_keys = tl.minimum(o_first + BR, L)  # that any of these queries sees
    if o_first < L:
        p_rows = p_piece + (i_r + tl.arange(0, BR)).to(tl.int64)[:, None] * LS
        b_n = tl.minimum(o_t + 1, top_k)
        if BR == 1:
            p_row = p_piece + i_r.to(tl.int64) * LS
            least, above = threshold_by_digits(p_row, n_keys, LS, tl.minimum(o_first + 1, top_k), BS)
            b_least, b_above = tl.full([BR], 0, tl.int32) + least, tl.full([BR], 0, tl.int32) + above
        else:
            b_least, b_above = threshold_by_counts(p_rows, n_keys, b_n, BR, BS)
        b_tied = tl.zeros([BR], tl.int32)  # keys at the threshold, so far
        for i_s in range(0, n_keys, BS):
            b_x = load_scores(p_rows, (i_s + tl.arange(0, BS))[None, :], LS, SW % BS == 0)
            b_bit, b_tied = chosen(b_x, b_least, b_above, b_tied, b_n)
            b_word = tl.sum(tl.reshape(b_bit, (BR, BS // 32, 32)) << tl.arange(0, 32)[None, None, :], 2)
            o_w = i_s // 32 + tl.arange(0, BS // 32)
            m_w = (o_t < L)[:, None] & (o_w * 32 < n_keys)[None, :]
            tl.store(p_words + (start + o_t)[:, None] * W + o_w[None, :], b_word, mask=m_w)


@triton.jit(do_not_specialize=["first", "W"])
def index_lse_kernel(
    p_scores,
    p_bits,
    p_lse,
    p_boundaries,
    p_stored,
    first,
    W,
    BM: tl.constexpr,
    SW: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
    HAS_BITS: tl.constexpr,
):
    """log sum exp I_ts over the keys each query sees; -inf for a query that sees one, of which there is no loss."""
    NR: tl.constexpr = BM // BR
    i_piece, i_r = first + tl.program_id(0) // NR, (tl.program_id(0) % NR) * BR
    start, L, i_m, p_piece, LS = stored_piece(p_boundaries, p_stored, p_scores, first, i_piece, BM, SW)
    o_first = i_m * BM + i_r
    o_t = o_first + tl.arange(0, BR)
    if o_first < L:
        p_rows = p_piece + (i_r + tl.arange(0, BR)).to(tl.int64)[:, None] * LS
        b_max = tl.full([BR], float("-inf"), tl.float32)
        b_sum = tl.zeros([BR], tl.float32)
        b_n = tl.zeros([BR], tl.int32)
        for i_s in range(0, tl.minimum(o_first + BR, L), BS):
            o_s = i_s + tl.arange(0, BS)
            m_s = seen(p_bits, start, o_t, o_s, L, W, HAS_BITS)
            b_x = tl.where(m_s, tl.load(p_rows + o_s[None, :]), float("-inf"))
            b_max_new = tl.maximum(b_max, tl.max(b_x, 1))
            b_shift = tl.where(b_max_new == float("-inf"), 0.0, b_max_new)
            b_sum = b_sum * tl.exp(b_max - b_shift) + tl.sum(tl.exp(b_x - b_shift[:, None]), 1)
            b_max = b_max_new
            b_n += tl.sum(m_s.to(tl.int32), 1)
        b_lse = tl.where(b_n > 1, b_max + tl.log(b_sum), float("-inf"))
        tl.store(p_lse + start + o_t, b_lse, mask=o_t < L)
