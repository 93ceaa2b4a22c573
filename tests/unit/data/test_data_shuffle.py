"""The order that goes shard by shard: whole epochs, one stream on any layout, and few fetches through a small cache."""

import itertools
import json
import re
import time
from collections import Counter

import faulty_server as faulty
import numpy as np
import pytest

from loopline.data_pipeline.digest import batch_digest, stream_digest
from loopline.data_pipeline.download import RemoteSettings
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import LaneStream, lane_records, shard_order
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.mixture import Mixture, Source
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.stream import GlobalBatchStream
from loopline.data_pipeline.supply import check_supply
from loopline.pretrain import corpus
from loopline.pretrain.cli import main
from loopline.pretrain.config import load_config

STREAM = {
    "seed": 3,
    "seq_len": 64,
    "n_lanes": 4,
    "global_batch_sequences": 8,
    "shuffle_records": 2,
    "shuffle": "shards",
}
MANY_SHARDS = {"record_tokens": 150, "shard_bytes": 20_000}


@pytest.fixture
def many(save_documents):
    """About 12 shards of 10 records of 2 or 3 documents each."""
    manifest = save_documents([[1 + (5 * i + j) % 250 for j in range(40 + i % 60)] for i in range(260)], **MANY_SHARDS)
    counts = [len(shard.records) for shard in manifest.splits["train"].shards]
    assert len(counts) >= 10
    assert set(counts[:-1]) <= {9, 10}
    return manifest


def open_ranks(manifest, dp_size, states=None, **settings):
    return [
        GlobalBatchStream(manifest, **{**STREAM, **settings}, dp_rank=rank, dp_size=dp_size, states=states)
        for rank in range(dp_size)
    ]


def close(ranks):
    for rank in ranks:
        rank.close()


def test_an_epoch_goes_shard_by_shard():
    counts = (5, 1, 7, 3)
    shard_of = np.repeat(range(4), counts)
    orders = [shard_order(counts, seed, epoch) for seed in range(3) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(16))
        assert len(list(itertools.groupby(shard_of[order]))) == len(counts)
    assert len({tuple(order) for order in orders}) == 9
    assert len({tuple(shard_of[order]) for order in orders}) > 3  # the shards are permuted
    assert any(np.diff(order[shard_of[order] == 2]).min() < 0 for order in orders)  # and the records in them


def test_shard_orders_never_change():
    # Frozen values: if these change, no checkpoint resumes exactly.
    assert shard_order((3, 2, 4), 0, 1).tolist() == [3, 4, 0, 2, 1, 6, 7, 8, 5]


@pytest.mark.parametrize("n_lanes", [1, 3, 4, 16])
def test_lanes_have_equal_parts_over_epochs(n_lanes):
    """Dealing goes on over the end of an epoch, so no lane falls behind for having a record more in each."""
    counts = (5, 1, 7, 3)
    parts = [[lane_records(counts, "shards", 1, epoch, lane, n_lanes) for epoch in range(7)] for lane in range(n_lanes)]
    for epoch in range(7):
        assert sorted(np.concatenate([part[epoch] for part in parts])) == list(range(16))
    n_records = [sum(map(len, part)) for part in parts]
    assert max(n_records) - min(n_records) <= 1


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_document_is_read_once_per_epoch(many, all_documents, packing):
    reader = SplitReader(many, "train")
    expected = Counter(all_documents(many))
    settings = {"seed": 3, "n_lanes": 3, "seq_len": 100, "shuffle_records": 2, "shuffle": "shards", "packing": packing}
    found: dict[int, Counter] = {0: Counter(), 1: Counter()}
    for lane in range(3):
        document: list[int] = []
        for sequence, state in LaneStream(reader, **settings, lane=lane, max_epochs=2):
            if packing == "best_fit":
                bounds = itertools.pairwise([0, *sequence.ends])
                pieces = [tuple(sequence.tokens[start:end].tolist()) for start, end in bounds]
                found[state["epoch"]].update(piece for piece in pieces if piece[0] != many.eos_id)
                continue
            for token in sequence.tokens[: 100 - sequence.n_padding].tolist():
                document.append(token)
                if token == many.eos_id:
                    found[state["epoch"]][tuple(document)] += 1
                    document = []
    if packing == "concat":  # a sequence that ends in the second epoch may begin in the first
        found = {0: found[0] + found[1]}
        expected = expected + expected
    assert all(each == expected for each in found.values() if each)


def test_batches_do_not_depend_on_ranks_and_workers(many):
    expected = stream_digest(open_ranks(many, 1), 60)
    assert expected != stream_digest(open_ranks(many, 1, shuffle="records"), 60)
    for dp_size, workers in [(2, 0), (4, 0), (1, 3), (2, 1)]:
        ranks = open_ranks(many, dp_size, workers=workers)
        assert stream_digest(ranks, 60) == expected
        close(ranks)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_resuming_on_other_ranks_is_exact(many, packing):
    ranks = open_ranks(many, 1, packing=packing)
    expected = [batch_digest([next(ranks[0])]) for _ in range(120)]
    assert min(state["epoch"] for state in ranks[0].state_dict().values()) >= 1
    found, states = [], None
    for dp_size, workers, n_steps in [(1, 0, 17), (4, 0, 50), (2, 1, 53)]:
        ranks = open_ranks(many, dp_size, states, packing=packing, workers=workers)
        found += [batch_digest([next(rank) for rank in ranks]) for _ in range(n_steps)]
        states = json.loads(json.dumps({lane: state for rank in ranks for lane, state in rank.state_dict().items()}))
        close(ranks)
    assert found == expected


def test_the_order_is_part_of_the_state(many):
    """Of this order alone: states of the other one are named as before there was a choice."""
    [by_shards], [by_records] = open_ranks(many, 1), open_ranks(many, 1, shuffle="records")
    next(by_shards)
    next(by_records)
    for states, other in ((by_shards.state_dict(), "records"), (by_records.state_dict(), "shards")):
        with pytest.raises(DataError, match=r"data.shuffle, data.packing, .* changed"):
            open_ranks(many, 1, states, shuffle=other)
    with pytest.raises(DataError, match=r"shuffle='shard' is unknown; use 'records' or 'shards'"):
        open_ranks(many, 1, shuffle="shard")


def test_the_name_of_the_default_order_never_changes(save_documents):
    # Frozen: if it changes, runs saved before do not resume.
    manifest = save_documents([[1 + (7 * i + j) % 250 for j in range(i % 23)] for i in range(200)], record_tokens=100)
    stream = GlobalBatchStream(manifest, **{**STREAM, "shuffle": "records"})
    assert stream.state_dict()[0]["stream"] == "32c64b6a489ccdd0"


def test_mixtures_read_their_sources_in_this_order(many, small):
    data = Mixture((Source("many", many, 1), Source("small", small, 1)))
    [whole] = open_ranks(data, 1, packing="best_fit")
    expected = [batch_digest([next(whole)]) for _ in range(30)]
    ranks = open_ranks(data, 2, packing="best_fit", workers=1)
    assert [batch_digest([next(rank) for rank in ranks]) for _ in range(30)] == expected
    close(ranks)
    [other] = open_ranks(data, 1, packing="best_fit", shuffle="records")
    assert batch_digest([next(other)]) != expected[0]


def test_the_end_of_the_data_is_known_in_this_order_too(many):
    """The last step that the lanes have data for, by reading; exact for concatenated documents."""
    data = Mixture((Source("many", many, 1, max_epochs=2),))
    [stream] = open_ranks(data, 1)
    states, steps = stream.state_dict(), []
    with pytest.raises(DataError, match=r"the data is used up"):
        steps.extend(stream)
    n_steps = len(steps)
    settings = {"seed": 3, "seq_len": 64, "sequences_per_lane": 2, "step": 0, "shuffle": "shards"}
    check_supply(data, states, n_steps=n_steps, **settings)
    with pytest.raises(DataError, match=rf"run out in lane \d of 4 at step {n_steps} or soon after"):
        check_supply(data, states, n_steps=n_steps + 1, **settings)


def count_fetches(manifest, tmp_path, shuffle, n_epochs, n_cached):
    """Requests for each training shard while two lanes read some epochs in step, through a cache of a few shards."""
    shards = manifest.splits["train"].shards
    cache_bytes = n_cached * max(shard.n_bytes for shard in shards)
    settings = RemoteSettings(cache_dir=tmp_path / f"cache-{shuffle}-{n_epochs}", cache_bytes=cache_bytes)
    with faulty.serving(manifest.folder) as server:
        reader = SplitReader(Manifest.load(server.url, settings), "train")
        common = {"seed": 3, "n_lanes": 2, "seq_len": 256, "shuffle_records": 2, "shuffle": shuffle}
        lanes = [LaneStream(reader, **common, lane=lane, max_epochs=n_epochs) for lane in range(2)]
        for _ in itertools.zip_longest(*lanes):
            time.sleep(0.012)  # a file system's clock may tick slowly, and the cache goes by it
        return [server.count(shard.name) for shard in shards]


def test_a_small_cache_fetches_every_shard_once_per_epoch(many, tmp_path):
    n_shards = len(many.splits["train"].shards)
    assert count_fetches(many, tmp_path, "shards", 1, n_cached=3) == [1] * n_shards
    over_epochs = count_fetches(many, tmp_path, "shards", 3, n_cached=3)
    assert max(over_epochs) <= 3  # one still cached as the next epoch begins needs no other fetch
    assert sum(over_epochs) > 2 * n_shards
    assert sum(count_fetches(many, tmp_path, "records", 1, n_cached=3)) > 3 * n_shards


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"Raise data.cache_bytes to hold them all, or begin the run with data.shuffle = 'shards'"),
        (["data.shuffle=shards"], None),
        (
            ["data.shuffle=shards", "data.lanes=8"],
            r"too little for the 5 shards of .* that 8 lanes with windows of 4 r",
        ),
    ],
)
def test_the_warning_of_a_small_cache_names_the_option(many, tmp_path, caplog, overrides, message):
    n_bytes = max(shard.n_bytes for shard in many.splits["train"].shards)
    with faulty.serving(many.folder) as server:
        settings = [f"data.manifest={server.url}", f"data.cache_dir={tmp_path / 'cache'}", "data.lanes=2"]
        config = load_config("debug", [*settings, f"data.cache_bytes={3 * n_bytes}", *overrides])
        corpus.open_corpus(config, local_rank=0)
    assert ("data.cache_bytes" in caplog.text) == (message is not None)
    if message:
        assert caplog.records[-1].levelname == "WARNING"
        assert re.search(message, caplog.text)


def test_the_digest_command_takes_the_order(many, capsys):
    command = ["data", "digest", str(many.path), "--batches", "5", "--lanes", "4", "--shuffle"]
    lines = []
    for shuffle in ("records", "shards"):
        assert main([*command, shuffle]) == 0
        lines.append(capsys.readouterr().out.strip())
    settings = {"seed": 0, "seq_len": 128, "n_lanes": 4, "global_batch_sequences": 8}
    assert lines == [stream_digest([GlobalBatchStream(many, **settings, shuffle=s)], 5) for s in ("records", "shards")]
    assert lines[0] != lines[1]
