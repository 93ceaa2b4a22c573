"""Block sizes, warps and stages of the gather kernels: a committed table, chosen by shapes and never by timing.

GATHER.md says what each row compiles to.
"""

from dataclasses import dataclass

MAX_D_HEAD = 256
LARGE_SHARED_MEMORY = (90, 100, 103)  # capabilities of GPUs with 227 KB a program; elsewhere nothing is copied ahead
MAX_ROWS_BY_WIDTH = 64 * 128  # rows of a program x its wider head size, padded; beyond, registers spill by the hundred


@dataclass(frozen=True)
class GatherTiles:
    """Sizes of one kernel.

    Attributes:
        n_rows: BM, rows of a program: tokens of a tile x heads of a group, padded to a power of two.
        n_keys: BN, list entries gathered at a time.
        n_own: BC, the tile's own tokens, padded.
        warps, stages: of a program. With three stages list entries are copied a block ahead of their keys, and keys
            between products; with five, keys during the products of the block before.
    """

    n_rows: int
    n_keys: int
    n_own: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SumTiles:
    """Of the kernel that adds up a key's rows of the workspace: `n_pairs` rows at a time."""

    n_pairs: int
    warps: int


def power_of_two(n: int, at_least: int = 16) -> int:
    """The next power of two, no less than a product on tensor cores can have."""
    return max(at_least, 1 << (n - 1).bit_length())


def max_rows(width: int) -> int:
    """Tokens of a tile x heads of a group that a program can have: 128, 64 or 32 for head sizes to 64, 128 or 256."""
    return min(128, MAX_ROWS_BY_WIDTH // power_of_two(width))


def forward_tiles(tile: int, n_rows: int, width: int, is_half: bool, capability: int) -> GatherTiles:
    """For the forward kernel.

    Args:
        tile: tokens of a tile.
        n_rows: tokens of a tile x heads of a group, at most `max_rows`.
        width: the larger of the key and value head sizes, padded.
        is_half: bf16 or fp16 inputs; fp32 has no tensor-core product without rounding.
        capability: of the GPU, 90 for 9.0.
    """
    bm = power_of_two(n_rows)
    if not is_half:
        return GatherTiles(bm, 16, power_of_two(tile), warps=8, stages=1)
    # One program an SM copies while it computes; where two fit without that, they do it for each other.
    stages = 3 if bm * width == MAX_ROWS_BY_WIDTH and width == 128 else 5
    return _half_tiles(bm, tile, width, stages, capability)


def backward_tiles(tile: int, n_rows: int, width: int, is_half: bool, capability: int) -> GatherTiles:
    """For the backward walk; arguments as in `forward_tiles`."""
    bm = power_of_two(n_rows)
    if not is_half:
        return GatherTiles(bm, 16, power_of_two(tile), warps=8, stages=1)
    return _half_tiles(bm, tile, width, 5 if width <= 64 else 3, capability)


def _half_tiles(bm: int, tile: int, width: int, stages: int, capability: int) -> GatherTiles:
    stages = stages if capability in LARGE_SHARED_MEMORY else 1
    if bm > 64:
        # Eight warps want 128 keys: with 64 they would compute every score twice.
        return GatherTiles(bm, 128, power_of_two(tile, 128), 8, stages)
    return GatherTiles(bm, 64, power_of_two(tile, 64), 8 if width > 128 else 4, stages)


def sum_tiles() -> SumTiles:
    """16 rows of 2 x 256 bytes in flight a program: two warps hold their fp32 sums in 64 registers a thread."""
    return SumTiles(n_pairs=16, warps=2)
