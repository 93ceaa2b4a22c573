"""Published models as recipes: sizes, schedules and parameter counts."""

import pytest
import torch

from loopline.models.flops import model_parameters
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.config import load_config, recipe_names
from loopline.pretrain.parallel.plans import MIXER_PLANS

SIZES = ("lt2_600m", "lt2_1b")
ALONE = ("full", "gdn", "kda", "mamba2", "deltanet", "retnet", "hgrn2", "window", "nsa", "dsa")
HYBRIDS = {
    "full+gdn": {"gdn": 17, "full": 4},
    "full+gdn-bookend": {"gdn": 17, "full": 4},
    "gdn+dsa": {"gdn": 17, "dsa": 4},
}
LT2 = [f"{size}-{name}" for size in SIZES for name in (*ALONE, *HYBRIDS)]
OURO = {"ouro_1b4": 1_434_652_673, "ouro_2b6": 2_667_974_657}


def count(recipe: str) -> int:
    config = load_config(recipe).model
    with torch.device("meta"):
        model = LoopedLM(config)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == model_parameters(config)
    return counted


def test_every_published_variant_has_a_recipe() -> None:
    assert {*LT2, *SIZES, *OURO} == {name for name in recipe_names() if name.startswith(("lt2", "ouro"))}


@pytest.mark.parametrize("recipe", [*LT2, *OURO])
def test_recipe_builds_on_the_meta_device_and_runs_on_eight_ranks(recipe: str) -> None:
    config = load_config(recipe)
    config.validate_for(8)
    assert config.run.dir == f"runs/{recipe}"
    assert count(recipe) > 3e8
    for mixer in config.model.mixer_names:
        assert mixer in MIXER_PLANS
    tensor_parallel = [f"parallel.tp={2 if 'nsa' not in recipe else 1}"]
    load_config(recipe, tensor_parallel).validate_for(8)


@pytest.mark.parametrize(("recipe", "published"), OURO.items())
def test_ouro_counts_the_published_parameters(recipe: str, published: int) -> None:
    assert count(recipe) == published


def test_looped_gdn_counts_what_an_instance_of_the_reference_implementation_has() -> None:
    """445,771,024 (a third party's count of the released recipe), which leaves out the loop gate's 4 x 1024."""
    assert count("lt2_600m-gdn") == 445_771_024 + 4 * 1024


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        ("lt2_1b-gdn", 1255),  # 21 Gated DeltaNet layers
        ("lt2_1b-full+gdn", 1222),  # 17 and 4
        ("lt2_600m-gdn", 314),
    ],
)
def test_parameters_beside_the_embedding_are_the_published_millions(recipe: str, millions: int) -> None:
    config = load_config(recipe).model
    beside = count(recipe) - config.vocab_size * config.d_model
    assert abs(beside / 1e6 - millions) < 3  # the source rounds, and leaves small parameters out


@pytest.mark.parametrize("size", SIZES)
def test_hybrids_have_the_published_ratio(size: str) -> None:
    for name, expected in HYBRIDS.items():
        mixers = load_config(f"{size}-{name}").model.mixer_names
        assert {mixer: mixers.count(mixer) for mixer in expected} == expected
    bookend = load_config(f"{size}-full+gdn-bookend").model.mixer_names
    assert bookend[0] == bookend[-1] == "full"


@pytest.mark.parametrize("recipe", LT2)
def test_lt2_recipes_train_as_published(recipe: str) -> None:
    config = load_config(recipe)
    train, optimizer, model = config.train, config.optimizer, config.model
    assert train.global_batch_sequences * train.seq_len == 393_216
    assert train.steps * train.global_batch_sequences * train.seq_len == pytest.approx(100.27e9, rel=1e-3)
    assert (optimizer.lr, optimizer.min_lr_ratio, optimizer.warmup_steps) == (3e-4, 1e-6, 10_000)
    assert (model.n_blocks, model.n_loops, model.update, model.norm) == (21, 4, "gate", "pre")
    assert (model.gdn.d_head_k, model.gdn.d_head_v) == (96, 192)
    assert model.gdn.d_head_k * model.gdn.n_heads == 0.75 * model.d_model
    assert model.full.n_heads == model.d_model // 128
    assert model.window.window == (256 if "600m" in recipe else 2048)
