"""Tile sizes of the attention kernels, by head size and type: a committed table, chosen by what fits registers."""

from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Tile:
    """One kernel's tile.

    Attributes:
        rows: what a program owns: queries, or keys in the gradient of keys and values.
        columns: what it goes over, so many at a time. Multiples of 32 under a bitmask.
        warps, stages: of Triton.
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels."""

    fwd: Tile
    dq: Tile
    dkv: Tile

    def numbers(self) -> list[int]:
        """As a custom op takes them; `Tiles.of_numbers` is the inverse."""
        return [*astuple(self.fwd), *astuple(self.dq), *astuple(self.dkv)]

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> "Tiles":
        return cls(*(Tile(*numbers[i : i + 4]) for i in (0, 4, 8)))


# By the largest head size served. Loads run one tile ahead of their products at two stages, which hides nothing here
# (they are issued after the last product of a tile and waited for before the next), and two tiles at three.
_HALF = {
    64: Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
    96: Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
    192: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 8, 3)),
    256: Tiles(Tile(128, 32, 8, 3), Tile(64, 32, 8, 3), Tile(64, 32, 8, 3)),
}
# Exact fp32 products run without tensor cores and unroll over D in registers.
_FP32 = {
    64: Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    128: Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 32, 16, 1)),
    256: Tiles(Tile(16, 32, 8, 1), Tile(16, 32, 16, 1), Tile(16, 32, 8, 1)),
}


def tiles_for(d_head: int, d_value: int, element_bytes: int, has_bits: bool = False) -> Tiles:
    """Tiles for queries and keys of `d_head` and values of `d_value`, both at most 256, in 2 or 4 bytes a number."""
    table = _HALF if element_bytes == 2 else _FP32
    tiles = table[min(size for size in table if size >= max(d_head, d_value))]
    if not has_bits:
        return tiles
    # Where a tile lies is loaded too, and Triton divides the stages between that load and those of the tile.
    return Tiles(*(replace(tile, stages=2 * tile.stages - 1) for tile in (tiles.fwd, tiles.dq, tiles.dkv)))


def split_head(size: int) -> tuple[int, int]:
    """A head size as two tiles of columns, (n, 0) where one does: the least padding with powers of two from 16 on.

    96 is 64 + 32 and 192 is 128 + 64, a quarter less work than 128 and 256.
    """
    whole = max(16, 1 << (size - 1).bit_length())
    first = whole // 2
    rest = max(16, 1 << (size - first - 1).bit_length())
    return (first, rest) if whole > 16 and rest < first else (whole, 0)
