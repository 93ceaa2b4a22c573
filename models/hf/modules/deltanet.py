"""DeltaNet."""

from torch import Tensor
from transformers.cache_utils import Cache

from loopline.kernels.delta_rule.op import BACKENDS, delta_rule
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, settings_of
from loopline.models.hf.modules.delta import DeltaMixer


class LooplineDeltaNet(DeltaMixer):
    """A delta-rule state per head that never decays: beta = sigmoid(W_b x); q, k, v are silu(conv(W x)), q and k of
    unit length; the output is RMSNorm(o), projected back.

    Reference: Yang et al., Parallelizing Linear Transformers with the Delta Rule, arXiv:2406.06484.
    """

    name = "deltanet"
    op_name = "delta_rule"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps, settings_of(config, self.name))

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        inputs = self.project(self.without_padding(x, call), slot, cache)
        o = self.recur(delta_rule, slot, call, cache, scale=self.d_head_k**-0.5, **inputs)
        return self.o_proj(self.o_norm(o).flatten(2)), None
