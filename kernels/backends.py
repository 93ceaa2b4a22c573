"""What every op shares: which backends can run here, which "auto" takes, and the checks of a packed row."""

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopline.kernels.defaults import preferred
from loopline.kernels.errors import BackendError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Needs:
    """What a backend runs on: device types, packages, and how to get the packages."""

    devices: tuple[str, ...]
    packages: tuple[str, ...] = ()
    install: str = ""


_NEEDS: dict[str, _Needs] = {
    "fla": _Needs(("cuda",), ("fla",), "pip install 'loopline[gpu]'"),
    # Exports carry the references but not our Triton kernels: there they come with the package.
    "triton": _Needs(("cuda",), ("triton", "loopline"), "pip install 'loopline[gpu]'"),
    "sdpa": _Needs(("cpu", "cuda")),
    "flex": _Needs(("cuda",)),  # torch has no backward for it on a CPU
    "reference": _Needs(("cpu", "cuda")),
}
# (op, backend) -> the only dtypes it has kernels for.
_ONLY_DTYPES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {
    ("delta_rule", "fla"): (torch.bfloat16, torch.float16),
}


def available_backends(backends: tuple[str, ...], device_type: str) -> list[str]:
    """Those of `backends` that can run on `device_type` ("cpu" or "cuda") here, in the order given."""
    return [
        name
        for name in backends
        if (device_type in _NEEDS[name].devices or (name == "triton" and _is_interpreted()))
        and all(_is_installed(package) for package in _NEEDS[name].packages)
    ]


@torch.compiler.assume_constant_result  # a graph holds the choice, not how it was made
def check_backend(
    op: str, backends: tuple[str, ...], backend: str, device_type: str, dtype: torch.dtype | None = None
) -> str:
    """Resolve "auto" and refuse what cannot run.

    Args:
        op: its name.
        backends: what the op has, preferred first.
        backend: one of them, or "auto": the first that is available, in the order of `kernels.defaults`.
        dtype: of q, k and v; a backend without kernels for it is not available. None: not looked at.
    Raises:
        BackendError: `backend` is not one of those available on `device_type` in `dtype`.
    """
    available = [
        name
        for name in available_backends(backends, device_type)
        if dtype is None or dtype in _ONLY_DTYPES.get((op, name), (dtype,))
    ]
    if backend == "auto":
        gpu = _gpu() if device_type == "cuda" else None
        refusals = {name: why for name in available if (why := _refused_unasked(op, name, device_type))}
        order = preferred(op, backends, gpu)
        chosen = next(name for name in order if name in available and name not in refusals)
        for name, why in refusals.items():
            if name in order[: order.index(chosen)]:
                _warn(f"{op}: {chosen}, not {name}: {why}")
        return chosen
    if backend not in available:
        install = _NEEDS[backend].install if backend in backends else ""
        raise BackendError(
            f"{op} backend {backend!r} is not available on {device_type}"
            + (f" in {dtype}" if dtype is not None and (op, backend) in _ONLY_DTYPES else "")
            + f"; available: {', '.join(available)}"
            + (f" ({backend}: {install})" if install else "")
        )
    return backend


def _refused_unasked(op: str, backend: str, device_type: str) -> str | None:
    """Why "auto" does not take an available backend; None where it may."""
    # fla issue 640: wrong gradients from Triton's compiler, which fla 0.6.0 answers with a RuntimeError in backward.
    if backend != "fla" or op not in ("gated_delta", "simple_gla") or device_type != "cuda":
        return None
    if not torch.is_grad_enabled() or not _is_hopper() or not (3, 4, 0) <= _triton_version() < (3, 7, 1):
        return None
    return (
        "on this GPU fla 0.6.0 refuses its backward with Triton 3.4.0 to 3.7.0 (fla issue 640). Install Triton 3.7.1 "
        "or newer, or set the backend to 'triton' after `python -m loopline.kernels.bench` has checked it here"
    )


@functools.cache
def _warn(message: str) -> None:
    """Once a process, however many blocks and loops ask."""
    log.warning(message)


@functools.cache
def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@functools.cache
def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def _triton_version() -> tuple[int, ...]:
    numbers = importlib.metadata.version("triton").split("+")[0].split(".")
    return tuple(int(number) for number in numbers[:3] if number.isdigit())


def _is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU in this process, as tests have it."""
    triton = sys.modules.get("triton")
    return triton is not None and triton.knobs.runtime.interpret


def unknown(op: str, backend: str, backends: tuple[str, ...]) -> BackendError:
    """What an op raises when called with a name it does not have."""
    return BackendError(f"{op} backend {backend!r} is unknown; known: {', '.join(backends)}")


# N + 1 document boundaries of a packed row, from 0 to T: a list on the host; or an int32 tensor on the CPU, which a
# graph of torch.compile takes as an input, so that it serves rows with other boundaries.
Boundaries = list[int] | Tensor


def listed(cu_seqlens: Boundaries) -> list[int]:
    """As a list, which what is not a custom op needs. A graph of torch.compile ends here where they are a tensor."""
    return cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens


def known(cu_seqlens: Boundaries) -> list[int] | None:
    """As a list, to check sizes that follow from them; None in a graph of torch.compile: its ops check then."""
    return None if torch.compiler.is_compiling() else listed(cu_seqlens)


def check_boundaries(cu_seqlens: Boundaries, n_rows: int, n_tokens: int) -> None:
    """Refuse a batch of more than one row, and boundaries that do not rise from 0 to n_tokens.

    In a graph of torch.compile the values of a tensor are not known; custom ops look at them where they run.

    Raises:
        ValueError: naming what was found.
    """
    if n_rows != 1:
        raise ValueError(f"batch is {n_rows}; pack sequences into one row and give their cu_seqlens")
    if isinstance(cu_seqlens, Tensor) and (
        cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device.type != "cpu"
    ):
        found = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens {found} must be [N + 1] of torch.int32 on the CPU, or a list")
    if isinstance(cu_seqlens, Tensor) and torch.compiler.is_compiling():
        return
    bounds = listed(cu_seqlens)
    is_rising = all(a < b for a, b in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != n_tokens or not is_rising:
        raise ValueError(f"cu_seqlens {bounds[:4]}.. must rise from 0 to T = {n_tokens}")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse keys and values that differ, another head size than q's, and key/value heads that do not divide H.

    Raises:
        ValueError: with the shapes found.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: want q [1, T, H, D], k and v [1, T, G, D]"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads must divide {q.shape[2]} query heads")


def check_state(state: Tensor | None, want: tuple[int, ...]) -> None:
    """Refuse a state of another shape: too many rows or a size of 1 would broadcast or be cut without an error.

    Raises:
        ValueError: with both shapes.
    """
    if state is not None and state.shape != want:
        raise ValueError(f"initial_state {tuple(state.shape)} must be [N, H, K, V] = {want}")


def imported(module: str, name: str) -> Any:
    """What an optional package has: it takes seconds to import, or is not there.

    No import statement, because exports carry this code and transformers 5.23 refuses a model from the Hub where any
    file of it imports a package that is not installed, in a function too.
    """
    return getattr(importlib.import_module(module), name)


@functools.lru_cache(maxsize=16)  # copied to the device once a row, not at every block and loop
def cu_seqlens_on(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """cu_seqlens as the int32 tensor other libraries' kernels want."""
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
