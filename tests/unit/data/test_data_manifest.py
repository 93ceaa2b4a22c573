"""Whatever is wrong with a data set on disk is refused, by name, before or at the read that meets it."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.shards import SplitReader


def edit_manifest(manifest: Manifest, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(manifest.path.read_text())
    change(content)
    manifest.path.write_text(json.dumps(content))


def overwrite(manifest: Manifest, offset: int, data: bytes) -> None:
    shard = manifest.splits["train"].shards[0]
    with (manifest.folder / shard.name).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_an_undamaged_copy_verifies(copy):
    copy.verify()


def test_an_edited_byte_is_found_by_hash(copy):
    shard = copy.splits["train"].shards[0]
    overwrite(copy, shard.records[0].tokens_offset + 200, b"\x01")
    copy.verify(hashes=False)
    with pytest.raises(DataError, match=rf"{shard.name} is not the one .* sha256 [0-9a-f]{{64}}, .* {shard.sha256}"):
        copy.verify()


def test_a_missing_shard_is_named(copy):
    (copy.folder / "train-000001.tar").unlink()
    for check in (copy.verify, lambda: SplitReader(copy, "train")):
        with pytest.raises(DataError, match=r"train-000001.tar is listed in the manifest but missing"):
            check()


def test_a_truncated_shard_is_named_with_both_sizes(copy):
    shard = copy.splits["train"].shards[0]
    with (copy.folder / shard.name).open("r+b") as file:
        file.truncate(1000)
    for check in (copy.verify, lambda: SplitReader(copy, "train")):
        with pytest.raises(DataError, match=rf"{shard.name} has 1000 bytes, the manifest says {shard.n_bytes}"):
            check()


def test_another_tokenizer_is_refused(copy):
    with (copy.folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"tokenizer that does not match the manifest"):
        copy.verify(hashes=False)
    (copy.folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"does not match the manifest: found no file"):
        copy.verify_tokenizer()


@pytest.mark.parametrize("name", ["../train.tar", "/etc/passwd", "..", "a/b.tar", "a\\b.tar", "pipe:cat x", ""])
def test_names_that_leave_the_folder_are_refused(copy, name):
    edit_manifest(copy, lambda content: content["splits"]["train"]["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"splits.train.shards.0.name .*must be the plain name of a file"):
        Manifest.load(copy.folder)
    edit_manifest(copy, lambda content: content["tokenizer"].update(file=name))
    with pytest.raises(DataError, match=r"must be the plain name of a file"):
        Manifest.load(copy.folder)


def list_a_record_twice(content):
    """In place of the record after it, with sums that agree."""
    split = content["splits"]["train"]
    shard = split["shards"][0]
    first, second = shard["records"][:2]
    shard["records"][1] = first
    for counts in (shard, split):
        counts["n_tokens"] += first[1] - second[1]
        counts["n_documents"] += first[3] - second[3]
    del split["length_histogram"]


def list_a_copy(content):
    split = content["splits"]["train"]
    shard = {**split["shards"][0], "name": "copy.tar"}
    split["shards"].append(shard)
    split["n_tokens"] += shard["n_tokens"]
    split["n_documents"] += shard["n_documents"]
    del split["length_histogram"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), r"format_version = 2"),
        (lambda c: c.update(extra=1), r"extra = 1: Extra inputs are not permitted"),
        (lambda c: c.pop("eos_id"), r"eos_id: Field required"),
        (lambda c: c.update(eos_id="0"), r"eos_id = '0'"),
        (lambda c: c.update(eos_id=300), r"eos_id 300 must be below vocab_size 300"),
        (lambda c: c.update(dtype="uint32"), r"dtype uint32 does not fit vocab_size 300"),
        (lambda c: c["splits"].clear(), r"splits"),
        (lambda c: c["splits"]["train"].update(n_tokens=7), r"splits.train: .*n_tokens is 7 but its shards add up to"),
        (lambda c: c["splits"]["train"]["shards"][0].update(n_documents=9999), r"its records add up to"),
        (lambda c: c["splits"]["train"]["shards"][0].update(sha256="abc"), r"sha256 = 'abc'"),
        (lambda c: c["splits"]["train"]["shards"][0]["records"][0].__setitem__(0, 10**9), r"past the end of the shard"),
        (lambda c: c["splits"]["train"]["shards"][0]["records"][0].__setitem__(2, -1), r"records.0.2 = -1"),
        (lambda c: c["splits"]["train"]["shards"][0]["records"][0].__setitem__(0, 10**30), r"records.0.0"),
        (lambda c: c["splits"]["train"]["shards"][0]["records"][0].append(0), r"records.0"),
        (lambda c: c["splits"]["train"]["shards"][0]["records"][0].__setitem__(3, 5000), r"more documents than tokens"),
        (lambda c: c["splits"]["train"]["length_histogram"].extend([0] * 64), r"length_histogram: .* at most 64 items"),
        (lambda c: c["splits"]["train"]["shards"][0]["records"][0].__setitem__(2, 600), r"overlap .*, at byte 600"),
        (list_a_record_twice, r"shard train-000000.tar has records that overlap or are listed twice, at byte 512"),
        (list_a_copy, r"a shard is listed twice: two have one sha256"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused_with_the_field(copy, change, message):
    edit_manifest(copy, change)
    with pytest.raises(DataError, match=message):
        Manifest.load(copy.folder)


def test_a_shard_listed_twice_is_refused(copy):
    def repeat(content):
        split = content["splits"]["train"]
        shard = split["shards"][0]
        split["shards"].append(shard)
        split["n_tokens"] += shard["n_tokens"]
        split["n_documents"] += shard["n_documents"]
        del split["length_histogram"]

    edit_manifest(copy, repeat)
    with pytest.raises(DataError, match=r"a shard is listed twice"):
        Manifest.load(copy.folder)


def test_no_manifest_and_broken_json_are_refused(copy, tmp_path):
    with pytest.raises(DataError, match=r"does not exist: no data here, or its build was interrupted"):
        Manifest.load(tmp_path)
    copy.path.write_bytes(copy.path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"Invalid JSON"):
        Manifest.load(copy.folder)


def test_an_unknown_split_is_refused(small):
    with pytest.raises(DataError, match=r"has no split 'test', only heldout, train"):
        SplitReader(small, "test")


class Bomb:
    """Unpickling one raises: nothing may ever do so."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickled_array_in_a_shard_is_refused(copy):
    record = copy.splits["train"].shards[0].records[0]
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()] * record.n_tokens, dtype=object), allow_pickle=True)
    overwrite(copy, record.tokens_offset, buffer.getvalue())
    with pytest.raises(DataError, match=r"train-000000.tar, record at byte \d+, cannot be read: array of object"):
        SplitReader(copy, "train").documents(0)


@pytest.mark.parametrize(
    ("member", "skip", "data", "message"),
    [
        ("tokens", 0, b"garbage!", r"magic"),
        ("tokens", 6, b"\x02\x00", r"not an npy array of version 1.0"),
        ("tokens", 8, b"\xff\xff", r"cannot be read"),
        ("tokens", 10, b"{'descr': '<u4'", r"array of uint32"),
        ("tokens", 128, b"\xff\xff", r"token 65535 found, vocab_size is 300"),
        ("ends", 128, b"\x00" * 8, r"document ends must rise"),
        ("ends", 128, b"\x03" + b"\x00" * 7, r"document ends must rise"),
    ],
)
def test_damage_inside_a_record_is_found_at_the_read(copy, member, skip, data, message):
    record = copy.splits["train"].shards[0].records[0]
    offset = record.tokens_offset if member == "tokens" else record.ends_offset
    overwrite(copy, offset + skip, data)
    with pytest.raises(DataError, match=message):
        SplitReader(copy, "train").documents(0)


def test_a_document_without_eos_is_found_at_the_read(copy):
    record = copy.splits["train"].shards[0].records[0]
    overwrite(copy, record.tokens_offset + 128 + 2 * (record.n_tokens - 1), b"\x01\x00")
    with pytest.raises(DataError, match=r"record at byte 512, cannot be read: a document does not end with eos \(0\)"):
        SplitReader(copy, "train").documents(0)
