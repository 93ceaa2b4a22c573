"""One stored block: a token mixer and a feed-forward, each a residual branch behind a norm."""

from torch import Tensor, nn

from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.ffn import SwiGLU
from loopline.models.layers import RMSNorm
from loopline.models.mixers.registry import build_mixer


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)). Sandwich blocks also norm each branch's output before the sum, as
    Ouro does (arXiv:2510.25741)."""

    def __init__(self, config: ModelConfig, mixer_name: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = build_mixer(mixer_name, config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ffn)
        is_sandwich = config.norm == "sandwich"
        self.mixer_out_norm = RMSNorm(config.d_model, config.norm_eps) if is_sandwich else nn.Identity()
        self.ffn_out_norm = RMSNorm(config.d_model, config.norm_eps) if is_sandwich else nn.Identity()

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]."""
        x = x + self.mixer_out_norm(self.mixer(self.mixer_norm(x), context))
        return x + self.ffn_out_norm(self.ffn(self.ffn_norm(x)))
