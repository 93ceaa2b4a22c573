"""ZeRO 0: every data-parallel rank holds the whole optimizer. Plain torch, so that the judge of every other layout
shares no code with what it judges."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.config import OptimizerSection
from loopline.pretrain.optimizer import MOMENTS, build_adamw, set_learning_rate
from loopline.pretrain.parallel.gradients import clip_factor, gradient_norm, sum_gradients, sum_tied_gradients
from loopline.pretrain.parallel.topology import Topology


class ReplicatedOptimizer:
    """AdamW on every rank, gradients summed over data-parallel ranks once a step.

    Attributes:
        loss_scale: factor the caller puts on the loss; gradients are summed here, so 1.
    """

    loss_scale = 1.0

    def __init__(self, model: LoopedLM, config: OptimizerSection, topology: Topology) -> None:
        self.model, self.topology = model, topology
        self.grad_clip = config.grad_clip
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.optimizer = build_adamw(self.trained, config)

    def forward(self, compute: Callable[[LoopedLM], Tensor]) -> Tensor:
        """`compute(model)`."""
        return compute(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to `.grad`, which is fp32."""
        loss.backward()

    def step(self, lr: float) -> float:
        """Reduce, clip, update.

        Returns:
            The global gradient norm before clipping. Where it is not finite nothing is updated.
        """
        set_learning_rate(self.optimizer, lr)
        sum_tied_gradients(self.model, self.topology)
        sum_gradients(list(self.trained.values()), self.topology.dp_group if self.topology.dp > 1 else None)
        norm = gradient_norm(self.trained, self.topology)
        if torch.isfinite(torch.tensor(norm)):
            factor = clip_factor(norm, self.grad_clip)
            if factor < 1:
                torch._foreach_mul_([p.grad for p in self.trained.values() if p.grad is not None], factor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def collect(self, name: str) -> dict[str, Tensor] | None:
        """Weight and moments of a parameter as this rank's checkpoint part, on every rank of the first data-parallel
        slice; None elsewhere, where they are copies."""
        if self.topology.dp_rank:
            return None
        parameter = self.parameters[name]
        state = self.optimizer.state.get(parameter, {})  # a frozen one has none
        moments = {key: state[key] if key in state else torch.zeros_like(parameter) for key in MOMENTS}
        return {"weight": parameter.detach(), **moments}

    def restore_moments(self, moments: dict[str, dict[str, Tensor]], step: int) -> None:
        """Put Adam's moments back: {parameter: {exp_avg, exp_avg_sq}} after `step` updates."""
        for name, parameter in self.trained.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{key: value.to(parameter.device) for key, value in moments[name].items()},
            }
