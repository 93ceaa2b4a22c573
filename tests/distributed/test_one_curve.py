"""One seed, one curve: losses, gradient norms and parameters of every layout equal the single process's."""

import pytest
import torch

from loopline.pretrain.checkpoint import find_latest, read_full
from tests.jobs import Job, run_job
from tests.tolerances import TOLERANCES, relative, rms_ratio

# (tp, pp, dp, zero) and what else is set.
LAYOUTS = [
    (2, 1, 1, 0, []),
    (1, 2, 1, 0, []),
    (1, 1, 2, 0, []),
    (1, 1, 2, 1, []),
    (2, 2, 1, 0, []),
    (1, 2, 2, 1, []),
    (2, 1, 2, 1, []),
    (1, 1, 2, 2, []),
    (1, 1, 2, 3, []),
    (1, 1, 1, 1, []),
    (2, 1, 1, 0, ["parallel.sequence_parallel=true"]),
    (2, 2, 1, 0, ["parallel.sequence_parallel=true", "parallel.recompute=all"]),
    (2, 1, 2, 3, ["parallel.sequence_parallel=true"]),
    (1, 1, 1, 0, ["parallel.recompute=all"]),
    (1, 2, 1, 0, ["parallel.recompute=loops:0,2"]),
    (1, 1, 2, 3, ["parallel.recompute=all"]),
    (1, 1, 1, 0, ["train.micro_batch_sequences=4"]),
    (1, 2, 1, 1, ["train.micro_batch_sequences=1"]),
]

# Other models: loop counts 1 and 2, updates, tying, sandwich norm, blocks that do not divide among stages.
VARIANTS = {
    "one_loop": ["model.n_loops=1"],
    "two_loops_ouro": ["model.n_loops=2", "model.update=norm", "model.norm=sandwich", "model.exit_gate=true"],
    "tied_replace": ["model.tie_embeddings=true", "model.update=replace"],
    "uneven": ["model.n_blocks=3", "model.n_loops=2", "model.pattern=full,gdn"],
    "tied_gate_odd_length": ["model.tie_embeddings=true", "train.seq_len=61"],
}
VARIANT_LAYOUTS = [(2, 1, 1, 0), (1, 2, 1, 1), (2, 2, 1, 0), (1, 1, 2, 3)]


def layout_overrides(tp: int, pp: int, zero: int) -> list[str]:
    return [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.zero_stage={zero}"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, data: str) -> Job:
    return run_job("debug", tmp_path_factory.mktemp("judge"), data)


def assert_same_curve(job: Job, judge: Job, dtype: str = "fp32") -> None:
    assert len(job.records) == len(judge.records)
    for key in ("loss", "grad_norm"):
        worst = max(relative(a, b) for a, b in zip(job.series(key), judge.series(key)))
        assert worst <= TOLERANCES[dtype, key], f"{key}: {worst:.1e}"


def final_weights(job: Job) -> dict[str, torch.Tensor]:
    path = find_latest(job.run_dir / "checkpoints")
    assert path is not None
    return read_full(path, "weight")


@pytest.mark.parametrize(("tp", "pp", "dp", "zero", "extra"), LAYOUTS, ids=str)
def test_layout_gives_the_single_process_curve(tp, pp, dp, zero, extra, judge, data, tmp_path):
    job = run_job("debug", tmp_path, data, *layout_overrides(tp, pp, zero), *extra, world_size=tp * pp * dp)
    assert_same_curve(job, judge)
    found, expected = final_weights(job), final_weights(judge)
    start = initial_weights()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        change = value - start[name]
        assert rms_ratio(found[name], value, change) <= TOLERANCES["fp32", "parameters"], name


def initial_weights() -> dict[str, torch.Tensor]:
    from loopline.models.init import init_weights
    from loopline.models.looped_lm import LoopedLM
    from loopline.pretrain.config import load_config

    config = load_config("debug")
    model = LoopedLM(config.model)
    init_weights(model, config.run.seed)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def variant_judges(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("variants")
    return {name: run_job("debug", root / name, data, "train.steps=4", *VARIANTS[name]) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("tp", "pp", "dp", "zero"), VARIANT_LAYOUTS, ids=str)
def test_other_models_keep_the_curve(name, tp, pp, dp, zero, variant_judges, data, tmp_path):
    overrides = [data, "train.steps=4", *VARIANTS[name], *layout_overrides(tp, pp, zero)]
    job = run_job("debug", tmp_path, *overrides, world_size=tp * pp * dp)
    assert_same_curve(job, variant_judges[name])


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "zero", "extra"),
    [
        (1, 1, 1, 0, []),
        (1, 1, 1, 0, ["train.micro_batch_sequences=8"]),
        (2, 1, 1, 0, ["parallel.sequence_parallel=true"]),
        (1, 2, 1, 1, []),
        (1, 1, 2, 3, []),
    ],
    ids=str,
)
def test_bf16_follows_the_fp32_curve_on_every_layout(tp, pp, dp, zero, extra, judge, data, tmp_path):
    overrides = [data, "train.dtype=bf16", *layout_overrides(tp, pp, zero), *extra]
    job = run_job("debug", tmp_path, *overrides, world_size=tp * pp * dp)
    assert_same_curve(job, judge, dtype="bf16")


def test_evaluation_is_the_same_on_every_layout(data, tmp_path):
    common = [data, "train.steps=2", "eval.every=2", "eval.batches=2"]
    judge = run_job("debug", tmp_path / "one", *common)
    for i, (tp, pp, dp, zero, extra) in enumerate(
        [
            (2, 1, 1, 0, ["parallel.sequence_parallel=true"]),
            (1, 2, 1, 0, []),
            (1, 1, 2, 3, []),
            (2, 2, 1, 0, ["parallel.sequence_parallel=true"]),
        ]
    ):
        job = run_job(
            "debug", tmp_path / str(i), *common, *layout_overrides(tp, pp, zero), *extra, world_size=tp * pp * dp
        )
        for key in ("loss_per_loop", "state_change_per_loop"):
            for found, expected in zip(job.records[-1][key], judge.records[-1][key], strict=True):
                assert relative(found, expected) <= TOLERANCES["fp32", "loss"], key
