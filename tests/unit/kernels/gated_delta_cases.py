"""Inputs of the gated delta rule, and one call that returns outputs, final state and every gradient by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

Op = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op; shapes as in kernels/gated_delta/op.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None
    cu_seqlens: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments."""
        found = {"q": self.q, "k": self.k, "v": self.v, "g": self.g, "beta": self.beta}
        return found if self.initial_state is None else {**found, "initial_state": self.initial_state}


def make_inputs(
    lengths: list[int], *, n_heads: int = 2, d_k: int = 12, d_v: int = 20, beta_max: float = 1.0, has_state: bool = True
) -> Inputs:
    """Random inputs over documents of `lengths` tokens: unit q and k, beta in (0, beta_max), decay around exp(-0.5)."""
    generator = torch.Generator().manual_seed(sum(lengths) + 31 * d_k + d_v)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n_tokens = sum(lengths)
    return Inputs(
        q=F.normalize(normal(1, n_tokens, n_heads, d_k), dim=-1),
        k=F.normalize(normal(1, n_tokens, n_heads, d_k), dim=-1),
        v=normal(1, n_tokens, n_heads, d_v),
        g=-F.softplus(normal(1, n_tokens, n_heads) - 0.5),
        beta=normal(1, n_tokens, n_heads).sigmoid() * beta_max,
        initial_state=normal(len(lengths), n_heads, d_k, d_v) if has_state else None,
        cu_seqlens=[sum(lengths[:i]) for i in range(len(lengths) + 1)],
    )


def with_decay(inputs: Inputs, g: float) -> Inputs:
    """The same inputs with one decay everywhere."""
    return replace(inputs, g=torch.full_like(inputs.g, g))


def results(op: Op, inputs: Inputs, **arguments: object) -> dict[str, Tensor]:
    """o, final_state, and the gradient of a fixed random projection of both with respect to every argument."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.tensors().items()}
    call = {"initial_state": None, **leaves}
    o, final_state = op(
        call.pop("q"),
        call.pop("k"),
        call.pop("v"),
        **call,
        scale=inputs.scale,
        cu_seqlens=inputs.cu_seqlens,
        **arguments,
    )
    generator = torch.Generator().manual_seed(7)
    loss = (o * torch.randn(o.shape, generator=generator)).sum()
    loss = loss + (final_state * torch.randn(final_state.shape, generator=generator)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"o": o.detach(), "final_state": final_state.detach()}
    return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}
