"""Inputs of Kimi Delta Attention: those of the gated delta rule, with a decay for each key channel."""

from dataclasses import replace

import torch
from gated_delta_cases import Inputs
from gated_delta_cases import make_inputs as make_gated_delta_inputs
from torch.nn import functional as F


def make_inputs(
    lengths: list[int], *, n_heads: int = 2, d_k: int = 12, d_v: int = 20, beta_max: float = 1.0, has_state: bool = True
) -> Inputs:
    """Random inputs over documents of `lengths` tokens, g [1, T, H, K] around -0.5."""
    inputs = make_gated_delta_inputs(lengths, n_heads=n_heads, d_k=d_k, d_v=d_v, beta_max=beta_max, has_state=has_state)
    generator = torch.Generator().manual_seed(sum(lengths) + d_k)
    return replace(inputs, g=-F.softplus(torch.randn(inputs.q.shape, generator=generator) - 0.5))


def widened(inputs: Inputs) -> Inputs:
    """The same inputs in fp64."""
    return replace(inputs, **{name: x.double() for name, x in inputs.tensors().items()})
