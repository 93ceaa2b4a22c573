"""Inputs of the delta rule: those of the gated delta rule without the decay."""

from dataclasses import dataclass, replace

from gated_delta_cases import make_inputs as make_gated_delta_inputs
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op; shapes as in kernels/delta_rule/op.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    initial_state: Tensor | None
    cu_seqlens: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments."""
        found = {"q": self.q, "k": self.k, "v": self.v, "beta": self.beta}
        return found if self.initial_state is None else {**found, "initial_state": self.initial_state}


def make_inputs(
    lengths: list[int], *, n_heads: int = 2, d_k: int = 12, d_v: int = 20, beta_max: float = 1.0, has_state: bool = True
) -> Inputs:
    """Random inputs over documents of `lengths` tokens: unit q and k, beta in (0, beta_max)."""
    inputs = make_gated_delta_inputs(lengths, n_heads=n_heads, d_k=d_k, d_v=d_v, beta_max=beta_max, has_state=has_state)
    return Inputs(**{name: value for name, value in vars(inputs).items() if name != "g"})


def widened(inputs: Inputs) -> Inputs:
    """The same inputs in fp64."""
    return replace(inputs, **{name: x.double() for name, x in inputs.tensors().items()})
