"""The run's config: recipes, overrides, and every combination that cannot run refused with its numbers."""

import operator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from loopline.pretrain.build import chosen_backends
from loopline.pretrain.config import config_from_tree, load_config, parse_recompute, recipe_names
from loopline.pretrain.errors import ConfigError
from loopline.pretrain.plan import describe


def problems_of(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    """The lines of a message, one a problem."""
    return str(error.value).split("\n  - ")[1:]


def refusal(world_size: int, *overrides: str) -> list[str]:
    """What `debug` with these overrides is refused for on so many ranks."""
    with pytest.raises(ConfigError) as error:
        load_config("debug", list(overrides)).validate_for(world_size)
    return problems_of(error)


# Recipes.


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_runs_on_its_own_layout(name: str) -> None:
    config = load_config(name)
    world_size = config.parallel.tp * config.parallel.pp
    config.validate_for(world_size)
    assert config.micro_batches(world_size) >= 1
    assert "stage map:" in describe(config, world_size)


def test_shipped_recipes_include_the_two_of_the_tour() -> None:
    assert {"debug", "quickstart"} <= set(recipe_names())


def test_a_recipe_is_the_difference_from_its_base(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "debug"\n[model.full]\nn_kv_heads = 4\n[train]\nsteps = 7\n')
    mine, debug = load_config(str(recipe)), load_config("debug")
    assert (mine.model.full.n_kv_heads, mine.train.steps) == (4, 7)
    assert mine.model.full.n_heads == debug.model.full.n_heads  # other keys of a changed table stay
    unchanged = {"model": {"full": {"n_kv_heads"}}, "train": {"steps"}}
    assert mine.model_dump(exclude=unchanged) == debug.model_dump(exclude=unchanged)


def test_bases_chain_and_are_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.toml").write_text('base = "debug"\n[train]\nsteps = 7\nseq_len = 32\n')
    (tmp_path / "sub" / "two.toml").write_text('base = "../one.toml"\n[train]\nsteps = 9\n')
    config = load_config(str(tmp_path / "sub" / "two.toml"))
    assert (config.train.steps, config.train.seq_len, config.model.vocab_size) == (9, 32, 4096)


@pytest.mark.parametrize("back", ["a.toml", "./a.toml", "../{folder}/a.toml"])
def test_recipes_that_start_from_each_other_are_refused(tmp_path: Path, back: str) -> None:
    (tmp_path / "a.toml").write_text('base = "b.toml"\n')
    (tmp_path / "b.toml").write_text(f'base = "{back.format(folder=tmp_path.name)}"\n')
    with pytest.raises(ConfigError, match=r"circle: .*a\.toml -> .*b\.toml -> .*a\.toml"):
        load_config(str(tmp_path / "a.toml"))


def test_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'debgu' \(did you mean debug\?\).*debug, .*quickstart"):
        load_config("debgu")


def test_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml does not exist; shipped recipes: debug"):
        load_config(str(tmp_path / "gone.toml"))


@pytest.mark.parametrize("text", ["[model", "base = 3\n", "base = ['debug']\n"])
def test_a_broken_recipe_is_a_config_error(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "broken.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_config(str(recipe))


# Keys and values.


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.n_loop=3", "model.n_loops"),
        ("model.ful.n_heads=3", "model.full"),
        ("model.full.nheads=3", "model.full.n_heads"),
        ("model.gdn.conv_siz=3", "model.gdn.conv_size"),
        ("trian.steps=3", "train"),
        ("train.stesp=3", "train.steps"),
        ("optimizer.learning_rate=1", None),
        ("optimizer.warmup=1", "optimizer.warmup_steps"),
        ("parallel.zero=1", "parallel.zero_stage"),
        ("data.lane=1", "data.lanes"),
        ("checkpoint.evry=1", "checkpoint.every"),
        ("eval.batch=1", "eval.batches"),
        ("log.peak_tflop=1", "log.peak_tflops"),
        ("run.sed=1", "run.seed"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("debug", [override])
    (problem,) = problems_of(error)
    key = override.partition("=")[0]
    assert problem.startswith("unknown key ")
    assert key.startswith(problem.split()[2].rstrip(";"))
    assert nearest is None or f"(did you mean {nearest}?)" in problem
    assert "; known: " in problem


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=0", ["train.steps = 0", "greater than or equal to 1"]),
        ("train.steps=1.5", ["train.steps = 1.5"]),
        ("train.dtype=fp16", ["train.dtype = 'fp16'", "fp32", "bf16"]),
        ("optimizer.lr=0", ["optimizer.lr = 0"]),
        ("optimizer.lr=nan", ["optimizer.lr = nan"]),
        ("optimizer.lr=inf", ["optimizer.lr = inf"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage = 4"]),
        ("model.update=sum", ["model.update = 'sum'", "replace"]),
        ("model.pattern=gdm", ["unknown mixer 'gdm'", "full, window, gdn"]),
        ("parallel.recompute=some", ["parallel.recompute is 'some'", "'none', 'all', or 'loops:0,1'"]),
        ("model.full.n_heads=5", ["model.d_model (64)", "model.full.n_heads (5)"]),
        ("model=3", ["model = 3"]),
        ("model.window.window=1", ["model.window.window = 1", "greater than or equal to 2"]),
        ("model.nsa.n_selected=2", ["model.nsa.n_selected = 2", "greater than or equal to 3"]),
        ("model.nsa.block_size=0", ["model.nsa.block_size = 0", "greater than or equal to 1"]),
        ("model.dsa.top_k=0", ["model.dsa.top_k = 0", "greater than or equal to 1"]),
        ("model.dsa.selection_tile=0", ["model.dsa.selection_tile = 0", "greater than or equal to 1"]),
        ("model.nsa.backend=fla", ["model.nsa.backend = 'fla'", "'auto' or 'reference'"]),
        ("model.dsa.backend=sdpa", ["model.dsa.backend = 'sdpa'", "'auto', 'triton' or 'reference'"]),
        ("model.gla.backend=sdpa", ["model.gla.backend = 'sdpa'", "'auto', 'reference' or 'fla'"]),
        ("model.window.backend=flash", ["model.window.backend = 'flash'", "'sdpa', 'fla', 'triton', 'flex' or"]),
    ],
)
def test_bad_value_is_refused_with_field_value_and_rule(override: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("debug", [override])
    assert all(text in str(error.value) for text in named), error.value


SOFTMAX = ("full", "window", "nsa", "dsa")
WITH_FLA = ("gdn", "kda", "deltanet", "mamba2", "gla", "hgrn2", "retnet", "full", "window")
# Mixer, settings it cannot serve, and what the message must say; MIXER stands for model.NAME.
UNSERVED = [
    *((name, ["n_heads=4", "n_kv_heads=3"], ["MIXER.n_heads (4)", "MIXER.n_kv_heads (3)"]) for name in SOFTMAX),
    *((name, ["n_heads=5"], ["model.d_model (64)", "MIXER.n_heads (5)", "MIXER.d_head"]) for name in SOFTMAX),
    *((name, ["d_head=7"], ["MIXER.d_head (7)", "must be even"]) for name in SOFTMAX),
    ("retnet", ["d_head_k=7"], ["MIXER.d_head_k (7)", "must be even"]),
    ("dsa", ["index_d_rope=66"], ["MIXER.index_d_rope (66)", "MIXER.index_d_head (64)"]),
    ("dsa", ["index_d_rope=5"], ["MIXER.index_d_rope (5)", "must be even"]),
    ("dsa", ["selection_tile=129"], ["MIXER.selection_tile (129)", "at most 128", "lower it", "MIXER.backend"]),
    ("dsa", ["selection_tile=1", "d_head=258"], ["MIXER.d_head (258)", "at most 256", "MIXER.selection_tile"]),
    ("dsa", ["selection_tile=33", "n_kv_heads=1"], ["MIXER.selection_tile (33)", "4 query heads", "at most 128"]),
    ("dsa", ["selection_loops=[1, 2]"], ["MIXER.selection_loops ([1, 2])", "rise from 0", "start with 0"]),
    ("dsa", ["selection_loops=[0, 2, 1]"], ["MIXER.selection_loops ([0, 2, 1])", "rise from 0"]),
    ("dsa", ["selection_loops=[0, 0]"], ["MIXER.selection_loops ([0, 0])", "rise from 0"]),
    ("dsa", ["selection_loops=[]"], ["MIXER.selection_loops ([])", "rise from 0"]),
    ("mamba2", ["n_groups=3"], ["MIXER.n_heads (4)", "MIXER.n_groups (3)"]),
    *(
        (name, [f"backend={backend}", "d_head_k=257"], ["MIXER.d_head_k (257)", "256", f"MIXER.backend = '{backend}'"])
        for name in ("gdn", "kda", "deltanet")
        for backend in ("auto", "fla")
    ),
    *((name, ["backend=fla", "d_head=258"], ["MIXER.d_head (258)", "256", "'sdpa'"]) for name in ("full", "window")),
    *((name, ["backend=triton", "d_head=24"], ["MIXER.d_head (24)", "of 16 up to 256"]) for name in ("full", "window")),
    ("gdn", ["backend=triton", "d_head_k=48"], ["MIXER.d_head_k (48)", "of 32 up to 256", "MIXER.backend = 'triton'"]),
    ("gdn", ["backend=triton", "d_head_v=288"], ["MIXER.d_head_v (288)", "of 32 up to 256"]),
]


@pytest.mark.parametrize(("mixer", "settings", "named"), UNSERVED)
def test_settings_a_mixer_cannot_serve_are_refused_where_the_model_has_it(
    mixer: str, settings: list[str], named: list[str]
) -> None:
    overrides = [f"model.{mixer}.{setting}" for setting in settings]
    with pytest.raises(ConfigError) as error:
        load_config("debug", [f"model.pattern={mixer}", *overrides])
    (problem,) = problems_of(error)
    assert all(text.replace("MIXER", f"model.{mixer}") in problem for text in named), problem
    load_config("debug", [f"model.pattern={'gdn' if mixer != 'gdn' else 'full'}", *overrides])


def test_heads_that_fla_has_no_kernel_for_run_on_other_backends() -> None:
    for mixer in ("gdn", "kda", "deltanet"):
        settings = [f"model.pattern={mixer}", f"model.{mixer}.d_head_k=257", f"model.{mixer}.backend=reference"]
        load_config("debug", settings).validate_for(1)
    load_config("debug", ["model.pattern=full", "model.full.d_head=258"]).validate_for(1)  # auto is sdpa everywhere


@pytest.mark.parametrize("mixer", WITH_FLA)
def test_fla_on_the_cpu_is_refused_with_the_backends_there_are(mixer: str) -> None:
    config = load_config("debug", [f"model.pattern={mixer}", f"model.{mixer}.backend=fla"])
    with pytest.raises(ConfigError) as error:
        chosen_backends(config, torch.device("cpu"))
    others = "sdpa, reference" if mixer in SOFTMAX else "reference"
    named = [f"model.{mixer}.backend = 'fla'", "not available on cpu", f"; available: {others} "]
    assert all(text in str(error.value) for text in named), error.value


def test_several_bad_keys_and_values_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config("debug", ["train.stesp=1", "train.seq_len=0", "optimizer.lr=-1", "model.n_loops=0", "modle.x=1"])
    assert len(problems_of(error)) == 5


def test_config_is_frozen_and_comes_back_from_its_dump() -> None:
    config = load_config("quickstart")
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3
    assert config_from_tree(config.model_dump(mode="json")) == config


# Overrides.


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.dtype=bf16", "train.dtype", "bf16"),
        ('train.dtype="bf16"', "train.dtype", "bf16"),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel", True),
        ("model.pattern=gdn*3,full", "model.pattern", "gdn*3,full"),
        ("run.dir=/tmp/a=b", "run.dir", "/tmp/a=b"),
        ("model.full.d_head=6", "model.full.d_head", 6),
        ("parallel.recompute=none", "parallel.recompute", "none"),  # a word, not "no value"
        ("model.full.n_kv_heads=none", "model.full.n_kv_heads", None),
        (" train.steps =7", "train.steps", 7),
    ],
)
def test_override_sets_its_field_with_its_type(override: str, field: str, value: object) -> None:
    found: object = load_config("debug", [override])
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins() -> None:
    assert load_config("debug", ["train.steps=7", "train.steps=9"]).train.steps == 9


@pytest.mark.parametrize("override", ["train.steps", "=3", " =3", ""])
def test_override_without_field_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"must read section\.field=value"):
        load_config("debug", [override])


def test_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps is a value, not a section"):
        load_config("debug", ["train.steps.x=3"])


def test_none_is_taken_where_a_field_may_be_none_and_is_a_word_elsewhere() -> None:
    optional = ["train.stop_at_step", "checkpoint.init_from", "model.dsa.selection_loops", "model.window.n_kv_heads"]
    config = load_config("debug", [f"{path}=none" for path in optional])
    for path in optional:
        assert operator.attrgetter(path)(config) is None
    for path in ("run.dir", "parallel.recompute"):
        assert operator.attrgetter(path)(load_config("debug", [f"{path}=none"])) == "none"
    with pytest.raises(ConfigError, match=r"train\.steps = 'none'"):
        load_config("debug", ["train.steps=none"])
    with pytest.raises(ConfigError, match=r"unknown key modle"):
        load_config("debug", ["modle.full.d_head=none"])


# Recomputation.


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("none", frozenset()),
        ("all", None),
        ("loops:0", frozenset({0})),
        ("loops:0,2", frozenset({0, 2})),
        ("loops: 1 , 2", frozenset({1, 2})),
        ("loops:1,1", frozenset({1})),
    ],
)
def test_recompute_setting_is_read(text: str, loops: frozenset[int] | None) -> None:
    assert parse_recompute(text) == loops


@pytest.mark.parametrize("text", ["", "All", "loops", "loops:", "loops:a", "loops:-1", "loops:0,,1", "loop:0", "0,1"])
def test_bad_recompute_setting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"use 'none', 'all', or 'loops:0,1'"):
        parse_recompute(text)


# Layouts.

TP2, TP4, PP2 = "parallel.tp=2", "parallel.tp=4", "parallel.pp=2"
REFUSED = {
    "world not a multiple of tp * pp": (3, [TP2], ["parallel.tp * parallel.pp = 2 * 1", "world size 3"]),
    "world smaller than tp * pp": (1, [TP2, PP2], ["parallel.tp * parallel.pp = 2 * 2", "world size 1"]),
    "key/value heads": (4, [TP4], ["model.full.n_kv_heads = 2", "parallel.tp = 4"]),
    "Gated DeltaNet heads": (2, [TP2, "model.gdn.n_heads=3"], ["model.gdn.n_heads = 3", "parallel.tp = 2"]),
    "Mamba-2 heads": (
        2,
        [TP2, "model.pattern=mamba2", "model.mamba2.n_heads=3"],
        ["model.mamba2.n_heads = 3", "tp = 2"],
    ),
    "Mamba-2 groups": (
        2,
        [TP2, "model.pattern=mamba2", "model.mamba2.n_heads=6", "model.mamba2.n_groups=3"],
        ["model.mamba2.n_groups = 3", "parallel.tp = 2"],
    ),
    "heads of sparse attention": (
        2,
        [TP2, "model.pattern=nsa", "model.nsa.n_kv_heads=1"],
        ["model.nsa.n_kv_heads = 1", "parallel.tp = 2"],
    ),
    "a choice in a loop that does not run": (
        1,
        ["model.pattern=dsa", "model.dsa.selection_loops=[0, 3]"],
        ["model.dsa.selection_loops = [0, 3]", "model.n_loops = 3", "0..2"],
    ),
    "odd Mamba-2 heads in bf16": (
        1,
        ["model.pattern=mamba2", "model.mamba2.d_state=5", "train.dtype=bf16"],
        ["model.mamba2.d_state = 5", "even", "train.dtype = 'bf16'", "model.mamba2.backend = 'auto'"],
    ),
    "odd RetNet heads in bf16": (
        1,
        ["model.pattern=retnet", "model.retnet.d_head_v=9", "train.dtype=bf16", "model.retnet.backend=fla"],
        ["model.retnet.d_head_v = 9", "even", "train.dtype = 'bf16'", "model.retnet.backend = 'fla'"],
    ),
    "FFN": (2, [TP2, "model.d_ffn=177"], ["model.d_ffn = 177", "parallel.tp = 2"]),
    "vocabulary": (2, [TP2, "model.vocab_size=4097"], ["model.vocab_size = 4097", "parallel.tp = 2"]),
    "batch and micro-batch": (
        1,
        ["train.micro_batch_sequences=3"],
        ["train.global_batch_sequences = 8", "train.micro_batch_sequences * dp = 3 * 1 = 3"],
    ),
    "batch and dp": (
        2,
        ["train.micro_batch_sequences=8"],
        ["train.global_batch_sequences = 8", "train.micro_batch_sequences * dp = 8 * 2 = 16"],
    ),
    "micro-batches and pp": (
        2,
        [PP2, "train.global_batch_sequences=12", "train.micro_batch_sequences=4"],
        ["3 micro-batches", "parallel.pp = 2", "12 / (4 * dp 1)"],
    ),
    "lanes and dp": (
        3,
        ["train.global_batch_sequences=24"],
        ["data.lanes = 4", "data-parallel size 3"],
    ),
    "lanes and batch": (
        1,
        ["train.global_batch_sequences=6"],
        ["train.global_batch_sequences = 6", "data.lanes = 4"],
    ),
    "ZeRO 2 and pp": (2, [PP2, "parallel.zero_stage=2"], ["parallel.zero_stage = 2", "parallel.pp = 2"]),
    "ZeRO 3 and pp": (2, [PP2, "parallel.zero_stage=3"], ["parallel.zero_stage = 3", "parallel.pp = 2"]),
    "more stages than blocks": (
        4,
        ["parallel.pp=4"],
        ["parallel.pp = 4", "model.n_blocks = 2"],
    ),
    "sequence parallel alone": (
        1,
        ["parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel = true", "parallel.tp > 1"],
    ),
    "sequence parallel and an odd row": (
        2,
        [TP2, "parallel.sequence_parallel=true", "train.micro_batch_sequences=1", "train.seq_len=61"],
        ["train.micro_batch_sequences * train.seq_len = 61", "parallel.tp = 2"],
    ),
    "stop after the end": (1, ["train.stop_at_step=11"], ["train.stop_at_step = 11", "train.steps = 10"]),
    "recompute of a loop that does not run": (
        1,
        ["parallel.recompute=loops:1,3"],
        ["parallel.recompute = 'loops:1,3'", "model.n_loops = 3", "0..2"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_run_is_refused_with_its_numbers_and_for_nothing_else(case: str) -> None:
    world_size, overrides, named = REFUSED[case]
    (problem,) = refusal(world_size, *overrides)
    assert all(text in problem for text in named), problem
    assert ": " in problem  # what to change follows


def test_heads_that_do_not_divide_are_refused() -> None:
    # tp divides n_heads wherever it divides n_kv_heads, so both lines come together.
    full = ["model.full.n_heads=3", "model.full.n_kv_heads=3", "model.full.d_head=8", "model.pattern=full"]
    problems = refusal(2, TP2, *full)
    assert len(problems) == 2
    for field, problem in zip(("n_heads", "n_kv_heads"), problems):
        assert problem.startswith(f"model.full.{field} = 3 must be divisible by parallel.tp = 2: ")


def test_flas_delta_rule_is_refused_in_fp32_where_it_would_run() -> None:
    fla = ("model.pattern=deltanet", "model.deltanet.backend=fla")
    (problem,) = refusal(1, *fla, "train.dtype=fp32")
    assert all(text in problem for text in ("model.deltanet.backend = 'fla'", "train.dtype = 'fp32'", "'bf16'"))
    load_config("debug", [*fla, "train.dtype=bf16"]).validate_for(1)
    load_config("debug", [fla[0], "train.dtype=fp32"]).validate_for(1)  # auto
    load_config("debug", [fla[1], "train.dtype=fp32"]).validate_for(1)  # the model has no DeltaNet


def test_several_problems_are_reported_at_once() -> None:
    problems = refusal(
        4,
        TP2,
        PP2,
        "parallel.zero_stage=3",
        "model.d_ffn=177",
        "model.gdn.n_heads=3",
        "train.micro_batch_sequences=3",
        "data.lanes=3",
        "train.stop_at_step=99",
    )
    for text in ("zero_stage", "d_ffn", "gdn.n_heads", "micro_batch_sequences", "data.lanes", "stop_at_step"):
        assert sum(text in problem for problem in problems) >= 1, text
    assert len(problems) == 6


def test_a_world_that_does_not_fit_hides_no_other_problem() -> None:
    problems = refusal(3, TP2, "train.stop_at_step=99", "parallel.recompute=loops:7", "train.global_batch_sequences=6")
    for text in ("world size 3", "stop_at_step", "recompute", "data.lanes"):
        assert sum(text in problem for problem in problems) == 1, text


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (2, [TP2, "parallel.sequence_parallel=true", "parallel.zero_stage=3"]),
        (4, [TP2, PP2, "parallel.zero_stage=1"]),
        (4, []),
        (4, [TP4, "model.pattern=gdn"]),  # full attention's two key/value heads do not matter without it
        (2, [PP2, "parallel.recompute=loops:0,2"]),
        (2, [TP2, "model.pattern=mamba2"]),  # one group serves the heads of every rank
        (1, ["model.pattern=dsa", "model.dsa.selection_loops=[0, 2]"]),
        (1, ["model.dsa.selection_loops=[0, 9]"]),  # the model has no dsa
        (1, ["model.pattern=mamba2", "model.mamba2.d_state=5"]),  # fp32
        (1, ["model.pattern=mamba2", "model.mamba2.d_state=5", "train.dtype=bf16", "model.mamba2.backend=reference"]),
    ],
)
def test_layouts_that_can_run_are_not_refused(world_size: int, overrides: list[str]) -> None:
    load_config("debug", overrides).validate_for(world_size)


def test_derived_numbers_follow_from_the_layout() -> None:
    config = load_config("debug", [TP2, PP2, "train.global_batch_sequences=32"])
    assert (config.dp(8), config.micro_batches(8)) == (2, 8)


def test_plan_describes_every_stage_and_the_bubble() -> None:
    config = load_config("debug", [PP2])
    text = describe(config, 2)
    assert "stage 0: embedding, blocks 0:gdn; chunks: loops 0..2" in text
    assert "stage 1: blocks 1:full, loop update, final norm, head; chunks: loops 0..2" in text
    assert "pipeline bubble: 7.7% (3 loops as virtual stages)" in text  # 1 / (3 * 4 + 1)


@pytest.mark.parametrize(
    ("recipe", "overrides", "named"),
    [
        ("debug", [], ["train.trainable = 'indexer'", "model.pattern = 'gdn,full'", "no dsa mixer"]),
        ("debug_dsa", ["parallel.pp=2"], ["train.trainable = 'indexer'", "parallel.pp = 2"]),
    ],
)
def test_warming_up_an_indexer_is_refused_where_nothing_would_train(
    recipe: str, overrides: list[str], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(recipe, ["train.trainable=indexer", *overrides]).validate_for(2)
    (problem,) = problems_of(error)
    assert all(text in problem for text in named)
    load_config("debug_dsa", ["train.trainable=indexer", "parallel.zero_stage=3"]).validate_for(2)
