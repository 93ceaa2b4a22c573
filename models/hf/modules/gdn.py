"""Gated DeltaNet."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from loopline.kernels.gated_delta.op import BACKENDS, gated_delta
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, init_decay, settings_of
from loopline.models.hf.modules.delta import DeltaMixer


class LooplineGatedDeltaNet(DeltaMixer):
    """A decaying delta-rule state per head: g = -exp(A_log) softplus(W_a x + dt_bias), beta = sigmoid(W_b x); q, k, v
    are silu(conv(W x)), q and k of unit length; the output is RMSNorm(o) * silu(W_g x), projected back.

    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464.
    """

    name = "gdn"
    op_name = "gated_delta"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        settings = settings_of(config, self.name)
        super().__init__(config.hidden_size, config.rms_norm_eps, settings)
        self.a_proj = nn.Linear(config.hidden_size, settings.n_heads, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, settings.n_heads * self.d_head_v, bias=False)
        # fp32 whatever the model's dtype (see _keep_in_fp32_modules_strict): in bf16 a small decay rounds to none.
        self.A_log = nn.Parameter(torch.empty(settings.n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(settings.n_heads, dtype=torch.float32))

    def init_parameters(self) -> None:
        """Convolutions and decays."""
        super().init_parameters()
        init_decay(self.A_log, self.dt_bias, 1e-4, 16.0)

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        g = -wide(self.A_log).exp() * F.softplus(wide(self.a_proj(x)) + wide(self.dt_bias))  # [B, T, H]
        inputs = self.project(x, slot, cache)
        op = partial(gated_delta, output_final_state=cache is not None)
        o = self.recur(op, slot, call, cache, g=g, scale=self.d_head_k**-0.5, **inputs)
        gate = self.g_proj(x).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2)), None
