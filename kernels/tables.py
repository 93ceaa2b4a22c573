"""How a packed row falls into pieces of fixed length, as int32 tables on the device for our kernels.

A table is built on the host and copied to the device when it is first asked for, not at every block and loop; the last
few hundred are kept, more than the rows under way at once need. In a graph of torch.compile it is one operator, which
gives a copy of what is kept.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Numbers = Sequence[int] | Sequence[tuple[int, int]]

_KEPT = 512  # some KB each: rows under way (micro-batches) times kinds of tables
_BUILDERS: dict[str, Callable[..., Numbers]] = {}


def kept(build: Callable[..., Numbers]) -> Callable[..., Tensor]:
    """A table from what builds it: (cu_seqlens, *ints) -> numbers becomes (cu_seqlens, *ints, device) -> int32 tensor.

    All but the device are hashable; `build` has a name of its own.
    """
    kind = build.__name__
    _BUILDERS[kind] = build

    @functools.wraps(build)
    def table(cu_seqlens: tuple[int, ...], *rest: Any) -> Tensor:
        *sizes, device = rest
        if torch.compiler.is_compiling():
            return _row_table(kind, list(cu_seqlens), [int(size) for size in sizes], device)
        return _on_device(kind, cu_seqlens, tuple(sizes), device)

    return table


@functools.lru_cache(maxsize=_KEPT)
def _numbers(kind: str, cu_seqlens: tuple[int, ...], sizes: tuple[int, ...]) -> Numbers:
    return _BUILDERS[kind](cu_seqlens, *sizes)


@functools.lru_cache(maxsize=_KEPT)
@torch.inference_mode(False)  # what a decoder asked for first may be saved for backward later
def _on_device(kind: str, cu_seqlens: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(_numbers(kind, cu_seqlens, sizes), dtype=torch.int32, device=device)


@torch.library.custom_op("loopline::row_table", mutates_args=())
def _row_table(kind: str, cu_seqlens: list[int], sizes: list[int], device: torch.device) -> Tensor:
    return _on_device(kind, tuple(cu_seqlens), tuple(sizes), device).clone()


@_row_table.register_fake
def _(kind: str, cu_seqlens: list[int], sizes: list[int], device: torch.device) -> Tensor:
    numbers = _numbers(kind, tuple(cu_seqlens), tuple(sizes))
    width = () if isinstance(numbers[0], int) else (len(numbers[0]),)
    return torch.empty((len(numbers), *width), dtype=torch.int32, device=device)


@kept
def boundaries_on(cu_seqlens: tuple[int, ...]) -> Numbers:
    """Document boundaries, [N+1]."""
    return cu_seqlens


@kept
def pieces_on(cu_seqlens: tuple[int, ...], length: int) -> Numbers:
    """The pieces of every document, cut every `length` tokens from its start: the programs of a kernel's grid.

    [NT, 2]: the document of each piece, and its number in that document; in the order of the row. A document's last
    piece may be shorter.
    """
    return [
        (document, piece)
        for document, (start, end) in enumerate(itertools.pairwise(cu_seqlens))
        for piece in range(-(-(end - start) // length))
    ]


@kept
def pieces_by_work_on(cu_seqlens: tuple[int, ...], length: int, is_keys: bool) -> Numbers:
    """`pieces_on` with those first that have most to do in causal attention: late queries, or early keys. The last to
    start end soon."""
    pieces = _numbers("pieces_on", cu_seqlens, (length,))
    return sorted(pieces, key=lambda piece: piece[1], reverse=not is_keys)  # type: ignore[index,return-value]


@kept
def first_pieces_on(cu_seqlens: tuple[int, ...], length: int) -> Numbers:
    """Row of `pieces_on` at which each document begins, and their number at the end: [N+1]."""
    counts = [-(-(end - start) // length) for start, end in itertools.pairwise(cu_seqlens)]
    return [0, *itertools.accumulate(counts)]
