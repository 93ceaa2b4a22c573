"""Kimi Delta Attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from loopline.kernels.kda.op import BACKENDS, kda
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, init_decay, settings_of
from loopline.models.hf.modules.delta import DeltaMixer


class LooplineKimiDelta(DeltaMixer):
    """A delta-rule state per head with a decay for every key channel: g = -exp(A_log) softplus(W_fb W_fa x + dt_bias),
    beta = sigmoid(W_b x); q, k, v are silu(conv(W x)), q and k of unit length; the output is RMSNorm(o) *
    sigmoid(W_gb W_ga x), projected back.

    Reference: Kimi Team, Kimi Linear, arXiv:2510.26692.
    """

    name = "kda"
    op_name = "kda"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        d, settings = config.hidden_size, settings_of(config, self.name)
        super().__init__(d, config.rms_norm_eps, settings)
        d_keys, d_values = settings.n_heads * self.d_head_k, settings.n_heads * self.d_head_v
        rank = settings.gate_rank or self.d_head_v
        self.f_a_proj = nn.Linear(d, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, d_keys, bias=False)
        self.g_a_proj = nn.Linear(d, rank, bias=False)
        self.g_b_proj = nn.Linear(rank, d_values, bias=False)  # no bias, as in Kimi Linear's own model
        # fp32 whatever the model's dtype (see _keep_in_fp32_modules_strict): in bf16 a small decay rounds to none.
        self.A_log = nn.Parameter(torch.empty(settings.n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(d_keys, dtype=torch.float32))

    def init_parameters(self) -> None:
        """Convolutions and decays."""
        super().init_parameters()
        init_decay(self.A_log, self.dt_bias, 1.0, 16.0)

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        step = F.softplus(wide(self.f_b_proj(self.f_a_proj(x))) + wide(self.dt_bias)).unflatten(-1, (-1, self.d_head_k))
        g = -wide(self.A_log).exp()[:, None] * step  # [B, T, H, K]
        inputs = self.project(x, slot, cache)
        o = self.recur(kda, slot, call, cache, g=g, scale=self.d_head_k**-0.5, **inputs)
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * gate.sigmoid()).flatten(2)), None
