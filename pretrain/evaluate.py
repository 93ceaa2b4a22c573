"""Held-out loss of a trained model at every depth, in one process."""

from dataclasses import dataclass

import torch

from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.stream import heldout_batches
from loopline.data_pipeline.unigram import unigram_entropy
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.batches import to_device
from loopline.pretrain.objective import loss_sum, measure_depths


@dataclass(frozen=True)
class Evaluation:
    """Figures over the held-out split, in nats per token.

    Attributes:
        loss_by_depth: mean loss with 1, 2, ... loops executed.
        unigram_entropy: of the same tokens; a model that knows only frequencies reaches this.
        n_valid: tokens measured.
    """

    loss_by_depth: list[float]
    unigram_entropy: float
    n_valid: int


@torch.no_grad()
def evaluate(
    model: LoopedLM,
    manifest: Manifest,
    *,
    seq_len: int,
    max_loops: int,
    sequences_per_batch: int = 8,
    max_batches: int | None = None,
) -> Evaluation:
    """Measure `model` with 1..max_loops loops over the held-out split (or its first `max_batches` batches)."""
    device = next(model.parameters()).device
    totals, n_valid = torch.zeros(max_loops, dtype=torch.float64), 0
    batches = heldout_batches(manifest, seq_len=seq_len, batch_sequences=sequences_per_batch, max_batches=max_batches)
    for batch in batches:
        for micro in to_device(batch, sequences_per_batch, device, n_loops=max_loops):
            row = measure_depths(model, micro, loss_sum)
            totals += row[:max_loops].double().cpu()
        n_valid += batch.n_valid
    return Evaluation((totals / max(1, n_valid)).tolist(), unigram_entropy(manifest), n_valid)
