"""Compile every Triton kernel of ours for a GPU this machine need not have, and hold it to what it may use.

    python -m loopline.kernels.lint [--capability 90] [--op gated_delta ...]

An op that has Triton kernels lists the calls it should serve in its `lint_cases.py` (`cases`, with budgets by kernel,
and `fp32_cases`). They are made here on CPU tensors while every launch compiles its kernel instead of running it. So
exactly what a launch would use is compiled, with Triton's own specialisation. Fails where a kernel does not compile,
takes more shared memory than an SM has, spills more than its budget, or runs its products without the tensor-core
instruction of the target. Prints a line a kernel.
"""

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

OPS = ("attention", "dsa", "gated_delta")  # folders of kernels/ that have a lint_cases.py
# Exact fp32 products have no tensor-core form, and their operands fill the registers: such kernels serve comparisons,
# not training, and have to compile, fit, and spill no more than this.
FP32_STACK_BYTES = 4096
SHARED_BYTES = {90: 227 * 1024}  # what one program may have, by compute capability


@dataclass(frozen=True)
class Budget:
    """What a kernel may use, by its name in an op's BUDGETS.

    Attributes:
        stack_bytes: of local memory a thread, which is where registers spill to.
        needs_wgmma: its products are large enough that mma.sync instead of wgmma would halve its speed.
    """

    stack_bytes: int = 0
    needs_wgmma: bool = True


@dataclass(frozen=True)
class Figures:
    """One compiled kernel. `stack_bytes` and `registers` are a thread's, `shared_bytes` a program's."""

    case: str
    kernel: str
    warps: int
    stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    n_wgmma: int

    def problems(self, budget: Budget, capability: int) -> list[str]:
        """What is over budget, a line each."""
        limit = SHARED_BYTES[capability]
        found = []
        if self.shared_bytes > limit:
            found.append(f"shared memory is {self.shared_bytes} bytes, more than the {limit} of sm_{capability}")
        if self.stack_bytes > budget.stack_bytes:
            found.append(f"{self.stack_bytes} bytes a thread are spilled, the budget is {budget.stack_bytes}")
        if budget.needs_wgmma and not self.n_wgmma:
            found.append("no product uses wgmma: tiles need 64 rows and 4 warps")
        return [f"{self.kernel} ({self.case}): {problem}" for problem in found]


class _CompilingDriver:
    """What Triton asks of a driver in order to compile, without a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_launches(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a launch compiles its kernel for `capability` and does not run it; gives (name, compiled kernel)s.

    Raises:
        RuntimeError: kernels are interpreted in this process, so there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process; unset it to compile them")
    compiled: dict[int, tuple[str, Any]] = {}  # a kernel compiled before is the same object
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[id(kernel)] = (self.fn.__name__, kernel)
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_CompilingDriver(GPUTarget("cuda", capability, 32)))
    JITFunction.run = compile_only
    found: list[tuple[str, Any]] = []
    try:
        yield found
    finally:
        JITFunction.run = run
        driver._active = before
        found += compiled.values()


def compile_call(case: str, call: Callable[[], object], capability: int) -> list[Figures]:
    """Figures of every kernel that `call` launches."""
    with compiled_launches(capability) as kernels:
        call()
    return [_figures(case, name, kernel) for name, kernel in kernels]


def check(op: str, capability: int) -> Iterator[tuple[Figures, list[str]]]:
    """Each kernel of an op with what is wrong with it."""
    module = importlib.import_module(f"loopline.kernels.{op}.lint_cases")
    for case, call in module.cases():
        for figures in compile_call(f"{op} {case}", call, capability):
            yield figures, figures.problems(module.BUDGETS.get(figures.kernel, Budget()), capability)
    for case, call in module.fp32_cases():
        for figures in compile_call(f"{op} {case}", call, capability):
            yield figures, figures.problems(Budget(FP32_STACK_BYTES, needs_wgmma=False), capability)


def _figures(case: str, name: str, kernel: Any) -> Figures:
    registers, stack_bytes = _resources(kernel.asm["cubin"])
    return Figures(
        case=case,
        kernel=name,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=kernel.metadata.shared,
        n_wgmma=kernel.asm["ptx"].count("wgmma.mma_async"),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as cuobjdump, which comes with Triton, reads them from a cubin."""
    import tempfile

    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        cuobjdump = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
        text = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no register figures: {text[:200]!r}")
    return int(match[1]), int(match[2])


def main() -> int:
    """Parse, compile, print; 1 where anything is over budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED_BYTES))
    parser.add_argument("--op", action="append", choices=OPS, help="only this one; may be repeated")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}, sm_{args.capability}")
    problems: list[str] = []
    n_kernels = 0
    for op in args.op or OPS:
        for figures, found in check(op, args.capability):
            n_kernels += 1
            problems += found
            print(
                f"{figures.kernel:36} {figures.case:44} {figures.warps}w {figures.stages}s "
                f"{figures.registers:3} registers {figures.stack_bytes:4} B stack "
                f"{figures.shared_bytes / 1024:6.1f} KB shared {figures.n_wgmma:3} wgmma",
                flush=True,
            )
    print(*problems, sep="\n", file=sys.stderr)
    print(f"{n_kernels} kernels compiled, {len(problems)} over budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
