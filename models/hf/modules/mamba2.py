"""Mamba-2."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache

from loopline.kernels.precision import wide
from loopline.kernels.simple_gla.op import BACKENDS, simple_gla
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, LinearMixer, LooplineRMSNorm, init_decay, settings_of


class LooplineMamba2(LinearMixer):
    """A state per head with decay exp(-exp(A_log) dt), dt = softplus(W_dt x + dt_bias); u, B, C are silu(conv(W x) +
    bias), B and C shared by a group of heads; the output is RMSNorm((y + D u) * silu(W_z x)) over each group,
    projected back.

    Reference: Dao and Gu, Transformers are SSMs, arXiv:2405.21060.
    """

    name = "mamba2"
    op_name = "simple_gla"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        d, settings = config.hidden_size, settings_of(config, self.name)
        n_heads, n_groups, width = settings.n_heads, settings.n_groups, settings.conv_size
        self.d_head, self.d_state = settings.d_head, settings.d_state
        self.backend = settings.backend
        d_inner, d_groups = n_heads * self.d_head, n_groups * self.d_state
        self.z_proj = nn.Linear(d, d_inner, bias=False)
        self.x_proj = nn.Linear(d, d_inner, bias=False)
        self.b_proj = nn.Linear(d, d_groups, bias=False)
        self.c_proj = nn.Linear(d, d_groups, bias=False)
        self.dt_proj = nn.Linear(d, n_heads, bias=False)
        self.x_conv = nn.Parameter(torch.empty(d_inner, width))
        self.x_conv_bias = nn.Parameter(torch.empty(d_inner))
        self.b_conv = nn.Parameter(torch.empty(d_groups, width))
        self.b_conv_bias = nn.Parameter(torch.empty(d_groups))
        self.c_conv = nn.Parameter(torch.empty(d_groups, width))
        self.c_conv_bias = nn.Parameter(torch.empty(d_groups))
        # fp32 whatever the model's dtype (see _keep_in_fp32_modules_strict): in bf16 a small decay rounds to none.
        self.A_log = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.o_norm = LooplineRMSNorm(d_inner, config.rms_norm_eps, n_groups)
        self.o_proj = nn.Linear(d_inner, d, bias=False)

    def init_parameters(self) -> None:
        """Convolutions and decays."""
        for conv in (self.x_conv, self.b_conv, self.c_conv):
            init.normal_(conv, mean=0.0, std=conv.shape[1] ** -0.5)
        for bias in (self.x_conv_bias, self.b_conv_bias, self.c_conv_bias):
            init.zeros_(bias)
        init_decay(self.A_log, self.dt_bias, 1.0, 16.0)
        init.ones_(self.D)

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        # At padding the bias gives u, B and C that are not zero; `recur` writes nothing and forgets nothing there.
        ubc = self.convolve(
            torch.cat([self.x_proj(x), self.b_proj(x), self.c_proj(x)], dim=-1),
            torch.cat([self.x_conv, self.b_conv, self.c_conv]),
            slot,
            cache,
            torch.cat([self.x_conv_bias, self.b_conv_bias, self.c_conv_bias]),
        )
        u, b, c = ubc.split([conv.shape[0] for conv in (self.x_conv, self.b_conv, self.c_conv)], dim=-1)
        u = u.unflatten(-1, (-1, self.d_head))  # [B, T, H, V]
        dt = F.softplus(wide(self.dt_proj(x)) + wide(self.dt_bias))  # [B, T, H]
        y = self.recur(
            simple_gla,
            slot,
            call,
            cache,
            q=c.unflatten(-1, (-1, self.d_state)),  # [B, T, G, S]
            k=b.unflatten(-1, (-1, self.d_state)),
            v=(wide(u) * dt[..., None]).to(u.dtype),
            g=-wide(self.A_log).exp() * dt,
            scale=1.0,
        )
        y = (wide(y) + wide(self.D)[:, None] * wide(u)).to(x.dtype)
        return self.o_proj(self.o_norm(y.flatten(2) * F.silu(self.z_proj(x)))), None
