"""One choice of keys for a tile of neighbouring queries: which keys, and what each query of the tile then sees.

GATHER.md says why and how. What is written out here is plain torch by blocks; tile_launch.py has the Triton kernels.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from loopline.kernels.backends import check_boundaries, unknown
from loopline.kernels.dsa.bitmask import Bitmask, document_starts, n_words, words_of
from loopline.kernels.dsa.blocks import TileSelection
from loopline.kernels.dsa.op import BACKENDS, highest, index_scores
from loopline.kernels.tables import pieces_on

SCORERS = ("past", "own")


@torch.no_grad()
def select_by_tile(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    tile: int,
    cu_seqlens: list[int],
    first_token: int = 0,
    backend: str = "reference",
) -> TileSelection:
    """`op.select` with one choice for a tile of queries: `tile_lists` scored by the past, as op.py takes a selection.

    Arguments, errors and source are those of `tile_lists`. With `first_token`, `visible` is of the queries from it on.
    """
    lists = tile_lists(
        q_index,
        k_index,
        weights,
        top_k=top_k,
        tile=tile,
        cu_seqlens=cu_seqlens,
        scored_by="past",
        first_token=first_token,
        backend=backend,
    )
    if backend == "triton":
        return TileSelection(lists, tile, visible_bits(lists, tile=tile, cu_seqlens=cu_seqlens))
    visible = tile_selection(lists, tile=tile, cu_seqlens=cu_seqlens, first_token=first_token)
    return TileSelection(lists, tile, visible)


def tile_selection(lists: Tensor, *, tile: int, cu_seqlens: list[int], first_token: int = 0) -> Tensor:
    """The keys of each query, its tile's list and its tile's tokens up to itself, as index lists.

    Args:
        lists: [NT, K], from `tile_lists`.
        tile, cu_seqlens, first_token: as there.
    Returns:
        [T - first_token, K + tile], int32: positions in the row, rising, then -1.
    """
    where = places(tile, cu_seqlens, lists.device)
    tokens = torch.arange(first_token, cu_seqlens[-1], device=lists.device)
    own = torch.arange(tile, device=lists.device) + where.starts[tokens, None]  # [T, tile]
    own = own.masked_fill(own > tokens[:, None], -1)
    selection = torch.cat([lists[where.tiles[tokens] - first_token // tile], own.int()], dim=1)
    # Empty slots last: a stable sort keeps the rising order of the rest.
    order = (selection < 0).int().sort(dim=1, stable=True).indices
    return selection.gather(1, order)


def visible_bits(lists: Tensor, *, tile: int, cu_seqlens: list[int]) -> Bitmask:
    """`tile_selection` as bits, a tile's list spread out once and not once a query."""
    where = places(tile, cu_seqlens, lists.device)
    begins, width = document_starts(cu_seqlens, lists.device), n_words(cu_seqlens)
    is_first = where.starts == torch.arange(len(begins), device=lists.device)
    first_local = (where.starts - begins)[is_first]  # [NT]
    words = words_of(lists, begins[is_first], first_local - 1, width)[where.tiles]  # [T, W]
    # The tile's own tokens are a run of bits, in few words.
    start, end = where.starts - begins, torch.arange(1, len(begins) + 1, device=lists.device) - begins
    for i in range((tile - 1) // 32 + 2):
        column = start // 32 + i
        low, high = ((x - 32 * column).clamp(0, 32) for x in (start, end))
        run = torch.where(high > low, (1 << high) - (1 << low), 0)
        run = torch.where(run >= 2**31, run - 2**32, run).int()  # as the word's sign has it
        column = column.clamp_max(width - 1)[:, None]  # past the last word the run is empty
        words.scatter_(1, column, words.gather(1, column) | run[:, None])
    return Bitmask(words)


@torch.no_grad()
def tile_lists(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    tile: int,
    cu_seqlens: list[int],
    scored_by: str,
    first_token: int = 0,
    block_size: int = 128,
    backend: str = "reference",
) -> Tensor:
    """For each tile of queries the `top_k` keys before it, in its document, with the highest scores.

    The score of a key is the highest index score I_ts that the tile's scorers give it; a scorer gives one to keys up to
    itself. The highest, not the mean: a key that one query needs stays even if the others have no use for it. Of equal
    scores the lower position wins, NaN counts as inf.

    Args:
        q_index, k_index, weights: [1, T, HI, DI], [1, T, DI], [1, T, HI], as of `op.select`.
        top_k: >= 1.
        tile: tokens of a tile, counted from the start of its document; the last one of a document may be shorter.
        cu_seqlens: N + 1 document boundaries over T, on the host, from 0 to T, rising.
        scored_by: "past": the last `tile` queries up to the tile's first token, so that no list depends on a token
            after the query it serves, and decoding finds the same lists. "own": the tile's own queries; each
            then sees keys picked by later ones, which a causal model must not be trained with.
        first_token: of a single document, the token from whose tile on lists are wanted (decoding); reference only.
        block_size: queries scored at once by the reference; memory is max(block_size, tile) * HI * T.
        backend: "triton" or "reference".
    Returns:
        [NT, K], int32, K = min(top_k, longest document): positions in the row, rising, then -1 in the empty slots; the
        tiles of all documents in order. No gradient.
    Raises:
        ValueError: shapes disagree, bad cu_seqlens, unknown scored_by, top_k, tile or block_size below 1, a first_token
            outside of a single document, or what no kernel serves.
        BackendError: unknown backend.
    Reference: scores: DeepSeek-V3.2, arXiv:2512.02556, eq. 1.
    """
    _check_lists(q_index, k_index, weights, top_k, tile, block_size, scored_by)
    check_boundaries(cu_seqlens, q_index.shape[0], q_index.shape[1])
    _check_first(first_token, cu_seqlens, backend)
    if backend not in BACKENDS:
        raise unknown("dsa", backend, BACKENDS)
    if backend == "triton":
        from loopline.kernels.dsa.tile_launch import tile_lists_by_kernels

        index, is_past = (q_index, k_index, weights), scored_by == "past"
        return tile_lists_by_kernels(*index, top_k=top_k, tile=tile, cu_seqlens=cu_seqlens, is_past=is_past)
    n_slots = min(top_k, max(end - start for start, end in itertools.pairwise(cu_seqlens)))
    lists = []
    for start, end in itertools.pairwise(cu_seqlens):
        tiles_at_once = max(1, block_size // tile)
        n_tiles = -(-(end - start) // tile)
        for first in range(first_token // tile, n_tiles, tiles_at_once):
            last = min(first + tiles_at_once, n_tiles)
            # Queries from `offset` tokens after the tile's first on are its scorers.
            offset = 1 - tile if scored_by == "past" else 0
            starts = start + tile * torch.arange(first, last)
            scorers = starts[:, None] + offset + torch.arange(tile)  # [tiles, tile]
            keys = torch.arange(start, min(start + (last - 1) * tile, end))
            lists.append(_best(q_index, k_index, weights, starts, scorers, keys, (start, end), n_slots))
    return torch.cat(lists)


def _best(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    starts: Tensor,
    scorers: Tensor,
    keys: Tensor,
    document: tuple[int, int],
    n_slots: int,
) -> Tensor:
    """[tiles] first tokens, [tiles, tile] scorers, [S] keys -> [tiles, n_slots]."""
    starts, scorers, keys = (x.to(q_index.device) for x in (starts, scorers, keys))
    if len(keys) == 0:
        return torch.full((len(starts), n_slots), -1, dtype=torch.int32, device=q_index.device)
    is_scorer = (scorers >= document[0]) & (scorers < document[1])
    rows = scorers.clamp(document[0], document[1] - 1).flatten()
    scores = index_scores(q_index[0, rows], k_index[0, keys], weights[0, rows])  # [tiles * tile, S]
    scores = scores.masked_fill(scores.isnan(), torch.inf).unflatten(0, scorers.shape)
    may_score = is_scorer[..., None] & (keys <= scorers[..., None])
    scores = scores.masked_fill(~may_score, -torch.inf).amax(1)  # [tiles, S]
    return highest(scores, keys < starts[:, None], keys, n_slots)


class Places(NamedTuple):
    """For each token of the row, [T] each: its tile, counted over the row, that tile's first token, its document."""

    tiles: Tensor
    starts: Tensor
    documents: Tensor


def places(tile: int, cu_seqlens: list[int], device: torch.device) -> Places:
    """Of every token of a row whose documents are cut into tiles."""
    pieces = pieces_on(tuple(cu_seqlens), tile, device).long()  # [NT, 2]
    bounds = torch.tensor(cu_seqlens, device=device)
    starts = bounds[pieces[:, 0]] + pieces[:, 1] * tile
    tokens = torch.arange(cu_seqlens[-1], device=device)
    tiles = torch.bucketize(tokens, starts, right=True) - 1
    return Places(tiles, starts[tiles], pieces[tiles, 0])


def _check_lists(
    q_index: Tensor, k_index: Tensor, weights: Tensor, top_k: int, tile: int, block_size: int, scored_by: str
) -> None:
    is_alike = q_index.dim() == 4 and k_index.dim() == 3 and q_index.shape[3] == k_index.shape[2]
    if not is_alike or weights.shape != q_index.shape[:3] or q_index.shape[:2] != k_index.shape[:2]:
        raise ValueError(
            f"q_index {tuple(q_index.shape)}, k_index {tuple(k_index.shape)}, weights {tuple(weights.shape)}: "
            "want [1, T, HI, DI], [1, T, DI], [1, T, HI]"
        )
    for name, value in {"top_k": top_k, "tile": tile, "block_size": block_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if scored_by not in SCORERS:
        raise ValueError(f"scored_by is {scored_by!r}; it must be one of {', '.join(SCORERS)}")


def _check_first(first_token: int, cu_seqlens: list[int], backend: str) -> None:
    if first_token and (backend == "triton" or len(cu_seqlens) != 2 or not 0 < first_token < cu_seqlens[-1]):
        raise ValueError(
            f"first_token is {first_token}, with {len(cu_seqlens) - 1} document(s), {cu_seqlens[-1]} tokens and "
            f"backend {backend!r}: it must be a token of the only document, and is for the reference"
        )
