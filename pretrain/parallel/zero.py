"""ZeRO 1, 2 and 3 by DeepSpeed, behind the same interface as ReplicatedOptimizer. The only import of deepspeed.

DeepSpeed runs in fp32 mode whatever the compute dtype: parameters and gradients are fp32 in this system, so its bf16
machinery, with its second copy of the weights, has nothing to do.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.config import OptimizerSection
from loopline.pretrain.optimizer import MOMENTS, build_adamw, set_learning_rate
from loopline.pretrain.parallel.gradients import sum_tied_gradients
from loopline.pretrain.parallel.topology import Topology

os.environ.setdefault("DS_LOG_LEVEL", "warning")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


class ZeroOptimizer:
    """DeepSpeed's engine around the model.

    Under a pipeline Megatron's schedule runs the backward passes and gradients gather in `.grad`; `step` reduces them.
    Without one, each `backward` goes through the engine, so that stages 2 and 3 can shard as they go.

    Attributes:
        loss_scale: DeepSpeed averages over data-parallel ranks and our loss is divided by the global token count, so
            the loss is multiplied by the data-parallel size.
    """

    def __init__(
        self,
        model: LoopedLM,
        config: OptimizerSection,
        topology: Topology,
        *,
        stage: int,
    ) -> None:
        import deepspeed

        # On a CPU DeepSpeed would compile a shared-memory backend at its first start: half a minute, and a traceback
        # where no C++ compiler is installed, for an op that gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even of a process nobody launched
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.model, self.topology, self.stage = model, topology, stage
        self.loss_scale = float(topology.dp)
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.engine, _, _, _ = deepspeed.initialize(
            model=_Wrapped(model),
            optimizer=build_adamw(self.trained, config),
            mpu=_Grid(topology),
            dist_init_required=False,
            config=_engine_config(stage, config.grad_clip),
        )
        self.optimizer = self.engine.optimizer.optimizer
        self._allocate_moments()

    def forward(self, compute: Callable[[LoopedLM], Tensor]) -> Tensor:
        """`compute(model)` through the engine, so that its hooks see the output."""
        return self.engine(compute)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the loss's gradients."""
        self.engine.backward(loss)

    def step(self, lr: float) -> float:
        """Reduce, clip, update; the global gradient norm before clipping, inf where it is not finite (no update)."""
        set_learning_rate(self.optimizer, lr)
        sum_tied_gradients(self.model, self.topology)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())  # host sync

    def collect(self, name: str) -> dict[str, Tensor] | None:
        """As ReplicatedOptimizer.collect. Every data-parallel rank must call it: shards are gathered."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if name not in self.trained:
            weight = self._whole(parameter)
            parts = {"weight": weight, **{key: torch.zeros_like(weight) for key in MOMENTS}}
            return None if self.topology.dp_rank else parts
        parts = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        parts["weight"] = safe_get_full_fp32_param(parameter)
        return None if self.topology.dp_rank else parts

    def restore_moments(self, moments: dict[str, dict[str, Tensor]], step: int) -> None:
        """As ReplicatedOptimizer.restore_moments."""
        for state in self.optimizer.state.values():
            state["step"].fill_(float(step))
        for name, parameter in self.trained.items():
            for key in MOMENTS:
                self._set_state(parameter, moments[name][key], key)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """A frozen parameter, which stage 3 cuts like any other though no optimizer holds it."""
        if self.stage < 3:
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _allocate_moments(self) -> None:
        # DeepSpeed 0.19.8 links moments to parameters after the first group's first update, when the second group has
        # none yet, so that they could not be read back: allocate them all before.
        zero = self.engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            self.optimizer.state[flat] = {
                "step": torch.tensor(0.0),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_state(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(self.topology.device), key)
            return
        # safe_set_full_optimizer_state cuts without padding in stage 3 (0.19.8), which fails where the size is not a
        # multiple of dp; cut here instead.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.zeros(size * self.topology.dp)
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, size * self.topology.dp_rank, size)
        safe_set_local_optimizer_state(parameter, mine.to(self.topology.device), key)


class _Wrapped(nn.Module):
    """What the engine wraps: a forward that runs a function of the model."""

    def __init__(self, model: LoopedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[LoopedLM], Tensor]) -> Tensor:
        return compute(self.model)


class _Grid:
    """The grid under the names DeepSpeed asks its `mpu` for. "Model parallel" is tensor x pipeline."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def get_model_parallel_group(self) -> Any:
        from loopline.pretrain.parallel.megatron import parallel_state

        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self.topology.tp * self.topology.pp

    def get_model_parallel_rank(self) -> int:
        # DeepSpeed counts replicated parameters where this is 0, which must hold once on every stage.
        return self.topology.tp_rank

    def get_tensor_model_parallel_rank(self) -> int:
        return self.topology.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.topology.tp

    def get_tensor_model_parallel_group(self) -> Any:
        return self.topology.tp_group

    def get_data_parallel_group(self) -> Any:
        return self.topology.dp_group

    def get_data_parallel_rank(self) -> int:
        return self.topology.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.topology.dp


def _engine_config(stage: int, grad_clip: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        # An engine that owns accumulation divides gradients at every stage output; the loss is scaled once, by us.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": grad_clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": stage >= 2,
            "reduce_bucket_size": 1 << 26,
            "stage3_param_persistence_threshold": 0,
        },
    }
