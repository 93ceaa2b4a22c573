"""The indexer on Triton: its choice of keys and its loss, every launch, as custom ops without a graph."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from loopline.kernels.backends import Boundaries, known
from loopline.kernels.devices import on_its_device
from loopline.kernels.dsa.bitmask import Bitmask, longest, n_words
from loopline.kernels.dsa.blocks import ROW_TILE
from loopline.kernels.dsa.index_kernels import index_lse_kernel, index_scores_kernel, index_select_kernel
from loopline.kernels.dsa.loss_kernels import index_loss_dk_kernel, index_loss_dq_kernel, index_loss_kernel
from loopline.kernels.dsa.tiles import IndexTiles, Tile, index_tiles
from loopline.kernels.dsa.workspace import Chunk, chunks, most_tiles, stored_queries, stored_queries_on
from loopline.kernels.tables import boundaries_on, first_pieces_on, numbers_of, on_host, pieces_on

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_INDEX_HEAD, LARGEST_HEAD = 128, 256

# Scores held at once. Choosing reads them often, so that they should stay in the second level cache (50 MB on an H200).
SELECT_BYTES, LOSS_BYTES = 2**25, 2**27
_HEADS_TOGETHER = 4  # index heads that one program of the gradient of index queries has


def select_bits(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    cu_seqlens: Boundaries,
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
    check_index(q_index, k_index, weights)
    index = (x.contiguous() for x in (q_index, k_index, weights))
    numbers = None if tiles is None else tiles.numbers()
    return Bitmask(sparse_index_select(*index, on_host(cu_seqlens), top_k, workspace_bytes, numbers))


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
    cu_seqlens: Boundaries,
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
    check_index(q_index, k_index, weights)
    _check_attention(q, k, lse, q_index.device)
    bounds = known(cu_seqlens)
    if selection is not None and bounds is not None:
        selection.check(bounds)
    sums = sparse_index_loss(
        *(x.contiguous() for x in (q, k, lse)),
        None if selection is None else selection.words.contiguous(),
        *(x.contiguous() for x in (q_index, k_index, weights)),
        on_host(cu_seqlens),
        scale,
        row_stride,
        row_offset,
        workspace_bytes,
        None if tiles is None else tiles.numbers(),
    )
    return LossSums(*sums)


@torch.library.custom_op("loopline::sparse_index_select", mutates_args=())
@on_its_device
def sparse_index_select(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    top_k: int,
    workspace_bytes: int,
    tiles: list[int] | None,
) -> Tensor:
    """Words of the bitmask, [T, W]; `tiles` None are those of `index_tiles`."""
    bounds = numbers_of(cu_seqlens, q_index.shape[1])
    tile = chosen_tiles(tiles, q_index, q_index.element_size(), bounds)
    words = q_index.new_zeros(q_index.shape[1], n_words(bounds), dtype=torch.int32)
    scores = _Scores(q_index, k_index, weights, bounds, tile.scores, torch.int32, workspace_bytes)
    top_k = min(top_k, longest(bounds))
    for chunk in scores.chunks:
        scores.fill(chunk)
        index_select_kernel[(chunk.n_pieces * ROW_TILE // tile.choose.rows,)](
            scores.workspace, words, *scores.tables, chunk.first, words.shape[1], top_k,
            BM=ROW_TILE, SW=tile.scores.columns, BR=tile.choose.rows, BS=tile.choose.columns, **options(tile.choose),
        )  # fmt: skip
    return words


@sparse_index_select.register_fake
def _(q_index: Tensor, *_: Any) -> Tensor:
    n_words_of_row = torch.library.get_ctx().new_dynamic_size(min=1)
    return q_index.new_empty(q_index.shape[1], n_words_of_row, dtype=torch.int32)


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
    cu_seqlens: Tensor,
    scale: float,
    row_stride: int,
    row_offset: int,
    workspace_bytes: int,
    tiles: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `LossSums` holds; `tiles` None are those of `index_tiles`."""
    bounds = numbers_of(cu_seqlens, q.shape[1])
    if words is not None:
        Bitmask(words).check(bounds)
    tile = chosen_tiles(tiles, q_index, max(q.element_size(), q_index.element_size()), bounds)
    n_tokens, n_index_heads, d_index = q_index.shape[1:]
    n_heads, d_head = q.shape[2:]
    dq, dk, dw = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q_index, k_index, weights))
    index_lse = lse.new_empty(n_tokens)
    index = (q_index, k_index, weights)
    scores = _Scores(
        *index, bounds, tile.scores, torch.float32, workspace_bytes, row_stride=row_stride, row_offset=row_offset
    )
    parts = tile.scores.columns // tile.loss.columns
    losses = lse.new_zeros(max(1, scores.n_tiles * parts))
    key_pieces = pieces_on(bounds, tile.dk.rows, q.device)
    first_pieces = first_pieces_on(bounds, ROW_TILE, q.device)
    width = 0 if words is None else words.shape[1]
    together = min(triton.next_power_of_2(n_index_heads), _HEADS_TOGETHER)
    dq_rows = min(tile.dq.rows, ROW_TILE * together)
    rows = {"BM": ROW_TILE, "SW": tile.scores.columns}
    sizes = {"HI": n_index_heads, "DI": d_index, "BD": padded(d_index), "PRECISION": precision(q_index)}
    for chunk in scores.chunks:
        scores.fill(chunk)
        index_lse_kernel[(chunk.n_pieces * ROW_TILE // tile.lse.rows,)](
            scores.workspace, words, index_lse, *scores.tables, chunk.first, width,
            **rows, BR=tile.lse.rows, BS=tile.lse.columns, HAS_BITS=words is not None, **options(tile.lse),
        )  # fmt: skip
        index_loss_kernel[(chunk.n_pieces, chunk.widest * parts)](
            q, k, lse, index_lse, words, scores.workspace, losses, *scores.tables, scale, chunk.first, width, n_tokens,
            **rows, H=n_heads, HG=n_heads // k.shape[2], D=d_head, BN=tile.loss.columns, BD=padded(d_head),
            HAS_BITS=words is not None, PRECISION=precision(q), **options(tile.loss),
        )  # fmt: skip
        n_programs = chunk.n_pieces * ROW_TILE * together // dq_rows
        index_loss_dq_kernel[(n_programs, triton.cdiv(n_index_heads, together))](
            *index, scores.workspace, dq, dw, *scores.tables, chunk.first,
            **rows, **sizes, HG=together, BR=dq_rows, BN=tile.dq.columns, **options(tile.dq),
        )  # fmt: skip
        index_loss_dk_kernel[(len(key_pieces),)](
            *index, scores.workspace, dk, scores.tables[0], key_pieces, first_pieces, scores.tables[1],
            chunk.first, chunk.first + chunk.n_pieces, row_stride, row_offset,
            **rows, **sizes, BK=tile.dk.rows, **options(tile.dk),
        )  # fmt: skip
    return losses.sum(), dq, dk, dw


@sparse_index_loss.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, words: Tensor | None, q_index: Tensor, k_index: Tensor, weights: Tensor,
      *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dw = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q_index, k_index, weights))
    return lse.new_empty(()), dq, dk, dw


class _Scores:
    """The workspace of scores, and what fills it: all pieces, as many at a time as `workspace_bytes` hold."""

    def __init__(
        self,
        q_index: Tensor,
        k_index: Tensor,
        weights: Tensor,
        bounds: tuple[int, ...],
        tile: Tile,
        dtype: torch.dtype,
        workspace_bytes: int,
        *,
        row_stride: int = 1,
        row_offset: int = 0,
    ) -> None:
        where = (bounds, tile.columns, row_stride, row_offset)
        stored = stored_queries(*where)
        self._inputs = (q_index, k_index, weights)
        self._tile = tile
        self._is_ordered = dtype == torch.int32
        self.n_tiles = stored[-1][2]  # of all pieces
        self.tables = (boundaries_on(where[0], q_index.device), stored_queries_on(*where, q_index.device))
        tile_size = ROW_TILE * tile.columns
        self.chunks = chunks(stored, workspace_bytes // (4 * tile_size))
        self.workspace = q_index.new_empty(most_tiles(self.chunks) * tile_size, dtype=dtype)

    def fill(self, chunk: Chunk) -> None:
        """The scores of a chunk: as integers in their order for an int32 workspace."""
        n_heads, d_index = self._inputs[0].shape[2:]
        index_scores_kernel[(chunk.n_pieces, chunk.widest)](
            *self._inputs, self.workspace, *self.tables, chunk.first, HI=n_heads, DI=d_index,
            BM=ROW_TILE, BN=self._tile.columns, BD=padded(d_index), AS_ORDER=self._is_ordered,
            PRECISION=precision(self._inputs[0]), **options(self._tile),
        )  # fmt: skip


def chosen_tiles(tiles: list[int] | None, q_index: Tensor, element_bytes: int, bounds: tuple[int, ...]) -> IndexTiles:
    """Those a caller gave as numbers, or those of the table."""
    if tiles is not None:
        return IndexTiles.of_numbers(tiles)
    return index_tiles(q_index.shape[3], element_bytes, longest(bounds))


def padded(size: int) -> int:
    """A head size as a product on tensor cores takes it."""
    return max(16, triton.next_power_of_2(size))


def precision(x: Tensor) -> str:
    """tf32 keeps three digits of an fp32 product."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def options(tile: Tile) -> dict[str, int]:
    """Of Triton, for a launch."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def check_index(q_index: Tensor, k_index: Tensor, weights: Tensor) -> None:
    """Refuse what no kernel serves.

    Raises:
        ValueError: dtypes, devices or sizes, with what was found.
    """
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
