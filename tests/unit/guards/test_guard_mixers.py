"""A mixer is complete: config, module, tensor-parallel plan, Hugging Face names, formulas, for every one in MIXERS."""

import pytest
import torch
from torch import nn

from loopline.models.config import MIXERS, ModelConfig
from loopline.models.ffn import SwiGLU
from loopline.models.hf.configuration_loopline import LAYER_TYPES, LooplineConfig
from loopline.models.hf.modeling_loopline import LooplineForCausalLM
from loopline.models.hf.modules.registry import MIXERS as HF_MIXERS
from loopline.models.hf.names import hf_names, to_hf_config
from loopline.models.layers import GroupRMSNorm, LayerNorm, Linear, RMSNorm
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers.mixer import Mixer
from loopline.models.mixers.registry import MIXER_MODULES, build_mixer
from loopline.models.settings.section import MixerSection
from loopline.pretrain.config import load_config, recipe_names
from loopline.pretrain.parallel.plans import CUT_DIMS, FFN_PLAN, MIXER_PLANS
from tests.unit.small_mixers import SMALL

every_mixer = pytest.mark.parametrize("mixer", MIXERS)
# Kind of plan row -> what the row may be.
PARTS = {
    "column": (Linear,),
    "row": (Linear,),
    "norm": (GroupRMSNorm,),
    "shard": (nn.Parameter,),
    "partial": (Linear, RMSNorm, nn.Parameter),
    "replicated": (Linear, LayerNorm),
}


def config_of(mixer: str) -> ModelConfig:
    """A model of one block of this mixer with every optional part on."""
    return ModelConfig(pattern=mixer, n_blocks=1, **SMALL)


def module_of(mixer: str) -> Mixer:
    with torch.device("meta"):
        return build_mixer(mixer, config_of(mixer))


def test_tables_list_the_same_mixers_in_one_order() -> None:
    for table in (MIXER_MODULES, MIXER_PLANS, LAYER_TYPES, HF_MIXERS, SMALL):
        assert list(table) == list(MIXERS)


@every_mixer
def test_config_section_is_a_field_of_its_name(mixer: str) -> None:
    section = ModelConfig.model_fields[mixer].annotation
    assert isinstance(section, type)
    assert issubclass(section, MixerSection)
    assert section is MIXERS[mixer] is type(SMALL[mixer])
    assert section.name == MIXER_MODULES[mixer].name == mixer


@every_mixer
def test_backends_of_the_settings_are_those_of_the_op(mixer: str) -> None:
    asked = MIXERS[mixer].model_fields["backend"].annotation
    assert set(asked.__args__) == {"auto", *MIXER_MODULES[mixer].backends}


@every_mixer
def test_every_mixer_has_a_debug_recipe_that_uses_it(mixer: str) -> None:
    name = "debug" if mixer in ("full", "gdn") else f"debug_{mixer}"
    assert name in recipe_names()
    assert mixer in load_config(name).model.mixer_names


@every_mixer
def test_tensor_parallel_plan_covers_every_parameter_and_nothing_else(mixer: str) -> None:
    module, plan = module_of(mixer), MIXER_PLANS[mixer]
    direct = {name for name, _ in module.named_parameters(recurse=False)}
    children = {name for name, child in module.named_children() if list(child.parameters())}
    assert {*direct, *children} == set(plan)
    for name, kind in plan.items():
        assert type(getattr(module, name)) in PARTS[kind], (name, kind)


def test_feed_forward_plan_covers_every_parameter_and_nothing_else() -> None:
    assert {name for name, _ in SwiGLU(4, 8).named_children()} == set(FFN_PLAN)


@pytest.mark.parametrize(("name", "plan"), [*MIXER_PLANS.items(), ("ffn", FFN_PLAN)])
def test_a_region_is_left_through_one_row_linear(name: str, plan: dict[str, str]) -> None:
    assert set(plan.values()) <= set(PARTS)
    assert list(plan.values()).count("row") == 1


@every_mixer
def test_every_cut_divides_what_is_asked_to_divide(mixer: str) -> None:
    """With tp = 2 every sharded dimension is even and head sizes stay whole."""
    for name, parameter in module_of(mixer).named_parameters():
        kind = MIXER_PLANS[mixer][name.removesuffix(".weight").removesuffix(".bias")]
        if kind in CUT_DIMS:
            assert parameter.shape[CUT_DIMS[kind]] % 2 == 0, name


@every_mixer
def test_hugging_face_names_cover_every_parameter_one_to_one(mixer: str) -> None:
    config = config_of(mixer)
    with torch.device("meta"):
        ours = {name for name, _ in LoopedLM(config).named_parameters()}
    table = hf_names(config)
    assert set(table) == ours
    assert len(set(table.values())) == len(ours)
    theirs = ".linear_attn." if LAYER_TYPES[mixer] == "linear_attention" else ".self_attn."
    assert all(theirs in table[name] for name in ours if ".mixer." in name)


@every_mixer
def test_parameter_formula_counts_the_module(mixer: str) -> None:
    counted = sum(p.numel() for p in module_of(mixer).parameters())
    assert SMALL[mixer].parameters(config_of(mixer).d_model) == counted


@every_mixer
def test_flop_formula_is_at_least_its_matrices(mixer: str) -> None:
    matrices = sum(m.weight.numel() for m in module_of(mixer).modules() if isinstance(m, Linear))
    assert SMALL[mixer].flops(config_of(mixer).d_model, 1) > 2 * matrices


@pytest.mark.parametrize(("mixer", "options"), [*((mixer, {}) for mixer in MIXERS), ("dsa", {"selection_tile": 5})])
def test_cache_formula_counts_what_decoding_keeps(mixer: str, options: dict[str, int]) -> None:
    """One loop of one block, after more tokens than any window."""
    section = SMALL[mixer].model_copy(update=options)
    config = config_of(mixer).model_copy(update={"n_loops": 1, mixer: section})
    model = LooplineForCausalLM(LooplineConfig(**to_hf_config(config)))
    n_tokens = 40
    with torch.no_grad():
        cache = model(torch.ones(1, n_tokens, dtype=torch.long), use_cache=True).past_key_values
    (layer,) = cache.layers
    kept = 0
    if LAYER_TYPES[mixer] == "linear_attention":
        kept += sum(
            state.numel()
            for state in (*layer.recurrent_states.values(), *layer.conv_states.values())
            if state is not None
        )
    else:
        kept += layer.keys.numel() + layer.values.numel()
        kept += getattr(layer, "indexer_keys", torch.empty(0)).numel()
    fixed, per_token = section.cache_numbers(config.d_model)
    assert kept == fixed + n_tokens * per_token


@every_mixer
def test_mixer_is_one_file_that_knows_nothing_of_parallelism(mixer: str) -> None:
    module = MIXER_MODULES[mixer]
    assert module.__module__ == f"loopline.models.mixers.{mixer}"
    assert list(module.forward.__annotations__) == ["x", "context", "return"]
