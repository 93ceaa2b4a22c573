"""The indexer on Triton: its choice of keys and its loss, every launch, as custom ops without a graph."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from loopline.kernels.devices import on_its_device
from loopline.kernels.dsa.bitmask import Bitmask
from loopline.kernels.dsa.blocks import ROW_TILE
from loopline.kernels.dsa.index_kernels import index_lse_kernel, index_scores_kernel, index_select_kernel
from loopline.kernels.dsa.loss_kernels import index_loss_dk_kernel, index_loss_dq_kernel, index_loss_kernel
from loopline.kernels.dsa.tiles import IndexTiles, Tile, index_tiles
from loopline.kernels.tables import boundaries_on, first_pieces_on, pieces_on

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_INDEX_HEAD, LARGEST_HEAD = 128, 256

# Scores held at once. Choosing reads them often, so that they should stay in the second level cache (50 MB on an H200).
SELECT_BYTES, LOSS_BYTES = 2**25, 2**27
_MIN_PIECES = 8  # at least so many, however long documents are: 512 rows to share among a GPU's processors
_HEADS_TOGETHER = 4  # index heads that one program of the gradient of index queries has


def select_bits(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    cu_seqlens: list[int],
    workspace_bytes: int = SELECT_BYTES,
    tiles: IndexTiles | None = None,
) -> Bitmask:
    """`op.select` as bits. Inputs that are not contiguous are copied.

    Args:
        q_index: [1, T, HI, DI], bf16, fp16 or fp32; DI at most 128.
        k_index: [1, T, DI], in q_index's dtype.
        weights: [1, T, HI], fp32 or in q_index's dtype.
        top_k: >= 1.
        cu_seqlens: N + 1 document boundaries over T, on the host.
        workspace_bytes: of scores held at once; at least 512 rows are.
        tiles: for tests and tuning; None means those of `index_tiles`.
    Raises:
        ValueError: dtypes, devices or sizes that no kernel serves.
    """
    _check_index(q_index, k_index, weights)
    row = _Row(cu_seqlens, q_index.device)
    tiles = tiles or index_tiles(q_index.shape[3], q_index.element_size(), row.longest)
    index = (x.contiguous() for x in (q_index, k_index, weights))
    words = sparse_index_select(
        *index, row.boundaries, row.pieces, min(top_k, row.longest), row.longest, workspace_bytes, tiles.numbers()
    )
    return Bitmask(words)


class LossSums(NamedTuple):
    """H times this rank's part of `op.IndexerLoss`, H being its heads, before sampled rows are weighed; fp32."""

    loss_sum: Tensor
    dq_index: Tensor
    dk_index: Tensor
    dweights: Tensor


def loss_sums(
    q: Tensor,
    k: Tensor,
    selection: Bitmask | None,
    *,
    lse: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    cu_seqlens: list[int],
    scale: float,
    row_stride: int = 1,
    row_offset: int = 0,
    workspace_bytes: int = LOSS_BYTES,
    tiles: IndexTiles | None = None,
) -> LossSums:
    """The indexer's loss and its gradients, times H. Inputs that are not contiguous are copied.

    Args:
        q, k: [1, T, H, D] and [1, T, G, D], in one of bf16, fp16 and fp32; D at most 256.
        selection: the set; None means all of the past.
        lse: [H, T], fp32, natural log of the sum of exp(scale q k^T) over that set.
        q_index, k_index, weights: as in `select_bits`.
        row_stride, row_offset: tiles of queries that enter, as in `op.indexer_loss`.
        workspace_bytes: of scores held at once; at least 512 rows are.
    Raises:
        ValueError: dtypes, devices or sizes that no kernel serves.
    """
    _check_index(q_index, k_index, weights)
    _check_attention(q, k, lse, q_index.device)
    if selection is not None:
        selection.check(cu_seqlens)
    row = _Row(cu_seqlens, q.device)
    tiles = tiles or index_tiles(q_index.shape[3], max(q.element_size(), q_index.element_size()), row.longest)
    sums = sparse_index_loss(
        *(x.contiguous() for x in (q, k, lse)),
        None if selection is None else selection.words.contiguous(),
        *(x.contiguous() for x in (q_index, k_index, weights)),
        row.boundaries,
        row.pieces,
        row.first_pieces,
        pieces_on(row.bounds, tiles.dk.rows, q.device),
        row.longest,
        scale,
        row_stride,
        row_offset,
        workspace_bytes,
        tiles.numbers(),
    )
    return LossSums(*sums)


class _Row:
    """A packed row as the kernels want it."""

    def __init__(self, cu_seqlens: list[int], device: torch.device) -> None:
        self.bounds = tuple(cu_seqlens)
        self.longest = max(end - start for start, end in itertools.pairwise(cu_seqlens))
        self.boundaries = boundaries_on(self.bounds, device)
        self.pieces = pieces_on(self.bounds, ROW_TILE, device)
        self.first_pieces = first_pieces_on(self.bounds, ROW_TILE, device)


@torch.library.custom_op("loopline::sparse_index_select", mutates_args=())
@on_its_device
def sparse_index_select(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    boundaries: Tensor,
    pieces: Tensor,
    top_k: int,
    longest: int,
    workspace_bytes: int,
    tiles: list[int],
) -> Tensor:
    """Words of the bitmask, [T, W]."""
    tile = IndexTiles.of_numbers(tiles)
    words = pieces.new_zeros(q_index.shape[1], triton.cdiv(longest, 32))
    scores = _Scores(q_index, k_index, weights, boundaries, pieces, longest, tile.scores, torch.int32)
    for chunk in scores.chunks(len(pieces), workspace_bytes, 1, 0):
        scores.fill(chunk)
        index_select_kernel[(chunk.n_pieces * ROW_TILE // tile.choose.rows,)](
            scores.workspace, words, boundaries, pieces, *chunk.at, scores.width, words.shape[1], top_k,
            BM=ROW_TILE, BR=tile.choose.rows, BS=tile.choose.columns, **_options(tile.choose),
        )  # fmt: skip
    return words


@sparse_index_select.register_fake
def _(
    q_index: Tensor, k_index: Tensor, weights: Tensor, boundaries: Tensor, pieces: Tensor, top_k: int, longest: int,
    workspace_bytes: int, tiles: list[int],
) -> Tensor:  # fmt: skip
    return pieces.new_empty(q_index.shape[1], -(-longest // 32))


@torch.library.custom_op("loopline::sparse_index_loss", mutates_args=())
@on_its_device
def sparse_index_loss(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    words: Tensor | None,
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    boundaries: Tensor,
    pieces: Tensor,
    first_pieces: Tensor,
    key_pieces: Tensor,
    longest: int,
    scale: float,
    row_stride: int,
    row_offset: int,
    workspace_bytes: int,
    tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `LossSums` holds."""
    tile = IndexTiles.of_numbers(tiles)
    n_tokens, n_index_heads, d_index = q_index.shape[1:]
    n_heads, d_head = q.shape[2:]
    n_pieces = max(0, triton.cdiv(len(pieces) - row_offset, row_stride))
    dq, dk, dw = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q_index, k_index, weights))
    index_lse = lse.new_empty(n_tokens)
    scores = _Scores(q_index, k_index, weights, boundaries, pieces, longest, tile.scores, torch.float32)
    n_columns = triton.cdiv(longest, tile.loss.columns)
    losses = lse.new_zeros(max(1, n_pieces), n_columns)
    width = 0 if words is None else words.shape[1]
    together = min(triton.next_power_of_2(n_index_heads), _HEADS_TOGETHER)
    dq_rows = min(tile.dq.rows, ROW_TILE * together)
    sizes = {
        "HI": n_index_heads,
        "DI": d_index,
        "BM": ROW_TILE,
        "BD": _padded(d_index),
        "PRECISION": _precision(q_index),
    }
    for chunk in scores.chunks(n_pieces, workspace_bytes, row_stride, row_offset):
        scores.fill(chunk)
        index_lse_kernel[(chunk.n_pieces * ROW_TILE // tile.choose.rows,)](
            scores.workspace, words, index_lse, boundaries, pieces, *chunk.at, scores.width, width,
            BM=ROW_TILE, BR=tile.choose.rows, BS=tile.choose.columns, HAS_BITS=words is not None,
            **_options(tile.choose),
        )  # fmt: skip
        index_loss_kernel[(chunk.n_pieces, n_columns)](
            q, k, lse, index_lse, words, scores.workspace, losses, boundaries, pieces, scale, *chunk.at, scores.width,
            width, n_tokens, n_columns, H=n_heads, HG=n_heads // k.shape[2], D=d_head, BM=ROW_TILE,
            BN=tile.loss.columns, BD=_padded(d_head), HAS_BITS=words is not None, PRECISION=_precision(q),
            **_options(tile.loss),
        )  # fmt: skip
        n_programs = chunk.n_pieces * ROW_TILE * together // dq_rows
        index_loss_dq_kernel[(n_programs, triton.cdiv(n_index_heads, together))](
            q_index, k_index, weights, scores.workspace, dq, dw, boundaries, pieces, *chunk.at, scores.width,
            **sizes, HG=together, BR=dq_rows, BN=tile.dq.columns, **_options(tile.dq),
        )  # fmt: skip
        index_loss_dk_kernel[(len(key_pieces),)](
            q_index, k_index, weights, scores.workspace, dk, boundaries, key_pieces, first_pieces,
            chunk.first, chunk.first + chunk.n_pieces, row_stride, row_offset, scores.width,
            **sizes, BK=tile.dk.rows, **_options(tile.dk),
        )  # fmt: skip
    return losses.sum(), dq, dk, dw


@sparse_index_loss.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, words: Tensor | None, q_index: Tensor, k_index: Tensor, weights: Tensor,
      *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dw = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q_index, k_index, weights))
    return lse.new_empty(()), dq, dk, dw


class _Chunk(NamedTuple):
    """Pieces of queries whose scores are held at once, `first` counted among those that enter."""

    first: int
    n_pieces: int
    row_stride: int
    row_offset: int

    @property
    def at(self) -> tuple[int, int, int]:
        return self.first, self.row_stride, self.row_offset


class _Scores:
    """The workspace of scores, [rows, width], and what fills it."""

    def __init__(
        self,
        q_index: Tensor,
        k_index: Tensor,
        weights: Tensor,
        boundaries: Tensor,
        pieces: Tensor,
        longest: int,
        tile: Tile,
        dtype: torch.dtype,
    ) -> None:
        self._inputs = (q_index, k_index, weights)
        self._tables = (boundaries, pieces)
        self._tile = tile
        self.dtype = dtype
        self.width = triton.cdiv(longest, tile.columns) * tile.columns

    def chunks(self, n_pieces: int, workspace_bytes: int, row_stride: int, row_offset: int) -> Iterator[_Chunk]:
        """All pieces, as many at a time as the workspace takes."""
        together = min(n_pieces, max(workspace_bytes // (4 * self.width * ROW_TILE), _MIN_PIECES))
        self.workspace = self._tables[1].new_empty(together * ROW_TILE, self.width, dtype=self.dtype)
        for first in range(0, n_pieces, together or 1):
            yield _Chunk(first, min(together, n_pieces - first), row_stride, row_offset)

    def fill(self, chunk: _Chunk) -> None:
        """The scores of a chunk: as integers in their order for an int32 workspace."""
        n_heads, d_index = self._inputs[0].shape[2:]
        index_scores_kernel[(chunk.n_pieces, self.width // self._tile.columns)](
            *self._inputs, self.workspace, *self._tables, *chunk.at, self.width, HI=n_heads, DI=d_index,
            BM=ROW_TILE, BN=self._tile.columns, BD=_padded(d_index), AS_ORDER=self.dtype == torch.int32,
            PRECISION=_precision(self._inputs[0]), **_options(self._tile),
        )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _precision(x: Tensor) -> str:
    """tf32 keeps three digits of an fp32 product."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _check_index(q_index: Tensor, k_index: Tensor, weights: Tensor) -> None:
    types = f"q_index {q_index.dtype}, k_index {k_index.dtype}, weights {weights.dtype}"
    if q_index.dtype not in DTYPES or k_index.dtype != q_index.dtype:
        raise ValueError(f"{types}: queries and keys must be alike, one of {', '.join(map(str, DTYPES))}")
    if weights.dtype not in (q_index.dtype, torch.float32):
        raise ValueError(f"{types}: weights must be fp32 or as queries are")
    if q_index.shape[1] != k_index.shape[1]:
        raise ValueError(
            f"{q_index.shape[1]} queries against {k_index.shape[1]} keys: the kernels want a query for every key; "
            "decode with backend 'reference'"
        )
    if not 1 <= q_index.shape[3] <= LARGEST_INDEX_HEAD:
        raise ValueError(f"index heads of {q_index.shape[3]} must be at most {LARGEST_INDEX_HEAD}")
    if not q_index.device == k_index.device == weights.device:
        raise ValueError(f"q_index on {q_index.device}, k_index on {k_index.device}, weights on {weights.device}")


def _check_attention(q: Tensor, k: Tensor, lse: Tensor, device: torch.device) -> None:
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise ValueError(f"q {q.dtype} and k {k.dtype} must be alike, one of {', '.join(map(str, DTYPES))}")
    if not 1 <= q.shape[3] <= LARGEST_HEAD:
        raise ValueError(f"heads of {q.shape[3]} must be at most {LARGEST_HEAD}")
    want = (q.shape[2], q.shape[1])
    if tuple(lse.shape) != want or lse.dtype != torch.float32:
        raise ValueError(f"lse {tuple(lse.shape)} {lse.dtype} must be [H, T] = {want} of torch.float32")
    if not q.device == k.device == lse.device == device:
        raise ValueError(f"q on {q.device}, k on {k.device}, lse on {lse.device}, the indexer on {device}")
