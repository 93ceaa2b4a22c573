"""Gradients that later loops find for tensors an earlier loop has made, handed over in backward, outside of the block.

A block may leave something that later loops use and learn about in their own forward passes (DSA's choice of keys, and
its indexer). The gradient is complete once every loop has run, which backward comes after. It is handed over at the
block's output and not inside of it, so that a block asks nothing of the host in its backward pass and compiles as one
graph.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Left(Protocol):
    """What a block leaves in its memory for later loops of a row."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the tensors it was deferred with, after the last loop."""
        ...


# The tensors, with their graph; the memory that `Left` is in, and the loop that left it: its key there.
Deferred = tuple[tuple[Tensor, ...], dict[int, Any], int]


def deliver(h: Tensor, h_in: Tensor, deferred: Deferred) -> Tensor:
    """The output of a block, whose backward pass first gives `deferred` tensors their gradients.

    What the block left is forgotten where its backward pass ends, a recomputation included: it would else live as long
    as its row, which is longer than activations do.

    Args:
        h: [1, T, C], the block's output.
        h_in: [1, T, C], its input.
    """
    tensors, memory, loop_idx = deferred
    if h_in.requires_grad:  # its gradient is the last that the block finds
        h_in.register_hook(lambda _: memory.pop(loop_idx, None) and None)
    return _Deliver.apply(h, memory, loop_idx, h_in.requires_grad, *tensors)  # type: ignore[no-untyped-call]


class _Deliver(torch.autograd.Function):
    """Identity on h; the gradients of `tensors` are what `memory[loop_idx]` has of them."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, memory: dict[int, Left], loop_idx: int, is_needed_later: bool, *tensors: Tensor
    ) -> Tensor:
        ctx.memory, ctx.loop_idx, ctx.is_needed_later = memory, loop_idx, is_needed_later
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.memory[ctx.loop_idx].gradients()
        if not ctx.is_needed_later:  # nothing is recomputed either: that takes an input with a gradient
            ctx.memory.pop(ctx.loop_idx)
        cast = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes))
        return grad_h, None, None, None, *cast
