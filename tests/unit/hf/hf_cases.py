"""Tiny models for the Hugging Face tests, with every zero-initialised weight moved off zero."""

import functools
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

from loopline.models.config import FullAttentionConfig, GatedDeltaConfig, ModelConfig
from loopline.models.hf import modeling_loopline
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.export import stored_weights
from loopline.models.hf.names import to_hf_config, to_hf_weights
from loopline.models.init import init_weights
from loopline.models.looped_lm import LoopedLM

VOCAB_SIZE = 67
FP32_TOLERANCE = 1e-5  # the same arithmetic in the same order: measured 0.0
# Gated DeltaNet's output norm magnifies fp32 rounding up to a thousandfold; another order of sums shows: measured 5e-4.
FP32_REORDERED_TOLERANCE = 1e-2
FP64_TOLERANCE = 1e-9  # nothing but a bug is left: measured 1e-12


def _config(**settings: object) -> ModelConfig:
    small = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "n_blocks": 2,
        "d_ffn": 24,
        "full": FullAttentionConfig(n_heads=2),
        "gdn": GatedDeltaConfig(n_heads=2, d_head_k=6, d_head_v=12),
    }
    return ModelConfig(**{**small, **settings})


GQA = FullAttentionConfig(n_heads=4, n_kv_heads=2, d_head=6, rope_theta=500.0, output_gate=True)
CONFIGS = {
    "full-replace-1": _config(n_loops=1, update="replace", pattern="full"),
    "full-norm-3-sandwich-tied": _config(
        n_loops=3, update="norm", pattern="full", norm="sandwich", tie_embeddings=True
    ),
    "full-gate-2-gqa": _config(n_loops=2, update="gate", pattern="full", full=GQA),
    "gdn-gate-2": _config(n_loops=2, update="gate", pattern="gdn"),
    "gdn-norm-3-tied": _config(
        n_loops=3,
        update="norm",
        pattern="gdn",
        tie_embeddings=True,
        gdn=GatedDeltaConfig(n_heads=3, d_head_k=4, d_head_v=4, conv_size=3, allow_negative_eigenvalues=True),
    ),
    "hybrid-gate-3-sandwich": _config(
        n_blocks=3, n_loops=3, update="gate", pattern="gdn*2,full", norm="sandwich", full=GQA
    ),
    "hybrid-replace-1": _config(
        n_loops=1, update="replace", pattern="full,gdn", gdn=GatedDeltaConfig(d_head_k=4, d_head_v=8, conv_size=1)
    ),
}
HYBRID = "hybrid-gate-3-sandwich"


def build(name: str) -> LoopedLM:
    """The training model of a case."""
    model = LoopedLM(CONFIGS[name]).eval()
    init_weights(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens."""
    return torch.randint(VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def hf_model(model: LoopedLM) -> modeling_loopline.LooplineForCausalLM:
    """The Hugging Face model with the same weights, fp32, without a folder in between."""
    return _fill(modeling_loopline, model, torch.float32)


def hf_model_fp64(model: LoopedLM) -> modeling_loopline.LooplineForCausalLM:
    """The same in fp64 throughout: differences that remain are bugs and not rounding."""
    return _fill(_modelling_fp64(), model, torch.float64)


def _fill(module: types.ModuleType, model: LoopedLM, dtype: torch.dtype) -> modeling_loopline.LooplineForCausalLM:
    loaded = module.LooplineForCausalLM(LooplineConfig(**to_hf_config(model.config))).to(dtype).eval()
    weights = to_hf_weights(stored_weights(model, "float32"), model.config)
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    loaded.load_state_dict(weights)
    return loaded


@functools.cache
def _modelling_fp64() -> types.ModuleType:
    """The modelling file with its fp32 sections in fp64."""
    source = Path(modeling_loopline.__file__).read_text(encoding="utf-8")
    source = source.replace(".float()", ".double()").replace("torch.float32", "torch.float64")
    module = types.ModuleType("loopline.models.hf.modeling_loopline_fp64")
    module.__package__ = "loopline.models.hf"
    sys.modules[module.__name__] = module
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module
