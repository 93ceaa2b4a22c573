"""The Mamba-2 mixer is transformers', with weights mapped across; a rank that holds some heads makes its part of it."""

import copy
import inspect
import itertools

import pytest
import torch
from model_cases import context_of, make_config, moved_model
from torch import Tensor, nn

from loopline.models.mixers.mamba2 import Mamba2
from loopline.models.settings.mamba2 import Mamba2Config
from tests.tolerances import TOLERANCES, rms_ratio

# n_heads, d_head, d_state, n_groups, conv_size; n_heads * d_head = 48.
SIZES = [(6, 8, 5, 1, 4), (6, 8, 5, 2, 3), (4, 12, 16, 4, 4), (3, 16, 1, 3, 2), (1, 48, 7, 1, 4)]


def mixer_of(n_heads: int, d_head: int, d_state: int, n_groups: int, conv_size: int) -> Mamba2:
    sizes = Mamba2Config(n_heads=n_heads, d_head=d_head, d_state=d_state, n_groups=n_groups, conv_size=conv_size)
    # At a small eps the gradients of short documents are what the norm's cancellation leaves.
    mixer = moved_model(make_config(pattern="mamba2", norm_eps=0.1, mamba2=sizes)).blocks["0"].mixer
    assert isinstance(mixer, Mamba2)
    return mixer


def fuse(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors in transformers' layout: one input projection, one convolution. Maps weights and gradients alike."""
    return {
        "in_proj.weight": torch.cat([ours[f"{name}_proj.weight"] for name in ("z", "x", "b", "c", "dt")]),
        "conv1d.weight": torch.cat([ours[f"{name}_conv"] for name in "xbc"])[:, None],
        "conv1d.bias": torch.cat([ours[f"{name}_conv_bias"] for name in "xbc"]),
        "A_log": ours["A_log"],
        "dt_bias": ours["dt_bias"],
        "D": ours["D"],
        "norm.weight": ours["o_norm.weight"],
        "out_proj.weight": ours["o_proj.weight"],
    }


def random_like(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(module: nn.Module, x: Tensor, *arguments: object) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, and gradients of the input and of every parameter for a fixed upstream gradient."""
    x = x.clone().requires_grad_()
    y = module(x, *arguments)
    (y * random_like(2, *y.shape).to(y.dtype)).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters()}


@pytest.fixture
def torch_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls the kernels of mamba_ssm and causal_conv1d where those are installed; keep to its torch."""
    from transformers.models.mamba2 import modeling_mamba2 as modeling

    for name in ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan"):
        monkeypatch.setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))


@pytest.mark.usefixtures("torch_forms")
@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mixer_is_transformers(sizes: tuple[int, int, int, int, int], n_tokens: int) -> None:
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    n_heads, d_head, d_state, n_groups, conv_size = sizes
    mixer = mixer_of(*sizes)
    theirs = Mamba2Mixer(
        TheirConfig(
            hidden_size=24,
            expand=2,
            num_heads=n_heads,
            head_dim=d_head,
            state_size=d_state,
            n_groups=n_groups,
            conv_kernel=conv_size,
            layer_norm_epsilon=mixer.o_norm.eps,
            num_hidden_layers=1,
            chunk_size=64,
        ),
        layer_idx=0,
    )
    theirs.load_state_dict(fuse(mixer.state_dict()))
    x = random_like(1, 1, n_tokens, 24)
    y, dx, ours = run(mixer, x, context_of([0, n_tokens]))
    y_theirs, dx_theirs, expected = run(theirs, x)
    assert rms_ratio(y, y_theirs) <= TOLERANCES["fp32", "logits"]
    found, expected = {"x": dx, **fuse(ours)}, {"x": dx_theirs, **expected}
    assert found.keys() == expected.keys()
    # With one token nothing has decayed: A_log has no gradient.
    zero = {"A_log"} if n_tokens == 1 else set()
    worst = {name: rms_ratio(found[name], expected[name]) for name in found.keys() - zero}
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst
    assert not any(found[name].any() or expected[name].any() for name in zero)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_packed_documents_equal_each_alone(sizes: tuple[int, int, int, int, int]) -> None:
    mixer, boundaries = mixer_of(*sizes), [0, 1, 3, 70, 71, 75]
    x = random_like(3, 1, 75, 24)
    packed = mixer(x, context_of(boundaries))
    alone = [mixer(x[:, a:b], context_of([0, b - a])) for a, b in itertools.pairwise(boundaries)]
    assert rms_ratio(packed, torch.cat(alone, dim=1)) <= TOLERANCES["fp32", "op"]


def share_of(mixer: Mamba2, index: int, count: int) -> Mamba2:
    """The mixer as the rank `index` of `count` holds it, its groups whole."""
    part = copy.deepcopy(mixer)
    part.share = (index, count)
    for name, parameter in mixer.named_parameters():
        if name.split(".")[0] in {"b_proj", "c_proj", "b_conv", "c_conv", "b_conv_bias", "c_conv_bias"}:
            continue
        owner, leaf = part.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        dim = 1 if name == "o_proj.weight" else 0
        setattr(owner, leaf, nn.Parameter(parameter.detach().chunk(count, dim)[index].clone()))
    part.o_norm.n_groups //= count
    return part


@pytest.mark.parametrize(("n_groups", "count"), [(2, 2), (4, 2), (4, 4)])
def test_a_rank_uses_the_groups_of_its_heads(n_groups: int, count: int) -> None:
    mixer = mixer_of(4, 12, 5, n_groups, 4)
    x, context = random_like(4, 1, 20, 24), context_of([0, 7, 20])
    parts = sum(share_of(mixer, index, count)(x, context) for index in range(count))
    assert rms_ratio(parts, mixer(x, context)) <= TOLERANCES["fp32", "op"]
