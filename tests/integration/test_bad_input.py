"""What users get wrong: one message with field, value, rule and fix, status 2, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loopline.pretrain.checkpoint import resolve
from tests.jobs import Job, run_job


def loopline(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loopline.pretrain.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *phrases: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for phrase in phrases:
        assert phrase in done.stderr, done.stderr


# Overrides, world size, and what the message must say.
BAD_CONFIGS = [
    (["train.stpes=3"], 1, ["train.stpes", "did you mean train.steps"]),
    (["modle.n_loops=3"], 1, ["modle", "did you mean model"]),
    (["train.steps=many"], 1, ["train.steps", "'many'", "integer"]),
    (["model.pattern=gdn*4,ful"], 1, ["model.pattern", "'ful'", "known: full, window, gdn"]),
    (["parallel.tp=3"], 3, ["model.full.n_heads = 4", "divisible by parallel.tp = 3"]),
    (["parallel.tp=2", "model.d_ffn=175"], 2, ["model.d_ffn = 175", "divisible by parallel.tp = 2", "change one"]),
    (["train.micro_batch_sequences=3"], 1, ["train.global_batch_sequences = 8", "multiple of", "= 3 * 1 = 3"]),
    (["parallel.pp=2", "train.micro_batch_sequences=8"], 2, ["1 micro-batches", "multiple of parallel.pp = 2"]),
    (["data.lanes=4"], 8, ["data.lanes = 4", "multiple of the data-parallel size 8"]),
    (["data.lanes=3"], 1, ["train.global_batch_sequences = 8", "multiple of data.lanes = 3"]),
    (["parallel.zero_stage=2", "parallel.pp=2"], 2, ["parallel.zero_stage = 2", "parallel.pp = 2", "use zero_stage 0"]),
    (["parallel.pp=3"], 3, ["parallel.pp = 3", "model.n_blocks = 2", "lower pp"]),
    (["parallel.tp=2"], 3, ["does not divide the world size 3", "launch a multiple of 2"]),
    (["parallel.sequence_parallel=true"], 1, ["needs parallel.tp > 1"]),
    (["model.gdn.backend=fla"], 1, ["'fla' is not available on cpu", "available: reference"]),
    (["model.nsa.backend=fla"], 1, ["model.nsa.backend = 'fla'", "'auto' or 'reference'"]),
    (
        ["model.pattern=kda", "model.kda.backend=fla"],
        1,
        ["model.kda.backend = 'fla'", "on cpu", "available: reference"],
    ),
    (
        ["model.pattern=kda", "model.kda.d_head_k=512"],
        1,
        ["model.kda.d_head_k (512)", "at most 256", "model.kda.backend = 'auto'"],
    ),
    (["model.pattern=dsa", "model.dsa.selection_loops=[0,3]"], 1, ["selection_loops = [0, 3]", "model.n_loops = 3"]),
    (
        ["model.pattern=mamba2", "model.mamba2.n_groups=4", "parallel.tp=8", "model.mamba2.n_heads=8"],
        8,
        ["model.mamba2.n_groups = 4", "divisible by parallel.tp = 8"],
    ),
    (["model.pattern=window", "model.window.window=1"], 1, ["model.window.window = 1", "greater than or equal to 2"]),
    (["model.d_model=66"], 1, ["model.d_model (66)", "model.full.n_heads (4)"]),
    (["data.manifest=/nowhere/manifest.json"], 1, ["/nowhere/manifest.json", "does not exist", "loopline data build"]),
    (["data.manifest=bundled:stdlb"], 1, ["stdlb", "stdlib"]),
    (["data.lanes=512", "train.global_batch_sequences=512"], 1, ["too few documents", "data.lanes"]),
    (["checkpoint.init_from=/nowhere"], 1, ["/nowhere", "does not exist", "run folder"]),
    (["train.device=cuda"], 1, ["train.device = 'cuda'", "no CUDA device", "'cpu'"]),
    (
        ["optimizer.schedule=wsd", "optimizer.warmup_steps=9"],
        1,
        ["optimizer.warmup_steps = 9 and 2 steps of decay", "train.steps = 10"],
    ),
    (["parallel.recompute=loops:9"], 1, ["parallel.recompute = 'loops:9'", "loops 0..2"]),
]


@pytest.mark.parametrize(("overrides", "world_size", "phrases"), BAD_CONFIGS, ids=lambda value: str(value)[:60])
def test_a_bad_setting_is_refused_before_anything_is_written(overrides, world_size, phrases, data, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [x for override in [f"run.dir={run_dir}", data, *overrides] for x in ("--set", override)]
    # RANK and WORLD_SIZE as torchrun would set them, and no rendezvous: reaching for a group would fail otherwise.
    done = loopline("train", "debug", *arguments, RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    assert_refused(done, *phrases)
    assert not run_dir.exists()


def test_several_problems_are_named_at_once_and_once(data):
    done = loopline("train", "debug", "--set", "parallel.tp=3", "--set", "data.lanes=3", WORLD_SIZE="3")
    assert_refused(done, "model.d_ffn = 176", "data.lanes = 3")
    assert done.stderr.count("model.d_ffn = 176") == 1


@pytest.mark.parametrize("recipe", ["debgu", "missing.toml"])
def test_an_unknown_recipe_lists_the_shipped_ones(recipe):
    assert_refused(loopline("train", recipe), recipe, "quickstart")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: str) -> Job:
    return run_job("debug", tmp_path_factory.mktemp("trained"), data, "train.steps=2", "train.stop_at_step=1")


@pytest.fixture
def run_copy(trained: Job, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.run_dir, tmp_path / "run"))


def train_again(run_dir: Path, data: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = [f"run.dir={run_dir}", data, "train.steps=2", *overrides]
    return loopline("train", "debug", *[x for setting in settings for x in ("--set", setting)])


def only_checkpoint(run_dir: Path) -> Path:
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    return checkpoint


def test_a_truncated_checkpoint_is_refused(run_copy, data):
    shard = next(only_checkpoint(run_copy).glob("*.safetensors"))
    with shard.open("r+b") as f:
        f.truncate(1000)
    assert_refused(train_again(run_copy, data), shard.name, "1000 bytes", "truncated", "restore")


def test_a_checkpoint_with_a_flipped_byte_is_refused(run_copy, data):
    shard = next(only_checkpoint(run_copy).glob("*.safetensors"))
    with shard.open("r+b") as f:
        f.seek(-4, 2)
        f.write(b"\x01\x02\x03\x04")
    assert_refused(train_again(run_copy, data), shard.name, "sha256 differs")


def test_a_foreign_checkpoint_is_refused(run_copy, data):
    (only_checkpoint(run_copy) / "manifest.json").write_text(json.dumps({"format": "megatron"}))
    assert_refused(train_again(run_copy, data), "format is 'megatron'", "loopline-checkpoint-1", "import hf")


@pytest.mark.parametrize(
    ("override", "phrase"),
    [
        ("model.n_loops=2", "model.n_loops was 3, is 2"),
        ("model.pattern=full", "model.pattern was 'gdn,full', is 'full'"),
        ("run.seed=7", "run.seed was 0, is 7"),
        ("data.lanes=8", "data.lanes was 4, is 8"),
        ("data.shuffle=shards", "data.shuffle was 'records', is 'shards'"),
        ("train.seq_len=32", "train.seq_len was 64, is 32"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(override, phrase, trained, data):
    before = (trained.run_dir / "metrics.jsonl").read_bytes()
    assert_refused(train_again(trained.run_dir, data, override), phrase, "checkpoint.init_from")
    assert (trained.run_dir / "metrics.jsonl").read_bytes() == before


def test_init_from_another_architecture_names_the_tensor(trained, data, tmp_path):
    source = only_checkpoint(trained.run_dir)
    overrides = [f"checkpoint.init_from={source}", "model.d_ffn=64"]
    assert_refused(train_again(tmp_path / "new", data, *overrides), "weight/blocks.0.ffn", "another architecture")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"format": "loopline-checkpoint-1"}'])
def test_a_checkpoint_with_broken_json_is_refused(content, run_copy, data):
    (only_checkpoint(run_copy) / "manifest.json").write_text(content)
    assert_refused(train_again(run_copy, data), "manifest.json")


def test_a_run_folder_that_is_a_file_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(train_again(tmp_path / "file" / "run", data), "run.dir", "is a file")


def test_a_machine_without_git_trains(data, tmp_path):
    settings = [f"run.dir={tmp_path / 'run'}", data, "train.steps=1"]
    done = loopline("train", "debug", *[x for setting in settings for x in ("--set", setting)], PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["git_commit"] is None


@pytest.fixture
def corpus_copy(cache_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_dir / "stdlib-bpe4096", tmp_path / "corpus"))


def train_on(corpus: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    settings = [f"run.dir={run_dir}", f"data.manifest={corpus / 'manifest.json'}", "train.steps=1"]
    done = loopline("train", "debug", *[x for setting in settings for x in ("--set", setting)])
    assert not run_dir.exists()
    return done


def test_an_edited_shard_is_refused_by_its_hash(corpus_copy, tmp_path):
    shard = next(corpus_copy.glob("*.tar"))
    with shard.open("r+b") as f:
        f.seek(5000)
        f.write(b"\xff\xff")
    assert_refused(train_on(corpus_copy, tmp_path / "run"), shard.name, "sha256")


def test_a_missing_shard_is_refused(corpus_copy, tmp_path):
    shard = next(corpus_copy.glob("*.tar"))
    shard.unlink()
    assert_refused(train_on(corpus_copy, tmp_path / "run"), shard.name)


def test_another_tokenizer_than_the_manifests_is_refused(corpus_copy, tmp_path):
    file = corpus_copy / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert_refused(train_on(corpus_copy, tmp_path / "run"), "tokenizer.json", "sha256")


def test_empty_input_is_refused_and_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "corpus"
    assert_refused(loopline("data", "build", str(tmp_path / "empty"), str(out), "--vocab-size", "300"), "no file")
    assert not (out / "manifest.json").exists()


def test_a_vocabulary_smaller_than_the_corpus_is_refused(cache_dir, tmp_path):
    manifest = cache_dir / "stdlib-bpe4096" / "manifest.json"
    settings = [f"run.dir={tmp_path / 'run'}", f"data.manifest={manifest}", "model.vocab_size=512"]
    done = loopline("train", "debug", *[x for setting in settings for x in ("--set", setting)])
    assert_refused(done, "model.vocab_size = 512", "4096")


def test_an_existing_export_folder_is_refused(trained, tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    assert_refused(loopline("export", "hf", str(trained.run_dir), str(out)), "exists")
    assert list(out.iterdir()) == []


def test_a_run_and_its_newest_checkpoint_are_found_by_every_name_they_have(run_copy):
    newest = run_copy / "checkpoints" / "step_00000001"
    for where in (run_copy, run_copy / "checkpoints", run_copy / "checkpoints" / "latest", newest):
        assert resolve(str(where)) == newest


def test_eval_and_export_of_nothing_are_refused(tmp_path):
    assert_refused(loopline("eval", str(tmp_path / "none")), "does not exist")
    assert_refused(loopline("eval", str(tmp_path)), "no checkpoint")
    assert_refused(loopline("import", "hf", str(tmp_path), str(tmp_path / "out")), "config.json")
    assert_refused(loopline("generate", str(tmp_path), "--prompt", "x"), "config.json")
