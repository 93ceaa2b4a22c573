"""Triton kernels over a selection bitmask: which tiles hold a bit, and the bitmask with keys as its rows.

Both run once a call, for all heads; the bits of a row are a few hundred bytes.
"""

import triton
import triton.language as tl

from loopline.kernels.attention.attention_kernels import seen_bits


@triton.jit(do_not_specialize=["window", "W", "NL"])
def attention_tiles_kernel(
    p_bits,
    p_list,
    p_count,
    p_boundaries,
    p_pieces,
    window,
    W,
    NL,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
    STEP: tl.constexpr,
    IS_QUERY: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Numbers of the tiles of BC columns in which any of BR rows has a bit, rising, and how many: [NT, NL] and [NT].

    IS_QUERY: rows are queries and bits they may not see do not count; else the rows of a transposed bitmask.
    BW: words looked at together, a multiple of a tile's. STEP: rows looked at together.
    """
    i_piece = tl.program_id(0)
    i_d, i_r = tl.load(p_pieces + i_piece * 2), tl.load(p_pieces + i_piece * 2 + 1)
    start = tl.load(p_boundaries + i_d).to(tl.int64)
    L = (tl.load(p_boundaries + i_d + 1) - start).to(tl.int32)
    o_first = i_r * BR
    if IS_QUERY:
        i_tile, o_end = 0, tl.minimum(o_first + BR, L)
        if HAS_WINDOW:
            i_tile = tl.maximum(o_first - window + 1, 0) // BC
    else:
        i_tile, o_end = o_first // BC, L
    NC: tl.constexpr = BC // 32
    p_list += i_piece.to(tl.int64) * NL
    n_found = 0
    for i in range(i_tile * NC, tl.cdiv(o_end, 32), BW):
        o_w = i + tl.arange(0, BW)
        b_any = tl.zeros([BW], tl.int32)
        for i_step in range(0, BR, STEP):
            o_r = o_first + i_step + tl.arange(0, STEP)
            m_w = (o_r < L)[:, None] & (o_w * 32 < o_end)[None, :]
            b_w = tl.load(p_bits + (start + o_r)[:, None] * W + o_w[None, :], mask=m_w, other=0)
            if IS_QUERY:
                b_w = b_w & seen_bits(o_r[:, None], o_w[None, :] * 32, window, HAS_WINDOW)
            b_any = tl.maximum(b_any, tl.max((b_w != 0).to(tl.int32), 0))
        b_found = tl.max(tl.reshape(b_any, (BW // NC, NC)), 1)
        b_place = n_found + tl.cumsum(b_found, 0) - b_found
        tl.store(p_list + b_place, i // NC + tl.arange(0, BW // NC), mask=b_found != 0)
        n_found += tl.sum(b_found, 0)
    tl.store(p_count + i_piece, n_found)


@triton.jit(do_not_specialize=["window", "W"])
def attention_transpose_kernel(
    p_bits,
    p_transposed,
    p_boundaries,
    p_pieces,
    window,
    W,
    BW: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Bit t % 32 of word [s, t // 32] from bit s % 32 of word [t, s // 32], without what query t may not see.

    A program does 32 BW keys against 32 BW queries. Blocks of queries before the keys are left unwritten.
    """
    i_piece, i_t = tl.program_id(0), tl.program_id(1)
    i_d, i_s = tl.load(p_pieces + i_piece * 2), tl.load(p_pieces + i_piece * 2 + 1)
    start = tl.load(p_boundaries + i_d).to(tl.int64)
    L = (tl.load(p_boundaries + i_d + 1) - start).to(tl.int32)
    if (i_t >= i_s) & (i_t * BW * 32 < L):
        o_bit = tl.arange(0, 32)
        o_w = i_t * BW + tl.arange(0, BW)
        o_t = o_w[:, None] * 32 + o_bit[None, :]  # [BW, 32]
        for i in tl.static_range(BW):
            o_s = (i_s * BW + i) * 32
            b_w = tl.load(p_bits + (start + o_t) * W + i_s * BW + i, mask=o_t < tl.where(o_s < L, L, 0), other=0)
            b_w = b_w & seen_bits(o_t, o_s, window, HAS_WINDOW)
            b_bit = (b_w[None, :, :] >> o_bit[:, None, None]) & 1  # [32 keys, BW, 32 queries]
            b_word = tl.sum(b_bit << o_bit[None, None, :], 2)
            m_w = (o_s + o_bit < L)[:, None] & (o_w * 32 < L)[None, :]
            tl.store(p_transposed + (start + o_s + o_bit)[:, None] * W + o_w[None, :], b_word, mask=m_w)
