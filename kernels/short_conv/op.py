"""Causal depthwise convolution over a few tokens, stopping at document boundaries. Plain torch on any device."""

from torch import Tensor
from torch.nn import functional as F


def short_conv(x: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = silu(bias + sum_j weight[:, W-1-j] * x_{t-j}), j < W, with nothing from before the document.

    Args:
        x: [1, T, D].
        weight: [D, W], fp32; weight[:, W-1] multiplies the current token.
        positions: [1, T], position of each token in its document.
        bias: [D], fp32.
    Returns:
        [1, T, D] in x.dtype.
    Reference: So et al., Primer, arXiv:2109.08668; used by every delta-rule mixer.
    """
    width = weight.shape[1]
    y = x * weight[:, width - 1].to(x.dtype)
    for back in range(1, width):
        shifted = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        inside = (positions >= back)[..., None]
        y = y + shifted.where(inside, 0) * weight[:, width - 1 - back].to(x.dtype)
    return F.silu(y if bias is None else y + bias.to(x.dtype))
