"""Launching where the tensors are."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_its_device(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `op` with the GPU of its first argument, a tensor, as the current one: Triton launches there, and a model cut
    over GPUs by `device_map` does not change it. On a CPU tensor nothing happens."""

    @functools.wraps(op)
    def run(*arguments: _P.args, **options: _P.kwargs) -> _R:
        with torch.cuda.device_of(arguments[0]):
            return op(*arguments, **options)

    return run
