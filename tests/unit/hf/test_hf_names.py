"""Names and settings go to Hugging Face's and come back unchanged."""

import pytest
import torch
from hf_cases import CONFIGS, HYBRID, build, of_used_mixers

from loopline.models.config import MIXERS, ModelConfig
from loopline.models.hf import names
from loopline.models.hf.configuration_loopline import LAYER_TYPES, LooplineConfig
from loopline.models.hf.errors import CheckpointError
from loopline.models.hf.modeling_loopline import LooplineForCausalLM
from loopline.models.mixers.registry import MIXER_MODULES


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_are_one_to_one_and_those_of_the_hf_model(config: ModelConfig) -> None:
    table = names.hf_names(config)
    assert len(set(table.values())) == len(table)
    with torch.device("meta"):
        hf = LooplineForCausalLM(LooplineConfig(**names.to_hf_config(config)))
    shapes = {name: parameter.shape for name, parameter in hf.named_parameters()}
    assert {table[name]: shape for name, shape in names.parameter_shapes(config).items()} == shapes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_weights_come_back_as_the_same_tensors(config: ModelConfig) -> None:
    weights = {name: torch.empty(shape) for name, shape in names.parameter_shapes(config).items()}
    back = names.from_hf_weights(names.to_hf_weights(weights, config), config)
    assert {name: id(w) for name, w in back.items()} == {name: id(w) for name, w in weights.items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config_comes_back_equal(config: ModelConfig) -> None:
    assert names.from_hf_config({"model_type": "loopline", **names.to_hf_config(config)}) == of_used_mixers(config)


def test_config_table_covers_every_setting() -> None:
    fields = [field for _, field in names.CONFIG_KEYS]
    assert sorted([*fields, *MIXERS]) == sorted(ModelConfig.model_fields)
    assert set(names.to_hf_config(CONFIGS[HYBRID])) <= set(LooplineConfig().to_dict())


def test_every_mixer_has_names_and_a_cache_layer() -> None:
    assert set(names.MIXER_NAMES) == set(LAYER_TYPES) == set(MIXER_MODULES)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_hf_config_reads_the_pattern_as_the_training_config_does(config: ModelConfig) -> None:
    hf = LooplineConfig(**names.to_hf_config(config))
    assert hf.names == config.mixer_names
    types = [LAYER_TYPES[name] for name in config.mixer_names]
    assert hf.layer_types[1:] == (types * config.n_loops)[1:]
    assert hf.layer_types[0] == ("hybrid" if set(types) == {"linear_attention"} else types[0])
    assert hf.num_hidden_layers == config.plan.depth
    assert [config.plan.slot(step) for step in config.plan.steps()] == list(range(hf.num_hidden_layers))


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(KeyError, match=r"new_thing.*names\.py"):
        names._hf_name("new_thing.weight", CONFIGS[HYBRID])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"hidden_size": None}, "d_model"),
        ({"mixer_pattern": "mamba"}, "unknown mixer"),
        ({"mixer_pattern": "gdn,full"}, "was it edited"),
        ({"mixers": []}, "by mixer name"),
        ({"mixers": {"gdn": {"n_head": 2}}}, "n_head"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(change: dict, message: str) -> None:
    content = {"model_type": "loopline", **names.to_hf_config(CONFIGS[HYBRID]), **change}
    with pytest.raises(CheckpointError, match=message):
        names.from_hf_config(content)


def test_a_missing_config_key_is_named() -> None:
    content = {"model_type": "loopline", **names.to_hf_config(CONFIGS[HYBRID])}
    del content["mixers"]
    with pytest.raises(CheckpointError, match="mixers"):
        names.from_hf_config(content)


def test_case_weights_are_off_zero() -> None:
    """Or the zero-initialised loop gate and output gate would hide from every other test."""
    assert not [name for name, parameter in build(HYBRID).named_parameters() if not parameter.abs().min() > 0]
