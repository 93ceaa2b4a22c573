"""The short convolution equals torch's conv1d on each document alone, gradients included."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.short_conv.op import short_conv
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [[1], [2], [63], [64], [65], [257], [1, 1, 1], [3, 1, 65, 2]]


def positions_of(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def conv1d_per_document(x: Tensor, weight: Tensor, lengths: list[int]) -> Tensor:
    """[1, T, D], by torch's depthwise conv1d with zeros to the left of each document."""
    width = weight.shape[1]
    parts = []
    for document in x.split(lengths, dim=1):
        padded = F.pad(document.mT, (width - 1, 0))  # [1, D, W-1+T]
        parts.append(F.conv1d(padded, weight[:, None], groups=len(weight)).mT)
    return F.silu(torch.cat(parts, dim=1))


@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_short_conv_equals_conv1d_per_document_with_gradients(lengths: list[int], width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(1, sum(lengths), 7, generator=generator, requires_grad=True)
    weight = torch.randn(7, width, generator=generator, requires_grad=True)
    upstream = torch.randn(x.shape, generator=generator)
    found = short_conv(x, weight, positions_of(lengths))
    expected = conv1d_per_document(x, weight, lengths)
    assert rms_ratio(found.detach(), expected.detach()) <= TOLERANCES["fp32", "op"]
    gradients = [torch.autograd.grad((y * upstream).sum(), [x, weight]) for y in (found, expected)]
    for mine, theirs in zip(*gradients):
        assert rms_ratio(mine, theirs) <= TOLERANCES["fp32", "op"]


def test_nothing_crosses_a_document_boundary_not_even_nan() -> None:
    x, weight, lengths = torch.randn(1, 6, 3), torch.randn(3, 4), [2, 3, 1]
    clean = short_conv(x, weight, positions_of(lengths))
    starts = [0, *itertools.accumulate(lengths)]
    x[:, 2:5] = float("nan")  # the second document
    found = short_conv(x, weight, positions_of(lengths))
    assert torch.equal(found[:, : starts[1]], clean[:, : starts[1]])
    assert torch.equal(found[:, starts[2] :], clean[:, starts[2] :])
    assert found[:, 2:5].isnan().all()


def test_output_keeps_the_dtype_of_x_and_the_weight_its_fp32_gradient() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    y = short_conv(torch.randn(1, 9, 3).bfloat16(), weight, positions_of([9]))
    y.sum().backward()
    assert (y.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
