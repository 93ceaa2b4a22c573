"""Native sparse attention: compressed blocks, selected blocks and a window, mixed by learned gates."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from loopline.kernels.nsa.blocks import NsaSizes, pool_blocks
from loopline.kernels.nsa.op import BACKENDS, nsa
from loopline.kernels.precision import wide
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.fills import Fill, mean_pool
from loopline.models.layers import Linear
from loopline.models.mixers.full import FullAttention


class NativeSparseAttention(FullAttention):
    """o = g_cmp o_cmp + g_sel o_sel + g_win o_win, three attentions of one query under gates sigmoid(W_g x), a gate for
    each branch and head. Rotary positions are in q and k before blocks are pooled or chosen.

    The paper compresses a block by an MLP that knows positions inside it; here a block is its mean, or a weighted sum
    with learned weights for each channel and place (`k_pool` and `v_pool`), which starts as the mean.
    Reference: Yuan et al., Native Sparse Attention, arXiv:2502.11089.
    """

    name = "nsa"
    op = "nsa"
    backends = BACKENDS
    fills: ClassVar[dict[str, Fill]] = {**FullAttention.fills, "k_pool": mean_pool, "v_pool": mean_pool}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        settings = config.nsa
        self.sizes = NsaSizes(settings.block_size, settings.n_selected, settings.window)
        self.g_proj = Linear(config.d_model, 3 * settings.n_heads)  # [H, 3]: a cut keeps heads whole
        shape = (self.k_proj.out_features, settings.block_size)  # [G * D, B]
        is_learned = settings.pooling == "learned"
        self.k_pool = nn.Parameter(torch.empty(shape)) if is_learned else None
        self.v_pool = nn.Parameter(torch.empty(shape)) if is_learned else None

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        """[1, T, H, D]."""
        cu_seqlens = context.packing.boundaries
        return nsa(
            q,
            k,
            v,
            gates=wide(self.g_proj(x)).sigmoid().unflatten(-1, (-1, 3)),  # [1, T, H, 3]
            sizes=self.sizes,
            cu_seqlens=cu_seqlens,
            pooled=(self.pool(k, self.k_pool, cu_seqlens), self.pool(v, self.v_pool, cu_seqlens)),
            backend=self.chosen_backend(x.device),
        )

    def pool(self, x: Tensor, weights: Tensor | None, cu_seqlens: list[int]) -> Tensor:
        """The complete blocks of [1, T, G, D] as one row each: [1, NB, G, D]."""
        if weights is not None:
            weights = weights.unflatten(0, (-1, self.d_head))  # [G, D, B]
        return pool_blocks(x, cu_seqlens=cu_seqlens, block_size=self.sizes.block_size, weights=weights)
