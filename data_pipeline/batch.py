"""What a step of training gets: a batch of packed sequences, cut into micro-batches. Numpy only; no device."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.packing import IGNORED_LABEL, PackedSequence


@dataclass(frozen=True)
class MicroBatch:
    """b sequences laid end to end, as variable-length kernels take them.

    Attributes:
        tokens: [1, b*T], int64.
        labels: [1, b*T], int64, -100 where ignored.
        cu_seqlens: [N+1], int32, 0 to b*T; no segment crosses a sequence.
        positions: [1, b*T], int64, from 0 in every segment.
        n_valid: labels that count.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: np.ndarray
    positions: np.ndarray
    n_valid: int


@dataclass(frozen=True)
class Batch:
    """One data-parallel rank's sequences of one step.

    Attributes:
        tokens: [S, T], int64.
        labels: [S, T], int64, -100 where ignored.
        cu_seqlens: S arrays [N+1], int32, 0 to T.
        global_index: [S], int64, rising: the place of each sequence in the global batch.
        n_padding: tokens that no document gave.
    """

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: tuple[np.ndarray, ...]
    global_index: np.ndarray
    n_padding: int = 0

    @classmethod
    def stack(cls, sequences: Sequence[PackedSequence], global_index: Sequence[int]) -> "Batch":
        """A batch of S >= 1 sequences of one length."""
        return cls(
            tokens=np.stack([sequence.tokens for sequence in sequences]),
            labels=np.stack([sequence.labels for sequence in sequences]),
            cu_seqlens=tuple(sequence.cu_seqlens for sequence in sequences),
            global_index=np.asarray(global_index, np.int64),
            n_padding=sum(sequence.n_padding for sequence in sequences),
        )

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
        starts = range(0, n_sequences, micro_batch_sequences)
        return [self._micro_batch(start, start + micro_batch_sequences) for start in starts]

    def _micro_batch(self, start: int, end: int) -> MicroBatch:
        seq_len = self.tokens.shape[1]
        labels = self.labels[start:end].reshape(1, -1)
        inner = [cu_seqlens[1:] + i * seq_len for i, cu_seqlens in enumerate(self.cu_seqlens[start:end])]
        cu_seqlens = np.concatenate([[0], *inner]).astype(np.int32)
        segment_starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))  # [b*T]
        return MicroBatch(
            tokens=self.tokens[start:end].reshape(1, -1),
            labels=labels,
            cu_seqlens=cu_seqlens,
            positions=(np.arange(labels.size, dtype=np.int64) - segment_starts)[None],
            n_valid=int((labels != IGNORED_LABEL).sum()),
        )


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
        for array in (batch.tokens[row], batch.labels[row], batch.cu_seqlens[row]):
            digest.update(array.tobytes())
    return digest.hexdigest()
