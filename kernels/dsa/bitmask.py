"""A selection as bits: what the Triton kernels read, an eighth of a byte for a query and a key."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**24  # bits spread out at once, by the conversions
_BLOCK_WORDS = 2**24  # words counted at once: of a long row they are gigabytes, and counting copies them a few times


@dataclass(frozen=True)
class Bitmask:
    """Which keys each query of a packed row attends to.

    Attributes:
        words: [T, W], int32, W = ceil(longest document / 32): bit s % 32 of word [t, s // 32] says that query t selects
            the key at position s of its document. Bits of keys after t are 0.
    """

    words: Tensor

    @classmethod
    def from_positions(cls, selection: Tensor, cu_seqlens: list[int]) -> "Bitmask":
        """From index lists, those `positions` gives.

        Args:
            selection: [T, K], int32: positions in the row, -1 in empty slots. Keys outside the past are left out.
            cu_seqlens: N + 1 document boundaries over T.
        Raises:
            ValueError: the lists are of another number of queries.
        """
        _check_rows("selection", selection, cu_seqlens)
        starts = document_starts(cu_seqlens, selection.device)
        ages = torch.arange(cu_seqlens[-1], device=selection.device) - starts
        return cls(words_of(selection, starts, ages, n_words(cu_seqlens)))

    def positions(self, cu_seqlens: list[int], n_slots: int) -> Tensor:
        """As index lists, for what gathers keys or is written in torch.

        Args:
            cu_seqlens: N + 1 document boundaries over T.
            n_slots: K; keys of a query beyond the lowest K are left out.
        Returns:
            [T, K], int32: positions in the row, rising, then -1.
        Raises:
            ValueError: the bitmask is of another row, or n_slots below 1.
        """
        self.check(cu_seqlens)
        if n_slots < 1:
            raise ValueError(f"n_slots is {n_slots}; it must be at least 1")
        words = self.words
        starts = document_starts(cu_seqlens, words.device)
        selection = words.new_full((words.shape[0], n_slots + 1), -1)  # one spare slot takes what is not chosen
        columns = torch.arange(32 * words.shape[1], dtype=torch.int32, device=words.device)
        step = max(1, _BLOCK_ELEMENTS // columns.numel())
        for rows in (slice(i, i + step) for i in range(0, words.shape[0], step)):
            chosen = spread(words[rows])
            slot = (chosen.cumsum(-1) - 1).masked_fill(~chosen, n_slots).clamp_max(n_slots)
            selection[rows].scatter_(1, slot, (columns + starts[rows, None]).to(torch.int32))
        return selection[:, :-1].contiguous()

    def counts(self) -> Tensor:
        """Keys of each query: [T], int32."""
        return population(self.words)

    def check(self, cu_seqlens: Sequence[int]) -> None:
        """Refuse a bitmask of another row.

        Raises:
            ValueError: words are not int32 [T, W].
        """
        want = (cu_seqlens[-1], n_words(cu_seqlens))
        if tuple(self.words.shape) != want or self.words.dtype != torch.int32:
            raise ValueError(
                f"bitmask {tuple(self.words.shape)} {self.words.dtype} must be [T, ceil(longest document / 32)] = "
                f"{want} of torch.int32"
            )


def longest(cu_seqlens: Sequence[int]) -> int:
    """Tokens of the longest document."""
    return max(end - start for start, end in itertools.pairwise(cu_seqlens))


def n_words(cu_seqlens: Sequence[int]) -> int:
    """W: words of 32 keys that the longest document takes."""
    return -(-longest(cu_seqlens) // 32)


def document_starts(cu_seqlens: list[int], device: torch.device) -> Tensor:
    """[T], int64: where each token's document begins in the row."""
    bounds = torch.tensor(cu_seqlens, device=device)
    return bounds[:-1].repeat_interleave(bounds.diff(), output_size=cu_seqlens[-1])


def words_of(positions: Tensor, starts: Tensor, last: Tensor, width: int) -> Tensor:
    """Lists of positions as words.

    Args:
        positions: [N, K], int32, in the row; -1 in empty slots.
        starts: [N], where each list's document begins in the row.
        last: [N], the last position that counts, in the document; later ones are left out.
        width: W.
    Returns:
        [N, W], int32.
    """
    n_keys, words = 32 * width, positions.new_empty(positions.shape[0], width)
    step = max(1, _BLOCK_ELEMENTS // n_keys)
    for rows in (slice(i, i + step) for i in range(0, words.shape[0], step)):
        local = positions[rows].long() - starts[rows, None]
        local = local.masked_fill((local < 0) | (local > last[rows, None]), n_keys)  # one spare key takes the rest
        chosen = local.new_zeros(local.shape[0], n_keys + 1, dtype=torch.bool).scatter_(1, local, True)
        words[rows] = gathered(chosen[:, :-1])
    return words


def spread(words: Tensor) -> Tensor:
    """[..., W] words -> [..., 32 W], bool."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> bits) & 1).bool().flatten(-2)


def gathered(chosen: Tensor) -> Tensor:
    """[..., 32 W], bool -> [..., W] words: the inverse of `spread`."""
    bits = torch.arange(32, dtype=torch.int32, device=chosen.device)
    return (chosen.unflatten(-1, (-1, 32)).to(torch.int32) << bits).sum(-1, dtype=torch.int32)


@torch.library.custom_op("loopline::bit_population", mutates_args=())
def population(words: Tensor, other: Tensor | None = None) -> Tensor:
    """Bits set in each row of words, or in both of two: [T, W] -> [T], int32. An op, for graphs do not know W.

    Raises:
        ValueError: the two are of different rows.
    """
    if other is not None and words.shape != other.shape:
        raise ValueError(f"bitmasks are {tuple(words.shape)} and {tuple(other.shape)}; they must be of one row")
    step = max(1, _BLOCK_WORDS // words.shape[1])
    blocks = (slice(i, i + step) for i in range(0, words.shape[0], step))
    return torch.cat([_population(words[rows] if other is None else words[rows] & other[rows]) for rows in blocks])


@population.register_fake
def _(words: Tensor, other: Tensor | None = None) -> Tensor:
    return words.new_empty(words.shape[0])


def _population(words: Tensor) -> Tensor:
    # Sums of neighbouring 1, 2, 4, .. bits. A shift of a negative word brings in ones, which the masks take off.
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).sum(-1, dtype=torch.int32)


def _check_rows(name: str, selection: Tensor, cu_seqlens: list[int]) -> None:
    if selection.dim() != 2 or selection.shape[0] != cu_seqlens[-1] or selection.dtype != torch.int32:
        raise ValueError(
            f"{name} {tuple(selection.shape)} {selection.dtype} must be [T, K] of torch.int32 with T = "
            f"{cu_seqlens[-1]}, the tokens of the row"
        )
