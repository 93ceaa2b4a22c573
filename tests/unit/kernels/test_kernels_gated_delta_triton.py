"""Our Triton kernels of the gated delta rule, run by the interpreter on a CPU, agree with its recurrence."""

import pytest
import torch
from gated_delta_interpreted import CASES, CLAIMS, MAKERS
from interpreted import Figures, Key, process

from loopline.kernels.gated_delta.op import gated_delta
from tests.tolerances import TOLERANCES

pytest.importorskip("triton")
KINDS = {"fp32": "op", "bf16": "interpreted_kernel"}


@pytest.fixture(scope="module")
def reported() -> tuple[dict[Key, Figures], str]:
    """One process computes every case."""
    return process("gated_delta_interpreted")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_kernels_agree_with_the_recurrence(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> None:
    found, ending = reported
    assert (case, dtype) in found, ending
    figures = found[case, dtype]
    assert figures.keys() == MAKERS[case][1]
    assert all(ratio <= TOLERANCES[dtype, KINDS[dtype]] for ratio in figures.values()), figures


@pytest.mark.slow
@pytest.mark.parametrize("claim", ["differing_bits", "operator_contract", "looped_graph"])
def test_two_runs_are_equal_and_a_loop_is_one_graph(claim: str, reported: tuple[dict[Key, Figures], str]) -> None:
    found, ending = reported
    assert found.get((claim, "fp32")) == CLAIMS[claim][1], ending


def test_documents_are_cut_where_their_chunks_begin() -> None:
    from loopline.kernels.gated_delta.launch import Segments, cut

    assert cut((0, 300, 301, 430), 2) == Segments((0, 128, 256, 300, 301, 429, 430), (0, 3, 4, 6), 3)
    assert cut((0, 300), 5) == Segments((0, 300), (0, 1), 1)


@pytest.mark.parametrize(
    ("lengths", "n_programs", "n_segments"),
    [
        ([4096] * 4, 32, 4),  # 128 programs fill 132 processors
        ([32768], 32, 4),
        ([32768], 4, 32),
        ([32768], 60, 1),  # two at once would each be scanned twice: nothing is won
        ([64], 1, 1),
        ([32768, 64, 64], 4, 34),  # short documents stay whole
    ],
)
def test_documents_are_cut_only_where_the_gpu_would_stay_empty(
    lengths: list[int], n_programs: int, n_segments: int
) -> None:
    from loopline.kernels.gated_delta.launch import chunks_of_segment, cut

    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments = cut(tuple(bounds), chunks_of_segment(bounds, n_programs, 132))
    assert len(segments.boundaries) - 1 == n_segments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (1, 5, 2, 40), "k": (1, 5, 2, 40)}, r"K = 40: .*multiple of 32 from 32 to 256"),
        ({"v": (1, 5, 2, 288)}, r"V = 288: .*multiple of 32 from 32 to 256"),
        ({"v": torch.bfloat16}, r"q torch.float32, .*v torch.bfloat16"),
        (
            {"q": torch.float64, "k": torch.float64, "v": torch.float64},
            r"q torch.float64.*torch.bfloat16, torch.float32",
        ),
        ({"g": torch.bfloat16}, r"g is torch.bfloat16: .*need torch.float32"),
        ({"initial_state": torch.float64}, r"initial_state is torch.float64: .*need torch.float32"),
        ({"beta": torch.device("meta")}, r"different devices.*meta"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_serve_is_refused_before_a_launch(change: dict[str, object], message: str) -> None:
    inputs = {name: torch.zeros(1, 5, 2, 32) for name in "qkv"}
    inputs |= {name: torch.zeros(1, 5, 2) for name in ("g", "beta")}
    for name, value in change.items():
        x = inputs.get(name, torch.zeros(1, 2, 32, 32))
        inputs[name] = torch.zeros(value) if isinstance(value, tuple) else x.to(value)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=message):
        gated_delta(**inputs, scale=1.0, cu_seqlens=[0, 5], backend="triton")
