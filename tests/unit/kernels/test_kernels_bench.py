"""The benchmark's gate finds wrong kernels, its floors are the published ones, and it skips without a GPU."""

import dataclasses

import pytest
import torch

from loopline.kernels import bench
from loopline.kernels.bench import CASES, GATE, PEAKS, Timing, order_row, worst_error
from tests.tolerances import TOLERANCES

CPU = torch.device("cpu")
BY_NAME = {f"{case.op} {case.name}": case for case in CASES}
REFERENCE = BY_NAME["gated_delta B4 T4096 H16 K128 V128"]
WINDOW = BY_NAME["attention B4 T4096 H16 G4 D128 window 512"]


def test_the_gate_leaves_room_over_what_the_interpreter_shows_and_no_more() -> None:
    assert TOLERANCES["bf16", "interpreted_kernel"] <= GATE <= 2 * TOLERANCES["bf16", "interpreted_kernel"]


def test_a_right_backend_passes_the_gate() -> None:
    assert worst_error(REFERENCE, "reference", CPU, n_tokens=130) <= GATE
    assert worst_error(WINDOW, "sdpa", CPU, n_tokens=130) <= GATE


def test_an_indexers_gradients_are_compared_too() -> None:
    case = BY_NAME["indexer B4 T4096 H16 G4 D128 k512"]
    assert worst_error(case, "reference", CPU, n_tokens=130) <= GATE

    def run(inputs, cu_seqlens, backend):  # type: ignore[no-untyped-def]
        if backend == "triton":  # the same loss, a gradient that is off by a tenth
            inputs = inputs | {"k_index": inputs["k_index"] * 1.1 - 0.1 * inputs["k_index"].detach()}
        return case.run(inputs, cu_seqlens, "reference")

    assert worst_error(dataclasses.replace(case, run=run), "triton", CPU, n_tokens=130) > 0.05


@pytest.mark.parametrize("fault", [lambda o: o * 1.03, lambda o: o.masked_fill(torch.rand_like(o) < 1e-4, torch.nan)])
def test_a_wrong_backend_does_not(fault) -> None:  # type: ignore[no-untyped-def]
    def run(inputs, cu_seqlens, backend):  # type: ignore[no-untyped-def]
        o = WINDOW.run(inputs, cu_seqlens, "reference")
        return fault(o) if backend == "sdpa" else o

    assert not worst_error(dataclasses.replace(WINDOW, run=run), "sdpa", CPU, n_tokens=130) <= GATE


def test_a_gradient_alone_may_be_what_is_wrong() -> None:
    def run(inputs, cu_seqlens, backend):  # type: ignore[no-untyped-def]
        v = inputs["v"] * 2 - inputs["v"].detach() if backend == "sdpa" else inputs["v"]  # same value, twice the slope
        return WINDOW.run(inputs | {"v": v}, cu_seqlens, "reference")

    assert worst_error(dataclasses.replace(WINDOW, run=run), "sdpa", CPU, n_tokens=130) > 0.5


def test_floors_of_an_h200_are_those_computed_by_hand() -> None:
    peak = PEAKS["NVIDIA H200"]
    # 262,144 tokens times heads: 163.8 kFLOP and 1,032 bytes forward, 442 kFLOP and 1,808 bytes backward each.
    assert REFERENCE.forward.floor_ms(peak) == pytest.approx(262_144 * 1_032 / 4.8e12 * 1e3, rel=1e-3)
    assert REFERENCE.backward.floor_ms(peak) == pytest.approx(262_144 * 442_368 / 790e12 * 1e3, rel=1e-3)
    full = BY_NAME["attention B4 T4096 H16 G16 D128 full"]
    assert full.forward.floor_ms(peak) == pytest.approx(0.348, abs=1e-3)
    assert full.backward.floor_ms(peak) == pytest.approx(0.870, abs=1e-3)


def test_the_printed_order_is_by_total_time_over_cases_all_ran() -> None:
    def timing(case: str, backend: str, ms: float | None) -> Timing:
        return Timing("attention", case, backend, 0.0, ms, ms)

    timings = [timing("a", "fla", 3.0), timing("a", "triton", 2.0), timing("b", "fla", 1.0), timing("b", "triton", 1.0)]
    timings += [timing("a", "sdpa", 0.1), timing("b", "reference", None), timing("a", "cudnn", 0.1)]
    assert order_row(timings) == {"attention": ("triton", "fla", "reference")}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main() == 0
    assert capsys.readouterr().out.startswith("skipped: no CUDA device")
