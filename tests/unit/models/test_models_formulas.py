"""Parameter and FLOP formulas equal the built model's, exactly."""

import itertools

import pytest
import torch
from model_cases import make_config, tokens_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loopline.models.config import MIXERS, FullAttentionConfig, GatedDeltaConfig, ModelConfig
from loopline.models.flops import (
    block_parameters,
    forward_flops,
    mixer_flops,
    mixer_parameters,
    model_parameters,
    train_flops,
)
from loopline.models.looped_lm import LoopedLM

FULL = [
    FullAttentionConfig(n_heads=4),
    FullAttentionConfig(n_heads=6, n_kv_heads=2, d_head=10, output_gate=True),
    FullAttentionConfig(n_heads=1, d_head=2, output_gate=True),
]
GDN = [GatedDeltaConfig(n_heads=3, d_head_k=5, d_head_v=7, conv_size=3), GatedDeltaConfig(n_heads=1, d_head_v=1)]


def meta_model(config: ModelConfig) -> LoopedLM:
    with torch.device("meta"):
        return LoopedLM(config)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # a shared parameter comes once


def test_parameter_formula_equals_the_built_model_over_a_grid() -> None:
    axes = itertools.product(
        ("full", "gdn", "gdn*2,full"),
        ("pre", "sandwich"),
        ("replace", "norm", "gate"),
        (True, False),
        FULL,
        GDN,
        (1, 4),
    )
    for pattern, norm, update, tied, full, gdn, n_loops in axes:
        config = make_config(
            pattern=pattern,
            norm=norm,
            update=update,
            tie_embeddings=tied,
            full=full,
            gdn=gdn,
            n_loops=n_loops,
            n_blocks=3,
        )
        model = meta_model(config)
        assert count(model) == model_parameters(config), config
        for block, name in zip(model.blocks.values(), config.mixer_names):
            assert count(block) == block_parameters(config, name), config
            assert count(block.mixer) == mixer_parameters(config, name), config


@pytest.mark.parametrize(("n_blocks", "published"), [(24, 1_434_652_673), (48, 2_667_974_657)])
def test_ouro_sizes_count_the_published_parameters(n_blocks: int, published: int) -> None:
    config = ModelConfig(
        vocab_size=49152,
        d_model=2048,
        n_blocks=n_blocks,
        n_loops=4,
        d_ffn=5632,
        norm="sandwich",
        update="norm",
        full=FullAttentionConfig(n_heads=16, d_head=128),
    )
    exit_gate = 2048 + 1  # Ouro's linear from the state to one logit, with its bias; not in this model yet
    assert model_parameters(config) == published - exit_gate
    assert count(meta_model(config)) == published - exit_gate


def counted_forward(config: ModelConfig, n_tokens: int, n_loops: int | None = None) -> FlopCounterMode:
    """Torch's own count of the matrix products of one forward pass over one document.

    The counter sees mm and bmm and nothing else: no norms, softmax, activations or rotary turns, which the formula
    leaves out too. It has no rule for torch's fused CPU attention, so attention runs as plain matrix products; those
    are of whole T x T squares, the half above the diagonal included, so to the counter every query sees T keys.
    """
    model, tokens = LoopedLM(config), tokens_of(1, n_tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, n_loops=n_loops)
    return counter


@pytest.mark.parametrize("n_tokens", [1, 2, 65])
@pytest.mark.parametrize("full", FULL, ids=range(len(FULL)))
def test_flop_formula_equals_torchs_count_of_matrix_products(full: FullAttentionConfig, n_tokens: int) -> None:
    config = make_config(pattern="full", full=full)
    counted = counted_forward(config, n_tokens).get_total_flops()
    block = mixer_flops(config, "full", mean_context=n_tokens) + 6 * config.d_model * config.d_ffn
    per_token = config.plan.depth * block + 2 * config.d_model * config.vocab_size
    assert counted == n_tokens * per_token
    # The formula proper counts the (T + 1) / 2 keys a query really sees on average.
    skipped = 4 * full.n_heads * config.d_head * (n_tokens - 1) / 2
    assert forward_flops(config, n_tokens) == per_token - config.plan.depth * skipped


def test_flops_are_affine_in_executed_loops() -> None:
    config = make_config(pattern="full,gdn", n_blocks=3)
    formula = [forward_flops(config, 65, n_loops) for n_loops in (1, 2, 3, 7)]
    assert formula[2] - formula[1] == formula[1] - formula[0] > 0
    assert formula[3] == formula[0] + 6 * (formula[1] - formula[0])
    assert formula[0] - (formula[1] - formula[0]) == 2 * config.d_model * config.vocab_size  # the head runs once
    assert forward_flops(config, 65) == formula[2]
    assert train_flops(config, 65) == 3 * formula[2]

    one, two, three = (counted_forward(config, 65, n).get_total_flops() for n in (1, 2, 3))
    assert three - two == two - one


def test_backward_costs_twice_the_forward_by_torchs_count() -> None:
    config = make_config(pattern="full")
    model = LoopedLM(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens_of(1, 65)).sum().backward()
    assert counter.get_total_flops() == 3 * counted_forward(config, 65).get_total_flops()


def test_gdn_formula_equals_torchs_count_of_its_projections_plus_the_recurrence() -> None:
    config = make_config(pattern="gdn", n_loops=1, n_blocks=1)
    gdn, counts = config.gdn, counted_forward(config, 65).get_flop_counts()
    projections = sum(sum(ops.values()) for name, ops in counts.items() if ".mixer." in name and name.endswith("_proj"))
    # Convolutions are sums of products here and the chunked recurrence does extra work, so neither is the counter's.
    convolutions = 2 * gdn.conv_size * gdn.n_heads * (2 * gdn.d_head_k + gdn.d_head_v)
    recurrence = 7 * gdn.n_heads * gdn.d_head_k * gdn.d_head_v
    assert mixer_flops(config, "gdn", mean_context=33) == projections / 65 + convolutions + recurrence


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_both_formulas_and_only_attention_grows_with_context(mixer: str) -> None:
    config = make_config(pattern=mixer)
    assert mixer_parameters(config, mixer) > 0
    short, long = (mixer_flops(config, mixer, mean_context) for mean_context in (10, 1000))
    assert (long > short) == (mixer == "full")
