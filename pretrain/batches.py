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
            *_inputs_and_labels(micro, bounds),
            RowContext(
                Packing(micro.cu_seqlens.tolist(), _positions(bounds, int(micro.cu_seqlens[-1]))),
                n_loops,
                auxiliary_scale,
                is_measured,
                draw=zlib.crc32(micro.tokens.tobytes()),
            ),
        )
        for micro in batch.micro_batches(micro_batch_sequences)
        for bounds in [_moved(micro.cu_seqlens, device).long()]
    ]


def _inputs_and_labels(micro: HostMicroBatch, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """[1, b*T] twice: a token crosses to the device once, as stored, and is widened there.

    Args:
        bounds: [N+1], int64, the row's cu_seqlens on the device.
    """
    rows, n_padding, is_cut = (_moved(array, bounds.device) for array in (micro.rows, micro.n_padding, micro.is_cut))
    tokens, following = rows[:, :-1].long(), rows[:, 1:].long()  # [b, T]
    n_sequences, seq_len = tokens.shape
    is_end = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=bounds.device).index_fill(0, bounds, value=True)
    is_last = is_end[1:].view(n_sequences, seq_len)  # of its segment
    is_last[:, -1] &= ~is_cut
    is_padding = torch.arange(seq_len, device=bounds.device) >= seq_len - n_padding[:, None]
    labels = following.masked_fill(is_last | is_padding, IGNORED_LABEL)
    return tokens.reshape(1, -1), labels.reshape(1, -1)


def _positions(bounds: Tensor, n_tokens: int) -> Tensor:
    """[1, n_tokens], from 0 in every segment."""
    starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=n_tokens)
    return (torch.arange(n_tokens, device=bounds.device) - starts)[None]


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    """To a GPU through pinned memory, so that the copy does not wait for what the GPU is doing."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
