"""Checkpoints without a layout: canonical names, full tensors, safetensors files, JSON beside them. Nothing is pickled.

    checkpoints/step_00000050/
        shard-*.safetensors   weights and Adam moments, written by torch.distributed.checkpoint
        state.json            step, tokens, lanes, data identity, resolved config
        manifest.json         every file's size and sha256; written last
    checkpoints/latest        name of the newest complete one

A checkpoint is written aside and renamed, so an interrupted save leaves the last good one in place.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Shard

from loopline.data_pipeline.mixture import is_extension
from loopline.models.config import ModelConfig
from loopline.models.looped_lm import LoopedLM
from loopline.models.settings.section import Section
from loopline.pretrain.config import RunConfig
from loopline.pretrain.errors import CheckpointError
from loopline.pretrain.optimizer import MOMENTS
from loopline.pretrain.parallel.gradients import is_second_copy
from loopline.pretrain.parallel.topology import Topology
from loopline.pretrain.step import Stepper

FORMAT = "loopline-checkpoint-1"
NAME = re.compile(r"step_\d{8,}")
SectionT = TypeVar("SectionT", bound=Section)
log = logging.getLogger(__name__)
# A single process saves and loads without process groups on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class RunState(Section):
    """Everything but tensors.

    Attributes:
        step: training steps done.
        updates: those that changed the weights; a step that is not finite is skipped.
        tokens: valid tokens trained on.
        lanes: position of every lane of the stream.
        data: sha256 of the corpus the lanes point into.
        config: the resolved config of the run that saved.
    """

    format: str = FORMAT
    step: int
    updates: int
    tokens: int
    lanes: dict[str, Any]
    data: str
    config: dict[str, Any]


# ---- saving ----------------------------------------------------------------------------------------------------------


def save(folder: Path, state: RunState, stepper: Stepper, keep: int) -> Path:
    """Write a checkpoint of the whole job under `folder`; every rank calls it.

    Args:
        folder: the run's `checkpoints` folder, on storage every rank sees.
        state: the same on every rank.
        keep: complete checkpoints to leave, newest first.
    Returns:
        The checkpoint's folder.
    """
    topology = stepper.topology
    final = folder / f"step_{state.step:08d}"
    aside = folder / f".writing_{final.name}"
    if topology.is_main:
        for leftover in folder.glob(".writing_*"):  # of a save that was cut short
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    topology.barrier()
    part = _collect(stepper)
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    dcp.save(part, storage_writer=writer, no_dist=topology.world_size == 1)
    names = topology.gather(dict.fromkeys(part))
    topology.barrier()
    if topology.is_main:
        missing = names.keys() - stored_shapes(aside).keys()
        if missing:
            raise CheckpointError(
                f"{aside}: {len(missing)} tensors are not on disk after saving ({sorted(missing)[0]} ..): run.dir must "
                "be storage that every rank sees"
            )
        _seal(aside, final, state)
        _write_json(folder / "latest", final.name)
        for old in [path for path in complete(folder) if path.name < final.name][keep - 1 :]:
            shutil.rmtree(old)
    topology.barrier()
    return final


def save_weights(folder: Path, weights: dict[str, Tensor], state: RunState) -> Path:
    """Write full weights by canonical name, from one process, as a checkpoint a run can start from."""
    final = folder / f"step_{state.step:08d}"
    if final.exists():
        raise CheckpointError(f"{final} exists: choose another folder, or remove it first")
    aside = folder / f".writing_{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    dcp.save({f"weight/{n}": w.contiguous() for n, w in weights.items()}, storage_writer=writer, no_dist=True)
    _seal(aside, final, state)
    _write_json(folder / "latest", final.name)
    return final


def _seal(aside: Path, final: Path, state: RunState) -> None:
    """Write the JSON beside the tensors, flush everything, and give the folder its name."""
    _write_json(aside / "state.json", state.model_dump(mode="json"))
    files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(aside.iterdir())}
    _write_json(aside / "manifest.json", {"format": FORMAT, "files": files})
    for file in aside.iterdir():
        _fsync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    _fsync(final.parent)


def _collect(stepper: Stepper) -> dict[str, Tensor]:
    """This rank's part of the state: full tensors, or shards over the tensor group, on the CPU."""
    part: dict[str, Tensor] = {}
    topology = stepper.topology
    for name, parameter in stepper.optimizer.parameters.items():
        tensors = stepper.optimizer.collect(name)
        if tensors is None or is_second_copy(stepper.model, topology, name):
            continue
        for kind, value in tensors.items():
            # A clone, because a parameter may be a view into a larger buffer, which safetensors would refuse.
            local = value.detach().to("cpu", copy=True).contiguous()
            part[f"{kind}/{name}"] = _as_shard(local, parameter, topology)
    return part


def _as_shard(local: Tensor, parameter: Tensor, topology: Topology) -> Tensor:
    """A cut parameter as a DTensor over the tensor group; a replicated one as it is (saved once)."""
    if not hasattr(parameter, "shard"):
        return local
    assert topology.tp_mesh is not None
    return DTensor.from_local(local, topology.tp_mesh, [Shard(parameter.shard[0])], run_check=False)


# ---- finding and checking --------------------------------------------------------------------------------------------


def find_latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole by names and sizes; None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged. A run never starts over by itself.
    """
    candidates = complete(folder)
    problems = []
    for candidate in candidates:
        try:
            check(candidate, hashes=False)
        except CheckpointError as error:
            problems.append(str(error))
            log.warning("skipping a damaged checkpoint: %s", error)
        else:
            return candidate
    if problems:
        raise CheckpointError(
            "every checkpoint of this run is damaged; restore one or choose another run.dir:\n  - "
            + "\n  - ".join(problems)
        )
    return None


def complete(folder: Path) -> list[Path]:
    """Checkpoints under their final names, newest first. Other names, such as a user's copies, are left alone."""
    if not folder.is_dir():
        return []
    return sorted((f for f in folder.iterdir() if f.is_dir() and NAME.fullmatch(f.name)), reverse=True)


def resolve(where: str) -> Path:
    """A checkpoint's folder, from itself; or the newest, from its run's folder, `checkpoints` or `checkpoints/latest`.

    Raises:
        CheckpointError: none is there.
    """
    path = Path(where)
    if path.name == "latest" and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(f"{where} does not exist: give a run folder or one of its checkpoints/step_* folders")
    if (path / "manifest.json").exists():
        return path
    latest = find_latest(path if path.name == "checkpoints" else path / "checkpoints")
    if latest is None:
        raise CheckpointError(f"{where} holds no checkpoint: train first, or give a checkpoints/step_* folder")
    return latest


def set_aside_after(checkpoint: Path) -> None:
    """Rename the damaged checkpoints newer than the one a run continues from, so that none is taken for good later."""
    for path in complete(checkpoint.parent):
        if path.name > checkpoint.name:
            target = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def check(checkpoint: Path, *, hashes: bool) -> RunState:
    """Read a checkpoint's JSON and hold its files to its manifest.

    Raises:
        CheckpointError: missing, foreign, truncated or altered; the message names the file.
    """
    raw = _read_json(checkpoint / "manifest.json")
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{checkpoint / 'manifest.json'}: format is {found!r}, expected {FORMAT!r}: this is not a checkpoint of "
            "this system; import Hugging Face models with `loopline import hf`"
        )
    for name, file_entry in _validated(_FileList, raw, checkpoint / "manifest.json").files.items():
        entry = file_entry.model_dump()
        file = checkpoint / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{checkpoint}: {name} is listed in manifest.json and missing; restore it")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, expected {entry['bytes']}: truncated or altered; restore it"
            )
        if hashes and _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: sha256 differs from manifest.json: altered on disk; restore it")
    state = _validated(RunState, _read_json(checkpoint / "state.json"), checkpoint / "state.json")
    _validated(RunConfig, state.config, checkpoint / "state.json")
    return state


def check_fits(checkpoint: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint whose tensors are not those of `model`; reads headers only.

    Raises:
        CheckpointError: the first tensor that differs, with both shapes.
    """
    with torch.device("meta"):
        wanted = {f"weight/{n}": list(p.shape) for n, p in LoopedLM(model).named_parameters()}
    stored = {key: shape for key, shape in stored_shapes(checkpoint).items() if key.startswith("weight/")}
    for key in sorted(wanted.keys() | stored.keys()):
        if wanted.get(key) != stored.get(key):
            raise CheckpointError(
                f"{checkpoint}: {key} has shape {stored.get(key, 'nothing')}, this model wants "
                f"{wanted.get(key, 'nothing')}: the checkpoint is of another architecture"
            )


class _FileEntry(Section):
    bytes: int
    sha256: str


class _FileList(Section):
    format: str
    files: dict[str, _FileEntry]


def _validated(schema: type[SectionT], raw: Any, file: Path) -> SectionT:
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{file}: {where or 'content'}: {first['msg']}: damaged, or written by another version; restore it"
        ) from None


def check_belongs(state: RunState, config: RunConfig, data: str, where: Path) -> None:
    """Refuse to continue a run with another architecture or another stream of data.

    Raises:
        CheckpointError: each field that differs, with both values.
    """
    saved = RunConfig.model_validate(state.config)
    problems = _differences("model", saved.model.model_dump(), config.model.model_dump())
    for path in (
        "run.seed",
        "train.seq_len",
        "train.global_batch_sequences",
        "train.trainable",
        "data.lanes",
        "data.shuffle_records",
        "data.shuffle",
        "data.packing",
    ):
        section, field = path.split(".")
        was, now = getattr(getattr(saved, section), field), getattr(getattr(config, section), field)
        if was != now:
            problems.append(f"{path} was {was!r}, is {now!r}")
    if not is_extension(state.data, data):
        was, now = ("+".join(f"{part[:12]}.." for part in each.split("+")) for each in (state.data, data))
        rule = "; a source that is no longer wanted stays listed with weight 0" if "+" in state.data else ""
        problems.append(f"data.manifest, data.sources: the corpus's content was {was}, is {now}{rule}")
    if problems:
        raise CheckpointError(
            f"{where} belongs to another run; set these back, or start a new run.dir with "
            f"checkpoint.init_from={where}:\n  - " + "\n  - ".join(problems)
        )


def _differences(path: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, dict):
        return [d for key in was for d in _differences(f"{path}.{key}", was[key], now[key]) if key != "backend"]
    return [] if was == now else [f"{path} was {was!r}, is {now!r}"]


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_weights(checkpoint: Path, model: LoopedLM, topology: Topology) -> None:
    """Fill every parameter of this rank's part of the model, whatever layout saved it.

    Raises:
        CheckpointError: a name is missing or a shape differs.
    """
    targets = dict(model.named_parameters())
    values = _load(checkpoint, {f"weight/{model.stored_name(n)}": p for n, p in targets.items()}, topology)
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(values[f"weight/{model.stored_name(name)}"])


def load_moments(checkpoint: Path, stepper: Stepper, updates: int) -> None:
    """Put Adam's moments back, after `updates` updates, whatever layout saved them."""
    # Under ZeRO 3 parameters are emptied after wrapping, so shapes come from what was recorded before.
    model, shapes = stepper.model, stepper.parameter_shapes
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in stepper.optimizer.parameters}
    for key in MOMENTS:
        wanted = {f"{key}/{model.stored_name(n)}": shapes[n] for n in moments}
        values = _load(checkpoint, wanted, stepper.topology)
        for name in moments:
            moments[name][key] = values[f"{key}/{model.stored_name(name)}"]
    stepper.optimizer.restore_moments(moments, updates)


def _load(checkpoint: Path, like: dict[str, Tensor], topology: Topology) -> dict[str, Tensor]:
    """Read named tensors, each cut as its pattern in `like` says; local CPU tensors."""
    stored = stored_shapes(checkpoint)
    state: dict[str, Tensor] = {}
    for key, pattern in like.items():
        shape = list(pattern.shape)
        if hasattr(pattern, "shard"):
            shape[pattern.shard[0]] *= pattern.shard[2]
        if stored.get(key) != shape:
            raise CheckpointError(
                f"{checkpoint}: {key} has shape {stored.get(key, 'nothing')}, this model wants {shape}: "
                "the checkpoint is of another architecture"
            )
        state[key] = _as_shard(torch.empty(pattern.shape, dtype=torch.float32), pattern, topology)
    reader = HuggingFaceStorageReader(str(checkpoint))
    dcp.load(state, storage_reader=reader, no_dist=topology.world_size == 1)
    return {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}


def read_full(checkpoint: Path, kind: str = "weight") -> dict[str, Tensor]:
    """Every tensor of one kind ("weight", "exp_avg", "exp_avg_sq") by parameter name, whole, fp32, on the CPU."""
    state = {key: torch.empty(shape) for key, shape in stored_shapes(checkpoint).items() if key.startswith(f"{kind}/")}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return {key.removeprefix(f"{kind}/"): value for key, value in state.items()}


def stored_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Full shape of every tensor in a checkpoint, from the safetensors headers."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            offsets = json.loads((f.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for key in f.keys():  # noqa: SIM118
                size = f.get_slice(key).get_shape()
                start = offsets.get(key, {}).get("saved_offsets", [0] * len(size))
                ends = [a + b for a, b in zip(start, size)]
                shapes[key] = [max(a, b) for a, b in zip(shapes.get(key, ends), ends)]
    return shapes


# ---- files -----------------------------------------------------------------------------------------------------------


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_json(file: Path, value: Any) -> None:
    aside = file.with_name(f".{file.name}.tmp")
    aside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _fsync(aside)
    os.replace(aside, file)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist: {file.parent} is not a complete checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): restore it") from None
