"""Kimi Delta Attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache

from loopline.kernels.kda.op import BACKENDS, kda
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, LinearMixer, LooplineRMSNorm, l2_normalize, settings_of


class LooplineKimiDelta(LinearMixer):
    """A delta-rule state per head with a decay for every key channel: g = -exp(A_log) softplus(W_fb W_fa x + dt_bias),
    beta = sigmoid(W_b x); q, k, v are silu(conv(W x)), q and k of unit length; the output is RMSNorm(o) *
    sigmoid(W_gb W_ga x), projected back.

    Reference: Kimi Team, Kimi Linear, arXiv:2510.26692.
    """

    name = "kda"
    op_name = "kda"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        d, settings = config.hidden_size, settings_of(config, self.name)
        n_heads, width = settings.n_heads, settings.conv_size
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.beta_max = 2.0 if settings.allow_negative_eigenvalues else 1.0
        self.backend = settings.backend
        d_keys, d_values = n_heads * self.d_head_k, n_heads * self.d_head_v
        rank = settings.gate_rank or self.d_head_v
        self.q_proj = nn.Linear(d, d_keys, bias=False)
        self.k_proj = nn.Linear(d, d_keys, bias=False)
        self.v_proj = nn.Linear(d, d_values, bias=False)
        self.f_a_proj = nn.Linear(d, rank, bias=False)
        self.f_b_proj = nn.Linear(rank, d_keys, bias=False)
        self.b_proj = nn.Linear(d, n_heads, bias=False)
        self.g_a_proj = nn.Linear(d, rank, bias=False)
        self.g_b_proj = nn.Linear(rank, d_values, bias=False)  # no bias, as in Kimi Linear's own model
        self.q_conv = nn.Parameter(torch.empty(d_keys, width))
        self.k_conv = nn.Parameter(torch.empty(d_keys, width))
        self.v_conv = nn.Parameter(torch.empty(d_values, width))
        # fp32 whatever the model's dtype (see _keep_in_fp32_modules_strict): in bf16 a small decay rounds to none.
        self.A_log = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(d_keys, dtype=torch.float32))
        self.o_norm = LooplineRMSNorm(self.d_head_v, config.rms_norm_eps)
        self.o_proj = nn.Linear(d_values, d, bias=False)

    def init_parameters(self) -> None:
        """Convolutions at random; decays as Gu & Dao, arXiv:2312.00752."""
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            init.normal_(conv, mean=0.0, std=conv.shape[1] ** -0.5)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1.0, 16.0).log())
        dt = torch.empty_like(self.dt_bias).uniform_(-6.9, -2.3).exp()  # log-uniform over [1e-3, 0.1]
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        d_keys, d_values = self.q_conv.shape[0], self.v_conv.shape[0]
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv = self.convolve(qkv, torch.cat([self.q_conv, self.k_conv, self.v_conv]), slot, cache)
        q, k, v = qkv.split([d_keys, d_keys, d_values], dim=-1)
        step = F.softplus(wide(self.f_b_proj(self.f_a_proj(x))) + wide(self.dt_bias)).unflatten(-1, (-1, self.d_head_k))
        o = self.recur(
            kda,
            slot,
            call,
            cache,
            q=l2_normalize(q.unflatten(-1, (-1, self.d_head_k))),  # [B, T, H, K]
            k=l2_normalize(k.unflatten(-1, (-1, self.d_head_k))),
            v=v.unflatten(-1, (-1, self.d_head_v)),  # [B, T, H, V]
            g=-wide(self.A_log).exp()[:, None] * step,  # [B, T, H, K]
            beta=wide(self.b_proj(x)).sigmoid() * self.beta_max,  # [B, T, H]
            scale=self.d_head_k**-0.5,
        )
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * gate.sigmoid()).flatten(2)), None
