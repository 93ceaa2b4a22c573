"""A run over a mixture that is stopped and continued, on other ranks and workers and with a source more, is one run."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loopline.data_pipeline.build import build
from loopline.data_pipeline.digest import batch_digest
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.mixture import Mixture
from loopline.data_pipeline.sources import open_source
from loopline.data_pipeline.tokenizer import TokenizerFile
from loopline.pretrain.checkpoint import RunState, check, resolve
from loopline.pretrain.config import RunConfig
from loopline.pretrain.corpus import open_data
from loopline.pretrain.train import open_stream
from tests.jobs import Job, run_job
from tests.tolerances import TOLERANCES, relative

N_STEPS, CHANGE, STOP = 15, 4, 6  # weights change, and the third source joins, after CHANGE steps
SEQ_LEN, N_LANES, N_SEQUENCES = 64, 4, 8
RECIPE = [
    "model.vocab_size=512",
    f"train.seq_len={SEQ_LEN}",
    f"train.global_batch_sequences={N_SEQUENCES}",
    f"train.steps={N_STEPS}",
    "checkpoint.every=0",
    f"data.lanes={N_LANES}",
    "data.shuffle_records=2",
    "data.manifest=''",
]
# `rare` is small enough to be read up in a few steps.
FILES = {"web": ["heapq", "sched"], "code": ["cmd", "code", "codeop"], "rare": ["bisect"]}
EARLY, LATE = {"web": 3, "code": 1, "rare": 0}, {"web": 1, "code": 1, "rare": 6}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Paragraphs of standard-library files."""
    folder, manifests = tmp_path_factory.mktemp("corpora"), {}
    for name, files in FILES.items():
        texts = [(Path(sysconfig.get_path("stdlib")) / f"{file}.py").read_text(encoding="utf-8") for file in files]
        rows = [json.dumps({"text": paragraph}) for text in texts for paragraph in text.split("\n\n")]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        first = manifests.get("web")
        manifests[name] = build(
            open_source(str(folder / f"{name}.jsonl")),
            folder / name,
            vocab_size=None if first else 512,
            tokenizer=TokenizerFile(first.folder) if first else None,
            record_tokens=64,
            heldout_fraction=0,
        )
    return manifests


def mixture(corpora: dict[str, Manifest], *names: str) -> list[str]:
    """Overrides that name the sources; from step CHANGE on with other weights."""
    limits = {"rare": ", max_epochs=1"}
    sources = ", ".join(
        f"{{name='{name}', manifest='{corpora[name].path}', weight={EARLY[name]}{limits.get(name, '')}}}"
        for name in names
    )
    weights = ", ".join(f"{name} = {LATE[name]}" for name in names)
    return [f"data.sources=[{sources}]", f"data.schedule=[{{step={CHANGE}, weights={{{weights}}}}}]"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpora: dict[str, Manifest]) -> Job:
    return run_job("debug", tmp_path_factory.mktemp("whole"), *RECIPE, *mixture(corpora, *FILES))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, corpora: dict[str, Manifest]) -> tuple[Job, list[RunState]]:
    """The same run in three: without `rare` as long as it rests, then on two ranks, then with other workers."""
    run_dir, states = tmp_path_factory.mktemp("parts"), []
    for names, stop, world_size, workers in [
        (("web", "code"), CHANGE, 1, 0),
        (tuple(FILES), STOP, 2, 1),
        (tuple(FILES), N_STEPS, 1, 2),
    ]:
        settings = [*mixture(corpora, *names), f"data.workers={workers}", f"train.stop_at_step={stop}"]
        job = run_job("debug", run_dir, *RECIPE, *settings, world_size=world_size)
        states.append(state_of(job))
    return job, states


@dataclass(frozen=True)
class Step:
    """What the uninterrupted stream gives: a hash of the global batch, the lanes' states after it."""

    digest: str
    lanes: list[dict[str, Any]]


@pytest.fixture(scope="module")
def reading(whole: Job) -> list[Step]:
    stream = open_stream(*open_mixture(whole), 0, 1, None)
    return [Step(batch_digest([next(stream)]), list(stream.state_dict().values())) for _ in range(N_STEPS)]


def open_mixture(job: Job) -> tuple[RunConfig, Manifest | Mixture]:
    config = RunConfig.model_validate(state_of(job).config)
    return config, open_data(config, 0)


def state_of(job: Job) -> RunState:
    return check(resolve(str(job.run_dir)), hashes=True)


def test_the_parts_train_as_the_whole(whole, parts):
    job, states = parts
    assert [state.step for state in states] == [CHANGE, STOP, N_STEPS]
    assert job.series("step") == list(range(1, N_STEPS + 1))
    assert job.series("tokens") == whole.series("tokens")
    for key in ("loss", "grad_norm"):
        worst = max(relative(a, b) for a, b in zip(job.series(key), whole.series(key), strict=True))
        assert worst <= TOLERANCES["fp32", key], f"{key}: {worst:.1e}"
    assert state_of(whole).lanes == states[-1].lanes


def test_every_checkpoint_goes_on_with_the_batches_of_the_whole(whole, parts, reading):
    config, data = open_mixture(whole)
    for state in parts[1][:-1]:
        ranks = [open_stream(config, data, rank, 2, state.lanes, step=state.step) for rank in range(2)]
        for step in range(state.step, N_STEPS):
            assert batch_digest([next(rank) for rank in ranks]) == reading[step].digest, step
    assert json.loads(json.dumps(reading[-1].lanes)) == [state for _, state in sorted(state_of(whole).lanes.items())]


def test_the_mix_that_is_logged_is_the_weights_to_a_sequence_a_lane(whole, parts, reading):
    has_ended = [[bool(list(lane["sources"].values())[2]["ended_after"]) for lane in step.lanes] for step in reading]
    assert not any(has_ended[CHANGE])
    assert not all(has_ended[STOP])
    assert all(has_ended[-2])  # the others share the weight of `rare`
    for step, (ended, expected, found) in enumerate(zip(has_ended, whole.records, parts[0].records)):
        weights = EARLY if step < CHANGE else LATE | ({"rare": 0} if all(ended) else {})
        n_tokens = sum(source["tokens"] for lane in reading[step].lanes for source in lane["sources"].values())
        for name, weight in weights.items():
            assert found.get(f"mix/{name}", 0) == expected[f"mix/{name}"]
            if all(ended) or not any(ended):
                share = weight / sum(weights.values())
                assert abs(expected[f"mix/{name}"] - share) * n_tokens < N_LANES * SEQ_LEN, (step, name)


def test_a_run_that_its_sources_do_not_last_is_refused_before_a_step(corpora, tmp_path):
    settings = [*mixture(corpora, "web", "rare"), f"data.schedule=[{{step={CHANGE}, weights={{web = 0, rare = 1}}}}]"]
    job = run_job("debug", tmp_path, *RECIPE, *settings, expect=2)
    assert "data.sources run out in lane" in job.output[0]
    assert f"from step {CHANGE} on rare" in job.output[0]
    assert not (tmp_path / "metrics.jsonl").exists()
