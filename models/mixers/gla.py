"""Gated linear attention: a state with an input-dependent decay for each key channel, gated RMSNorm output."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopline.kernels.gla.op import BACKENDS, gla
from loopline.kernels.precision import wide
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.fills import Fill, zeros
from loopline.models.layers import Linear, RMSNorm
from loopline.models.mixers.mixer import Mixer


class GatedLinear(Mixer):
    """Per head, S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t / sqrt(K), with g = logsigmoid(W_b W_a x
    + gk_bias) / gate_normalizer, W_a of low rank. The output is RMSNorm(o) * silu(W_g x), projected back. State starts
    from zero in every document and loop.

    Reference: Yang et al., Gated Linear Attention, arXiv:2312.06635.
    """

    name = "gla"
    op = "gla"
    backends = BACKENDS
    fills: ClassVar[dict[str, Fill]] = {"gk_bias": zeros}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, settings = config.d_model, config.gla
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.gate_normalizer = settings.gate_normalizer
        self.backend = settings.backend
        self.q_proj = Linear(d, settings.d_keys)
        self.k_proj = Linear(d, settings.d_keys)
        self.v_proj = Linear(d, settings.d_values)
        self.gk_a_proj = Linear(d, settings.gate_rank)
        self.gk_b_proj = Linear(settings.gate_rank, settings.d_keys)
        self.gk_bias = nn.Parameter(torch.empty(settings.d_keys))
        self.g_proj = Linear(d, settings.d_values)
        self.o_norm = RMSNorm(settings.d_head_v, config.norm_eps)
        self.o_proj = Linear(settings.d_values, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        keys, values = (-1, self.d_head_k), (-1, self.d_head_v)
        # The decay's projections run in the compute dtype; from there it is fp32.
        g = F.logsigmoid(wide(self.gk_b_proj(self.gk_a_proj(x))) + self.gk_bias) / self.gate_normalizer
        o, _ = gla(
            self.q_proj(x).unflatten(-1, keys),  # [1, T, H, K]
            self.k_proj(x).unflatten(-1, keys),
            self.v_proj(x).unflatten(-1, values),  # [1, T, H, V]
            g=g.unflatten(-1, keys),
            scale=self.d_head_k**-0.5,
            cu_seqlens=context.packing.boundaries,
            backend=self.chosen_backend(x.device),
        )
        gate = self.g_proj(x).unflatten(-1, values)
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2))
