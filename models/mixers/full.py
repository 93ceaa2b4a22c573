"""Full causal attention: grouped queries, rotary positions, optional sigmoid gate on the output."""

from typing import ClassVar

from torch import Tensor

from loopline.kernels.attention.op import BACKENDS, packed_attention
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.fills import Fill, zeros
from loopline.models.layers import Linear
from loopline.models.mixers.mixer import Mixer
from loopline.models.packing import Packing
from loopline.models.rope import rotate
from loopline.models.settings.full import FullAttentionConfig


class FullAttention(Mixer):
    """softmax(q k^T / sqrt(D)) v per head, inside each document.

    The output gate is G1 of Qiu et al., arXiv:2505.06708: sigmoid(W_gate x) per channel, before the output projection,
    on the same normed input. Mixers that attend to fewer keys are subclasses: they change `attend`.
    """

    name = "full"
    op = "attention"
    backends: ClassVar[tuple[str, ...]] = BACKENDS  # subclasses have others
    fills: ClassVar[dict[str, Fill]] = {"gate_proj.weight": zeros}  # every gate opens at 1/2

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings: FullAttentionConfig = getattr(config, self.name)
        d, d_head = config.d_model, settings.head_size(config.d_model)
        d_queries, d_keys = settings.n_heads * d_head, settings.kv_heads * d_head
        self.d_head = d_head
        self.rope_theta = settings.rope_theta
        self.backend = settings.backend
        self.q_proj = Linear(d, d_queries)
        self.k_proj = Linear(d, d_keys)
        self.v_proj = Linear(d, d_keys)
        self.gate_proj = Linear(d, d_queries) if settings.output_gate else None
        self.o_proj = Linear(d_queries, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        q, k, v = self.project(x, context.packing)
        o = self.attend(x, q, k, v, context).flatten(2)  # [1, T, H * D]
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.o_proj(o)

    def project(self, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
        """q [1, T, H, D], k and v [1, T, G, D]; q and k turned by position."""
        heads = (-1, self.d_head)
        tables = packing.rotary(self.d_head, self.rope_theta)
        q = rotate(self.q_proj(x).unflatten(-1, heads), tables)
        k = rotate(self.k_proj(x).unflatten(-1, heads), tables)
        return q, k, self.v_proj(x).unflatten(-1, heads)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        """[1, T, H, D]. `x` is the mixer's input, for what depends on it beside q, k and v."""
        backend = self.chosen_backend(x.device)
        return packed_attention(q, k, v, context.packing.cu_seqlens, backend=backend)
