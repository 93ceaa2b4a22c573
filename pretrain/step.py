"""One optimizer step, and one evaluation, on whatever layout was built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from loopline.data_pipeline.batch import Batch
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.batches import to_device
from loopline.pretrain.objective import LossFn, measure_depths, micro_batch_loss
from loopline.pretrain.parallel.topology import Topology

if TYPE_CHECKING:  # a single process imports neither megatron nor deepspeed, which take seconds
    from loopline.pretrain.parallel.pipeline import Pipeline
    from loopline.pretrain.parallel.replicated import ReplicatedOptimizer
    from loopline.pretrain.parallel.zero import ZeroOptimizer


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: mean cross-entropy over the global batch's valid tokens, nats.
        grad_norm: L2 norm of the whole gradient before clipping.
        n_valid: valid tokens of the global batch.
        stop: whether any rank asked to stop.
    """

    loss: float
    grad_norm: float
    n_valid: int
    stop: bool

    @property
    def is_finite(self) -> bool:
        """Whether weights were updated: every optimizer decides by the gradient norm alone."""
        return math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class DepthLosses:
    """Held-out figures by depth.

    Attributes:
        loss: mean cross-entropy after loop 1..R, nats.
        state_change: ||h_r - h_{r-1}|| / ||h_r|| for r = 2..R.
        n_valid: tokens measured.
    """

    loss: list[float]
    state_change: list[float]
    n_valid: int


@dataclass
class Stepper:
    """The model, its optimizer, and the way a batch goes through them.

    Attributes:
        pipeline: the ring over stages; None where one stage runs the plain loop.
        sequence_parallel: whether the stream is cut over tokens.
        parameter_shapes: storage-free twins of this rank's parameters, as they were before ZeRO took them.
    """

    model: LoopedLM
    optimizer: ReplicatedOptimizer | ZeroOptimizer
    topology: Topology
    loss: LossFn
    pipeline: Pipeline | None
    micro_batch_sequences: int
    sequence_parallel: bool
    parameter_shapes: dict[str, torch.Tensor]

    def train(self, batch: Batch, lr: float, wants_stop: bool = False) -> StepResult:
        """Forward, backward, reduce, update.

        Args:
            batch: this data-parallel rank's sequences.
            lr: learning rate of this step.
            wants_stop: this rank was asked to stop; every rank learns of it.
        """
        topology = self.topology
        is_counted = topology.tp_rank == 0 and topology.is_last_stage
        n_valid, stop = topology.all_reduce([batch.n_valid if is_counted else 0, float(wants_stop)])
        # The loss is scaled once: by the global number of valid tokens.
        scale = self.optimizer.loss_scale / max(1.0, n_valid)
        micro_batches = to_device(batch, self.micro_batch_sequences, topology.device)
        if self.pipeline is not None:
            loss_sum = self.pipeline.train(micro_batches, scale)
        else:
            loss_sum = torch.zeros((), device=topology.device)
            for micro in micro_batches:
                loss = self.optimizer.forward(partial(micro_batch_loss, batch=micro, loss=self.loss))
                self.optimizer.backward(loss * scale)
                loss_sum += loss.detach()
        grad_norm = self.optimizer.step(lr)
        (total,) = topology.all_reduce([float(loss_sum) if is_counted else 0.0])  # host sync
        return StepResult(total / max(1.0, n_valid), grad_norm, int(n_valid), stop > 0)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> DepthLosses:
        """Mean loss after every loop over `batches`, this rank's share of them."""
        topology, n_loops = self.topology, self.model.config.n_loops
        sums = torch.zeros(3 * n_loops - 2, dtype=torch.float64, device=topology.device)
        n_valid = 0
        for batch in batches:
            micro_batches = to_device(batch, self.micro_batch_sequences, topology.device)
            if self.pipeline is not None:
                sums += self.pipeline.measure(micro_batches)
            else:
                for micro in micro_batches:
                    sums += self.optimizer.forward(partial(measure_depths, batch=micro, loss=self.loss))
            n_valid += batch.n_valid
        is_counted = topology.tp_rank == 0 and topology.is_last_stage
        losses, states = sums[:n_loops].tolist(), sums[n_loops:].tolist()  # host sync
        if not is_counted:
            losses, n_valid = [0.0] * n_loops, 0
        if not is_counted and not (self.sequence_parallel and topology.is_last_stage):
            states = [0.0] * len(states)
        *totals, count = topology.all_reduce([*losses, *states, float(n_valid)])
        changes, sizes = totals[n_loops : 2 * n_loops - 1], totals[2 * n_loops - 1 :]
        return DepthLosses(
            [x / max(1.0, count) for x in totals[:n_loops]],
            [math.sqrt(c / s) if s else 0.0 for c, s in zip(changes, sizes)],
            int(count),
        )
