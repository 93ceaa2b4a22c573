"""Learning-rate schedules at their ends and corners; which parameters decay, name by name."""

import itertools
import math

import pytest
import torch
from torch import nn

from loopline.models.config import MIXERS, ModelConfig
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.config import OptimizerSection
from loopline.pretrain.optimizer import build_adamw, has_weight_decay, learning_rate, set_learning_rate
from tests.unit.small_mixers import SMALL

SCHEDULES = ("cosine", "wsd", "constant")
PEAK = 3e-3


def curve(total_steps: int, **settings: object) -> list[float]:
    config = OptimizerSection(lr=PEAK, **settings)
    return [learning_rate(step, total_steps, config) for step in range(total_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [1, 2, 63])
def test_warmup_rises_linearly_from_above_zero_to_the_peak(schedule: str, warmup_steps: int) -> None:
    rates = curve(257, schedule=schedule, warmup_steps=warmup_steps)
    assert rates[0] == pytest.approx(PEAK / warmup_steps)
    assert rates[:warmup_steps] == pytest.approx([PEAK * (i + 1) / warmup_steps for i in range(warmup_steps)])
    assert max(rates) == rates[warmup_steps] == PEAK


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_is_the_peak(schedule: str) -> None:
    assert curve(65, schedule=schedule)[0] == PEAK


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(2, 0), (63, 0), (64, 5), (257, 50)])
def test_last_step_equals_the_floor(schedule: str, min_lr_ratio: float, total_steps: int, warmup_steps: int) -> None:
    rates = curve(total_steps, schedule=schedule, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    assert rates[-1] == pytest.approx(PEAK * min_lr_ratio, abs=1e-18)
    assert learning_rate(
        total_steps + 100, total_steps, OptimizerSection(lr=PEAK, schedule=schedule, min_lr_ratio=min_lr_ratio)
    ) == pytest.approx(PEAK * min_lr_ratio, abs=1e-18)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(2, 0), (63, 0), (64, 5), (257, 50)])
def test_rate_never_falls_in_warmup_and_never_rises_after(schedule: str, total_steps: int, warmup_steps: int) -> None:
    rates = curve(total_steps, schedule=schedule, warmup_steps=warmup_steps)
    assert all(a <= b for a, b in itertools.pairwise(rates[:warmup_steps]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup_steps:]))
    assert all(0 < rate <= PEAK and math.isfinite(rate) for rate in rates)


def test_wsd_holds_then_falls_linearly_over_the_last_share() -> None:
    rates = curve(100, schedule="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.1)
    assert rates[9:80] == [PEAK] * 71
    falls = [a - b for a, b in itertools.pairwise(rates[79:])]
    assert falls == pytest.approx([0.9 * PEAK / 20] * 20)


def test_cosine_is_half_way_in_the_middle() -> None:
    rates = curve(101, schedule="cosine", min_lr_ratio=0.0)
    assert rates[50] == pytest.approx(PEAK / 2)
    assert rates[25] == pytest.approx(PEAK * 0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_stays_at_the_peak() -> None:
    assert set(curve(65, schedule="constant", warmup_steps=3)[3:]) == {PEAK}


# Weight decay. Every name is written out: a new parameter must be put in one of the two on purpose.
ATTENTION = ("q_proj", "k_proj", "v_proj", "gate_proj", "o_proj")
DELTA = ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj")
CONVS = ("q_conv", "k_conv", "v_conv")
DECAYS = {
    mixer: {**{f"{p}.weight": True for p in matrices}, **dict.fromkeys(others, False)}
    for mixer, matrices, others in (
        ("full", ATTENTION, ()),
        ("window", ATTENTION, ()),
        ("gdn", (*DELTA, "a_proj", "g_proj"), (*CONVS, "A_log", "dt_bias", "o_norm.weight")),
        (
            "kda",
            (*DELTA, "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"),
            (*CONVS, "A_log", "dt_bias", "o_norm.weight"),
        ),
        ("deltanet", DELTA, (*CONVS, "o_norm.weight")),
        (
            "mamba2",
            ("z_proj", "x_proj", "b_proj", "c_proj", "dt_proj", "o_proj"),
            (
                *(f"{n}_conv{suffix}" for n in "xbc" for suffix in ("", "_bias")),
                "A_log",
                "dt_bias",
                "D",
                "o_norm.weight",
            ),
        ),
        (
            "gla",
            ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gk_a_proj", "gk_b_proj"),
            ("gk_bias", "o_norm.weight"),
        ),
        ("hgrn2", ("q_proj", "f_proj", "i_proj", "o_proj"), ("o_norm.weight",)),
        ("retnet", ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"), ("o_norm.weight",)),
        ("nsa", (*ATTENTION, "g_proj"), ("k_pool", "v_pool")),
        (
            "dsa",
            (*ATTENTION, "index_q_proj", "index_k_proj", "index_w_proj"),
            ("index_k_norm.weight", "index_k_norm.bias"),
        ),
    )
}
BLOCK_DECAYS = {
    **{f"ffn.{p}_proj.weight": True for p in ("gate", "up", "down")},
    **{f"{n}.weight": False for n in ("mixer_norm", "ffn_norm", "mixer_out_norm", "ffn_out_norm")},
}
TOP_DECAYS = {"embed.weight": True, "head.weight": True, "final_norm.weight": False, "loop_gate.rho": False}


def named_parameters(mixer: str) -> dict[str, nn.Parameter]:
    config = ModelConfig(pattern=mixer, n_blocks=1, norm="sandwich", update="gate", vocab_size=64, **SMALL)
    return dict(LoopedLM(config).named_parameters())


@pytest.mark.parametrize("mixer", MIXERS)
def test_weight_decay_of_every_parameter_of_every_mixer(mixer: str) -> None:
    expected = {
        **TOP_DECAYS,
        **{f"blocks.0.{name}": decays for name, decays in BLOCK_DECAYS.items()},
        **{f"blocks.0.mixer.{name}": decays for name, decays in DECAYS[mixer].items()},
    }
    assert {name: has_weight_decay(name) for name in named_parameters(mixer)} == expected


@pytest.mark.parametrize("mixer", MIXERS)
def test_adamw_holds_every_parameter_once_with_the_decay_of_its_name(mixer: str) -> None:
    parameters = named_parameters(mixer)
    config = OptimizerSection(lr=PEAK, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-7)
    optimizer = build_adamw(parameters, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters) == len(decay)
    assert {n: decay[id(p)] for n, p in parameters.items()} == {
        name: 0.3 if has_weight_decay(name) else 0.0 for name in parameters
    }
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (PEAK, (0.8, 0.9), 1e-7)


@pytest.mark.parametrize("names", [["final_norm.weight"], ["head.weight"]])
def test_a_stage_with_one_kind_of_parameter_has_one_group(names: list[str]) -> None:
    optimizer = build_adamw({name: nn.Parameter(torch.zeros(2)) for name in names}, OptimizerSection())
    assert len(optimizer.param_groups) == 1


def test_setting_the_rate_reaches_every_group() -> None:
    optimizer = build_adamw(named_parameters("gdn"), OptimizerSection())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
