"""Multi-scale retention: a state with one constant decay a head, rotary positions, gated RMSNorm output."""

import torch
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.precision import wide
from loopline.kernels.simple_gla.op import BACKENDS, simple_gla
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.layers import Linear, RMSNorm
from loopline.models.mixers.mixer import Mixer
from loopline.models.rope import rotate


class Retention(Mixer):
    """Per head h of all, S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t / sqrt(K), q and k turned by
    position. The output is RMSNorm(o) * silu(W_g x), projected back. State starts from zero in every document and loop.

    Reference: Sun et al., RetNet, arXiv:2307.08621, whose group norm is fla's RMSNorm of each head here.
    """

    name = "retnet"
    op = "simple_gla"
    backends = BACKENDS

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, retnet = config.d_model, config.retnet
        self.d_head_k, self.d_head_v = retnet.d_head_k, retnet.d_head_v
        self.rope_theta = retnet.rope_theta
        self.backend = retnet.backend
        self.q_proj = Linear(d, retnet.d_keys)
        self.k_proj = Linear(d, retnet.d_keys)
        self.v_proj = Linear(d, retnet.d_values)
        self.g_proj = Linear(d, retnet.d_values)
        self.o_norm = RMSNorm(retnet.d_head_v, config.norm_eps)
        self.o_proj = Linear(retnet.d_values, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        packing = context.packing
        tables = packing.rotary(self.d_head_k, self.rope_theta)
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.d_head_k)), tables)  # [1, T, H, K]
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.d_head_k)), tables)
        o, _ = simple_gla(
            q,
            k,
            self.v_proj(x).unflatten(-1, (-1, self.d_head_v)),  # [1, T, H, V]
            g=self.log_decay(q),
            scale=self.d_head_k**-0.5,
            cu_seqlens=packing.boundaries,
            backend=self.chosen_backend(x.device),
        )
        gate = self.g_proj(x).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2))

    def log_decay(self, q: Tensor) -> Tensor:
        """[H], log(1 - 2^(-5-h)) of the heads held here. Made anew each time: a buffer is lost when a model is built
        without weights."""
        index, _ = self.share
        n_heads = q.shape[2]
        heads = torch.arange(index * n_heads, (index + 1) * n_heads, device=q.device, dtype=wide(q).dtype)
        return torch.log1p(-torch.exp2(-5 - heads))
