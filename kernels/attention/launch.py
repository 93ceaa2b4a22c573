"""Flash attention on Triton: every launch, as custom ops with a backward pass."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from loopline.kernels.attention.attention_kernels import (
    attention_bwd_dkv_kernel,
    attention_bwd_dq_kernel,
    attention_fwd_kernel,
)
from loopline.kernels.attention.bitmask_kernels import attention_tiles_kernel, attention_transpose_kernel
from loopline.kernels.attention.tiles import Tile, Tiles, split_head, tiles_for
from loopline.kernels.backends import Boundaries, check_boundaries, known
from loopline.kernels.devices import on_its_device
from loopline.kernels.tables import boundaries_on, numbers_of, on_host, pieces_by_work_on, pieces_on

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256

# Words of a bitmask that a program of attention_transpose_kernel does in both directions: 32 bytes, a memory sector.
_TRANSPOSED_WORDS = 8


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Boundaries,
    window: int | None = None,
    bitmask: Tensor | None = None,
    scale: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys each query sees: of its past, its window, and its row of the bitmask.

    A query that sees nothing gives o = 0 and lse = -inf, and takes no part in any gradient. Results are the same to the
    bit from call to call. Inputs whose last dim is not contiguous are copied; other strides are served as they are.

    Args:
        q: [1, T, H, D], bf16, fp16 or fp32; D a multiple of 16, at most 256.
        k: [1, T, G, D], in q's dtype; G divides H.
        v: [1, T, G, V], in q's dtype; V a multiple of 16, at most 256.
        cu_seqlens: N + 1 document boundaries on the host, from 0 to T.
        window: keys t - window < s <= t are seen by query t; None means all of its past.
        bitmask: [T, W], int32, W = ceil(longest document / 32): bit s % 32 of word [t, s // 32] says that query t sees
            key s, counted from the start of its document. Bits of keys after t, or before its window, count as 0.
        scale: factor on q k^T, above 0; None means D ** -0.5.
        tiles: for tests and tuning; None means those of `tiles_for`.
    Returns:
        o: [1, T, H, V], in q's dtype; lse: [H, T], fp32, natural log of the sum of exp(scale q k^T), without gradient.
    Raises:
        ValueError: shapes, dtypes, devices or sizes that no kernel serves.
    Reference: Dao, FlashAttention-2, arXiv:2307.08691.
    """
    _check(q, k, v, cu_seqlens, window, bitmask)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale {scale} must be above 0")
    if tiles is None:
        tiles = tiles_for(q.shape[3], v.shape[3], q.element_size(), has_bits=bitmask is not None)
    if bitmask is not None:
        for tile in (tiles.fwd, tiles.dq, tiles.dkv):
            if tile.columns % 32:
                raise ValueError(f"columns {tile.columns} of a tile must be a multiple of 32, a word of the bitmask")
    o, lse = attention_fwd(
        *(x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)),
        bitmask,
        on_host(cu_seqlens),
        window=window,
        scale=scale,
        tiles=tiles.numbers(),
    )
    return o, lse.detach()


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Boundaries, window: int | None, bitmask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    is_alike = q.dim() == k.dim() == v.dim() == 4 and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
    if not is_alike or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"{shapes}: want q [1, T, H, D], k [1, T, G, D], v [1, T, G, V] of as many tokens")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads must divide {q.shape[2]} query heads")
    if any(size % 16 or not 16 <= size <= LARGEST_HEAD for size in (q.shape[3], v.shape[3])):
        raise ValueError(f"head sizes of {shapes} must be multiples of 16 from 16 to {LARGEST_HEAD}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} must be one of {', '.join(map(str, DTYPES))}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q on {q.device}, k on {k.device} and v on {v.device} must be on one device")
    check_boundaries(cu_seqlens, q.shape[0], q.shape[1])
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1, the query's own key, or None for no window")
    if bitmask is not None:
        bounds = known(cu_seqlens)
        if bounds is not None:
            _check_words(bitmask, bounds)
        if bitmask.device != q.device:
            raise ValueError(f"bitmask on {bitmask.device} must be on {q.device}, where q is")


@torch.library.custom_op("loopline::attention_fwd", mutates_args=())
@on_its_device
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bitmask: Tensor | None,
    cu_seqlens: Tensor,
    window: int | None,
    scale: float,
    tiles: list[int],
) -> tuple[Tensor, Tensor]:
    """o and lse of `flash_attention`."""
    tile = Tiles.of_numbers(tiles).fwd
    row = _Row(q, bitmask, cu_seqlens, window)
    pieces = pieces_by_work_on(row.bounds, tile.rows, False, q.device)
    n_tokens, n_heads = q.shape[1:3]
    o = q.new_empty(1, n_tokens, n_heads, v.shape[3])
    lse = q.new_empty(n_heads, n_tokens, dtype=torch.float32)
    attention_fwd_kernel[(len(pieces), n_heads)](
        q, k, v, o, lse, bitmask, **row.tile_lists(bitmask, pieces, tile, is_query=True), p_boundaries=row.boundaries,
        p_pieces=pieces, **_sizes(q, k, v, bitmask, row.window, scale), BM=tile.rows, BN=tile.columns, **_options(tile),
    )  # fmt: skip
    return o, lse


@attention_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[2], q.shape[1], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op("loopline::attention_bwd", mutates_args=())
@on_its_device
def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bitmask: Tensor | None,
    cu_seqlens: Tensor,
    window: int | None,
    scale: float,
    tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous; do [1, T, H, V] is contiguous too."""
    every = Tiles.of_numbers(tiles)
    n_tokens, n_heads, n_kv_heads = *q.shape[1:3], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rows = q.new_empty(2, n_heads, n_tokens, dtype=torch.float32)  # lse in base 2, and delta
    row = _Row(q, bitmask, cu_seqlens, window)
    sizes = _sizes(q, k, v, bitmask, row.window, scale)
    pieces = pieces_by_work_on(row.bounds, every.dq.rows, False, q.device)
    attention_bwd_dq_kernel[(len(pieces), n_heads)](
        q, k, v, o, do, lse, dq, rows, bitmask, **row.tile_lists(bitmask, pieces, every.dq, is_query=True),
        p_boundaries=row.boundaries, p_pieces=pieces, **sizes, BM=every.dq.rows, BN=every.dq.columns,
        **_options(every.dq),
    )  # fmt: skip
    transposed = row.transposed(bitmask)
    pieces = pieces_by_work_on(row.bounds, every.dkv.rows, True, q.device)
    attention_bwd_dkv_kernel[(len(pieces), n_kv_heads)](
        q, k, v, do, dk, dv, rows, transposed, **row.tile_lists(transposed, pieces, every.dkv, is_query=False),
        p_boundaries=row.boundaries, p_pieces=pieces, **sizes, BN=every.dkv.rows, BM=every.dkv.columns,
        **_options(every.dkv),
    )  # fmt: skip
    return dq, dk, dv


@attention_bwd.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bitmask, cu_seqlens, *ctx.arguments = inputs
    ctx.save_for_backward(q, k, v, *output, bitmask, cu_seqlens)
    ctx.n_inputs = len(inputs)


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_bwd(do.contiguous(), *ctx.saved_tensors, *ctx.arguments)
    return (*gradients, *[None] * (ctx.n_inputs - 3))


attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _sizes(q: Tensor, k: Tensor, v: Tensor, bitmask: Tensor | None, window: int, scale: float) -> dict[str, Any]:
    """What all three kernels are told about their inputs."""
    (d1, d2), (v1, v2) = split_head(q.shape[3]), split_head(v.shape[3])
    return {
        "scale": scale,
        "window": window,
        "T": q.shape[1],
        "W": 0 if bitmask is None else bitmask.shape[1],
        "stride_qt": q.stride(1),
        "stride_qh": q.stride(2),
        "stride_kt": k.stride(1),
        "stride_kh": k.stride(2),
        "stride_vt": v.stride(1),
        "stride_vh": v.stride(2),
        "H": q.shape[2],
        "HG": q.shape[2] // k.shape[2],
        "D": q.shape[3],
        "D1": d1,
        "D2": d2,
        "V": v.shape[3],
        "V1": v1,
        "V2": v2,
        "HAS_WINDOW": window > 0,
        "HAS_BITS": bitmask is not None,
        # tf32 keeps three digits of an fp32 product.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


class _Row:
    """A packed row, and what a bitmask over it is made into.

    Attributes:
        bounds: document boundaries; and on the device, `boundaries`.
        window: 0 is none, or none that hides anything.
    """

    def __init__(self, q: Tensor, bitmask: Tensor | None, cu_seqlens: Tensor, window: int | None) -> None:
        self.bounds = numbers_of(cu_seqlens, q.shape[1])
        self.boundaries = boundaries_on(self.bounds, q.device)
        self._longest = max(end - start for start, end in itertools.pairwise(self.bounds))
        self.window = 0 if window is None or window >= self._longest else window
        if bitmask is not None:
            _check_words(bitmask, self.bounds)

    def tile_lists(self, bits: Tensor | None, pieces: Tensor, tile: Tile, *, is_query: bool) -> dict[str, Any]:
        """For each piece of rows the column tiles that hold a bit; without bits bounds are arithmetic, and no list."""
        if bits is None:
            return {"p_list": None, "p_count": None, "NL": 0}
        n_columns = triton.cdiv(self._longest, tile.columns)
        found = bits.new_empty(len(pieces), n_columns)
        counts = bits.new_empty(len(pieces))
        words = max(tile.columns // 32, 32)
        attention_tiles_kernel[(len(pieces),)](
            bits, found, counts, self.boundaries, pieces, self.window, bits.shape[1], n_columns, BR=tile.rows,
            BC=tile.columns, BW=words, STEP=min(tile.rows, 32), IS_QUERY=is_query, HAS_WINDOW=self.window > 0,
            num_warps=4,
        )  # fmt: skip
        return {"p_list": found, "p_count": counts, "NL": n_columns}

    def transposed(self, bitmask: Tensor | None) -> Tensor | None:
        """Bits of queries for each key."""
        if bitmask is None:
            return None
        transposed = torch.empty_like(bitmask)
        pieces = pieces_on(self.bounds, 32 * _TRANSPOSED_WORDS, bitmask.device)
        n_blocks = triton.cdiv(self._longest, 32 * _TRANSPOSED_WORDS)
        attention_transpose_kernel[(len(pieces), n_blocks)](
            bitmask, transposed, self.boundaries, pieces, self.window, bitmask.shape[1],
            BW=_TRANSPOSED_WORDS, HAS_WINDOW=self.window > 0, num_warps=4,
        )  # fmt: skip
        return transposed


def _check_words(bitmask: Tensor, bounds: Sequence[int]) -> None:
    n_words = -(-max(end - start for start, end in itertools.pairwise(bounds)) // 32)
    want = (bounds[-1], n_words)
    if bitmask.shape != want or bitmask.dtype != torch.int32 or not bitmask.is_contiguous():
        raise ValueError(
            f"bitmask {tuple(bitmask.shape)} {bitmask.dtype} must be contiguous "
            f"[T, longest document / 32] = {want} of torch.int32"
        )
