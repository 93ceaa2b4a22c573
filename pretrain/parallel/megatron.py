"""The only import of megatron.core, and what it needs to run on a CPU.

megatron-core 0.16.1 is the last release for Python 3.11. Its schedules and mappings allocate on "cuda" by name; where
no CUDA device exists, `run_without_cuda` makes those allocations land on the CPU. Nothing else is patched.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():
    # Transformer Engine and Apex are optional and absent; Megatron says so at import.
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.pipeline_parallel.schedules import (
        forward_backward_pipelining_with_interleaving,
        forward_backward_pipelining_without_interleaving,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "ModelType",
    "P2PCommunicator",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
    "gather_from_sequence_parallel_region",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "run_without_cuda",
    "vocab_parallel_cross_entropy",
]


class _CudaMeansCpu(TorchFunctionMode):
    """Send `device="cuda"` in factory calls to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def run_without_cuda() -> Iterator[None]:
    """While open, Megatron's CUDA allocations land on the CPU; does nothing where CUDA exists."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaMeansCpu():
        yield


def _current_device_is_cpu() -> Any:
    return torch.device("cpu")


if not torch.cuda.is_available():
    # Autograd functions ask for this in backward, on threads that no context manager reaches, so it is set for good.
    torch.cuda.current_device = _current_device_is_cpu  # type: ignore[assignment]
