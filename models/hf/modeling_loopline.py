"""A looped language model: a stack of `n_blocks` blocks applied `n_loops` times. Needs torch and transformers only.

Read from the bottom: LooplineForCausalLM, LooplineModel (the loop), LooplineBlock, and the two token mixers it may
hold, softmax attention and Gated DeltaNet. Gated DeltaNet uses flash-linear-attention's kernels on CUDA where that
package is installed, and plain torch otherwise.

Every (loop, block) has its own cache layer: slot = loop_idx * n_blocks + block_idx. Padding must be on the left (on
the right is fine where nothing follows, as in training). Packed rows are refused: a recurrent state cannot see where a
document ends, so give each document its own row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicCache, LinearAttentionLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_loopline import LooplineConfig


class LooplineRMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in fp32."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d] in x.dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LooplineMLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_tables(positions: Tensor, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, T, 1, D], fp32, for positions [B, T]."""
    frequency = theta ** (-torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32) / d_head)
    angle = positions[..., None].float() * frequency  # [B, T, D/2]
    angle = torch.cat([angle, angle], dim=-1)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (x_i, x_{i+D/2}) of [B, T, H, D] by the angles of `tables`, in fp32; result in x.dtype."""
    cos, sin = tables
    x1, x2 = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-x2, x1], dim=-1) * sin).to(x.dtype)


def eager_attention_forward(
    module: "LooplineAttention", q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v, written out: q [B, H, T, D], k and v [B, G, S, D] -> [B, T, H, D], weights."""
    k = k.repeat_interleave(module.num_key_value_groups, dim=1)
    v = v.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = q @ k.mT * scaling
    weights = (scores if mask is None else scores + mask).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class LooplineAttention(nn.Module):
    """Causal softmax attention: grouped queries, rotary positions, optional sigmoid gate on the output."""

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        n_heads, d_head = config.num_attention_heads, head_dim(config)
        n_kv_heads = config.num_key_value_heads or n_heads
        self.config = config
        self.d_head = d_head
        self.scaling = d_head**-0.5
        self.is_causal = True
        self.num_key_value_groups = n_heads // n_kv_heads
        self.q_proj = nn.Linear(config.hidden_size, n_heads * d_head, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, n_kv_heads * d_head, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, n_kv_heads * d_head, bias=False)
        self.gate_proj = (
            nn.Linear(config.hidden_size, n_heads * d_head, bias=False) if config.attn_output_gate else None
        )
        self.o_proj = nn.Linear(n_heads * d_head, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        slot: int,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: Cache | None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> [B, T, C], and the attention weights where the implementation gives them."""
        heads = (-1, self.d_head)
        q = rotate(self.q_proj(x).unflatten(-1, heads), rotary).transpose(1, 2)  # [B, H, T, D]
        k = rotate(self.k_proj(x).unflatten(-1, heads), rotary).transpose(1, 2)  # [B, G, T, D]
        v = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, slot)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        o, weights = attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        o = o.flatten(2)  # [B, T, H * D]
        if self.gate_proj is not None:
            o = o * self.gate_proj(x).sigmoid()
        return self.o_proj(o), weights


@functools.cache
def fla_ops() -> tuple[Callable, Callable] | None:
    """fla's chunked and one-token gated delta rule, or None where fla is absent. Importing it takes seconds."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    except ImportError:
        return None
    return chunk_gated_delta_rule, fused_recurrent_gated_delta_rule


def recurrent_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: S <- exp(g) (I - beta k k^T) S + beta k v^T,  o = scale * S^T q.

    Args:
        q, k: [B, 1, H, K]; v: [B, 1, H, V]; g, beta: [B, 1, H].
        state: [B, H, K, V], fp32.
    Returns:
        o: [B, 1, H, V] in v.dtype; the new state, fp32.
    """
    dtype = v.dtype
    q, k, v, g, beta = (x[:, 0].float() for x in (q, k, v, g, beta))
    state = state * g.exp()[..., None, None]
    error = v - torch.einsum("bhk,bhkv->bhv", k, state)
    state = state + torch.einsum("bhk,bhv->bhkv", k, beta[..., None] * error)
    return torch.einsum("bhk,bhkv->bhv", q * scale, state)[:, None].to(dtype), state


def chunked_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Many tokens: the recurrence of `recurrent_gated_delta` in chunks of 64, with G the running sum of g in a chunk:

        A_ij = beta_i exp(G_i - G_j) k_i.k_j  (i > j),   (I + A) U = beta V,   (I + A) W = beta exp(G) K,
        V' = U - W S,   O = exp(G) Q S + tril(exp(G_i - G_j) Q K^T) V',   S <- exp(G_C) S + (exp(G_C - G) K)^T V'.

    Args and results are those of `recurrent_gated_delta` with T for 1; state None means zeros.
    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464, section 3.3.
    """
    dtype, n_tokens, d_k, d_v = v.dtype, q.shape[1], k.shape[-1], v.shape[-1]
    size = min(64, n_tokens)
    n_padding = -n_tokens % size

    def to_chunks(x: Tensor) -> Tensor:
        # Rows of zeros fill the last chunk: k = v = beta = g = 0 leaves the state as it is.
        x = F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, n_padding))
        return x.unflatten(1, (-1, size)).movedim(3, 1)  # [B, H, NT, C, ...]

    q, k, v, g, beta = to_chunks(q) * scale, to_chunks(k), to_chunks(v), to_chunks(g), to_chunks(beta)
    decay = g.cumsum(-1)  # [B, H, NT, C]
    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # Mask before exp: above the diagonal the difference is positive and could overflow, and inf * 0 has no gradient.
    ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    k_beta = k * beta[..., None]
    a = (k_beta @ k.mT * ratio).tril(-1)
    rhs = torch.cat([v * beta[..., None], k_beta * decay.exp()[..., None]], dim=-1)
    u, w = torch.linalg.solve_triangular(a, rhs, upper=False, unitriangular=True).split([d_v, d_k], dim=-1)
    scores = q @ k.mT * ratio
    q = q * decay.exp()[..., None]
    last = decay[..., -1:]  # [B, H, NT, 1]
    k = k * (last - decay).exp()[..., None]
    if state is None:
        state = q.new_zeros(*q.shape[:2], d_k, d_v)
    outputs = []
    for j in range(q.shape[2]):
        v_new = u[:, :, j] - w[:, :, j] @ state
        outputs.append(q[:, :, j] @ state + scores[:, :, j] @ v_new)
        state = state * last[:, :, j, :, None].exp() + k[:, :, j].mT @ v_new
    o = torch.cat(outputs, dim=2)[:, :, :n_tokens]  # [B, H, T, V]
    return o.transpose(1, 2).to(dtype), state


def short_conv(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = silu(sum_j weight[:, W-1-j] * x_{t-j}), j < W: [B, D, T] and [D, W] -> [B, D, T]."""
    width, weight = weight.shape[1], weight.to(x.dtype)
    y = x * weight[:, width - 1, None]
    for back in range(1, width):
        y = y + F.pad(x, (back, 0))[..., : x.shape[-1]] * weight[:, width - 1 - back, None]
    return F.silu(y)


def l2_normalize(x: Tensor) -> Tensor:
    """x / ||x|| over the last dim, in fp32, safe at zero; result in x.dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LooplineGatedDeltaNet(nn.Module):
    """A decaying delta-rule state per head: g = -exp(A_log) softplus(W_a x + dt_bias), beta = sigmoid(W_b x); q, k, v
    are silu(conv(W x)), q and k of unit length; the output is RMSNorm(o) * silu(W_g x), projected back.

    Reference: Yang et al., Gated Delta Networks, arXiv:2412.06464.
    """

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        d, n_heads, width = config.hidden_size, config.linear_num_heads, config.linear_conv_kernel_dim
        self.d_head_k, self.d_head_v = config.linear_key_head_dim, config.linear_value_head_dim
        d_keys, d_values = n_heads * self.d_head_k, n_heads * self.d_head_v
        self.beta_max = 2.0 if config.linear_allow_neg_eigval else 1.0
        self.use_fla = config.linear_backend != "reference"
        self.q_proj = nn.Linear(d, d_keys, bias=False)
        self.k_proj = nn.Linear(d, d_keys, bias=False)
        self.v_proj = nn.Linear(d, d_values, bias=False)
        self.a_proj = nn.Linear(d, n_heads, bias=False)
        self.b_proj = nn.Linear(d, n_heads, bias=False)
        self.g_proj = nn.Linear(d, d_values, bias=False)
        self.q_conv = nn.Parameter(torch.empty(d_keys, width))
        self.k_conv = nn.Parameter(torch.empty(d_keys, width))
        self.v_conv = nn.Parameter(torch.empty(d_values, width))
        # fp32 whatever the model's dtype (see _keep_in_fp32_modules_strict): in bf16 a small decay rounds to none.
        self.A_log = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.o_norm = LooplineRMSNorm(self.d_head_v, config.rms_norm_eps)
        self.o_proj = nn.Linear(d_values, d, bias=False)

    def forward(self, x: Tensor, slot: int, is_token: Tensor | None, cache: Cache | None) -> Tensor:
        """[B, T, C] -> [B, T, C].

        Args:
            slot: cache layer.
            is_token: [B, T], bool, False at padding; None means no padding.
            cache: holds one convolution state, the last W inputs of the three convolutions side by side [B, D, W], and
                one matrix state [B, H, K, V] in fp32.
        """
        if is_token is not None:
            x = x.masked_fill(~is_token[..., None], 0.0)  # no projection has a bias: padding enters no convolution
        n_tokens = x.shape[1]
        state = cache.get_recurrent_state(slot) if cache is not None else None

        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1).mT  # [B, D, T]
        conv = torch.cat([self.q_conv, self.k_conv, self.v_conv])  # [D, W]
        if cache is not None:  # inputs before these tokens come in front
            qkv = cache.update_conv_state(qkv, slot, conv_kernel_size=conv.shape[1])
        qkv = short_conv(qkv, conv)[..., -n_tokens:].mT
        d_keys = self.q_conv.shape[0]
        q, k, v = qkv.split([d_keys, d_keys, self.v_conv.shape[0]], dim=-1)
        q, k = (l2_normalize(y.unflatten(-1, (-1, self.d_head_k))) for y in (q, k))  # [B, T, H, K]
        v = v.unflatten(-1, (-1, self.d_head_v))  # [B, T, H, V]

        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x).float() + self.dt_bias.float())  # [B, T, H], fp32
        beta = self.b_proj(x).float().sigmoid() * self.beta_max
        if is_token is not None:  # no decay and no write at padding
            g, beta = (y.masked_fill(~is_token[..., None], 0.0) for y in (g, beta))

        o, state = self.gated_delta(q, k, v, g=g, beta=beta, state=state)
        if cache is not None:
            cache.update_recurrent_state(state, slot)
        gate = self.g_proj(x).unflatten(-1, (-1, self.d_head_v))
        return self.o_proj((self.o_norm(o) * F.silu(gate)).flatten(2))

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence, in whichever form suits the device and the number of tokens."""
        scale = self.d_head_k**-0.5
        is_decode = q.shape[1] == 1 and state is not None
        ops = fla_ops() if self.use_fla and q.is_cuda else None
        if ops is None:
            op: Callable = recurrent_gated_delta if is_decode else chunked_gated_delta
            return op(q, k, v, g=g, beta=beta, scale=scale, state=state)
        # Keywords only: fla's forms order g and beta differently, and a swap gives NaN without an error.
        return ops[1 if is_decode else 0](
            q=q.contiguous(),
            k=k.contiguous(),
            v=v.contiguous(),
            g=g,
            beta=beta,
            scale=scale,
            initial_state=state,
            output_final_state=True,
        )


class LooplineBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); sandwich blocks also norm each branch's output before the sum."""

    def __init__(self, config: LooplineConfig, block_type: str) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.is_linear = block_type == "linear_attention"
        self.is_sandwich = config.norm_placement == "sandwich"
        self.input_layernorm = LooplineRMSNorm(d, eps)
        if self.is_linear:
            self.linear_attn = LooplineGatedDeltaNet(config)
        else:
            self.self_attn = LooplineAttention(config)
        self.post_attention_layernorm = LooplineRMSNorm(d, eps)
        self.mlp = LooplineMLP(config)
        if self.is_sandwich:
            self.input_layernorm_2 = LooplineRMSNorm(d, eps)
            self.post_attention_layernorm_2 = LooplineRMSNorm(d, eps)

    def forward(
        self,
        x: Tensor,
        slot: int,
        masks: dict[str, Any],
        rotary: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        y = self.input_layernorm(x)
        if self.is_linear:
            y = self.linear_attn(y, slot, masks["linear_attention"], past_key_values)
        else:
            assert rotary is not None
            y, _ = self.self_attn(y, slot, masks["full_attention"], rotary, past_key_values, **kwargs)
        x = x + (self.input_layernorm_2(y) if self.is_sandwich else y)
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (self.post_attention_layernorm_2(y) if self.is_sandwich else y)


class LooplineLoopGate(nn.Module):
    """h_r = M(h_{r-1}) + rho_r * h_{r-1}; past the last trained loop, the last loop's rho is used again."""

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(config.n_loops, config.hidden_size))

    def forward(self, h: Tensor, h_in: Tensor, loop_idx: int) -> Tensor:
        """[B, T, C] twice -> [B, T, C]."""
        return h + self.rho[min(loop_idx, len(self.rho) - 1)].to(h.dtype) * h_in


@dataclass
class LooplineModelOutput(BaseModelOutputWithPast):
    """`loop_states`: what the head would see after each loop, a tuple of [B, T, C], where asked for."""

    loop_states: tuple[Tensor, ...] | None = None


@dataclass
class LooplineCausalLMOutput(CausalLMOutputWithPast):
    """`depth_logits`: logits after each loop, a tuple of [B, T, vocab_size], where asked for."""

    depth_logits: tuple[Tensor, ...] | None = None


class LooplinePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config_class = LooplineConfig
    config: LooplineConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LooplineBlock"]  # noqa: RUF012 (transformers' own form, here and below)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LooplineBlock, "attentions": LooplineAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LooplineLoopGate):
            init.zeros_(module.rho)
        elif isinstance(module, LooplineAttention) and module.gate_proj is not None:
            init.zeros_(module.gate_proj.weight)
        elif isinstance(module, LooplineGatedDeltaNet):
            for conv in (module.q_conv, module.k_conv, module.v_conv):
                init.normal_(conv, mean=0.0, std=conv.shape[1] ** -0.5)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1e-4, 16.0).log())
            dt = torch.empty_like(module.dt_bias).uniform_(-6.9, -2.3).exp()  # log-uniform over [1e-3, 0.1]
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))


class LooplineModel(LooplinePreTrainedModel):
    """Embedding, the looped stack, final norm."""

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        self.block_types = config.block_types
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LooplineBlock(config, block_type) for block_type in self.block_types])
        self.loop_gate = LooplineLoopGate(config) if config.loop_update == "gate" else None
        self.norm = LooplineRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        n_loops: int | None = None,
        output_loop_states: bool = False,
        **kwargs: object,
    ) -> LooplineModelOutput:
        """Hidden states after the last loop, normed.

        Args:
            input_ids: [B, T], or inputs_embeds [B, T, C].
            attention_mask: [B, S], 1 at tokens and 0 at padding, over cached and new tokens together.
            position_ids: [B, T]; by default counted from the attention mask.
            past_key_values: a transformers cache, filled with the same n_loops.
            n_loops: passes over the stack, 1 or more; None means the config's. A call that uses a cache and those that
                follow on it must agree.
            output_loop_states: also return the state after each loop.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        n_loops = self.config.n_loops if n_loops is None else n_loops
        if n_loops < 1:
            raise ValueError(f"n_loops is {n_loops}; it must be 1 or more")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, C]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            self.fit_cache(past_key_values, n_loops)
        self.refuse_packed(attention_mask, position_ids, past_key_values, kwargs)
        masks, rotary = self.masks_and_rotary(h, attention_mask, position_ids, past_key_values)
        if past_key_values is not None and "full_attention" not in self.block_types:
            counter = h.new_zeros(h.shape[0], 1, h.shape[1], 1)  # see LooplineConfig.slot_types
            past_key_values.update(counter, counter, 0)

        loop_states = []
        for loop_idx in range(n_loops):
            h_in = h
            for block_idx, block in enumerate(self.layers):
                slot = loop_idx * len(self.layers) + block_idx
                h = block(h, slot=slot, masks=masks, rotary=rotary, past_key_values=past_key_values, **kwargs)
            if self.loop_gate is not None:
                h = self.loop_gate(h, h_in, loop_idx)
            elif self.config.loop_update == "norm":
                h = self.norm(h)
            if output_loop_states or loop_idx == n_loops - 1:
                # With the "norm" update the loop's state is normed already.
                loop_states.append(h if self.config.loop_update == "norm" else self.norm(h))
        return LooplineModelOutput(
            last_hidden_state=loop_states[-1],
            past_key_values=past_key_values,
            loop_states=tuple(loop_states) if output_loop_states else None,
        )

    def fit_cache(self, cache: Cache, n_loops: int) -> None:
        """Give the cache one layer per (loop, block): an empty DynamicCache is resized, any other must fit.

        Raises:
            ValueError: the cache was filled with another n_loops, or cannot grow.
        """
        depth = n_loops * len(self.layers)
        if not isinstance(cache, DynamicCache):
            if len(cache.layers) < depth:
                raise ValueError(
                    f"{type(cache).__name__} has {len(cache.layers)} layers and n_loops={n_loops} needs {depth}; "
                    "use a DynamicCache, or set config.n_loops before the cache is built"
                )
            return
        n_filled = sum(
            layer.has_previous_state[0] if isinstance(layer, LinearAttentionLayer) else cache.get_seq_length(slot) > 0
            for slot, layer in enumerate(cache.layers)
        )
        if n_filled == 0:
            del cache.layers[depth:]
            for slot_type in self.config.slot_types(n_loops)[len(cache.layers) :]:
                cache.layers.append(DYNAMIC_LAYER_TYPE_MAPPING[slot_type]())
            cache.layer_class_to_replicate = None
        elif n_filled != depth:
            raise ValueError(
                f"this cache holds {n_filled / len(self.layers):g} loops and the call asks for n_loops={n_loops}; "
                "pass the n_loops it was filled with, or a new cache"
            )

    def refuse_packed(
        self,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, object],
    ) -> None:
        """Raises ValueError where a row holds several documents, or a custom 4D mask, and some block is recurrent."""
        if "linear_attention" not in self.block_types:
            return
        if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dims; Gated DeltaNet obeys a 2D padding mask only"
            )
        is_packed = kwargs.get("cu_seq_lens_q") is not None
        # Positions that do not rise by one mean documents laid end to end; beside a mask or a cache, perhaps padding.
        if attention_mask is None and cache is None and position_ids is not None and position_ids.shape[-1] > 1:
            is_packed = is_packed or bool((position_ids.diff(dim=-1) != 1).any())
        if is_packed:
            raise ValueError("packed rows are not supported with Gated DeltaNet: give each document its own row")

    def masks_and_rotary(
        self,
        h: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor] | None]:
        """The mask of each kind of mixer, and rotary tables if any block uses positions. Every loop shares them."""
        n_tokens, has_attention = h.shape[1], "full_attention" in self.block_types
        padding = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        if has_attention and position_ids is None:
            if padding is not None:
                position_ids = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -n_tokens:]
            else:
                n_past = cache.get_seq_length() if cache is not None else 0
                position_ids = torch.arange(n_tokens, device=h.device)[None] + n_past

        masks: dict[str, Any]
        if isinstance(attention_mask, dict):  # generate() prepares it so for some caches
            masks = dict(attention_mask)
        else:
            masks = {"linear_attention": None if padding is None else padding[:, -n_tokens:]}
            if has_attention:
                masks["full_attention"] = create_causal_mask(
                    config=self.config,
                    inputs_embeds=h,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    position_ids=position_ids,
                )
        if masks.get("linear_attention") is not None:
            masks["linear_attention"] = masks["linear_attention"].bool()
        if position_ids is None or not has_attention:
            return masks, None
        return masks, rotary_tables(position_ids, head_dim(self.config), self.config.rope_theta)


class LooplineForCausalLM(LooplinePreTrainedModel, GenerationMixin):
    """The looped stack with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        self.model = LooplineModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # A recurrent state cannot be rolled back, so generate() must not try (assisted decoding).
        self._is_stateful = "linear_attention" in config.block_types
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        n_loops: int | None = None,
        output_depth_logits: bool = False,
        **kwargs: object,
    ) -> LooplineCausalLMOutput:
        """Logits [B, T, vocab_size] after the last loop; arguments not listed are those of LooplineModel.

        Args:
            labels: [B, T], token ids, -100 where there is no loss; shifted here.
            logits_to_keep: the last so many positions (0 means all), or indices of positions.
            n_loops: passes over the stack; generate() takes it too.
            output_depth_logits: also return the logits after each loop.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            n_loops=n_loops,
            output_loop_states=output_depth_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        depth_logits = None
        if output_depth_logits:
            depth_logits = (*(self.lm_head(state[:, kept]) for state in outputs.loop_states[:-1]), logits)
        return LooplineCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            depth_logits=depth_logits,
        )


def head_dim(config: LooplineConfig) -> int:
    """Head size of softmax attention."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


__all__ = ["LooplineForCausalLM", "LooplineModel", "LooplinePreTrainedModel"]
