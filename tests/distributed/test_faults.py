"""Signals, dying ranks and numbers that are not finite."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loopline.pretrain.checkpoint import find_latest, read_full
from tests.jobs import run_job

LAYOUTS = {
    "single": ([], 1),
    "zero1": (["parallel.zero_stage=1"], 2),
    "zero3": (["parallel.zero_stage=3"], 2),
    "pp2": (["parallel.pp=2"], 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_that_is_not_finite_stops_the_run_and_saves_nothing(name, data, tmp_path):
    layout, world_size = LAYOUTS[name]
    broken = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "checkpoint.every=1"]
    job = run_job("debug", tmp_path, data, *layout, *broken, world_size=world_size, expect=1)
    assert "train.max_skipped_steps = 0" in job.output[0]
    assert "Traceback" not in job.output[0]
    latest = find_latest(tmp_path / "checkpoints")
    bad = next(r["step"] for r in job.records if r["skipped"]) if any(r["skipped"] for r in job.records) else None
    saved = json.loads((latest / "state.json").read_text())["step"] if latest else 0
    assert bad is None or saved < bad


@pytest.mark.parametrize("name", ["single", "zero1", "zero3"])
def test_skipped_steps_are_counted_and_leave_the_weights_alone(name, data, tmp_path):
    layout, world_size = LAYOUTS[name]
    broken = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "train.max_skipped_steps=100", "train.steps=5"]
    broken += ["checkpoint.every=1", "checkpoint.keep=9"]
    job = run_job("debug", tmp_path, data, *layout, *broken, world_size=world_size)
    skipped = [r["skipped"] for r in job.records]
    assert skipped[0] is False
    assert skipped[-1] is True
    assert job.records[-1]["loss"] is None or job.records[-1]["grad_norm"] is None
    n_updates = skipped.index(True)
    assert all(skipped[n_updates:])
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        first, last = (read_full(tmp_path / "checkpoints" / f"step_{n:08d}", kind) for n in (n_updates, 5))
        assert all(torch.equal(first[name], value) for name, value in last.items())
    state = json.loads((tmp_path / "checkpoints" / "step_00000005" / "state.json").read_text())
    assert state["updates"] == n_updates


def launch(run_dir: Path, data: str, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "loopline.pretrain.train", "debug"]
    for override in [f"run.dir={run_dir}", data, "train.steps=100000", "checkpoint.every=0", *overrides]:
        command += ["--set", override]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(run_dir: Path, n: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= n):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trainer_pids(job: subprocess.Popen) -> list[int]:
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(job.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in children.stdout.splitlines() if "loopline.pretrain.train" in line]


def test_sigterm_to_one_rank_saves_the_whole_job_and_ends_it_cleanly(data, tmp_path):
    job = launch(tmp_path, data, "parallel.zero_stage=1")
    wait_for_steps(tmp_path, 3, job)
    os.kill(trainer_pids(job)[1], signal.SIGTERM)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert json.loads((latest / "state.json").read_text())["step"] == last


def test_a_killed_rank_ends_the_job(data, tmp_path):
    job = launch(tmp_path, data)
    wait_for_steps(tmp_path, 3, job)
    os.kill(trainer_pids(job)[0], signal.SIGKILL)
    output = job.communicate(timeout=120)[0]
    assert job.returncode != 0
    assert "Signal 9" in output


def test_a_hang_dumps_stacks_and_ends(data, tmp_path):
    job = launch(tmp_path, data, "train.hang_timeout_s=8")
    wait_for_steps(tmp_path, 3, job)
    os.kill(trainer_pids(job)[1], signal.SIGSTOP)
    output = job.communicate(timeout=120)[0]
    assert job.returncode != 0
    assert "Timeout (0:00:08)!" in output
    assert "loop.py" in output  # the stack says where it stood


def test_a_second_job_on_the_same_run_is_refused(data, tmp_path):
    job = launch(tmp_path, data)
    wait_for_steps(tmp_path, 2, job)
    second = run_job("debug", tmp_path, data, expect=2)
    assert "being written by another job" in second.output[0]
    job.terminate()
    assert job.wait(120) is not None


def test_repeated_sigterm_still_saves(data, tmp_path):
    """torchrun passes on the SIGTERM that a scheduler sent to the workers too."""
    job = launch(tmp_path, data)
    wait_for_steps(tmp_path, 3, job)
    for pid in trainer_pids(job) * 2:
        os.kill(pid, signal.SIGTERM)
    output = job.communicate(timeout=120)[0]
    assert job.returncode == 0, output
    assert find_latest(tmp_path / "checkpoints") is not None
