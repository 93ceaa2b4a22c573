"""A mixer is complete: config, module, tensor-parallel plan, Hugging Face names, formulas, for every one in MIXERS."""

import pytest
import torch
from torch import nn

from loopline.models import flops
from loopline.models.config import MIXERS, FullAttentionConfig, ModelConfig, Section
from loopline.models.ffn import SwiGLU
from loopline.models.hf.configuration_loopline import LAYER_TYPES
from loopline.models.hf.names import CONFIG_KEYS, MIXER_NAMES, hf_names
from loopline.models.layers import Linear, RMSNorm
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers.registry import MIXER_MODULES, build_mixer
from loopline.pretrain.parallel.plans import FFN_PLAN, MIXER_PLANS

every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def config_of(mixer: str) -> ModelConfig:
    """A model of one block of this mixer with every optional part on."""
    return ModelConfig(pattern=mixer, n_blocks=1, full=FullAttentionConfig(n_heads=4, output_gate=True))


def module_of(mixer: str) -> nn.Module:
    with torch.device("meta"):
        return build_mixer(mixer, config_of(mixer))


def test_tables_list_the_same_mixers() -> None:
    for table in (MIXER_MODULES, MIXER_PLANS, MIXER_NAMES, LAYER_TYPES):
        assert list(table) == list(MIXERS)


@every_mixer
def test_config_section_is_a_field_with_every_setting_exported(mixer: str) -> None:
    section = ModelConfig.model_fields[mixer].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    exported = {path for _, path in CONFIG_KEYS}
    assert {f"{mixer}.{field}" for field in section.model_fields} <= exported


@every_mixer
def test_tensor_parallel_plan_covers_every_parameter_and_nothing_else(mixer: str) -> None:
    module, plan = module_of(mixer), MIXER_PLANS[mixer]
    direct = {name for name, _ in module.named_parameters(recurse=False)}
    children = {name for name, child in module.named_children() if list(child.parameters())}
    assert {*direct, *children} == set(plan)
    for name, kind in plan.items():
        assert (kind == "shard") == (name in direct), name  # a parameter of the module's own is cut as it is
        if name in children:
            expected = RMSNorm if kind == "partial" else Linear
            assert type(module.get_submodule(name)) is expected, name


def test_feed_forward_plan_covers_every_parameter_and_nothing_else() -> None:
    assert {name for name, _ in SwiGLU(4, 8).named_children()} == set(FFN_PLAN)


@pytest.mark.parametrize(("name", "plan"), [*MIXER_PLANS.items(), ("ffn", FFN_PLAN)])
def test_a_region_is_left_through_one_row_linear(name: str, plan: dict[str, str]) -> None:
    assert set(plan.values()) <= {"column", "row", "shard", "partial"}
    assert list(plan.values()).count("row") == 1


@every_mixer
def test_every_cut_divides_what_is_asked_to_divide(mixer: str) -> None:
    """With tp = 2 every sharded dimension is even and head sizes stay whole."""
    for name, parameter in module_of(mixer).named_parameters():
        kind = MIXER_PLANS[mixer][name.removesuffix(".weight")]
        if kind != "partial":
            assert parameter.shape[1 if kind == "row" else 0] % 2 == 0, name


@every_mixer
def test_hugging_face_names_cover_every_parameter_one_to_one(mixer: str) -> None:
    config = config_of(mixer)
    with torch.device("meta"):
        ours = {name for name, _ in LoopedLM(config).named_parameters()}
    table = hf_names(config)
    assert set(table) == ours
    assert len(set(table.values())) == len(ours)
    theirs = MIXER_NAMES[mixer][1]
    assert all(theirs in table[name] for name in ours if ".mixer." in name)


@every_mixer
def test_parameter_formula_counts_the_module(mixer: str) -> None:
    assert flops.mixer_parameters(config_of(mixer), mixer) == sum(p.numel() for p in module_of(mixer).parameters())


@every_mixer
def test_flop_formula_is_at_least_its_matrices(mixer: str) -> None:
    matrices = sum(p.numel() for p in module_of(mixer).parameters() if p.dim() == 2)
    assert flops.mixer_flops(config_of(mixer), mixer, mean_context=0.5) > 2 * matrices


def test_formulas_of_one_mixer_are_not_those_of_another() -> None:
    """A mixer without its own branch in flops.py would be counted as the last one there."""
    config = ModelConfig(d_model=60, full=FullAttentionConfig(n_heads=5, d_head=14))
    assert len({flops.mixer_parameters(config, name) for name in MIXERS}) == len(MIXERS)


@every_mixer
def test_mixer_is_one_file_that_knows_nothing_of_parallelism(mixer: str) -> None:
    module = MIXER_MODULES[mixer]
    assert module.__module__ == f"loopline.models.mixers.{mixer}"
    assert list(module.forward.__annotations__) == ["x", "packing", "return"]
