"""The interface every token mixer has."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from loopline.kernels.backends import check_backend
from loopline.models.context import BlockContext
from loopline.models.fills import Fill


class Mixer(nn.Module):
    """A token mixer: [1, T, C] -> [1, T, C], inside each document of the packed row.

    A mixer is written for one device. Head counts follow from projection widths, so a rank that holds some heads runs
    the same code. What is not so local goes through `whole`, `sum_over_ranks` and `share`, which pretrain/parallel
    replaces.

    Attributes:
        name: the mixer's name, that of its settings in ModelConfig.
        op: the kernel op it calls, for messages.
        backends: the op's backends, preferred first.
        backend: one of them, or "auto".
        share: (index, count): which part of the heads is held here.
        figures: what it records for the logs while training, beyond those `measured` at evaluations.
        fills: local parameter name -> how it starts, where that is not as a matrix or a norm.
    """

    name: ClassVar[str]
    op: ClassVar[str]
    backends: ClassVar[tuple[str, ...]]
    fills: ClassVar[dict[str, Fill]] = {}
    figures: ClassVar[tuple[str, ...]] = ()
    measured: ClassVar[tuple[str, ...]] = ()
    backend: str
    share: tuple[int, int] = (0, 1)

    def chosen_backend(self, device: torch.device, dtype: torch.dtype | None = None) -> str:
        """The backend that runs on `device`, on tensors of `dtype` where the op's backends differ in that.

        Raises:
            BackendError: the one asked for is not available there.
        """
        return check_backend(self.op, self.backends, self.backend, device.type, dtype)

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter that all heads use. Where heads are cut, its gradient is the sum over ranks."""
        return parameter

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum over the ranks that hold the other heads, without gradient; here there are none."""
        return x

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]."""
        raise NotImplementedError
