"""SwiGLU feed-forward. Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202."""

from torch import Tensor, nn
from torch.nn import functional as F

from loopline.models.layers import Linear


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ffn)
        self.up_proj = Linear(d_model, d_ffn)
        self.down_proj = Linear(d_ffn, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, C] -> [1, T, C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
