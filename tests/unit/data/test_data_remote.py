"""A data set at a URL gives the tokens it gives from its folder, through a cache that is bounded and shared."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import faulty_server as faulty
import numpy as np
import pytest

from loopline.data_pipeline.download import RemoteSettings
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.store import RemoteStore
from loopline.data_pipeline.stream import GlobalBatchStream
from loopline.data_pipeline.tokenizer import TokenizerFile

STREAM = {"seed": 3, "seq_len": 64, "n_lanes": 2, "global_batch_sequences": 4}


@pytest.fixture
def server(small: Manifest) -> Iterator[faulty.FaultyServer]:
    with faulty.serving(small.folder) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> RemoteSettings:
    return RemoteSettings(cache_dir=tmp_path / "cache", retry_timeout_s=10, read_timeout_s=2)


def cached(settings: RemoteSettings) -> list[str]:
    return sorted(file.name for file in (settings.cache_dir / "shards").iterdir() if file.name != ".lock")


def open_shard(manifest: Manifest, i: int) -> bytes:
    with manifest.store.open(manifest.splits["train"].shards[i]) as file:
        return file.read()


def store_of(manifest: Manifest) -> RemoteStore:
    assert isinstance(manifest.store, RemoteStore)
    return manifest.store


@pytest.mark.parametrize("end", ["", "/", "/manifest.json"])
def test_a_url_gives_the_batches_of_the_folder(small, server, settings, end):
    remote = Manifest.load(server.url + end, settings)
    assert remote.is_remote
    assert not small.is_remote
    assert remote.content_sha256("train") == small.content_sha256("train")
    batches = zip(GlobalBatchStream(remote, **STREAM), GlobalBatchStream(small, **STREAM), strict=False)
    for _, (found, expected) in zip(range(10), batches, strict=False):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.labels, expected.labels)
    remote.verify()
    remote.verify(hashes=False)


def test_a_file_url_is_its_folder(small):
    manifest = Manifest.load(f"file://{small.folder}/manifest.json")
    assert (manifest.folder, manifest.is_remote) == (small.folder, False)


def test_the_tokenizer_comes_with_its_settings(small, server, settings, tmp_path):
    copy = TokenizerFile(Manifest.load(server.url, settings).folder).copy_to(tmp_path / "run")
    assert copy.sha256 == small.tokenizer.sha256
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "run" / name).read_bytes() == (small.folder / name).read_bytes()


def test_a_tokenizer_without_settings_files_is_enough(copy, settings):
    (copy.folder / "tokenizer_config.json").unlink()
    (copy.folder / "special_tokens_map.json").unlink()
    with faulty.serving(copy.folder) as server:
        manifest = Manifest.load(server.url, settings)
    assert sorted(file.name for file in manifest.folder.iterdir()) == ["manifest.json", "tokenizer.json"]


def test_opening_fetches_no_shard_and_reading_fetches_each_once(small, server, settings):
    manifest = Manifest.load(server.url, settings)
    reader = SplitReader(manifest, "train")
    names = [shard.name for shard in small.splits["train"].shards]
    assert [server.count(name) for name in names] == [0] * len(names)
    for _ in range(2):
        for record in range(reader.n_records):
            reader.documents(record)
    assert [server.count(name) for name in names] == [1] * len(names)
    again = SplitReader(Manifest.load(server.url, settings), "train")
    again.documents(0)
    assert server.count(names[0]) == 1
    n_bytes = sum(shard.n_bytes for shard in small.splits["train"].shards)
    assert store_of(manifest).counts == {"shards": len(names), "bytes": n_bytes, "retries": 0}


def test_the_cache_keeps_its_bound_and_drops_the_least_recently_used(small, server, settings):
    shards = small.splits["train"].shards
    bound = shards[0].n_bytes + max(shard.n_bytes for shard in shards)
    assert len(shards) >= 3
    assert sum(shard.n_bytes for shard in shards[:3]) > bound
    manifest = Manifest.load(server.url, replace(settings, cache_bytes=bound))
    for i in (0, 1, 0):
        open_shard(manifest, i)
        time.sleep(0.02)  # a file system's clock may tick slowly
    open_shard(manifest, 2)
    assert cached(settings) == sorted([shards[0].sha256, shards[2].sha256])
    reader = SplitReader(manifest, "train")
    for record in range(reader.n_records):
        reader.documents(record)
        used = sum(file.stat().st_size for file in (settings.cache_dir / "shards").iterdir())
        assert used <= bound


def test_downloads_under_way_count_towards_the_bound(small, server, settings):
    shards = small.splits["train"].shards
    folder = settings.cache_dir / "shards"
    open_shard(Manifest.load(server.url, settings), 0)
    with (folder / f"{shards[2].sha256}.part").open("wb") as under_way:
        fcntl.flock(under_way, fcntl.LOCK_EX)
        under_way.truncate(shards[2].n_bytes)
        # One byte short of all three: the finished one has to go, though two would fit.
        bound = sum(shard.n_bytes for shard in shards[:3]) - 1
        open_shard(Manifest.load(server.url, replace(settings, cache_bytes=bound)), 1)
        assert cached(settings) == sorted([shards[1].sha256, f"{shards[2].sha256}.part"])


def test_an_evicted_shard_stays_readable_where_it_is_open(small, server, settings):
    shards = small.splits["train"].shards
    bound = max(shard.n_bytes for shard in shards)
    manifest = Manifest.load(server.url, replace(settings, cache_bytes=bound))
    with manifest.store.open(shards[0]) as file:
        open_shard(manifest, 1)
        assert cached(settings) == [shards[1].sha256]
        assert file.read() == (small.folder / shards[0].name).read_bytes()


def test_a_shard_larger_than_the_cache_is_refused_at_opening(server, settings):
    manifest = Manifest.load(server.url, replace(settings, cache_bytes=1000))
    with pytest.raises(DataError, match=r"train-000000.tar has \d+ bytes, .* at most 1000 \(data.cache_bytes\)"):
        SplitReader(manifest, "train")


def test_a_damaged_cached_copy_is_fetched_again(small, server, settings):
    shard = small.splits["train"].shards[0]
    open_shard(Manifest.load(server.url, settings), 0)
    path = settings.cache_dir / "shards" / shard.sha256
    content = path.read_bytes()
    for damaged in (content[:1000] + b"\x07" + content[1001:], content[:-1]):
        path.write_bytes(damaged)
        assert open_shard(Manifest.load(server.url, settings), 0) == content
        assert path.read_bytes() == content
    assert server.count(shard.name) == 3


READ = """
import sys
from pathlib import Path
from loopline.data_pipeline.download import RemoteSettings
from loopline.data_pipeline.manifest import Manifest
settings = RemoteSettings(cache_dir=Path(sys.argv[2]), retry_timeout_s=10, read_timeout_s=5)
manifest = Manifest.load(sys.argv[1], settings)
print("loaded", flush=True)
sys.stdin.readline()
for shard in manifest.splits["train"].shards:
    with manifest.store.open(shard) as file:
        file.read()
print(manifest.store.counts["shards"], flush=True)
"""


def start_reader(server: faulty.FaultyServer, settings: RemoteSettings) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ, server.url, str(settings.cache_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "loaded\n"
    return process


def test_processes_that_share_a_cache_fetch_each_shard_once(small, server, settings):
    shards = small.splits["train"].shards
    for shard in shards:
        server.always[shard.name] = faulty.slow(0.1)
    processes = [start_reader(server, settings) for _ in range(3)]
    outputs = []
    for process in processes:  # all are loaded: now they race
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=20)[0])
        assert process.returncode == 0
    assert sum(int(output) for output in outputs) == len(shards)
    assert [server.count(shard.name) for shard in shards] == [1] * len(shards)
    assert cached(settings) == sorted(shard.sha256 for shard in shards)


def test_a_killed_download_leaves_nothing_that_is_read_or_kept(small, server, settings):
    shards = small.splits["train"].shards
    server.fail(shards[0].name, [faulty.stall_mid_body])
    process = start_reader(server, settings)
    process.stdin.write("go\n")
    process.stdin.flush()
    part = settings.cache_dir / "shards" / f"{shards[0].sha256}.part"
    limit = time.monotonic() + 5
    while not (part.exists() and part.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cached(settings) == [part.name]
    # Another shard needs the room: what is left of the first goes.
    bound = max(shard.n_bytes for shard in shards)
    manifest = Manifest.load(server.url, replace(settings, cache_bytes=bound))
    open_shard(manifest, 1)
    assert cached(settings) == [shards[1].sha256]
    # The shard itself takes over what is left.
    part.write_bytes(b"left behind")
    assert open_shard(manifest, 0) == (small.folder / shards[0].name).read_bytes()
    assert cached(settings) == [shards[0].sha256]


def test_a_forked_worker_can_fetch(server, settings):
    manifest = Manifest.load(server.url, settings)
    expected = open_shard(manifest, 0)
    os.unlink(settings.cache_dir / "shards" / cached(settings)[0])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(open_shard, (manifest, 0)).get(timeout=10) == expected


WITHOUT = """
import sys
from loopline.data_pipeline.manifest import Manifest
sys.modules[sys.argv[1]] = None  # what an import finds where the package is not installed
try:
    Manifest.load(sys.argv[2])
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_object_stores_name_the_package_they_need(scheme, package):
    command = [sys.executable, "-c", WITHOUT, package, f"{scheme}://bucket/data"]
    message = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"DataError {scheme}://bucket/data/manifest.json needs the package {package}" in message
    assert f"pip install {package}, or copy the data to a local path" in message


class ForwardProxy(BaseHTTPRequestHandler):
    """Answers for one host name that only it knows, `data.invalid`; refuses tunnels."""

    target = ""
    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requested.append(f"GET {self.path}")
        try:
            with DIRECT.open(self.path.replace("http://data.invalid", self.target)) as answer:
                body, status = answer.read(), 200
        except urllib.error.HTTPError as error:
            body, status = b"", error.code
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self) -> None:
        self.requested.append(f"CONNECT {self.path}")
        self.send_error(403)

    def log_message(self, format: str, *args: object) -> None:
        pass


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def proxy(server: faulty.FaultyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ForwardProxy]]:
    """A running proxy that the environment names."""
    handler = type("Proxy", (ForwardProxy,), {"target": server.url.removesuffix("/data"), "requested": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{running.server_port}")
        Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield handler
        running.shutdown()


def test_a_proxy_of_the_environment_is_used(small, proxy, settings):
    manifest = Manifest.load("http://data.invalid/data", settings)
    shard = small.splits["train"].shards[0]
    assert open_shard(manifest, 0) == (small.folder / shard.name).read_bytes()
    assert proxy.requested[0] == "GET http://data.invalid/data/manifest.json"
    assert proxy.requested[-1] == f"GET http://data.invalid/data/{shard.name}"


def test_https_goes_through_a_tunnel_of_the_proxy(proxy, settings):
    with pytest.raises(DataError, match=r"https://data.invalid/data/manifest.json is refused: HTTP status 403"):
        Manifest.load("https://data.invalid/data", settings)
    assert proxy.requested == ["CONNECT data.invalid:443"]


def test_no_proxy_names_hosts_that_are_asked_directly(server, proxy, settings, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    Manifest.load(server.url, settings)
    assert proxy.requested == []
    assert server.count("manifest.json") == 1


def test_a_run_opens_a_corpus_at_a_url(small, server, tmp_path, caplog):
    from loopline.pretrain.config import load_config
    from loopline.pretrain.corpus import open_corpus

    overrides = [f"data.manifest={server.url}", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_bytes=60000"]
    manifest = open_corpus(load_config("debug", overrides), local_rank=0)
    assert manifest.content_sha256("train") == small.content_sha256("train")
    assert manifest.folder.is_relative_to(tmp_path / "cache")
    assert store_of(manifest).settings.cache_bytes == 60000
    assert "Raise data.cache_bytes to hold them all" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.retry_timeout_s=1770"], r"must be below train.hang_timeout_s = 1800, .* or raise train.hang_timeout_s"),
        (["train.hang_timeout_s=630"], r"= 600 \+ data.read_timeout_s = 30, .* file of data.manifest, must be below"),
        (
            ["data.workers=1", "data.retry_timeout_s=1470"],
            r"below 1500, when a worker of data.workers is given up: low",
        ),
        (["data.read_timeout_s=1300"], r"data.read_timeout_s = 1300"),
        (["data.manifest=S3://b/c", "data.retry_timeout_s=1770"], r"must be below train.hang_timeout_s = 1800"),
        (["data.retry_timeout_s=1769"], None),
        (["data.workers=1", "data.retry_timeout_s=1469"], None),
        (["data.manifest=/local", "data.retry_timeout_s=9999"], None),
        (["data.manifest=file:///local", "data.retry_timeout_s=9999"], None),
    ],
)
def test_a_server_may_not_be_slower_than_the_run_waits(overrides, problem):
    from loopline.pretrain.config import load_config
    from loopline.pretrain.errors import ConfigError

    config = load_config("debug", ["data.manifest=https://user:word@host/corpus", *overrides])
    if problem is None:
        config.validate_for(1)
        return
    with pytest.raises(ConfigError, match=problem) as raised:
        config.validate_for(1)
    assert "word" not in str(raised.value)


def test_a_source_that_may_be_slower_than_the_run_waits_is_named():
    from loopline.pretrain.config import load_config
    from loopline.pretrain.errors import ConfigError

    sources = "data.sources=[{name='near', manifest='/local'}, {name='far', manifest='gs://bucket/far'}]"
    config = load_config("debug", ["data.manifest=''", sources, "data.retry_timeout_s=1800"])
    with pytest.raises(ConfigError, match=r"wait for one file of data.sources \(far\), must be below"):
        config.validate_for(1)
