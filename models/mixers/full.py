"""Full causal attention: grouped queries, rotary positions, optional sigmoid gate on the output."""

from torch import Tensor, nn

from loopline.kernels.attention.op import packed_attention
from loopline.models.config import ModelConfig
from loopline.models.layers import Linear
from loopline.models.packing import Packing
from loopline.models.rope import rotate


class FullAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v per head, inside each document.

    The output gate is G1 of Qiu et al., arXiv:2505.06708: sigmoid(W_gate x) per channel, before the output projection,
    on the same normed input.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, d_head = config.d_model, config.d_head
        self.d_head = d_head
        self.rope_theta = config.full.rope_theta
        self.q_proj = Linear(d, config.full.n_heads * d_head)
        self.k_proj = Linear(d, config.n_kv_heads * d_head)
        self.v_proj = Linear(d, config.n_kv_heads * d_head)
        self.gate_proj = Linear(d, config.full.n_heads * d_head) if config.full.output_gate else None
        self.o_proj = Linear(config.full.n_heads * d_head, d)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        heads = (-1, self.d_head)
        q = self.q_proj(x).unflatten(-1, heads)  # [1, T, H, D]
        k = self.k_proj(x).unflatten(-1, heads)  # [1, T, G, D]
        v = self.v_proj(x).unflatten(-1, heads)
        tables = packing.rotary(self.d_head, self.rope_theta)
        o = packed_attention(rotate(q, tables), rotate(k, tables), v, packing.cu_seqlens).flatten(2)
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.o_proj(o)
