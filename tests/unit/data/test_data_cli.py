"""`loopline data` as a user calls it: build, import-megatron, inspect, verify, digest; and the tokenizers they take."""

import json
import shutil
import subprocess
import sys

import faulty_server as faulty
import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from loopline.data_pipeline.digest import stream_digest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.inspection import length_histogram
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.tokenizer import TokenizerFile
from loopline.pretrain.cli import main
from loopline.pretrain.config import load_config
from loopline.pretrain.corpus import open_data
from loopline.pretrain.train import open_stream


@pytest.fixture
def run(capsys):
    """Runs one command; returns (exit status, stdout, stderr)."""

    def run(*arguments):
        status = main(["data", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_build_inspect_and_verify_agree(run, text_folder, small, tmp_path):
    options = ["--vocab-size", 300, "--heldout-fraction", 0.15, "--record-tokens", 3000, "--shard-bytes", 50_000]
    status, built, _ = run("build", text_folder, tmp_path / "out", "--suffixes", ".py", "--workers", 2, *options)
    assert status == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() == small.path.read_bytes()

    status, text, _ = run("build", text_folder, tmp_path / "out", "--suffixes", ".py", *options)
    assert (status, text) == (0, f"already there, built from the same source with the same settings\n{built}")

    status, text, _ = run("inspect", tmp_path / "out" / "manifest.json", "--samples", 2)
    assert status == 0
    train = small.splits["train"]
    assert f"train: {train.n_documents:,} documents, {train.n_tokens:,} tokens" in text
    assert f"train: {train.n_documents:,} documents" in built
    assert small.tokenizer.sha256 in text
    assert text.count("[record ") == 4
    assert "import" in text
    assert f"{max(train.length_histogram):,}  {'#' * 40}" in text

    status, text, _ = run("verify", tmp_path / "out")
    assert (status, text.endswith("all as built\n")) == (0, True)


def test_verify_names_the_shard_that_changed(run, copy):
    path = copy.folder / "train-000001.tar"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    status, _, problem = run("verify", copy.path)
    assert status == 2
    assert "train-000001.tar is not the one that was built" in problem
    assert run("inspect", copy.path, "--samples", 0)[0] == 0  # reads no shard


def test_inspect_reads_older_manifests_and_keeps_text_from_steering_the_terminal(run, copy, small, save_documents):
    facts = json.loads(copy.path.read_text())
    del facts["splits"]["train"]["length_histogram"]
    copy.path.write_text(json.dumps(facts))
    assert length_histogram(Manifest.load(copy.path), "train") == small.splits["train"].length_histogram
    escape = TokenizerFile(small.folder).encode_batch(["\x1b[2Jred"])[0]
    _, text, _ = run("inspect", save_documents([escape]).path, "--samples", 9)
    assert "'\\x1b[2Jred'" in text
    assert "\x1b" not in text
    assert text.count("[record ") == 2


def test_mistakes_end_with_one_message_and_status_2(run, tmp_path, small):
    (tmp_path / "a.txt").write_text("text")
    for arguments, message in [
        (("build", tmp_path / "none", tmp_path / "out", "--vocab-size", 300), "none does not exist"),
        (("build", "pipe:ls", tmp_path / "out", "--vocab-size", 300), "is a command or an address"),
        (("build", tmp_path, tmp_path / "o", "--vocab-size", 300, "--workers", -1), "workers=-1 must be 0 or more"),
        (("build", tmp_path, tmp_path / "o", "--vocab-size", 300, "--max-document-bytes", 3), "of 4 bytes"),
        (("build", tmp_path, tmp_path / "o", "--vocab-size", 300, "--max-skipped-share", 2), "must be from 0 to 1"),
        (("build", tmp_path, tmp_path / "a.txt" / "o", "--vocab-size", 300), "Not a directory"),
        (("inspect", tmp_path), "manifest.json does not exist"),
        (("inspect", small.path, "--samples", -1), "--samples is -1"),
        (("verify", tmp_path), "manifest.json does not exist"),
        (("import-megatron", tmp_path / "x", tmp_path / "o", "--tokenizer", small.folder), "x.idx does not exist"),
    ]:
        status, _, problem = run(*arguments)
        assert status == 2, arguments
        assert message in problem


def test_a_build_says_what_it_skipped(run, tmp_path, caplog):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(b"text" if i else b"\xff")
    options = ("--vocab-size", 300, "--heldout-fraction", 0, "--workers", 0)
    status, _, problem = run("build", tmp_path, tmp_path / "out", *options)
    assert status == 2
    assert "1 of 4 documents (25.00%) would be lost" in problem
    status, text, _ = run("build", tmp_path, tmp_path / "out", *options, "--max-skipped-share", 0.25)
    assert (status, "skipped: 1 of 4 documents\n" in text) == (0, True)
    assert f"skipped 1 of 4 documents: 1 not UTF-8 ({tmp_path / '0.txt'})" in caplog.text


def test_import_megatron_writes_a_data_set(run, small, all_documents, tmp_path):
    builder = IndexedDatasetBuilder(f"{tmp_path / 'm'}.bin", dtype=np.uint16)
    for i in range(20):
        builder.add_item(torch.tensor([i + 1, 2, 3]))
        builder.end_document()
    builder.finalize(f"{tmp_path / 'm'}.idx")
    options = ["--tokenizer", small.folder, "--eos-id", 1, "--heldout-fraction", 0]
    status, text, _ = run("import-megatron", tmp_path / "m", tmp_path / "out", *options)
    assert (status, "train: 20 documents, 80 tokens, 1 shards" in text) == (0, True)
    assert all_documents(Manifest.load(tmp_path / "out"))[0] == (1, 2, 3, 1)
    assert run("verify", tmp_path / "out")[0] == 0


def test_a_tokenizer_in_another_format_is_converted_and_encodes_alike(small, tmp_path):
    model = json.loads((small.folder / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    converted = TokenizerFile(folder)
    original = TokenizerFile(small.folder)
    texts = ["def f(x):\n    return x", "caf\u00e9 <|endoftext|>"]
    assert converted.encode_batch(texts) == original.encode_batch(texts)
    assert converted.eos_id == original.eos_id
    copied = converted.copy_to(tmp_path / "copied")
    assert (copied.sha256, copied.eos_id) == (converted.sha256, converted.eos_id)
    assert TokenizerFile(folder).sha256 == converted.sha256
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "copied")
    assert loaded(texts[0])["input_ids"] == converted.encode_batch(texts[:1])[0]


def test_a_tokenizer_that_needs_its_own_code_is_refused_without_running_it(tmp_path):
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "tokenization_custom.py").write_text("raise SystemExit('its code was run')\n")
    facts = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["tokenization_custom.Custom", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"custom cannot be converted .*; save it with"):
        TokenizerFile(folder)


def test_saved_transformers_tokenizers_work_from_folder_and_file(small, tmp_path):
    backend = Tokenizer.from_file(str(small.folder / "tokenizer.json"))
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|pad|>")
    saved.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert TokenizerFile(path).eos_id == 1
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "other.json")
    assert TokenizerFile(tmp_path / "other.json").sha256 == TokenizerFile(tmp_path).sha256


@pytest.fixture
def mixed_recipe(save_documents, tmp_path):
    """A recipe of two corpora whose weights change at step 3."""
    web = save_documents([[10 + i] * (3 + i % 5) for i in range(30)])
    code = save_documents([[90 + i] * (4 + i % 3) for i in range(30)])
    path = tmp_path / "mixed.toml"
    path.write_text(f"""
base = "debug"
[run]
seed = 3
[train]
seq_len = 8
global_batch_sequences = 8
[data]
manifest = ""
[[data.sources]]
name = "web"
manifest = "{web.path}"
weight = 0.75
[[data.sources]]
name = "code"
manifest = "{code.path}"
weight = 0.25
max_epochs = 2
[[data.schedule]]
step = 3
weights = {{ web = 0.5, code = 0.5 }}
""")
    return path


def test_the_digest_of_a_recipe_is_that_of_what_its_run_reads(run, mixed_recipe):
    config = load_config(str(mixed_recipe))
    expected = stream_digest([open_stream(config, open_data(config, 0), 0, 1, None)], 6)
    for layout in ([], ["--dp", 4], ["--dp", 2, "--workers", 1], ["--set", "data.workers=1"]):
        status, found, _ = run("digest", "--recipe", mixed_recipe, "--batches", 6, *layout)
        assert (status, found) == (0, f"{expected}\n"), layout
    for change in ("data.temperature=2", "data.schedule=[]", "run.seed=4", "train.seq_len=9", "data.packing=best_fit"):
        status, found, _ = run("digest", "--recipe", mixed_recipe, "--batches", 6, "--set", change)
        assert status == 0
        assert found != f"{expected}\n", change


def test_a_recipe_and_a_manifest_have_one_digest(run, small):
    fields = {"run.seed": 5, "train.seq_len": 32, "data.lanes": 2, "train.global_batch_sequences": 4}
    changes = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    options = ["--seed", 5, "--seq-len", 32, "--lanes", 2, "--global-batch-sequences", 4]
    of_recipe = run("digest", "--recipe", "debug", "--set", f"data.manifest={small.path}", *changes)
    assert of_recipe == run("digest", small.path, *options)
    assert of_recipe[0] == 0


def test_a_digest_of_both_or_of_neither_is_refused(run, small, mixed_recipe):
    for arguments, message in [
        ((), "give either a manifest or --recipe"),
        ((small.path, "--recipe", mixed_recipe), "give either a manifest or --recipe"),
        ((small.path, "--set", "run.seed=1"), "none is given: name it by --recipe"),
        (("--recipe", mixed_recipe, "--seed", 1, "--seq-len", 4), "--seed, --seq-len with --recipe: change the recipe"),
        (("--recipe", mixed_recipe, "--dp", 3), "must be a multiple of dp_size=3"),
        (("--recipe", mixed_recipe, "--dp", 0), "--dp is 0"),
        (("--recipe", mixed_recipe, "--set", "data.sede=1"), "unknown key data.sede"),
        (("--recipe", "debugg"), "unknown recipe 'debugg'"),
    ]:
        status, _, problem = run("digest", *arguments)
        assert status == 2, arguments
        assert message in problem


def test_corpora_at_a_url_are_inspected_verified_and_hashed(run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # shards are kept in ./data
    with faulty.serving(small.folder) as server:
        status, text, _ = run("verify", server.url)
        assert (status, text.endswith("all as built\n")) == (0, True)
        assert text.startswith(f"{server.url}/manifest.json: ")
        remote, local = (run("inspect", place)[1].splitlines() for place in (server.url, small.path))
        assert (remote[0].partition(": ")[0], remote[1:]) == (f"{server.url}/manifest.json", local[1:])
        assert run("digest", server.url)[:2] == run("digest", small.path)[:2]


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_output_nobody_reads_any_longer_ends_without_a_traceback(small, flags):
    process = subprocess.Popen(
        [sys.executable, *flags, "-m", "loopline.pretrain.cli", "data", "inspect", small.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
