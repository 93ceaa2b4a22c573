"""The loop plan partitions and numbers every step; the model's config refuses what cannot be built."""

import itertools

import pytest
from pydantic import ValidationError

from loopline.models.config import MIXERS, ModelConfig, parse_pattern
from loopline.models.loop_plan import LoopPlan, Step
from loopline.models.settings.full import FullAttentionConfig


@pytest.mark.parametrize(("n_blocks", "n_loops"), [(1, 1), (1, 5), (3, 1), (2, 3), (7, 4)])
def test_plan_runs_every_block_in_every_loop_in_order_of_depth(n_blocks: int, n_loops: int) -> None:
    plan = LoopPlan(n_blocks, n_loops)
    steps = plan.steps()
    assert len(steps) == len(set(steps)) == plan.depth == n_blocks * n_loops
    assert steps == sorted(steps, key=lambda s: (s.loop_idx, s.block_idx))
    assert {s.block_idx for s in steps} == set(range(n_blocks))
    assert {s.loop_idx for s in steps} == set(range(n_loops))


@pytest.mark.parametrize(("n_blocks", "n_loops"), [(1, 1), (1, 5), (3, 1), (2, 3), (7, 4)])
def test_every_step_has_a_slot_of_its_own(n_blocks: int, n_loops: int) -> None:
    plan = LoopPlan(n_blocks, n_loops)
    assert [plan.slot(step) for step in plan.steps()] == list(range(plan.depth))
    assert LoopPlan(4, 3).slot(Step(block_idx=1, loop_idx=2)) == 9


@pytest.mark.parametrize("n_blocks", range(1, 14))
def test_stages_partition_the_blocks_evenly_with_the_longer_ones_first(n_blocks: int) -> None:
    for n_stages in range(1, n_blocks + 1):
        stages = LoopPlan(n_blocks, 3).stage_blocks(n_stages)
        assert list(itertools.chain(*stages)) == list(range(n_blocks))
        lengths = [len(stage) for stage in stages]
        assert len(lengths) == n_stages
        assert lengths == sorted(lengths, reverse=True)
        assert max(lengths) - min(lengths) <= 1


def test_uneven_stages_by_hand() -> None:
    assert LoopPlan(7, 2).stage_blocks(3) == [range(0, 3), range(3, 5), range(5, 7)]


def test_more_stages_than_blocks_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"2 blocks cannot fill 3 stages"):
        LoopPlan(2, 9).stage_blocks(3)


@pytest.mark.parametrize(
    ("pattern", "n_blocks", "names"),
    [
        ("full", 3, ["full"] * 3),
        ("gdn*2,full", 7, ["gdn", "gdn", "full", "gdn", "gdn", "full", "gdn"]),
        ("gdn*4,full", 2, ["gdn", "gdn"]),
        (" gdn , full*1 ", 2, ["gdn", "full"]),
    ],
)
def test_pattern_repeats_to_the_number_of_blocks(pattern: str, n_blocks: int, names: list[str]) -> None:
    assert parse_pattern(pattern, n_blocks) == names
    assert ModelConfig(pattern=pattern, n_blocks=n_blocks).mixer_names == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("ful", "unknown mixer 'ful'; known: full, window, gdn"),
        ("", "unknown mixer ''"),
        ("gdn,,full", "unknown mixer ''"),
        ("gdn*0", "count '0' must be a whole number >= 1"),
        ("gdn*-1", "count '-1'"),
        ("gdn*two", "count 'two'"),
    ],
)
def test_bad_patterns_are_refused_with_what_was_found(pattern: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(pattern=pattern)
    assert message in str(error.value)
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "mixers"),
    [
        ("full,gdn...,full", "full gdn gdn gdn gdn full"),
        ("gdn...,full*2", "gdn gdn gdn gdn full full"),
        ("full*3,gdn...,window*3", "full full full window window window"),
        (("gdn", "full", "gdn", "gdn", "window", "full"), "gdn full gdn gdn window full"),
    ],
)
def test_dots_fill_and_a_list_is_taken_as_it_is(pattern: str | tuple[str, ...], mixers: str) -> None:
    assert ModelConfig(pattern=pattern, n_blocks=6).mixer_names == mixers.split()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("full...,gdn...", "one item may end in '...'"),
        ("full*2...", "count '2...'"),
        ("full*4,gdn...,full*3", "names 7 blocks beside '...' and model.n_blocks is 6"),
        (("full", "gdn"), "lists 2 mixers and model.n_blocks is 6"),
        (("full", "gdn", "gdn", "gdn", "gdn", "gdm"), "unknown mixer 'gdm'"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_with_both_numbers(pattern: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig(pattern=pattern, n_blocks=6)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"d_model": 30, "full": FullAttentionConfig(n_heads=4)}, ["d_model (30)", "n_heads (4)", "d_head"]),
        ({"d_model": 12, "full": FullAttentionConfig(n_heads=4)}, ["d_head (3)", "even"]),
        ({"full": FullAttentionConfig(n_heads=4, n_kv_heads=3)}, ["n_heads (4)", "n_kv_heads (3)"]),
    ],
)
def test_heads_that_do_not_fit_are_refused_with_both_numbers(settings: dict, named: list[str]) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig(**settings)
    assert all(text in str(error.value) for text in named), error.value
    ModelConfig(**settings, pattern="gdn")  # without full attention its sizes do not matter


@pytest.mark.parametrize("field", ["vocab_size", "d_model", "n_blocks", "n_loops", "d_ffn", "norm_eps"])
def test_sizes_below_their_least_are_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        ModelConfig(**{field: 0})


def test_config_is_frozen_and_strict_about_keys() -> None:
    config = ModelConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.n_loops = 3
    with pytest.raises(ValidationError, match="n_loop"):
        ModelConfig(n_loop=3)
    with pytest.raises(ValidationError, match="heads"):
        ModelConfig(full={"heads": 3})


def test_every_mixer_name_has_a_section_of_the_config() -> None:
    assert set(MIXERS) <= set(ModelConfig.model_fields)
