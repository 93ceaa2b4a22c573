"""The gated delta rule against forms written by others; what holds of every recurrence is tested with the others."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from packed_oracle import fla_form, over_documents, per_document, transformers_delta_rule
from recurrence_cases import (
    GATED_DELTA,
    Op,
    assert_both_forms_equal,
    assert_same,
    make_gated_delta_inputs,
    per_head,
    replace_fla,
    results,
)

from loopline.kernels.gated_delta.op import gated_delta
from loopline.kernels.precision import l2_normalize


def _fla(name: str) -> Op:
    # Keywords: the two naive forms order g and beta differently.
    form = fla_form(f"fla.ops.gated_delta_rule.naive.{name}")
    return per_document(lambda **arguments: form(**arguments, output_final_state=True))


ORACLES = {
    "fla-recurrent": lambda: _fla("naive_recurrent_gated_delta_rule"),
    "fla-chunk": lambda: _fla("naive_chunk_gated_delta_rule"),
    "transformers-recurrent": lambda: transformers_delta_rule("qwen3_next", "torch_recurrent_gated_delta_rule"),
    "transformers-chunk": lambda: transformers_delta_rule("qwen3_next", "torch_chunk_gated_delta_rule"),
}


@pytest.mark.parametrize("has_state", [False, True])
@over_documents
@pytest.mark.parametrize("oracle", ORACLES)
def test_both_forms_equal_those_of_other_libraries(oracle: str, lengths: tuple[int, ...], has_state: bool) -> None:
    assert_both_forms_equal(ORACLES[oracle](), GATED_DELTA, lengths, beta_max=2.0, has_state=has_state)


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_value_heads_of_a_group_read_one_key_head(form: str, group: int) -> None:
    shared = make_gated_delta_inputs([65, 1], n_heads=2 * group)
    shared = replace(shared, q=shared.q[:, :, :2], k=shared.k[:, :, :2])
    op = getattr(GATED_DELTA, form)
    repeated = lambda q, k, v, **rest: op(per_head(q, 2 * group), per_head(k, 2 * group), v, **rest)
    assert_same(results(op, shared), results(repeated, shared))


def test_public_op_hands_groups_of_value_heads_on() -> None:
    shared = make_gated_delta_inputs([65, 1], n_heads=4)
    shared = replace(shared, q=shared.q[:, :, :2], k=shared.k[:, :, :2])
    assert_same(results(GATED_DELTA.op, shared), results(GATED_DELTA.recurrent, shared))


@pytest.mark.parametrize("n_key_heads", [3, 5])
def test_key_heads_that_do_not_divide_the_value_heads_are_refused(n_key_heads: int) -> None:
    inputs = make_gated_delta_inputs([5], n_heads=4)
    keys = torch.zeros(1, 5, n_key_heads, 12)
    with pytest.raises(ValueError, match=rf"q \(1, 5, {n_key_heads}, 12\).* v \(1, 5, 4, 20\).*multiple of H"):
        GATED_DELTA.op(**replace(inputs, q=keys, k=keys).arguments())


def test_final_states_are_given_only_where_asked_for() -> None:
    arguments = make_gated_delta_inputs([65, 1]).arguments()
    o, final_state = gated_delta(**arguments)
    expected, _ = gated_delta(**arguments, output_final_state=True)
    assert final_state is None
    assert torch.equal(o, expected)


def test_fla_is_told_whether_final_states_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def kernel(v: torch.Tensor, output_final_state: bool, **_: object) -> tuple[torch.Tensor, None]:
        told.append(output_final_state)
        return v, None

    module = types.ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    arguments = make_gated_delta_inputs([65, 1]).arguments()
    for output_final_state in (False, True):
        gated_delta(**arguments, output_final_state=output_final_state, backend="fla")
    assert told == [False, True]


@pytest.mark.parametrize("backend", ["reference", "fla"])
def test_normalize_is_the_unit_length_callers_gave_before(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_fla(monkeypatch, GATED_DELTA, GATED_DELTA.recurrent)
    inputs = make_gated_delta_inputs([65, 1])
    inputs = replace(inputs, q=3 * inputs.q, k=0.01 * inputs.k)
    before = lambda q, k, v, **rest: GATED_DELTA.op(l2_normalize(q), l2_normalize(k), v, backend=backend, **rest)
    found = results(GATED_DELTA.op, inputs, normalize=True, backend=backend)
    for name, value in results(before, inputs).items():
        assert torch.equal(value, found[name]), name
    assert not torch.equal(found["o"], results(GATED_DELTA.op, inputs, backend=backend)["o"])
