"""Forms written by others, which take a batch without cu_seqlens, behind the signature of our ops."""

import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

# Lengths of the documents over which our forms are held to them.
over_documents = pytest.mark.parametrize("lengths", [(1,), (2,), (65,), (63, 1, 64)], ids=str)


def fla_form(path: str) -> Callable[..., Any]:
    """The function of fla at `path`; skips the test where fla is not installed."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def transformers_form(model: str, name: str) -> Callable[..., Any]:
    """The torch function `name` of transformers' `model`.

    transformers puts a kernel of fla or mamba_ssm in its place where that is installed; the torch form is inside.
    """
    return inspect.unwrap(getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name))


def per_document(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`form(q=, k=, v=, initial_state=, g=, beta=, ...)`, tensors [1, T, H, D], run on one document at a time."""

    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        cu_seqlens: list[int],
        initial_state: Tensor | None,
        **gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        assert scale == q.shape[-1] ** -0.5  # every oracle's default
        outputs, states = [], []
        for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
            cut = {name: x[:, start:end] for name, x in {"q": q, "k": k, "v": v, **gates}.items()}
            o, state = form(**cut, initial_state=None if initial_state is None else initial_state[i : i + 1])
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return op


def transformers_delta_rule(model: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The delta rule, with whatever gates, that transformers' `model` calls `name`."""
    form = transformers_form(model, name)
    return per_document(lambda q, k, v, **rest: form(query=q, key=k, value=v, **rest, output_final_state=True))
