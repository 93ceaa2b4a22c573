"""How parameters start: functions of a full shape and a generator. Modules name the ones that are not matrices."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

Fill = Callable[[list[int], Generator], Tensor]


def matrix(shape: list[int], generator: Generator) -> Tensor:
    """Normal, std 1/sqrt(d_in), cut at 3 std (Lingua, LT2's code base). d_in is the last size: of a matrix its input,
    of a convolution its width, of the embedding d_model."""
    std = shape[-1] ** -0.5
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -3 * std, 3 * std, generator=generator)


def zeros(shape: list[int], generator: Generator) -> Tensor:
    """0."""
    return torch.zeros(shape)


def ones(shape: list[int], generator: Generator) -> Tensor:
    """1."""
    return torch.ones(shape)


def mean_pool(shape: list[int], generator: Generator) -> Tensor:
    """1 / n over the last size: a learned pooling starts as the mean."""
    return torch.full(shape, 1 / shape[-1])


def log_uniform_rate(low: float, high: float) -> Fill:
    """log of U(low, high): decay rates, Gu & Dao, arXiv:2312.00752."""

    def fill(shape: list[int], generator: Generator) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator).log()

    return fill


def inverse_softplus_step(shape: list[int], generator: Generator) -> Tensor:
    """softplus^-1 of a log-uniform step size in [1e-3, 0.1]: Gu & Dao, arXiv:2312.00752."""
    dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
    return dt + torch.log(-torch.expm1(-dt))
