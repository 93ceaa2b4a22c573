"""Triton kernels of `tile_lists`: the scores of keys for tiles of queries, and lists of the highest.

The workspace is that of index_kernels.py, with a row a tile: a piece is GROUP tiles of TILE tokens of a document, and
its rows hold the keys before the last of them.
"""

import triton
import triton.language as tl

from loopline.kernels.dsa.index_kernels import (
    LOWEST,
    chosen,
    in_order,
    load_scores,
    scores_of,
    stored_piece,
    threshold_by_digits,
)


@triton.jit(do_not_specialize=["first"])
def tile_scores_kernel(
    p_q,
    p_k,
    p_w,
    p_scores,
    p_boundaries,
    p_stored,
    first,
    HI: tl.constexpr,
    DI: tl.constexpr,
    TILE: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of GROUP tiles and BN keys the highest score that TILE queries, from OFFSET after the tile's first token on, give
    a key up to themselves; as integers in the order of the scores, keys that are not before the tile below all."""
    MEMBERS: tl.constexpr = BM // GROUP  # queries of a tile that are scored together
    o_n = tl.program_id(1) * BN
    i_piece = first + tl.program_id(0)
    start, L, i_group, p_rows, LS = stored_piece(p_boundaries, p_stored, p_scores, first, i_piece, GROUP, BN)
    if o_n < LS:
        o_r, o_s = tl.arange(0, BM), o_n + tl.arange(0, BN)
        o_first = (i_group * GROUP + o_r // MEMBERS) * TILE  # of each row's tile
        b_best = tl.full([GROUP, BN], LOWEST, tl.int32)
        for i_m in range(0, TILE, MEMBERS):
            i_member = i_m + o_r % MEMBERS
            o_t = o_first + OFFSET + i_member
            m_t = (i_member < TILE) & (o_t >= 0) & (o_t < L)
            o_t = tl.where(m_t, o_t, L)  # which nothing is loaded for
            b_i = scores_of(p_q, p_k, p_w, start, o_t, o_s, L, HI, DI, BM, BN, BD, PRECISION)
            m_i = m_t[:, None] & (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] < o_first[:, None])
            b_best = tl.maximum(b_best, tl.max(tl.reshape(in_order(b_i, m_i), (GROUP, MEMBERS, BN)), 1))
        tl.store(p_rows + tl.arange(0, GROUP).to(tl.int64)[:, None] * LS + o_s[None, :], b_best)


@triton.jit(do_not_specialize=["first", "n_slots"])
def tile_select_kernel(
    p_scores,
    p_lists,
    p_boundaries,
    p_stored,
    p_first_tiles,
    first,
    n_slots,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    SW: tl.constexpr,
    BS: tl.constexpr,
):
    """The list of a tile: positions of its n_slots highest scores, rising; of equal ones, the lowest. A key's slot is
    the number of those chosen before it; slots beyond them are not written."""
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)  # late tiles have most to do, and start first
    i_piece, i_r = first + i_program // GROUP, i_program % GROUP
    start, L, i_group, p_rows, LS = stored_piece(p_boundaries, p_stored, p_scores, first, i_piece, GROUP, SW)
    i_tile = i_group * GROUP + i_r
    n_keys = i_tile * TILE
    if (n_keys > 0) & (n_keys < L):
        p_row = p_rows + i_r.to(tl.int64) * LS
        n = tl.minimum(n_keys, n_slots)
        least, above = threshold_by_digits(p_row, n_keys, LS, n, BS)
        b_zero = tl.zeros([1], tl.int32)
        b_tied, b_listed = b_zero, b_zero  # keys at the threshold, and keys chosen, so far
        i_list = tl.load(p_first_tiles + tl.load(p_stored + i_piece * 3)) + i_tile
        p_list = p_lists + i_list.to(tl.int64) * n_slots
        for i_s in range(0, n_keys, BS):
            o_s = (i_s + tl.arange(0, BS))[None, :]
            b_x = load_scores(p_row, o_s, LS, False)
            b_bit, b_tied = chosen(b_x, b_zero + least, b_zero + above, b_tied, b_zero + n)
            b_slot = b_listed[:, None] + tl.cumsum(b_bit, 1) - 1
            tl.store(p_list + b_slot, (start + o_s).to(tl.int32), mask=b_bit != 0)
            b_listed += tl.sum(b_bit, 1)
