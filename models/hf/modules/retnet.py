"""Multi-scale retention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from loopline.kernels.precision import wide
from loopline.kernels.simple_gla.op import BACKENDS, simple_gla
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, LinearMixer, LooplineRMSNorm, settings_of
from loopline.models.rope import rotate


class LooplineRetention(LinearMixer):
    """A state per head h with the constant decay 1 - 2^(-5-h), q and k turned by position; the output is RMSNorm(o) *
    silu(W_g x), projected back.

    Reference: Sun et al., RetNet, arXiv:2307.08621.
    """

    name = "retnet"
    op_name = "simple_gla"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        d, settings = config.hidden_size, settings_of(config, self.name)
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.rope_theta = settings.rope_theta
        self.backend = settings.backend
        d_keys, d_values = settings.n_heads * self.d_head_k, settings.n_heads * self.d_head_v
        self.q_proj = nn.Linear(d, d_keys, bias=False)
        self.k_proj = nn.Linear(d, d_keys, bias=False)
        self.v_proj = nn.Linear(d, d_values, bias=False)
        self.g_proj = nn.Linear(d, d_values, bias=False)
        self.o_norm = LooplineRMSNorm(self.d_head_v, config.rms_norm_eps)
        self.o_proj = nn.Linear(d_values, d, bias=False)

    def init_parameters(self) -> None:
        """Matrices and the norm only, which transformers fills."""

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        tables = call.rotary(self.d_head_k, self.rope_theta)
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.d_head_k)), tables)  # [B, T, H, K]
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.d_head_k)), tables)
        heads = torch.arange(q.shape[2], device=q.device, dtype=wide(q).dtype)
        o = self.recur(
            simple_gla,
            slot,
            call,
            cache,
            q=q,
            k=k,
            v=self.v_proj(x).unflatten(-1, (-1, self.d_head_v)),  # [B, T, H, V]
            g=torch.log1p(-torch.exp2(-5 - heads)).expand(q.shape[:3]),  # spelled out, for there is none at padding
            scale=self.d_head_k**-0.5,
        )
        gate = self.g_proj(x).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2)), None
