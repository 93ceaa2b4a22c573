"""The delta rule: no decay to hide what beta does, forms written by others, and the dtypes fla has no kernel for."""

from dataclasses import replace

import pytest
import torch
from packed_oracle import fla_form, over_documents, per_document, transformers_delta_rule
from recurrence_cases import (
    DELTA_RULE,
    Op,
    assert_both_forms_equal,
    assert_same,
    make_delta_rule_inputs,
    results,
)
from torch import Tensor

from loopline.kernels.delta_rule.op import delta_rule
from loopline.kernels.delta_rule.reference import chunked, recurrent
from tests.tolerances import TOLERANCES, rms_ratio


def test_chunks_equal_the_recurrence_when_every_key_is_the_same() -> None:
    inputs = make_delta_rule_inputs([130, 1], beta_max=2.0)
    inputs = replace(inputs, k=inputs.k[:, :1].expand_as(inputs.k))
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_writing_with_beta_1_is_read_back_exactly(form: Op) -> None:
    inputs = make_delta_rule_inputs([65])
    inputs = replace(inputs, q=inputs.k, beta=torch.ones_like(inputs.beta))
    o, _ = form(**{**inputs.arguments(), "scale": 1.0})
    assert rms_ratio(o, inputs.v) <= TOLERANCES["fp32", "op"]


def _fla(name: str) -> Op:
    form = fla_form(f"fla.ops.delta_rule.naive.{name}")

    # Head-first, unlike everything else here.
    def op(initial_state: Tensor | None, **arguments: Tensor) -> tuple[Tensor, Tensor]:
        heads_first = {key: x.transpose(1, 2) for key, x in arguments.items()}
        if name == "delta_rule_chunkwise":  # it takes no state, and whole chunks only
            assert initial_state is None
            n_tokens = arguments["q"].shape[1]
            o, state = form(**heads_first, chunk_size=next(n for n in range(16, 0, -1) if n_tokens % n == 0))
        else:
            o, state = form(**heads_first, initial_state=initial_state, output_final_state=True)
        return o.transpose(1, 2), state

    return per_document(op)


def _transformers(name: str) -> Op:
    # It has the gated rule only, which without decay is this one.
    gated = transformers_delta_rule("qwen3_next", name)
    return lambda *qkv, beta, **rest: gated(*qkv, g=torch.zeros_like(beta), beta=beta, **rest)


ORACLES = {
    "fla-recurrent": lambda: _fla("delta_rule_recurrence"),
    "fla-chunk": lambda: _fla("delta_rule_chunkwise"),
    "transformers-recurrent": lambda: _transformers("torch_recurrent_gated_delta_rule"),
    "transformers-chunk": lambda: _transformers("torch_chunk_gated_delta_rule"),
}


# fla's chunk form takes no initial state.
@pytest.mark.parametrize(
    ("oracle", "has_state"),
    [(name, has) for name in ORACLES for has in (False, True) if (name, has) != ("fla-chunk", True)],
)
@over_documents
def test_both_forms_equal_those_of_other_libraries(oracle: str, lengths: tuple[int, ...], has_state: bool) -> None:
    assert_both_forms_equal(ORACLES[oracle](), DELTA_RULE, lengths, beta_max=2.0, has_state=has_state)


@pytest.mark.parametrize("wide", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fla_in_a_dtype_without_a_kernel_is_refused_with_what_to_do(wide: str, dtype: torch.dtype) -> None:
    half = make_delta_rule_inputs([5]).rounded(torch.bfloat16)
    mixed = replace(half, **{wide: getattr(half, wide).to(dtype)})
    named = rf"got {wide} in {dtype} .*train\.dtype=bf16 or take backend 'reference'"
    with pytest.raises(ValueError, match=named):
        delta_rule(**mixed.arguments(), backend="fla")
