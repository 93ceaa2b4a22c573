"""The run folder: a lock while a job writes it, logs of every rank, and what the run was started with."""

import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import IO

from loopline.pretrain.config import RunConfig
from loopline.pretrain.errors import ConfigError

PACKAGES = ("torch", "megatron-core", "deepspeed", "transformers", "webdataset", "flash-linear-attention", "triton")


def check_folder(run_dir: Path) -> None:
    """Refuse a place where no folder can be.

    Raises:
        ConfigError: run.dir, or a parent of it, is a file.
    """
    for path in (run_dir, *run_dir.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run.dir = {str(run_dir)!r}: {path} is a file; choose another folder")


def lock(run_dir: Path) -> IO[str]:
    """Hold the run for this job; the main rank keeps the file open to its end.

    Raises:
        ConfigError: another job is writing this run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise ConfigError(
            f"run.dir = {str(run_dir)!r} is being written by another job ({file.read().strip() or 'unknown'}): "
            "wait for it to end, or choose another run.dir"
        ) from None
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
    file.flush()
    return file


def set_up_logging(run_dir: Path, rank: int) -> None:
    """Every rank to its own file, the main rank to the console as well."""
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


def write_run_files(run_dir: Path, config: RunConfig, world_size: int) -> None:
    """The resolved config and what it runs on, before step 1; one line of history for every start."""
    (run_dir / "config.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
    environment = {
        "argv": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "world_size": world_size,
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
    with (run_dir / "starts.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({**environment, "config": config.model_dump(mode="json")}) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout this file is tracked in; None for an installed wheel, or without git."""
    here = Path(__file__).resolve()
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, capture_output=True, check=True
        )
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
