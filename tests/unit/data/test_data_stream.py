"""One seed, one stream: on any number of ranks, and after any stop."""

import json
import os
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from loopline.data_pipeline import shards
from loopline.data_pipeline.batch import global_batch_sha256
from loopline.data_pipeline.digest import stream_digest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import LaneStream, record_order, seeded_permutation
from loopline.data_pipeline.record_arrays import npy_header
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.stream import GlobalBatchStream

N_LANES = 4
SEQ_LEN = 256
STREAM = {"seed": 7, "seq_len": SEQ_LEN, "n_lanes": N_LANES, "global_batch_sequences": 8, "shuffle_records": 2}


def open_ranks(manifest, dp_size, states=None, **settings):
    return [
        GlobalBatchStream(manifest, **{**STREAM, **settings}, dp_rank=rank, dp_size=dp_size, states=states)
        for rank in range(dp_size)
    ]


def step(ranks):
    return global_batch_sha256([next(rank) for rank in ranks])


def union_of_states(ranks):
    """As a checkpoint keeps them: through JSON, so lanes become strings."""
    return json.loads(json.dumps({lane: state for rank in ranks for lane, state in rank.state_dict().items()}))


def read_epochs(manifest, n_epochs, *, n_lanes=N_LANES, shuffle_records=2):
    """Epoch -> documents in the order read, lane by lane. Sequences of one token give every token its own state."""
    epochs = defaultdict(list)
    reader = SplitReader(manifest, "train")
    for lane in range(n_lanes):
        document = []
        stream = LaneStream(reader, seed=7, n_lanes=n_lanes, lane=lane, seq_len=1, shuffle_records=shuffle_records)
        for sequence, state in stream:
            if state["epoch"] == n_epochs:
                break
            document.append(int(sequence.tokens[0]))
            if document[-1] == manifest.eos_id:
                epochs[state["epoch"]].append(tuple(document))
                document = []
    return epochs


@pytest.mark.parametrize("is_even", [True, False])
def test_every_document_is_read_once_per_epoch(small, all_documents, is_even):
    """Uneven: some lanes have more records than others, and so reach their next epoch later."""
    n_records = small.splits["train"].n_records
    n_lanes = next(n for n in range(3, n_records) if (n_records % n == 0) == is_even)
    epochs = read_epochs(small, 2, n_lanes=n_lanes)
    for epoch in range(2):
        assert Counter(epochs[epoch]) == Counter(all_documents(small))
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed(small):
    assert len({step(open_ranks(small, 1, seed=seed)) for seed in range(5)}) == 5


def test_documents_of_different_records_mix_within_a_window(small, all_documents):
    lane = read_epochs(small, 1, n_lanes=1, shuffle_records=1000)[0]
    assert sorted(lane) == sorted(all_documents(small))
    assert sum(a == b for a, b in zip(lane, all_documents(small))) < len(lane) / 4


def test_documents_of_one_record_are_reordered_every_epoch(save_documents):
    manifest = save_documents([[10 + i] for i in range(30)], record_tokens=10**6)
    assert manifest.splits["train"].n_records == 1
    epochs = read_epochs(manifest, 3, n_lanes=1)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])


def test_permutations_never_change():
    # Frozen values: if these change, no checkpoint resumes exactly.
    assert seeded_permutation(8, "records", 0, 0).tolist() == [2, 1, 0, 7, 3, 5, 6, 4]
    assert seeded_permutation(0, "x").tolist() == []
    assert sorted(seeded_permutation(1000, "documents", 3, 1, 2, 0)) == list(range(1000))


def test_global_batches_do_not_depend_on_the_number_of_ranks(small):
    n_steps = 90
    [whole] = runs = open_ranks(small, 1)
    hashes = [step(runs) for _ in range(n_steps)]
    assert len(set(hashes)) == n_steps
    assert min(state["epoch"] for state in whole.state_dict().values()) >= 1  # the comparison covers an epoch's end
    for dp_size in (2, 4):
        ranks = open_ranks(small, dp_size)
        assert [step(ranks) for _ in range(n_steps)] == hashes
        assert union_of_states(ranks) == union_of_states(runs)


@pytest.mark.parametrize("layouts", [(1, 4, 2), (2, 1, 4), (4, 2, 1), (1, 1, 1)])
def test_resuming_anywhere_on_another_number_of_ranks_is_exact(small, layouts):
    n_steps = 45
    ranks = open_ranks(small, 1)
    expected = [step(ranks) for _ in range(n_steps)]
    generator = np.random.default_rng(sum(layouts))
    for _ in range(4):
        stops = [0, *sorted(generator.choice(n_steps + 1, 2)), n_steps]
        found, states = [], None
        for dp_size, start, end in zip(layouts, stops, stops[1:]):
            ranks = open_ranks(small, dp_size, states)
            found += [step(ranks) for _ in range(start, end)]
            states = union_of_states(ranks)
        assert found == expected, stops


def test_state_is_of_the_batches_returned(small):
    [stream] = open_ranks(small, 1)
    before = stream.state_dict()
    first = next(stream)
    assert stream.state_dict() != before
    [again] = open_ranks(small, 1, before)
    np.testing.assert_array_equal(next(again).tokens, first.tokens)
    stream.state_dict()[0]["offset"] = 10**9  # a caller's edit of the answer changes nothing
    assert stream.state_dict() == again.state_dict()


def test_a_run_may_go_on_with_longer_sequences(small):
    """Inputs continue at the very next token of every lane."""
    [reference] = open_ranks(small, 1, seq_len=1)
    tokens = np.stack([next(reference).tokens for _ in range(24)])  # [steps, 8, 1]
    lane_0 = tokens[:, [0, N_LANES], 0].ravel()
    [short] = open_ranks(small, 1, seq_len=4, global_batch_sequences=N_LANES)
    first = next(short).tokens[0]
    [longer] = open_ranks(small, 1, short.state_dict(), seq_len=32, global_batch_sequences=N_LANES)
    np.testing.assert_array_equal(np.concatenate([first, next(longer).tokens[0]]), lane_0[:36])


def test_batches_hold_sequences_in_the_stated_order(small):
    per_lane = []
    for lane in range(N_LANES):
        stream = LaneStream(
            SplitReader(small, "train"), seed=7, n_lanes=N_LANES, lane=lane, seq_len=SEQ_LEN, shuffle_records=2
        )
        per_lane.append([next(stream)[0].tokens for _ in range(2)])
    [whole] = open_ranks(small, 1)
    batch = next(whole)
    assert batch.global_index.tolist() == list(range(8))
    assert (batch.tokens.dtype, batch.labels.dtype, batch.tokens.shape) == (np.uint16, np.int32, (8, SEQ_LEN))
    for index, tokens in enumerate(batch.tokens):
        np.testing.assert_array_equal(tokens, per_lane[index % N_LANES][index // N_LANES])
    assert next(open_ranks(small, 2)[1]).global_index.tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(("packing", "digest"), [("concat", "9d8b2b64be672d22"), ("best_fit", "0a568a167a2e3aaf")])
def test_the_tokens_of_a_run_never_change(save_documents, packing, digest):
    # Frozen values: if these change, a run that resumes reads other tokens, and digests noted before do not hold.
    manifest = save_documents([[1 + (7 * i + j) % 250 for j in range(i % 23)] for i in range(200)], record_tokens=100)
    stream = GlobalBatchStream(manifest, **{**STREAM, "seq_len": 16, "packing": packing})
    assert stream_digest([stream], 40)[:16] == digest


@pytest.mark.parametrize("n_longer", [0, 64])
def test_a_header_that_another_tool_wrote_differently_is_read_as_well(copy, n_longer):
    """Ours are compared with what numpy writes; others are parsed."""
    reader = SplitReader(copy, "train")
    expected = reader.documents(0)
    shard = copy.splits["train"].shards[0]
    at, n_tokens = shard.records[0].tokens_offset, shard.records[0].n_tokens
    with (copy.folder / shard.name).open("r+b") as file:
        file.seek(at)
        assert file.read(128) == npy_header(np.dtype("<u2"), n_tokens)
        other = f"{{'shape': ({n_tokens},), 'fortran_order': False, 'descr': '<u2'}}"
        data = file.read(2 * n_tokens)
        file.seek(at + 8)
        file.write((118 + n_longer).to_bytes(2, "little") + other.ljust(117 + n_longer).encode() + b"\n" + data)
    for found, document in zip(reader.documents(0), expected, strict=True):
        np.testing.assert_array_equal(found, document)


def open_files(folder):
    """Names of the files of a folder that this process has open."""
    targets = (Path(os.path.realpath(entry)) for entry in Path("/proc/self/fd").iterdir())
    return [target.name.removesuffix(" (deleted)") for target in targets if target.parent == folder]


def test_a_reader_keeps_a_bounded_number_of_shards_open(copy, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    names = [shard.name for shard in copy.splits["train"].shards]
    assert len(names) > 2
    reader = SplitReader(copy, "train")
    for record in range(reader.n_records):
        reader.documents(record)
        assert len(open_files(copy.folder)) <= 2
    assert sorted(open_files(copy.folder)) == names[-2:]
    last = reader.documents(reader.n_records - 1)
    (copy.folder / names[-1]).unlink()  # what is open stays readable, whatever becomes of its name
    for found, expected in zip(reader.documents(reader.n_records - 1), last, strict=True):
        np.testing.assert_array_equal(found, expected)
    (copy.folder / names[0]).unlink()
    with pytest.raises(DataError, match=rf"{names[0]} cannot be read: .*No such file"):
        reader.documents(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del reader
    assert caught == []  # Python's own about files that nobody closed
    assert open_files(copy.folder) == []


def test_reading_moves_no_position_that_forked_processes_would_share(small):
    reader = SplitReader(small, "train")
    for record in range(reader.n_records):
        reader.documents(record)
    assert len(reader._open) > 2
    assert {os.lseek(file.fileno(), 0, os.SEEK_CUR) for file in reader._open.values()} == {0}


def test_no_label_crosses_a_document(small):
    [stream] = open_ranks(small, 1)
    for _ in range(30):
        batch = next(stream)
        assert (batch.labels[batch.tokens == small.eos_id] == -100).all()
        assert (batch.labels[batch.tokens != small.eos_id] != -100).all()
        assert (batch.labels[:, :-1] == batch.tokens[:, 1:])[batch.labels[:, :-1] != -100].all()
        for tokens, cu_seqlens in zip(batch.tokens, batch.cu_seqlens):
            after_eos = np.flatnonzero(tokens[:-1] == small.eos_id) + 1
            assert cu_seqlens.tolist() == [0, *after_eos, SEQ_LEN]


@pytest.mark.parametrize("seq_len", [1, 3, 50])
def test_odd_documents_resume_exactly(save_documents, seq_len):
    """Documents of one token (eos alone), and ones longer than several sequences."""
    manifest = save_documents([[], [], list(range(10, 200)), [5], [], list(range(20, 40)), [], [9, 9]])
    ranks = open_ranks(manifest, 1, seq_len=seq_len)
    states, expected = [], []
    for _ in range(25):
        states.append(union_of_states(ranks))
        expected.append(step(ranks))
    for i in range(24):
        resumed = open_ranks(manifest, 2, states[i], seq_len=seq_len)
        assert [step(resumed), step(resumed)] == expected[i : i + 2]
    epochs = read_epochs(manifest, 2)
    for epoch in range(2):
        assert sorted(map(len, epochs[epoch])) == [1, 1, 1, 1, 2, 3, 21, 191]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dp_size": 3}, r"n_lanes=4 must be a multiple of dp_size=3"),
        ({"global_batch_sequences": 6}, r"global_batch_sequences=6 must be a multiple of n_lanes=4"),
        ({"seq_len": 0}, r"seq_len=0 must be 1 or more"),
        ({"n_lanes": 0}, r"n_lanes=0 must be 1 or more"),
        ({"global_batch_sequences": 0}, r"global_batch_sequences=0 must be 1 or more"),
        ({"shuffle_records": 0}, r"shuffle_records=0 must be 1 or more"),
        ({"dp_rank": 2, "dp_size": 2}, r"dp_rank=2 must be from 0 to dp_size - 1 = 1"),
        ({"split": "test"}, r"has no split 'test', only heldout, train"),
        (
            {"n_lanes": 512, "global_batch_sequences": 512},
            r"too few documents for the batch: split 'train' .* has \d+ records for 512 lanes.* Lower data.lanes",
        ),
    ],
)
def test_bad_settings_are_refused_before_any_work(small, settings, message):
    with pytest.raises(DataError, match=message):
        GlobalBatchStream(small, **{**STREAM, **settings})


def test_states_that_do_not_fit_are_refused(small, copy):
    [stream] = open_ranks(small, 1)
    next(stream)
    good = stream.state_dict()

    def edited(**change):
        return {**good, 1: {**good[1], **change}}

    without_lane = {lane: state for lane, state in good.items() if lane != 2}
    without_field = {**good, 1: {name: value for name, value in good[1].items() if name != "offset"}}
    for states, message in [
        (without_lane, r"data state lacks lanes \[2\] of 4"),
        (without_field, r"its fields must be document, epoch, lane, offset, stream, window"),
        (edited(lane=0), r"it was given to lane 1"),
        (edited(offset=-1), r"its positions must be integers >= 0"),
        (edited(offset=1.5), r"its positions must be integers >= 0"),
        (edited(stream="other"), r"it belongs to stream 'other'"),
    ]:
        with pytest.raises(DataError, match=message):
            open_ranks(small, 1, states)
    for change, message in [
        ({"window": 1000}, r"it points past the lane's data"),
        ({"document": 1000}, r"into document 1000 of a window, points past the lane's data: \d+ documents found"),
        ({"offset": 10**6}, r"1000000 tokens into document 0 of .* a document of \d+ found"),
    ]:
        [resumed] = open_ranks(small, 1, edited(**change))
        with pytest.raises(DataError, match=message):
            next(resumed)
    for settings in ({"seed": 8}, {"shuffle_records": 3}, {"n_lanes": 2}, {"split": "heldout", "n_lanes": 1}):
        with pytest.raises(DataError, match=r"data.seed, data.lanes or data.shuffle_records changed"):
            open_ranks(small, 1, good, **settings)
    open_ranks(copy, 1, good)  # the same data in another place is the same stream


def test_a_damaged_record_stops_the_stream_and_leaves_the_last_good_state(copy):
    """The record damaged is the last that lane 0 reads in its first epoch, so batches come before the error."""
    places = [(shard, record) for shard in copy.splits["train"].shards for record in shard.records]
    shard, record = places[record_order(len(places), STREAM["seed"], 0)[::N_LANES][-1]]
    with (copy.folder / shard.name).open("r+b") as file:
        file.seek(record.tokens_offset)
        file.write(bytes(64))
    [stream] = open_ranks(copy, 1)
    states = [stream.state_dict()]

    def read_on():
        for _ in stream:
            states.append(stream.state_dict())

    with pytest.raises(
        DataError, match=rf"{shard.name}, record at byte {record.tokens_offset}, cannot be read: .*magic"
    ):
        read_on()
    assert len(states) > 5
    assert stream.state_dict() == states[-1]


class CountingReader(SplitReader):
    """Knows how many records were read."""

    n_read = 0

    def documents(self, record_idx):
        self.n_read += 1
        return super().documents(record_idx)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_restoring_reads_one_window_however_far_the_run_has_gone(small, packing):
    settings = {"seed": 7, "n_lanes": 2, "lane": 1, "seq_len": 64, "shuffle_records": 3, "packing": packing}
    stream = LaneStream(SplitReader(small, "train"), **settings)
    for i in range(3000):
        _, state = next(stream)
        if i % 100 == 0:
            reader = CountingReader(small, "train")
            resumed = LaneStream(reader, **settings, state=state)
            assert reader.n_read == 0
            next(resumed)
            assert reader.n_read <= 2 * settings["shuffle_records"]  # the state may stand at a window's end
    assert state["epoch"] >= 2
