"""Tile sizes of the indexer's kernels: a committed table, chosen by what compiles without spills (see README.md)."""

from dataclasses import astuple, dataclass

from loopline.kernels.dsa.blocks import ROW_TILE

LONG = 16384  # tokens of a document from which its rows of scores do not stay in the first level cache


@dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    Attributes:
        rows: what a program owns: queries; (query, head) pairs in the gradient of index queries; keys in that of keys.
        columns: what it goes over, so many at a time: keys, or queries in the gradient of keys.
        warps, stages: of Triton.
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class IndexTiles:
    """Tiles of the six kernels.

    Tiles of the workspace are written and read as a whole: the columns of `loss` and `lse` divide those of `scores`,
    those of `dq` and the rows of `dk` the columns of `loss`; those of `choose` those of `scores`, but where it has one
    row: then it chooses by digits and masks what it reads.
    """

    scores: Tile
    choose: Tile
    lse: Tile
    loss: Tile
    dq: Tile
    dk: Tile

    def numbers(self) -> list[int]:
        """As a custom op takes them; `IndexTiles.of_numbers` is the inverse."""
        return [number for tile in astuple(self) for number in tile]

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> "IndexTiles":
        return cls(*(Tile(*numbers[i : i + 4]) for i in range(0, len(numbers), 4)))


BY_DIGITS = Tile(1, 2048, 4, 1)  # of a choice in rows that are read from the second level cache


def index_tiles(d_index: int, element_bytes: int, longest: int) -> IndexTiles:
    """Tiles for index heads of `d_index`, at most 128, and attention heads of up to 256.

    Args:
        element_bytes: of a number of queries and keys, 2 or 4.
        longest: tokens of the longest document.
    """
    if element_bytes == 4:  # exact fp32 products run without tensor cores, and hold their operands in registers
        wide = Tile(ROW_TILE, 32, 8, 1)
        rows = Tile(8, 32, 2, 1)
        return IndexTiles(wide, rows, rows, wide, Tile(64, 32, 8, 1), Tile(32, ROW_TILE, 8, 1))
    # A warp has a row of 128 columns, so that its counts need no other warp.
    rows = Tile(4, 128, 4, 1)
    return IndexTiles(
        scores=Tile(ROW_TILE, 128, 4, 2),
        choose=rows if longest < LONG else BY_DIGITS,
        lse=rows if longest < LONG else Tile(2, 128, 2, 1),
        loss=Tile(ROW_TILE, 128, 8, 2),
        dq=Tile(128, 64, 8, 2),
        dk=Tile(64, ROW_TILE, 4 if d_index <= 64 else 8, 2),
    )
