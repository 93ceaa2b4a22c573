"""Parameter and FLOP formulas equal the built model's, exactly."""

import itertools

import pytest
import torch
from model_cases import make_config, tokens_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loopline.kernels.dsa.tile_op import select_by_tile
from loopline.models.config import MIXERS, ModelConfig
from loopline.models.flops import block_parameters, forward_flops, model_parameters, train_flops
from loopline.models.looped_lm import LoopedLM
from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.gdn import GatedDeltaConfig
from loopline.models.settings.section import mean_keys
from tests.unit.small_mixers import SMALL

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
            assert count(block.mixer) == config.sections[name].parameters(config.d_model), config


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
        exit_gate=True,
        full=FullAttentionConfig(n_heads=16, d_head=128),
    )
    assert model_parameters(config) == count(meta_model(config)) == published


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
    # The formula counts the (T + 1) / 2 keys a query really sees on average.
    skipped = 4 * full.n_heads * full.head_size(config.d_model) * (n_tokens - 1) / 2
    assert counted == n_tokens * (forward_flops(config, n_tokens) + config.plan.depth * skipped)


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
    assert gdn.flops(config.d_model, 65) == projections / 65 + convolutions + recurrence


def test_mean_keys_is_the_mean_over_a_documents_queries() -> None:
    for n_tokens, limit in itertools.product((1, 2, 7, 64), (1, 3, 64, 1000)):
        assert mean_keys(n_tokens, limit) == sum(min(t + 1, limit) for t in range(n_tokens)) / n_tokens


@pytest.mark.parametrize("mixer", MIXERS)
def test_cost_grows_with_the_document_where_the_mixer_looks_back_further(mixer: str) -> None:
    section = MIXERS[mixer]()
    short, long, longer = (section.flops(64, n_tokens) for n_tokens in (10, 100_000, 200_000))
    assert (long > short) == (mixer in ("full", "window", "nsa", "dsa"))
    assert (longer > 1.05 * long) == (mixer in ("full", "nsa", "dsa"))  # compressed blocks and index scores are dense
    fixed, per_token = section.cache_numbers(64)
    assert (per_token > 0) == (mixer in ("full", "nsa", "dsa"))
    assert (fixed > 0) == (per_token == 0)


@pytest.mark.parametrize(
    ("n_tokens", "tile", "top_k"), [(1, 1, 1), (37, 5, 7), (37, 64, 7), (64, 16, 16), (50, 8, 1000)]
)
def test_a_tile_of_queries_costs_the_keys_its_queries_see(n_tokens: int, tile: int, top_k: int) -> None:
    torch.manual_seed(0)
    index = torch.randn(1, n_tokens, 2, 4), torch.randn(1, n_tokens, 4), torch.randn(1, n_tokens, 2)
    visible = select_by_tile(*index, top_k=top_k, tile=tile, cu_seqlens=[0, n_tokens]).visible
    section = SMALL["dsa"].model_copy(update={"top_k": top_k})
    by_tile = section.model_copy(update={"selection_tile": tile})
    n_more = int((visible >= 0).sum()) / n_tokens - mean_keys(n_tokens, top_k)
    per_key = 4 * section.n_heads * section.head_size(24)
    assert by_tile.flops(24, n_tokens) - section.flops(24, n_tokens) == pytest.approx(per_key * n_more, abs=1e-6)
