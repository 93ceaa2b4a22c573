"""Packing and micro-batches, checked against a direct reading of the rules."""

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from loopline.data_pipeline.batch import Batch, global_batch_sha256
from loopline.data_pipeline.build import build_bundled
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import LaneStream
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.packing import (
    IGNORED_LABEL,
    Place,
    Window,
    fill_sequences,
    pack_concatenated,
    padding_sequence,
    plan_best_fit,
)
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.stream import GlobalBatchStream, heldout_batches

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
    return np.split(np.arange(10, ends[-1] + 10, dtype=np.uint16), ends[:-1])


def pack(documents, seq_len, *, window=1000, **settings):
    """(sequence, documents of earlier windows + place in its own) for windows of so many documents."""
    windows = [Window(0, i, documents[i : i + window]) for i in range(0, len(documents), window)]
    return [
        (sequence, Place(number + document, offset))
        for sequence, (_, number, document, offset) in pack_concatenated(windows, seq_len, **settings)
    ]


@pytest.mark.parametrize("window", [1, 2, 1000])
@pytest.mark.parametrize(("lengths", "seq_len"), CASES.values(), ids=CASES)
def test_packing_follows_the_rules(lengths, seq_len, window):
    documents = make_documents(lengths)
    stream = np.concatenate(documents)
    last_tokens = {int(document[-1]) for document in documents}
    first_tokens = {int(document[0]) for document in documents}
    packed = [sequence for sequence, _ in pack(documents, seq_len, window=window, pad_id=0)]
    batch = Batch.stack(packed, range(len(packed)))
    inputs, labels = batch.tokens.ravel(), batch.labels.ravel()
    n = len(stream)
    np.testing.assert_array_equal(inputs[:n], stream)  # every token an input, once, in order
    assert len(inputs) - n < seq_len
    assert (inputs[n:] == 0).all()
    assert (labels[n:] == IGNORED_LABEL).all()
    for token, label in zip(stream, labels[:n]):
        assert label == (IGNORED_LABEL if int(token) in last_tokens else token + 1)

    for sequence, bounds in zip(packed, batch.cu_seqlens):
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
    for i, (_, place) in enumerate(packed):
        rest = pack(documents, seq_len, start=place, pad_id=0)
        assert len(rest) == len(packed) - i - 1
        if rest:
            found, expected = (
                Batch.stack([each for each, _ in some], range(len(rest))) for some in (rest, packed[i + 1 :])
            )
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_array_equal(found.labels, expected.labels)
            assert found.segment_ends == expected.segment_ends


@pytest.mark.parametrize("start", [Place(0, 4), Place(2, 0)])
def test_a_start_past_the_documents_is_refused(start):
    with pytest.raises(DataError, match=rf"{start.offset} tokens into document {start.document} .*points past"):
        pack(make_documents([3, 3]), 2, start=start)


def test_micro_batches_lay_sequences_end_to_end():
    sequences = [sequence for sequence, _ in pack(make_documents([3, 1, 9, 7]), 5, pad_id=0)]
    batch = Batch.stack(sequences, range(4))
    halves = batch.micro_batches(2)
    assert [half.tokens.shape for half in halves] == [(1, 10), (1, 10)]
    assert [half.cu_seqlens.tolist() for half in halves] == [[0, 3, 4, 5, 10], [0, 3, 5, 10]]
    assert halves[0].positions.tolist() == [[0, 1, 2, 0, 0, 0, 1, 2, 3, 4]]
    assert halves[0].cu_seqlens.dtype == np.int32
    assert halves[0].tokens.dtype == np.uint16  # as stored
    assert halves[0].labels.dtype == halves[0].positions.dtype == np.int32
    for size in (1, 2, 4):
        micro_batches = batch.micro_batches(size)
        np.testing.assert_array_equal(np.concatenate([m.tokens[0] for m in micro_batches]), batch.tokens.ravel())
        np.testing.assert_array_equal(np.concatenate([m.labels[0] for m in micro_batches]), batch.labels.ravel())
        assert sum((m.labels != IGNORED_LABEL).sum() for m in micro_batches) == batch.n_valid == 16
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


def test_best_fit_pads_little_and_cuts_only_what_must_be_cut(tmp_path_factory):
    """The bundled corpus at T = 2048 with a window of all its records; one epoch is every document once."""
    seq_len = 2048
    corpus = Manifest.load(build_bundled("stdlib", tmp_path_factory.mktemp("bundled"), 4096))
    reader = SplitReader(corpus, "train")
    stream = LaneStream(
        reader, seed=0, n_lanes=1, lane=0, seq_len=seq_len, shuffle_records=10**6, packing="best_fit", max_epochs=1
    )
    pieces, n_tokens, n_padding = [], 0, 0
    for sequence, _ in stream:
        n_tokens += seq_len
        n_padding += sequence.n_padding
        bounds = [bound for bound in (0, *sequence.ends) if bound <= seq_len - sequence.n_padding]
        pieces += [sequence.tokens[start:end] for start, end in pairwise(bounds)]
    share = n_padding / n_tokens
    assert 0 < share < 0.01, share
    documents = [document for record in range(reader.n_records) for document in reader.documents(record)]
    whole = Counter(document.tobytes() for document in documents if len(document) <= seq_len)
    found = Counter(piece.tobytes() for piece in pieces)
    assert all(found[document] >= n for document, n in whole.items())
    assert len(pieces) == sum(-(-len(document) // seq_len) for document in documents)
    assert sum(map(len, pieces)) == sum(map(len, documents))


def test_best_fit_and_its_order_never_change(small):
    # Frozen: if these change, no best-fit run resumes exactly.
    assert plan_best_fit([3, 9, 2, 4, 1], 4) == [
        [(1, 0, 4)],
        [(1, 4, 4)],
        [(3, 0, 4)],
        [(0, 0, 3), (1, 8, 1)],
        [(2, 0, 2), (4, 0, 1)],
    ]
    stream = LaneStream(
        SplitReader(small, "train"), seed=0, n_lanes=1, lane=0, seq_len=4096, shuffle_records=1000, packing="best_fit"
    )
    padding = [sequence.n_padding for sequence, _ in islice(stream, 12)]
    assert padding != sorted(padding)  # fullest first would put the longest documents first


def test_a_batch_counts_its_padding():
    documents = make_documents([5, 2])
    sequences = list(fill_sequences(documents, plan_best_fit([5, 2], 4), 4, 0))
    assert [sequence.n_padding for sequence in sequences] == [0, 1]
    assert Batch.stack(sequences, [0, 1]).n_padding.tolist() == [0, 1]
    assert Batch.stack([*sequences, padding_sequence(4, 0, "uint16")], range(3)).n_padding.tolist() == [0, 1, 4]


def test_best_fit_states_that_do_not_fit_are_refused(small):
    settings = {"seed": 1, "seq_len": 64, "n_lanes": 2, "global_batch_sequences": 2, "packing": "best_fit"}
    stream = GlobalBatchStream(small, **settings)
    next(stream)
    states = stream.state_dict()
    assert states[0] == {**states[0], "epoch": 0, "window": 0, "sequence": 1}
    for change in ({"sequence": 10**6}, {"window": 100}):
        resumed = GlobalBatchStream(small, **settings, states={**states, 0: {**states[0], **change}})
        with pytest.raises(DataError, match=r"it points past the lane's data"):
            next(resumed)
    for other in ({"packing": "concat"}, {"seq_len": 128}):
        with pytest.raises(DataError, match=r"data.packing, data.seed, data.lanes or data.shuffle_records changed"):
            GlobalBatchStream(small, **{**settings, **other}, states=states)
    with pytest.raises(DataError, match=r"packing='first_fit' is unknown; use 'concat', 'carry' or 'best_fit'"):
        GlobalBatchStream(small, **{**settings, "packing": "first_fit"})
