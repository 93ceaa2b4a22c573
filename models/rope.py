"""Rotary positions. Su et al., RoFormer, arXiv:2104.09864, in the half-split layout Hugging Face models use."""

import torch
from torch import Tensor

from loopline.kernels.precision import wide


def rotary_tables(positions: Tensor, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [1, T, 1, D], fp32, for positions [1, T]."""
    frequency = theta ** (-torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32) / d_head)
    angle = positions[..., None].float() * frequency  # [1, T, D/2]
    angle = torch.cat([angle, angle], dim=-1)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (x_i, x_{i+D/2}) of [1, T, H, D] by the angles of `tables`, in fp32; result in x.dtype."""
    cos, sin = tables
    x1, x2 = wide(x).chunk(2, dim=-1)
    turned = torch.cat([-x2, x1], dim=-1)
    return (wide(x) * cos + turned * sin).to(x.dtype)
