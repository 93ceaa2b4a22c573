"""Concatenation packing and micro-batches, checked against a direct reading of the rules."""

import numpy as np
import pytest

from loopline.data_pipeline.batch import Batch, global_batch_sha256
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.packing import IGNORED_LABEL, pack_concatenated
from loopline.data_pipeline.stream import heldout_batches

CASES = {
    "one document fills one sequence": ([5], 5),
    "documents of one token": ([1, 1, 1, 1], 2),
    "one token, then long": ([1, 9, 1], 4),
    "longer than several sequences": ([23, 2], 5),
    "sequences of one token": ([3, 1, 2], 1),
    "cut one token before the end": ([4, 4], 7),
    "a sequence longer than everything": ([2, 3], 64),
}


def make_documents(lengths):
    """Distinct tokens, so that every token tells where it came from."""
    ends = np.cumsum(lengths)
    return np.split(np.arange(ends[-1]) + 10, ends[:-1])


def pack(documents, seq_len, **settings):
    positions = [{"epoch": 0, "window": 0, "document": i} for i in range(len(documents))]
    return list(pack_concatenated(iter(zip(documents, positions)), seq_len, **settings))


@pytest.mark.parametrize(("lengths", "seq_len"), CASES.values(), ids=CASES)
def test_packing_follows_the_rules(lengths, seq_len):
    documents = make_documents(lengths)
    stream = np.concatenate(documents)
    last_tokens = {int(document[-1]) for document in documents}
    first_tokens = {int(document[0]) for document in documents}
    packed = [sequence for sequence, _ in pack(documents, seq_len, pad_id=0)]

    inputs = np.concatenate([sequence.tokens for sequence in packed])
    labels = np.concatenate([sequence.labels for sequence in packed])
    n = len(stream)
    np.testing.assert_array_equal(inputs[:n], stream)  # every token an input, once, in order
    assert len(inputs) - n < seq_len
    assert (inputs[n:] == 0).all()
    assert (labels[n:] == IGNORED_LABEL).all()
    for token, label in zip(stream, labels[:n]):
        assert label == (IGNORED_LABEL if int(token) in last_tokens else token + 1)

    for sequence in packed:
        bounds = sequence.cu_seqlens
        assert bounds.dtype == np.int32
        assert (bounds[0], bounds[-1]) == (0, seq_len)
        assert (np.diff(bounds) > 0).all()
        starts = [i for i, token in enumerate(sequence.tokens) if i == 0 or int(token) in first_tokens]
        if (sequence.tokens == 0).any():
            starts.append(int(np.argmax(sequence.tokens == 0)))
        assert bounds[:-1].tolist() == sorted(set(starts))


@pytest.mark.parametrize(("lengths", "seq_len"), CASES.values(), ids=CASES)
def test_packing_restarts_at_every_yielded_position(lengths, seq_len):
    documents = make_documents(lengths)
    packed = pack(documents, seq_len, pad_id=0)
    for i, (_, position) in enumerate(packed):
        rest = pack(documents[position["document"] :], seq_len, offset=position["offset"], pad_id=0)
        assert len(rest) == len(packed) - i - 1
        for (sequence, _), (expected, _) in zip(rest, packed[i + 1 :]):
            np.testing.assert_array_equal(sequence.tokens, expected.tokens)
            np.testing.assert_array_equal(sequence.labels, expected.labels)
            np.testing.assert_array_equal(sequence.cu_seqlens, expected.cu_seqlens)


def test_an_offset_past_the_document_is_refused():
    with pytest.raises(DataError, match=r"4 tokens into a document of 3"):
        pack(make_documents([3, 3]), 2, offset=4)


def test_micro_batches_lay_sequences_end_to_end():
    sequences = [sequence for sequence, _ in pack(make_documents([3, 1, 9, 7]), 5, pad_id=0)]
    batch = Batch.stack(sequences, range(4))
    halves = batch.micro_batches(2)
    assert [half.tokens.shape for half in halves] == [(1, 10), (1, 10)]
    assert [half.cu_seqlens.tolist() for half in halves] == [[0, 3, 4, 5, 10], [0, 3, 5, 10]]
    assert halves[0].positions.tolist() == [[0, 1, 2, 0, 0, 0, 1, 2, 3, 4]]
    assert halves[0].cu_seqlens.dtype == np.int32
    assert halves[0].tokens.dtype == halves[0].labels.dtype == halves[0].positions.dtype == np.int64
    for size in (1, 2, 4):
        micro_batches = batch.micro_batches(size)
        np.testing.assert_array_equal(np.concatenate([m.tokens[0] for m in micro_batches]), batch.tokens.ravel())
        np.testing.assert_array_equal(np.concatenate([m.labels[0] for m in micro_batches]), batch.labels.ravel())
        assert sum(m.n_valid for m in micro_batches) == batch.n_valid == 16
    with pytest.raises(DataError, match=r"micro_batch_sequences=3 does not divide the 4 sequences"):
        batch.micro_batches(3)


def test_the_batch_hash_sees_every_array_and_needs_every_rank():
    sequences = [sequence for sequence, _ in pack(make_documents([4, 4]), 4)]
    whole = Batch.stack(sequences, [0, 1])
    parts = [Batch.stack(sequences[i : i + 1], [i]) for i in (1, 0)]
    assert global_batch_sha256(parts) == global_batch_sha256([whole])
    assert global_batch_sha256([Batch.stack(sequences[::-1], [0, 1])]) != global_batch_sha256([whole])
    whole.labels[0, 0] = 3
    assert global_batch_sha256(parts) != global_batch_sha256([whole])
    for incomplete in (parts[:1], parts + parts):
        with pytest.raises(DataError, match=r"give the batch of every data-parallel rank"):
            global_batch_sha256(incomplete)


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("seq_len", [1, 64, 10_000])
def test_heldout_batches_use_every_token_once_with_equal_shapes(small, all_documents, seq_len, dp_size):
    batch_sequences = 6
    steps = [
        list(heldout_batches(small, seq_len=seq_len, batch_sequences=batch_sequences, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in steps}) == 1
    shape = (batch_sequences // dp_size, seq_len)
    assert all(batch.tokens.shape == shape for batches in steps for batch in batches)
    documents = all_documents(small, "heldout")
    assert sum(batch.n_valid for batches in steps for batch in batches) == sum(len(doc) - 1 for doc in documents)
    inputs = np.concatenate(
        [
            row
            for rank_batches in zip(*steps)
            for _, row in sorted((i, r) for b in rank_batches for i, r in zip(b.global_index, b.tokens.tolist()))
        ]
    )
    stream = [token for document in documents for token in document]
    assert inputs[: len(stream)].tolist() == stream
    assert len(inputs) - len(stream) < batch_sequences * seq_len


def test_heldout_batches_stop_at_the_maximum_and_refuse_bad_settings(small):
    assert len(list(heldout_batches(small.path, seq_len=64, batch_sequences=2, max_batches=3))) == 3
    for settings, message in [
        ({"seq_len": 0}, r"seq_len=0 must be 1 or more"),
        ({"batch_sequences": 0}, r"batch_sequences=0 must be 1 or more"),
        ({"max_batches": 0}, r"max_batches=0 must be 1 or more"),
        ({"dp_size": 3}, r"batch_sequences=4 must be a multiple of dp_size=3"),
        ({"dp_rank": 1}, r"dp_rank=1 must be from 0 to dp_size - 1 = 0"),
        ({"split": "test"}, r"has no split 'test'"),
    ]:
        with pytest.raises(DataError, match=message):
            heldout_batches(small, **{"seq_len": 8, "batch_sequences": 4, **settings})
