"""Comparing a Triton kernel, run by the interpreter on a CPU, with its reference: outputs and every gradient.

A file of cases (`*_interpreted.py`) is a program: started by `process` with TRITON_INTERPRET=1, it prints a line of
JSON a case. It is a process of its own because kernels imported to be compiled cannot be interpreted any more, and a
wild load of an interpreted kernel ends the process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import rms_ratio

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Figures = dict[str, float]  # tensor -> RMS error ratio; or any other figure a case reports
Key = tuple[str, str]  # case, dtype


@dataclass
class Case:
    """One op in one shape.

    Attributes:
        inputs: differentiable arguments by name, fp32.
        rounded: names of those that a model gives in its compute dtype; the others stay fp32.
        op, reference: the same signature; each returns one tensor or (o, final_state).
        shared: names of inputs [H] that serve every token; the reference takes them as [1, T, H].
        constants: arguments without gradient.
        options: the rest of the call.
    """

    inputs: dict[str, Tensor]
    rounded: tuple[str, ...]
    op: Callable[..., Any]
    reference: Callable[..., Any]
    shared: tuple[str, ...] = ()
    constants: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def figures(case: Case, dtype: torch.dtype) -> Figures:
    """RMS error ratio of every output and gradient. The reference gets the same rounded values, in fp64."""
    inputs = {name: x.to(dtype) if name in case.rounded else x for name, x in case.inputs.items()}
    found = _results(case.op, inputs, case)
    exact = {name: x.double() for name, x in inputs.items()}
    if case.shared:
        n_tokens = inputs[case.rounded[0]].shape[1]
        exact |= {name: exact[name].expand(1, n_tokens, -1) for name in case.shared}
    expected = _results(case.reference, exact, case)
    scales = dict(expected)
    for name in (f"d{name}" for name in case.shared):
        # A sum over tokens that nearly cancel is as exact as its terms are, however small it is.
        scales[name] = expected[name].abs().sum(1)
        expected[name] = expected[name].sum(1)[0]
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    return {name: rms_ratio(found[name], expected[name], scales[name]) for name in expected}


def _results(op: Callable[..., Any], inputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Outputs, and the gradient of a fixed random projection of them with respect to every input."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = op(**leaves, **case.constants, **case.options)
    outputs = dict(zip(("o", "final_state"), outputs if isinstance(outputs, tuple) else (outputs,)))
    generator = torch.Generator().manual_seed(7)
    loss = torch.zeros((), dtype=torch.float64)
    for o in outputs.values():
        # Weights exact in bf16: the gradient handed to a bf16 output is not rounded.
        loss = loss + (o.double() * torch.randn(o.shape, generator=generator).bfloat16().double()).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {**outputs, **{f"d{name}": gradient for name, gradient in zip(leaves, gradients)}}


def report(cases: Mapping[Key, Callable[[torch.dtype], Figures]]) -> None:
    """Run each case in its dtype and print its line. What a file of cases calls as a program."""
    from tests import triton_interpreter

    triton_interpreter.prepare()
    for (name, dtype), run in cases.items():
        start = time.perf_counter()
        torch.manual_seed(97)
        found = run(DTYPES[dtype])
        took_s = round(time.perf_counter() - start, 1)
        print(json.dumps({"case": name, "dtype": dtype, "figures": found, "took_s": took_s}), flush=True)


def process(module: str) -> tuple[dict[Key, Figures], str]:
    """What a file of cases reports, and the end of its stderr for the message where one is missing.

    Args:
        module: its name under tests.unit.kernels.
    """
    # A developer's settings, or a GPU, would choose other kernels.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLA_", "TRITON_"))}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.unit.kernels.{module}"],
        cwd=ROOT,
        env={**kept, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"case"')]
    found = {(record["case"], record["dtype"]): record["figures"] for record in records}
    return found, f"exit status {result.returncode}\n{result.stderr[-3000:]}"
