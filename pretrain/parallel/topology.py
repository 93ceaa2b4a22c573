"""The grid of processes: tensor x pipeline x data, built once and passed explicitly."""

import datetime
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from loopline.pretrain.errors import ConfigError
from loopline.pretrain.world import world_from_environment


@dataclass(frozen=True)
class Topology:
    """Where this process stands.

    Attributes:
        rank, world_size: in the whole job.
        tp_rank, tp, pp_rank, pp, dp_rank, dp: place and size on each axis; tp runs fastest, pp slowest.
        device: where this process computes.
        tp_group, pp_group, dp_group: process groups; None where the job is one process.
        tp_mesh: the tensor-parallel group as a mesh, for sharded checkpoints; None where tp is 1.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp: int
    pp_rank: int
    pp: int
    dp_rank: int
    dp: int
    device: torch.device
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    tp_mesh: DeviceMesh | None = None

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm, the loop update and the head."""
        return self.pp_rank == self.pp - 1

    @property
    def is_main(self) -> bool:
        """Writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sum numbers over the world, in float64."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()  # host sync

    def gather(self, part: dict[str, Any]) -> dict[str, Any]:
        """The union of every rank's dict of plain values; equal keys hold equal values."""
        if self.world_size == 1:
            return part
        parts: list[dict[str, Any]] = [{}] * self.world_size
        dist.all_gather_object(parts, part)
        return {key: value for each in parts for key, value in each.items()}


def pick_device(choice: str, local_rank: int) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda".

    Raises:
        ConfigError: CUDA asked for and not there, or fewer devices than local processes.
    """
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "cuda" and n_devices == 0:
        raise ConfigError("train.device = 'cuda' and torch finds no CUDA device: use 'auto' or 'cpu'")
    if choice != "cpu" and 0 < n_devices <= local_rank:
        raise ConfigError(
            f"local rank {local_rank} has no device: this machine has {n_devices}; launch {n_devices} processes on it"
        )
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def init_topology(
    *, tp: int, pp: int, n_loops: int, device: torch.device, needs_groups: bool, timeout_s: float
) -> Topology:
    """Start communication and build the grid. One process without ZeRO starts none.

    Args:
        tp, pp: sizes; the rest of the world is data parallel.
        n_loops: loops, which are a stage's virtual chunks.
        needs_groups: build groups even for a single process (DeepSpeed wants them).
        timeout_s: how long a collective may wait.
    """
    rank, world_size, _ = world_from_environment()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1 and not needs_groups:
        return Topology(0, 1, 0, 1, 0, 1, 0, 1, device)
    from loopline.pretrain.parallel.megatron import parallel_state  # seconds to import; one process needs none of it

    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=n_loops if pp > 1 and n_loops > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        order="tp-cp-ep-dp-pp",
    )
    tp_group = parallel_state.get_tensor_model_parallel_group()
    return Topology(
        rank=rank,
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp=pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        device=device,
        tp_group=tp_group,
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        tp_mesh=DeviceMesh.from_group(tp_group, "cpu") if tp > 1 else None,
    )


def shutdown() -> None:
    """Take the groups down, if any were built."""
    if dist.is_initialized():
        from loopline.pretrain.parallel.megatron import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
