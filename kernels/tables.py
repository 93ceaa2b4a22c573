"""How a packed row falls into pieces of fixed length, as int32 tables on the device for our kernels.

A table is built on the host and copied to the device when a custom op first asks for it, not at every block and loop;
the last few hundred are kept, more than the rows under way at once need. Ops take the boundaries as a tensor on the
host and look at them where they run, so that a graph of torch.compile serves rows with any boundaries.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loopline.kernels.backends import Boundaries, check_boundaries

Numbers = Sequence[int] | Sequence[tuple[int, ...]]

_KEPT = 512  # some KB each: rows under way (micro-batches) times kinds of tables


def kept(build: Callable[..., Numbers]) -> Callable[..., Tensor]:
    """A table from what builds it: (cu_seqlens, *sizes) -> numbers becomes (cu_seqlens, *sizes, device) -> int32.

    All arguments are hashable.
    """

    @functools.wraps(build)
    @functools.lru_cache(maxsize=_KEPT)
    @torch.inference_mode(False)  # what a decoder asked for first may be saved for backward later
    def table(*arguments: Any) -> Tensor:
        *rest, device = arguments
        numbers = torch.tensor(build(*rest), dtype=torch.int32)
        # Through pinned memory, so that the host does not wait for what the GPU is doing.
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)

    return table


def on_host(cu_seqlens: Boundaries) -> Tensor:
    """Boundaries as our custom ops take them: [N+1], int32, on the CPU."""
    return cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.tensor(cu_seqlens, dtype=torch.int32)


def numbers_of(cu_seqlens: Tensor, n_tokens: int) -> tuple[int, ...]:
    """Boundaries as a custom op's tables take them.

    Raises:
        ValueError: they do not rise from 0 to n_tokens.
    """
    bounds = tuple(cu_seqlens.tolist())
    _check_numbers(bounds, n_tokens)
    return bounds


@functools.lru_cache(maxsize=_KEPT)
def _check_numbers(bounds: tuple[int, ...], n_tokens: int) -> None:
    check_boundaries(list(bounds), 1, n_tokens)


@kept
def boundaries_on(cu_seqlens: tuple[int, ...]) -> Numbers:
    """Document boundaries, [N+1]."""
    return cu_seqlens


@functools.lru_cache(maxsize=_KEPT)
def pieces(cu_seqlens: tuple[int, ...], length: int) -> list[tuple[int, int]]:
    """The pieces of every document, cut every `length` tokens from its start: the programs of a kernel's grid.

    The document of each piece and its number in that document, in the order of the row. A document's last piece may be
    shorter.
    """
    return [
        (document, piece)
        for document, (start, end) in enumerate(itertools.pairwise(cu_seqlens))
        for piece in range(-(-(end - start) // length))
    ]


@kept
def pieces_on(cu_seqlens: tuple[int, ...], length: int) -> Numbers:
    """`pieces`, [NT, 2]."""
    return pieces(cu_seqlens, length)


@kept
def pieces_by_work_on(cu_seqlens: tuple[int, ...], length: int, is_keys: bool) -> Numbers:
    """`pieces` with those first that have most to do in causal attention: late queries, or early keys. The last to
    start end soon."""
    return sorted(pieces(cu_seqlens, length), key=lambda piece: piece[1], reverse=not is_keys)


@kept
def first_pieces_on(cu_seqlens: tuple[int, ...], length: int) -> Numbers:
    """Row of `pieces_on` at which each document begins, and their number at the end: [N+1]."""
    counts = [-(-(end - start) // length) for start, end in itertools.pairwise(cu_seqlens)]
    return [0, *itertools.accumulate(counts)]
