"""Batches on the device: the numpy rows of data_pipeline as the tensors the model takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loopline.data_pipeline.batch import Batch
from loopline.models.packing import Packing


@dataclass(frozen=True)
class MicroBatch:
    """One packed row.

    Attributes:
        tokens, labels: [1, T], int64, on the device; labels are objective.IGNORED where nothing is predicted.
        packing: document boundaries, computed once and read by every block at every loop.
    """

    tokens: Tensor
    labels: Tensor
    packing: Packing


def to_device(batch: Batch, micro_batch_sequences: int, device: torch.device) -> list[MicroBatch]:
    """A rank's batch as micro-batches on `device`."""
    return [
        MicroBatch(
            torch.from_numpy(micro.tokens).to(device),
            torch.from_numpy(micro.labels).to(device),
            Packing(micro.cu_seqlens.tolist(), torch.from_numpy(micro.positions).to(device)),
        )
        for micro in batch.micro_batches(micro_batch_sequences)
    ]
