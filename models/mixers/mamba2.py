"""Mamba-2: a state with one input-dependent decay a head, read and written by B and C that heads share in groups."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopline.kernels.precision import wide
from loopline.kernels.short_conv.op import short_conv
from loopline.kernels.simple_gla.op import BACKENDS, simple_gla
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.fills import Fill, inverse_softplus_step, log_uniform_rate, ones, zeros
from loopline.models.layers import GroupRMSNorm, Linear
from loopline.models.mixers.mixer import Mixer


class Mamba2(Mixer):
    """Per head, S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t B_t u_t^T and y_t = S_t^T C_t + D u_t, with u, B, C =
    silu(conv(W x) + bias) and dt = softplus(W_dt x + dt_bias). The output is RMSNorm(y * silu(W_z x)), gate before
    norm, the norm over each group's heads together, projected back. State starts from zero in every document and loop.

    `A_log`, `dt_bias` and `D` are fp32 and used in fp32: in bf16 a small decay rounds to none.
    Reference: Dao and Gu, Transformers are SSMs, arXiv:2405.21060; u is its X.
    """

    name = "mamba2"
    op = "simple_gla"
    backends = BACKENDS
    fills: ClassVar[dict[str, Fill]] = {
        "A_log": log_uniform_rate(1.0, 16.0),
        "dt_bias": inverse_softplus_step,
        "D": ones,
        "x_conv_bias": zeros,
        "b_conv_bias": zeros,
        "c_conv_bias": zeros,
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, mamba2 = config.d_model, config.mamba2
        self.d_head, self.d_state = mamba2.d_head, mamba2.d_state
        self.backend = mamba2.backend
        self.z_proj = Linear(d, mamba2.d_inner)
        self.x_proj = Linear(d, mamba2.d_inner)
        self.b_proj = Linear(d, mamba2.d_groups)
        self.c_proj = Linear(d, mamba2.d_groups)
        self.dt_proj = Linear(d, mamba2.n_heads)
        self.x_conv = nn.Parameter(torch.empty(mamba2.d_inner, mamba2.conv_size))
        self.x_conv_bias = nn.Parameter(torch.empty(mamba2.d_inner))
        self.b_conv = nn.Parameter(torch.empty(mamba2.d_groups, mamba2.conv_size))
        self.b_conv_bias = nn.Parameter(torch.empty(mamba2.d_groups))
        self.c_conv = nn.Parameter(torch.empty(mamba2.d_groups, mamba2.conv_size))
        self.c_conv_bias = nn.Parameter(torch.empty(mamba2.d_groups))
        self.A_log = nn.Parameter(torch.empty(mamba2.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(mamba2.n_heads))
        self.D = nn.Parameter(torch.empty(mamba2.n_heads))
        self.o_norm = GroupRMSNorm(mamba2.d_inner, config.norm_eps, mamba2.n_groups)
        self.o_proj = Linear(mamba2.d_inner, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        packing = context.packing
        pos = packing.positions
        u = short_conv(self.x_proj(x), self.x_conv, pos, self.x_conv_bias).unflatten(-1, (-1, self.d_head))
        b = short_conv(self.b_proj(x), self.whole(self.b_conv), pos, self.whole(self.b_conv_bias))
        c = short_conv(self.c_proj(x), self.whole(self.c_conv), pos, self.whole(self.c_conv_bias))
        dt = F.softplus(wide(self.dt_proj(x)) + self.dt_bias)  # [1, T, H], fp32
        y, _ = simple_gla(
            self.own_groups(c),
            self.own_groups(b),
            (wide(u) * dt[..., None]).to(u.dtype),  # [1, T, H, V]
            g=-self.A_log.exp() * dt,
            scale=1.0,
            cu_seqlens=packing.boundaries,
            backend=self.chosen_backend(x.device),
        )
        y = (wide(y) + self.D[:, None] * wide(u)).to(x.dtype)
        return self.o_proj(self.o_norm(y.flatten(2) * F.silu(self.z_proj(x))))

    def own_groups(self, x: Tensor) -> Tensor:
        """B or C of the groups whose heads are held here: [1, T, G * S] -> [1, T, G, S]; one group serves all heads."""
        groups = x.unflatten(-1, (-1, self.d_state))
        index, count = self.share
        return groups if groups.shape[2] == 1 else groups.chunk(count, dim=2)[index]
