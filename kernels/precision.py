"""What references share: the precision they compute in, and vectors of unit length."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64: a reference run in fp64 is an oracle without rounding."""
    return x if x.dtype == torch.float64 else x.float()


def l2_normalize(x: Tensor) -> Tensor:
    """x / ||x|| over the last dim, in fp32, safe at zero (eps inside the root, as fla has it); result in x.dtype."""
    x32 = wide(x)
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
