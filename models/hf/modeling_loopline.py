"""A looped language model: a stack of `n_blocks` blocks applied `n_loops` times. Needs torch and transformers only.

Read from the bottom: LooplineForCausalLM, LooplineModel (the loop), LooplineBlock; the token mixers have a file each.
Linear mixers use flash-linear-attention's kernels on CUDA where that package is installed, and plain torch otherwise.

Every (loop, block) has its own cache layer: slot = loop_idx * n_blocks + block_idx. Padding must be on the left (on
the right is fine where nothing follows, as in training). Packed rows are refused where some mixer cannot see where a
document ends, so give each document its own row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicCache, LinearAttentionLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LAYER_TYPES, LooplineConfig
from loopline.models.hf.modules.call import Call, LooplineRMSNorm
from loopline.models.hf.modules.full import LooplineAttention
from loopline.models.hf.modules.registry import MIXERS

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


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


class LooplineBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); sandwich blocks also norm each branch's output before the sum."""

    def __init__(self, config: LooplineConfig, mixer_name: str) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_attribute = "linear_attn" if LAYER_TYPES[mixer_name] == "linear_attention" else "self_attn"
        self.is_sandwich = config.norm_placement == "sandwich"
        self.input_layernorm = LooplineRMSNorm(d, eps)
        setattr(self, self.mixer_attribute, MIXERS[mixer_name](config))
        self.post_attention_layernorm = LooplineRMSNorm(d, eps)
        self.mlp = LooplineMLP(config)
        if self.is_sandwich:
            self.input_layernorm_2 = LooplineRMSNorm(d, eps)
            self.post_attention_layernorm_2 = LooplineRMSNorm(d, eps)

    def forward(
        self, x: Tensor, slot: int, call: Call, past_key_values: Cache | None = None, **kwargs: object
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        mixer = getattr(self, self.mixer_attribute)
        y, _ = mixer(self.input_layernorm(x), slot, call, past_key_values)
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
    """Where asked for: `depth_logits`, logits after each loop, a tuple of [B, T, vocab_size]; and `exit_probabilities`,
    [R, B, T], the chance of stopping after each loop and not before, of a model with an exit gate."""

    depth_logits: tuple[Tensor, ...] | None = None
    exit_probabilities: Tensor | None = None


class LooplinePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config_class = LooplineConfig
    config: LooplineConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LooplineBlock"]  # noqa: RUF012 (transformers' own form, here and below)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LooplineBlock,
        "attentions": LooplineAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LooplineLoopGate):
            init.zeros_(module.rho)
        elif isinstance(module, tuple(MIXERS.values())):
            module.init_parameters()  # type: ignore[operator]


class LooplineModel(LooplinePreTrainedModel):
    """Embedding, the looped stack, final norm."""

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LooplineBlock(config, name) for name in config.names])
        self.loop_gate = LooplineLoopGate(config) if config.loop_update == "gate" else None
        self.early_exit_gate = nn.Linear(config.hidden_size, 1) if config.exit_gate else None
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
        call = self.prepare(h, attention_mask, position_ids, past_key_values, kwargs)
        if past_key_values is not None and "hybrid" in self.config.slot_types(1):
            counter = h.new_zeros(h.shape[0], 1, h.shape[1], 1)  # see LooplineConfig.slot_types
            past_key_values.update(counter, counter, 0)

        loop_states = []
        for loop_idx in range(n_loops):
            h_in = h
            for block_idx, block in enumerate(self.layers):
                slot = loop_idx * len(self.layers) + block_idx
                h = block(h, slot=slot, call=call, past_key_values=past_key_values)
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
            layer.has_previous_state[0] or layer.is_recurrent_states_initialized[0]
            if isinstance(layer, LinearAttentionLayer)
            else cache.get_seq_length(slot) > 0
            for slot, layer in enumerate(cache.layers)
        )
        if n_filled == 0:
            del cache.layers[depth:]
            for slot_type in self.config.slot_types(n_loops)[len(cache.layers) :]:
                options = {"sliding_window": self.config.sliding_window} if slot_type == "sliding_attention" else {}
                cache.layers.append(DYNAMIC_LAYER_TYPE_MAPPING[slot_type](**options))
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
        """Raises ValueError where a row holds several documents, or a custom 4D mask, and some mixer cannot obey it."""
        unable = sorted(set(self.config.names) - {"full", "window"})
        if not unable:
            return
        if isinstance(attention_mask, Tensor) and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dims; {', '.join(unable)} obey a 2D padding mask only"
            )
        is_packed = kwargs.get("cu_seq_lens_q") is not None
        # Positions that do not rise by one mean documents laid end to end; beside a mask or a cache, perhaps padding.
        if attention_mask is None and cache is None and position_ids is not None and position_ids.shape[-1] > 1:
            is_packed = is_packed or bool((position_ids.diff(dim=-1) != 1).any())
        if is_packed:
            raise ValueError(f"packed rows are not supported with {', '.join(unable)}: give each document its own row")

    def prepare(
        self,
        h: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        options: dict[str, object],
    ) -> Call:
        """Positions, padding and masks of this pass. Every loop shares them."""
        n_tokens = h.shape[1]
        n_past = int(cache.get_seq_length()) if cache is not None else 0
        if isinstance(attention_mask, dict):  # generate() prepares it so for some caches
            masks: dict[str, Any] = dict(attention_mask)
            padding = padding_of(masks, n_past + n_tokens)
        else:
            masks = {}
            padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        if position_ids is None:
            if padding is not None:
                position_ids = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -n_tokens:]
            else:
                position_ids = (torch.arange(n_tokens, device=h.device)[None] + n_past).expand(h.shape[0], -1)
        if not masks:
            masks = {
                layer_type: create(
                    config=self.config,
                    inputs_embeds=h,
                    attention_mask=attention_mask,  # type: ignore[arg-type]
                    past_key_values=cache,
                    position_ids=position_ids,
                )
                for layer_type, create in MASKS.items()
                if any(name in ("full", "window") and LAYER_TYPES[name] == layer_type for name in self.config.names)
            }
        is_key = None if padding is None else padding.bool()
        return Call(
            n_blocks=len(self.layers),
            positions=position_ids,
            is_token=None if is_key is None else is_key[:, -n_tokens:],
            is_key=is_key,
            n_keys=n_past + n_tokens,
            masks=masks,
            options=options,
        )


class LooplineForCausalLM(LooplinePreTrainedModel, GenerationMixin):
    """The looped stack with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        self.model = LooplineModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # A recurrent state cannot be rolled back, so generate() must not try (assisted decoding).
        self._is_stateful = any(LAYER_TYPES[name] == "linear_attention" for name in config.names)
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
        depth_logits = exit_probabilities = None
        if output_depth_logits:
            if self.model.early_exit_gate is not None:
                gate = self.model.early_exit_gate
                weight, bias = wide(gate.weight), wide(gate.bias)
                logits_of_stop = [F.linear(wide(state[:, kept]), weight, bias) for state in outputs.loop_states]
                exit_probabilities = exit_distribution([x[..., 0] for x in logits_of_stop])
            depth_logits = (*(self.lm_head(state[:, kept]) for state in outputs.loop_states[:-1]), logits)
        return LooplineCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            depth_logits=depth_logits,
            exit_probabilities=exit_probabilities,
        )


def exit_distribution(logits: list[Tensor]) -> Tensor:
    """lambda_r prod_{j<r} (1 - lambda_j), lambda = sigmoid(logits), the last loop taking the rest: [R, ...]."""
    stay = torch.ones_like(wide(logits[0]))
    chances = []
    for logit in logits[:-1]:
        chances.append(stay * wide(logit).sigmoid())
        stay = stay * (-wide(logit)).sigmoid()
    return torch.stack([*chances, stay])


def padding_of(masks: dict[str, Any], n_keys: int) -> Tensor | None:
    """[B, n_keys], true at tokens, from prepared masks: a 2D one, or what the last query of a causal one may see."""
    if masks.get("linear_attention") is not None:
        return masks["linear_attention"]
    causal = masks.get("full_attention")
    if causal is None:
        causal = masks.get("indexed_attention")
    if causal is None:
        return None
    last = causal[:, 0, -1, :n_keys]
    return last if last.dtype == torch.bool else last == 0


__all__ = ["LooplineForCausalLM", "LooplineModel", "LooplinePreTrainedModel"]
