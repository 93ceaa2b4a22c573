"""Run a recipe in several processes on this machine: torchrun with the arguments one would type. Torch-free."""

import os
import subprocess
import sys


def local_command(recipe: str, overrides: list[str], n_processes: int) -> list[str]:
    """The torchrun command line for one machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    command += ["-m", "loopline.pretrain.train", recipe]
    for override in overrides:
        command += ["--set", override]
    return command


def run_local(recipe: str, overrides: list[str], n_processes: int) -> int:
    """Launch and wait; the job's exit status."""
    # One thread a process unless the user says otherwise: torchrun would warn and set the same.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(local_command(recipe, overrides, n_processes), env=environment).returncode
