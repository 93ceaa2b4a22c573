"""Tiny models for the Hugging Face tests, with every zero-initialised weight moved off zero."""

import torch
from torch import Tensor

from loopline.models.config import MIXERS, ModelConfig
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.export import stored_weights
from loopline.models.hf.modeling_loopline import LooplineForCausalLM
from loopline.models.hf.names import to_hf_config, to_hf_weights
from loopline.models.init import init_weights
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers.registry import MIXER_MODULES
from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.gdn import GatedDeltaConfig
from loopline.models.settings.mamba2 import Mamba2Config
from tests.unit.small_mixers import SMALL

VOCAB_SIZE = 67
FP32_TOLERANCE = 1e-5  # the same arithmetic in the same order: measured 0.0
# Gated DeltaNet's output norm magnifies fp32 rounding up to a thousandfold; another order of sums shows: measured 5e-4.
FP32_REORDERED_TOLERANCE = 1e-2
FP64_TOLERANCE = 1e-9  # nothing but a bug is left: measured 1e-12


def config_of(**settings: object) -> ModelConfig:
    small = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "n_blocks": 2,
        "d_ffn": 24,
        **SMALL,
        "full": FullAttentionConfig(n_heads=2),
        "gdn": GatedDeltaConfig(n_heads=2, d_head_k=6, d_head_v=12),
    }
    return ModelConfig(**{**small, **settings})


GQA = FullAttentionConfig(n_heads=4, n_kv_heads=2, d_head=6, rope_theta=500.0, output_gate=True)
CONFIGS = {
    "full-replace-1": config_of(n_loops=1, update="replace", pattern="full"),
    "full-norm-3-sandwich-tied": config_of(
        n_loops=3, update="norm", pattern="full", norm="sandwich", tie_embeddings=True, exit_gate=True
    ),
    "full-gate-2-gqa": config_of(n_loops=2, update="gate", pattern="full", full=GQA),
    "gdn-gate-2": config_of(n_loops=2, update="gate", pattern="gdn"),
    "gdn-norm-3-tied": config_of(
        n_loops=3,
        update="norm",
        pattern="gdn",
        tie_embeddings=True,
        gdn=GatedDeltaConfig(n_heads=3, d_head_k=4, d_head_v=4, conv_size=3, allow_negative_eigenvalues=True),
    ),
    "hybrid-gate-3-sandwich": config_of(
        n_blocks=3, n_loops=3, update="gate", pattern="gdn*2,full", norm="sandwich", full=GQA
    ),
    # One of every other mixer.
    **{f"{name}-gate-2": config_of(n_loops=2, pattern=name) for name in MIXER_MODULES if name not in ("full", "gdn")},
    "mamba2-norm-1-groups": config_of(
        n_loops=1,
        update="norm",
        pattern="mamba2",
        mamba2=Mamba2Config(n_heads=4, d_head=3, d_state=5, n_groups=2, conv_size=3),
    ),
    "hybrid-replace-1": config_of(
        n_loops=1, update="replace", pattern="full,gdn", gdn=GatedDeltaConfig(d_head_k=4, d_head_v=8, conv_size=1)
    ),
}
HYBRID = "hybrid-gate-3-sandwich"
# Every mixer, and the forms of one that decode otherwise.
DECODED = {name: config_of(n_loops=2, pattern=name) for name in MIXER_MODULES}
DECODED |= {
    name: config_of(n_loops=2, pattern=name.partition("-")[0], **{name.partition("-")[0]: settings})
    for name, settings in {
        "nsa-mean": SMALL["nsa"].model_copy(update={"pooling": "mean"}),
        "dsa-dense": SMALL["dsa"].model_copy(update={"index_loss": "dense"}),
        "dsa-one-choice": SMALL["dsa"].model_copy(update={"selection_loops": (0,)}),
        "dsa-tiles": SMALL["dsa"].model_copy(update={"selection_tile": 3}),
        "dsa-tiles-one-choice": SMALL["dsa"].model_copy(update={"selection_tile": 4, "selection_loops": (0,)}),
        "dsa-two-choices": SMALL["dsa"].model_copy(update={"selection_loops": (0, 2)}),
    }.items()
}


def of_used_mixers(config: ModelConfig) -> ModelConfig:
    """The config without settings of mixers the model does not have: an export does not carry them."""
    return ModelConfig(**config.model_dump(exclude=set(MIXERS) - set(config.sections)))


def build(name: str) -> LoopedLM:
    """The training model of a case."""
    return build_from(CONFIGS[name])


def build_from(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LoopedLM:
    """A training model with noise on every weight; weights are the same in every compute dtype."""
    model = LoopedLM(config, dtype).eval()
    init_weights(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens."""
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def hf_model(model: LoopedLM) -> LooplineForCausalLM:
    """The Hugging Face model with the same weights, fp32, without a folder in between."""
    return _fill(model, torch.float32)


def hf_model_fp64(model: LoopedLM) -> LooplineForCausalLM:
    """The same in fp64 throughout: differences that remain are bugs and not rounding."""
    return _fill(model, torch.float64)


def _fill(model: LoopedLM, dtype: torch.dtype) -> LooplineForCausalLM:
    loaded = LooplineForCausalLM(LooplineConfig(**to_hf_config(model.config))).to(dtype).eval()
    weights = to_hf_weights(stored_weights(model, "float32"), model.config)
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    loaded.load_state_dict(weights)
    return loaded
