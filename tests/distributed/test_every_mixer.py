"""Every mixer trains, and trains alike on every layout."""

import pytest
import torch

from loopline.models.config import MIXERS
from loopline.pretrain.checkpoint import read_full
from tests.distributed.test_one_curve import assert_same_curve, layout_overrides
from tests.jobs import Job, run_job

RECIPES = {mixer: "debug" if mixer in ("full", "gdn") else f"debug_{mixer}" for mixer in MIXERS}
OTHERS = [mixer for mixer in MIXERS if mixer not in ("full", "gdn")]  # test_one_curve has those two everywhere
LAYOUTS = [
    (2, 1, 1, 0, ["parallel.sequence_parallel=true"]),
    (2, 2, 1, 1, ["parallel.recompute=all"]),
]  # ZeRO 3 below, where unlike mixers stand in one model
# Mixers of unlike cost, alone and mixed, unevenly over stages; what a loop leaves for the next stays on its stage.
MIXTURE = [
    'model.pattern=["dsa","mamba2","kda","window","hgrn2"]',
    "model.n_blocks=5",
    "model.n_loops=2",
    "model.dsa.n_kv_heads=2",
    "model.dsa.top_k=8",
    "model.dsa.selection_loops=[0]",
    "model.dsa.selection_tile=4",
    "model.window.window=9",
    "model.kda.d_head_k=8",
    "model.kda.d_head_v=8",
]


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, Job]:
    """Four steps of every mixer in one process."""
    root = tmp_path_factory.mktemp("mixers")
    return {name: run_job(RECIPES[name], root / name, data, "train.steps=4") for name in OTHERS}


@pytest.mark.parametrize(("tp", "pp", "dp", "zero", "extra"), LAYOUTS, ids=str)
@pytest.mark.parametrize("mixer", OTHERS)
def test_layout_gives_the_single_process_curve(mixer, tp, pp, dp, zero, extra, judges, data, tmp_path):
    overrides = [data, "train.steps=4", *layout_overrides(tp, pp, zero), *extra]
    job = run_job(RECIPES[mixer], tmp_path, *overrides, world_size=tp * pp * dp)
    assert_same_curve(job, judges[mixer])


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_short_run_lowers_the_loss(mixer, data, tmp_path):
    """The recipe as it ships, at ten times its rate; full attention and Gated DeltaNet, which share one, alone."""
    alone = [f"model.pattern={mixer}"] if mixer not in OTHERS else []
    losses = run_job(RECIPES[mixer], tmp_path, data, "optimizer.lr=3e-3", "train.steps=24", *alone).series("loss")
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert first > 8  # ln 4096 = 8.3
    assert last < first - 1, (first, last)  # measured 1.5 to 2.3


def test_unlike_mixers_in_one_model_keep_the_curve_on_every_cut(data, tmp_path):
    common = [data, "train.steps=4", "train.global_batch_sequences=12", "train.micro_batch_sequences=1", *MIXTURE]
    judge = run_job("debug", tmp_path / "one", *common)
    for tp, pp, dp, zero in [(1, 2, 1, 0), (1, 3, 1, 1), (2, 2, 1, 0), (1, 1, 2, 3)]:
        folder = tmp_path / f"{tp}{pp}{dp}"
        layout = [*layout_overrides(tp, pp, zero), "parallel.recompute=loops:1"]
        job = run_job("debug", folder, *common, *layout, world_size=tp * pp * dp)
        assert_same_curve(job, judge)


@pytest.mark.parametrize(("tp", "pp", "dp", "zero"), [(2, 1, 1, 0), (1, 2, 1, 1), (1, 1, 2, 2)], ids=str)
def test_figures_of_mixers_are_those_of_the_single_process(tp, pp, dp, zero, data, tmp_path):
    common = [data, "train.steps=2", "eval.every=1", "eval.batches=1", "model.dsa.selection_loops=none"]
    judge = run_job("debug_dsa", tmp_path / "one", *common)
    overrides = [*common, *layout_overrides(tp, pp, zero)]
    job = run_job("debug_dsa", tmp_path / "many", *overrides, world_size=tp * pp * dp)
    for name in ("indexer_loss", "selection_overlap", "indexer_recall"):
        assert judge.series(name) == pytest.approx(job.series(name), rel=1e-5)
        assert all(0 < value < 1 for value in judge.series(name)), name


def test_warm_up_trains_the_indexer_alone_and_raises_its_recall(data, tmp_path):
    """The two stages: attention takes shape while dense, then only the indexer learns to find what it attends to."""
    common = [data, "model.dsa.index_loss=dense", "model.dsa.selection_loops=none", "model.dsa.top_k=4"]
    common += ["model.dsa.index_d_head=32", "model.dsa.index_n_heads=4", "model.dsa.index_d_rope=32"]
    first = [*common, "train.steps=150", "optimizer.lr=3e-3", "model.dsa.index_loss_weight=1e-9"]
    start = run_job("debug_dsa", tmp_path / "start", *first)
    path = start.run_dir / "checkpoints" / "step_00000150"
    second = [*common, "train.steps=80", "optimizer.lr=1e-2", "optimizer.warmup_steps=0", "eval.every=8"]
    second += ["eval.batches=1", "train.trainable=indexer", f"checkpoint.init_from={path}"]
    job = run_job("debug_dsa", tmp_path / "warm-up", *second)
    recall = [record["indexer_recall"] for record in job.records if "indexer_recall" in record]
    loss = job.series("indexer_loss")
    assert recall[-1] > recall[0] + 0.04, recall  # measured 0.786 to 0.862
    assert sum(loss[-8:]) < 0.7 * sum(loss[:8]), loss
    before, after = (
        read_full(run.run_dir / "checkpoints" / name, "weight")
        for run, name in ((start, "step_00000150"), (job, "step_00000080"))
    )
    for name in before:
        assert torch.equal(before[name], after[name]) == (".index_" not in name), name


def test_warm_up_is_the_same_over_ranks(data, tmp_path):
    common = [data, "train.trainable=indexer", "model.dsa.index_loss=dense", "train.steps=4"]
    judge = run_job("debug_dsa", tmp_path / "one", *common)
    for tp, dp, zero in [(2, 1, 0), (1, 2, 0), (1, 2, 1), (1, 2, 3)]:
        folder = tmp_path / f"{tp}{dp}{zero}"
        job = run_job("debug_dsa", folder, *common, *layout_overrides(tp, 1, zero), world_size=tp * dp)
        assert_same_curve(job, judge)
