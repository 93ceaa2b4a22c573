"""Kimi Delta Attention: Gated DeltaNet with a decay for every key channel, and low-rank projections for the gates."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopline.kernels.kda.op import BACKENDS, kda
from loopline.kernels.precision import l2_normalize, wide
from loopline.kernels.short_conv.op import short_conv
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.fills import Fill, inverse_softplus_step, log_uniform_rate
from loopline.models.layers import Linear, RMSNorm
from loopline.models.mixers.mixer import Mixer


class KimiDelta(Mixer):
    """Per head, S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T and o_t = S_t^T q_t / sqrt(K),
    with g = -exp(A_log) softplus(W_fb W_fa x + dt_bias), one decay a key channel, beta = sigmoid(W_b x), and q, k, v =
    silu(conv(W x)), q and k of unit length. The output is RMSNorm(o) * sigmoid(W_gb W_ga x), projected back. State
    starts from zero in every document and loop.

    `A_log` and `dt_bias` are fp32 and used in fp32: in bf16 a small decay rounds to none.
    Reference: Kimi Team, Kimi Linear, arXiv:2510.26692, section 3.
    """

    name = "kda"
    op = "kda"
    backends = BACKENDS
    fills: ClassVar[dict[str, Fill]] = {"A_log": log_uniform_rate(1.0, 16.0), "dt_bias": inverse_softplus_step}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, settings = config.d_model, config.kda
        n_heads, d_keys, d_values = settings.n_heads, settings.d_keys, settings.d_values
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.beta_max = 2.0 if settings.allow_negative_eigenvalues else 1.0
        self.backend = settings.backend
        self.q_proj = Linear(d, d_keys)
        self.k_proj = Linear(d, d_keys)
        self.v_proj = Linear(d, d_values)
        self.f_a_proj = Linear(d, settings.rank)
        self.f_b_proj = Linear(settings.rank, d_keys)
        self.b_proj = Linear(d, n_heads)
        self.g_a_proj = Linear(d, settings.rank)
        # No bias, as in Kimi Linear's own model; fla's layer has one here.
        self.g_b_proj = Linear(settings.rank, d_values)
        self.q_conv = nn.Parameter(torch.empty(d_keys, settings.conv_size))
        self.k_conv = nn.Parameter(torch.empty(d_keys, settings.conv_size))
        self.v_conv = nn.Parameter(torch.empty(d_values, settings.conv_size))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(d_keys))
        self.o_norm = RMSNorm(settings.d_head_v, config.norm_eps)
        self.o_proj = Linear(d_values, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        packing = context.packing
        pos = packing.positions
        q = short_conv(self.q_proj(x), self.q_conv, pos).unflatten(-1, (-1, self.d_head_k))  # [1, T, H, K]
        k = short_conv(self.k_proj(x), self.k_conv, pos).unflatten(-1, (-1, self.d_head_k))
        v = short_conv(self.v_proj(x), self.v_conv, pos).unflatten(-1, (-1, self.d_head_v))  # [1, T, H, V]
        step = F.softplus(wide(self.f_b_proj(self.f_a_proj(x))) + self.dt_bias).unflatten(-1, (-1, self.d_head_k))
        g = -self.A_log.exp()[:, None] * step  # [1, T, H, K], fp32
        beta = wide(self.b_proj(x)).sigmoid() * self.beta_max  # [1, T, H], fp32
        o, _ = kda(
            l2_normalize(q),
            l2_normalize(k),
            v,
            g=g,
            beta=beta,
            scale=self.d_head_k**-0.5,
            cu_seqlens=packing.boundaries,
            backend=self.chosen_backend(x.device),
        )
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * gate.sigmoid()).flatten(2))
