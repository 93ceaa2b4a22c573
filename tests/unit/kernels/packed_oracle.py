"""Forms written by others, which take a batch without cu_seqlens, behind the signature of our ops."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


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
