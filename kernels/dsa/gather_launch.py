"""Attention over key lists shared by tiles of queries: checks, custom ops, and the launches of gather_kernels.py."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopline.kernels.backends import Boundaries, check_boundaries, listed
from loopline.kernels.devices import on_its_device
from loopline.kernels.dsa.gather_kernels import (
    gather_attention_bwd_sum_kernel,
    gather_attention_bwd_walk_kernel,
    gather_attention_fwd_kernel,
)
from loopline.kernels.dsa.gather_tiles import (
    MAX_D_HEAD,
    GatherTiles,
    backward_tiles,
    forward_tiles,
    max_rows,
    power_of_two,
    sum_tiles,
)
from loopline.kernels.tables import boundaries_on, numbers_of, on_host, pieces, pieces_on

WORKSPACE_BYTES = 2**30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = 1.4426950408889634


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    *,
    cu_seqlens: Boundaries,
    tile: int,
    scale: float | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its tile's list of keys and its tile's own tokens up to itself.

    A tile is `tile` neighbouring tokens of a document, counted from its start; its last one may be shorter. Gradients
    to q, k and v, of `lse` too; no atomics, so two runs agree to the bit. Inputs are copied where not contiguous.

    Args:
        q: [1, T, H, D], fp32, bf16 or fp16.
        k: [1, T, G, D], G divides H; same dtype as q, and so is v.
        v: [1, T, G, V].
        lists: [NT, K], int32, a row a tile in the order of the row: positions before the tile's first token, in its
            document, rising and none twice; -1 in empty slots. Other positions are ignored.
        cu_seqlens: N + 1 document boundaries over T, on the host, from 0 to T, rising.
        tile: tokens of a tile; tile * H / G at most 128, 64 or 32 for head sizes to 64, 128 or 256.
        scale: factor on q k^T; None means D ** -0.5.
        workspace_bytes: most memory the backward pass takes for contributions to dk and dv before they are added up.
            Less means more launches. Whole key/value heads at a time give the same bits; less than a head at a time
            adds up in another order.
    Returns:
        o: [1, T, H, V] in v.dtype; lse: [H, T], fp32, log of the sum of exp(scale q k^T).
    Raises:
        ValueError: shapes, dtypes or devices disagree, lists are not int32 or of another number of tiles, a tile has
            too many rows, head sizes above 256, bad cu_seqlens, or a workspace smaller than one tile's.
    Reference: DeepSeek-V3.2, arXiv:2512.02556, eq. 2, with one set of keys a tile of queries.
    """
    _check_attention(q, k, v, tile)
    check_boundaries(cu_seqlens, q.shape[0], q.shape[1])
    _check_lists(q, lists, len(pieces(tuple(listed(cu_seqlens)), tile)))
    needed = _unit_bytes(lists, k, v)
    if workspace_bytes < needed:
        raise ValueError(f"workspace_bytes is {workspace_bytes}; one tile of one key head needs {needed}")
    return _forward(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        lists.contiguous(),
        on_host(cu_seqlens),
        tile,
        q.shape[3] ** -0.5 if scale is None else scale,
        workspace_bytes,
    )


@torch.library.custom_op("loopline::gather_attention_fwd", mutates_args=())
@on_its_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    cu_seqlens: Tensor,
    tile: int,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    sizes = _Sizes.of(q, k, v, tile)
    blocks = forward_tiles(tile, sizes.n_rows, max(sizes.BD, sizes.BV), q.dtype != torch.float32, _capability(q))
    bounds = numbers_of(cu_seqlens, q.shape[1])
    tiles, boundaries = pieces_on(bounds, tile, q.device), boundaries_on(bounds, q.device)
    lists, counts = _listed(lists, tiles, boundaries, tile)
    o = q.new_empty(1, q.shape[1], q.shape[2], v.shape[3])
    lse = q.new_empty(q.shape[2], q.shape[1], dtype=torch.float32)
    gather_attention_fwd_kernel[(len(tiles), k.shape[2])](
        q,
        k,
        v,
        lists,
        counts,
        tiles,
        boundaries,
        o,
        lse,
        scale * LOG2_E,
        q.shape[1],
        lists.shape[1],
        **sizes.constants(q, k, v, tile, blocks),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return o, lse


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    cu_seqlens: Tensor,
    tile: int,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    o = q.new_empty(1, q.shape[1], q.shape[2], v.shape[3])
    return o, q.new_empty(q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("loopline::gather_attention_bwd", mutates_args=())
@on_its_device
def _backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lists: Tensor,
    cu_seqlens: Tensor,
    tile: int,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _Sizes.of(q, k, v, tile)
    blocks = backward_tiles(tile, sizes.n_rows, max(sizes.BD, sizes.BV), q.dtype != torch.float32, _capability(q))
    bounds = numbers_of(cu_seqlens, q.shape[1])
    tiles, boundaries = pieces_on(bounds, tile, q.device), boundaries_on(bounds, q.device)
    lists, counts = _listed(lists, tiles, boundaries, tile)
    (n_tokens, n_heads), n_slots = k.shape[1:3], lists.shape[1]
    dq = torch.empty_like(q)
    dk = torch.empty(k.shape, dtype=torch.float32, device=k.device)  # every token is some tile's own: all is written
    dv = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    tiles_at_once, heads_at_once = _slab(len(tiles), n_heads, workspace_bytes // _unit_bytes(lists, k, v))
    n_pairs = tiles_at_once * n_slots
    dk_pairs = k.new_empty(heads_at_once, n_pairs, k.shape[3])
    dv_pairs = v.new_empty(heads_at_once, n_pairs, v.shape[3])
    for first_tile in range(0, len(tiles), tiles_at_once):
        last_tile = min(first_tile + tiles_at_once, len(tiles))
        # Tile i starts at i * tile at the latest, and lists only what lies before.
        n_keys = min((last_tile - 1) * tile, n_tokens)
        pairs, offsets = _inverse(lists[first_tile:last_tile], n_keys)
        for first_head in range(0, n_heads, heads_at_once):
            heads = min(heads_at_once, n_heads - first_head)
            gather_attention_bwd_walk_kernel[(last_tile - first_tile, heads)](
                do,
                dlse,
                q,
                k,
                v,
                o,
                lse,
                lists,
                counts,
                tiles,
                boundaries,
                dq,
                dk,
                dv,
                dk_pairs,
                dv_pairs,
                scale,
                scale * LOG2_E,
                first_tile,
                first_head,
                n_tokens,
                n_slots,
                n_pairs,
                **sizes.constants(q, k, v, tile, blocks),
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )
            if n_keys:
                _sum(dk_pairs, dv_pairs, pairs, offsets, dk, dv, first_head, heads, sizes)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_backward.register_fake
def _(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    lists: Tensor,
    cu_seqlens: Tensor,
    tile: int,
    scale: float,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lists, cu_seqlens, ctx.tile, ctx.scale, ctx.workspace_bytes = inputs
    ctx.save_for_backward(q, k, v, *output, lists, cu_seqlens)


def _gradients(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    constants = (ctx.tile, ctx.scale, ctx.workspace_bytes)
    gradients = _backward(do.contiguous(), dlse.contiguous(), *ctx.saved_tensors, *constants)
    return *gradients, None, None, None, None, None


torch.library.register_autograd("loopline::gather_attention_fwd", _gradients, setup_context=_setup_context)


class _Sizes(NamedTuple):
    """Rows of a program, and head sizes padded to powers of two."""

    n_rows: int
    BD: int
    BV: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, tile: int) -> "_Sizes":
        return cls(tile * (q.shape[2] // k.shape[2]), power_of_two(q.shape[3]), power_of_two(v.shape[3]))

    def constants(self, q: Tensor, k: Tensor, v: Tensor, tile: int, blocks: GatherTiles) -> dict[str, Any]:
        """What the forward kernel and the walk are compiled for."""
        return {
            "H": q.shape[2],
            "G": k.shape[2],
            "D": q.shape[3],
            "V": v.shape[3],
            "TILE": tile,
            "BM": blocks.n_rows,
            "BN": blocks.n_keys,
            "BC": blocks.n_own,
            "BD": self.BD,
            "BV": self.BV,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # without effect on bf16 and fp16
        }


def _capability(x: Tensor) -> int:
    """Of the GPU that x is on; a kernel that is interpreted, or compiled without one, is that of a 9.0."""
    if x.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _listed(lists: Tensor, tiles: Tensor, boundaries: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Lists with -1 for what a tile cannot list, and how many slots of each to walk: [NT, K] and [NT], int32."""
    start = boundaries[tiles[:, 0]]
    is_before = (lists >= start[:, None]) & (lists < (start + tiles[:, 1] * tile)[:, None])
    slots = torch.arange(1, lists.shape[1] + 1, dtype=torch.int32, device=lists.device)
    return lists.masked_fill(~is_before, -1), (is_before * slots).amax(1)


def _slab(n_tiles: int, n_heads: int, n_units: int) -> tuple[int, int]:
    """Tiles and key/value heads in the workspace at once, where it has room for n_units of both: whole heads first."""
    return (n_tiles, min(n_units // n_tiles, n_heads)) if n_units >= n_tiles else (n_units, 1)


def _unit_bytes(lists: Tensor, k: Tensor, v: Tensor) -> int:
    """Workspace of one tile and one key/value head."""
    return lists.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()


def _inverse(lists: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
    """Where each key is listed: numbers of slots, counted through `lists`, by key and then rising; and offsets.

    Args:
        lists: [NT, K], keys below n_keys or -1.
    Returns:
        [NT * K], int32, those of -1 last; and [n_keys + 1], int32, at which key s begins.
    """
    keys = lists.flatten()
    keys, slots = keys.masked_fill(keys < 0, n_keys).sort(stable=True)
    bounds = torch.arange(n_keys + 1, dtype=torch.int32, device=lists.device)
    return slots.int(), torch.searchsorted(keys, bounds, out_int32=True)


def _sum(
    dk_pairs: Tensor,
    dv_pairs: Tensor,
    pairs: Tensor,
    offsets: Tensor,
    dk: Tensor,
    dv: Tensor,
    first_head: int,
    n_heads: int,
    sizes: _Sizes,
) -> None:
    """Add to dk and dv of `n_heads` heads what the workspace has for them."""
    blocks = sum_tiles()
    gather_attention_bwd_sum_kernel[(len(offsets) - 1, n_heads)](
        dk_pairs,
        dv_pairs,
        pairs,
        offsets,
        dk,
        dv,
        first_head,
        dk_pairs.shape[1],
        G=dk.shape[2],
        D=dk.shape[3],
        V=dv.shape[3],
        BR=blocks.n_pairs,
        BD=sizes.BD,
        BV=sizes.BV,
        num_warps=blocks.warps,
    )


def _check_attention(q: Tensor, k: Tensor, v: Tensor, tile: int) -> None:
    is_alike = q.dim() == k.dim() == v.dim() == 4 and q.shape[1] == k.shape[1] and q.shape[3] == k.shape[3]
    if not is_alike or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want [1, T, H, D], [1, T, G, D], [1, T, G, V]"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads must divide {q.shape[2]} query heads")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must be alike: fp32, bf16 or fp16")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}; they must be on one device")
    if max(q.shape[3], v.shape[3]) > MAX_D_HEAD:
        raise ValueError(f"head sizes are {q.shape[3]} and {v.shape[3]}; the kernels have at most {MAX_D_HEAD}")
    if tile < 1:
        raise ValueError(f"tile is {tile}; it must be at least 1")
    n_rows, limit = tile * (q.shape[2] // k.shape[2]), max_rows(max(q.shape[3], v.shape[3]))
    if n_rows > limit:
        raise ValueError(
            f"tile {tile} x {q.shape[2] // k.shape[2]} query heads a key head is {n_rows} rows of a program; "
            f"with head sizes {q.shape[3]} and {v.shape[3]} it can have {limit}: take a smaller tile"
        )


def _check_lists(q: Tensor, lists: Tensor, n_tiles: int) -> None:
    if lists.dim() != 2 or lists.shape[0] != n_tiles or lists.shape[1] < 1:
        raise ValueError(f"lists {tuple(lists.shape)} must be [NT, K], K >= 1, NT = {n_tiles} tiles of the row")
    if lists.dtype != torch.int32 or lists.device != q.device:
        raise ValueError(f"lists are {lists.dtype} on {lists.device}; want torch.int32 on {q.device}")
    if lists.numel() > torch.iinfo(torch.int32).max:
        raise ValueError(f"lists {tuple(lists.shape)} have {lists.numel()} slots; int32 numbers 2**31 - 1 of them")
