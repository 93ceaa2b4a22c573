"""Documents into sequences of exactly `seq_len` inputs, a window of documents at a time, in two ways.

Concatenation, `pack_concatenated`:
- every token is an input exactly once, in document order; nothing is dropped between sequences;
- the label of an input is the next token of the same document, looked up past the end of the sequence where the
  document is cut there; the last token of a document (eos) has label -100. So no label crosses a document boundary,
  and every token but a document's first is a label exactly once;
- a document cut at the end of a sequence continues at the start of the next one as a new segment: attention, positions
  and recurrent state begin anew there.

Best fit, `plan_best_fit` and `fill_sequences` (Ding et al., Fewer Truncations, arXiv:2404.10830): a window of documents
goes into few sequences without cutting a document that fits in one; a longer one gives whole sequences and one rest.
What stays free at the end of a sequence is padding. Labels and segments follow the rules above.

Either way a sequence is a list of views of the documents: nothing is copied before `Batch.stack`, which makes inputs
and labels of them.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from loopline.data_pipeline.errors import DataError

IGNORED_LABEL = -100


class Window(NamedTuple):
    """Documents in the order in which they are packed, each [n], n >= 1, of one dtype; the window's place in a lane."""

    epoch: int
    number: int
    documents: list[np.ndarray]


class PackedSequence(NamedTuple):
    """One sequence of T inputs.

    Attributes:
        parts: views, uint16 or uint32, of T + 1 tokens in all: the inputs, and the token after them.
        ends: exclusive ends of the segments, rising to T.
        n_padding: inputs at the end that no document gave.
        is_cut: whether a document goes on after the inputs: then the token there is the last one's label.
        n_before: tokens of the first segment's document that earlier sequences hold; 0 with best fit, where no
            sequence goes on from the one before it.
    """

    parts: list[np.ndarray]
    ends: list[int]
    n_padding: int
    is_cut: bool
    n_before: int = 0

    @property
    def tokens(self) -> np.ndarray:
        """[T], the inputs."""
        return np.concatenate(self.parts)[:-1]


# Tokens [offset, offset + length) of a document of a window, as (document, offset, length).
Piece = tuple[int, int, int]


class Place(NamedTuple):
    """The next token of a window. `offset` may equal the document's length: the next document is then next."""

    document: int
    offset: int


BEGINNING = Place(0, 0)


# A sequence, and where its lane goes on after it: epoch and number of the window, and the place in that, which is a
# `Place`, or with best fit how many of its sequences were taken.
Packed = tuple[PackedSequence, tuple[int, ...]]


def pack_concatenated(
    windows: Iterable[Window], seq_len: int, *, start: Place = BEGINNING, pad_id: int | None = None
) -> Iterator[Packed]:
    """Cuts the run of documents every `seq_len` tokens; see the module docstring for the rules.

    Args:
        seq_len: T >= 1.
        start: the first token that was not used yet, in the first window.
        pad_id: where `windows` end, fill the last sequence with this token as a segment of its own with labels -100;
            None drops it (the training stream never ends).
    Raises:
        DataError: start is past the end of its document, or of the window.
    """
    parts: list[np.ndarray] = []
    ends: list[int] = []
    n_filled = n_before = 0
    for epoch, number, documents in windows:
        _check_start(start, documents)
        first, offset = start
        for index in range(first, len(documents)):
            document = documents[index]
            n = len(document)
            if not n_filled:
                n_before = offset
            while n - offset >= seq_len - n_filled:  # it fills the sequence
                end = offset + seq_len - n_filled
                parts.append(document[offset : end + 1])
                if end == n:
                    parts.append(document[-1:])  # any token: it is no label
                ends.append(seq_len)
                yield PackedSequence(parts, ends, 0, end < n, n_before), (epoch, number, index, end)
                parts, ends, n_filled, offset, n_before = [], [], 0, end, end
            if offset < n:
                parts.append(document[offset:])
                n_filled += n - offset
                ends.append(n_filled)
            offset = 0
        start = BEGINNING
    if n_filled and pad_id is not None:
        sequence = _padded(parts, ends, seq_len, np.full(seq_len + 1, pad_id, parts[0].dtype), n_before)
        yield sequence, (epoch, number, len(documents) - 1, len(documents[-1]))


def _check_start(start: Place, documents: Sequence[np.ndarray]) -> None:
    found = f"{len(documents)} documents"
    if start.document < len(documents):
        found = f"a document of {len(documents[start.document])}"
        if start.offset <= len(documents[start.document]):
            return
    raise DataError(
        f"the saved data position, {start.offset} tokens into document {start.document} of a window, points past the "
        f"lane's data: {found} found. The state is not one this stream wrote. Use an unedited checkpoint, or start "
        "without data state"
    )


def plan_best_fit(lengths: Sequence[int], seq_len: int) -> list[list[Piece]]:
    """Which pieces go into which sequence: best-fit decreasing.

    A document longer than seq_len is cut every seq_len tokens from its start. Each piece goes, longest first, into the
    fullest sequence that still holds it, or into a new one; equal lengths keep the order of `lengths`, equally full
    sequences are taken newest first. So the plan is a pure function of its arguments.

    Args:
        lengths: tokens of each document, >= 1.
        seq_len: T >= 1.
    Returns:
        The pieces of each sequence, at most T tokens in all; every token of every document in exactly one piece.
    """
    sequences = [
        [(document, offset, seq_len)]
        for document, length in enumerate(lengths)
        for offset in range(0, length - seq_len + 1, seq_len)
    ]
    rests = [(document, length - rest, rest) for document, length in enumerate(lengths) if (rest := length % seq_len)]
    rests.sort(key=itemgetter(2), reverse=True)  # stable in reverse too
    rooms: list[int] = []  # the free tokens that open sequences have, rising, each number once
    open_by_room: dict[int, list[list[Piece]]] = defaultdict(list)
    for piece in rests:
        length = piece[2]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room = seq_len
            sequences.append(sequence := [])
        else:
            room = rooms[place]
            sequence = open_by_room[room].pop()
            if not open_by_room[room]:
                del rooms[place]
        sequence.append(piece)
        if room > length:
            if not open_by_room[room - length]:
                insort(rooms, room - length)
            open_by_room[room - length].append(sequence)
    return sequences


def fill_sequences(
    documents: Sequence[np.ndarray], plan: Iterable[Sequence[Piece]], seq_len: int, pad_id: int
) -> Iterator[PackedSequence]:
    """The sequences that hold the pieces of a plan, then padding as a segment of its own with labels -100."""
    padding = np.full(seq_len + 1, pad_id, documents[0].dtype)
    whole = [seq_len]
    new = partial(tuple.__new__, PackedSequence)  # in two thirds of the time of its own constructor
    for pieces in plan:
        index, offset, length = pieces[0]
        document, end = documents[index], offset + length
        if end < len(document):  # cut, so it fills the sequence
            yield new(([document[offset : end + 1]], whole, 0, True, 0))
        elif len(pieces) == 1:
            n_padding = seq_len - length
            ends = [length, seq_len] if n_padding else whole
            yield new(([document[offset:], padding[: n_padding + 1]], ends, n_padding, False, 0))
        else:
            parts = [documents[index][offset : offset + length] for index, offset, length in pieces]
            yield _padded(parts, list(accumulate(map(len, parts))), seq_len, padding)


def padding_sequence(seq_len: int, pad_id: int, dtype: str) -> PackedSequence:
    """A sequence of padding alone: one segment, every label -100."""
    return _padded([], [], seq_len, np.full(seq_len + 1, pad_id, dtype))


def _padded(
    parts: list[np.ndarray], ends: list[int], seq_len: int, padding: np.ndarray, n_before: int = 0
) -> PackedSequence:
    """The sequence of whole parts, with `padding` [T+1] for what they leave, and for the token after it."""
    n_padding = seq_len - ends[-1] if ends else seq_len
    return PackedSequence(
        [*parts, padding[: n_padding + 1]], [*ends, seq_len] if n_padding else ends, n_padding, False, n_before
    )
