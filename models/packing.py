"""Where documents begin and end in a packed row of tokens: computed once, read by every mixer at every loop."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopline.kernels.backends import Boundaries
from loopline.models.rope import rotary_tables


@dataclass(frozen=True, slots=True)
class Packing:
    """Layout of a packed row.

    Attributes:
        boundaries: N + 1 document boundaries, on the host so that no mixer waits for the device.
        positions: [1, T], int64, position of each token in its document.
    """

    boundaries: list[int]
    positions: Tensor
    _host: Tensor = field(init=False, repr=False, compare=False)  # [N+1], int32, on the CPU
    _rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def cu_seqlens(self) -> Boundaries:
        """Document boundaries as ops take them: a tensor in a graph of torch.compile, which then serves other rows."""
        if torch.compiler.is_compiling():
            return self._host
        return self.boundaries

    def rotary(self, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
        """Rotary tables of the row's positions, made once for every block and loop, or once in each compiled graph."""
        key = (d_head, theta)
        if key in self._rotary:
            return self._rotary[key]
        tables = rotary_tables(self.positions, d_head, theta)
        if not torch.compiler.is_compiling():
            self._rotary[key] = tables
        return tables

    def __post_init__(self) -> None:
        object.__setattr__(self, "_host", torch.tensor(self.boundaries, dtype=torch.int32))

    @classmethod
    def of(cls, cu_seqlens: list[int], device: torch.device | str) -> "Packing":
        """Layout of documents with the given boundaries."""
        starts = torch.tensor(cu_seqlens[:-1])
        lengths = torch.tensor(cu_seqlens[1:]) - starts
        positions = torch.arange(cu_seqlens[-1]) - starts.repeat_interleave(lengths)
        return cls(list(cu_seqlens), positions[None].to(device))

    @classmethod
    def of_batch(cls, n_sequences: int, n_tokens: int, device: torch.device | str) -> "Packing":
        """Layout of `n_sequences` sequences of `n_tokens` tokens laid end to end."""
        return cls.of([i * n_tokens for i in range(n_sequences + 1)], device)
