"""Batches on the device: the numpy rows of data_pipeline as the tensors the model takes."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loopline.data_pipeline.batch import Batch
from loopline.models.context import RowContext
from loopline.models.packing import Packing


@dataclass(frozen=True)
class MicroBatch:
    """One packed row.

    Attributes:
        tokens, labels: [1, T], int64, on the device; labels are objective.IGNORED where nothing is predicted.
        row: document boundaries, computed once and read by every block at every loop; and what loops leave behind.
    """

    tokens: Tensor
    labels: Tensor
    row: RowContext


def to_device(
    batch: Batch,
    micro_batch_sequences: int,
    device: torch.device,
    *,
    n_loops: int,
    auxiliary_scale: float | None = None,
    is_measured: bool = False,
) -> list[MicroBatch]:
    """A rank's batch as micro-batches on `device`. The last three are RowContext's; its draw hashes the tokens."""
    return [
        MicroBatch(
            _moved(micro.tokens, device),
            _moved(micro.labels, device),
            RowContext(
                Packing(micro.cu_seqlens.tolist(), _moved(micro.positions, device)),
                n_loops,
                auxiliary_scale,
                is_measured,
                draw=zlib.crc32(micro.tokens.tobytes()),
            ),
        )
        for micro in batch.micro_batches(micro_batch_sequences)
    ]


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    """int64 on `device`, which widens it. To a GPU through pinned memory, so that the copy does not wait for what the
    GPU is doing."""
    tensor = torch.from_numpy(array)
    moved = tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
    return moved.long()
