"""A backend is resolved once; one that cannot run is refused with those that can."""

import contextlib
import importlib.util

import pytest
import torch

from loopline.kernels import backends, defaults
from loopline.kernels.backends import available_backends, check_backend
from loopline.kernels.devices import on_its_device
from loopline.kernels.errors import BackendError

BOTH = ("fla", "reference")


def test_a_backend_that_does_not_exist_is_refused_and_those_that_run_are_named() -> None:
    with pytest.raises(BackendError, match=r"delta backend 'fast' is not available on cpu; available: reference"):
        check_backend("delta", BOTH, "fast", "cpu")


def test_a_backend_of_another_device_is_refused_with_how_to_get_it() -> None:
    with pytest.raises(BackendError, match=r"'fla' is not available on cpu; available: reference.*loopline\[gpu\]"):
        check_backend("delta", BOTH, "fla", "cpu")


@pytest.mark.parametrize("is_installed", [True, False])
def test_auto_takes_the_first_that_is_installed(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backends._is_installed.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if is_installed else None)
    try:
        assert available_backends(BOTH, "cpu") == ["reference"]
        assert check_backend("delta", BOTH, "auto", "cuda") == ("fla" if is_installed else "reference")
        assert check_backend("delta", BOTH, "reference", "cuda") == "reference"
        if not is_installed:
            with pytest.raises(BackendError, match="available: reference"):
                check_backend("delta", BOTH, "fla", "cuda")
    finally:
        backends._is_installed.cache_clear()


def test_a_backend_without_kernels_for_the_dtype_is_passed_over_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    assert check_backend("delta_rule", BOTH, "auto", "cuda", torch.bfloat16) == "fla"
    assert check_backend("delta_rule", BOTH, "auto", "cuda", torch.float32) == "reference"
    assert check_backend("gated_delta", BOTH, "auto", "cuda", torch.float32) == "fla"
    with pytest.raises(BackendError, match=r"'fla' is not available on cuda in torch.float32; available: reference"):
        check_backend("delta_rule", BOTH, "fla", "cuda", torch.float32)


def test_kernels_not_measured_on_a_gpu_are_taken_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    every = ("triton", "flex", "fla", "reference")
    assert check_backend("gated_delta", every, "auto", "cuda") == "fla"
    assert check_backend("gated_delta", every, "triton", "cuda") == "triton"
    with pytest.raises(BackendError, match="'triton' is not available on cpu; available: reference"):
        check_backend("gated_delta", every, "triton", "cpu")


def test_a_measured_gpu_has_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    monkeypatch.setattr(backends, "_gpu", lambda: "A GPU")
    monkeypatch.setattr(defaults, "MEASURED", {"A GPU": {"gated_delta": ("triton", "fla", "reference")}})
    every = ("fla", "triton", "reference")
    assert check_backend("gated_delta", every, "auto", "cuda") == "triton"
    assert check_backend("kda", every, "auto", "cuda") == "fla"  # an op without a row
    assert check_backend("gated_delta", every, "auto", "cpu") == "reference"


@pytest.mark.parametrize(("triton", "chosen"), [((3, 6, 0), "reference"), ((3, 7, 1), "fla")])
def test_auto_passes_over_a_backend_whose_backward_would_fail(
    triton: tuple[int, ...], chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    monkeypatch.setattr(backends, "_is_hopper", lambda: True)
    monkeypatch.setattr(backends, "_triton_version", lambda: triton)
    backends._warn.cache_clear()
    with caplog.at_level("WARNING"):
        assert {check_backend("gated_delta", BOTH, "auto", "cuda") for _ in range(3)} == {chosen}
    assert caplog.text.count("fla issue 640") == (chosen == "reference")  # once a process
    with torch.no_grad():
        assert check_backend("gated_delta", BOTH, "auto", "cuda") == "fla"  # its forward is right
    assert check_backend("gated_delta", BOTH, "fla", "cuda") == "fla"  # asked for


@pytest.mark.parametrize(("cu_seqlens", "n_tokens"), [([], 0), ([0], 0), ([0, 3, 3], 3), ([1, 3], 3), ([0, 2], 3)])
def test_boundaries_of_no_row_are_refused(cu_seqlens: list[int], n_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"must rise from 0 to T = {n_tokens}"):
        backends.check_boundaries(cu_seqlens, 1, n_tokens)


def test_an_op_runs_with_its_first_tensors_device_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    def noting(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        entered.append(tensor)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", noting)
    first, second = torch.ones(1), torch.zeros(1)
    assert on_its_device(torch.add)(first, other=second).item() == 1
    assert len(entered) == 1
    assert entered[0] is first
