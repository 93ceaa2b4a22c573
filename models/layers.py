"""Linear, embedding and norm layers with one precision rule.

Parameters are fp32. A layer casts its weight to the dtype of its input, so the dtype of the embedding's output sets the
compute dtype of the whole model, and every gradient arrives in fp32: sums over loops and micro-batches are fp32 sums.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopline.kernels.precision import wide


class Linear(nn.Linear):
    """y = x W^T, W [d_out, d_in] in fp32, computed in x.dtype. No bias anywhere in these models."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Rows of a [vocab_size, d_model] fp32 table, in the compute dtype."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """[1, T] int64 -> [1, T, C] fp32; the model casts to its compute dtype."""
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in fp32. Zhang & Sennrich, arXiv:1910.07467."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def scale(self) -> Tensor:
        """The learned scale, [d], fp32. Parallel versions override this."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] in x.dtype."""
        return F.rms_norm(wide(x), self.weight.shape, self.scale(), self.eps).to(x.dtype)


class GroupRMSNorm(nn.Module):
    """RMSNorm over each of `n_groups` equal parts of the channels; the parts may span heads.

    The mean square is a method of its own: where a group's channels are cut over ranks it is a sum over them.
    """

    def __init__(self, d: int, eps: float, n_groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps
        self.n_groups = n_groups

    def mean_square(self, x: Tensor) -> Tensor:
        """[..., n_groups, d / n_groups] -> [..., n_groups, 1]."""
        return x.square().mean(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] in x.dtype."""
        groups = wide(x).unflatten(-1, (self.n_groups, -1))
        normed = groups * torch.rsqrt(self.mean_square(groups) + self.eps)
        return (normed.flatten(-2) * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias, statistics in fp32. Ba et al., arXiv:1607.06450."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.bias = nn.Parameter(torch.empty(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] in x.dtype."""
        return F.layer_norm(wide(x), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)
