"""What is minimised: cross-entropy of the last loop's logits, summed over valid tokens.

The objective is one function of the loop states, so that objectives over several loops (Ouro's) have their place.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.batches import MicroBatch

IGNORED = -100
TokenLosses = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> loss of each token
LossFn = Callable[[LoopedLM, Tensor, Tensor], Tensor]  # (model, state after a loop, labels) -> summed loss

# Logits of this many numbers are made at once; longer rows go in pieces and are rebuilt in backward. 2^26 fp32 logits
# are 256 MiB, and several copies of them live at once in a cross-entropy.
MAX_LOGITS = 1 << 26


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token: logits [1, T, V], labels [1, T] int64 -> [1, T], fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def loss_sum(model: LoopedLM, h: Tensor, labels: Tensor, losses: TokenLosses = token_losses) -> Tensor:
    """Summed cross-entropy of one micro-batch.

    Args:
        model: holds the final norm and the head.
        h: [1, T, C], state after the last loop ([1, T/tp, C] with sequence parallelism).
        labels: [1, T], int64, IGNORED where there is nothing to predict.
        losses: cross-entropy per token; the parallel one where the vocabulary is cut.
    Returns:
        scalar, fp32.
    """
    pieces = 1
    if h.shape[1] == labels.shape[1]:  # under sequence parallelism the head gathers the row, so it goes whole
        pieces = -(-labels.numel() * model.config.vocab_size // MAX_LOGITS)
    if pieces <= 1:
        return _piece(model, h, labels, losses)
    total = h.new_zeros((), dtype=torch.float32)
    for h_piece, label_piece in zip(h.chunk(pieces, 1), labels.chunk(pieces, 1)):
        total = total + checkpoint(_piece, model, h_piece, label_piece, losses, use_reentrant=False)
    return total


def micro_batch_loss(model: LoopedLM, batch: MicroBatch, loss: LossFn) -> Tensor:
    """Summed loss of a micro-batch after the last loop: the whole forward pass on one stage."""
    h = model.embed_tokens(batch.tokens)
    for loop_idx in range(batch.row.n_loops):
        h = model.finish_loop(model.run_blocks(h, loop_idx, batch.row), h, loop_idx)
    return loss(model, h, batch.labels)


def measure_depths(model: LoopedLM, batch: MicroBatch, loss: LossFn) -> Tensor:
    """`DepthMeter` row of a micro-batch, every one of its row's loops read out."""
    meter = DepthMeter(model, loss)
    h = model.embed_tokens(batch.tokens)
    for loop_idx in range(batch.row.n_loops):
        h = model.finish_loop(model.run_blocks(h, loop_idx, batch.row), h, loop_idx)
        meter.add(h, batch.labels)
    return meter.row()


class DepthMeter:
    """Per-loop figures of one micro-batch, as sums that add up over micro-batches and ranks.

    A row is [loss after loop 1..R] + [sum of squares of h_r - h_{r-1}, r = 2..R] + [sum of squares of h_r, r = 2..R].
    """

    def __init__(self, model: LoopedLM, loss: LossFn) -> None:
        self.model, self.loss = model, loss
        self.losses: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.previous: Tensor | None = None

    @staticmethod
    def width(model: LoopedLM) -> int:
        """Numbers in a row."""
        return 3 * model.config.n_loops - 2

    def add(self, h: Tensor, labels: Tensor) -> None:
        """Record the state after the next loop."""
        self.losses.append(self.loss(self.model, h, labels))
        if self.previous is not None:
            self.changes.append((h - self.previous).float().square().sum())
            self.sizes.append(h.float().square().sum())
        self.previous = h

    def row(self) -> Tensor:
        """[3 R - 2], fp32."""
        return torch.stack([*self.losses, *self.changes, *self.sizes])


def _piece(model: LoopedLM, h: Tensor, labels: Tensor, losses: TokenLosses) -> Tensor:
    is_valid = labels != IGNORED
    per_token = losses(model.read_out(h), labels.where(is_valid, 0))
    return per_token.where(is_valid, 0).sum()
