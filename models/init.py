"""Initial weights: a pure function of (seed, parameter name, full shape), so that every layout starts from one model.

Each parameter is drawn whole on the CPU from its own generator; a rank that holds a slice draws the whole and cuts.
"""

import hashlib

import torch
from torch import Tensor

from loopline.models import fills
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
            value = initial_value(model.stored_name(name), shape, seed, fill_of(model, name))
            parameter.copy_(value.chunk(count, dim)[index])


def initial_value(name: str, shape: list[int], seed: int, fill: fills.Fill = fills.matrix) -> Tensor:
    """The full fp32 tensor a parameter starts from."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return fill(shape, generator)


def fill_of(model: LoopedLM, name: str) -> fills.Fill:
    """The rule of a parameter: its mixer's where that has one, else by kind."""
    if ".mixer." in name:
        _, block_idx, _, local = name.split(".", 3)
        mixer_fill = model.blocks[block_idx].mixer.fills.get(local)  # type: ignore[union-attr, operator]
        if mixer_fill is not None:
            return mixer_fill
    if name.endswith("norm.weight"):
        return fills.ones
    if name.endswith((".rho", ".bias")):
        return fills.zeros
    return fills.matrix
