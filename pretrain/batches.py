"""Batches on the device: the numpy rows of data_pipeline as the tensors the model takes."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loopline.data_pipeline.batch import Batch
from loopline.data_pipeline.batch import MicroBatch as HostMicroBatch
from loopline.data_pipeline.packing import IGNORED_LABEL
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
            *_inputs_and_labels(micro, device),
            RowContext(
                Packing(micro.cu_seqlens.tolist(), _positions(micro, device)),
                n_loops,
                auxiliary_scale,
                is_measured,
                draw=zlib.crc32(micro.tokens.tobytes()),
            ),
        )
        for micro in batch.micro_batches(micro_batch_sequences)
    ]


def _inputs_and_labels(micro: HostMicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, b*T] twice: a token crosses to the device once, as stored, and is widened there."""
    rows = _moved(micro.rows, device).long()  # [b, T+1]
    labels = rows[:, 1:].reshape(1, -1)
    return rows[:, :-1].reshape(1, -1), labels.index_fill(1, _moved(micro.ignored, device), IGNORED_LABEL)


def _positions(micro: HostMicroBatch, device: torch.device) -> Tensor:
    """[1, b*T], from 0 in every segment."""
    bounds = _moved(micro.cu_seqlens, device).long()  # [N+1]
    starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=int(micro.cu_seqlens[-1]))
    return (torch.arange(len(starts), device=device) - starts)[None]


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    """To a GPU through pinned memory, so that the copy does not wait for what the GPU is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
