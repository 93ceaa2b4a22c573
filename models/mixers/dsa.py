"""DeepSeek sparse attention over grouped queries: an indexer picks the keys each query attends to."""

import torch
from torch import Tensor

from loopline.kernels.dsa.op import (
    BACKENDS,
    IndexerLoss,
    attention_recall,
    indexer_loss,
    select,
    selection_overlap,
    sparse_attention_with_lse,
)
from loopline.kernels.dsa.tile_op import select_by_tile
from loopline.kernels.dsa.visible import Selection
from loopline.kernels.precision import wide
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.layers import LayerNorm, Linear
from loopline.models.mixers.full import FullAttention
from loopline.models.rope import rotate

Index = tuple[Tensor, Tensor, Tensor]  # queries [1, T, HI, DI], keys [1, T, DI], head weights [1, T, HI]


class SparseAttention(FullAttention):
    """softmax(q k^T / sqrt(D)) v over the `top_k` keys s <= t with the highest index score

        I_ts = sum_j w_tj relu(q^I_tj . k^I_s),

    chosen once for all heads. The indexer reads the mixer's input detached and learns from the KL divergence to the
    attention it served, summed over heads; the language-model loss trains the rest and nothing goes through the
    choice. While `index_loss` is "dense" attention sees every key: warm-up.

    With `selection_tile` neighbouring queries share a choice, made by the queries up to the first of them, and see each
    other besides (kernels/dsa/GATHER.md).

    A choice may serve later loops too (`selection_loops`). Its target is then the mean attention of the loops served:
    the divergence is linear in its target as far as gradients go, so each loop adds its share of the gradient in its
    own forward pass, and the choosing loop hands the sum to the indexer in backward, which comes after all of them.

    Under tensor parallelism the indexer is whole on every rank, and the target is summed over ranks, or with "triton"
    the gradient.
    Reference: DeepSeek-V3.2, arXiv:2512.02556, section 2.1; sharing over layers: IndexCache, arXiv:2603.12201.
    """

    name = "dsa"
    op = "dsa"
    backends = BACKENDS
    figures = ("indexer_loss", "selection_overlap")
    measured = ("indexer_recall",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.settings = config.dsa
        n_heads, d_head = config.dsa.index_n_heads, config.dsa.index_d_head
        self.index_q_proj = Linear(config.d_model, n_heads * d_head)
        self.index_k_proj = Linear(config.d_model, d_head)
        self.index_w_proj = Linear(config.d_model, n_heads)
        self.index_k_norm = LayerNorm(d_head, config.norm_eps)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        """[1, T, H, D]."""
        loop_idx, cu_seqlens = context.loop_idx, context.packing.cu_seqlens
        chosen_in = self.settings.selecting_loop(loop_idx)
        if chosen_in == loop_idx:
            served = self.choose(self.index(x.detach(), context), context)
        else:
            served = context.memory[chosen_in]
        visible = None if self.settings.index_loss == "dense" else served.selection
        o, lse = sparse_attention_with_lse(
            q, k, v, visible, cu_seqlens=cu_seqlens, backend=self.chosen_backend(x.device)
        )
        self.learn(q.detach(), k.detach(), visible, served, context, lse=lse)
        if context.row.is_measured:
            recall = attention_recall(q, k, served.selection, cu_seqlens=cu_seqlens, sum_heads=self.sum_over_ranks)
            context.record("indexer_recall", *recall)
        return o

    def index(self, x: Tensor, context: BlockContext) -> Index:
        """What scores are made of. A power of the sizes in the head weights keeps scores of order one."""
        n_rope, theta = self.settings.index_d_rope, self.rope_theta
        q = self.index_q_proj(x).unflatten(-1, (-1, self.settings.index_d_head))  # [1, T, HI, DI]
        k = self.index_k_norm(self.index_k_proj(x))  # [1, T, DI]
        if n_rope:
            cos, sin = context.packing.rotary(n_rope, theta)
            q = torch.cat([rotate(q[..., :n_rope], (cos, sin)), q[..., n_rope:]], dim=-1)
            # Not a view of keys with an axis of heads: a compiled graph gives that back wrong (docs/log.md).
            k = torch.cat([rotate(k[..., :n_rope], (cos[:, :, 0], sin[:, :, 0])), k[..., n_rope:]], dim=-1)
        scale = (self.settings.index_n_heads * self.settings.index_d_head) ** -0.5
        return q, k, wide(self.index_w_proj(x)) * scale

    def choose(self, index: Index, context: BlockContext) -> "_Served":
        """This loop's choice, left for the loops it serves. In a recomputed pass it is there already."""
        if context.loop_idx in context.memory:
            return context.memory[context.loop_idx]
        q, k, w = index
        top_k, tile, backend = self.settings.top_k, self.settings.selection_tile, self.chosen_backend(q.device)
        selection: Selection
        if tile is None:
            selection = select(q, k, w, top_k=top_k, cu_seqlens=context.packing.cu_seqlens, backend=backend)
        else:
            bounds = context.packing.boundaries
            selection = select_by_tile(q, k, w, top_k=top_k, tile=tile, cu_seqlens=bounds, backend=backend)
        # Detached: with its graph it would reach the recomputation's hooks, and they this memory, in a circle.
        served = _Served((q.detach(), k.detach(), w.detach()), selection)
        earlier = [served for served in context.memory.values() if served.selection is not None]
        if earlier:
            total, count = selection_overlap(earlier[-1].selection, selection)
            context.record("selection_overlap", total, count)
        context.defer(index, served)
        return served

    def learn(
        self,
        q: Tensor,
        k: Tensor,
        visible: Selection | None,
        served: "_Served",
        context: BlockContext,
        *,
        lse: Tensor | None,
    ) -> None:
        """This loop's share of the indexer's gradient, computed without a graph. `lse`: of attention, as it gave it."""
        scale = context.row.auxiliary_scale
        if scale is None or not torch.is_grad_enabled() or context.loop_idx in served.found:
            return
        q_index, k_index, weights = served.index
        loss = indexer_loss(
            q,
            k,
            visible,
            q_index=q_index,
            k_index=k_index,
            weights=weights,
            cu_seqlens=context.packing.cu_seqlens,
            sum_heads=self.sum_over_ranks if self.share[1] > 1 else None,
            row_stride=self.settings.index_loss_rows,
            row_offset=(context.row.draw + context.block_idx + context.loop_idx) % self.settings.index_loss_rows,
            backend=self.chosen_backend(q.device),
            lse=lse,
        )
        chosen_in = self.settings.selecting_loop(context.loop_idx)
        share = scale * self.settings.index_loss_weight / self.settings.loops_served(chosen_in, context.row.n_loops)
        served.found[context.loop_idx] = IndexerLoss(loss.loss_sum, *(share * g for g in loss[1:]))
        context.record("indexer_loss", loss.loss_sum, q.shape[1])


class _Served:
    """A choice and what the loops it serves have found: kept in the block's memory under the loop that chose."""

    def __init__(self, index: Index, selection: Selection) -> None:
        self.index = index
        self.selection = selection
        self.found: dict[int, IndexerLoss] = {}

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of `index`: the sum of what the loops served have found."""
        if not self.found:
            return None, None, None
        return tuple(torch.stack(parts).sum(0) for parts in list(zip(*self.found.values()))[1:])
