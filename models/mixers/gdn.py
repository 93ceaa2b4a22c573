"""Gated DeltaNet: short convolutions, L2-normalised keys, a decaying delta-rule state, gated RMSNorm output."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopline.kernels.gated_delta.op import BACKENDS, gated_delta
from loopline.kernels.precision import wide
from loopline.kernels.short_conv.op import short_conv
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.fills import Fill, inverse_softplus_step, log_uniform_rate
from loopline.models.layers import Linear, RMSNorm
from loopline.models.mixers.mixer import Mixer


class GatedDelta(Mixer):
    """Per head, S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and o_t = S_t^T q_t / sqrt(K), with
    g = -exp(A_log) softplus(W_a x + dt_bias), beta = sigmoid(W_b x), and q, k, v = silu(conv(W x)), q and k of unit
    length. The output is RMSNorm(o) * silu(W_g x), projected back. State starts from zero in every document and loop.

    `A_log` and `dt_bias` are fp32 and used in fp32: in bf16 a small decay rounds to none.
    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464.
    """

    name = "gdn"
    op = "gated_delta"
    backends = BACKENDS
    fills: ClassVar[dict[str, Fill]] = {"A_log": log_uniform_rate(1e-4, 16.0), "dt_bias": inverse_softplus_step}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, gdn = config.d_model, config.gdn
        d_keys, d_values = gdn.n_heads * gdn.d_head_k, gdn.n_heads * gdn.d_head_v
        self.d_head_k, self.d_head_v = gdn.d_head_k, gdn.d_head_v
        self.beta_max = 2.0 if gdn.allow_negative_eigenvalues else 1.0
        self.backend = gdn.backend
        self.q_proj = Linear(d, d_keys)
        self.k_proj = Linear(d, d_keys)
        self.v_proj = Linear(d, d_values)
        self.a_proj = Linear(d, gdn.n_heads)
        self.b_proj = Linear(d, gdn.n_heads)
        self.g_proj = Linear(d, d_values)
        self.q_conv = nn.Parameter(torch.empty(d_keys, gdn.conv_size))
        self.k_conv = nn.Parameter(torch.empty(d_keys, gdn.conv_size))
        self.v_conv = nn.Parameter(torch.empty(d_values, gdn.conv_size))
        self.A_log = nn.Parameter(torch.empty(gdn.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(gdn.n_heads))
        self.o_norm = RMSNorm(gdn.d_head_v, config.norm_eps)
        self.o_proj = Linear(d_values, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        packing = context.packing
        pos = packing.positions
        q = short_conv(self.q_proj(x), self.q_conv, pos).unflatten(-1, (-1, self.d_head_k))  # [1, T, H, K]
        k = short_conv(self.k_proj(x), self.k_conv, pos).unflatten(-1, (-1, self.d_head_k))
        v = short_conv(self.v_proj(x), self.v_conv, pos).unflatten(-1, (-1, self.d_head_v))  # [1, T, H, V]
        g = -self.A_log.exp() * F.softplus(wide(self.a_proj(x)) + self.dt_bias)  # [1, T, H], fp32
        beta = wide(self.b_proj(x)).sigmoid() * self.beta_max
        o, _ = gated_delta(
            q,
            k,
            v,
            g=g,
            beta=beta,
            scale=self.d_head_k**-0.5,
            cu_seqlens=packing.cu_seqlens,
            normalize=True,
            backend=self.chosen_backend(x.device),
        )
        gate = self.g_proj(x).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2))
