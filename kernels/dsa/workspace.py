"""Where scores lie in a workspace, and which of them are held at once: tables and plans on the host.

A piece of queries has a row of scores for each of its rows, as long as the keys that any of them sees, in whole tiles:
early pieces of a document are short, and a short document beside a long one costs what it has itself.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from loopline.kernels.dsa.blocks import ROW_TILE
from loopline.kernels.tables import kept

MIN_PIECES = 8  # held at once, however long documents are: 512 rows to share among a GPU's processors
# Of a launch over pieces x tiles of the widest: programs beyond a piece's own tiles exit, and that takes time too.
MOST_PROGRAMS = 2**15

Stored = tuple[tuple[int, int, int], ...]  # document, number in it, first tile of its scores; at the end their number


class Chunk(NamedTuple):
    """Pieces `first` to `first` + `n_pieces` of a table, whose scores are held at once.

    Attributes:
        widest: tiles of the longest rows among them.
        n_tiles: of all of them.
    """

    first: int
    n_pieces: int
    widest: int
    n_tiles: int


@functools.lru_cache(maxsize=512)
def stored_queries(cu_seqlens: tuple[int, ...], columns: int, row_stride: int, row_offset: int) -> Stored:
    """Every `row_stride`-th piece of ROW_TILE queries of the row, from number `row_offset` on.

    Args:
        columns: keys of a tile, ROW_TILE rows of which are one.
    """
    pieces = (
        (document, piece, _cover(min((piece + 1) * ROW_TILE, end - start), columns))
        for document, (start, end) in enumerate(itertools.pairwise(cu_seqlens))
        for piece in range(_cover(end - start, ROW_TILE))
    )
    return _placed(itertools.islice(pieces, row_offset, None, row_stride))


@functools.lru_cache(maxsize=512)
def stored_tiles(cu_seqlens: tuple[int, ...], columns: int, tile: int, together: int) -> Stored:
    """All query tiles of `tile` tokens, `together` of a document a piece, a row each: of the keys before the tile."""
    return _placed(
        (document, piece, _cover(tile * (min((piece + 1) * together, n_tiles) - 1), columns))
        for document, n_tiles in enumerate(_cover(b - a, tile) for a, b in itertools.pairwise(cu_seqlens))
        for piece in range(_cover(n_tiles, together))
    )


@kept
def stored_queries_on(cu_seqlens: tuple[int, ...], columns: int, row_stride: int, row_offset: int) -> Stored:
    """`stored_queries`, [NP + 1, 3]."""
    return stored_queries(cu_seqlens, columns, row_stride, row_offset)


@kept
def stored_tiles_on(cu_seqlens: tuple[int, ...], columns: int, tile: int, together: int) -> Stored:
    """`stored_tiles`, [NP + 1, 3]."""
    return stored_tiles(cu_seqlens, columns, tile, together)


@functools.lru_cache(maxsize=512)
def chunks(stored: Stored, room: int) -> tuple[Chunk, ...]:
    """All pieces in order, as many at a time as fit `room` tiles, or `MIN_PIECES`, or one launch should cover."""
    widths = [after[2] - piece[2] for piece, after in itertools.pairwise(stored)]
    found: list[Chunk] = []
    chunk = Chunk(0, 0, 0, 0)
    for width in widths:
        more = Chunk(chunk.first, chunk.n_pieces + 1, max(chunk.widest, width), chunk.n_tiles + width)
        is_full = more.n_tiles > room or more.n_pieces * more.widest > MOST_PROGRAMS
        if is_full and more.n_pieces > MIN_PIECES:
            found.append(chunk)
            more = Chunk(chunk.first + chunk.n_pieces, 1, width, width)
        chunk = more
    return (*found, chunk) if chunk.n_pieces else tuple(found)


def most_tiles(held: tuple[Chunk, ...]) -> int:
    """Tiles that the workspace of these chunks has."""
    return max((chunk.n_tiles for chunk in held), default=0)


def _placed(pieces: Iterator[tuple[int, int, int]]) -> Stored:
    """(document, number, tiles of its rows) -> where each piece begins."""
    found, n_tiles = [], 0
    for document, number, width in pieces:
        found.append((document, number, n_tiles))
        n_tiles += width
    return (*found, (0, 0, n_tiles))


def _cover(length: int, step: int) -> int:
    return -(-length // step)
