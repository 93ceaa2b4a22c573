"""Storage and servers that fail: what passes is retried, the rest is a clear error, and nothing hangs or is lost."""

import errno
import fcntl
import io
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faulty_server as faulty
import numpy as np
import pytest

from loopline.data_pipeline.download import RemoteSettings
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.store import RemoteStore
from loopline.data_pipeline.stream import GlobalBatchStream

SHARD = "train-000000.tar"
# A try, a delay below 0.5 s, another try: 1.5 s leave room for at least one retry of a server that stalls.
TIMEOUT_S = 1.5
SLACK_S = 3.0


@pytest.fixture
def server(small: Manifest) -> Iterator[faulty.FaultyServer]:
    with faulty.serving(small.folder) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> RemoteSettings:
    return RemoteSettings(cache_dir=tmp_path / "cache", retry_timeout_s=TIMEOUT_S, read_timeout_s=0.3)


@pytest.fixture
def manifest(server: faulty.FaultyServer, settings: RemoteSettings) -> Manifest:
    return Manifest.load(server.url, settings)


@pytest.fixture
def patient(server: faulty.FaultyServer, settings: RemoteSettings) -> Manifest:
    """Its timeouts leave room for a machine that is busy."""
    return Manifest.load(server.url, replace(settings, retry_timeout_s=10, read_timeout_s=0.6))


def cached(settings: RemoteSettings) -> list[str]:
    return [file.name for file in (settings.cache_dir / "shards").iterdir() if file.name != ".lock"]


PASSING = [
    faulty.stall_before_headers,
    faulty.stall_mid_body,
    faulty.drop_mid_body,
    faulty.status(500),
    faulty.status(503),
    faulty.status(429),
    faulty.short_body,
    faulty.short_body_of_unknown_length,
    faulty.long_body,
    faulty.flipped_bit,
    faulty.login_page,
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: fault.__name__)
def test_a_fault_that_passes_is_retried_and_nothing_is_lost(small, server, patient, caplog, fault):
    server.fail(SHARD, [fault])
    reader = SplitReader(patient, "train")
    expected = SplitReader(small, "train").documents(0)
    for found, document in zip(reader.documents(0), expected, strict=True):
        np.testing.assert_array_equal(found, document)
    assert isinstance(patient.store, RemoteStore)
    assert patient.store.counts["retries"] == 1
    assert server.count(SHARD) == 2
    assert f"{server.url}/{SHARD}: " in caplog.text
    assert "try 2 follows in" in caplog.text


def test_a_dropped_connection_without_an_answer_loses_nothing(small, server, patient):
    # The HTTP client retries one of these itself, on a connection it had used before.
    server.fail(SHARD, [faulty.drop_before_headers] * 2)
    with patient.store.open(small.splits["train"].shards[0]) as file:
        assert file.read() == (small.folder / SHARD).read_bytes()
    assert server.count(SHARD) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (faulty.stall_before_headers, r"could not be fetched in \d tries within 1.5 s .*imeout.*retry_timeout_s"),
        (faulty.stall_mid_body, r"could not be fetched in \d tries within 1.5 s .*imeout"),
        (faulty.drip, r"could not be fetched in \d tries within 1.5 s"),
        (faulty.drop_before_headers, r"could not be fetched in \d tries .*disconnected"),
        (faulty.drop_mid_body, r"could not be fetched in \d tries .*ClientPayloadError"),
        (faulty.status(500), r"could not be fetched in \d tries .*HTTP status 500"),
        (faulty.status(404), r"train-000000.tar is missing on the server"),
        (faulty.status(403), r"is refused: HTTP status 403"),
        (faulty.status(410), r"is refused: HTTP status 410"),
        (faulty.redirect_to_itself, r"is refused: TooManyRedirects"),
        (faulty.redirect("file:///etc/passwd"), r"is refused: NonHttpUrlRedirect"),
        (faulty.short_body, r"bytes came, \d+ expected"),
        (faulty.long_body, r"more than \d+ bytes"),
        (faulty.endless_body, r"more than \d+ bytes"),
        (faulty.flipped_bit, r"sha256 [0-9a-f]{64} found, [0-9a-f]{64} expected"),
        (faulty.login_page, r"27 bytes came"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_that_stays_is_an_error_within_its_timeout(server, manifest, settings, fault, message):
    server.always[SHARD] = fault
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as raised:
        SplitReader(manifest, "train").documents(0)
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    assert f"{server.url}/{SHARD}" in str(raised.value)
    assert cached(settings) == []


def test_what_cannot_pass_is_asked_for_once(server, manifest):
    server.always[SHARD] = faulty.status(404)
    with pytest.raises(DataError, match="missing on the server"):
        SplitReader(manifest, "train").documents(0)
    assert server.count(SHARD) == 1


def test_wrong_content_is_asked_for_three_times(server, small, settings):
    server.always[SHARD] = faulty.flipped_bit
    manifest = Manifest.load(server.url, replace(settings, retry_timeout_s=20))
    with pytest.raises(DataError, match=r"is not what was built: .*, 3 times. Upload it again"):
        SplitReader(manifest, "train").documents(0)
    assert server.count(SHARD) == 3


def test_a_slow_server_that_keeps_sending_is_no_fault(server, patient, small):
    server.fail(SHARD, [faulty.steady(1.5)])  # far longer than read_timeout_s
    with patient.store.open(small.splits["train"].shards[0]) as file:
        assert file.read() == (small.folder / SHARD).read_bytes()
    assert server.count(SHARD) == 1


def test_a_redirect_is_followed(server, patient, small):
    server.fail(SHARD, [faulty.redirect(f"{server.url}/{SHARD}")])
    with patient.store.open(small.splits["train"].shards[0]) as file:
        assert file.read() == (small.folder / SHARD).read_bytes()


def test_a_server_that_is_not_there_is_an_error_within_the_timeout(settings):
    with socket.socket() as closed:  # bound and not listening: nobody else gets the port
        closed.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(DataError, match=r"could not be fetched in \d tries .*ClientConnector"):
            Manifest.load(f"http://127.0.0.1:{closed.getsockname()[1]}/data", settings)
        assert time.monotonic() - began < TIMEOUT_S + SLACK_S


def test_a_process_that_waits_for_another_gives_up_in_time(server, manifest, settings, small):
    shard = small.splits["train"].shards[0]
    folder = settings.cache_dir / "shards"
    folder.mkdir(parents=True)
    with (folder / f"{shard.sha256}.part").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(DataError, match=r"another process has not finished fetching train-000000.tar"):
            manifest.store.open(shard)
        # Nor is there room for another while it holds all of it.
        held.truncate(settings.cache_bytes)
        other = small.splits["train"].shards[1]
        with pytest.raises(DataError, match=r"no room for train-000001.tar .* Raise data.cache_bytes"):
            manifest.store.open(other)
        assert time.monotonic() - began < 2 * (TIMEOUT_S + SLACK_S)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (faulty.status(404), r"data/manifest.json is missing on the server"),
        (faulty.stall_mid_body, r"manifest.json could not be fetched in"),
        (faulty.login_page, r"manifest.json breaks a rule: .*Invalid JSON"),
        (faulty.endless_body, r"manifest.json is not what was built: more than 1048576 bytes"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_manifest_that_does_not_come_is_an_error(server, settings, monkeypatch, fault, message):
    from loopline.data_pipeline import manifest

    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 2**20)
    server.always["manifest.json"] = fault
    began = time.monotonic()
    with pytest.raises(DataError, match=message):
        Manifest.load(server.url, replace(settings, retry_timeout_s=2.5))
    assert time.monotonic() - began < 2.5 + SLACK_S


def test_a_full_cache_names_the_file_it_could_not_write(manifest, settings, small):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    shard = small.splits["train"].shards[0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("loopline.data_pipeline.store.io.FileIO", Full)
        with pytest.raises(DataError, match=rf"shards/{shard.sha256}.part cannot be written: .*No space left"):
            manifest.store.open(shard)
    assert cached(settings) == []


def test_another_tokenizer_on_the_server_is_refused(server, settings):
    server.always["tokenizer.json"] = faulty.flipped_bit
    with pytest.raises(DataError, match=r"tokenizer.json .*sha256"):
        Manifest.load(server.url, settings)


def test_a_cache_that_cannot_be_written_is_an_error(server, settings, tmp_path):
    manifest = Manifest.load(server.url, settings)
    (settings.cache_dir / "shards").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be used: .*data.cache_dir"):
        SplitReader(manifest, "train").documents(0)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written: .*data.cache_dir"):
        Manifest.load(server.url, replace(settings, cache_dir=tmp_path / "file"))


STREAM = {"seed": 3, "seq_len": 64, "n_lanes": 2, "global_batch_sequences": 2}


def test_a_stream_goes_on_exactly_where_a_fault_ended_it(small, server, settings):
    expected = GlobalBatchStream(small, **STREAM)
    settings = replace(settings, retry_timeout_s=10, read_timeout_s=2)
    stream = GlobalBatchStream(Manifest.load(server.url, settings), **STREAM)
    np.testing.assert_array_equal(next(stream).tokens, next(expected).tokens)
    for shard in small.splits["train"].shards:
        server.always[shard.name] = faulty.status(404)

    def go_on() -> None:
        for _ in range(1000):
            next(stream)
            next(expected)

    with pytest.raises(DataError, match="missing on the server"):
        go_on()
    server.always.clear()
    again = GlobalBatchStream(Manifest.load(server.url, settings), **STREAM, states=stream.state_dict())
    for _ in range(5):
        np.testing.assert_array_equal(next(again).tokens, next(expected).tokens)


def test_a_local_shard_that_vanishes_or_shrinks_during_the_run_is_an_error(copy):
    reader = SplitReader(copy, "train")
    path = copy.folder / SHARD
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=rf"{SHARD} cannot be read: .*No such file"):
        reader.documents(0)
    path.write_bytes(content[:2000])
    with pytest.raises(DataError, match=rf"{SHARD}, record at byte \d+, cannot be read: ends after"):
        reader.documents(0)
    path.write_bytes(content)
    assert reader.documents(0)
