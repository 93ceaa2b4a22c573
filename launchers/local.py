"""Run a recipe in several processes on this machine: torchrun with the arguments one would type. Torch-free."""

import argparse
import os
import shlex
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


def main(argv: list[str] | None = None) -> int:
    """`python -m loopline.launchers.local RECIPE --processes N [--set a.b=c]`."""
    parser = argparse.ArgumentParser(prog="loopline.launchers.local", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--processes", type=int, required=True, help="processes on this machine")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--dry-run", action="store_true", help="print the torchrun command; run nothing")
    args = parser.parse_args(argv)
    if args.processes < 1:
        print(f"--processes is {args.processes}: give at least 1", file=sys.stderr)
        return 2
    if args.dry_run:
        print(shlex.join(local_command(args.recipe, args.overrides, args.processes)))
        return 0
    return run_local(args.recipe, args.overrides, args.processes)


if __name__ == "__main__":
    sys.exit(main())
