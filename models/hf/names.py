"""Weights and settings under two names, ours and Hugging Face's: one table each, read in both directions.

The Hugging Face names are those of Llama-like models; the sandwich norms are named as Ouro names them. A tied head is
no weight of its own on either side.
"""

from typing import Any

import torch
from torch import Tensor

from loopline.models.config import ModelConfig
from loopline.models.hf.configuration_loopline import LAYER_TYPES
from loopline.models.hf.errors import CheckpointError
from loopline.models.looped_lm import LoopedLM

MODEL_TYPE = "loopline"

# (ours, Hugging Face's); what follows a name in either is the same on both sides.
TOP_NAMES = (
    ("embed.", "model.embed_tokens."),
    ("loop_gate.", "model.loop_gate."),
    ("exit_gate.", "model.early_exit_gate."),
    ("final_norm.", "model.norm."),
    ("head.", "lm_head."),
)
BLOCK_NAMES = (
    ("mixer_norm.", "input_layernorm."),
    ("mixer_out_norm.", "input_layernorm_2."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("ffn_out_norm.", "post_attention_layernorm_2."),
    ("ffn.", "mlp."),
)
# Softmax mixers and linear ones, as transformers' hybrids name them.
MIXER_NAMES = {
    name: ("mixer.", "linear_attn." if layer_type == "linear_attention" else "self_attn.")
    for name, layer_type in LAYER_TYPES.items()
}

# (Hugging Face's config key, field of ModelConfig)
CONFIG_KEYS = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "d_model"),
    ("intermediate_size", "d_ffn"),
    ("n_blocks", "n_blocks"),
    ("n_loops", "n_loops"),
    ("mixer_pattern", "pattern"),
    ("norm_placement", "norm"),
    ("rms_norm_eps", "norm_eps"),
    ("loop_update", "update"),
    ("tie_word_embeddings", "tie_embeddings"),
    ("exit_gate", "exit_gate"),
)
# Beside these: "mixer_names", the pattern spelled out, and "mixers", the settings of each mixer named.


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every parameter of the model, by our name; nothing is allocated."""
    with torch.device("meta"):
        model = LoopedLM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every parameter -> Hugging Face's. One to one; turn it round for the other direction."""
    return {name: _hf_name(name, config) for name in parameter_shapes(config)}


def _hf_name(name: str, config: ModelConfig) -> str:
    prefix = ""
    table: tuple[tuple[str, str], ...] = TOP_NAMES
    if name.startswith("blocks."):
        _, block_idx, name = name.split(".", 2)
        prefix = f"model.layers.{block_idx}."
        table = (*BLOCK_NAMES, MIXER_NAMES[config.mixer_names[int(block_idx)]])
    for ours, theirs in table:
        if name.startswith(ours):
            return prefix + theirs + name.removeprefix(ours)
    raise KeyError(f"no Hugging Face name for parameter {prefix + name!r}; add it to models/hf/names.py")


def to_hf_weights(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same tensors under Hugging Face's names."""
    return {theirs: weights[ours] for ours, theirs in hf_names(config).items()}


def from_hf_weights(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same tensors under our names.

    Raises:
        CheckpointError: names or shapes are not those the config asks for.
    """
    names, shapes = hf_names(config), parameter_shapes(config)
    missing, unexpected = sorted(set(names.values()) - set(weights)), sorted(set(weights) - set(names.values()))
    if missing or unexpected:
        raise CheckpointError(
            f"weights do not fit the config: {len(missing)} missing ({_some(missing)}), "
            f"{len(unexpected)} unexpected ({_some(unexpected)}). Was config.json edited, or a shard lost?"
        )
    wrong = [
        f"{theirs} is {list(weights[theirs].shape)}, expected {list(shapes[ours])}"
        for ours, theirs in names.items()
        if weights[theirs].shape != shapes[ours]
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} weights have the wrong shape: {_some(wrong)}. Was config.json edited?")
    return {ours: weights[theirs] for ours, theirs in names.items()}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of LooplineConfig that say what the model is."""
    ours = config.model_dump(mode="json")
    return {
        **{key: ours[field] for key, field in CONFIG_KEYS},
        "mixer_names": config.mixer_names,
        "mixers": {name: ours[name] for name in config.sections},
    }


def from_hf_config(content: dict[str, Any]) -> ModelConfig:
    """The ModelConfig a config.json describes. Keys that do not say what the model is (token ids, dtype) are left out.

    Raises:
        CheckpointError: not a Loopline model, a key missing, or a value that ModelConfig refuses.
    """
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"config.json has model_type {content.get('model_type')!r}; only {MODEL_TYPE!r} can be imported"
        )
    missing = [key for key in (*dict(CONFIG_KEYS), "mixer_names", "mixers") if key not in content]
    if missing:
        raise CheckpointError(f"config.json lacks {_some(missing)}; every key of LooplineConfig must be there")
    if not isinstance(content["mixers"], dict):
        raise CheckpointError(f"config.json has mixers = {content['mixers']!r}; expected settings by mixer name")
    try:
        config = ModelConfig(**{field: content[key] for key, field in CONFIG_KEYS}, **content["mixers"])
    except (TypeError, ValueError) as error:  # pydantic's message names the field
        raise CheckpointError(f"config.json describes no valid model: {error}") from error
    if config.mixer_names != content["mixer_names"] or set(config.sections) != set(content["mixers"]):
        raise CheckpointError(
            f"config.json names mixers {_some(content['mixer_names'])}, with settings of "
            f"{_some(sorted(content['mixers']))}, but its mixer_pattern is {content['mixer_pattern']!r}: was it edited?"
        )
    return config


def _some(items: list[str]) -> str:
    """The first few of a list, for a message."""
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "") if items else "none"
