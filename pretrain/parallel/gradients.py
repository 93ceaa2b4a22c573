"""Sums and norms of gradients over the grid."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.parallel.topology import Topology

BUCKET_NUMEL = 1 << 25  # 128 MiB of fp32 in one all-reduce


def is_second_copy(model: LoopedLM, topology: Topology, name: str) -> bool:
    """Whether a parameter is the last stage's copy of a tied embedding, which counts once and is saved once."""
    return name == "head.weight" and topology.pp > 1 and model.config.tie_embeddings


def sum_tied_gradients(model: LoopedLM, topology: Topology) -> None:
    """Add the gradients of a tied embedding's two copies, which live on the first and the last stage."""
    if topology.pp == 1 or not model.config.tie_embeddings:
        return
    if not (topology.is_first_stage or topology.is_last_stage):
        return
    from loopline.pretrain.parallel.megatron import parallel_state

    weight = model.embed.weight if topology.is_first_stage else model.head.weight
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    dist.all_reduce(weight.grad, group=parallel_state.get_embedding_group())


def sum_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sum `.grad` over `group`, in buckets; a parameter without a gradient gets zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if group is None:
        return
    bucket: list[Tensor] = []
    for i, parameter in enumerate(parameters):
        bucket.append(parameter.grad)  # type: ignore[arg-type]
        if i == len(parameters) - 1 or sum(g.numel() for g in bucket) >= BUCKET_NUMEL:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat, group=group)
            for grad, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
                grad.copy_(summed.view_as(grad))
            bucket = []


def gradient_norm(parameters: dict[str, nn.Parameter], topology: Topology) -> float:
    """L2 norm of the whole model's gradient: every parameter once, whatever the layout.

    A cut parameter counts on each of its ranks; a replicated one on the first tensor-parallel rank; the second copy of
    a tied embedding not at all.
    """
    counted = [
        p.grad
        for p in parameters.values()
        if (hasattr(p, "shard") or topology.tp_rank == 0) and not getattr(p, "ds_pipe_replicated", False)
    ]
    squares = torch.zeros((), dtype=torch.float64, device=topology.device)
    if counted:
        # In fp64: torch's fp32 norm of a large CPU tensor is off by 1e-5, which showed as a difference of layouts.
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in counted]  # type: ignore[arg-type]
        squares = torch.stack(norms).square().sum()
    if topology.world_size > topology.dp:
        from loopline.pretrain.parallel.megatron import parallel_state

        dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return float(squares.sqrt())  # host sync


def clip_factor(norm: float, max_norm: float) -> float:
    """Factor that brings a gradient of `norm` to at most `max_norm`; the same formula as torch and DeepSpeed."""
    return min(1.0, max_norm / (norm + 1e-6))
