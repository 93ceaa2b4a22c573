"""Packing, order, resuming and mixing for whatever documents, settings and stops hypothesis finds."""

import json
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
    """Digests of the steps of a run in parts (dp_size, n_steps), each resumed from the one before through JSON."""
    digests, states = [], None
    for dp_size, n_steps in parts:
        ranks = [
            GlobalBatchStream(manifest, **settings, dp_rank=rank, dp_size=dp_size, states=states)
            for rank in range(dp_size)
        ]
        digests += [batch_digest([next(rank) for rank in ranks]) for _ in range(n_steps)]
        states = json.loads(json.dumps({lane: state for rank in ranks for lane, state in rank.state_dict().items()}))
    return digests


@settings(COMMON, max_examples=25)
@given(
    packing=st.sampled_from(["concat", "best_fit"]),
    seq_len=st.sampled_from([1, 17, 256]),
    shuffle_records=st.integers(1, 4),
    parts=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 12)), min_size=1, max_size=4),
)
def test_a_run_in_any_parts_on_any_ranks_is_the_run_in_one(small, packing, seq_len, shuffle_records, parts):
    stream = {
        "seed": 3,
        "n_lanes": 4,
        "global_batch_sequences": 8,
        "packing": packing,
        "seq_len": seq_len,
        "shuffle_records": shuffle_records,
    }
    whole = hash_steps(small, [(1, sum(n for _, n in parts))], **stream)
    assert hash_steps(small, parts, **stream) == whole


@settings(COMMON, max_examples=25)
@given(seq_len=st.integers(16, 400), n_lanes=st.integers(1, 6), shuffle_records=st.integers(1, 40))
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_an_epoch_has_every_token_once_and_ends(small, packing, seq_len, n_lanes, shuffle_records):
    reader = SplitReader(small, "train")
    found: Counter = Counter()
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
        for sequence, _ in stream:
            found.update(sequence.tokens[: seq_len - sequence.n_padding].tolist())
    documents = [document for record in range(reader.n_records) for document in reader.documents(record)]
    assert found == Counter(np.concatenate(documents).tolist())
