"""One process of a training run: `torchrun ... -m loopline.pretrain.train RECIPE [--set a.b=c]`.

Read next: build.py (the model on this rank), loop.py (the outer loop), step.py (one step).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.tokenizer import TokenizerFile
from loopline.pretrain.config import RunConfig, load_config
from loopline.pretrain.errors import CheckpointError, ConfigError, NonFiniteError
from loopline.pretrain.world import world_from_environment

if TYPE_CHECKING:  # `--dry-run` loads no torch
    import torch

    from loopline.data_pipeline.manifest import Manifest
    from loopline.data_pipeline.mixture import Mixture
    from loopline.data_pipeline.stream import GlobalBatchStream
    from loopline.pretrain.metrics import MetricsWriter
    from loopline.pretrain.start import Start

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments `loopline train` and this module share."""
    parser.add_argument("recipe", help="a shipped recipe, or a .toml file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change a field")
    parser.add_argument("--dry-run", action="store_true", help="print the config and the stage map; run nothing")
    parser.add_argument("--world-size", type=int, default=None, help="with --dry-run: processes to plan for")


def main(argv: list[str] | None = None) -> int:
    """Entry point under torchrun."""
    parser = argparse.ArgumentParser(prog="loopline.pretrain.train", description=__doc__)
    add_arguments(parser)
    return run_command(parser.parse_args(argv))


def run_command(args: argparse.Namespace) -> int:
    """Run parsed arguments; a user's mistake prints one message and returns 2."""
    try:
        config = load_config(args.recipe, args.overrides)
        if args.dry_run:
            from loopline.pretrain.plan import describe

            world_size = args.world_size or int(os.environ.get("WORLD_SIZE", config.parallel.tp * config.parallel.pp))
            config.validate_for(world_size)
            print(describe(config, world_size))
            return 0
        train(config)
    except (ConfigError, DataError, CheckpointError) as error:
        return report(error)
    except NonFiniteError as error:
        report(error)
        return 1
    return 0


def report(error: Exception) -> int:
    """Print a user's mistake once a job where all ranks make it, on the rank that meets it where only one does."""
    if logging.getLogger().handlers:  # before a run folder is open there are none, and logging would print it itself
        log.error("%s: %s", type(error).__name__, error)
    is_in_job = "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()
    if int(os.environ.get("RANK", 0)) == 0 or is_in_job:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2


def train(config: RunConfig) -> None:
    """Check, build, load, fit. Everything that can be refused without communication is refused first.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError: see their messages.
    """
    checked = check_before_groups(config)
    from loopline.pretrain import build, checkpoint, run_folder
    from loopline.pretrain.loop import Loop
    from loopline.pretrain.parallel.topology import init_topology, shutdown
    from loopline.pretrain.start import agree_on_start

    run_dir, manifest, data_id = Path(config.run.dir), checked.manifest, checked.data_id
    held = run_folder.lock(run_dir) if checked.rank == 0 else None
    run_folder.set_up_logging(run_dir, checked.rank)
    topology = init_topology(
        tp=config.parallel.tp,
        pp=config.parallel.pp,
        n_loops=config.model.n_loops,
        device=checked.device,
        needs_groups=config.parallel.zero_stage > 0,
        # Longer than the hang watchdog, so that a hang ends with stacks and not with a collective's timeout.
        timeout_s=2 * config.train.hang_timeout_s,
    )
    start = agree_on_start(checked.start, config, data_id, topology)
    state = start.state if start is not None and start.is_resume else None
    if topology.is_main:
        run_folder.write_run_files(run_dir, config, checked.world_size)
        TokenizerFile(manifest.folder).copy_to(run_dir / "tokenizer")
        log.info("backends: %s", checked.backends or "torch")
        log.info("layout: tp %d pp %d dp %d on %s", topology.tp, topology.pp, topology.dp, topology.device)
    fill = None if start is None else (lambda model: checkpoint.load_weights(start.path, model, topology))
    stepper = build.build_stepper(config, topology, build.build_model(config, topology, fill))
    if start is not None and state is not None:
        checkpoint.load_moments(start.path, stepper, state.updates)
        log.info("continuing from %s at step %d", start.path, state.step)
        log_changes(state.config, config)
    loop = Loop(
        config=config,
        topology=topology,
        stepper=stepper,
        manifest=manifest,
        stream=open_stream(
            config,
            checked.data,
            topology.dp_rank,
            topology.dp,
            state.lanes if state else None,
            step=state.step if state else 0,
        ),
        writer=open_writer(config, run_dir, state.step if state else 0) if topology.is_main else None,
        data_id=data_id,
        step=state.step if state else 0,
        updates=state.updates if state else 0,
        tokens=state.tokens if state else 0,
        saved_step=state.step if state else None,
    )
    loop.run()
    topology.barrier()
    shutdown()
    if held is not None:
        held.close()


@dataclass(frozen=True)
class Checked:
    """What the checks before any process group found.

    Attributes:
        rank, world_size: of this process.
        device: where it computes.
        backends: kernel of each op.
        data: the corpus, or the mixture of several.
        manifest: the corpus, a mixture's first; its held-out split and tokenizer are the run's.
        data_id: the sha256 of the training split, of each.
        start: the checkpoint to begin from, before its hashes are checked.
    """

    rank: int
    world_size: int
    device: torch.device
    backends: dict[str, str]
    data: Manifest | Mixture
    manifest: Manifest
    data_id: str
    start: Start | None


def check_before_groups(config: RunConfig) -> Checked:
    """Everything that can be refused by one process alone. Builds a bundled corpus where it is missing.

    Raises:
        ConfigError, DataError, CheckpointError: see their messages.
    """
    rank, world_size, local_rank = world_from_environment()
    config.validate_for(world_size)  # before torch is loaded, which takes seconds
    from loopline.pretrain import build, corpus, run_folder
    from loopline.pretrain.parallel.topology import pick_device
    from loopline.pretrain.start import find_start

    run_folder.check_folder(Path(config.run.dir))
    device = pick_device(config.train.device, local_rank)
    backends = build.chosen_backends(config, device)
    data = corpus.open_data(config, local_rank)
    manifest = corpus.main_manifest(data)
    data_id = corpus.data_id(data)
    start = find_start(config, data_id)
    # Opened once here to refuse too little data; rank and size do not change that. No worker starts before a batch.
    state = start.state if start is not None and start.is_resume else None
    step = state.step if state else 0
    stream = open_stream(config, data, 0, 1, state.lanes if state else None, step=step)
    corpus.check_supply(config, data, stream.state_dict(), step)
    return Checked(rank, world_size, device, backends, data, manifest, data_id, start)


def open_stream(
    config: RunConfig,
    data: Manifest | Mixture,
    dp_rank: int,
    dp: int,
    lanes: Mapping[Any, Any] | None,
    *,
    step: int = 0,
) -> GlobalBatchStream:
    """The training stream of one data-parallel rank, from the lanes' states after `step` steps."""
    from loopline.data_pipeline.stream import GlobalBatchStream

    return GlobalBatchStream(
        data,
        split="train",
        seed=config.run.seed,
        seq_len=config.train.seq_len,
        n_lanes=config.data.lanes,
        global_batch_sequences=config.train.global_batch_sequences,
        dp_rank=dp_rank,
        dp_size=dp,
        shuffle_records=config.data.shuffle_records,
        shuffle=config.data.shuffle,
        packing=config.data.packing,
        workers=config.data.workers,
        states=lanes,
        step=step,
    )


def open_writer(config: RunConfig, run_dir: Path, start_step: int) -> MetricsWriter:
    """The main rank's metrics."""
    from loopline.pretrain.metrics import MetricsWriter

    return MetricsWriter(run_dir, total_steps=config.train.steps, start_step=start_step, log_every=config.log.every)


def log_changes(saved: dict[str, Any], config: RunConfig) -> None:
    """Say which settings a continued run changes; those that may not change have been refused before."""
    for section, fields in config.model_dump(mode="json").items():
        for field, now in fields.items():
            was = saved.get(section, {}).get(field)
            if was != now:
                log.info("changed since the checkpoint: %s.%s was %r, is %r", section, field, was, now)


if __name__ == "__main__":
    sys.exit(main())
