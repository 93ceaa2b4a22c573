"""Every Triton kernel of ours compiles for an H100/H200 within its budget, on a machine without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from loopline.kernels import lint
from loopline.kernels.lint import Budget, compile_call

ROOT = Path(__file__).resolve().parents[3]


@triton.jit(do_not_specialize=["n_rows"])
def gram_kernel(p_x, p_y, n_rows, BT: tl.constexpr, BK: tl.constexpr):
    rows, columns = tl.arange(0, BT), tl.arange(0, BK)
    x = tl.load(p_x + rows[:, None] * BK + columns[None, :], mask=rows[:, None] < n_rows, other=0.0)
    tl.store(p_y + rows[:, None] * BT + tl.arange(0, BT)[None, :], tl.dot(x, tl.trans(x)))


def gram(size: int, warps: int, width: int = 64) -> tuple[Callable[[], object], torch.Tensor]:
    """A launch of the kernel, and what it would write."""
    x, y = torch.empty(size, width, dtype=torch.bfloat16), torch.full((size, size), torch.nan)
    return lambda: gram_kernel[(1,)](x, y, 7, BT=size, BK=width, num_warps=warps), y


def test_every_op_with_triton_kernels_is_checked() -> None:
    assert set(lint.OPS) == {path.parent.name for path in (ROOT / "kernels").glob("*/lint_cases.py")}
    launching = {path.parent.name for path in (ROOT / "kernels").glob("*/*launch.py")}
    assert set(lint.OPS) == launching


@pytest.mark.slow
@pytest.mark.parametrize("op", lint.OPS)
def test_kernels_compile_for_hopper_within_their_budgets(op: str) -> None:
    found = list(lint.check(op, 90))
    assert found
    assert not [problem for _, problems in found for problem in problems]


def test_a_launch_compiles_its_kernel_and_does_not_run_it() -> None:
    launch, y = gram(64, warps=4)
    (figures,) = compile_call("", launch, 90)
    assert (figures.kernel, figures.warps, figures.stack_bytes) == ("gram_kernel", 4, 0)
    assert figures.n_wgmma > 0
    assert not figures.problems(Budget(), 90)
    assert y.isnan().all()


@pytest.mark.parametrize(
    ("sizes", "budget", "problem"),
    [
        ((64, 1), Budget(), "no product uses wgmma"),
        ((256, 4, 128), Budget(needs_wgmma=False), "bytes a thread are spilled, the budget is 0"),
        ((128, 8, 1024), Budget(100_000, False), "more than the 232448 of sm_90"),
    ],
    ids=["products", "spills", "shared memory"],
)
def test_a_kernel_over_budget_is_found(sizes: tuple[int, ...], budget: Budget, problem: str) -> None:
    (figures,) = compile_call("", gram(*sizes)[0], 90)
    assert any(problem in found for found in figures.problems(budget, 90)), figures
