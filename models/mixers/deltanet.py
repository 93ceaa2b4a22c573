"""DeltaNet: short convolutions, L2-normalised keys, a delta-rule state that never decays, normed output."""

import torch
from torch import Tensor, nn

from loopline.kernels.delta_rule.op import BACKENDS, delta_rule
from loopline.kernels.precision import l2_normalize, wide
from loopline.kernels.short_conv.op import short_conv
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.layers import Linear, RMSNorm
from loopline.models.mixers.mixer import Mixer


class DeltaNet(Mixer):
    """Per head, S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and o_t = S_t^T q_t / sqrt(K), with
    beta = sigmoid(W_b x), and q, k, v = silu(conv(W x)), q and k of unit length. The output is RMSNorm(o), projected
    back: no gate. State starts from zero in every document and loop.

    Reference: Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484, section 3.4.
    """

    name = "deltanet"
    op = "delta_rule"
    backends = BACKENDS

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, settings = config.d_model, config.deltanet
        d_keys, d_values = settings.d_keys, settings.d_values
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.beta_max = 2.0 if settings.allow_negative_eigenvalues else 1.0
        self.backend = settings.backend
        self.q_proj = Linear(d, d_keys)
        self.k_proj = Linear(d, d_keys)
        self.v_proj = Linear(d, d_values)
        self.b_proj = Linear(d, settings.n_heads)
        self.q_conv = nn.Parameter(torch.empty(d_keys, settings.conv_size))
        self.k_conv = nn.Parameter(torch.empty(d_keys, settings.conv_size))
        self.v_conv = nn.Parameter(torch.empty(d_values, settings.conv_size))
        self.o_norm = RMSNorm(settings.d_head_v, config.norm_eps)
        self.o_proj = Linear(d_values, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        packing = context.packing
        pos = packing.positions
        q = short_conv(self.q_proj(x), self.q_conv, pos).unflatten(-1, (-1, self.d_head_k))  # [1, T, H, K]
        k = short_conv(self.k_proj(x), self.k_conv, pos).unflatten(-1, (-1, self.d_head_k))
        v = short_conv(self.v_proj(x), self.v_conv, pos).unflatten(-1, (-1, self.d_head_v))  # [1, T, H, V]
        o, _ = delta_rule(
            l2_normalize(q),
            l2_normalize(k),
            v,
            beta=wide(self.b_proj(x)).sigmoid() * self.beta_max,  # [1, T, H], fp32
            scale=self.d_head_k**-0.5,
            cu_seqlens=packing.boundaries,
            backend=self.chosen_backend(x.device, x.dtype),  # fla has no fp32 kernel
        )
        return self.o_proj(self.o_norm(o).flatten(2))
