"""The looped language model on one device. Parallelism is applied to it from outside (pretrain/parallel).

The forward pass is a loop over a LoopPlan. Pipeline stages call the same four methods: embed, run_blocks, finish_loop,
read_out.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopline.kernels.precision import wide
from loopline.models.block import Block
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext, RowContext
from loopline.models.layers import Embedding, Linear, RMSNorm
from loopline.models.packing import Packing

RunStep = Callable[[Block, Tensor, BlockContext], Tensor]


def run_step(block: Block, x: Tensor, context: BlockContext) -> Tensor:
    """Apply a block; the trainer may put recomputation in its place."""
    return block(x, context)


class LoopGate(nn.Module):
    """h_r = M(h_{r-1}) + rho_r * h_{r-1}: one learned vector a loop, zero at the start. LT2, arXiv:2605.20670, s2.1."""

    def __init__(self, n_loops: int, d_model: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.empty(n_loops, d_model))

    def vectors(self) -> Tensor:
        """The learned vectors, [R, C], fp32. Parallel versions override this."""
        return self.rho

    def forward(self, h: Tensor, h_in: Tensor, loop_idx: int) -> Tensor:
        """[1, T, C] twice -> [1, T, C]. Past the last trained loop, the last loop's rho is used again."""
        return h + self.vectors()[min(loop_idx, len(self.rho) - 1)].to(h.dtype) * h_in


class ExitGate(nn.Module):
    """The chance of stopping after a loop: sigmoid(w . h + b), from the state the head sees. Ouro, arXiv:2510.25741,
    s2.2. Training with the last loop's loss leaves it as it is."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, d_model))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, h: Tensor) -> Tensor:
        """[1, T, C] -> logits [1, T], fp32."""
        return F.linear(wide(h), self.weight, self.bias)[..., 0]


def exit_distribution(logits: list[Tensor]) -> Tensor:
    """Chance of stopping after each loop and not before: lambda_r prod_{j<r} (1 - lambda_j), the last taking the rest.

    Args:
        logits: of lambda after loop 1..R, equal shapes.
    Returns:
        [R, ...], summing to one over R.
    """
    stay = torch.ones_like(logits[0])
    chances = []
    for logit in logits[:-1]:
        chances.append(stay * logit.sigmoid())
        stay = stay * (-logit).sigmoid()
    return torch.stack([*chances, stay])


class LoopedLM(nn.Module):
    """Embedding, `n_blocks` blocks applied `n_loops` times, final norm, head.

    Args:
        config: the model.
        dtype: compute dtype; parameters are fp32 whatever it is.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = Embedding(config.vocab_size, config.d_model)
        # A dict, so that a pipeline stage that keeps only some blocks still calls each by its own name.
        self.blocks = nn.ModuleDict({str(i): Block(config, name) for i, name in enumerate(config.mixer_names)})
        self.loop_gate = LoopGate(config.n_loops, config.d_model) if config.update == "gate" else None
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.exit_gate = ExitGate(config.d_model) if config.exit_gate else None
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.run_step: RunStep = run_step

    def stored_name(self, name: str) -> str:
        """The name a parameter is filled and saved under: a tied head is the embedding, wherever its copy lives."""
        return "embed.weight" if self.config.tie_embeddings and name == "head.weight" else name

    def forward(self, tokens: Tensor, cu_seqlens: list[int] | None = None, n_loops: int | None = None) -> Tensor:
        """Logits after the last loop.

        Args:
            tokens: [B, T], int64; B must be 1 with cu_seqlens.
            cu_seqlens: document boundaries in a packed row; None means every row is one document.
            n_loops: passes over the stack; None means the config's.
        Returns:
            [B, T, vocab_size] in the compute dtype.
        """
        return self.forward_depths(tokens, cu_seqlens, n_loops, depths=None)[-1]

    def forward_depths(
        self,
        tokens: Tensor,
        cu_seqlens: list[int] | None = None,
        n_loops: int | None = None,
        depths: list[int] | None = None,
    ) -> list[Tensor]:
        """Logits after each of the loop counts in `depths`, rising (None means after the last loop only).

        Raises:
            ValueError: a depth that does not run.
        """
        n_loops = self.config.n_loops if n_loops is None else n_loops
        depths = [n_loops] if depths is None else depths
        if not depths or sorted(set(depths)) != depths or depths[0] < 1 or depths[-1] > n_loops:
            raise ValueError(f"depths {depths} must rise, from 1 to at most n_loops = {n_loops}")
        states = enumerate(self.states(tokens, cu_seqlens, n_loops), start=1)
        return [self.read_out(h).view(*tokens.shape, -1) for depth, h in states if depth in depths]

    def exit_probabilities(self, tokens: Tensor, n_loops: int | None = None) -> Tensor:
        """Chance of stopping after each loop, of a model with an exit gate: [B, T] -> [R, B, T], fp32."""
        assert self.exit_gate is not None
        n_loops = self.config.n_loops if n_loops is None else n_loops
        logits = [self.exit_gate(self.normed(h)).view(tokens.shape) for h in self.states(tokens, None, n_loops)]
        return exit_distribution(logits)

    def states(self, tokens: Tensor, cu_seqlens: list[int] | None, n_loops: int) -> Iterator[Tensor]:
        """The stream after each loop, [1, B*T, C]."""
        packing, tokens_row = self.pack(tokens, cu_seqlens)
        row = RowContext(packing, n_loops)
        h = self.embed_tokens(tokens_row)
        for loop_idx in range(n_loops):
            h = self.finish_loop(self.run_blocks(h, loop_idx, row), h, loop_idx)
            yield h

    def pack(self, tokens: Tensor, cu_seqlens: list[int] | None) -> tuple[Packing, Tensor]:
        """Lay a batch end to end: the layout, and tokens as [1, B*T]."""
        if cu_seqlens is not None:
            if tokens.shape[0] != 1:
                raise ValueError(f"tokens have {tokens.shape[0]} rows; with cu_seqlens pass one packed row")
            return Packing.of(cu_seqlens, tokens.device), tokens
        return Packing.of_batch(tokens.shape[0], tokens.shape[1], tokens.device), tokens.reshape(1, -1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """[1, T] -> [1, T, C] in the compute dtype."""
        return self.embed(tokens).to(self.dtype)

    def run_blocks(self, h: Tensor, loop_idx: int, row: RowContext) -> Tensor:
        """Apply the blocks held here, in order: [1, T, C] -> [1, T, C]."""
        for name, block in self.blocks.items():
            h_in = h
            h = row.delivered(self.run_step(cast(Block, block), h, row.at(int(name), loop_idx)), h_in)
        return h

    def finish_loop(self, h: Tensor, h_in: Tensor, loop_idx: int) -> Tensor:
        """What the next loop starts from, given the stack's output and its input, both [1, T, C]."""
        if self.loop_gate is not None:
            return self.loop_gate(h, h_in, loop_idx)
        if self.config.update == "norm":
            return self.final_norm(h)
        return h

    def read_out(self, h: Tensor) -> Tensor:
        """[1, T, C] -> logits [1, T, vocab_size]. Ouro's loop state is normed already."""
        return self.head(self.normed(h))

    def normed(self, h: Tensor) -> Tensor:
        """What the head sees."""
        return h if self.config.update == "norm" else self.final_norm(h)
