"""What fla's Triton kernels, called as our ops call them, differ by from our references, on a CPU.

Run as `python -m tests.unit.kernels.fla_interpreted` from the root with TRITON_INTERPRET=1: one line of JSON a case.
A case is one function; nothing of fla is imported before it runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.unit.kernels.interpreted import Case, Figures, figures, report

CU_SEQLENS = [0, 68, 69, 97]  # more than a chunk of 64, one token, part of a chunk
N_TOKENS = CU_SEQLENS[-1]
N_HEADS, D_KEY, D_VALUE = 2, 16, 32


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def _unit(*shape: int) -> Tensor:
    return F.normalize(_normal(*shape), dim=-1)


def _log_decay(*shape: int) -> Tensor:
    return -F.softplus(_normal(*shape) - 0.5)


def _beta(largest: float = 2.0) -> Tensor:
    return largest * _normal(1, N_TOKENS, N_HEADS).sigmoid()  # above 1: negative eigenvalues


def _recurrence(op: Callable[..., Any], recurrent: Callable[..., Any], *, n_groups: int = N_HEADS, **more: Any) -> Case:
    """A case of an op that carries a state, from a state given; `more` are its other inputs."""
    inputs = {
        "q": _unit(1, N_TOKENS, n_groups, D_KEY),
        "k": _unit(1, N_TOKENS, n_groups, D_KEY),
        "v": _normal(1, N_TOKENS, N_HEADS, D_VALUE),
        **more,
        "initial_state": _normal(len(CU_SEQLENS) - 1, N_HEADS, D_KEY, D_VALUE),
    }
    options = {"scale": D_KEY**-0.5, "cu_seqlens": CU_SEQLENS}
    return Case(inputs, ("q", "k", "v"), partial(op, backend="fla"), recurrent, options=options)


def gated_delta() -> Case:
    from loopline.kernels.gated_delta import op, reference

    ours = partial(op.gated_delta, output_final_state=True)
    return _recurrence(ours, reference.recurrent, g=_log_decay(1, N_TOKENS, N_HEADS), beta=_beta())


def gated_delta_in_training() -> Case:
    """No state in, and none taken out: fla's backward gets no gradient for it."""
    case = gated_delta()
    del case.inputs["initial_state"]
    op, reference = case.op, case.reference
    case.op = lambda **arguments: op(**arguments, output_final_state=False)[0]
    case.reference = lambda **arguments: reference(**arguments)[0]
    return case


def delta_rule() -> Case:
    from loopline.kernels.delta_rule import op, reference

    # Nothing decays here, and with beta up to 2 rounding to bf16 lasts: 9.4e-3 was measured.
    return _recurrence(op.delta_rule, reference.recurrent, beta=_beta(1.0))


def kda() -> Case:
    from loopline.kernels.kda import op, reference

    return _recurrence(op.kda, reference.recurrent, g=_log_decay(1, N_TOKENS, N_HEADS, D_KEY), beta=_beta())


def gla() -> Case:
    from loopline.kernels.gla import op, reference

    return _recurrence(op.gla, reference.recurrent, g=_log_decay(1, N_TOKENS, N_HEADS, D_KEY))


def simple_gla() -> Case:
    from loopline.kernels.simple_gla import op, reference

    return _recurrence(op.simple_gla, reference.recurrent, n_groups=1, g=_log_decay(1, N_TOKENS, N_HEADS))


def simple_gla_learned_constant() -> Case:
    from loopline.kernels.simple_gla import op, reference

    case = _recurrence(op.simple_gla, reference.recurrent, g=_log_decay(N_HEADS))
    case.shared = ("g",)
    return case


def simple_gla_fixed_constant() -> Case:
    case = simple_gla_learned_constant()  # RetNet: another path of ours and of fla
    case.shared = ()
    case.constants["g"] = case.inputs.pop("g")
    return case


def attention(window: int | None = None) -> Case:
    from loopline.kernels.attention import op, reference

    def of_row(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return partial(attend, cu_seqlens=CU_SEQLENS, window=window)

    heads = {"q": 2, "k": 1, "v": 1}
    return Case(
        inputs={name: _normal(1, N_TOKENS, n_heads, 32) for name, n_heads in heads.items()},
        rounded=("q", "k", "v"),
        op=of_row(partial(op.packed_attention, backend="fla")),
        reference=of_row(reference.dense_attention),
    )


def nsa() -> Case:
    """Compressed and selected branches, the selection included: fla's window needs another package."""
    from loopline.kernels.nsa.blocks import NsaSizes
    from loopline.kernels.nsa.op import nsa as ours

    bounds = [0, 44, 45, 64]  # six blocks of eight, of which four are read; its kernels run a program a token
    sizes = NsaSizes(block_size=8, n_selected=4, window=1)
    heads = {"q": 16, "k": 1, "v": 1}  # fla wants at least sixteen query heads to a key/value head

    def fla(q: Tensor, k: Tensor, v: Tensor, *, compressed: Tensor, selected: Tensor) -> Tensor:
        from fla.ops.nsa import parallel_nsa

        return parallel_nsa(
            q=q,
            k=k,
            v=v,
            g_cmp=compressed,
            g_slc=selected,
            block_counts=sizes.n_selected,
            block_size=sizes.block_size,
            window_size=0,
            scale=q.shape[-1] ** -0.5,
            cu_seqlens=torch.tensor(bounds),
        )

    def reference(q: Tensor, k: Tensor, v: Tensor, *, compressed: Tensor, selected: Tensor) -> Tensor:
        gates = torch.stack([compressed, selected, torch.zeros_like(selected)], dim=-1)
        return ours(q, k, v, gates=gates, sizes=sizes, cu_seqlens=bounds, backend="reference")

    gates = {name: _normal(1, bounds[-1], heads["q"]).sigmoid() for name in ("compressed", "selected")}
    qkv = {name: _normal(1, bounds[-1], n_heads, D_KEY) for name, n_heads in heads.items()}
    return Case({**qkv, **gates}, ("q", "k", "v", "compressed", "selected"), fla, reference)


ATTENTION = {"o", "dq", "dk", "dv"}
STATE = ATTENTION | {"final_state", "dinitial_state"}
# How a case is made, and the tensors compared: written out, so that one that goes missing is noticed.
MAKERS: dict[str, tuple[Callable[[], Case], set[str]]] = {
    "gated_delta": (gated_delta, STATE | {"dg", "dbeta"}),
    "gated_delta_in_training": (gated_delta_in_training, ATTENTION | {"dg", "dbeta"}),
    "delta_rule": (delta_rule, STATE | {"dbeta"}),
    "kda": (kda, STATE | {"dg", "dbeta"}),
    "gla": (gla, STATE | {"dg"}),
    "simple_gla": (simple_gla, STATE | {"dg"}),
    "simple_gla_learned_constant": (simple_gla_learned_constant, STATE | {"dg"}),
    "simple_gla_fixed_constant": (simple_gla_fixed_constant, STATE),
    "attention": (attention, ATTENTION),
    "window_attention": (partial(attention, window=17), ATTENTION),
    "nsa": (nsa, ATTENTION | {"dcompressed", "dselected"}),
}
LEFT_OUT = {
    ("delta_rule", "fp32"),  # refused by fla
    ("nsa", "bf16"),  # takes seconds, and rounding may choose other blocks; no model calls it
}
CASES = [(name, dtype) for name in MAKERS for dtype in ("fp32", "bf16") if (name, dtype) not in LEFT_OUT]


def run(name: str, dtype: torch.dtype) -> Figures:
    """A case by name, made anew."""
    return figures(MAKERS[name][0](), dtype)


if __name__ == "__main__":
    report({(name, dtype): partial(run, name) for name, dtype in CASES})
