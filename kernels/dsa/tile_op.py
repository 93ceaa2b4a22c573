"""One choice of keys for a tile of neighbouring queries.

GATHER.md says why and how, visible.py what each query of a tile then sees. What is written out here is plain torch by
blocks; tile_launch.py has the Triton kernels.
"""

import itertools

import torch
from torch import Tensor

from loopline.kernels.backends import check_boundaries, unknown
from loopline.kernels.dsa.op import BACKENDS, highest, index_scores
from loopline.kernels.dsa.visible import TileSelection

SCORERS = ("past", "own")


@torch.compiler.disable
def select_by_tile(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    tile: int,
    cu_seqlens: list[int],
    backend: str = "reference",
) -> TileSelection:
    """`op.select` with one choice for a tile of queries: `tile_lists` scored by the past, as op.py takes a selection.

    Arguments, errors and source are those of `tile_lists`. Not in graphs of torch.compile, which it ends.
    """
    lists = tile_lists(
        q_index, k_index, weights, top_k=top_k, tile=tile, cu_seqlens=cu_seqlens, scored_by="past", backend=backend
    )
    return TileSelection(lists, tile, cu_seqlens, as_bits=backend == "triton")


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
