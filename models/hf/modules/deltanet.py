"""DeltaNet."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from loopline.kernels.delta_rule.op import BACKENDS, delta_rule
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, LinearMixer, LooplineRMSNorm, l2_normalize, settings_of


class LooplineDeltaNet(LinearMixer):
    """A delta-rule state per head that never decays: beta = sigmoid(W_b x); q, k, v are silu(conv(W x)), q and k of
    unit length; the output is RMSNorm(o), projected back.

    Reference: Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484.
    """

    name = "deltanet"
    op_name = "delta_rule"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        d, settings = config.hidden_size, settings_of(config, self.name)
        n_heads, width = settings.n_heads, settings.conv_size
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.beta_max = 2.0 if settings.allow_negative_eigenvalues else 1.0
        self.backend = settings.backend
        d_keys, d_values = n_heads * self.d_head_k, n_heads * self.d_head_v
        self.q_proj = nn.Linear(d, d_keys, bias=False)
        self.k_proj = nn.Linear(d, d_keys, bias=False)
        self.v_proj = nn.Linear(d, d_values, bias=False)
        self.b_proj = nn.Linear(d, n_heads, bias=False)
        self.q_conv = nn.Parameter(torch.empty(d_keys, width))
        self.k_conv = nn.Parameter(torch.empty(d_keys, width))
        self.v_conv = nn.Parameter(torch.empty(d_values, width))
        self.o_norm = LooplineRMSNorm(self.d_head_v, config.rms_norm_eps)
        self.o_proj = nn.Linear(d_values, d, bias=False)

    def init_parameters(self) -> None:
        """Convolutions at random."""
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            init.normal_(conv, mean=0.0, std=conv.shape[1] ** -0.5)

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        d_keys, d_values = self.q_conv.shape[0], self.v_conv.shape[0]
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv = self.convolve(qkv, torch.cat([self.q_conv, self.k_conv, self.v_conv]), slot, cache)
        q, k, v = qkv.split([d_keys, d_keys, d_values], dim=-1)
        o = self.recur(
            delta_rule,
            slot,
            call,
            cache,
            q=l2_normalize(q.unflatten(-1, (-1, self.d_head_k))),  # [B, T, H, K]
            k=l2_normalize(k.unflatten(-1, (-1, self.d_head_k))),
            v=v.unflatten(-1, (-1, self.d_head_v)),  # [B, T, H, V]
            beta=wide(self.b_proj(x)).sigmoid() * self.beta_max,  # [B, T, H]
            scale=self.d_head_k**-0.5,
        )
        return self.o_proj(self.o_norm(o).flatten(2)), None
