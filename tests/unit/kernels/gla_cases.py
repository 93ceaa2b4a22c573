"""Inputs of gated linear attention: documents of random q, k, v with a decay for each key channel."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op; shapes as in kernels/gla/op.py, or kernels/simple_gla/op.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    initial_state: Tensor | None
    cu_seqlens: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments."""
        found = {"q": self.q, "k": self.k, "v": self.v, "g": self.g}
        return found if self.initial_state is None else {**found, "initial_state": self.initial_state}

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""
        return replace(self, **{name: x.to(dtype) for name, x in self.tensors().items()})


def make_inputs(
    lengths: list[int], *, n_heads: int = 2, d_k: int = 12, d_v: int = 20, has_state: bool = True
) -> Inputs:
    """Random inputs over documents of `lengths` tokens, decay around exp(-0.5)."""
    generator = torch.Generator().manual_seed(sum(lengths) + 31 * d_k + d_v)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n_tokens = sum(lengths)
    return Inputs(
        q=normal(1, n_tokens, n_heads, d_k),
        k=normal(1, n_tokens, n_heads, d_k),
        v=normal(1, n_tokens, n_heads, d_v),
        g=-F.softplus(normal(1, n_tokens, n_heads, d_k) - 0.5),
        initial_state=normal(len(lengths), n_heads, d_k, d_v) if has_state else None,
        cu_seqlens=[sum(lengths[:i]) for i in range(len(lengths) + 1)],
    )


def with_decay(inputs: Inputs, g: float) -> Inputs:
    """The same inputs with one decay everywhere."""
    return replace(inputs, g=torch.full_like(inputs.g, g))


def with_some_strong(inputs: Inputs, g: float) -> Inputs:
    """The same inputs with decay g in every seventh number of g, so at some tokens of each head or channel."""
    strong = torch.arange(inputs.g.numel()).view_as(inputs.g) % 7 == 3
    return replace(inputs, g=inputs.g.masked_fill(strong, g))
