"""Where a run begins: its own newest intact checkpoint, another run's weights, or step 0; one answer for all ranks."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from loopline.pretrain import checkpoint
from loopline.pretrain.config import RunConfig
from loopline.pretrain.errors import CheckpointError
from loopline.pretrain.parallel.topology import Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin from.

    Attributes:
        path: its folder.
        state: its JSON.
        is_resume: continue its steps and data, as opposed to taking its weights only.
    """

    path: Path
    state: checkpoint.RunState
    is_resume: bool


def find_start(config: RunConfig, data_id: str) -> Start | None:
    """The run's own newest checkpoint, else `checkpoint.init_from`, else none. Reads JSON and headers only.

    Raises:
        CheckpointError: damaged, foreign, or of another run or architecture.
    """
    own = checkpoint.find_latest(Path(config.run.dir) / "checkpoints")
    if own is not None:
        state = checkpoint.check(own, hashes=False)
        checkpoint.check_belongs(state, config, data_id, own)
        return Start(own, state, True)
    if config.checkpoint.init_from is None:
        return None
    path = checkpoint.resolve(config.checkpoint.init_from)
    state = checkpoint.check(path, hashes=False)
    checkpoint.check_fits(path, config.model)
    return Start(path, state, False)


def agree_on_start(found: Start | None, config: RunConfig, data_id: str, topology: Topology) -> Start | None:
    """Hash the chosen checkpoint on the main rank and let every rank take its answer. An altered one is set aside and
    gives way to the one before it.

    Raises:
        CheckpointError: none is intact, or ranks read different data.
    """
    answer: tuple[str, str] | None = None
    if topology.is_main and found is not None:
        try:
            answer = ("resume" if found.is_resume else "weights", str(_newest_intact(found, config, data_id)))
        except CheckpointError as error:
            answer = ("refuse", str(error))
    answer, data_ids = _share(answer, data_id, topology)
    if len(data_ids) > 1:
        raise CheckpointError(
            f"ranks read different corpora ({', '.join(sorted(x[:12] for x in data_ids))}): give every machine the "
            "same data.manifest, on shared storage or as equal copies"
        )
    if answer is None:
        return None
    verdict, text = answer
    if verdict == "refuse":
        raise CheckpointError(text)
    path = Path(text)
    return Start(path, checkpoint.check(path, hashes=False), is_resume=verdict == "resume")


def _newest_intact(found: Start, config: RunConfig, data_id: str) -> Path:
    candidates = [found.path]
    if found.is_resume:
        candidates += [path for path in checkpoint.complete(found.path.parent) if path.name < found.path.name]
    problems = []
    for path in candidates:
        try:
            state = checkpoint.check(path, hashes=True)
        except CheckpointError as error:
            problems.append(str(error))
            log.warning("skipping a damaged checkpoint: %s", error)
            continue
        if found.is_resume:
            checkpoint.check_belongs(state, config, data_id, path)
            checkpoint.set_aside_after(path)
        return path
    raise CheckpointError("no checkpoint to continue from is intact; restore one:\n  - " + "\n  - ".join(problems))


def _share(answer: tuple[str, str] | None, data_id: str, topology: Topology) -> tuple[tuple[str, str] | None, set[str]]:
    """Rank 0's answer, and every rank's data identity."""
    if topology.world_size == 1:
        return answer, {data_id}
    parts: list[tuple[tuple[str, str] | None, str]] = [(None, "")] * topology.world_size
    dist.all_gather_object(parts, (answer, data_id))
    return parts[0][0], {data for _, data in parts}
