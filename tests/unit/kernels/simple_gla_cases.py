"""Inputs of linear attention with one decay per head: those of gated linear attention, q and k in groups of heads."""

from dataclasses import replace

import torch
from gla_cases import Inputs
from gla_cases import make_inputs as make_gla_inputs
from torch import Tensor
from torch.nn import functional as F


def make_inputs(
    lengths: list[int],
    *,
    n_groups: int = 2,
    n_heads: int = 4,
    d_k: int = 12,
    d_v: int = 20,
    has_state: bool = True,
    is_constant: bool = False,
) -> Inputs:
    """Random inputs over documents of `lengths` tokens; g [1, T, H] around -0.5, or [H] as in RetNet."""
    inputs = make_gla_inputs(lengths, n_heads=n_heads, d_k=d_k, d_v=d_v, has_state=has_state)
    generator = torch.Generator().manual_seed(sum(lengths) + n_heads)
    g = -F.softplus(torch.randn(inputs.v.shape[:3], generator=generator) - 0.5)
    return replace(
        inputs,
        q=inputs.q[:, :, :n_groups],
        k=inputs.k[:, :, :n_groups],
        g=retnet_decay(n_heads) if is_constant else g,
    )


def retnet_decay(n_heads: int) -> Tensor:
    """log(1 - 2 ** (-5 - i)) for heads i = 0, 1, ..: [H]. Reference: Sun et al., arXiv:2307.08621, eq. 8."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(n_heads))))


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """[1, T, G, K] -> [1, T, H, K], each group at every head it serves."""
    return x.repeat_interleave(n_heads // x.shape[2], dim=2)
