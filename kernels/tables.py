"""How a packed row falls into pieces of fixed length, as tables on the device. Built once a row, on the host."""

import functools
import itertools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=16)  # copied to the device once a row, not at every block and loop
def boundaries_on(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """cu_seqlens as the int32 tensor GPU kernels want, [N+1]."""
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)
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


@functools.lru_cache(maxsize=16)
def first_pieces_on(cu_seqlens: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """Row of `pieces_on` at which each document begins, and their number at the end: [N+1], int32."""
    counts = [-(-(end - start) // length) for start, end in itertools.pairwise(cu_seqlens)]
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
