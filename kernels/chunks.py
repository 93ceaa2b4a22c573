"""Packed documents cut into chunks, and the scan over them: what the chunked references of linear mixers share.

A chunk never crosses a document. The scan runs chunk j of all documents that have one at once.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.precision import wide

Step = Callable[[list[int], Tensor], tuple[Tensor, Tensor]]  # (chunk numbers, state) -> (output, new state)


@dataclass(frozen=True)
class Chunks:
    """Where the tokens of a packed row lie in chunks.

    Attributes:
        tokens: [NT, C], int64, token of each place; n_tokens marks padding at a document's end.
        documents: chunk numbers of each document, in order.
        n_tokens: tokens in the row.
    """

    tokens: Tensor
    documents: tuple[tuple[int, ...], ...]
    n_tokens: int

    @classmethod
    def of(cls, cu_seqlens: list[int], chunk_size: int, device: torch.device) -> "Chunks":
        """Chunks of at most `chunk_size` tokens; no longer than the longest document needs."""
        longest = max(end - start for start, end in itertools.pairwise(cu_seqlens))
        return _chunks(tuple(cu_seqlens), min(chunk_size, longest), device)

    @property
    def size(self) -> int:
        """C, tokens in a chunk."""
        return self.tokens.shape[1]

    def split(self, x: Tensor) -> Tensor:
        """[1, T, H, ...] -> [NT, H, C, ...], fp32. Padding is zero, which every recurrence here leaves the state at."""
        padded = F.pad(wide(x[0]), (0, 0) * (x.dim() - 2) + (0, 1))
        return padded[self.tokens].movedim(2, 1)

    def scan(self, state: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Run `step` over chunk 0, 1, ... of every document.

        Args:
            state: [N, ...], one row a document.
            step: gets the numbers of n chunks and the n states they start from, [n, ...]; gives their outputs
                [n, H, C, V] and the states after them.
        Returns:
            o: [1, T, H, V]; final_state: [N, ...].
        """
        alive = sorted(range(len(self.documents)), key=lambda d: -len(self.documents[d]))  # longest first
        final: list[Tensor] = [state] * len(self.documents)
        outputs: list[Tensor] = []
        order: list[int] = []
        state = state[alive]
        for j in range(len(self.documents[alive[0]])):
            while len(self.documents[alive[-1]]) <= j:
                final[alive[-1]] = state[len(alive) - 1]
                alive.pop()
            numbers = [self.documents[d][j] for d in alive]
            output, state = step(numbers, state[: len(alive)])
            outputs.append(output)
            order += numbers
        for i, d in enumerate(alive):
            final[d] = state[i]
        return self._join(torch.cat(outputs), order), torch.stack(final)

    def _join(self, o: Tensor, order: list[int]) -> Tensor:
        rows = o.movedim(1, 2).flatten(0, 1)  # [NT * C, H, V], in scan order
        source = self.tokens[order].flatten()  # token each row stands for
        row_of_token = torch.empty(self.n_tokens + 1, dtype=torch.long, device=o.device)
        row_of_token[source] = torch.arange(len(source), device=o.device)
        return rows[row_of_token[:-1]][None]


@functools.lru_cache(maxsize=16)  # one row's layout serves every block and loop
def _chunks(cu_seqlens: tuple[int, ...], size: int, device: torch.device) -> Chunks:
    n_tokens = cu_seqlens[-1]
    rows: list[list[int]] = []
    documents: list[tuple[int, ...]] = []
    for start, end in itertools.pairwise(cu_seqlens):
        first_row = len(rows)
        rows += [[t if t < end else n_tokens for t in range(i, i + size)] for i in range(start, end, size)]
        documents.append(tuple(range(first_row, len(rows))))
    return Chunks(torch.tensor(rows, device=device), tuple(documents), n_tokens)
