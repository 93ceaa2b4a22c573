"""What every op shares: which backends can run here, and the checks of a packed row."""

import functools
import importlib.util
import itertools

import torch
from torch import Tensor

from loopline.kernels.errors import BackendError

# Backend -> device types it runs on, and the package it needs. An op lists the backends it has, preferred first.
_NEEDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "fla": (("cuda",), "fla"),
    "sdpa": (("cpu", "cuda"), None),
    "reference": (("cpu", "cuda"), None),
}
# (op, backend) -> the only dtypes it has kernels for.
_ONLY_DTYPES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {
    ("delta_rule", "fla"): (torch.bfloat16, torch.float16),
}


def available_backends(backends: tuple[str, ...], device_type: str) -> list[str]:
    """Those of `backends` that can run on `device_type` ("cpu" or "cuda") here, in the order given."""
    return [name for name in backends if device_type in _NEEDS[name][0] and _is_installed(_NEEDS[name][1])]


def check_backend(
    op: str, backends: tuple[str, ...], backend: str, device_type: str, dtype: torch.dtype | None = None
) -> str:
    """Resolve "auto" and refuse what cannot run.

    Args:
        op: its name.
        backends: what the op has, preferred first.
        backend: one of them, or "auto".
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
        return available[0]
    if backend not in available:
        raise BackendError(
            f"{op} backend {backend!r} is not available on {device_type}"
            + (f" in {dtype}" if dtype is not None and (op, backend) in _ONLY_DTYPES else "")
            + f"; available: {', '.join(available)}"
            + (" (fla: pip install 'loopline[gpu]')" if backend == "fla" else "")
        )
    return backend


def unknown(op: str, backend: str, backends: tuple[str, ...]) -> BackendError:
    """What an op raises when called with a name it does not have."""
    return BackendError(f"{op} backend {backend!r} is unknown; known: {', '.join(backends)}")


def check_boundaries(cu_seqlens: list[int], n_rows: int, n_tokens: int) -> None:
    """Refuse a batch of more than one row, and boundaries that do not rise from 0 to n_tokens.

    Raises:
        ValueError: naming what was found.
    """
    if n_rows != 1:
        raise ValueError(f"batch is {n_rows}; pack sequences into one row and give their cu_seqlens")
    is_rising = all(a < b for a, b in itertools.pairwise(cu_seqlens))
    if not cu_seqlens or cu_seqlens[0] != 0 or cu_seqlens[-1] != n_tokens or not is_rising:
        raise ValueError(f"cu_seqlens {cu_seqlens[:4]}.. must rise from 0 to T = {n_tokens}")


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


@functools.cache
def _is_installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None
