"""What a step of training gets: a batch of packed sequences, cut into micro-batches. Numpy only; no device."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.packing import IGNORED_LABEL, PackedSequence


@dataclass(frozen=True)
class MicroBatch:
    """b sequences laid end to end, as variable-length kernels take them.

    Attributes:
        tokens: [1, b*T], uint16 or uint32 as stored.
        labels: [1, b*T], int32, -100 where ignored.
        cu_seqlens: [N+1], int32, 0 to b*T; no segment crosses a sequence.
        positions: [1, b*T], int32, from 0 in every segment.
        n_before: [b], int64, as in `Batch`.
        n_valid: labels that count.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    positions: np.ndarray
    n_before: np.ndarray
    n_valid: int


@dataclass(frozen=True)
class Batch:
    """One data-parallel rank's sequences of one step.

    Attributes:
        tokens: [S, T], uint16 or uint32 as stored: a fourth of int64 on the way to the device.
        labels: [S, T], int32, -100 where ignored.
        segment_ends: S lists: exclusive ends of a sequence's segments, rising to T.
        global_index: [S], int64, rising: the place of each sequence in the global batch.
        n_before: [S], int64, tokens of the first segment's document that earlier sequences of the lane hold. 0 where a
            sequence begins a document, and with best-fit packing.
        n_padding: tokens that no document gave.
    """

    tokens: np.ndarray
    labels: np.ndarray
    segment_ends: tuple[Sequence[int], ...]
    global_index: np.ndarray
    n_before: np.ndarray
    n_padding: int = 0

    @classmethod
    def stack(cls, sequences: Sequence[PackedSequence], global_index: Sequence[int] | np.ndarray) -> "Batch":
        """A batch of S >= 1 sequences of one length, by the rules of `packing.py`."""
        parts, segment_ends, n_padding, is_cut, n_before = zip(*sequences)
        rows = np.concatenate(list(chain.from_iterable(parts))).reshape(len(sequences), -1)  # [S, T+1]
        labels = rows[:, 1:].astype(np.int32)
        seq_len = labels.shape[1]
        last_inputs = [
            row * seq_len + end - 1
            for row, (ends, goes_on) in enumerate(zip(segment_ends, is_cut))
            for end in (ends[:-1] if goes_on else ends)
        ]
        labels.reshape(-1)[np.array(last_inputs, np.int64)] = IGNORED_LABEL
        for row, n in enumerate(n_padding):
            if n:
                labels[row, -n:] = IGNORED_LABEL
        return cls(
            tokens=rows[:, :-1],
            labels=labels,
            segment_ends=segment_ends,
            global_index=np.asarray(global_index, np.int64),
            n_before=np.array(n_before, np.int64),
            n_padding=sum(n_padding),
        )

    @property
    def cu_seqlens(self) -> list[np.ndarray]:
        """S arrays [N+1], int32, 0 to T: each sequence's boundaries."""
        return [np.array([0, *ends], np.int32) for ends in self.segment_ends]

    @property
    def n_valid(self) -> int:
        """Labels of this rank that count."""
        return int((self.labels != IGNORED_LABEL).sum())

    def micro_batches(self, micro_batch_sequences: int) -> list[MicroBatch]:
        """Cuts the batch, in order, into micro-batches of `micro_batch_sequences` sequences.

        Raises:
            DataError: the number of sequences is not a multiple of it.
        """
        n_sequences = len(self.tokens)
        if micro_batch_sequences < 1 or n_sequences % micro_batch_sequences:
            raise DataError(
                f"micro_batch_sequences={micro_batch_sequences} does not divide the {n_sequences} sequences this rank "
                f"gets per step; use a divisor of {n_sequences}"
            )
        seq_len = self.tokens.shape[1]
        ends = np.array([row * seq_len + end for row, ends in enumerate(self.segment_ends) for end in ends])
        lengths = np.diff(ends, prepend=0)
        positions = np.arange(self.labels.size, dtype=np.int32) - np.repeat((ends - lengths).astype(np.int32), lengths)
        n_valid = (self.labels != IGNORED_LABEL).sum(axis=1).tolist()  # [S]
        micro_batches = []
        for start in range(0, n_sequences, micro_batch_sequences):
            rows = slice(start, start + micro_batch_sequences)
            inner = [row * seq_len + end for row, ends in enumerate(self.segment_ends[rows]) for end in ends]
            micro_batches.append(
                MicroBatch(
                    tokens=self.tokens[rows].reshape(1, -1),
                    labels=self.labels[rows].reshape(1, -1),
                    cu_seqlens=np.array([0, *inner], np.int32),
                    positions=positions[start * seq_len : rows.stop * seq_len][None],
                    n_before=self.n_before[rows],
                    n_valid=sum(n_valid[rows]),
                )
            )
        return micro_batches


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
