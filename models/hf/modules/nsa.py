"""Native sparse attention."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from loopline.kernels.backends import check_backend
from loopline.kernels.nsa.blocks import NsaSizes, pool_blocks
from loopline.kernels.nsa.op import BACKENDS, nsa
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, settings_of
from loopline.models.hf.modules.full import LooplineAttention
from loopline.models.hf.modules.rows import each_row


class LooplineNativeSparseAttention(LooplineAttention):
    """Compressed blocks, selected blocks and a window, three attentions under gates sigmoid(W_g x). All keys and values
    are kept; blocks are pooled anew in every pass.

    Reference: Yuan et al., Native Sparse Attention, arXiv:2502.11089.
    """

    name = "nsa"

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        settings = settings_of(config, self.name)
        self.sizes = NsaSizes(settings.block_size, settings.n_selected, settings.window)
        self.backend = settings.backend
        self.g_proj = nn.Linear(config.hidden_size, 3 * settings.n_heads, bias=False)  # [H, 3]
        shape = (self.k_proj.out_features, settings.block_size)  # [G * D, B]
        is_learned = settings.pooling == "learned"
        self.k_pool = nn.Parameter(torch.empty(shape)) if is_learned else None
        self.v_pool = nn.Parameter(torch.empty(shape)) if is_learned else None

    def init_parameters(self) -> None:
        """A learned pooling starts as the mean."""
        super().init_parameters()
        for weights in (self.k_pool, self.v_pool):
            if weights is not None:
                init.constant_(weights, 1 / weights.shape[1])

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, slot: int, call: Call, cache: Cache | None
    ) -> tuple[Tensor, None]:
        """[B, T, H, D] from q [B, H, T, D] and the cached and new k, v [B, G, S, D]. Blocks are counted from a row's
        first token, so every row goes alone."""
        gates = wide(self.g_proj(x)).sigmoid().unflatten(-1, (-1, 3))  # [B, T, H, 3]
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        backend = check_backend("nsa", BACKENDS, self.backend, x.device.type)

        def row(i: int, q: Tensor, gates: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nsa(
                q,
                k,
                v,
                gates=gates,
                sizes=self.sizes,
                cu_seqlens=[0, k.shape[1]],
                pooled=(self.pool(k, self.k_pool), self.pool(v, self.v_pool)),
                backend=backend,
            )

        return each_row(row, call, queries=[q, gates], keys=[k, v]), None

    def pool(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """The complete blocks of [1, S, G, D] as one row each: [1, NB, G, D]."""
        if weights is not None:
            weights = weights.unflatten(0, (-1, self.d_head))  # [G, D, B]
        return pool_blocks(x, cu_seqlens=[0, x.shape[1]], block_size=self.sizes.block_size, weights=weights)
