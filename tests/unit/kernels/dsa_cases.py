"""Inputs of DeepSeek sparse attention, real-valued or on a grid where scores are exact and ties are many."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PACKED = [[1], [1, 1, 1], [1, 63, 1, 65, 2], [257, 1, 3], [5, 5, 5]]


@dataclass(frozen=True)
class Inputs:
    """Arguments of the ops; shapes as in kernels/dsa/op.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_index: Tensor
    k_index: Tensor
    weights: Tensor
    cu_seqlens: list[int]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def attention(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def index(self) -> dict[str, Tensor]:
        return {"q_index": self.q_index, "k_index": self.k_index, "weights": self.weights}

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with every tensor changed."""
        return replace(self, **{name: change(x) for name, x in {**self.attention, **self.index}.items()})


def make_inputs(
    lengths: list[int],
    *,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    d_head: int = 12,
    d_value: int = 12,
    n_index_heads: int = 3,
    d_index: int = 7,
    dtype: torch.dtype = torch.float32,
    is_grid: bool = False,
) -> Inputs:
    """Random inputs over documents of `lengths` tokens.

    Args:
        is_grid: index tensors are small integers, so that every form computes the same scores to the bit and many tie.
            Otherwise every product in index head 0 is positive, so that no score is 0 and ties do not occur.
    """
    generator = torch.Generator().manual_seed(sum(lengths) + 31 * d_head + n_heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    n_tokens = sum(lengths)
    q_index, k_index = normal(1, n_tokens, n_index_heads, d_index), normal(1, n_tokens, d_index)
    weights = normal(1, n_tokens, n_index_heads) * (n_index_heads * d_index) ** -0.5
    if is_grid:
        q_index, k_index, weights = q_index.round(), k_index.round(), (weights * 4).round()
    else:
        q_index[:, :, 0], k_index = q_index[:, :, 0].abs(), k_index.abs()
        q_index[:, :, 0, -1] += 2
        k_index[..., -1] += 2
    return Inputs(
        q=normal(1, n_tokens, n_heads, d_head),
        k=normal(1, n_tokens, n_kv_heads, d_head),
        v=normal(1, n_tokens, n_kv_heads, d_value),
        q_index=q_index,
        k_index=k_index,
        weights=weights,
        cu_seqlens=[sum(lengths[:i]) for i in range(len(lengths) + 1)],
    )


def attention_results(op: Callable[..., Tensor], inputs: Inputs, *args: object, **kwargs: object) -> dict[str, Tensor]:
    """o, and the gradient of a fixed random projection of it with respect to q, k and v."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.attention.items()}
    o = op(*leaves.values(), *args, **kwargs)
    projection = torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad((o * projection).sum(), list(leaves.values()))
    return {"o": o.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


def special_index() -> tuple[dict[str, Tensor], int]:
    """An indexer's tensors whose scores are given outright, and its tokens: both zeros, infinities, NaN, the smallest
    and largest numbers, each several times."""
    tiny, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    values = [0.0, -0.0, 1.0, -1.0, 1.0000001, -1.0000001, tiny, -tiny, largest, -largest, torch.inf, -torch.inf]
    scores = torch.tensor([*values, torch.nan] * 6)[torch.randperm(78)]
    # relu(s) - relu(-s) = s
    index = {
        "q_index": torch.tensor([1.0, -1.0])[:, None].expand(1, 78, 2, 1),
        "k_index": scores[None, :, None],
        "weights": torch.tensor([1.0, -1.0]).expand(1, 78, 2),
    }
    return index, 78


@contextmanager
def poisoned_integers() -> Iterator[None]:
    """Inside, `new_empty` of integers holds the highest, so that a score nobody wrote is chosen."""
    allocate = torch.Tensor.new_empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        fresh = allocate(*arguments, **options)
        return fresh if fresh.is_floating_point() else fresh.fill_(torch.iinfo(fresh.dtype).max)

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty = allocate  # type: ignore[method-assign]
