"""DeepSeek sparse attention over grouped queries."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from loopline.kernels.dsa.op import select, sparse_attention
from loopline.kernels.dsa.tile_op import tile_lists
from loopline.kernels.dsa.visible import tile_selection
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
    for all heads; loops not in `selection_loops` reuse the last choice. With `selection_tile` neighbouring queries
    share a choice, made when the first of them is read; index queries and head weights are then cached beside index
    keys, so that any part of a row may come next. Until the indexer is trained (index_loss "dense") attention sees
    every key.

    Reference: DeepSeek-V3.2, arXiv:2512.02556, section 2.1.
    """

    name = "dsa"

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        settings = self.settings = settings_of(config, self.name)
        self.tile = getattr(settings, "selection_tile", None)  # older exports do not say
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
        """[T, K] by row, positions among the row's own tokens; none for a row that is all padding."""
        n_rope = self.settings.index_d_rope
        q = self.index_q_proj(x).unflatten(-1, (-1, self.settings.index_d_head))  # [B, T, HI, DI]
        k = self.index_k_norm(self.index_k_proj(x))[:, :, None]
        if n_rope:
            tables = call.rotary(n_rope, self.rope_theta)
            q, k = (torch.cat([rotate(y[..., :n_rope], tables), y[..., n_rope:]], dim=-1) for y in (q, k))
        k, w = k[:, :, 0], self.index_w_proj(x)  # [B, T, DI], [B, T, HI]
        if self.tile is not None:
            k = torch.cat([k, w, q.flatten(2)], dim=-1)
        if cache is not None:
            k = cache.layers[slot].update_indexer(k)  # type: ignore[union-attr]
        choose = self.choose_by_query if self.tile is None else self.choose_by_tile
        chosen: dict[int, Tensor] = {}

        def row(i: int, q: Tensor, w: Tensor, cached: Tensor) -> Tensor:
            chosen[i] = choose(q, w, cached)
            return q

        each_row(row, call, queries=[q, w], keys=[k])
        return chosen

    def choose_by_query(self, q: Tensor, w: Tensor, k: Tensor) -> Tensor:
        """[t, top_k] for a row's t new tokens, from their index queries and head weights, and the keys of all."""
        return select(q, k, self.scaled(w), top_k=self.settings.top_k, cu_seqlens=[0, k.shape[1]])

    def choose_by_tile(self, q: Tensor, w: Tensor, cached: Tensor) -> Tensor:
        """[t, top_k + selection_tile] for a row's t new tokens, from keys, head weights and queries of all."""
        n_new, (n_heads, d) = q.shape[1], q.shape[2:]
        k, w, q = cached.split([d, n_heads, n_heads * d], dim=-1)
        row = {"tile": self.tile, "cu_seqlens": [0, k.shape[1]], "first_token": k.shape[1] - n_new}
        q, w = q.unflatten(-1, (n_heads, d)), self.scaled(w)
        lists = tile_lists(q, k, w, top_k=self.settings.top_k, scored_by="past", **row)
        return tile_selection(lists, **row)

    def scaled(self, w: Tensor) -> Tensor:
        """Head weights with a power of the sizes that keeps scores of order one."""
        return wide(w) * (self.settings.index_n_heads * self.settings.index_d_head) ** -0.5
