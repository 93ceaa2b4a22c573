"""Initial weights: a pure function of (seed, parameter name, full shape), so that every layout starts from one model.

Each parameter is drawn whole on the CPU from its own generator; a rank that holds a slice draws the whole and cuts.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from loopline.models.looped_lm import LoopedLM


def init_weights(model: LoopedLM, seed: int) -> None:
    """Fill every parameter of `model` in place.

    A parameter that is one shard of a larger one carries `shard = (dim, index, count)`.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            dim, index, count = getattr(parameter, "shard", (0, 0, 1))
            shape = list(parameter.shape)
            shape[dim] *= count
            parameter.copy_(initial_value(model.stored_name(name), shape, seed).chunk(count, dim)[index])


def initial_value(name: str, shape: list[int], seed: int) -> Tensor:
    """The full fp32 tensor a parameter starts from.

    Matrices: normal, std 1/sqrt(d_in), cut at 3 std (Lingua, LT2's code base). Norms: ones. Loop gate and output gate:
    zeros. A_log = log U(0, 16) and dt_bias = softplus^-1 of log-uniform [1e-3, 0.1]: Gu & Dao, arXiv:2312.00752, as fla
    has them for Gated DeltaNet.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    leaf = name.rsplit(".", 2)[-2:]
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if leaf[-1] == "rho" or (leaf == ["gate_proj", "weight"] and ".mixer." in name):
        return torch.zeros(shape)
    if leaf[-1] == "A_log":
        return torch.empty(shape).uniform_(1e-4, 16.0, generator=generator).log()
    if leaf[-1] == "dt_bias":
        dt = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
        return dt + torch.log(-torch.expm1(-dt))
    std = shape[-1] ** -0.5  # d_in of a matrix, width of a convolution, d_model of the embedding
    return nn.init.trunc_normal_(torch.empty(shape), 0.0, std, -3 * std, 3 * std, generator=generator)
