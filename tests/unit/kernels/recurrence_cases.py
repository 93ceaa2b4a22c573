"""The linear recurrences: random inputs of each, its forms, and how two results are compared.

What a test says of all of them is in test_kernels_recurrences.py; what is true of one is in its own file.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.delta_rule import op as delta_rule_op
from loopline.kernels.delta_rule import reference as delta_rule_reference
from loopline.kernels.gated_delta import op as gated_delta_op
from loopline.kernels.gated_delta import reference as gated_delta_reference
from loopline.kernels.gla import op as gla_op
from loopline.kernels.gla import reference as gla_reference
from loopline.kernels.kda import op as kda_op
from loopline.kernels.kda import reference as kda_reference
from loopline.kernels.simple_gla import op as simple_gla_op
from loopline.kernels.simple_gla import reference as simple_gla_reference
from tests.tolerances import TOLERANCES, rms_ratio

Op = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """Arguments of a recurrence, shapes as in its op.py; None where it takes no such gate, or starts from zeros."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def arguments(self) -> dict[str, Any]:
        """All arguments, to call an op with."""
        return {**self.tensors(), "cu_seqlens": self.cu_seqlens, "scale": self.scale}

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype."""
        return replace(self, **{name: x.to(dtype) for name, x in self.tensors().items()})

    def rounded(self, dtype: torch.dtype) -> "Inputs":
        """With q, k and v, which a model gives in its compute dtype, in `dtype`."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def cut(self, start: int, end: int, initial_state: Tensor | None) -> "Inputs":
        """Tokens start to end as one document from `initial_state`; a constant decay [H] has no tokens."""
        tokens = {name: x[:, start:end] for name, x in self.tensors().items() if x.dim() > 1}
        return replace(self, **{**tokens, "initial_state": initial_state, "cu_seqlens": [0, end - start]})


def make_gated_delta_inputs(
    lengths: Sequence[int],
    *,
    n_heads: int = 2,
    d_k: int = 12,
    d_v: int = 20,
    beta_max: float = 1.0,
    has_state: bool = True,
) -> Inputs:
    """Random inputs over documents of `lengths` tokens: unit q and k, beta in (0, beta_max), decay around exp(-0.5)."""
    normal = _normal(sum(lengths) + 31 * d_k + d_v)
    n_tokens = sum(lengths)
    return Inputs(
        q=F.normalize(normal(1, n_tokens, n_heads, d_k), dim=-1),
        k=F.normalize(normal(1, n_tokens, n_heads, d_k), dim=-1),
        v=normal(1, n_tokens, n_heads, d_v),
        g=_log_decay(normal(1, n_tokens, n_heads)),
        beta=normal(1, n_tokens, n_heads).sigmoid() * beta_max,
        initial_state=normal(len(lengths), n_heads, d_k, d_v) if has_state else None,
        cu_seqlens=_boundaries(lengths),
    )


def make_kda_inputs(lengths: Sequence[int], **sizes: Any) -> Inputs:
    """Those of the gated delta rule, with a decay for each key channel: g [1, T, H, K]."""
    inputs = make_gated_delta_inputs(lengths, **sizes)
    normal = _normal(sum(lengths) + inputs.q.shape[-1])
    return replace(inputs, g=_log_decay(normal(*inputs.q.shape)))


def make_delta_rule_inputs(lengths: Sequence[int], **sizes: Any) -> Inputs:
    """Those of the gated delta rule without the decay."""
    return replace(make_gated_delta_inputs(lengths, **sizes), g=None)


def make_gla_inputs(
    lengths: Sequence[int], *, n_heads: int = 2, d_k: int = 12, d_v: int = 20, has_state: bool = True
) -> Inputs:
    """Random inputs over documents of `lengths` tokens, with a decay for each key channel: g [1, T, H, K]."""
    normal = _normal(sum(lengths) + 31 * d_k + d_v)
    n_tokens = sum(lengths)
    return Inputs(
        q=normal(1, n_tokens, n_heads, d_k),
        k=normal(1, n_tokens, n_heads, d_k),
        v=normal(1, n_tokens, n_heads, d_v),
        g=_log_decay(normal(1, n_tokens, n_heads, d_k)),
        beta=None,
        initial_state=normal(len(lengths), n_heads, d_k, d_v) if has_state else None,
        cu_seqlens=_boundaries(lengths),
    )


def make_simple_gla_inputs(
    lengths: Sequence[int], *, n_heads: int = 4, n_groups: int | None = None, is_constant: bool = False, **sizes: Any
) -> Inputs:
    """Those of gated linear attention, with q and k in groups of heads (two to a group if not told otherwise) and one
    decay per head: g [1, T, H], or [H] as in RetNet."""
    inputs = make_gla_inputs(lengths, n_heads=n_heads, **sizes)
    n_groups = n_groups or max(1, n_heads // 2)
    normal = _normal(sum(lengths) + n_heads)
    return replace(
        inputs,
        q=inputs.q[:, :, :n_groups],
        k=inputs.k[:, :, :n_groups],
        g=retnet_decay(n_heads) if is_constant else _log_decay(normal(*inputs.v.shape[:3])),
    )


def _normal(seed: int) -> Callable[..., Tensor]:
    return functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def _log_decay(x: Tensor) -> Tensor:
    return -F.softplus(x - 0.5)


def _boundaries(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def retnet_decay(n_heads: int) -> Tensor:
    """log(1 - 2 ** (-5 - i)) for heads i = 0, 1, ..: [H]. Reference: Sun et al., arXiv:2307.08621, eq. 8."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(n_heads))))


def with_decay(inputs: Inputs, g: float) -> Inputs:
    """The same inputs with one decay everywhere."""
    return replace(inputs, g=torch.full_like(inputs.g, g))


def per_head(x: Tensor, n_heads: int) -> Tensor:
    """[1, T, G, K] -> [1, T, H, K], each group at every head it serves."""
    return x.repeat_interleave(n_heads // x.shape[2], dim=2)


@dataclass(frozen=True, eq=False)
class Recurrence:
    """One op as the common tests see it.

    Attributes:
        op: the public function.
        recurrent, chunked: its two forms, of which the first is the judge.
        fla: path of the function of fla that it calls.
        make_inputs: `(lengths, *, n_heads, d_k, d_v, has_state)`, and beta_max of those with a beta.
        vanishing: gradients whose true value is about exp(-50) when everything is forgotten, with the largest that
            chunks and recurrence may give: the rounding of terms of size 1 that cancel.
    """

    name: str
    op: Op
    recurrent: Op
    chunked: Op
    fla: str
    make_inputs: Callable[..., Inputs]
    vanishing: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def takes(self, gate: str) -> bool:
        """Whether it has a `g` or a `beta`."""
        return gate in inspect.signature(self.op).parameters


GATED_DELTA = Recurrence(
    "gated_delta",
    functools.partial(gated_delta_op.gated_delta, output_final_state=True),
    gated_delta_reference.recurrent,
    gated_delta_reference.chunked,
    "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
    make_gated_delta_inputs,
    vanishing={"dg": (1e-5, 1e-20), "dinitial_state": (1e-5, 1e-20)},  # computed in fp32
)
KDA = Recurrence(
    "kda", kda_op.kda, kda_reference.recurrent, kda_reference.chunked, "fla.ops.kda.chunk_kda", make_kda_inputs
)
DELTA_RULE = Recurrence(
    "delta_rule",
    delta_rule_op.delta_rule,
    delta_rule_reference.recurrent,
    delta_rule_reference.chunked,
    "fla.ops.delta_rule.chunk_delta_rule",
    make_delta_rule_inputs,
)
GLA = Recurrence(
    "gla",
    gla_op.gla,
    gla_reference.recurrent,
    gla_reference.chunked,
    "fla.ops.gla.chunk_gla",
    make_gla_inputs,
    vanishing={"dg": (1e-13, 1e-18)},  # in fp64
)
SIMPLE_GLA = Recurrence(
    "simple_gla",
    simple_gla_op.simple_gla,
    simple_gla_reference.recurrent,
    simple_gla_reference.chunked,
    "fla.ops.simple_gla.chunk_simple_gla",
    make_simple_gla_inputs,
    vanishing=GLA.vanishing,
)
CONSTANT_DECAY = replace(
    SIMPLE_GLA, name="simple_gla_constant", make_inputs=functools.partial(make_simple_gla_inputs, is_constant=True)
)
RECURRENCES = [GATED_DELTA, KDA, DELTA_RULE, GLA, SIMPLE_GLA, CONSTANT_DECAY]


def results(op: Op, inputs: Inputs, **arguments: object) -> dict[str, Tensor]:
    """o, final_state, and the gradient of a fixed random projection of both with respect to every argument."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.tensors().items()}
    call = {"initial_state": None, **inputs.arguments(), **leaves, **arguments}
    o, final_state = op(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    normal = _normal(7)
    loss = (o * normal(*o.shape)).sum() + (final_state * normal(*final_state.shape)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"o": o.detach(), "final_state": final_state.detach()}
    return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCES["fp32", "op"]
) -> None:
    """Each of the same results agrees, NaN with nothing."""
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert all(ratio <= tolerance for ratio in worst.values()), worst


@functools.cache
def both_forms(
    recurrence: Recurrence, lengths: tuple[int, ...], **options: Any
) -> tuple[Inputs, list[dict[str, Tensor]]]:
    """Inputs over documents of `lengths` tokens, and what our two forms make of them, computed once for all oracles."""
    inputs = recurrence.make_inputs(lengths, **options)
    return inputs, [results(recurrence.recurrent, inputs), results(recurrence.chunked, inputs)]


def assert_both_forms_equal(oracle: Op, recurrence: Recurrence, lengths: tuple[int, ...], **options: Any) -> None:
    inputs, found = both_forms(recurrence, lengths, **options)
    expected = results(oracle, inputs)
    for ours in found:
        assert_same(ours, expected)


def replace_fla(monkeypatch: pytest.MonkeyPatch, recurrence: Recurrence, kernel: Op) -> None:
    """Puts `kernel`, which takes the boundaries as a list, in the place of the function of fla that the op calls.

    fla swallows keywords it does not know, so a wrong name would change the result without an error: where fla is
    installed, here it is one.
    """
    path, name = recurrence.fla.rsplit(".", 1)
    known = None
    if importlib.util.find_spec("fla") is not None:
        known = inspect.signature(getattr(importlib.import_module(path), name)).parameters.keys()

    def stand_in(**arguments: Any) -> tuple[Tensor, Tensor]:
        assert known is None or arguments.keys() <= known
        assert arguments.pop("output_final_state") is True
        boundaries = arguments.pop("cu_seqlens")
        assert boundaries.dtype == torch.int32
        return kernel(**arguments, cu_seqlens=boundaries.tolist())

    module = types.ModuleType(path)
    setattr(module, name, stand_in)
    monkeypatch.setitem(sys.modules, path, module)
