"""Documents into sequences of exactly `seq_len` inputs, in two ways.

Concatenation, `pack_concatenated`:
- every token is an input exactly once, in document order; nothing is dropped between sequences;
- the label of an input is the next token of the same document, looked up past the end of the sequence where the
  document is cut there; the last token of a document (eos) has label -100. So no label crosses a document boundary,
  and every token but a document's first is a label exactly once;
- a document cut at the end of a sequence continues at the start of the next one as a new segment: attention, positions
  and recurrent state begin anew there.

Best fit, `plan_best_fit` and `fill_sequence` (Ding et al., Fewer Truncations, arXiv:2404.10830): a window of documents
goes into few sequences without cutting a document that fits in one; a longer one gives whole sequences and one rest.
What stays free at the end of a sequence is padding. Labels and segments follow the rules above.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np

from loopline.data_pipeline.errors import DataError

IGNORED_LABEL = -100


class DocumentPosition(TypedDict):
    """Which document of a lane: the epoch, the window in it, the place in the window's shuffled order."""

    epoch: int
    window: int
    document: int


class TokenPosition(DocumentPosition):
    """The next token of a lane. `offset` in the document may equal its length: the next document is then next."""

    offset: int


@dataclass(frozen=True)
class PackedSequence:
    """One sequence.

    Attributes:
        tokens: [T], int64, inputs.
        labels: [T], int64, -100 where ignored.
        cu_seqlens: [N+1], int32, 0 to T, the segments' boundaries.
        n_padding: tokens at the end that no document gave.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    n_padding: int = 0


class Piece(NamedTuple):
    """Tokens [offset, offset + length) of a document of a window."""

    document: int
    offset: int
    length: int


def pack_concatenated(
    documents: Iterator[tuple[np.ndarray, DocumentPosition]],
    seq_len: int,
    *,
    offset: int = 0,
    pad_id: int | None = None,
) -> Iterator[tuple[PackedSequence, TokenPosition]]:
    """Cuts the run of documents every `seq_len` tokens; see the module docstring for the rules.

    Args:
        documents: (tokens [n], its position), n >= 1.
        seq_len: T >= 1.
        offset: tokens of the first document that were used already.
        pad_id: where `documents` ends, fill the last sequence with this token as a segment of its own with labels
            -100; None drops it (the training stream never ends).
    Yields:
        The sequence, and the position of the token after it.
    Raises:
        DataError: offset is past the end of the first document.
    """
    tokens, labels, bounds = _empty_sequence(seq_len)
    for document, position in documents:
        if offset > len(document):
            raise DataError(
                f"the saved data position says {offset} tokens into a document of {len(document)} (at {position}): "
                "the state is not one this stream wrote. Use an unedited checkpoint, or start without data state"
            )
        while offset < len(document):
            n = min(seq_len - bounds[-1], len(document) - offset)
            start, end = bounds[-1], bounds[-1] + n
            tokens[start:end] = document[offset : offset + n]
            targets = document[offset + 1 : offset + n + 1]  # one short where the document ends
            labels[start : start + len(targets)] = targets
            bounds.append(end)
            offset += n
            if end == seq_len:
                yield PackedSequence(tokens, labels, np.array(bounds, np.int32)), {**position, "offset": offset}
                tokens, labels, bounds = _empty_sequence(seq_len)
        offset = 0
    if bounds[-1] > 0 and pad_id is not None:
        n_padding = seq_len - bounds[-1]
        tokens[bounds[-1] :] = pad_id
        bounds.append(seq_len)
        sequence = PackedSequence(tokens, labels, np.array(bounds, np.int32), n_padding)
        yield sequence, {**position, "offset": len(document)}


def plan_best_fit(lengths: Sequence[int], seq_len: int) -> list[list[Piece]]:
    """Which pieces go into which sequence: best-fit decreasing, O(n log(n + seq_len)) for n pieces.

    A document longer than seq_len is cut every seq_len tokens from its start. Each piece goes, longest first, into the
    fullest sequence that still holds it, or into a new one; equal lengths keep the order of `lengths`, equally full
    sequences are taken newest first. So the plan is a pure function of its arguments.

    Args:
        lengths: tokens of each document, >= 1.
        seq_len: T >= 1.
    Returns:
        The pieces of each sequence, at most T tokens in all; every token of every document in exactly one piece.
    """
    pieces = [
        Piece(document, offset, min(seq_len, length - offset))
        for document, length in enumerate(lengths)
        for offset in range(0, length, seq_len)
    ]
    pieces.sort(key=lambda piece: -piece.length)
    sequences: list[list[Piece]] = []
    by_room = _Rooms(seq_len)
    for piece in pieces:
        place = by_room.pop_smallest(piece.length)
        if place is None:
            room, index = seq_len, len(sequences)
            sequences.append([])
        else:
            room, index = place
        sequences[index].append(piece)
        by_room.push(room - piece.length, index)
    return sequences


class _Rooms:
    """Open sequences by their free tokens: a binary tree over 0..seq_len whose nodes know whether any lies below."""

    def __init__(self, seq_len: int) -> None:
        self._first_leaf = 1 << seq_len.bit_length()
        self._has = bytearray(2 * self._first_leaf)
        self._stacks: dict[int, list[int]] = {}

    def push(self, room: int, index: int) -> None:
        self._stacks.setdefault(room, []).append(index)
        node = self._first_leaf + room
        while node and not self._has[node]:
            self._has[node] = True
            node //= 2

    def pop_smallest(self, at_least: int) -> tuple[int, int] | None:
        """The newest of the sequences with the fewest free tokens >= at_least, as (free tokens, index)."""
        node = self._first_leaf + at_least
        while not self._has[node]:
            while node & 1:  # a right child: the next subtree to the right hangs from an ancestor
                node //= 2
            if node == 0:
                return None
            node += 1
        while node < self._first_leaf:
            node = 2 * node if self._has[2 * node] else 2 * node + 1
        room = node - self._first_leaf
        index = self._stacks[room].pop()
        if not self._stacks[room]:
            self._has[node] = False
            while node > 1 and not self._has[node ^ 1]:
                node //= 2
                self._has[node] = False
        return room, index


def fill_sequence(
    documents: Sequence[np.ndarray], pieces: Sequence[Piece], seq_len: int, pad_id: int
) -> PackedSequence:
    """The sequence that holds `pieces` of `documents`, then padding as a segment of its own with labels -100."""
    tokens, labels, bounds = _empty_sequence(seq_len)
    for document, offset, length in pieces:
        start, end = bounds[-1], bounds[-1] + length
        tokens[start:end] = documents[document][offset : offset + length]
        targets = documents[document][offset + 1 : offset + length + 1]  # one short where the document ends
        labels[start : start + len(targets)] = targets
        bounds.append(end)
    n_padding = seq_len - bounds[-1]
    if n_padding:
        tokens[bounds[-1] :] = pad_id
        bounds.append(seq_len)
    return PackedSequence(tokens, labels, np.array(bounds, np.int32), n_padding)


def padding_sequence(seq_len: int, pad_id: int) -> PackedSequence:
    """A sequence of padding alone: one segment, every label -100."""
    tokens, labels, _ = _empty_sequence(seq_len)
    tokens[:] = pad_id
    return PackedSequence(tokens, labels, np.array([0, seq_len], np.int32), n_padding=seq_len)


def _empty_sequence(seq_len: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    return np.empty(seq_len, np.int64), np.full(seq_len, IGNORED_LABEL, np.int64), [0]
