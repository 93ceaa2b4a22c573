"""The gated delta rule against forms written by others; what holds of every recurrence is tested with the others."""

import pytest
from packed_oracle import fla_form, over_documents, per_document, transformers_delta_rule
from recurrence_cases import GATED_DELTA, Op, assert_both_forms_equal


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
