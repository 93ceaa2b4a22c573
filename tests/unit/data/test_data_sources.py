"""Every kind of source: the same documents whole or in parts, the kind that was meant, refusals that name the row."""

import gzip
import io
import json
import os
import shutil
import struct
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.jsonl_source import JsonlSource
from loopline.data_pipeline.parts import Part
from loopline.data_pipeline.sources import FileSource, open_source
from loopline.data_pipeline.table_sources import HFDatasetSource, ParquetSource
from loopline.data_pipeline.tar_source import WebDatasetSource

FEW = settings(derandomize=True, deadline=None, max_examples=40)
TEXTS = [f"document {i} \u00e9\r\n" * (i % 7 + 1) for i in range(50)]


def rows(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def compress(path, data, kind):
    with pa.CompressedOutputStream(str(path), kind) as stream:
        stream.write(data)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_txt(folder):
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())


def write_jsonl(folder):
    (folder / "a.jsonl").write_bytes(rows(TEXTS[:30]))
    compress(folder / "b.jsonl.gz", rows(TEXTS[30:40]), "gzip")
    compress(folder / "c.jsonl.zst", rows(TEXTS[40:]), "zstd")


def write_parquet(folder):
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        table = pa.table({"n": range(len(texts)), "text": texts})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=4)


def write_dataset(folder):
    datasets.Dataset.from_dict({"n": range(len(TEXTS)), "text": TEXTS}).save_to_disk(folder, num_shards=3)


def write_tars(folder):
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        members = []
        for i, text in enumerate(texts):
            if i % 2:
                members += [(f"{i:03d}.json", json.dumps({"text": text}).encode()), (f"{i:03d}.jpg", b"picture")]
            else:
                members += [(f"{i:03d}.json", b"{}"), (f"{i:03d}.txt", text.encode())]
        write_tar(folder / f"{name}.tar", members)


KINDS = {
    "txt": (write_txt, FileSource),
    "jsonl": (write_jsonl, JsonlSource),
    "parquet": (write_parquet, ParquetSource),
    "datasets": (write_dataset, HFDatasetSource),
    "webdataset": (write_tars, WebDatasetSource),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_documents_in_order_whole_or_in_parts(kind, tmp_path):
    write, source_type = KINDS[kind]
    write(tmp_path)
    opened = open_source(tmp_path)
    assert type(opened) is source_type
    assert list(opened) == list(opened) == TEXTS
    for part_bytes in (1, 400, 2**30):
        source = source_type(tmp_path, part_bytes=part_bytes)
        parts = source.parts()
        assert [text for part in parts for text in source.read(part)] == TEXTS
        assert [list(source.read(part)) for part in reversed(parts)] == [list(source.read(part)) for part in parts][
            ::-1
        ]
        assert {path for part in parts for path in part.files} <= set(source.files)
        assert len(parts) > 1 or part_bytes == 2**30
    assert opened.describe() == source_type(tmp_path, part_bytes=7).describe()


@FEW
@given(
    lines=st.lists(
        st.sampled_from([b"", b" ", b'{"text": "a"}', b'{"text": "\\u00e9 b"}', b'{"text": ""}']), max_size=12
    ),
    is_ended=st.booleans(),
    part_bytes=st.integers(1, 40),
)
def test_jsonl_parts_hold_every_line_once_wherever_they_are_cut(tmp_path_factory, lines, is_ended, part_bytes):
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n" * is_ended)
    whole, cut = JsonlSource(file), JsonlSource(file, part_bytes=part_bytes)
    assert list(cut) == list(whole)
    assert cut.n_skipped == whole.n_skipped == lines.count(b'{"text": ""}')
    assert len(cut.parts()) == max(1, -(-file.stat().st_size // part_bytes))


@pytest.mark.parametrize("part_bytes", [1, 30, 2**20])
def test_a_bad_row_is_named_by_its_line_in_the_file_from_any_part(tmp_path, part_bytes):
    (tmp_path / "a.jsonl").write_bytes(rows(["x"] * 9) + b'{"txt": 1}\n' + rows(["y"]))
    with pytest.raises(DataError, match=r"a.jsonl:10: found keys \['txt'\]; .* under 'text'"):
        list(JsonlSource(tmp_path, part_bytes=part_bytes))


def test_half_a_surrogate_pair_is_refused_with_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: 'text' is not valid Unicode"):
        list(open_source(tmp_path))


@pytest.mark.parametrize(("ending", "kind"), [("gz", "gzip"), ("zst", "zstd")])
def test_damaged_compressed_files_are_refused_not_read_short(tmp_path, ending, kind):
    file = tmp_path / f"a.jsonl.{ending}"
    compress(file, rows(TEXTS * 50), kind)
    whole = file.read_bytes()
    assert list(open_source(file)) == TEXTS * 50
    file.write_bytes(whole + whole)  # both formats may be concatenated
    assert len(list(open_source(file))) == 2 * len(TEXTS * 50)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:3], b"", b"no " + kind.encode(), whole + b"tail"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a.jsonl.{ending} (cannot be read|is empty)"):
            list(open_source(file))


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("loopline.data_pipeline.jsonl_source.MAX_LINE_BYTES", 2**20)
    compress(tmp_path / "a.jsonl.zst", b"[" * (2**20 + 1), "zstd")
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 1000
    with pytest.raises(DataError, match=r"a line of more than 1048576 bytes"):
        list(open_source(tmp_path))


def test_gzip_of_any_name_is_jsonl_where_suffixes_say_so(tmp_path):
    (tmp_path / "c4.00.json.gz").write_bytes(gzip.compress(rows(["x", "y"])))
    assert list(open_source(tmp_path, suffixes=[".json.gz"])) == ["x", "y"]
    with pytest.raises(DataError, match=r"mix .json.gz with others"):
        open_source(tmp_path, suffixes=[".json.gz", ".txt"])


def test_sources_that_are_commands_or_addresses_are_refused():
    for spec in ("pipe:cat x", "https://example.org/a.jsonl", "s3://b/a.parquet"):
        with pytest.raises(DataError, match=r"is a command or an address"):
            open_source(spec)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2]), r"a.parquet has no string column 'text', only text \(int64\)"),
        (pa.array(["a", None]), r"a.parquet:1: found null"),
        (pa.array(["a"] * 700 + [None]), r"a.parquet:700: found null"),
        (pa.array([b"a", b"\xff"]).view(pa.string()), r"a.parquet:1: 'text' is not UTF-8"),
    ],
)
def test_bad_parquet_columns_and_rows_are_named(tmp_path, column, message):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=100)
    with pytest.raises(DataError, match=message):
        list(open_source(tmp_path))


def test_parquet_reads_the_named_column_and_large_and_dictionary_strings(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"body": pa.array(["x", " ", "y"]).cast(kind)}), tmp_path / "a.parquet")
        source = open_source(tmp_path / "a.parquet", field="body")
        assert list(source) == ["x", "y"]
        assert source.n_skipped == 1


def test_damaged_parquet_is_refused(tmp_path):
    write_parquet(tmp_path)
    file = tmp_path / "a.parquet"
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", b"PAR1" + bytes(100)):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.parquet cannot be read"):
            list(open_source(tmp_path))


def test_a_dataset_with_splits_asks_for_one_and_bad_ones_are_named(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["x", None], "n": [1, 2]})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds the splits test, train; .* such as .*both/test"):
        open_source(tmp_path / "both")
    with pytest.raises(DataError, match=r"both/train:1: found null"):
        list(open_source(tmp_path / "both" / "train"))
    with pytest.raises(DataError, match=r"no string column 'n', only text \(string\), n \(int64\)"):
        open_source(tmp_path / "both" / "train", field="n")
    state = tmp_path / "both" / "train" / "state.json"
    shutil.copy(tmp_path / "both" / "test" / "data-00000-of-00001.arrow", tmp_path / "outside.arrow")
    state.write_text(state.read_text().replace("data-00000-of-00001.arrow", "../../outside.arrow"))
    with pytest.raises(DataError, match=r"state.json lists the data file '../../outside.arrow'; data files lie in the"):
        open_source(tmp_path / "both" / "train")
    state.write_text("{}")
    with pytest.raises(DataError, match=r"both/train cannot be read"):
        open_source(tmp_path / "both" / "train")


def test_files_that_are_not_of_a_saved_data_set_change_nothing(tmp_path):
    write_dataset(tmp_path)
    before = open_source(tmp_path).describe()
    open_source(tmp_path)._open().map(lambda row: row, load_from_cache_file=False)
    (tmp_path / "cache-0123456789abcdef.arrow").write_bytes(b"of a map")
    assert open_source(tmp_path).describe() == before


def link(name):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.pkl", b"x")], r"a.tar: member 'a.pkl' holds a pickle"),
        ([("a.txt", b"x"), ("a.PICKLE", b"x")], r"member 'a.PICKLE' holds a pickle"),
        ([("a.pth", b"x")], r"member 'a.pth' holds a pickle"),
        ([("/a.txt", b"x")], r"member '/a.txt' points outside"),
        ([("b/../../a.txt", b"x")], r"points outside"),
        ([(link("a.txt"), b"")], r"member 'a.txt' is a link"),
        ([("a.txt", b"x"), ("a.txt", b"y")], r"member 'a.txt' comes twice"),
        ([("a.txt", b"x"), ("a.TXT", b"y")], r"member 'a.TXT' comes twice"),
        ([("a.v1.txt", b"x")], r"member 'a.v1.txt' is no document .* the part 'v1.txt' of sample 'a'. Rename it"),
        ([("d.e/a.txt", b"x"), ("d.e/a.V2.Txt", b"x")], r"member 'd.e/a.V2.Txt' is no document of its own"),
        ([("a.json", b"[1]")], r"a.tar:a.json: found a JSON list"),
        ([("a.json", b"{")], r"a.tar:a.json: not JSON"),
    ],
)
def test_tars_that_would_reach_out_or_hold_no_text_are_refused(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        list(open_source(tmp_path))


def test_tar_samples_without_text_are_skipped_and_counted(tmp_path):
    members = [("a.jpg", b"x"), ("b.txt", b" "), ("c.txt", b"\xff"), ("d/d.TXT", b"good"), ("d/._d.txt", b"hidden")]
    write_tar(tmp_path / "a.tar", [*members, ("e.JSON", b'{"text": "too"}')])
    source = open_source(tmp_path)
    assert list(source) == ["good", "too"]
    assert [(reason, n) for reason, n, _ in source.skips.facts] == [
        ("without a .txt or .json member", 1),
        ("without text", 1),
        ("not UTF-8", 1),
    ]
    assert source.n_skipped == 3


def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"abc"), ("b.txt", b"def")])
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    for size in (b"77777777777\0", b"\x80\0\0\0" + struct.pack(">Q", 2**62), b"\xff" + b"\xfe" * 11):
        header = bytearray(raw[1024:1536])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "a.tar").write_bytes(raw[:1024] + header + raw[1536:])
        with pytest.raises(DataError, match=r"a.tar(: member 'b.txt' claims| cannot be read|: bytes after)"):
            list(open_source(tmp_path))


@FEW
@given(where=st.integers(0, 6000))
def test_a_tar_cut_anywhere_is_refused_or_whole(tmp_path_factory, where):
    folder = tmp_path_factory.mktemp("tar")
    write_tar(folder / "a.tar", [(f"{i}.txt", b"x" * 700) for i in range(3)])
    with (folder / "a.tar").open("r+b") as file:
        file.truncate(where)
    # One block of the end mark is enough to know that nothing is missing.
    if where >= 3 * (512 + 1024) + 512:
        assert list(open_source(folder)) == ["x" * 700] * 3
    else:
        with pytest.raises(DataError, match=r"a.tar"):
            list(open_source(folder))


def test_a_damaged_header_in_the_middle_does_not_end_a_tar(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"abc"), ("b.txt", b"def"), ("c.txt", b"ghi")])
    with (tmp_path / "a.tar").open("r+b") as file:
        file.seek(1024)
        file.write(b"?" * 20)
    with pytest.raises(DataError, match=r"bytes after the last readable member at 1024"):
        list(open_source(tmp_path))


def test_a_folder_of_several_kinds_names_them_and_suffixes_choose(tmp_path):
    write_jsonl(tmp_path)
    write_parquet(tmp_path)
    with pytest.raises(DataError, match=r"both .jsonl and .jsonl.gz and .jsonl.zst and .parquet files; say which"):
        open_source(tmp_path)
    assert isinstance(open_source(tmp_path, suffixes=[".parquet"]), ParquetSource)
    assert len(open_source(tmp_path, suffixes=[".jsonl"]).files) == 1


def test_a_fifo_or_missing_file_is_refused_without_waiting(tmp_path):
    with pytest.raises(DataError, match=r"does not exist"):
        open_source(tmp_path / "a.jsonl")
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl is no file and no folder"):
        open_source(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl is no regular file \(a FIFO, socket or device\)"):
        open_source(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"a.jsonl is a link to nothing"):
        open_source(tmp_path)


def test_links_are_followed_and_a_folder_is_read_once(tmp_path):
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for folder, text in ((texts / "b", "second"), (elsewhere, "first")):
        folder.mkdir(parents=True)
        (folder / "1.txt").write_text(text)
    (texts / "a").symlink_to(elsewhere)
    (texts / "c.txt").symlink_to(elsewhere / "1.txt")
    assert list(open_source(texts)) == ["first", "second", "first"]
    for target in (elsewhere, texts, texts / "b"):
        (texts / "z").symlink_to(target)
        with pytest.raises(DataError, match=r"is the same folder as .*, by a link: .* read twice"):
            open_source(texts)
        (texts / "z").unlink()


def test_hidden_files_are_left_out_as_hidden_folders_are(tmp_path):
    (tmp_path / "._a.txt").write_text("of a Mac")
    (tmp_path / "a.txt").write_text("text")
    assert list(open_source(tmp_path)) == ["text"]
    assert list(open_source(tmp_path / "._a.txt")) == ["of a Mac"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scan = os.scandir

    def refuse(folder):  # root may read whatever its mode says
        if str(folder).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"inner cannot be read: Permission denied"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_above_the_limit_is_refused_by_name(kind, tmp_path):
    write, source_type = KINDS[kind]
    write(tmp_path)
    size = max(len(text.encode()) for text in TEXTS)
    assert list(open_source(tmp_path, max_document_bytes=size)) == TEXTS
    place = {"txt": r"013.txt", "jsonl": r"a.jsonl:14", "parquet": r"a.parquet:13", "datasets": r":13"}
    with pytest.raises(
        DataError, match=rf"{place.get(kind, '013.json')} is a document of {size} bytes, max_document_bytes"
    ):
        list(open_source(tmp_path, max_document_bytes=size - 1))
    with pytest.raises(DataError, match=r"max_document_bytes=0 must be 1 or more"):
        open_source(tmp_path, max_document_bytes=0)
    assert source_type(tmp_path).max_document_bytes == 16 * 2**20


def test_names_cannot_steer_the_terminal(tmp_path):
    write_tar(tmp_path / "a\x1b[2J.tar", [("b\x07\n.json", b"{")])
    with pytest.raises(DataError) as raised:
        list(open_source(tmp_path))
    assert r"a\x1b[2J.tar:b\x07\n.json: not JSON" in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_part_names_its_files_and_range(tmp_path):
    assert str(Part((tmp_path / "a", tmp_path / "b"))) == f"{tmp_path / 'a'} and 1 more"
    assert str(Part((tmp_path / "a",), 3, 5)) == f"{tmp_path / 'a'} [3:5]"
