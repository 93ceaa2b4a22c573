"""Triton kernels of attention over key lists shared by tiles of queries; GATHER.md has the equations.

A program has the rows of one query tile and one key/value head: BM = token of the tile x query head of the group. All
scores are computed transposed, [keys, rows]: keys and features are then the 64 rows that wgmma wants, however few rows
a tile has, and no product needs an accumulator transposed.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(p_tiles, p_boundaries, TILE: tl.constexpr):
    """First token of a program's tile, and how many it has."""
    i_tile = tl.program_id(0)
    document = tl.load(p_tiles + 2 * i_tile)
    first = tl.load(p_boundaries + document) + tl.load(p_tiles + 2 * i_tile + 1) * TILE
    return first, tl.minimum(tl.load(p_boundaries + document + 1) - first, TILE)


@triton.jit
def _rows(p_x, i_rows, m_rows, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Rows of WIDTH contiguous values, wherever they lie: [rows, BW], zero where masked."""
    features = tl.arange(0, BW)
    at = p_x + i_rows.to(tl.int64)[:, None] * WIDTH + features[None, :]
    m_x = m_rows[:, None]
    if WIDTH < BW:
        m_x &= (features < WIDTH)[None, :]
    return tl.load(at, mask=m_x, other=0.0)


@triton.jit
def _store_rows(p_x, b_x, i_rows, m_rows, WIDTH: tl.constexpr, BW: tl.constexpr):
    features = tl.arange(0, BW)
    at = p_x + i_rows.to(tl.int64)[:, None] * WIDTH + features[None, :]
    m_x = m_rows[:, None]
    if WIDTH < BW:
        m_x &= (features < WIDTH)[None, :]
    tl.store(at, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _store_columns(p_x, b_x, i_rows, m_rows, WIDTH: tl.constexpr, BW: tl.constexpr):
    """As `_store_rows`, of a block held [BW, rows]."""
    features = tl.arange(0, BW)
    at = p_x + i_rows.to(tl.int64)[None, :] * WIDTH + features[:, None]
    m_x = m_rows[None, :]
    if WIDTH < BW:
        m_x &= (features < WIDTH)[:, None]
    tl.store(at, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["n_tokens", "n_slots"])
def gather_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_lists,
    p_counts,
    p_tiles,
    p_boundaries,
    p_o,
    p_lse,
    scale_log2,
    n_tokens,
    n_slots,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    R: tl.constexpr = H // G
    i_g = tl.program_id(1)
    first, n_own = _tile(p_tiles, p_boundaries, TILE)
    rows = tl.arange(0, BM)
    i_t = rows // R
    i_h = i_g * R + rows % R
    m_rows = i_t < n_own
    i_rows = (first + i_t).to(tl.int64) * H + i_h
    b_q = _rows(p_q, i_rows, m_rows, D, BD)

    # The tile's own tokens first: its first one is seen by every row, padding included, so the maximum is finite.
    own = tl.arange(0, BC)
    m_own = own < n_own
    i_own = (first + own).to(tl.int64) * G + i_g
    b_k_own = _rows(p_k, i_own, m_own, D, BD)
    b_v_own = _rows(p_v, i_own, m_own, V, BV)
    b_s_own = tl.dot(b_k_own, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BC, BM]
    b_s_own = tl.where((own[:, None] <= i_t[None, :]) & m_own[:, None], b_s_own, float("-inf"))
    b_m = tl.max(b_s_own, axis=0)
    b_p_own = tl.exp2(b_s_own - b_m[None, :])
    b_l = tl.sum(b_p_own, axis=0)
    b_o = tl.dot(tl.trans(b_v_own), b_p_own.to(b_v_own.dtype), input_precision=PRECISION)  # [BV, BM]

    p_list = p_lists + tl.program_id(0).to(tl.int64) * n_slots
    n_listed = tl.load(p_counts + tl.program_id(0))
    for i in range(0, n_listed, BN):
        slots = i + tl.arange(0, BN)
        keys = tl.load(p_list + slots, mask=slots < n_listed, other=-1)
        m_keys = keys >= 0
        i_keys = keys.to(tl.int64) * G + i_g
        b_k = _rows(p_k, i_keys, m_keys, D, BD)
        b_v = _rows(p_v, i_keys, m_keys, V, BV)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BN, BM]
        b_s = tl.where(m_keys[:, None], b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, axis=0))
        b_shrink = tl.exp2(b_m - b_m_new)
        b_p = tl.exp2(b_s - b_m_new[None, :])
        b_l = b_l * b_shrink + tl.sum(b_p, axis=0)
        b_o = b_o * b_shrink[None, :]
        b_o = tl.dot(tl.trans(b_v), b_p.to(b_v.dtype), b_o, input_precision=PRECISION)
        b_m = b_m_new

    _store_columns(p_o, b_o / b_l[None, :], i_rows, m_rows, V, BV)
    b_lse = (b_m + tl.log2(b_l)) * 0.6931471805599453  # ln 2
    tl.store(p_lse + i_h.to(tl.int64) * n_tokens + first + i_t, b_lse, mask=m_rows)


@triton.jit(do_not_specialize=["first_tile", "first_head", "n_tokens", "n_slots", "n_pairs"])
def gather_attention_bwd_walk_kernel(
    p_do,
    p_dlse,
    p_q,
    p_k,
    p_v,
    p_o,
    p_lse,
    p_lists,
    p_counts,
    p_tiles,
    p_boundaries,
    p_dq,
    p_dk,
    p_dv,
    p_dk_pairs,
    p_dv_pairs,
    scale,
    scale_log2,
    first_tile,
    first_head,
    n_tokens,
    n_slots,
    n_pairs,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tables and lists come from `first_tile` on; pairs are numbered within the slab.
    R: tl.constexpr = H // G
    i_g = first_head + tl.program_id(1)
    first, n_own = _tile(p_tiles + 2 * first_tile, p_boundaries, TILE)
    rows = tl.arange(0, BM)
    i_t = rows // R
    i_h = i_g * R + rows % R
    m_rows = i_t < n_own
    i_rows = (first + i_t).to(tl.int64) * H + i_h
    b_q = _rows(p_q, i_rows, m_rows, D, BD)
    b_do = _rows(p_do, i_rows, m_rows, V, BV)
    b_o = _rows(p_o, i_rows, m_rows, V, BV)
    o_lse = i_h.to(tl.int64) * n_tokens + first + i_t
    # An infinite normaliser makes every probability of a padded row zero.
    b_lse = tl.load(p_lse + o_lse, mask=m_rows, other=float("inf")) * 1.4426950408889634  # log2(e)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), axis=1) - tl.load(p_dlse + o_lse, mask=m_rows, other=0.0)

    own = tl.arange(0, BC)
    m_own = own < n_own
    i_own = (first + own).to(tl.int64) * G + i_g
    b_k_own = _rows(p_k, i_own, m_own, D, BD)
    b_v_own = _rows(p_v, i_own, m_own, V, BV)
    b_s_own = tl.dot(b_k_own, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BC, BM]
    b_s_own = tl.where((own[:, None] <= i_t[None, :]) & m_own[:, None], b_s_own, float("-inf"))
    b_p_own = tl.exp2(b_s_own - b_lse[None, :])
    b_dv_own = tl.dot(b_p_own.to(b_do.dtype), b_do, input_precision=PRECISION)
    _store_rows(p_dv, b_dv_own, i_own, m_own, V, BV)
    b_dp_own = tl.dot(b_v_own, tl.trans(b_do), input_precision=PRECISION)
    b_ds_own = (b_p_own * (b_dp_own - b_delta[None, :])).to(b_q.dtype)
    b_dk_own = tl.dot(b_ds_own, b_q, input_precision=PRECISION) * scale
    _store_rows(p_dk, b_dk_own, i_own, m_own, D, BD)
    b_dq = tl.dot(tl.trans(b_k_own), b_ds_own, input_precision=PRECISION)  # [BD, BM]

    i_tile = tl.program_id(0).to(tl.int64)
    p_list = p_lists + (first_tile + i_tile) * n_slots
    n_listed = tl.load(p_counts + first_tile + i_tile)
    first_pair = tl.program_id(1).to(tl.int64) * n_pairs + i_tile * n_slots
    in_block = tl.arange(0, BN)
    for i in range(0, n_listed, BN):
        slots = i + in_block
        keys = tl.load(p_list + slots, mask=slots < n_listed, other=-1)
        m_keys = keys >= 0
        i_keys = keys.to(tl.int64) * G + i_g
        b_k = _rows(p_k, i_keys, m_keys, D, BD)
        b_v = _rows(p_v, i_keys, m_keys, V, BV)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BN, BM]
        b_s = tl.where(m_keys[:, None], b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
        _store_rows(p_dv_pairs + (first_pair + i) * V, b_dv, in_block, m_keys, V, BV)
        b_dk = tl.dot(b_ds, b_q, input_precision=PRECISION) * scale
        _store_rows(p_dk_pairs + (first_pair + i) * D, b_dk, in_block, m_keys, D, BD)
        b_dq = tl.dot(tl.trans(b_k), b_ds, b_dq, input_precision=PRECISION)

    _store_columns(p_dq, b_dq * scale, i_rows, m_rows, D, BD)


@triton.jit(do_not_specialize=["first_head", "n_pairs"])
def gather_attention_bwd_sum_kernel(
    p_dk_pairs,
    p_dv_pairs,
    p_pairs,
    p_offsets,
    p_dk,
    p_dv,
    first_head,
    n_pairs,
    G: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """dk and dv of one key and head: += its rows of the workspace, BR partial sums in a fixed order."""
    key = tl.program_id(0)
    start = tl.load(p_offsets + key)
    end = tl.load(p_offsets + key + 1)
    if start == end:
        return
    first_pair = tl.program_id(1).to(tl.int64) * n_pairs
    b_dk = tl.zeros([BR, BD], tl.float32)
    b_dv = tl.zeros([BR, BV], tl.float32)
    for i in range(start, end, BR):
        places = i + tl.arange(0, BR)
        m_pairs = places < end
        i_pairs = first_pair + tl.load(p_pairs + places, mask=m_pairs, other=0)
        b_dk += _rows(p_dk_pairs, i_pairs, m_pairs, D, BD).to(tl.float32)
        b_dv += _rows(p_dv_pairs, i_pairs, m_pairs, V, BV).to(tl.float32)
    row = key.to(tl.int64) * G + first_head + tl.program_id(1)
    o_d = row * D + tl.arange(0, BD)
    m_d = tl.arange(0, BD) < D
    tl.store(p_dk + o_d, tl.load(p_dk + o_d, mask=m_d, other=0.0) + tl.sum(b_dk, axis=0), mask=m_d)
    o_v = row * V + tl.arange(0, BV)
    m_v = tl.arange(0, BV) < V
    tl.store(p_dv + o_v, tl.load(p_dv + o_v, mask=m_v, other=0.0) + tl.sum(b_dv, axis=0), mask=m_v)
