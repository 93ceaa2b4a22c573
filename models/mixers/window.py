"""Sliding-window attention."""

from torch import Tensor

from loopline.kernels.attention.op import packed_attention
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.mixers.full import FullAttention


class WindowAttention(FullAttention):
    """Full attention over the last `window` keys, the query's own included. N such blocks looped R times see
    N * R * (window - 1) + 1 tokens. Beltagy et al., Longformer, arXiv:2004.05150."""

    name = "window"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.window = config.window.window

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: BlockContext) -> Tensor:
        """[1, T, H, D]."""
        backend = self.chosen_backend(x.device)
        return packed_attention(q, k, v, context.packing.cu_seqlens, window=self.window, backend=backend)
