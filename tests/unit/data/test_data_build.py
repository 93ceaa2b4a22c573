"""Text to shards: deterministic, readable by webdataset, lossless, and clear about bad input."""

import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import webdataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loopline.data_pipeline.build import build, build_bundled, wait_for_manifest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
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
        ('{"text": 3}', r"rows.jsonl:2: found keys"),
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
        with pytest.raises(DataError, match=r"gave no documents to train on \(1 empty or unreadable skipped\)"):
            build(FileSource(tmp_path), tmp_path / "out", heldout_fraction=0, **choice)
        assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_heldout_split_is_refused(small, tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(DataError, match=r"heldout_fraction=1e-09 of 1 documents left the held-out split empty"):
        build(FileSource(tmp_path), tmp_path / "out", tokenizer=TokenizerFile(small.folder), heldout_fraction=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"neither of tokenizer and vocab_size given"),
        ({"vocab_size": 257}, r"vocab_size=257 is too small.*at least 258"),
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
