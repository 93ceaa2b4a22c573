"""DeepSeek sparse attention over grouped queries."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from loopline.kernels.dsa.op import select, sparse_attention
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, settings_of
from loopline.models.hf.modules.full import LooplineAttention
from loopline.models.hf.modules.rows import each_row
from loopline.models.rope import rotate


class LooplineLayerNorm(nn.LayerNorm):
    """LayerNorm with statistics in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] in x.dtype."""
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps).to(x.dtype)


class LooplineSparseAttention(LooplineAttention):
    """Attention to the `top_k` keys with the highest index score I_ts = sum_j w_tj relu(q^I_tj . k^I_s), chosen once
    for all heads; loops not in `selection_loops` reuse the last choice. Until the indexer is trained (index_loss
    "dense") attention sees every key.

    Reference: DeepSeek-V3.2, arXiv:2512.02556, section 2.1.
    """

    name = "dsa"

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        settings = self.settings = settings_of(config, self.name)
        d, d_index = config.hidden_size, settings.index_d_head
        self.index_q_proj = nn.Linear(d, settings.index_n_heads * d_index, bias=False)
        self.index_k_proj = nn.Linear(d, d_index, bias=False)
        self.index_w_proj = nn.Linear(d, settings.index_n_heads, bias=False)
        self.index_k_norm = LooplineLayerNorm(d_index, config.rms_norm_eps)

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, slot: int, call: Call, cache: Cache | None
    ) -> tuple[Tensor, None]:
        """[B, T, H, D] from q [B, H, T, D] and the cached and new k, v [B, G, S, D]."""
        selections = None
        if self.settings.index_loss != "dense":
            selections = self.selections(x, slot, call, cache)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))

        def row(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            selection = None if selections is None else selections[i]
            return sparse_attention(q, k, v, selection, cu_seqlens=[0, k.shape[1]])

        return each_row(row, call, queries=[q], keys=[k, v]), None

    def selections(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> dict[int, Tensor]:
        """The choice of each row: this loop's own, or that of the last loop that chose."""
        loop_idx, block_idx = divmod(slot, call.n_blocks)
        memory: dict[Any, Any] = call.memory.setdefault(block_idx, {})
        loops = self.settings.selection_loops
        chosen_in = loop_idx if loops is None else max(r for r in loops if r <= loop_idx)
        if chosen_in == loop_idx:
            memory[loop_idx] = self.choose(x, slot, call, cache)
        return memory[chosen_in]

    def choose(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> dict[int, Tensor]:
        """[T, top_k] by row, positions among the row's own tokens; none for a row that is all padding."""
        n_rope = self.settings.index_d_rope
        q = self.index_q_proj(x).unflatten(-1, (-1, self.settings.index_d_head))  # [B, T, HI, DI]
        k = self.index_k_norm(self.index_k_proj(x))[:, :, None]
        if n_rope:
            tables = call.rotary(n_rope, self.rope_theta)
            q, k = (torch.cat([rotate(y[..., :n_rope], tables), y[..., n_rope:]], dim=-1) for y in (q, k))
        k = k[:, :, 0]  # [B, T, DI]
        if cache is not None:
            k = cache.layers[slot].update_indexer(k)  # type: ignore[union-attr]
        scale = (self.settings.index_n_heads * self.settings.index_d_head) ** -0.5
        weights = wide(self.index_w_proj(x)) * scale
        chosen: dict[int, Tensor] = {}

        def row(i: int, q: Tensor, w: Tensor, k: Tensor) -> Tensor:
            chosen[i] = select(q, k, w, top_k=self.settings.top_k, cu_seqlens=[0, k.shape[1]])
            return q

        each_row(row, call, queries=[q, weights], keys=[k])
        return chosen
