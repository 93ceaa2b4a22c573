"""Workers change nothing but time, and end when their parent does, however it ends."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from loopline.data_pipeline.digest import batch_digest, stream_digest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import record_order
from loopline.data_pipeline.mixture import Mixture, Source
from loopline.data_pipeline.prefetch import LaneSettings, PrefetchedLanes
from loopline.data_pipeline.stream import GlobalBatchStream
from loopline.pretrain.cli import main

STREAM = {"seed": 7, "seq_len": 128, "n_lanes": 4, "global_batch_sequences": 8, "shuffle_records": 2}


@pytest.fixture
def open_stream():
    streams = []

    def open_one(data, **settings):
        streams.append(GlobalBatchStream(data, **{**STREAM, **settings}))
        return streams[-1]

    yield open_one
    for stream in streams:
        stream.close()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, timeout_s=20):
    end = time.monotonic() + timeout_s
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def test_any_number_of_workers_gives_the_same_batches_and_states(small, open_stream):
    plain = open_stream(small, seq_len=256)
    expected = [(batch_digest([next(plain)]), plain.state_dict(), plain.epoch) for _ in range(120)]
    assert expected[-1][2] > 0
    states = None
    for workers, start, end in [(1, 0, 40), (3, 40, 90), (9, 90, 120)]:  # each resumes from the one before
        stream = open_stream(small, seq_len=256, workers=workers, states=states)
        for i in range(start, end):
            assert (batch_digest([next(stream)]), stream.state_dict(), stream.epoch) == expected[i]
        states = stream.state_dict()
        stream.close()


def test_workers_serve_mixtures_and_best_fit(small, save_documents, open_stream):
    other = save_documents([[5 + i % 50] * (3 + i) for i in range(40)])
    data = Mixture((Source("small", small, 2), Source("other", other, 1, max_epochs=1)))
    settings = {"packing": "best_fit", "seq_len": 64}
    plain, ahead = open_stream(data, **settings), open_stream(data, workers=2, **settings)
    for _ in range(20):
        first, second = next(plain), next(ahead)
        assert batch_digest([first]) == batch_digest([second])
        assert plain.figures(first) == ahead.figures(second)
    assert plain.state_dict() == ahead.state_dict()


def test_a_killed_worker_is_an_error_and_no_hang(small, open_stream):
    stream = open_stream(small, workers=2)
    next(stream)
    pids = stream._group.pids
    os.kill(pids[1], signal.SIGKILL)
    started = time.monotonic()
    states = [stream.state_dict()]

    def read_on():
        for _ in stream:
            states.append(stream.state_dict())

    with pytest.raises(DataError, match=rf"data worker {pids[1]} .lanes \[1, 3\]. ended .*SIGKILL.* Restart the run"):
        read_on()
    assert time.monotonic() - started < 20
    assert stream.state_dict() == states[-1]
    assert wait_until_gone(pids)
    with pytest.raises(DataError, match=r"ended"):
        next(stream)


def test_a_worker_that_hangs_is_an_error_after_the_timeout(small):
    settings = LaneSettings(small, "train", 7, 128, 4, 2, 2, "records", "concat", 0)
    lanes = PrefetchedLanes(settings, range(4), None, n_workers=1, timeout_s=5.0)

    def read_on():
        while True:
            lanes.take()
            os.kill(lanes.pids[0], signal.SIGSTOP)

    with pytest.raises(DataError, match=r"data worker \d+ .lanes \[0, 1, 2, 3\]. gave nothing for 5 s"):
        read_on()
    assert lanes.pids == []


def test_a_damaged_record_gives_the_batches_before_it_and_its_own_message(copy, open_stream):
    places = [(shard, record) for shard in copy.splits["train"].shards for record in shard.records]
    shard, record = places[record_order(len(places), STREAM["seed"], 0)[:: STREAM["n_lanes"]][-1]]
    with (copy.folder / shard.name).open("r+b") as file:
        file.seek(record.tokens_offset)
        file.write(bytes(64))
    digests: dict[int, list[str]] = {0: [], 2: []}
    for workers, found in digests.items():
        stream = open_stream(copy, workers=workers)
        with pytest.raises(DataError, match=rf"{shard.name}, record at byte {record.tokens_offset}, cannot be read"):
            found.extend(batch_digest([batch]) for batch in stream)
    assert digests[0] == digests[2]
    assert len(digests[0]) > 5


SCRIPT = """
import os, sys, time
from loopline.data_pipeline.stream import GlobalBatchStream

def run():
    stream = GlobalBatchStream(
        sys.argv[1], seed=7, seq_len=128, n_lanes=4, global_batch_sequences=8, shuffle_records=2, workers=2
    )
    for _ in range(3):
        next(stream)
    assert "torch" not in sys.modules
    pids = stream._group.pids
    if sys.argv[2] == "wait":
        child = os.fork()
        if child == 0:  # holds every pipe of its parent open, and outlives it
            time.sleep(60)
            os._exit(0)
        pids.append(child)
    print(*pids, flush=True)
    if sys.argv[2] == "wait":
        for _ in stream:
            time.sleep(0.05)
    if sys.argv[2] == "raise":
        raise ValueError("no close")

if __name__ == "__main__":
    run()
"""


@pytest.mark.parametrize("how", ["exit", "raise", "SIGKILL", "SIGTERM"])
def test_workers_end_with_their_parent(small, tmp_path, how):
    """A script that forgets `close`, fails, or is killed while it reads; it ends itself and its workers do."""
    script = tmp_path / "read.py"
    script.write_text(SCRIPT)
    argv = [sys.executable, str(script), str(small.folder), "wait" if how.startswith("SIG") else how]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    *pids, forked = [int(pid) for pid in process.stdout.readline().split()] + [0] * (not how.startswith("SIG"))
    assert len(pids) == 2
    if how.startswith("SIG"):
        assert all(map(is_alive, pids))
        for pid in pids:
            os.kill(pid, signal.SIGINT)  # a terminal signals the whole group; the parent decides
        process.send_signal(getattr(signal, how))
    assert (process.wait(timeout=30) == 0) == (how == "exit")
    assert wait_until_gone(pids)
    if forked:
        assert is_alive(forked)
        os.kill(forked, signal.SIGKILL)


def test_workers_hear_no_signal_but_the_last(small, open_stream):
    stream = open_stream(small, workers=1)
    next(stream)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(stream._group.pids[0], number)
    for _ in range(20):
        next(stream)


def test_a_stream_that_is_dropped_ends_its_workers(small):
    stream = GlobalBatchStream(small, **STREAM, workers=1)
    next(stream)
    pids = stream._group.pids
    del stream
    assert wait_until_gone(pids)


STOPS = (0, 1, 2, 431, 700, 999)


@pytest.mark.slow
def test_a_thousand_batches_hash_alike_on_any_ranks_and_workers_and_across_stops(small, open_stream):
    """Several epochs of the corpus, packed best-fit; all layouts agree on the states at the stops."""
    common = {"packing": "best_fit", "seq_len": 64}

    def open_ranks(dp, workers, states=None):
        return [open_stream(small, **common, dp_rank=d, dp_size=dp, workers=workers, states=states) for d in range(dp)]

    def run(ranks, start, n):
        """(digests of n steps, states at the stops among them); closes the ranks."""
        digests, states = [], {}
        for i in range(start, start + n):
            if i in STOPS:
                states[i] = {lane: state for rank in ranks for lane, state in rank.state_dict().items()}
            digests.append(batch_digest([next(rank) for rank in ranks]))
        for rank in ranks:
            rank.close()
        return digests, states

    judge, states = run(open_ranks(1, 0), 0, 1000)
    assert tuple(states) == STOPS
    assert max(state["epoch"] for state in states[700].values()) > 1
    for dp, workers in itertools.product((1, 2, 4), (0, 1, 3)):
        assert run(open_ranks(dp, workers), 0, 1000) == (judge, states), (dp, workers)
    for stop, dp in zip(STOPS, (4, 4, 2, 1, 2, 4), strict=True):
        n = min(60, 1000 - stop)
        assert run(open_ranks(dp, 0, states[stop]), stop, n)[0] == judge[stop : stop + n], (stop, dp)


def test_the_digest_command_prints_one_hash_for_every_layout(small, capsys):
    settings = ["--seq-len", "128", "--lanes", "4", "--shuffle-records", "2", "--seed", "7", "--batches", "12"]
    lines = []
    for layout in (["--dp", "1"], ["--dp", "2", "--workers", "1"], ["--dp", "4"]):
        assert main(["data", "digest", str(small.path), *settings, *layout]) == 0
        lines.append(capsys.readouterr().out)
    assert len(set(lines)) == 1
    assert lines[0].strip() == stream_digest([GlobalBatchStream(small, **STREAM)], 12)
    assert main(["data", "digest", str(small.path), *settings, "--dp", "3"]) == 2
    assert "n_lanes=4 must be a multiple of dp_size=3" in capsys.readouterr().err
    assert main(["data", "digest", str(small.path), *settings[:-1], "0"]) == 2
    assert "batches=0 must be 1 or more" in capsys.readouterr().err
