"""Gated linear attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache

from loopline.kernels.gla.op import BACKENDS, gla
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, LinearMixer, LooplineRMSNorm, settings_of


class LooplineGatedLinearAttention(LinearMixer):
    """A state per head with a decay for each key channel, g = logsigmoid(W_b W_a x + gk_bias) / gate_normalizer; the
    output is RMSNorm(o) * silu(W_g x), projected back.

    Reference: Yang et al., Gated Linear Attention, arXiv:2312.06635.
    """

    name = "gla"
    op_name = "gla"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        d, settings = config.hidden_size, settings_of(config, self.name)
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.gate_normalizer = settings.gate_normalizer
        self.backend = settings.backend
        d_keys, d_values = settings.n_heads * self.d_head_k, settings.n_heads * self.d_head_v
        self.q_proj = nn.Linear(d, d_keys, bias=False)
        self.k_proj = nn.Linear(d, d_keys, bias=False)
        self.v_proj = nn.Linear(d, d_values, bias=False)
        self.gk_a_proj = nn.Linear(d, settings.gate_rank, bias=False)
        self.gk_b_proj = nn.Linear(settings.gate_rank, d_keys, bias=False)
        self.gk_bias = nn.Parameter(torch.empty(d_keys))
        self.g_proj = nn.Linear(d, d_values, bias=False)
        self.o_norm = LooplineRMSNorm(self.d_head_v, config.rms_norm_eps)
        self.o_proj = nn.Linear(d_values, d, bias=False)

    def init_parameters(self) -> None:
        """What is not a matrix at random."""
        init.zeros_(self.gk_bias)

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        keys, values = (-1, self.d_head_k), (-1, self.d_head_v)
        g = F.logsigmoid(wide(self.gk_b_proj(self.gk_a_proj(x))) + wide(self.gk_bias)) / self.gate_normalizer
        o = self.recur(
            gla,
            slot,
            call,
            cache,
            q=self.q_proj(x).unflatten(-1, keys),  # [B, T, H, K]
            k=self.k_proj(x).unflatten(-1, keys),
            v=self.v_proj(x).unflatten(-1, values),  # [B, T, H, V]
            g=g.unflatten(-1, keys),
            scale=self.d_head_k**-0.5,
        )
        gate = self.g_proj(x).unflatten(-1, values)
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2)), None
