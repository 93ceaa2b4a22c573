"""What one forward pass knows beyond a mixer's input, and what mixers share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache

from loopline.kernels.backends import check_backend
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.rope import rotary_tables


@dataclass
class Call:
    """One forward pass over [B, T] new tokens. Every loop and block shares it.

    Attributes:
        n_blocks: stored blocks; slot = loop_idx * n_blocks + block_idx.
        positions: [B, T], counted from each row's first token.
        is_token: [B, T], bool, False at padding; None means no padding.
        is_key: [B, S], the same over cached and new tokens together.
        n_keys: S. A cache of fixed length gives back more, which is not filled yet.
        masks: what transformers' attention functions take, by cache layer type.
        options: further keyword arguments for them.
        memory: by block, what its earlier loops left in this pass.
    """

    n_blocks: int
    positions: Tensor
    is_token: Tensor | None
    is_key: Tensor | None
    n_keys: int
    masks: dict[str, Any]
    options: dict[str, Any]
    memory: dict[int, dict[Any, Any]] = field(default_factory=dict)
    tables: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rotary(self, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
        """Rotary tables of the new tokens, made once."""
        if (d_head, theta) not in self.tables:
            self.tables[d_head, theta] = rotary_tables(self.positions, d_head, theta)
        return self.tables[d_head, theta]


def settings_of(config: LooplineConfig, name: str) -> SimpleNamespace:
    """A mixer's settings, as attributes."""
    return SimpleNamespace(**(config.mixers or {})[name])


class LooplineRMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in fp32; over each of `n_groups` equal parts of the channels."""

    def __init__(self, d: int, eps: float, n_groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps
        self.n_groups = n_groups

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] in x.dtype."""
        groups = wide(x).unflatten(-1, (self.n_groups, -1))
        return (F.rms_norm(groups, groups.shape[-1:], None, self.eps).flatten(-2) * wide(self.weight)).to(x.dtype)


class LinearMixer(nn.Module):
    """A mixer with a recurrent state: one matrix a head, [B, H, K, V] in fp32 and, where it has short convolutions,
    their last W inputs side by side, [B, D, W]. Padding leaves both as they are."""

    op_name: str
    backends: tuple[str, ...]
    backend: str

    def without_padding(self, x: Tensor, call: Call) -> Tensor:
        """The input with zeros at padding: no projection has a bias, so padding enters no convolution and no state."""
        return x if call.is_token is None else x.masked_fill(~call.is_token[..., None], 0.0)

    def convolve(self, x: Tensor, weight: Tensor, slot: int, cache: Cache | None, bias: Tensor | None = None) -> Tensor:
        """silu of the causal depthwise convolution: [B, T, D] and [D, W] -> [B, T, D]."""
        n_tokens, width, weight = x.shape[1], weight.shape[1], weight.to(x.dtype)
        x = x.mT
        if cache is not None:  # inputs before these tokens come in front
            x = cache.update_conv_state(x, slot, conv_kernel_size=width)
        y = x * weight[:, width - 1, None]
        for back in range(1, width):
            y = y + F.pad(x, (back, 0))[..., : x.shape[-1]] * weight[:, width - 1 - back, None]
        y = y[..., -n_tokens:].mT
        return F.silu(y if bias is None else y + bias.to(y.dtype))

    def recur(
        self, op: Callable, slot: int, call: Call, cache: Cache | None, *, scale: float, **tensors: Tensor
    ) -> Tensor:
        """Run `op` over rows laid end to end, from the cached state: [B, T, H, V].

        Args:
            tensors: the op's arguments, [B, T, ...]: q, k, v, and what it has of g and beta.
        """
        n_rows, n_tokens = tensors["q"].shape[:2]
        if call.is_token is not None:  # nothing is written, erased or forgotten at padding
            for name in {"v", "g", "beta"} & tensors.keys():
                x = tensors[name]
                tensors[name] = x.masked_fill(~call.is_token.view(n_rows, n_tokens, *[1] * (x.dim() - 2)), 0.0)
        packed = {name: x.flatten(0, 1)[None] for name, x in tensors.items()}
        o, state = op(
            **packed,
            scale=scale,
            cu_seqlens=[i * n_tokens for i in range(n_rows + 1)],
            initial_state=cache.get_recurrent_state(slot) if cache is not None else None,
            backend=check_backend(
                self.op_name, self.backends, self.backend, packed["q"].device.type, packed["q"].dtype
            ),
        )
        if cache is not None:
            cache.update_recurrent_state(state, slot)
            if not cache.has_previous_state(slot):  # no convolution
                # transformers 5.23 gives a state back only where a convolution's inputs are kept too: none here.
                cache.update_conv_state(state.new_zeros(n_rows, 0, 1), slot, conv_kernel_size=1)
        return o[0].unflatten(0, (n_rows, n_tokens))


def init_decay(A_log: nn.Parameter, dt_bias: nn.Parameter, low: float, high: float) -> None:
    """Rates in (low, high) and steps log-uniform over [1e-3, 0.1]: Gu & Dao, arXiv:2312.00752."""
    init.copy_(A_log, torch.empty_like(A_log).uniform_(low, high).log())
    dt = torch.empty_like(dt_bias).uniform_(-6.9, -2.3).exp()
    init.copy_(dt_bias, dt + torch.log(-torch.expm1(-dt)))
