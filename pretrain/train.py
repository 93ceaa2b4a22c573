"""One process of a training run: `torchrun ... -m loopline.pretrain.train RECIPE [--set a.b=c]`.

Read next: build.py (the model on this rank), loop.py (the outer loop), step.py (one step).
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from loopline.data_pipeline.errors import DataError
from loopline.pretrain.config import RunConfig, load_config
from loopline.pretrain.errors import CheckpointError, ConfigError, NonFiniteError

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
    """Print a user's mistake once a job, and give the exit status for it."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2


def train(config: RunConfig) -> None:
    """Check, build, load, fit. Everything that can be refused without communication is refused first.

    Raises:
        ConfigError, DataError, CheckpointError: see their messages.
    """
    import torch

    from loopline.data_pipeline.tokenizer import TokenizerFile
    from loopline.kernels.errors import BackendError
    from loopline.pretrain import build, checkpoint, corpus
    from loopline.pretrain.loop import Loop
    from loopline.pretrain.parallel.topology import init_topology, pick_device, shutdown, world_from_environment

    rank, world_size, local_rank = world_from_environment()
    config.validate_for(world_size)
    run_dir = Path(config.run.dir)
    device = pick_device(config.train.device, local_rank)
    try:
        backends = build.chosen_backends(config, device)
    except BackendError as error:
        raise ConfigError(str(error)) from None
    manifest = corpus.open_corpus(config, local_rank, rank)
    data_id = manifest.content_sha256("train")
    found = find_start(config, data_id)
    # Opened once here to refuse too little data before any process group exists; rank and size do not change that.
    open_stream(config, manifest, 0, 1, None)

    _set_up_logging(run_dir, rank)
    topology = init_topology(
        tp=config.parallel.tp,
        pp=config.parallel.pp,
        n_loops=config.model.n_loops,
        device=device,
        needs_groups=config.parallel.zero_stage > 0,
        timeout_s=config.train.hang_timeout_s,
    )
    try:
        start = _verified(found, topology)
        if topology.is_main:
            _write_run_files(run_dir, config, world_size)
            TokenizerFile(manifest.folder).copy_to(run_dir / "tokenizer")
            log.info("backends: %s", backends or "torch")
            log.info("layout: tp %d pp %d dp %d on %s", topology.tp, topology.pp, topology.dp, device)
        fill = None if start is None else (lambda model: checkpoint.load_weights(start.path, model, topology))
        model = build.build_model(config, topology, fill)
        stepper = build.build_stepper(config, topology, model)
        state = start.state if start is not None and start.is_resume else None
        if start is not None and state is not None:
            checkpoint.load_moments(start.path, stepper, state.updates)
            log.info("continuing from %s at step %d", start.path, state.step)
        stream = open_stream(config, manifest, topology.dp_rank, topology.dp, state.lanes if state else None)
        writer = None
        if topology.is_main:
            from loopline.pretrain.metrics import MetricsWriter

            writer = MetricsWriter(
                run_dir,
                total_steps=config.train.steps,
                start_step=state.step if state else 0,
                log_every=config.log.every,
            )
        loop = Loop(
            config=config,
            topology=topology,
            stepper=stepper,
            manifest=manifest,
            stream=stream,
            writer=writer,
            data_id=data_id,
            step=state.step if state else 0,
            updates=state.updates if state else 0,
            tokens=state.tokens if state else 0,
            saved_step=state.step if state else None,
            gather_lanes=lambda lanes: _merge_over_ranks(lanes, topology),
        )
        loop.run()
        if writer:
            writer.close()
        topology.barrier()
    finally:
        if torch.distributed.is_initialized() and sys.exc_info()[0] is None:
            shutdown()


class Start:
    """Where a run begins from.

    Attributes:
        path: the checkpoint.
        state: its JSON.
        is_resume: continue its steps and data, as opposed to taking its weights only.
    """

    def __init__(self, path: Path, state, is_resume: bool) -> None:  # type: ignore[no-untyped-def]
        self.path, self.state, self.is_resume = path, state, is_resume


def find_start(config: RunConfig, data_id: str) -> Start | None:
    """The checkpoint to begin from: the run's own newest one, else `checkpoint.init_from`, else none."""
    from loopline.pretrain import checkpoint

    own = checkpoint.find_latest(Path(config.run.dir) / "checkpoints")
    if own is not None:
        state = checkpoint.check(own, hashes=False)
        checkpoint.check_belongs(state, config, data_id, own)
        return Start(own, state, True)
    if config.checkpoint.init_from is None:
        return None
    path = Path(config.checkpoint.init_from)
    return Start(path, checkpoint.check(path, hashes=False), False)


def open_stream(config: RunConfig, manifest, dp_rank: int, dp: int, lanes):  # type: ignore[no-untyped-def]
    """The training stream of one data-parallel rank."""
    from loopline.data_pipeline.stream import GlobalBatchStream

    return GlobalBatchStream(
        manifest,
        split="train",
        seed=config.run.seed,
        seq_len=config.train.seq_len,
        n_lanes=config.data.lanes,
        global_batch_sequences=config.train.global_batch_sequences,
        dp_rank=dp_rank,
        dp_size=dp,
        shuffle_records=config.data.shuffle_records,
        states=lanes,
    )


def _verified(start: Start | None, topology) -> Start | None:  # type: ignore[no-untyped-def]
    """Hash the chosen checkpoint on the main rank; an altered one gives way to the one before it, on all ranks."""
    from loopline.pretrain import checkpoint

    if start is None:
        return None
    answer: str | None = None
    if topology.is_main:
        candidates = [start.path]
        if start.is_resume:
            candidates += [f for f in sorted(start.path.parent.glob("step_*"), reverse=True) if f < start.path]
        problems = []
        for candidate in candidates:
            try:
                checkpoint.check(candidate, hashes=True)
            except CheckpointError as error:
                problems.append(str(error))
                log.warning("skipping a damaged checkpoint: %s", error)
            else:
                answer = str(candidate)
                break
        else:
            answer = "damaged: " + "\n  - ".join(problems)
    answer = checkpoint.agree(answer, topology)
    assert answer is not None
    if answer.startswith("damaged: "):
        raise CheckpointError("no checkpoint to continue from is intact:\n  - " + answer.removeprefix("damaged: "))
    return Start(Path(answer), checkpoint.check(Path(answer), hashes=False), start.is_resume)


def _merge_over_ranks(lanes: dict, topology) -> dict:  # type: ignore[no-untyped-def]
    import torch.distributed as dist

    if topology.world_size == 1:
        return lanes
    parts: list = [None] * topology.world_size
    dist.all_gather_object(parts, lanes)
    return {lane: state for part in parts for lane, state in part.items()}


def _set_up_logging(run_dir: Path, rank: int) -> None:
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / "logs" / f"rank_{rank:05d}.log")]
    if rank == 0:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s rank {rank} %(name)s %(levelname)s: %(message)s",
        handlers=handlers,
        force=True,
    )
    for noisy in ("DeepSpeed", "megatron", "torch.distributed.checkpoint"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _write_run_files(run_dir: Path, config: RunConfig, world_size: int) -> None:
    """The resolved config and what it runs on, before step 1."""
    (run_dir / "config.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
    packages = ("torch", "megatron-core", "deepspeed", "transformers", "webdataset", "flash-linear-attention", "triton")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    environment = {
        "argv": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "world_size": world_size,
        "packages": versions,
        "git_commit": commit.stdout.strip() or None,
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
