"""fla's Triton kernels, called as our ops call them, agree with our references on a CPU, gradients included."""

import pytest
import torch
from fla_interpreted import CASES, MAKERS
from interpreted import Figures, Key, process

from tests.tolerances import TOLERANCES

KINDS = {"fp32": "op", "bf16": "interpreted_kernel"}


@pytest.fixture(scope="module")
def reported() -> tuple[dict[Key, Figures], str]:
    """One process computes every case."""
    return process("fla_interpreted")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_fla_agrees_with_our_reference(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> None:
    found, ending = reported
    assert (case, dtype) in found, ending
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
