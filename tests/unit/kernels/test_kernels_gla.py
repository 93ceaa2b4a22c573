"""Gated linear attention against forms written by others: itself, HGRN, HGRN2's gates, linear attention."""

import pytest
import torch
from packed_oracle import fla_form, over_documents, per_document
from recurrence_cases import GLA, Op, assert_both_forms_equal, assert_same, make_gla_inputs, results, with_decay
from torch import Tensor

from loopline.kernels.gla.reference import chunked, recurrent


def _gla_oracle() -> Op:
    form = fla_form("fla.ops.gla.naive.naive_recurrent_gla")
    return per_document(lambda g, **rest: form(**rest, gk=g, output_final_state=True))


def _hgrn_oracle() -> Op:
    """HGRN, a gate for each number of a flat state, with K * V numbers written as k v^T and read by q."""
    form = fla_form("fla.ops.hgrn.naive.naive_recurrent_hgrn")

    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        written = k[..., :, None] * v[..., None, :]  # [1, T, H, K, V]
        states, _ = form(
            x=written.flatten(2),
            g=g[..., None].expand_as(written).flatten(2),
            initial_state=None if initial_state is None else initial_state.flatten(1),
        )
        states = states.view_as(written)
        return torch.einsum("bthk,bthkv->bthv", q * q.shape[-1] ** -0.5, states), states[:, -1]

    return per_document(op)


ORACLES = {"gla": _gla_oracle, "hgrn": _hgrn_oracle}


@pytest.mark.parametrize("has_state", [False, True])
@over_documents
@pytest.mark.parametrize("oracle", ORACLES)
def test_both_forms_equal_those_of_other_libraries(oracle: str, lengths: tuple[int, ...], has_state: bool) -> None:
    assert_both_forms_equal(ORACLES[oracle](), GLA, lengths, has_state=has_state)


@pytest.mark.parametrize("oracle", ORACLES)
def test_both_forms_equal_those_of_other_libraries_for_hgrn2(oracle: str) -> None:
    inputs = make_gla_inputs([65, 3])

    def hgrn2(form: Op) -> Op:  # the forget gate is f = exp(g) and the key 1 - f; 0 * k gives k a gradient of 0
        return lambda q, k, v, g, **rest: form(q, 1 - g.exp() + 0 * k, v, g=g, **rest)

    expected = results(hgrn2(ORACLES[oracle]()), inputs)
    assert_same(results(hgrn2(recurrent), inputs), expected)
    assert_same(results(hgrn2(chunked), inputs), expected)


def test_both_forms_without_decay_equal_linear_attention() -> None:
    form = fla_form("fla.ops.linear_attn.naive.naive_recurrent_linear_attn")
    oracle = per_document(lambda g, v, **rest: form(**rest, v=v + 0 * g.sum(), output_final_state=True))
    inputs = with_decay(make_gla_inputs([65, 1]), 0.0)
    expected = results(oracle, inputs)
    for both in (recurrent, chunked):
        found = results(both, inputs)
        assert_same(found, {**expected, "dg": found["dg"]})  # the oracle has no decay
