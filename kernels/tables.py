"""How a packed row falls into pieces of fixed length, as tables on the device. Built once a row, on the host.

A table is copied to the device when it is first asked for, not at every block and loop; the last few hundred are kept,
more than the rows that are under way at once need. To torch.compile it is a constant of the graph.
"""

import functools
import itertools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

_P = ParamSpec("_P")
_KEPT = 512  # some KB each: rows under way (micro-batches) times kinds of tables


def kept(build: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Build a table once for each set of (hashable) arguments, outside any graph that is being traced."""
    cached = functools.lru_cache(maxsize=_KEPT)(build)

    @torch.compiler.assume_constant_result
    @functools.wraps(build)
    def table(*arguments: _P.args, **options: _P.kwargs) -> Tensor:
        return cached(*arguments, **options)  # type: ignore[arg-type]

    return table


@kept
def boundaries_on(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """cu_seqlens as the int32 tensor GPU kernels want, [N+1]."""
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


@kept
def pieces_on(cu_seqlens: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """The pieces of every document, cut every `length` tokens from its start: the programs of a kernel's grid.

    Args:
        cu_seqlens: N + 1 document boundaries, rising.
        length: tokens of a piece; a document's last one may be shorter.
    Returns:
        [NT, 2], int32: the document of each piece, and its number in that document; in the order of the row.
    """
    pieces = [
        (document, piece)
        for document, (start, end) in enumerate(itertools.pairwise(cu_seqlens))
        for piece in range(-(-(end - start) // length))
    ]
    return torch.tensor(pieces, dtype=torch.int32, device=device)


@kept
def first_pieces_on(cu_seqlens: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """Row of `pieces_on` at which each document begins, and their number at the end: [N+1], int32."""
    counts = [-(-(end - start) // length) for start, end in itertools.pairwise(cu_seqlens)]
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
