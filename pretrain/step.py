"""One optimizer step, and one evaluation, on whatever layout was built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from loopline.data_pipeline.batch import Batch
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.batches import MicroBatch, to_device
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
        figures: what mixers record while training, by name.
    """

    loss: float
    grad_norm: float
    n_valid: int
    stop: bool
    figures: dict[str, float]

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
        figures: what mixers record at evaluations, by name.
    """

    loss: list[float]
    state_change: list[float]
    n_valid: int
    figures: dict[str, float]


@dataclass
class Stepper:
    """The model, its optimizer, and the way a batch goes through them.

    Attributes:
        pipeline: the ring over stages; None where one stage runs the plain loop.
        sequence_parallel: whether the stream is cut over tokens.
        figure_names, measured_names: figures the model's mixers record, while training and at evaluations.
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
    figure_names: tuple[str, ...] = ()
    measured_names: tuple[str, ...] = ()

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
        micro_batches = to_device(
            batch,
            self.micro_batch_sequences,
            topology.device,
            n_loops=self.model.config.n_loops,
            auxiliary_scale=scale,
        )
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
        figures = self.figures(micro_batches, self.figure_names)
        return StepResult(total / max(1.0, n_valid), grad_norm, int(n_valid), stop > 0, figures)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> DepthLosses:
        """Mean loss after every loop over `batches`, this rank's share of them."""
        topology, n_loops = self.topology, self.model.config.n_loops
        sums = torch.zeros(3 * n_loops - 2, dtype=torch.float64, device=topology.device)
        n_valid, rows = 0, []
        for batch in batches:
            micro_batches = to_device(
                batch, self.micro_batch_sequences, topology.device, n_loops=n_loops, is_measured=True
            )
            rows += micro_batches
            if self.pipeline is not None:
                sums += self.pipeline.measure(micro_batches)
            else:
                for micro in micro_batches:
                    sums += self.optimizer.forward(partial(measure_depths, batch=micro, loss=self.loss))
                    micro.row.memory.clear()  # its figures are wanted later, what its loops left is not
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
            self.figures(rows, self.measured_names),
        )

    def figures(self, micro_batches: list[MicroBatch], names: tuple[str, ...]) -> dict[str, float]:
        """Mixers' figures over the global batch: ratios of sums over tokens, blocks and loops. One that nothing was
        recorded for is left out."""
        if not names:
            return {}
        sums = [value for name in names for value in self._sums(micro_batches, name)]
        totals = self.topology.all_reduce(sums)
        pairs = zip(names, totals[::2], totals[1::2])
        return {name: numerator / denominator for name, numerator, denominator in pairs if denominator}

    def _sums(self, micro_batches: list[MicroBatch], name: str) -> tuple[float, float]:
        if self.topology.tp_rank:  # tensor-parallel ranks record the same
            return 0.0, 0.0
        found = [batch.row.sums(name) for batch in micro_batches]  # host sync
        return sum(numerator for numerator, _ in found), sum(denominator for _, denominator in found)
