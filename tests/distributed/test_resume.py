"""Killed and continued: the uninterrupted curve, bit for bit on one layout, to the tolerance on another."""

import json
import shutil
import signal
import sysconfig
from pathlib import Path

import pytest
import torch

from loopline.data_pipeline.build import build
from loopline.data_pipeline.sources import open_source
from loopline.pretrain.checkpoint import find_latest, read_full
from tests.jobs import Job, run_job
from tests.tolerances import TOLERANCES, relative

LAYOUTS = {
    "single": [],
    "tp2_sp": ["parallel.tp=2", "parallel.sequence_parallel=true"],
    "pp2_zero1": ["parallel.pp=2", "parallel.zero_stage=1"],
    "zero1": ["parallel.zero_stage=1"],
    "zero2": ["parallel.zero_stage=2"],
    "zero3": ["parallel.zero_stage=3"],
    "tp2_pp2": ["parallel.tp=2", "parallel.pp=2"],
    "tp2_zero1": ["parallel.tp=2", "parallel.zero_stage=1"],
}
WORLD = {"single": 1, "tp2_pp2": 4, "tp2_zero1": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, Job]:
    """Uninterrupted runs, by layout."""
    root = tmp_path_factory.mktemp("whole")
    return {name: start(name, root / name, data) for name in ("single", "tp2_sp", "pp2_zero1", "zero3")}


def start(layout: str, run_dir: Path, data: str, *extra: str, **kwargs) -> Job:
    return run_job("debug", run_dir, data, *LAYOUTS[layout], *extra, world_size=WORLD.get(layout, 2), **kwargs)


@pytest.mark.parametrize("layout", ["single", "tp2_sp", "pp2_zero1", "zero3"])
def test_kill_and_resume_on_the_same_layout_is_bit_identical(layout, whole, data, tmp_path):
    killed = start(layout, tmp_path, data, expect=None, kill_when=tmp_path / "checkpoints" / "latest")
    assert -signal.SIGKILL in killed.status
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None
    assert latest.name == "step_00000005"
    resumed = start(layout, tmp_path, data)
    assert resumed.series("step") == list(range(1, 11))
    for key in ("loss", "grad_norm", "tokens"):
        assert resumed.series(key) == whole[layout].series(key), key
    final, expected = (read_full(find_latest(j.run_dir / "checkpoints"), "exp_avg") for j in (resumed, whole[layout]))
    assert all(torch.equal(final[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single", "tp2_pp2"),
        ("tp2_pp2", "zero3"),
        ("zero3", "pp2_zero1"),
        ("pp2_zero1", "zero2"),
        ("zero2", "tp2_sp"),
        ("tp2_sp", "zero1"),
        ("zero1", "tp2_zero1"),
        ("tp2_zero1", "single"),
    ],
)
def test_kill_and_resume_on_another_layout_keeps_the_curve(before, after, whole, data, tmp_path):
    start(before, tmp_path, data, expect=None, kill_when=tmp_path / "checkpoints" / "latest")
    resumed = start(after, tmp_path, data)
    assert resumed.series("step") == list(range(1, 11))
    assert resumed.series("tokens") == whole["single"].series("tokens")
    for key in ("loss", "grad_norm"):
        worst = max(relative(a, b) for a, b in zip(resumed.series(key), whole["single"].series(key), strict=True))
        assert worst <= TOLERANCES["fp32", key], f"{key}: {worst:.1e}"


def test_sizes_that_zero3_pads_survive_a_resume(data, tmp_path):
    """Three heads and 61 channels on two ranks: nothing divides."""
    odd = ["model.gdn.n_heads=3", "model.d_ffn=61", "model.full.n_heads=4", "train.steps=6", "checkpoint.every=3"]
    expected = start("single", tmp_path / "one", data, *odd)
    start("zero3", tmp_path / "two", data, *odd, "train.stop_at_step=3")
    resumed = start("zero3", tmp_path / "two", data, *odd)
    worst = max(relative(a, b) for a, b in zip(resumed.series("loss"), expected.series("loss"), strict=True))
    assert worst <= TOLERANCES["fp32", "loss"]


def test_stop_at_step_leaves_the_schedule_alone(whole, data, tmp_path):
    start("single", tmp_path, data, "train.stop_at_step=3")
    assert start("single", tmp_path, data, "train.stop_at_step=7").series("step")[-1] == 7
    assert start("single", tmp_path, data).series("loss") == whole["single"].series("loss")


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files of the standard library: a few thousand tokens, so that a run passes through several epochs."""
    folder = tmp_path_factory.mktemp("small")
    texts = folder / "texts"
    texts.mkdir()
    for name in ["abc", "bisect", "colorsys", "copyreg", "fnmatch", "heapq", "keyword", "linecache", "opcode", "sched"]:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", texts)
    source = open_source(str(texts), suffixes=(".py",))
    return build(source, folder / "corpus", vocab_size=512, record_tokens=256, heldout_fraction=0).path


def test_a_second_epoch_resumes_in_place(small_corpus, tmp_path):
    corpus = [f"data.manifest={small_corpus}", "model.vocab_size=512", "train.seq_len=256", "train.steps=24"]
    corpus += ["checkpoint.every=0", "data.shuffle_records=1"]
    expected = run_job("debug", tmp_path / "one", *corpus)
    epochs = expected.series("epoch")
    assert epochs[-1] >= 2
    stop = epochs.index(1) + 2
    run_job("debug", tmp_path / "two", *corpus, f"train.stop_at_step={stop}")
    zero1 = ["parallel.zero_stage=1"]
    resumed = run_job("debug", tmp_path / "two", *corpus, *zero1, world_size=2)
    for key in ("tokens", "epoch"):
        assert resumed.series(key) == expected.series(key)
    worst = max(relative(a, b) for a, b in zip(resumed.series("loss"), expected.series("loss"), strict=True))
    assert worst <= TOLERANCES["fp32", "loss"]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(whole, data, tmp_path):
    shutil.copytree(whole["single"].run_dir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000010"
    shard = next(newest.glob("*.safetensors"))
    with shard.open("r+b") as f:
        f.seek(-8, 2)
        f.write(b"\xff" * 8)
    resumed = start("single", tmp_path / "run", data)
    assert "sha256 differs" in resumed.output[0]
    assert resumed.series("loss") == whole["single"].series("loss")


def test_a_save_cut_short_leaves_the_last_good_checkpoint(whole, data, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole["single"].run_dir, run_dir)
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "step_00000010").rename(checkpoints / ".writing_step_00000010")
    assert find_latest(checkpoints).name == "step_00000005"
    assert start("single", run_dir, data).series("loss") == whole["single"].series("loss")


def test_only_the_newest_checkpoints_are_kept(data, tmp_path):
    job = start("single", tmp_path, data, "train.steps=6", "checkpoint.every=1", "checkpoint.keep=3")
    kept = sorted(f.name for f in (job.run_dir / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000005", "step_00000006"]
    assert json.loads((job.run_dir / "checkpoints" / "latest").read_text()) == kept[-1]


def test_init_from_takes_weights_and_starts_a_new_run(whole, data, tmp_path):
    source = find_latest(whole["single"].run_dir / "checkpoints")
    job = start("tp2_sp", tmp_path, data, f"checkpoint.init_from={source}", "train.steps=1")
    assert job.series("step") == [1]
    fresh = whole["single"].series("loss")[0]
    assert abs(job.series("loss")[0] - fresh) > 1e-4  # trained weights, same first batch


def test_pruning_spares_the_new_checkpoint_and_a_users_copy(data, tmp_path):
    """Falling back past damaged checkpoints must not make the next save look old."""
    start("single", tmp_path, data, "train.steps=4", "checkpoint.every=1", "checkpoint.keep=4")
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "step_00000001", checkpoints / "step_00000001_best")
    for name in ("step_00000003", "step_00000004"):
        shard = next((checkpoints / name).glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-8] + b"\xff" * 8)
    again = ["train.steps=4", "train.stop_at_step=3", "checkpoint.every=1", "checkpoint.keep=1"]
    start("single", tmp_path, data, *again)
    names = sorted(f.name for f in checkpoints.iterdir() if f.is_dir())
    assert names == ["damaged_step_00000003", "damaged_step_00000004", "step_00000001_best", "step_00000003"]
    assert start("single", tmp_path, data, "train.steps=4").series("step") == [1, 2, 3, 4]


def test_init_from_takes_a_run_folder(whole, data, tmp_path):
    source = f"checkpoint.init_from={whole['single'].run_dir}"
    assert start("single", tmp_path, data, source, "train.steps=1").series("step") == [1]
