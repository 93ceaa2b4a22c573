"""Where documents begin and end in a packed row of tokens: computed once, read by every mixer at every loop."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """Layout of a packed row.

    Attributes:
        cu_seqlens: N + 1 document boundaries, on the host so that no mixer waits for the device.
        positions: [1, T], int64, position of each token in its document.
    """

    cu_seqlens: list[int]
    positions: Tensor

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
