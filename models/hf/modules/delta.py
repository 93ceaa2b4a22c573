"""What mixers with a delta-rule state share: q, k, v through short convolutions, q and k of unit length, beta."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from loopline.kernels.precision import l2_normalize, wide
from loopline.models.hf.modules.call import LinearMixer, LooplineRMSNorm


class DeltaMixer(LinearMixer):
    """Projections, convolutions and beta of Gated DeltaNet, Kimi Delta Attention and DeltaNet."""

    def __init__(self, d: int, eps: float, settings: SimpleNamespace) -> None:
        super().__init__()
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.beta_max = 2.0 if settings.allow_negative_eigenvalues else 1.0
        self.backend = settings.backend
        d_keys, d_values = settings.n_heads * self.d_head_k, settings.n_heads * self.d_head_v
        self.q_proj = nn.Linear(d, d_keys, bias=False)
        self.k_proj = nn.Linear(d, d_keys, bias=False)
        self.v_proj = nn.Linear(d, d_values, bias=False)
        self.b_proj = nn.Linear(d, settings.n_heads, bias=False)
        self.q_conv = nn.Parameter(torch.empty(d_keys, settings.conv_size))
        self.k_conv = nn.Parameter(torch.empty(d_keys, settings.conv_size))
        self.v_conv = nn.Parameter(torch.empty(d_values, settings.conv_size))
        self.o_norm = LooplineRMSNorm(self.d_head_v, eps)
        self.o_proj = nn.Linear(d_values, d, bias=False)

    def init_parameters(self) -> None:
        """Convolutions at random."""
        for conv in (self.q_conv, self.k_conv, self.v_conv):
            init.normal_(conv, mean=0.0, std=conv.shape[1] ** -0.5)

    def project(self, x: Tensor, slot: int, cache: Cache | None) -> dict[str, Tensor]:
        """[B, T, C], zeros at padding -> q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H] in fp32, by name."""
        sizes = [conv.shape[0] for conv in (self.q_conv, self.k_conv, self.v_conv)]
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv = self.convolve(qkv, torch.cat([self.q_conv, self.k_conv, self.v_conv]), slot, cache)
        q, k, v = qkv.split(sizes, dim=-1)
        return {
            "q": l2_normalize(q.unflatten(-1, (-1, self.d_head_k))),
            "k": l2_normalize(k.unflatten(-1, (-1, self.d_head_k))),
            "v": v.unflatten(-1, (-1, self.d_head_v)),
            "beta": wide(self.b_proj(x)).sigmoid() * self.beta_max,
        }
