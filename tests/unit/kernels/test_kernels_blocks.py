"""Looped blocks run on our Triton kernels as on the references, and each compiles as one graph, backward included, that
serves rows with any document boundaries."""

import pytest
from blocks_interpreted import CASES
from interpreted import Figures, Key, process

from tests.tolerances import TOLERANCES


@pytest.fixture(scope="module")
def reported() -> tuple[dict[Key, Figures], str]:
    """One process computes every case."""
    return process("blocks_interpreted")


@pytest.mark.slow
@pytest.mark.parametrize(("mixer", "dtype"), CASES)
def test_looped_blocks_on_triton_are_those_on_the_reference(
    mixer: str, dtype: str, reported: tuple[dict[Key, Figures], str]
) -> None:
    found, ending = reported
    assert (mixer, dtype) in found, ending
    figures = found[mixer, dtype]
    forms = ("eager", "compiled")
    assert figures.keys() == {f"{form} {kind}" for form in forms for kind in ("o", "gradients")} | {
        "graphs of other rows"
    }
    for form in forms:
        assert figures[f"{form} o"] <= TOLERANCES[dtype, "logits"], figures
        assert figures[f"{form} gradients"] <= TOLERANCES[dtype, "gradients"], figures
    assert figures["graphs of other rows"] == 0
