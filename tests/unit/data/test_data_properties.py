"""Packing, order, resuming and mixing for whatever documents, settings and stops hypothesis finds."""

import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loopline.data_pipeline.batch import Batch
from loopline.data_pipeline.digest import batch_digest
from loopline.data_pipeline.lane import LaneStream
from loopline.data_pipeline.mixture import choose_source
from loopline.data_pipeline.packing import IGNORED_LABEL, fill_sequences, plan_best_fit
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.stream import GlobalBatchStream

COMMON = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LENGTHS = st.lists(st.integers(1, 70), min_size=0, max_size=60)


def best_fit_by_search(lengths, seq_len):
    """Free tokens of every sequence, by the definition of best-fit decreasing."""
    rooms = []
    pieces = [min(seq_len, n - start) for n in lengths for start in range(0, n, seq_len)]
    for piece in sorted(pieces, reverse=True):
        room = min((room for room in rooms if room >= piece), default=None)
        if room is None:
            room = seq_len
        else:
            rooms.remove(room)
        rooms.append(room - piece)
    return sorted(rooms)


@settings(COMMON, max_examples=150)
@given(LENGTHS, st.integers(1, 40))
@example([1], 1)
@example([40, 41, 39, 1], 40)
def test_best_fit_places_every_token_once_as_the_definition_does(lengths, seq_len):
    plan = plan_best_fit(lengths, seq_len)
    used = Counter((d, t) for pieces in plan for d, offset, length in pieces for t in range(offset, offset + length))
    assert used == Counter((document, t) for document, n in enumerate(lengths) for t in range(n))
    assert all(sum(length for _, _, length in pieces) <= seq_len for pieces in plan)
    n_pieces = Counter(document for pieces in plan for document, _, _ in pieces)
    assert all(n_pieces[document] == -(-n // seq_len) for document, n in enumerate(lengths))
    assert sorted(seq_len - sum(length for _, _, length in pieces) for pieces in plan) == best_fit_by_search(
        lengths, seq_len
    )


@settings(COMMON, max_examples=80)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.integers(1, 40))
def test_filled_sequences_follow_the_packing_rules(lengths, seq_len):
    ends = np.cumsum(lengths)
    documents = np.split(np.arange(10, ends[-1] + 10, dtype=np.uint16), ends[:-1])
    last_tokens = {int(document[-1]) for document in documents}
    plan = plan_best_fit(lengths, seq_len)
    for pieces, sequence in zip(plan, fill_sequences(documents, plan, seq_len, 0), strict=True):
        batch = Batch.stack([sequence], [0])
        [tokens], [labels], [cu_seqlens] = batch.tokens, batch.labels, batch.cu_seqlens
        n = seq_len - sequence.n_padding
        bounds = np.cumsum([0, *(length for _, _, length in pieces)])
        assert cu_seqlens.tolist() == sorted({*bounds.tolist(), seq_len})
        assert cu_seqlens.dtype == np.int32
        for (document, offset, length), start in zip(pieces, bounds):
            expected = documents[document][offset : offset + length]
            np.testing.assert_array_equal(tokens[start : start + length], expected)
        for token, label in zip(tokens[:n], labels[:n]):
            assert label == (IGNORED_LABEL if int(token) in last_tokens else token + 1)
        assert (tokens[n:] == 0).all()
        assert (labels[n:] == IGNORED_LABEL).all()
        assert batch.n_valid == (labels != IGNORED_LABEL).sum()


@settings(COMMON, max_examples=60)
@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=7).filter(any),
    st.integers(1, 4096),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@example([1, 1, 1, 1, 1, 1, 1000], 128, False, None)
@example([1000, 1], 1, False, None)
def test_a_mix_is_within_one_sequence_of_its_weights_at_all_times(weights, seq_len, is_padded, random):
    """Also where sequences hold padding, so that their tokens vary."""
    tokens, total = [0] * len(weights), sum(weights)
    for _ in range(400):
        n = seq_len - (random.randint(0, seq_len // 4) if is_padded else 0)
        source = choose_source(weights, tokens, seq_len)
        assert weights[source] > 0
        tokens[source] += n
        n_given = sum(tokens)
        assert all(abs(t * total - weight * n_given) < seq_len * total for t, weight in zip(tokens, weights))


def hash_steps(manifest, parts, **settings):
    """Digests of the steps of a run in parts (dp_size, workers, n_steps), each resumed from the one before through
    JSON. Workers are killed at a part's end, wherever they read."""
    digests, states = [], None
    for dp_size, workers, n_steps in parts:
        ranks = [
            GlobalBatchStream(manifest, **settings, dp_rank=rank, dp_size=dp_size, workers=workers, states=states)
            for rank in range(dp_size)
        ]
        digests += [batch_digest([next(rank) for rank in ranks]) for _ in range(n_steps)]
        states = json.loads(json.dumps({lane: state for rank in ranks for lane, state in rank.state_dict().items()}))
        for rank in ranks:
            for pid in rank._group.pids if workers else ():
                os.kill(pid, signal.SIGKILL)
            rank.close()
    return digests


@pytest.fixture
def save_numbered(save_documents):
    """Writes documents of given lengths, eos included; apart from eos every token comes once in the corpus."""

    def save(lengths, record_tokens):
        ends = np.cumsum([length - 1 for length in lengths]) + 1
        documents = [range(end - length + 1, end) for length, end in zip(lengths, ends.tolist(), strict=True)]
        return save_documents(documents, record_tokens=record_tokens, vocab_size=60_000)

    return save


CORPORA = {"lengths": st.lists(st.integers(1, 70), min_size=1, max_size=40), "record_tokens": st.integers(1, 90)}


# A stop on several ranks with worker processes costs seconds, so few examples have them.
WORKERS = st.sampled_from([0] * 11 + [1])


@settings(COMMON, max_examples=40)
@given(
    **CORPORA,
    packing=st.sampled_from(["concat", "best_fit"]),
    seq_len=st.sampled_from([1, 17, 64]),
    shuffle_records=st.integers(1, 4),
    n_lanes=st.integers(1, 6),
    per_lane=st.integers(1, 2),
    parts=st.lists(st.tuples(st.integers(0, 3), WORKERS, st.integers(0, 12)), min_size=1, max_size=4),
)
@example([5] * 12, 10, "concat", 17, 2, 6, 1, [(2, 1, 1), (1, 0, 0), (0, 1, 5), (3, 0, 9)])
def test_a_run_in_any_parts_on_any_ranks_is_the_run_in_one(
    save_numbered, lengths, record_tokens, packing, seq_len, shuffle_records, n_lanes, per_lane, parts
):
    manifest = save_numbered(lengths, record_tokens)
    n_lanes = min(n_lanes, manifest.splits["train"].n_records)
    sizes = [dp_size for dp_size in range(1, n_lanes + 1) if n_lanes % dp_size == 0]
    parts = [(sizes[i % len(sizes)], workers, n) for i, workers, n in parts]
    stream = {
        "seed": 3,
        "n_lanes": n_lanes,
        "global_batch_sequences": n_lanes * per_lane,
        "packing": packing,
        "seq_len": seq_len,
        "shuffle_records": shuffle_records,
    }
    whole = hash_steps(manifest, [(1, 0, sum(n for *_, n in parts))], **stream)
    assert hash_steps(manifest, parts, **stream) == whole


@settings(COMMON, max_examples=40)
@given(**CORPORA, seq_len=st.integers(1, 100), n_lanes=st.integers(1, 6), shuffle_records=st.integers(1, 40))
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_has_every_document_once_and_ends(
    save_numbered, all_documents, packing, lengths, record_tokens, seq_len, n_lanes, shuffle_records
):
    manifest = save_numbered(lengths, record_tokens)
    reader = SplitReader(manifest, "train")
    n_lanes = min(n_lanes, reader.n_records)
    sequences = []  # of all lanes, lane after lane, without padding
    for lane in range(n_lanes):
        stream = LaneStream(
            reader,
            seed=1,
            n_lanes=n_lanes,
            lane=lane,
            seq_len=seq_len,
            shuffle_records=shuffle_records,
            packing=packing,
            max_epochs=1,
        )
        sequences += [sequence.tokens[: seq_len - sequence.n_padding].tolist() for sequence, _ in stream]
    expected = all_documents(manifest)
    tokens = [token for sequence in sequences for token in sequence]
    if packing == "concat":
        ends = np.flatnonzero(np.array(tokens) == manifest.eos_id) + 1
        assert sorted(tuple(each.tolist()) for each in np.split(tokens, ends)[:-1]) == sorted(expected)
        assert ends[-1] == len(tokens)
    else:
        assert Counter(tokens) == Counter(token for document in expected for token in document)
        pieces = {tuple(each[i : i + n]) for each in sequences for n in range(1, seq_len + 1) for i in range(len(each))}
        assert all(document in pieces for document in expected if len(document) <= seq_len)
