"""What a step of training gets: a batch of packed sequences, cut into micro-batches. Numpy only; no device."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.packing import IGNORED_LABEL, PackedSequence


@dataclass(frozen=True)
class MicroBatch:
    """b sequences laid end to end, as variable-length kernels take them.

    What goes to a device is `rows`, and what says which labels count: little more than 2 bytes a token of a small
    vocabulary.

    Attributes:
        rows: [b, T+1], uint16 or uint32 as stored: the inputs, and the token after them.
        cu_seqlens: [N+1], int32, 0 to b*T; no segment crosses a sequence.
        n_padding, is_cut, n_before: [b], as in `Batch`.
    """

    rows: np.ndarray
    cu_seqlens: np.ndarray
    n_padding: np.ndarray
    is_cut: np.ndarray
    n_before: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """[1, b*T], as stored."""
        return self.rows[:, :-1].reshape(1, -1)

    @property
    def labels(self) -> np.ndarray:
        """[1, b*T], int32, -100 where ignored."""
        return _labels(self.rows, self.cu_seqlens[1:], self.n_padding, self.is_cut).reshape(1, -1)

    @property
    def positions(self) -> np.ndarray:
        """[1, b*T], int32, from 0 in every segment."""
        starts = np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_seqlens))
        return (np.arange(len(starts), dtype=np.int32) - starts)[None]


@dataclass(frozen=True)
class Batch:
    """One data-parallel rank's sequences of one step.

    Attributes:
        rows: [S, T+1], uint16 or uint32 as stored: the inputs, and the token after them. Labels are the rows from their
            second token on, but for those of padding and of segments' last inputs.
        segment_ends: S lists: exclusive ends of a sequence's segments, rising to T.
        global_index: [S], int64, rising: the place of each sequence in the global batch.
        n_padding: [S], int64: inputs at a sequence's end that no document gave, a segment of their own.
        is_cut: [S], bool: the last segment's document goes on after the sequence, so the last label counts.
        n_before: [S], int64, tokens of the first segment's document that earlier sequences of the lane hold. 0 where a
            sequence begins a document, and with best-fit packing.
    """

    rows: np.ndarray
    segment_ends: tuple[Sequence[int], ...]
    global_index: np.ndarray
    n_padding: np.ndarray
    is_cut: np.ndarray
    n_before: np.ndarray

    @classmethod
    def stack(cls, sequences: Sequence[PackedSequence], global_index: Sequence[int] | np.ndarray) -> "Batch":
        """A batch of S >= 1 sequences of one length, by the rules of `packing.py`."""
        parts, segment_ends, n_padding, is_cut, n_before = zip(*sequences)
        rows = np.concatenate(list(chain.from_iterable(parts))).reshape(len(sequences), -1)  # [S, T+1]
        return cls(
            rows=rows,
            segment_ends=segment_ends,
            global_index=np.asarray(global_index, np.int64),
            n_padding=np.array(n_padding, np.int64),
            is_cut=np.array(is_cut, np.bool_),
            n_before=np.array(n_before, np.int64),
        )

    @property
    def tokens(self) -> np.ndarray:
        """[S, T], as stored: a view."""
        return self.rows[:, :-1]

    @cached_property
    def labels(self) -> np.ndarray:
        """[S, T], int32, -100 where ignored."""
        seq_len = self.rows.shape[1] - 1
        ends = [row * seq_len + end for row, ends in enumerate(self.segment_ends) for end in ends]
        return _labels(self.rows, np.array(ends), self.n_padding, self.is_cut)

    @property
    def cu_seqlens(self) -> list[np.ndarray]:
        """S arrays [N+1], int32, 0 to T: each sequence's boundaries."""
        return [np.array([0, *ends], np.int32) for ends in self.segment_ends]

    @property
    def n_valid(self) -> int:
        """Labels of this rank that count: all but those of padding and of documents' last tokens."""
        n_documents = sum(map(len, self.segment_ends)) - np.count_nonzero(self.n_padding)  # that end, or are cut
        return int(self.tokens.size - self.n_padding.sum() - n_documents + self.is_cut.sum())

    def micro_batches(self, micro_batch_sequences: int) -> list[MicroBatch]:
        """Cuts the batch, in order, into micro-batches of `micro_batch_sequences` sequences.

        Raises:
            DataError: the number of sequences is not a multiple of it.
        """
        n_sequences = len(self.rows)
        if micro_batch_sequences < 1 or n_sequences % micro_batch_sequences:
            raise DataError(
                f"micro_batch_sequences={micro_batch_sequences} does not divide the {n_sequences} sequences this rank "
                f"gets per step; use a divisor of {n_sequences}"
            )
        seq_len = self.rows.shape[1] - 1
        micro_batches = []
        for start in range(0, n_sequences, micro_batch_sequences):
            rows = slice(start, start + micro_batch_sequences)
            inner = [row * seq_len + end for row, ends in enumerate(self.segment_ends[rows]) for end in ends]
            micro_batches.append(
                MicroBatch(
                    rows=self.rows[rows],
                    cu_seqlens=np.array([0, *inner], np.int32),
                    n_padding=self.n_padding[rows],
                    is_cut=self.is_cut[rows],
                    n_before=self.n_before[rows],
                )
            )
        return micro_batches


def _labels(rows: np.ndarray, ends: np.ndarray, n_padding: np.ndarray, is_cut: np.ndarray) -> np.ndarray:
    """[S, T], int32, -100 where ignored; `ends` are those of all segments, laid end to end."""
    labels = rows[:, 1:].astype(np.int32)
    labels.reshape(-1)[ends - 1] = IGNORED_LABEL
    labels[is_cut, -1] = rows[is_cut, -1]
    seq_len = labels.shape[1]
    labels[np.arange(seq_len) >= seq_len - n_padding[:, None]] = IGNORED_LABEL
    return labels


def global_batch_sha256(batches: Sequence[Batch]) -> str:
    """Hash of one step's global batch from its ranks' batches, in any order: equal for every dp size.

    Raises:
        DataError: the batches are not the whole of one global batch.
    """
    rows = [(int(index), batch, row) for batch in batches for row, index in enumerate(batch.global_index)]
    rows.sort(key=lambda item: item[0])
    if [index for index, _, _ in rows] != list(range(len(rows))):
        raise DataError(
            f"found sequences {[index for index, _, _ in rows]} of a global batch; give the batch of every "
            "data-parallel rank of one step exactly once"
        )
    digest = hashlib.sha256()
    for _, batch, row in rows:
        # int64 as batches once held it, so that digests noted then still hold.
        digest.update(batch.tokens[row].astype("<i8").tobytes())
        digest.update(batch.labels[row].astype("<i8").tobytes())
        digest.update(np.array([0, *batch.segment_ends[row]], "<i4").tobytes())
    return digest.hexdigest()
