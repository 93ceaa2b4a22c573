"""A data set in an S3 bucket gives the tokens it gives from its folder; moto serves it, in its own process."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import s3fs

from loopline.data_pipeline.digest import stream_digest
from loopline.data_pipeline.download import RemoteSettings
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.stream import GlobalBatchStream

URL = "s3://bucket/corpora/small"
SHARD = "train-000000.tar"
STREAM = {"seed": 3, "seq_len": 64, "n_lanes": 2, "global_batch_sequences": 4}


def listening() -> socket.socket:
    """A port of this machine that accepts connections and says nothing."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def use_server(patch: pytest.MonkeyPatch, port: int) -> None:
    """What a user of another S3 server than Amazon's sets."""
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # fsspec keeps file systems by their arguments, and the server is none of them.
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening() as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 30
        while not is_up(port):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def is_up(port: int) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/", timeout=1):
            return True
    except OSError:
        return False


@pytest.fixture
def bucket(port: int, small: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """Holds `small` at URL; the file system to change it with."""
    use_server(monkeypatch, port)
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("bucket")
    for file in small.folder.iterdir():
        if file.is_file():
            filesystem.pipe_file(f"{URL}/{file.name}", file.read_bytes())
    yield filesystem
    filesystem.rm("bucket", recursive=True)


@pytest.fixture
def settings(tmp_path: Path) -> RemoteSettings:
    return RemoteSettings(cache_dir=tmp_path / "cache", retry_timeout_s=10, read_timeout_s=5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bucket_gives_the_batches_of_the_folder(bucket, small, settings, workers):
    remote = Manifest.load(URL, settings)
    assert remote.is_remote
    stream = GlobalBatchStream(remote, **STREAM, workers=workers)
    try:
        assert stream_digest([stream], 200) == stream_digest([GlobalBatchStream(small, **STREAM)], 200)
    finally:
        stream.close()
    cached = {file.name for file in (settings.cache_dir / "shards").iterdir()}
    assert {shard.sha256 for shard in small.splits["train"].shards} <= cached
    remote.verify()
    remote.verify(hashes=False)
    remote.verify_tokenizer()


def test_a_missing_shard_is_named(bucket, settings):
    remote = Manifest.load(URL, settings)
    bucket.rm_file(f"{URL}/{SHARD}")
    for hashes in (True, False):
        with pytest.raises(DataError, match=rf"{URL}/{SHARD} is missing on the server. Check the URL"):
            remote.verify(hashes=hashes)


@pytest.mark.parametrize("url", ["s3://bucket/none", "s3://nowhere/corpora/small"])
def test_a_missing_key_or_bucket_is_named(bucket, settings, url):
    with pytest.raises(DataError, match=rf"{url}/manifest.json is missing on the server"):
        Manifest.load(url, settings)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda raw: raw[:-100], r"\d+ bytes came, \d+ expected"),
        (lambda raw: raw + b"x", r"more than \d+ bytes"),
        (lambda raw: raw[:999] + bytes([raw[999] ^ 1]) + raw[1000:], r"sha256 \w+ found, \w+ expected"),
    ],
    ids=["short", "long", "flipped"],
)
def test_wrong_bytes_are_refused_and_not_kept(bucket, small, settings, damage, problem):
    remote = Manifest.load(URL, settings)
    bucket.pipe_file(f"{URL}/{SHARD}", damage((small.folder / SHARD).read_bytes()))
    with pytest.raises(DataError, match=rf"{URL}/{SHARD} is not what was built: {problem}, 3 times. Upload it again"):
        list(zip(range(200), GlobalBatchStream(remote, **STREAM), strict=False))
    assert small.splits["train"].shards[0].sha256 not in os.listdir(settings.cache_dir / "shards")


def test_another_size_is_seen_without_fetching(bucket, small, settings):
    remote = Manifest.load(URL, settings)
    bucket.pipe_file(f"{URL}/{SHARD}", (small.folder / SHARD).read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"shard {URL}/{SHARD} has \d+ bytes, the manifest says \d+: cut short"):
        remote.verify(hashes=False)
    assert not (settings.cache_dir / "shards").exists()


def test_a_server_that_says_nothing_ends_in_time(settings, monkeypatch):
    with listening() as server:
        use_server(monkeypatch, server.getsockname()[1])
        with pytest.raises(DataError, match=r"manifest.json could not be fetched in \d tries within 1 s .*imeout"):
            Manifest.load(URL, replace(settings, retry_timeout_s=1, read_timeout_s=0.5))


def test_missing_credentials_are_named(bucket, settings, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"manifest.json cannot be fetched: .*redentials.* Check the URL and the cred"):
        Manifest.load(URL, settings)
