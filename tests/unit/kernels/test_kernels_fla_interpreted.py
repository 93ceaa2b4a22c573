"""fla's Triton kernels, called as our ops call them, agree with our references on a CPU, gradients included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fla_interpreted import CASES, MAKERS

from tests.tolerances import TOLERANCES

ROOT = Path(__file__).resolve().parents[3]
KINDS = {"fp32": "op", "bf16": "interpreted_kernel"}


@pytest.fixture(scope="module")
def process() -> subprocess.CompletedProcess[str]:
    """One process computes every case: fla may be imported here already, and then it cannot be interpreted any more."""
    # A developer's settings, or a GPU, would choose other kernels.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLA_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.kernels.fla_interpreted"],
        cwd=ROOT,
        env={**kept, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_fla_agrees_with_our_reference(case: str, dtype: str, process: subprocess.CompletedProcess[str]) -> None:
    records = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"case"')]
    found = {(record["case"], record["dtype"]): record["figures"] for record in records}
    assert (case, dtype) in found, f"exit status {process.returncode}\n{process.stderr[-3000:]}"
    figures = found[case, dtype]
    assert figures.keys() == MAKERS[case][1]
    assert all(ratio <= TOLERANCES[dtype, KINDS[dtype]] for ratio in figures.values()), figures


def test_bf16_of_the_interpreter_is_rounded_as_torch_rounds() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from tests.triton_interpreter import narrowed, widened

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
    x[:1000] = (x[:1000] & ~0xFFFF) | 0x8000  # halfway
    x = torch.cat([x.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38])])
    bits = narrowed(TensorHandle(x.numpy(), tl.float32))
    torch.testing.assert_close(
        torch.from_numpy(widened(bits).data), x.bfloat16().float(), rtol=0, atol=0, equal_nan=True
    )


def test_a_process_that_compiles_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import triton_interpreter

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        triton_interpreter.prepare()
