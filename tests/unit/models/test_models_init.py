"""Initial weights are a function of seed, name and full shape: of nothing else, and for every parameter."""

import math

import pytest
import torch
from model_cases import CONFIGS, make_config, starting_model
from torch import nn
from torch.nn import functional as F

from loopline.models.config import ModelConfig
from loopline.models.init import fill_of, init_weights, initial_value
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers.gdn import GatedDelta

RANDOM = ["embed.weight", "blocks.0.ffn.up_proj.weight", "blocks.1.mixer.q_conv", "blocks.0.mixer.A_log", "x.dt_bias"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_is_filled(config: ModelConfig) -> None:
    model = LoopedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_weights(model, seed=0)
    assert all(p.isfinite().all() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_value(name, list(parameter.shape), 0, fill_of(model, name))), name


def test_every_parameter_is_filled_after_the_meta_device() -> None:
    with torch.device("meta"):
        model = LoopedLM(make_config())
    model.to_empty(device="cpu")
    init_weights(model, seed=3)
    expected = starting_model(make_config()).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", RANDOM)
def test_value_depends_on_seed_name_and_shape_alone(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    value = initial_value(name, [6, 4], 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(initial_value(name, [6, 4], 0), value)
    assert value.dtype == torch.float32
    assert not torch.equal(initial_value(name, [6, 4], 1), value)
    assert not torch.equal(initial_value("other." + name, [6, 4], 0), value)


def test_seed_and_name_do_not_run_into_each_other() -> None:
    assert not torch.equal(initial_value("1/x.weight", [9, 9], 1), initial_value("x.weight", [9, 9], 11))


def test_different_seeds_differ_in_every_random_parameter() -> None:
    first, second = (LoopedLM(make_config()) for _ in range(2))
    init_weights(first, seed=0)
    init_weights(second, seed=1)
    same = {n for (n, a), b in zip(first.named_parameters(), second.parameters()) if torch.equal(a, b)}
    constant = {n for n, _ in first.named_parameters() if n.endswith(("norm.weight", "rho", "mixer.gate_proj.weight"))}
    assert same == constant


def test_no_two_blocks_start_alike() -> None:
    blocks = starting_model(make_config(pattern="gdn")).blocks
    for (name, a), b in zip(blocks["0"].named_parameters(), blocks["1"].parameters()):
        assert name.endswith("norm.weight") or not torch.equal(a, b), name


def test_a_model_with_some_blocks_gives_them_the_same_values() -> None:
    config = make_config(n_blocks=5)
    whole, part = starting_model(config), LoopedLM(config)
    for name in ("0", "1", "4"):
        del part.blocks[name]
    part.head, part.final_norm = nn.Identity(), nn.Identity()
    init_weights(part, seed=3)
    expected = dict(whole.named_parameters())
    assert {n.split(".")[1] for n, _ in part.named_parameters() if n.startswith("blocks.")} == {"2", "3"}
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("embed.weight", 0),
        ("blocks.0.mixer.q_proj.weight", 0),
        ("blocks.0.mixer.o_proj.weight", 1),
        ("blocks.0.mixer.v_conv", 0),
        ("blocks.0.mixer.A_log", 0),
        ("blocks.0.mixer.dt_bias", 0),
        ("blocks.1.ffn.down_proj.weight", 1),
    ],
)
def test_a_shard_is_the_slice_of_the_full_parameter(name: str, dim: int) -> None:
    config = make_config(vocab_size=63)  # three divides every cut dimension but d_ffn
    config = config.model_copy(update={"d_ffn": 39, "d_model": 24})
    full = starting_model(config).get_parameter(name)
    for index in range(3):
        model = LoopedLM(config)
        owner, _, leaf = name.rpartition(".")
        shard = nn.Parameter(torch.full_like(full.chunk(3, dim)[index], float("nan")))
        shard.shard = (dim, index, 3)
        setattr(model.get_submodule(owner), leaf, shard)
        init_weights(model, seed=3)
        assert torch.equal(shard, full.chunk(3, dim)[index])


@pytest.mark.parametrize("name", ["embed.weight", "blocks.0.ffn.gate_proj.weight", "blocks.0.mixer.o_proj.weight"])
def test_matrices_are_normal_with_std_of_the_input_width_cut_at_three(name: str) -> None:
    value, std = initial_value(name, [400, 100], 0), 0.1
    assert value.abs().max() <= 3 * std
    assert abs(value.std() / (0.9866 * std) - 1) < 0.01  # std of a normal cut at 3
    assert abs(value.mean()) < 0.01 * std


def test_norms_start_at_one_and_gates_at_zero() -> None:
    weights = starting_model(make_config(norm="sandwich")).state_dict()
    norms = [n for n in weights if n.endswith("norm.weight")]
    assert len(norms) == 2 * 4 + 1 + 1  # two sandwich blocks, one Gated DeltaNet output norm, the final norm
    assert all((weights[n] == 1).all() for n in norms)
    for name in ("loop_gate.rho", "blocks.1.mixer.gate_proj.weight"):
        assert (weights[name] == 0).all()
    assert (weights["blocks.0.ffn.gate_proj.weight"] != 0).all()


def test_decay_starts_in_the_published_ranges() -> None:
    a = initial_value("blocks.0.mixer.A_log", [4000], 0, GatedDelta.fills["A_log"]).exp()
    dt = F.softplus(initial_value("blocks.0.mixer.dt_bias", [4000], 0, GatedDelta.fills["dt_bias"]))
    assert 0 < a.min() < 0.1
    assert 15.9 < a.max() <= 16
    assert abs(a.mean() - 8) < 0.3
    assert 0.999e-3 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.1
