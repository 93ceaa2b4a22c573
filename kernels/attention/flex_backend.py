"""Packed attention on torch's FlexAttention: the mask as a function, tiles without a visible key skipped."""

import functools
import itertools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def flex(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], window: int | None) -> Tensor:
    """As `packed_attention`. Compiled on CUDA; on a CPU torch has only its forward, over T x T scores."""
    attend = _compiled() if q.is_cuda else flex_attention
    o = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),  # [1, H, T, D]
        block_mask=_block_mask(tuple(cu_seqlens), window, q.device),
        scale=q.shape[-1] ** -0.5,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)


@functools.cache
def _compiled():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=16)  # built once a row, not at every block and loop
def _block_mask(cu_seqlens: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    lengths = torch.tensor([end - start for start, end in itertools.pairwise(cu_seqlens)])
    document = torch.repeat_interleave(lengths).to(device)  # [T]
    n_tokens = cu_seqlens[-1]
    reach = n_tokens if window is None else window

    def is_visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (document[t] == document[s]) & (s <= t) & (t - s < reach)

    return create_block_mask(is_visible, None, None, n_tokens, n_tokens, device=str(device))
