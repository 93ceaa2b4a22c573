"""Full causal attention."""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, settings_of
from loopline.models.rope import rotate


def eager_attention_forward(
    module: "LooplineAttention", q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v, written out: q [B, H, T, D], k and v [B, G, S, D] -> [B, T, H, D], weights."""
    k = k.repeat_interleave(module.num_key_value_groups, dim=1)
    v = v.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = q @ k.mT * scaling
    weights = wide(scores if mask is None else scores + mask).softmax(dim=-1).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class LooplineAttention(nn.Module):
    """Causal softmax attention: grouped queries, rotary positions, optional sigmoid gate on the output.

    Mixers that attend to fewer keys are subclasses: they change `attend`.
    """

    name = "full"
    layer_type = "full_attention"

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        settings, d = settings_of(config, self.name), config.hidden_size
        n_heads, n_kv_heads = settings.n_heads, settings.n_kv_heads or settings.n_heads
        d_head = settings.d_head or d // n_heads
        self.config = config
        self.d_head = d_head
        self.rope_theta = settings.rope_theta
        self.scaling = d_head**-0.5
        self.is_causal = True
        self.num_key_value_groups = n_heads // n_kv_heads
        self.q_proj = nn.Linear(d, n_heads * d_head, bias=False)
        self.k_proj = nn.Linear(d, n_kv_heads * d_head, bias=False)
        self.v_proj = nn.Linear(d, n_kv_heads * d_head, bias=False)
        self.gate_proj = nn.Linear(d, n_heads * d_head, bias=False) if settings.output_gate else None
        self.o_proj = nn.Linear(n_heads * d_head, d, bias=False)

    def init_parameters(self) -> None:
        """What is not a matrix at random: gates start closed to 1/2."""
        if self.gate_proj is not None:
            init.zeros_(self.gate_proj.weight)

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> [B, T, C], and the attention weights where the implementation gives them."""
        heads = (-1, self.d_head)
        rotary = call.rotary(self.d_head, self.rope_theta)
        q = rotate(self.q_proj(x).unflatten(-1, heads), rotary).transpose(1, 2)  # [B, H, T, D]
        k = rotate(self.k_proj(x).unflatten(-1, heads), rotary).transpose(1, 2)  # [B, G, T, D]
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, slot)
        o, weights = self.attend(x, q, k, v, slot, call, cache)
        o = o.flatten(2)  # [B, T, H * D]
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.o_proj(o), weights

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, slot: int, call: Call, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, H, D] from q [B, H, T, D] and the cached and new k, v [B, G, S, D], by transformers' functions."""
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mask = call.masks[self.layer_type]
        return attention(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **self.options(call))

    def options(self, call: Call) -> dict[str, object]:
        """Keyword arguments for the attention function."""
        return call.options
