"""bf16 for every mixer: parameters and gradients are fp32, and errors are those of numbers rounded to bf16."""

import pytest
import torch
from model_cases import EVERY_MIXER, add_gradients, make_config, moved_model, tokens_of
from torch import Tensor

from loopline.models.config import ModelConfig
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers.registry import MIXER_MODULES
from tests.tolerances import TOLERANCES, rms_ratio
from tests.unit.small_mixers import SMALL

N_TOKENS = 257
# These choose keys by score, and rounding rightly turns a close choice: here they keep every key. Choices of a bf16
# model are its own; tests of the mixers and kernels hold them to the scores.
KEEPS_ALL = {"nsa": {"n_selected": 86}, "dsa": {"top_k": N_TOKENS}}  # blocks of 3 tokens
# q and k of GLA and RetNet have any length, so a document's first output (q.k) v may be near zero, where the slope of
# the norm after it is 1 / eps^0.5. At 1e-3 that one token can be most of the gradient, and then rounding the weights of
# an fp32 model changes it as much as bf16 does: both by 0.7 of its size at worst over eight seeds.
NORM_EPS = {"gla": 0.3, "retnet": 0.3}


def keeping_all(config: ModelConfig) -> ModelConfig:
    """The config with no key left out by choice."""
    names = KEEPS_ALL.keys() & set(config.mixer_names)
    return config.model_copy(update={name: SMALL[name].model_copy(update=KEEPS_ALL[name]) for name in names})


def wider(name: str, norm: str, n_loops: int) -> ModelConfig:
    """Heads of 24 or more where the mixer has a state: narrower heads magnify the rounding of any input."""
    sizes = {"d_head_k": 24, "d_head_v": 48} if hasattr(SMALL[name], "d_head_k") else {}
    if name == "mamba2":
        sizes = {"d_head": 24, "d_state": 24}
    settings = SMALL[name].model_copy(update={**sizes, **KEEPS_ALL.get(name, {})})
    eps = NORM_EPS.get(name, 1e-3)
    return make_config(
        pattern=name, norm=norm, update="replace", n_loops=n_loops, d_model=128, norm_eps=eps, **{name: settings}
    )


def rounded_model(config: ModelConfig) -> LoopedLM:
    """fp32 throughout but for its weights, which are rounded to bf16: the least error a bf16 model could have."""
    model = moved_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def gradients_of(model: LoopedLM) -> dict[str, Tensor]:
    """Every gradient of logits at all loops, and of the losses mixers have of their own."""
    tokens = tokens_of(1, N_TOKENS)
    shape = (model.config.n_loops, *tokens.shape, model.config.vocab_size)
    add_gradients(model, tokens, [0, N_TOKENS], torch.randn(shape, generator=torch.Generator().manual_seed(7)))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def together(gradients: dict[str, Tensor], sizes: dict[str, Tensor]) -> Tensor:
    """All gradients end to end, each over its size: a small one counts as much as a large one."""
    return torch.cat([(gradients[name] / size).flatten() for name, size in sizes.items()])


@pytest.mark.parametrize("config", EVERY_MIXER.values(), ids=EVERY_MIXER)
def test_logits_after_every_loop_err_by_little_more_than_rounded_weights_make_them(config: ModelConfig) -> None:
    config, tokens = keeping_all(config), tokens_of(1, N_TOKENS)
    models = (moved_model(config), moved_model(config, torch.bfloat16), rounded_model(config))
    with torch.no_grad():
        expected, found, reachable = (model.forward_depths(tokens, depths=[1, 2, 3]) for model in models)
    assert {x.dtype for x in found} == {torch.bfloat16}
    for a, b, c in zip(expected, found, reachable):
        assert rms_ratio(b, a) <= TOLERANCES["bf16", "weight_rounding"] * rms_ratio(c, a)


@pytest.mark.parametrize("norm", ["pre", "sandwich"])
@pytest.mark.parametrize("name", MIXER_MODULES)
def test_gradients_of_one_loop_stay_close_and_are_fp32(name: str, norm: str) -> None:
    config = wider(name, norm, n_loops=1)
    expected, found = (gradients_of(moved_model(config, dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    sizes = {name: gradient.square().mean().sqrt() for name, gradient in expected.items()}
    assert rms_ratio(together(found, sizes), together(expected, sizes)) <= TOLERANCES["bf16", "gradients"]


@pytest.mark.parametrize("name", MIXER_MODULES)
def test_gradients_of_two_loops_err_by_little_more_than_rounded_weights_make_them(name: str) -> None:
    config = wider(name, "pre", n_loops=2)
    models = (moved_model(config), moved_model(config, torch.bfloat16), rounded_model(config))
    gradients = [gradients_of(model) for model in models]
    sizes = {name: gradient.square().mean().sqrt() for name, gradient in gradients[0].items()}
    expected, found, reachable = (together(each, sizes) for each in gradients)
    assert rms_ratio(found, expected) <= TOLERANCES["bf16", "weight_rounding"] * rms_ratio(reachable, expected)


@pytest.mark.parametrize("name", MIXER_MODULES)
def test_a_weight_gradient_is_summed_over_loops_in_fp32(name: str) -> None:
    model = moved_model(make_config(pattern=name, update="replace"), torch.bfloat16)
    model(tokens_of(1, 33)).float().square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        # A sum kept in bf16 would be a bf16 number; a sum of several fp32 terms almost never is.
        if parameter_name.endswith("_proj.weight") and ".index_" not in parameter_name:
            assert (parameter.grad != parameter.grad.bfloat16().float()).float().mean() > 0.5, parameter_name
