"""The calls that kernels/lint.py compiles: head sizes a model may choose, forward and backward, whole and cut."""

import functools
from collections.abc import Callable, Iterator

import torch

from loopline.kernels.gated_delta.launch import gated_delta_triton
from loopline.kernels.lint import Budget

# K, V; the first is what we optimise for.
SIZES = [(128, 128), (64, 64), (96, 192), (192, 192), (224, 224), (256, 256), (32, 32)]
# Most of Triton 3.6.0 and 3.9.0. The blocks of the chunk kernel have 16 rows, and the merge is exact fp32.
BUDGETS: dict[str, Budget] = {
    "gated_delta_fwd_chunk_kernel": Budget(stack_bytes=128, needs_wgmma=False),
    "gated_delta_fwd_kernel": Budget(stack_bytes=88),  # 96/192
    "gated_delta_merge_kernel": Budget(needs_wgmma=False),
    "gated_delta_bwd_scan_kernel": Budget(stack_bytes=176),  # 96/192
    "gated_delta_bwd_gradients_kernel": Budget(stack_bytes=1104),  # 224/224
}


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call."""
    for d_k, d_v in SIZES:
        yield f"{d_k}/{d_v} bf16", functools.partial(_call, d_k, d_v, torch.bfloat16)
    yield "128/128 bf16, two value heads a key", functools.partial(_call, 128, 128, torch.bfloat16, n_heads=2)
    yield "64/64 bf16, four value heads a key", functools.partial(_call, 64, 64, torch.bfloat16, n_heads=4)
    yield "128/128 bf16, training", functools.partial(_call, 128, 128, torch.bfloat16, is_training=True)


def fp32_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """In fp32, whose operands are split in two for the tensor cores and fill the registers."""
    for d_k, d_v in [(128, 128), (96, 192)]:
        yield f"{d_k}/{d_v} fp32", functools.partial(_call, d_k, d_v, torch.float32)


def _call(d_k: int, d_v: int, dtype: torch.dtype, n_heads: int = 1, is_training: bool = False) -> None:
    """Forward and backward of two documents: with states in and out and one document cut, or as training has them."""
    q, k = (torch.zeros(1, 640, 1, d_k, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.zeros(1, 640, n_heads, d_v, dtype=dtype, requires_grad=True)
    g, beta = (torch.zeros(1, 640, n_heads, requires_grad=True) for _ in range(2))
    initial_state = None if is_training else torch.zeros(2, n_heads, d_k, d_v, requires_grad=True)
    o, final_state = gated_delta_triton(
        q,
        k,
        v,
        g=g,
        beta=beta,
        scale=1.0,
        cu_seqlens=[0, 100, 640],
        initial_state=initial_state,
        normalize=True,
        output_final_state=not is_training,
        segment_chunks=9 if is_training else 2,
    )
    (o.sum() if final_state is None else o.sum() + final_state.sum()).backward()
