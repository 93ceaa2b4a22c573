"""The one tolerance table. A row is (relative tolerance) for a kind of figure in a dtype, with its reason.

Comparisons are relative to the judge's value; NaN never passes.
"""

import math

import torch
from torch import Tensor

TOLERANCES: dict[tuple[str, str], float] = {
    # Losses and gradient norms of a training run against the single-process fp32 run. Measured over all layouts: 4e-7
    # and 6e-6 after ten steps; a wrong reduction shows as 1e-2 or more.
    ("fp32", "loss"): 1e-5,
    ("fp32", "grad_norm"): 1e-5,
    # Parameters after ten steps, RMS of the difference over RMS of the change since the start. Adam divides by the root
    # of the second moment, so where a gradient is mostly rounding its update is a rounding error of size lr.
    ("fp32", "parameters"): 2e-3,
    # bf16 rounds each matrix product to 3 significant digits; layouts sum in another order before they round.
    ("bf16", "loss"): 2e-3,
    ("bf16", "grad_norm"): 5e-2,
    # Two forms of the same fp32 op (chunks against recurrence), RMS.
    ("fp32", "op"): 5e-6,
    # The same, through a whole looped model.
    ("fp32", "logits"): 5e-5,
    # Every gradient of a whole model against the same maths written otherwise (unrolled loops, transformers), RMS.
    # Measured below 1e-5.
    ("fp32", "gradients"): 2e-5,
    # Error of bf16 logits, or of all gradients together, over that of an fp32 model with weights rounded to bf16. A
    # looped Gated DeltaNet at random weights magnifies any rounding up to fivefold a loop, so no absolute figure fits
    # every depth; the ratio does. Measured 0.9 to 1.9 over six seeds of every mixer.
    ("bf16", "weight_rounding"): 3.0,
    # All gradients of a one-loop model together, each scaled by its RMS. Measured 0.015 (HGRN2) to 0.08 (DeltaNet with
    # negative eigenvalues) over six seeds of every mixer.
    ("bf16", "gradients"): 1e-1,
    # Outputs and gradients of fla's bf16 kernels under Triton's interpreter, against the fp64 reference of the same
    # rounded inputs, RMS: they round to bf16 between their steps. Measured 6.8e-3 at most over eight seeds (delta rule,
    # which forgets nothing); q scaled wrong by one percent shows as 1e-2.
    ("bf16", "interpreted_kernel"): 8e-3,
}


def relative(found: float, expected: float) -> float:
    """|found - expected| / |expected|; infinite where either is not finite, so that it never passes."""
    if not (math.isfinite(found) and math.isfinite(expected)):
        return math.inf
    return abs(found - expected) / abs(expected)


def rms_ratio(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """RMS of the difference over RMS of `scale` (default: of `expected`); infinite where anything is not finite."""
    difference = (found.double() - expected.double()).square().mean().sqrt()
    size = (expected if scale is None else scale).double().square().mean().sqrt()
    ratio = float(difference / size.clamp_min(torch.finfo(torch.float64).tiny))
    return ratio if math.isfinite(ratio) else math.inf
