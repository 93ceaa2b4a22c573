"""Data made to do harm: refused, nothing in it executed, nothing written outside, nothing huge allocated."""

import hashlib
import io
import json
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import faulty_server as faulty
import numpy as np
import pytest
import yarl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopline.data_pipeline.download import SCHEMES, RemoteSettings, file_url, parse_location
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.stream import GlobalBatchStream

few = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEN_GB = 10 * 2**30


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def forge_shard(manifest: Manifest, content: bytes) -> Manifest:
    """Puts `content` in place of the first shard and makes the manifest vouch for it."""
    shard = manifest.splits["train"].shards[0]
    (manifest.folder / shard.name).write_bytes(content)
    vouched = {"sha256": hashlib.sha256(content).hexdigest(), "n_bytes": len(content)}
    edit_manifest(manifest.folder, lambda c: c["splits"]["train"]["shards"][0].update(vouched))
    return Manifest.load(manifest.folder)


def first_shard(manifest: Manifest) -> bytes:
    return (manifest.folder / manifest.splits["train"].shards[0].name).read_bytes()


@pytest.fixture
def remote(tmp_path: Path) -> RemoteSettings:
    return RemoteSettings(cache_dir=tmp_path / "cache", retry_timeout_s=1.5, read_timeout_s=0.5)


@pytest.fixture
def served(copy: Manifest) -> Iterator[faulty.FaultyServer]:
    with faulty.serving(copy.folder) as server:
        yield server


@pytest.fixture
def peak_bytes() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize(
    "location",
    [
        "pipe:touch {canary}",
        "pipe:touch {canary};",
        "PIPE:touch {canary}",
        "pipe://touch {canary}",
        "shell:touch {canary}",
        "simplecache::pipe:touch {canary}",
        "simplecache::http://127.0.0.1:1/manifest.json",
        "filecache::file:///etc/passwd",
        "http::pipe:touch {canary}",
        "memory://data",
        "ftp://127.0.0.1/data",
        "ssh://127.0.0.1/data",
        "github://owner:repo@/data",
        "reference://data",
        "python:import os",
        "local:/etc",
        "hf://datasets/x",
        "ws://127.0.0.1/",
    ],
)
def test_only_plain_places_are_read_and_no_process_is_started(tmp_path, small, location):
    from loopline.pretrain.config import load_config
    from loopline.pretrain.corpus import open_corpus

    text = location.format(canary=tmp_path / "canary")
    opened = (
        lambda: Manifest.load(text),
        lambda: Manifest.load(Path(text)),
        lambda: GlobalBatchStream(text, seed=0, seq_len=8, n_lanes=1, global_batch_sequences=1),
        lambda: open_corpus(load_config("debug", [f"data.manifest={text}"]), 0),
    )
    for open_it in opened:
        with pytest.raises(DataError, match=r"refused: data comes from a local path or a URL of file, http, https, s3"):
            open_it()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "url",
    [
        "http:/host/data",
        "http:///data",
        "http://",
        "https://host/data?token=secret",
        "https://user:secret@host/data",
        "https://host/da ta",
        "https://host/data#secret",
        "https://host/a\\b",
        "http://host/simplecache::pipe:x",
        "s3://user:secret@bucket/data",
        "file:data",
        "file://host/data",
    ],
)
def test_urls_that_are_not_plain_are_refused_and_show_no_secret(url):
    with pytest.raises(DataError) as raised:
        Manifest.load(url)
    assert "secret" not in str(raised.value)


@few
@given(
    st.one_of(
        st.text(max_size=40),
        st.tuples(st.sampled_from([*SCHEMES, "pipe", "hTTp", "zip"]), st.text(max_size=30)).map("://".join),
    )
)
def test_a_location_is_a_path_or_an_allowed_url_or_refused(text):
    try:
        found = parse_location(text)
    except DataError:
        return
    if isinstance(found, str):
        assert found.partition("://")[0] in ("http", "https", "s3", "gs")
        assert "::" not in found


@few
@given(st.text(min_size=1, max_size=20).filter(lambda name: not set(name) & set("/\\:\0") and name not in (".", "..")))
def test_no_plain_name_leaves_the_folder_of_a_url(name):
    url = yarl.URL(file_url("http://host/data", name), encoded=True)
    assert url.raw_path.rpartition("/")[0] == "/data"
    assert (url.host, url.raw_query_string, url.raw_fragment) == ("host", "", "")


@pytest.mark.parametrize("name", ["%2e%2e%2fsecret.tar", "..%2fsecret.tar", "x.tar?y", "x.tar#y", "%00", "a;b", "a&b"])
def test_an_encoded_name_asks_the_server_for_that_very_name(copy, served, remote, name):
    (copy.folder / "train-000000.tar").rename(copy.folder / "other.tar")
    edit_manifest(copy.folder, lambda c: c["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"is missing on the server"):
        SplitReader(Manifest.load(served.url, remote), "train").documents(0)
    asked = served.requested[-1]
    assert unquote(asked.removeprefix("/data/")) == name
    assert not set(asked.removeprefix("/data/")) & set("/?#")


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/passwd", "..", "a/b.tar", "a\\b.tar", "C:x.tar", "pipe:cat x", "\0"]
)
def test_a_remote_manifest_that_points_outside_its_folder_is_refused(copy, served, remote, name):
    edit_manifest(copy.folder, lambda c: c["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"must be the plain name of a file"):
        Manifest.load(served.url, remote)
    assert served.requested == ["/data/manifest.json"]
    assert not remote.cache_dir.exists()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_remote_tokenizer_overwrites_no_other_file(copy, served, remote, name):
    sha256 = hashlib.sha256((copy.folder / name).read_bytes()).hexdigest()
    edit_manifest(copy.folder, lambda c: c["tokenizer"].update(file=name, sha256=sha256))
    with pytest.raises(DataError, match=rf"names '{name}' as its tokenizer"):
        Manifest.load(served.url, remote)


def member(name: str, data: bytes = b"evil", **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


HUGE = tarfile.TarInfo("train-00000009.tokens.npy")
HUGE.size = TEN_GB


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (member("../evil"), r"member '../evil' at byte \d+ has a name that is not plain"),
        (member("/tmp/evil"), r"member '/tmp/evil' .* not plain"),
        (member("a/../../evil"), r"not plain"),
        (member("..\\evil"), r"not plain"),
        (member(".."), r"not plain"),
        (member("link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), r"'link' .* is no regular file"),
        (member("link", b"", type=tarfile.LNKTYPE, linkname="../evil"), r"is no regular file"),
        (member("device", b"", type=tarfile.CHRTYPE), r"is no regular file"),
        (member("folder", b"", type=tarfile.DIRTYPE), r"is no regular file"),
        (member("pax", b"30 path=/tmp/evil\n", type=tarfile.XHDTYPE), r"is no regular file"),
        (member("long", b"/tmp/evil\0", type=tarfile.GNUTYPE_LONGNAME), r"is no regular file"),
        (HUGE.tobuf(tarfile.GNU_FORMAT), r"claims 10737418240 bytes, \d+ are left"),
        (b"\xff" * 512, r"is not the tar its manifest describes"),
    ],
)
def test_a_harmful_tar_member_fails_verify_and_is_never_extracted(copy, tmp_path, peak_bytes, extra, message):
    content = first_shard(copy)
    before = sorted(tmp_path.rglob("*"))
    forged = forge_shard(copy, content[:-1024] + extra + content[-1024:])
    with pytest.raises(DataError, match=message):
        forged.verify()
    # The reader goes by the manifest: what else is in the tar is not looked at.
    assert SplitReader(forged, "train").documents(0)
    assert sorted(tmp_path.rglob("*")) == before
    assert peak_bytes() < 50 * 2**20


def test_a_tar_that_is_not_the_manifests_fails_verify(copy):
    content = first_shard(copy)
    with pytest.raises(DataError, match=r"ends at byte \d+ without the blocks that end an archive"):
        forge_shard(copy, content[:-1024]).verify()
    forge_shard(copy, content).verify()

    def shift(content: dict[str, Any]) -> None:
        content["splits"]["train"]["shards"][0]["records"][0][0] += 1

    edit_manifest(copy.folder, shift)
    with pytest.raises(DataError, match=r"has a record at byte 513, the tar has no \*.tokens.npy there"):
        Manifest.load(copy.folder).verify()


def test_what_a_stream_would_refuse_fails_verify(copy):
    """Also where the sha256 is right, as it is of what another tool has written."""
    content = first_shard(copy)
    record = copy.splits["train"].shards[0].records[0]
    last = record.tokens_offset + 128 + 2 * (record.n_tokens - 1)
    with pytest.raises(DataError, match=r"record at byte 512, cannot be read: a document does not end with eos \(0\)"):
        forge_shard(copy, content[:last] + b"\1\0" + content[last + 2 :]).verify()
    at = record.ends_offset + 128
    with pytest.raises(DataError, match=r"record at byte 512, cannot be read: document ends must rise"):
        forge_shard(copy, content[:at] + bytes(8) + content[at + 8 :]).verify()
    with pytest.raises(DataError, match=r"record at byte 512 is of train-00000000 and train-99999999"):
        forge_shard(copy, swap_name(content, record.ends_offset - 512, b"train-99999999")).verify()


def swap_name(content: bytes, at: int, name: bytes) -> bytes:
    header = bytearray(content[at : at + 512])
    header[: len(name)] = name
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


def test_records_that_the_manifest_lacks_fail_verify(copy):
    def drop(content: dict[str, Any]) -> None:
        split = content["splits"]["train"]
        _, n_tokens, _, n_documents = split["shards"][0]["records"].pop()
        for counts in (split, split["shards"][0]):
            counts["n_tokens"] -= n_tokens
            counts["n_documents"] -= n_documents
        del split["length_histogram"]

    edit_manifest(copy.folder, drop)
    with pytest.raises(DataError, match=r"the tar has '.*.tokens.npy' at byte \d+, which is no record of the manifest"):
        Manifest.load(copy.folder).verify()


class Bomb:
    """Unpickling one creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (open, (str(self.canary), "w"))


def put_at_first_tokens(manifest: Manifest, data: bytes) -> Manifest:
    offset = manifest.splits["train"].shards[0].records[0].tokens_offset
    content = first_shard(manifest)
    return forge_shard(manifest, content[:offset] + data + content[offset + len(data) :])


def test_a_pickle_in_place_of_an_array_is_not_loaded(copy, tmp_path):
    bomb = Bomb(tmp_path / "canary")
    as_array = io.BytesIO()
    np.save(as_array, np.array([bomb], dtype=object), allow_pickle=True)
    for data in (pickle.dumps(bomb), as_array.getvalue()):
        forged = put_at_first_tokens(copy, data)
        with pytest.raises(DataError, match=r"record at byte 512, cannot be read"):
            SplitReader(forged, "train").documents(0)
    assert not (tmp_path / "canary").exists()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "header",
    [
        f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({TEN_GB // 2},), }}\n",
        f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({2**62},), }}\n",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (100000, 100000), }\n",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }\n",
        "{'descr': [('a', '<u2', (1000000000,))], 'fortran_order': False, 'shape': (1,), }\n",
        "__import__('os').system('true')\n",
        "(" * 900,
        "9" * 900,
        "'",
        "\n  x\n y",
        "",
    ],
)
def test_an_npy_header_that_lies_is_refused_before_anything_is_allocated(copy, peak_bytes, header):
    forged = put_at_first_tokens(copy, npy_header(header))
    with pytest.raises(DataError, match=r"train-000000.tar, record at byte 512, cannot be read"):
        SplitReader(forged, "train").documents(0)
    assert peak_bytes() < 50 * 2**20


def claim_one_record(n_tokens: int, n_bytes: int) -> Callable[[dict[str, Any]], None]:
    """One record of one document in the first shard, in a place where it overlaps with nothing."""

    def change(content: dict[str, Any]) -> None:
        split = content["splits"]["train"]
        shard = split["shards"][0]
        split["n_tokens"] += n_tokens - shard["n_tokens"]
        split["n_documents"] += 1 - shard["n_documents"]
        shard.update(records=[[512, n_tokens, 0, 1]], n_tokens=n_tokens, n_documents=1, n_bytes=n_bytes)
        del split["length_histogram"]

    return change


@pytest.mark.parametrize("claim", [TEN_GB, 2**50])
def test_a_manifest_that_claims_too_much_is_refused_before_anything_is_allocated(copy, claim, peak_bytes):
    edit_manifest(copy.folder, claim_one_record(claim, 4 * claim))
    manifest = Manifest.load(copy.folder)
    with pytest.raises(DataError, match=r"has \d+ bytes, the manifest says"):
        SplitReader(manifest, "train")
    assert peak_bytes() < 50 * 2**20


def test_more_items_than_the_shard_has_room_for_are_refused(copy):
    n_bytes = copy.splits["train"].shards[0].n_bytes
    edit_manifest(copy.folder, claim_one_record(n_bytes - 1000, n_bytes))
    with pytest.raises(DataError, match=rf"the manifest claims {2 * (n_bytes - 1000)} bytes at 512"):
        SplitReader(Manifest.load(copy.folder), "train").documents(0)


def test_a_server_that_claims_or_sends_too_much_fills_no_disk(served, remote, small):
    manifest = Manifest.load(served.url, remote)
    n_bytes = small.splits["train"].shards[0].n_bytes
    largest = 0

    def watch(handler: faulty.Handler, body: bytes) -> None:
        nonlocal largest
        handler.answer(200, bytes(4 * n_bytes), n_claimed=TEN_GB)
        files = [file for file in (remote.cache_dir / "shards").iterdir() if file.name.endswith(".part")]
        largest = max([largest, *(file.stat().st_size for file in files)])
        faulty.endless_body(handler, body)

    served.always["train-000000.tar"] = watch
    with pytest.raises(DataError, match=rf"more than {n_bytes} bytes"):
        SplitReader(manifest, "train").documents(0)
    assert largest <= n_bytes


@few
@given(st.data())
def test_any_damage_to_a_shard_fails_verify_and_reads_as_documents_or_an_error(small, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    for file in small.folder.iterdir():
        (folder / file.name).symlink_to(file)
    shard = small.splits["train"].shards[0]
    content = bytearray((small.folder / shard.name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly where something is written that a reader goes by.
        record = data.draw(st.sampled_from(shard.records))
        starts = [0, record.tokens_offset, record.ends_offset, record.tokens_offset - 512]
        at = data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 140))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(patch)] = patch
    if bytes(content) == (small.folder / shard.name).read_bytes():
        return
    (folder / shard.name).unlink()
    (folder / shard.name).write_bytes(content)
    damaged = Manifest.load(folder)
    with pytest.raises(DataError, match=r"is not the one that was built"):
        damaged.verify()
    reader = SplitReader(damaged, "train")
    for record_idx, record in enumerate(shard.records):
        try:
            documents = reader.documents(record_idx)
        except DataError:
            continue
        assert sum(len(document) for document in documents) == record.n_tokens


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@few
@given(st.data())
def test_any_value_in_a_manifest_is_read_or_refused(small, tmp_path_factory, data):
    content = json.loads(small.path.read_text())
    place: Any = content
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 4)):
            place = place[key]
            continue
        place[key] = data.draw(JSON)
        break
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.json").write_text(json.dumps(content))
    with suppress(DataError):
        Manifest.load(folder)


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**5, b"\xff\xfe", b"", b"null", b"1e999", b"[]"])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json breaks a rule"):
        Manifest.load(tmp_path)
