"""Kimi Delta Attention: channels that forget all at once, the gated delta rule inside it, and forms of others."""

from dataclasses import replace

import pytest
import torch
from packed_oracle import fla_form, over_documents, per_document, transformers_delta_rule
from recurrence_cases import KDA, Inputs, Op, assert_same, both_forms, make_kda_inputs, results
from torch import Tensor

from loopline.kernels.gated_delta import reference as gated_delta_reference
from loopline.kernels.kda.reference import chunked, recurrent

FORGETS_ALL = float("-inf")  # which the other recurrences do not take


def _with_strong_decay(where: str, g: float) -> Inputs:
    inputs = make_kda_inputs([130, 65, 1])
    strong = {
        "everywhere": torch.tensor(True),
        "tokens": (torch.arange(196) % 7 == 3)[:, None, None],
        "channels": torch.arange(12) % 3 == 1,
        "scattered": torch.rand(inputs.g.shape, generator=torch.Generator().manual_seed(3)) < 0.2,
    }[where]
    return replace(inputs, g=inputs.g.masked_fill(strong, g))


# Held to the ordinary tolerance: no running sum is subtracted, so a strong decay costs no digits.
@pytest.mark.parametrize(
    ("where", "g"),
    [
        ("everywhere", FORGETS_ALL),
        ("tokens", FORGETS_ALL),
        *((where, g) for where in ("channels", "scattered") for g in (-50.0, -1000.0, FORGETS_ALL)),
    ],
)
def test_chunks_equal_the_recurrence_when_some_channels_forget_everything(where: str, g: float) -> None:
    inputs = _with_strong_decay(where, g)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_strong_decay_costs_no_digits_against_fp64(form: Op) -> None:
    inputs = _with_strong_decay("scattered", -1000.0)
    assert_same(results(form, inputs), results(recurrent, inputs.to(torch.float64)))


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_one_decay_for_all_channels_is_the_gated_delta_rule(form: Op) -> None:
    inputs = make_kda_inputs([65, 1])
    shared = inputs.g[..., :1]
    found = results(form, replace(inputs, g=shared.expand_as(inputs.g)))
    found["dg"] = found["dg"].sum(-1)
    assert_same(found, results(gated_delta_reference.recurrent, replace(inputs, g=shared[..., 0])))


def _fla(name: str) -> Op:
    form = fla_form(f"fla.ops.kda.naive.{name}")

    def op(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        if name == "naive_recurrent_kda":
            return form(**arguments, output_final_state=True)
        n_tokens = arguments["q"].shape[1]
        # It takes whole chunks only, and its exp is not masked: short ones keep it finite.
        size = next(size for size in range(16, 0, -1) if n_tokens % size == 0)
        return form(**arguments, output_final_state=True, chunk_size=size)

    return per_document(op)


ORACLES = {
    "fla-recurrent": lambda: _fla("naive_recurrent_kda"),
    "fla-chunk": lambda: _fla("naive_chunk_kda"),
    "transformers-recurrent": lambda: transformers_delta_rule("kimi_linear", "recurrent_kimi_delta_attention"),
    "transformers-chunk": lambda: transformers_delta_rule("kimi_linear", "chunk_kimi_delta_attention"),
}


@pytest.mark.parametrize("has_state", [False, True])
@over_documents
@pytest.mark.parametrize("oracle", ORACLES)
def test_both_forms_equal_those_of_other_libraries(oracle: str, lengths: tuple[int, ...], has_state: bool) -> None:
    inputs, ours = both_forms(KDA, lengths, beta_max=2.0, has_state=has_state)
    expected = results(ORACLES[oracle](), inputs)
    for found in ours:
        if lengths == (1,) and not has_state:
            # Nothing is there to decay: the true gradient of g is 0, and the oracle's chunks leave rounding of it.
            assert not found["dg"].any()
            assert expected["dg"].abs().max() <= 1e-6
            found = {**found, "dg": expected["dg"]}
        assert_same(found, expected)
