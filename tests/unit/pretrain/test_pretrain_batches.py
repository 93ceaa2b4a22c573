"""Rows reach the device widened and unchanged, with a draw of their own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopline.data_pipeline.batch import Batch
from loopline.data_pipeline.packing import (
    PackedSequence,
    Window,
    fill_sequences,
    pack_concatenated,
    padding_sequence,
    plan_best_fit,
)
from loopline.pretrain.batches import to_device

SEQ_LEN = 6


def batch_of(first_token: int, dtype: type) -> Batch:
    """Two sequences: two documents of three, then one cut at its sixth token."""
    documents = np.arange(first_token, first_token + 13).astype(dtype)
    sequences = [
        PackedSequence([documents[:3], documents[3:6], documents[:1]], [3, 6], 0, is_cut=False),
        PackedSequence([documents[6:]], [6], 0, is_cut=True),
    ]
    return Batch.stack(sequences, [0, 1])


@pytest.mark.parametrize(("dtype", "first"), [(np.uint16, 2**15 - 3), (np.uint32, 2**17)])
def test_rows_are_widened_without_change(dtype: type, first: int) -> None:
    (row,) = to_device(batch_of(first, dtype), 2, torch.device("cpu"), n_loops=1)
    assert row.tokens.dtype == row.labels.dtype == row.row.packing.positions.dtype == torch.int64
    assert row.tokens.tolist() == [list(range(first, first + 12))]
    ends = [2, 5]
    assert row.labels.tolist() == [[-100 if i in ends else first + i + 1 for i in range(12)]]
    assert row.row.packing.cu_seqlens == [0, 3, 6, 12]
    assert row.row.packing.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 16), st.booleans())
def test_the_device_makes_the_labels_the_host_makes(lengths: list[int], seq_len: int, is_best_fit: bool) -> None:
    ends = np.cumsum(lengths)
    documents = np.split(np.arange(1, ends[-1] + 1, dtype=np.uint16), ends[:-1])
    if is_best_fit:
        sequences = list(fill_sequences(documents, plan_best_fit(lengths, seq_len), seq_len, 0))
    else:
        sequences = [sequence for sequence, _ in pack_concatenated([Window(0, 0, documents)], seq_len, pad_id=0)]
    sequences.append(padding_sequence(seq_len, 0, "uint16"))
    batch = Batch.stack(sequences, range(len(sequences)))
    for size in (1, len(sequences)):
        rows = to_device(batch, size, torch.device("cpu"), n_loops=1)
        micro_batches = batch.micro_batches(size)
        for row, micro in zip(rows, micro_batches, strict=True):
            assert row.labels.tolist() == micro.labels.tolist()
            assert row.tokens.tolist() == micro.tokens.tolist()
            assert row.row.packing.positions.tolist() == micro.positions.tolist()
        assert torch.equal(torch.cat([row.labels for row in rows], 1), torch.from_numpy(batch.labels).view(1, -1))


def test_a_row_draws_by_its_tokens() -> None:
    def draws(first_token: int) -> list[int]:
        rows = to_device(batch_of(first_token, np.uint16), 1, torch.device("cpu"), n_loops=1)
        return [row.row.draw for row in rows]

    assert draws(5) == draws(5)
    assert len({*draws(5), *draws(6)}) == 4
