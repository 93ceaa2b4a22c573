"""The order for consumers that hand a recurrent state on: each place of a batch goes on where it ended."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopline.data_pipeline.digest import batch_digest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import LaneStream
from loopline.data_pipeline.mixture import Mixture, Source
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.stream import GlobalBatchStream
from loopline.pretrain.cli import main
from loopline.pretrain.config import load_config
from loopline.pretrain.errors import ConfigError

N_SLOTS = 4
STREAM = {"seed": 7, "n_lanes": N_SLOTS, "global_batch_sequences": N_SLOTS, "packing": "carry"}


class Slot:
    """A consumer of one place of the batch: it knows the document it is in by what it read, as a state would."""

    def __init__(self):
        self.document = []
        self.documents = []

    def read(self, tokens, cu_seqlens, n_before):
        assert n_before == len(self.document)  # 0: the state begins anew
        for start, end in pairwise(cu_seqlens):
            if start:  # only a sequence's first segment may go on
                assert self.document == []
            self.document += tokens[start:end].tolist()
            if self.document[-1] == 0:
                self.documents.append(tuple(self.document))
                self.document = []


def follow(manifest, parts, **settings):
    """Slots, after a run in parts (dp_size, workers, n_steps), each resumed from the one before through JSON."""
    slots, states = [Slot() for _ in range(N_SLOTS)], None
    for dp_size, workers, n_steps in parts:
        common = {**STREAM, **settings, "dp_size": dp_size, "workers": workers, "states": states}
        ranks = [GlobalBatchStream(manifest, **common, dp_rank=rank) for rank in range(dp_size)]
        for _ in range(n_steps):
            for rank in ranks:
                batch = next(rank)
                assert (batch.n_before.shape, batch.n_before.dtype) == ((N_SLOTS // dp_size,), np.int64)
                for row, slot in enumerate(batch.global_index):
                    slots[slot].read(batch.tokens[row], batch.cu_seqlens[row], batch.n_before[row])
        states = json.loads(json.dumps({lane: state for rank in ranks for lane, state in rank.state_dict().items()}))
        for rank in ranks:
            rank.close()
    return slots, states


def lane_documents(manifest, lane, n_documents, **settings):
    """The first documents of a lane in the order in which it reads them, by its windows."""
    stream = LaneStream(SplitReader(manifest, "train"), seed=7, n_lanes=N_SLOTS, lane=lane, seq_len=1, **settings)
    documents = []
    for window in stream._iter_windows():
        documents += [tuple(document.tolist()) for document in window.documents]
        if len(documents) >= n_documents:
            return documents[:n_documents]
    raise AssertionError("a stream without max_epochs ended")


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq_len=st.sampled_from([1, 7, 64, 1000]),
    shuffle=st.sampled_from(["records", "shards"]),
    parts=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.just(0), st.integers(0, 40)), min_size=1, max_size=4),
)
def test_a_slot_gives_the_documents_of_its_lane_in_order(small, seq_len, shuffle, parts):
    slots, _ = follow(small, parts, seq_len=seq_len, shuffle=shuffle)
    for lane, slot in enumerate(slots):
        assert slot.documents == lane_documents(small, lane, len(slot.documents), shuffle=shuffle)


def test_slots_give_every_document_over_epochs_and_a_stop(small, all_documents):
    slots, states = follow(small, [(1, 0, 91), (4, 0, 80), (2, 1, 89)], seq_len=512)
    assert min(state["epoch"] for state in states.values()) >= 2
    read = Counter(document for slot in slots for document in slot.documents)
    assert all(read[document] >= 2 * n for document, n in Counter(all_documents(small)).items())
    for lane, slot in enumerate(slots):
        assert slot.documents == lane_documents(small, lane, len(slot.documents))


def test_documents_that_end_with_a_sequence_carry_nothing(save_documents):
    """Also where the run stops there: the state then stands at the end of a document."""
    manifest = save_documents([[10 + i] * (8 * (1 + i % 3) - 1) for i in range(16)])
    for n_steps in range(1, 8):
        slots, _ = follow(manifest, [(1, 0, n_steps), (2, 0, 20)], seq_len=8)
        assert all(len(slot.documents) > 5 for slot in slots)
    stream = GlobalBatchStream(manifest, **STREAM, seq_len=8)
    assert sorted({int(n) for _ in range(20) for n in next(stream).n_before}) == [0, 8, 16]


def test_tokens_labels_and_states_are_those_of_concatenation(small):
    carry, concat = (
        GlobalBatchStream(small, **{**STREAM, "packing": packing}, seq_len=100) for packing in ("carry", "concat")
    )
    for _ in range(50):
        first, second = next(carry), next(concat)
        assert batch_digest([first]) == batch_digest([second])
        np.testing.assert_array_equal(first.n_before, second.n_before)
        assert carry.state_dict() == concat.state_dict()


def test_micro_batches_have_it_too(small):
    stream = GlobalBatchStream(small, **STREAM, seq_len=100)
    next(stream)
    batch = next(stream)
    assert batch.n_before.any()
    micro_batches = batch.micro_batches(2)
    assert [micro.n_before.tolist() for micro in micro_batches] == batch.n_before.reshape(2, 2).tolist()


def test_best_fit_carries_nothing(small):
    stream = GlobalBatchStream(small, **{**STREAM, "packing": "best_fit"}, seq_len=100)
    assert not any(next(stream).n_before.any() for _ in range(30))


def test_a_mixture_of_one_source_carries(small, save_documents):
    data = Mixture((Source("small", small),))
    mixed, alone = GlobalBatchStream(data, **STREAM, seq_len=64), GlobalBatchStream(small, **STREAM, seq_len=64)
    for _ in range(30):
        np.testing.assert_array_equal(next(mixed).n_before, next(alone).n_before)
    other = save_documents([[5 + i % 50] * (3 + i) for i in range(40)])
    two = Mixture((Source("small", small, 1), Source("other", other, 0)))
    with pytest.raises(DataError, match=r"packing='carry' with data.sources small, other: .* give one source, or set"):
        GlobalBatchStream(two, **STREAM, seq_len=64)


@pytest.mark.parametrize(("n_lanes", "n_sequences"), [(2, 4), (1, 2)])
def test_a_lane_of_several_places_is_refused(small, n_lanes, n_sequences):
    rule = f"packing='carry' with n_lanes={n_lanes} and global_batch_sequences={n_sequences}: .* set data.lanes = "
    with pytest.raises(DataError, match=rule + str(n_sequences)):
        GlobalBatchStream(small, **{**STREAM, "n_lanes": n_lanes, "global_batch_sequences": n_sequences}, seq_len=64)


def test_recipes_that_cannot_carry_are_refused():
    config = load_config("debug", ["data.packing=carry", "data.lanes=4", "train.global_batch_sequences=8"])
    with pytest.raises(ConfigError, match=r"data.packing = 'carry' with data.lanes = 4 and .* = 8: .* data.lanes = 8"):
        config.validate_for(1)
    load_config("debug", ["data.packing=carry", "data.lanes=8", "train.global_batch_sequences=8"]).validate_for(1)
    sources = "data.sources=[{name='a', manifest='x'}, {name='b', manifest='y'}]"
    with pytest.raises(ConfigError, match=r"data.packing = 'carry' with data.sources \(a, b\): .* keep one source"):
        load_config("debug", ["data.manifest=''", "data.packing=carry", sources])


def test_the_digest_command_takes_it(small, capsys):
    command = ["data", "digest", str(small.path), "--packing", "carry", "--batches", "3"]
    assert main([*command, "--lanes", "4", "--global-batch-sequences", "8"]) == 2
    assert "set data.lanes = 8" in capsys.readouterr().err
    assert main([*command, "--lanes", "8", "--global-batch-sequences", "8"]) == 0
