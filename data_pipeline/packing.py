"""Concatenation packing: documents into sequences of exactly `seq_len` inputs.

Rules, all visible in `pack_concatenated`:
- every token is an input exactly once, in document order; nothing is dropped between sequences;
- the label of an input is the next token of the same document, looked up past the end of the sequence where the
  document is cut there; the last token of a document (eos) has label -100. So no label crosses a document boundary,
  and every token but a document's first is a label exactly once;
- a document cut at the end of a sequence continues at the start of the next one as a new segment: attention, positions
  and recurrent state begin anew there.

Best-fit packing will stand beside this function and yield the same items.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

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
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray


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
        tokens[bounds[-1] :] = pad_id
        bounds.append(seq_len)
        yield PackedSequence(tokens, labels, np.array(bounds, np.int32)), {**position, "offset": len(document)}


def padding_sequence(seq_len: int, pad_id: int) -> PackedSequence:
    """A sequence of padding alone: one segment, every label -100."""
    tokens, labels, _ = _empty_sequence(seq_len)
    tokens[:] = pad_id
    return PackedSequence(tokens, labels, np.array([0, seq_len], np.int32))


def _empty_sequence(seq_len: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    return np.empty(seq_len, np.int64), np.full(seq_len, IGNORED_LABEL, np.int64), [0]
