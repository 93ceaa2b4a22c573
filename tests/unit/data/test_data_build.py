"""Text to shards: deterministic, readable by webdataset, lossless, and clear about bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import webdataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loopline.data_pipeline.build import build, build_bundled, wait_for_manifest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest, dtype_for
from loopline.data_pipeline.sources import FileSource, JsonlSource, StdlibSource, open_source
from loopline.data_pipeline.tokenizer import TokenizerFile, train_tokenizer
from loopline.data_pipeline.unigram import unigram_entropy

SMALL = {"vocab_size": 300, "heldout_fraction": 0.15, "record_tokens": 3000, "shard_bytes": 50_000}


def test_two_builds_give_the_same_bytes(small, source, tmp_path):
    build(source, tmp_path / "again", **SMALL)
    names = sorted(file.name for file in small.folder.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir())
    assert len(list(small.iter_shards())) > 2
    for name in names:
        assert (small.folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_build_does_not_depend_on_the_thread_count(small, text_folder, tmp_path):
    code = (
        "import sys; from loopline.data_pipeline.build import build; "
        "from loopline.data_pipeline.sources import FileSource; "
        f"build(FileSource(sys.argv[1], ('.py',)), sys.argv[2], **{SMALL})"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, text_folder, tmp_path / "one"], check=True, env=environment)
    assert small.path.read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()


def test_webdataset_reads_the_shards(small, all_documents):
    for name, split in small.splits.items():
        urls = [str(small.folder / shard.name) for shard in split.shards]
        documents = []
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            assert sample["tokens.npy"].dtype == np.uint16
            documents += np.split(sample["tokens.npy"], sample["ends.npy"][:-1])
        assert [tuple(document.tolist()) for document in documents] == all_documents(small, name)


def test_every_text_comes_back_from_the_shards(small, source, all_documents):
    tokenizer = TokenizerFile(small.folder)
    documents = all_documents(small, "train") + all_documents(small, "heldout")
    assert Counter(tokenizer.decode(document) for document in documents) == Counter(source)
    assert all(document.count(small.eos_id) == 1 and document[-1] == small.eos_id for document in documents)


def test_counts_match_the_shards(small, all_documents):
    for name, split in small.splits.items():
        documents = all_documents(small, name)
        assert (split.n_documents, split.n_tokens) == (len(documents), sum(map(len, documents)))
    assert small.splits["heldout"].n_documents > 0


def test_large_vocabularies_are_stored_as_uint32(save_documents, all_documents):
    assert [dtype_for(size) for size in (65_535, 65_536)] == ["uint16", "uint32"]
    manifest = save_documents([[70_000, 1], [2]], vocab_size=70_001)
    assert manifest.dtype == "uint32"
    assert all_documents(manifest) == [(70_000, 1, 0), (2, 0)]


def test_transformers_loads_the_tokenizer(small):
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = loader.from_pretrained(small.folder)
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
        text = "def f(x):\n    return x + 1  # é\n"
        assert tokenizer(text)["input_ids"] == TokenizerFile(small.folder).encode_batch([text])[0]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_text_that_spells_eos_does_not_end_a_document(small, tmp_path, all_documents):
    (tmp_path / "a.txt").write_text("before<|endoftext|>after")
    tokenizer = TokenizerFile(small.folder)
    manifest = build(FileSource(tmp_path / "a.txt"), tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0)
    [document] = all_documents(manifest)
    assert document.index(0) == len(document) - 1
    assert tokenizer.decode(document) == "before<|endoftext|>after"
    assert manifest.tokenizer.sha256 == small.tokenizer.sha256


def test_unigram_entropy_is_the_exact_entropy_of_the_labels(small, all_documents):
    labels = Counter(token for document in all_documents(small, "heldout") for token in document[1:])
    total = labels.total()
    expected = -sum(n / total * np.log(n / total) for n in labels.values())
    assert unigram_entropy(small) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < np.log(small.vocab_size)


def test_folder_order_is_by_relative_path_and_undecodable_files_are_counted(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    texts = {"b/1.txt": b"second", "a.txt": b"first", "c.txt": b"\xff\xfe", "d.txt": b" \n", ".git/x.txt": b"hidden"}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path)
    assert list(source) == ["first", "second"]
    assert source.n_skipped == 2


def test_jsonl_reads_the_named_field(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"body": "one"}\n\n{"body": ""}\n{"body": "two"}\n')
    source = open_source(file, field="body")
    assert isinstance(source, JsonlSource)
    assert list(source) == ["one", "two"]
    assert source.n_skipped == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{bad", r"rows.jsonl:2: not JSON"),
        ('{"txt": "x"}', r"rows.jsonl:2: found keys \['txt'\]; .* under 'text'"),
        ('["text"]', r"rows.jsonl:2: found a JSON list"),
        ('{"text": 3}', r"rows.jsonl:2: found a JSON int under 'text'; every row"),
        ('{"text": null}', r"rows.jsonl:2: found null under 'text'; every row"),
    ],
)
def test_bad_jsonl_rows_name_file_and_line(tmp_path, row, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n' + row + "\n")
    with pytest.raises(DataError, match=message):
        list(open_source(tmp_path))


def test_unclear_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"holds no file ending in .txt or .jsonl"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"ends in '.csv'"):
        open_source(tmp_path / "a.csv")
    assert list(open_source(tmp_path, suffixes=[".csv"])) == ["x"]
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"both .txt and .jsonl"):
        open_source(tmp_path)


def test_empty_input_leaves_no_manifest(small, tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    for choice in ({"vocab_size": 300}, {"tokenizer": TokenizerFile(small.folder)}):
        with pytest.raises(DataError, match=r"gave no documents to train on \(skipped: 1 without text \(.*a.txt\)\)"):
            build(FileSource(tmp_path), tmp_path / "out", heldout_fraction=0, **choice)
        assert not (tmp_path / "out" / "manifest.json").exists()


def latin_1_texts(folder, n, n_bad):
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:02d}.txt").write_bytes(f"caf\u00e9 number {i}".encode("latin-1" if i < n_bad else "utf-8"))
    return folder


@pytest.mark.parametrize("choice", ["train", "use"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_skipped_is_named_and_has_a_ceiling(small, tmp_path, caplog, choice, workers):
    source = FileSource(latin_1_texts(tmp_path / "texts", 60, 9), part_bytes=100)
    (tmp_path / "texts" / "59.txt").write_text("\n")  # holds nothing, so it does not count towards the ceiling
    chosen = {"vocab_size": 300} if choice == "train" else {"tokenizer": TokenizerFile(small.folder)}
    settings = {**chosen, "heldout_fraction": 0, "workers": workers}
    listed = r"9 not UTF-8 \(.*00.txt, .*01.txt, .*02.txt, ...\); 1 without text \(.*59.txt\)"
    with pytest.raises(DataError, match=rf"9 of 60 documents \(15.00%\) would be lost, .*=0.01 .* Skipped: {listed}"):
        build(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = build(source, tmp_path / "out", **settings, max_skipped_share=0.15)
    assert (manifest.splits["train"].n_documents, manifest.provenance.n_skipped) == (50, 10)
    assert re.search(rf"skipped 10 of 60 documents: {listed}", caplog.text)


def letters_tokenizer(folder, letters):
    """A BPE of single letters without unknown token and without byte fallback."""
    folder.mkdir()
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenizerFile(folder)


def test_documents_without_a_token_are_skipped_and_lost_text_is_told(tmp_path, all_documents, caplog):
    texts = ["abc", "\u00e9\u4e00", "ab\u4e00c", "\u4e8c"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    settings = {"tokenizer": letters_tokenizer(tmp_path / "abc", "abc"), "heldout_fraction": 0}
    with pytest.raises(
        DataError, match=r"2 of 4 documents .* lost, .* has no token \('\u00e9\u4e00' of .*txt.*, '\u4e8c' of .*\)"
    ):
        build(FileSource(tmp_path), tmp_path / "out", **settings)
    assert "has no token for some text of 3 of 4 sampled documents, first near '\u00e9\u4e00'" in caplog.text
    manifest = build(FileSource(tmp_path), tmp_path / "out", **settings, max_skipped_share=0.5)
    assert all_documents(manifest) == [(1, 2, 3, 0), (1, 2, 3, 0)]
    assert manifest.provenance.n_skipped == 2


def test_normalizers_that_change_text_lose_none_and_unknown_tokens_do(small, tmp_path):
    assert not TokenizerFile(small.folder).lost_text(["caf\u00e9 \u4e00\U0001f600 \x00\r\n"])
    folder = tmp_path / "words"
    folder.mkdir()
    words = Tokenizer(models.WordPiece({"<|endoftext|>": 0, "[UNK]": 1, "cafe": 2}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.save(str(folder / "tokenizer.json"))
    assert TokenizerFile(folder).lost_text([" CAF\u00c9\x07  cafe\u0301", "\u4e00 cafe"]) == ["\u4e00 cafe"]


def test_a_build_overwrites_nothing(small, tmp_path):
    texts = tmp_path / "texts"
    (texts / "inner").mkdir(parents=True)
    (texts / "inner" / "a.txt").write_text("some text")
    tokenizer = TokenizerFile(small.folder)
    for out in (texts, texts / "inner", tmp_path):
        with pytest.raises(DataError, match=r"cannot take the data set: the source is in it \(.*inner\). Choose"):
            build(FileSource(texts), out, tokenizer=tokenizer, heldout_fraction=0)
    assert [path.name for path in texts.rglob("*")] == ["inner", "a.txt"]
    for name in ("train-000000.tar", "heldout-9.tar", "tokenizer.json", "special_tokens_map.json", ".build/x"):
        out = tmp_path / "out" / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        (out / "README.md").write_text("not in the way")
        with pytest.raises(DataError, match=r"out/.* holds .*, which no build under way|folder of another program"):
            build(FileSource(texts), out, tokenizer=tokenizer, heldout_fraction=0)
        assert (out / name).read_text() == "mine"
    tars = tmp_path / "tars"
    tars.mkdir()
    shutil.copy(small.folder / "train-000000.tar", tars)
    with pytest.raises(DataError, match=r"the source is in it"):
        build(open_source(tars), tars, tokenizer=tokenizer)


def test_a_source_path_that_is_not_utf_8_is_recorded_readably(small, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    build(FileSource(folder), tmp_path / "out", tokenizer=TokenizerFile(small.folder), heldout_fraction=0)
    assert Manifest.load(tmp_path / "out").provenance.source["path"] == f"{tmp_path}/caf\\xe9"


def test_an_empty_heldout_split_is_refused(small, tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(DataError, match=r"heldout_fraction=1e-09 of 1 documents left the held-out split empty"):
        build(FileSource(tmp_path), tmp_path / "out", tokenizer=TokenizerFile(small.folder), heldout_fraction=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"neither of tokenizer and vocab_size given"),
        ({"vocab_size": 257}, r"vocab_size=257 is too small.*at least 258"),
        ({"vocab_size": 99_999_999_999}, r"vocab_size=99999999999 is too large: use at most 16777216"),
        ({"vocab_size": 300, "max_skipped_share": 1.5}, r"max_skipped_share=1.5 must be from 0 to 1"),
        ({"vocab_size": 300, "heldout_fraction": 1}, r"heldout_fraction=1 must be at least 0 and below 1"),
        ({"vocab_size": 300, "record_tokens": 0}, r"record_tokens=0 must be 1 or more"),
        ({"vocab_size": 300, "shard_bytes": -1}, r"shard_bytes=-1 must be 1 or more"),
    ],
)
def test_bad_settings_are_refused(source, tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        build(source, tmp_path / "out", **settings)


def test_rebuilding_reuses_equal_settings_and_refuses_others(small, source):
    before = small.path.stat().st_mtime_ns
    assert build(source, small.folder, **SMALL) == small
    assert small.path.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"holds other data: seed 0 \(now 5\)"):
        build(source, small.folder, **SMALL, seed=5)


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        TokenizerFile(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read"):
        TokenizerFile(tmp_path)
    train_tokenizer(["some text, some text"], tmp_path, vocab_size=258)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match=r"has no end-of-text token"):
        TokenizerFile(tmp_path)


def test_stdlib_source_leaves_out_tests_and_installed_packages():
    source = StdlibSource()
    parts = {part for file in source.files for part in file.relative_to(source.path).parts}
    assert not parts & {"test", "tests", "site-packages", "__pycache__", "idlelib", "lib2to3"}
    assert 300 < len(source.files) < 1000
    assert source.describe()["n_bytes"] > 5_000_000


def test_processes_that_race_to_build_a_bundled_corpus_share_one(tmp_path):
    code = (
        "import sys; from loopline.data_pipeline.build import build_bundled; "
        "print(build_bundled('stdlib', sys.argv[1], 300))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    manifest = wait_for_manifest(tmp_path / "stdlib-bpe300", timeout_s=60)
    printed = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert printed == {str(manifest.path)}
    assert [file.name for file in tmp_path.iterdir()] == ["stdlib-bpe300"]
    manifest.verify()
    assert build_bundled("stdlib", tmp_path, 300) == manifest.path


def test_unknown_bundled_corpora_and_broken_caches_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"bundled corpus 'wiki' does not exist; use one of stdlib"):
        build_bundled("wiki", tmp_path)
    (tmp_path / "stdlib-bpe4096").mkdir()
    (tmp_path / "stdlib-bpe4096" / "left-over").touch()
    with pytest.raises(DataError, match=r"build was interrupted"):
        build_bundled("stdlib", tmp_path)


def test_waiting_for_a_manifest_times_out_with_the_cause(tmp_path):
    with pytest.raises(DataError, match=r"no .*manifest.json after 0.1 s: the rank that builds the data failed"):
        wait_for_manifest(tmp_path, timeout_s=0.1)


def test_manifest_keeps_one_record_per_line(small):
    lines = small.path.read_text().splitlines()
    n_records = sum(split.n_records for split in small.splits.values())
    assert sum(line.strip().startswith("[") and line.strip().rstrip(",").endswith("]") for line in lines) == n_records
    assert Manifest.load(small.folder) == small
    assert json.loads(small.path.read_text())["format_version"] == 1


def test_an_interrupted_build_leaves_no_manifest_and_can_be_repeated(small, source, tmp_path):
    class Interrupted(FileSource):
        def read(self, part):
            if part != self.parts()[3]:
                return super().read(part)
            raise KeyboardInterrupt

    tokenizer = TokenizerFile(small.folder)
    settings = {"tokenizer": tokenizer, "record_tokens": 3000, "shard_bytes": 50_000}
    with pytest.raises(KeyboardInterrupt):
        build(Interrupted(source.path, source.suffixes, part_bytes=20_000), tmp_path, **settings)
    assert [path.name for path in tmp_path.iterdir()] == [".build"]
    with pytest.raises(DataError, match=r"build was interrupted"):
        Manifest.load(tmp_path)
    build(source, tmp_path, **settings).verify()


def test_the_package_imports_without_torch():
    code = (
        "import sys, pkgutil, importlib, loopline.data_pipeline as package\n"
        "names = [module.name for module in pkgutil.iter_modules(package.__path__)]\n"
        "[importlib.import_module(f'loopline.data_pipeline.{name}') for name in names]\n"
        "assert len(names) > 8 and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
