"""Real multi-process training jobs for tests: forked from a server that has imported everything once, so that a
two-process job costs its own work and not ten seconds of imports a rank."""

import json
import multiprocessing as mp
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


@dataclass
class Job:
    """A finished job.

    Attributes:
        status: exit status of each rank.
        output: what each rank printed.
        records: metrics.jsonl of the run folder.
    """

    run_dir: Path
    status: list[int | None]
    output: list[str]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def series(self, key: str) -> list[float]:
        return [record[key] for record in self.records]


def run_job(
    recipe: str,
    run_dir: Path,
    *overrides: str,
    world_size: int = 1,
    expect: int | None = 0,
    timeout_s: float = 240,
    kill_when: Path | None = None,
) -> Job:
    """Train a recipe in `world_size` processes.

    Args:
        expect: exit status every rank must have; None checks nothing.
        kill_when: SIGKILL every rank as soon as this path exists.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    outputs = [run_dir / f"output_{rank}.txt" for rank in range(world_size)]
    argv = [recipe, "--set", f"run.dir={run_dir}"]
    for override in overrides:
        argv += ["--set", override]
    port = _free_port()
    ranks = [
        _context.Process(target=_rank_main, args=(argv, rank, world_size, port, str(outputs[rank])))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if kill_when is not None and kill_when.exists():
            for process in ranks:
                process.kill()
        ranks[0].join(0.02)
    timed_out = any(process.is_alive() for process in ranks)
    for process in ranks:
        process.kill()
        process.join()
    job = Job(run_dir, [process.exitcode for process in ranks], [f.read_text() for f in outputs])
    assert not timed_out, f"job did not end in {timeout_s} s:\n" + "\n".join(job.output)
    if expect is not None:
        assert job.status == [expect] * world_size, "\n".join(job.output)
    return job


def _rank_main(argv: list[str], rank: int, world_size: int, port: int, output: str) -> None:
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch

    torch.set_num_threads(1)
    from loopline.pretrain.train import main

    sys.exit(main(argv))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
