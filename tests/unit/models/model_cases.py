"""Tiny models: every update, norm and mixer pattern, with every weight moved off its starting value."""

import itertools

import torch
from torch import Tensor

from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext, RowContext
from loopline.models.init import init_weights
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers.registry import MIXER_MODULES
from loopline.models.packing import Packing
from loopline.models.settings.gdn import GatedDeltaConfig
from tests.unit.small_mixers import SMALL

VOCAB_SIZE = 61
PATTERNS = ("full", "gdn", "gdn,full")
UPDATES = ("replace", "norm", "gate")
NORMS = ("pre", "sandwich")


def make_config(**settings: object) -> ModelConfig:
    """A model of two blocks and three loops with no size a power of two."""
    small = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 24,
        "n_blocks": 2,
        "n_loops": 3,
        "pattern": "gdn,full",
        "d_ffn": 40,
        # Gated DeltaNet's output norm magnifies rounding by up to 1/eps^0.5: see recipes/debug.toml.
        "norm_eps": 1e-3,
        **SMALL,
        "gdn": GatedDeltaConfig(n_heads=3, d_head_k=6, d_head_v=10),
    }
    return ModelConfig(**{**small, **settings})


CONFIGS = {
    f"{pattern}-{update}-{norm}": make_config(pattern=pattern, update=update, norm=norm)
    for pattern, update, norm in itertools.product(PATTERNS, UPDATES, NORMS)
}
CONFIGS["gdn,full-gate-pre-tied"] = make_config(tie_embeddings=True)
# Every mixer there is; every update and norm over two of them.
EVERY_MIXER = {name: make_config(pattern=name) for name in MIXER_MODULES}
EVERY_MIXER["dsa-tiles"] = make_config(pattern="dsa", dsa=SMALL["dsa"].model_copy(update={"selection_tile": 5}))
EVERY_MIXER |= {name: config for name, config in CONFIGS.items() if name.startswith("gdn,full")}


def starting_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LoopedLM:
    """The model as a run starts it."""
    model = LoopedLM(config, dtype)
    init_weights(model, seed=3)
    return model


def moved_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LoopedLM:
    """The same with noise on every weight, so that no gate is zero and no norm is one."""
    model = starting_model(config, dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens_of(*shape: int, low: int = 0, high: int = VOCAB_SIZE) -> Tensor:
    """Random tokens in [low, high)."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def context_of(cu_seqlens: list[int], n_loops: int = 1) -> BlockContext:
    """The first block's view of a row of documents in its first loop."""
    return RowContext(Packing.of(cu_seqlens, "cpu"), n_loops).at(0, 0)


def gradients(model: LoopedLM, logits: list[Tensor]) -> dict[str, Tensor]:
    """Gradient of a fixed random projection of every tensor in `logits` with respect to every parameter."""
    generator = torch.Generator().manual_seed(7)
    loss = sum((x.float() * torch.randn(x.shape, generator=generator)).sum() for x in logits)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def add_gradients(model: LoopedLM, tokens: Tensor, cu_seqlens: list[int], upstream: Tensor) -> None:
    """Add to every parameter's gradient that of the logits of all loops under `upstream` [R, 1, T, vocab_size], and
    that of what a mixer trains by a loss of its own."""
    row = RowContext(Packing.of(cu_seqlens, "cpu"), model.config.n_loops, auxiliary_scale=1.0)
    h, depths = model.embed_tokens(tokens), []
    for loop_idx in range(row.n_loops):
        h = model.finish_loop(model.run_blocks(h, loop_idx, row), h, loop_idx)
        depths.append(model.read_out(h))
    (torch.stack(depths) * upstream).sum().backward()
