"""Kimi Delta Attention and DeltaNet compute what transformers' and fla's torch forms do, gradients included."""

import inspect
from collections.abc import Callable

import pytest
import torch
from model_cases import context_of, make_config, moved_model, starting_model
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels import backends
from loopline.models.mixers.mixer import Mixer
from loopline.models.settings.deltanet import DeltaNetConfig
from loopline.models.settings.kda import KimiDeltaConfig
from tests.tolerances import TOLERANCES, rms_ratio

N_TOKENS = [1, 2, 63, 64, 65, 257]
SECTIONS = {
    "kda": KimiDeltaConfig(n_heads=3, d_head_k=6, d_head_v=10, gate_rank=5),
    "deltanet": DeltaNetConfig(n_heads=3, d_head_k=6, d_head_v=10, conv_size=3),
}
DECAY = ("A_log", "dt_bias", "f_a_proj.weight", "f_b_proj.weight")  # what the decay of KDA is made with
both_mixers = pytest.mark.parametrize("name", SECTIONS)
Recurrence = Callable[..., Tensor]  # q, k [1, T, H, K], v [1, T, H, V], beta [1, T, H], and g -> o [1, T, H, V]


def mixer_of(name: str, **changes: object) -> Mixer:
    section = SECTIONS[name].model_copy(update=changes)
    return moved_model(make_config(pattern=name, n_blocks=1, **{name: section})).blocks["0"].mixer


def input_of(n_tokens: int) -> Tensor:
    d_model = make_config().d_model
    return torch.randn(1, n_tokens, d_model, generator=torch.Generator().manual_seed(n_tokens))


def outcome(forward: Callable[[Tensor], Tensor], parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of a fixed random projection of it by the input and every parameter."""
    x = x.clone().requires_grad_()
    y = forward(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((y * upstream).sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(["x", *parameters], gradients))}


def own_outcome(mixer: Mixer, x: Tensor, cu_seqlens: list[int]) -> dict[str, Tensor]:
    return outcome(lambda x: mixer(x, context_of(cu_seqlens)), dict(mixer.named_parameters()), x)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert worst.pop("y") <= TOLERANCES["fp32", "logits"]
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst


def take_out_decay(*outcomes: dict[str, Tensor]) -> None:
    """Take out the decay's gradients, which are zero up to rounding: with one token there is no state to decay."""
    for tensors in outcomes:
        for name in [name for name in tensors if name.endswith(DECAY)]:
            assert tensors.pop(name).abs().max() <= 1e-6


# Kimi Delta Attention against the module of transformers' Kimi Linear.


def kimi_tensors(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, parameters or gradients, in Kimi Linear's names and layout."""
    theirs = {name: x for name, x in ours.items() if "_conv" not in name}
    theirs["conv1d.weight"] = torch.cat([ours["q_conv"], ours["k_conv"], ours["v_conv"]])[:, None]
    for name in DECAY:
        theirs[f"forget_gate.{name}"] = theirs.pop(name)
    theirs["forget_gate.A_log"] = theirs["forget_gate.A_log"].view(1, 1, -1, 1)
    return theirs


@pytest.fixture
def torch_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls the Triton kernels of fla and causal_conv1d where those are installed; keep to its torch, and
    to the recurrent form: the chunked one subtracts fp32 running sums of g, which costs the decay's gradient digits."""
    from transformers.models.kimi_linear import modeling_kimi_linear as modeling

    recurrent = inspect.unwrap(modeling.recurrent_kimi_delta_attention)
    monkeypatch.setattr(modeling, "chunk_kimi_delta_attention", recurrent)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", inspect.unwrap(modeling.causal_conv1d_fn))


@pytest.mark.usefixtures("torch_forms")
@pytest.mark.parametrize("n_tokens", N_TOKENS)
def test_kda_mixer_is_kimi_linears(n_tokens: int) -> None:
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    d_head = 10  # of keys and values alike, and the rank of both low-rank projections
    mixer = mixer_of("kda", d_head_k=d_head, d_head_v=d_head, gate_rank=None)
    theirs = KimiLinearDeltaAttention(
        KimiLinearConfig(
            hidden_size=mixer.q_proj.in_features,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            linear_num_heads=3,
            linear_head_dim=d_head,
            linear_conv_kernel_dim=4,
            rms_norm_eps=mixer.o_norm.eps,
        ),
        layer_idx=0,
    )
    theirs.load_state_dict(kimi_tensors(mixer.state_dict()))
    x = input_of(n_tokens)
    found = kimi_tensors(own_outcome(mixer, x, [0, n_tokens]))
    expected = outcome(theirs, dict(theirs.named_parameters()), x)
    if n_tokens == 1:
        take_out_decay(found, expected)
    assert_same(found, expected)


# Both against the equations written out in torch, around recurrences of others.


def convolved(p: dict[str, Tensor], x: Tensor, part: str, d_head: int) -> Tensor:
    """silu of the convolution by torch's conv1d: [1, T, H, D]."""
    weight = p[f"{part}_conv"][:, None]
    y = F.conv1d((x @ p[f"{part}_proj.weight"].T).mT, weight, padding=weight.shape[-1] - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]]).mT.unflatten(-1, (-1, d_head))


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def written_out(mixer: Mixer, p: dict[str, Tensor], x: Tensor, recurrence: Recurrence) -> Tensor:
    q, k = (unit(convolved(p, x, part, mixer.d_head_k)) for part in "qk")
    v = convolved(p, x, "v", mixer.d_head_v)
    beta = mixer.beta_max / (1 + (-x @ p["b_proj.weight"].T).exp())
    gates = {}
    if mixer.name == "kda":
        decay = (x @ p["f_a_proj.weight"].T @ p["f_b_proj.weight"].T + p["dt_bias"]).exp().log1p()
        gates["g"] = -decay.unflatten(-1, (-1, mixer.d_head_k)) * p["A_log"].exp()[:, None]
    o = recurrence(q=q, k=k, v=v, beta=beta, **gates)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + mixer.o_norm.eps) * p["o_norm.weight"]
    if mixer.name == "kda":
        gate = x @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T
        o = o / (1 + (-gate.unflatten(-1, (-1, mixer.d_head_v))).exp())
    return o.flatten(2) @ p["o_proj.weight"].T


def fla_kda() -> Recurrence:
    naive = pytest.importorskip("fla.ops.kda.naive", reason="flash-linear-attention comes with loopline[gpu]")
    return lambda **tensors: naive.naive_recurrent_kda(**tensors)[0]


def fla_delta_rule() -> Recurrence:
    naive = pytest.importorskip("fla.ops.delta_rule.naive", reason="flash-linear-attention comes with loopline[gpu]")

    def form(**tensors: Tensor) -> Tensor:  # head-first, unlike everything else here
        return naive.delta_rule_recurrence(**{n: x.transpose(1, 2) for n, x in tensors.items()})[0].transpose(1, 2)

    return form


def qwen3_next_delta_rule() -> Recurrence:
    """The gated rule of transformers' Qwen3-Next with decay switched off."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    form = inspect.unwrap(modeling_qwen3_next.torch_recurrent_gated_delta_rule)
    return lambda q, k, v, beta: form(
        query=q, key=k, value=v, g=torch.zeros_like(beta), beta=beta, initial_state=None, output_final_state=False
    )[0]


RECURRENCES = {
    "kda-fla": ("kda", fla_kda),
    "deltanet-fla": ("deltanet", fla_delta_rule),
    "deltanet-transformers": ("deltanet", qwen3_next_delta_rule),
}


@pytest.mark.parametrize("is_negative", [False, True])
@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("case", RECURRENCES)
def test_mixer_is_its_equations_around_a_recurrence_of_others(case: str, n_tokens: int, is_negative: bool) -> None:
    name, recurrence = RECURRENCES[case]
    mixer, x = mixer_of(name, allow_negative_eigenvalues=is_negative), input_of(n_tokens)
    p = {key: value.detach().clone().requires_grad_() for key, value in mixer.named_parameters()}
    form = recurrence()
    found = own_outcome(mixer, x, [0, n_tokens])
    expected = outcome(lambda x: written_out(mixer, p, x, form), p, x)
    if n_tokens == 1:
        take_out_decay(found, expected)
    assert_same(found, expected)


@both_mixers
def test_each_document_is_computed_alone(name: str) -> None:
    mixer, lengths = mixer_of(name), [3, 1, 65]
    x = input_of(sum(lengths))
    cu_seqlens = [0, 3, 4, 69]
    packed = own_outcome(mixer, x, cu_seqlens)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    whole = x.clone().requires_grad_()
    parts = torch.cat([mixer(part, context_of([0, part.shape[1]])) for part in whole.split(lengths, dim=1)], dim=1)
    parameters = dict(mixer.named_parameters())
    gradients = torch.autograd.grad((parts * upstream).sum(), [whole, *parameters.values()])
    assert_same(packed, {"y": parts.detach(), **dict(zip(["x", *parameters], gradients))})


# How they start, and which kernel they take.


def test_kda_starts_with_rates_from_1_to_16_and_steps_from_a_thousandth_to_a_tenth() -> None:
    kda = KimiDeltaConfig(n_heads=64, d_head_k=6, d_head_v=10)
    mixer = starting_model(make_config(pattern="kda", n_blocks=1, kda=kda)).blocks["0"].mixer
    rates, steps = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert (rates.min() >= 1, rates.max() <= 16) == (True, True)
    assert rates.min() < 2
    assert rates.max() > 14
    assert (steps.min() >= 0.999e-3, steps.max() <= 0.1001) == (True, True)
    assert steps.min() < 1.2e-3
    assert steps.max() > 0.08
    assert mixer.dt_bias.shape == (64 * 6,)


def test_rank_of_kdas_gates_is_the_value_size_unless_set() -> None:
    assert KimiDeltaConfig(d_head_v=24).rank == 24
    assert KimiDeltaConfig(d_head_v=24, gate_rank=7).rank == 7


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("kda", torch.float32, "fla"),
        ("kda", torch.bfloat16, "fla"),
        ("deltanet", torch.float32, "reference"),  # fla's delta rule has no fp32 kernel
        ("deltanet", torch.bfloat16, "fla"),
    ],
)
def test_auto_on_a_gpu_takes_fla_where_it_has_the_dtype(
    name: str, dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda package: True)
    assert mixer_of(name).chosen_backend(torch.device("cuda"), dtype) == expected


def test_deltanet_says_its_dtype_when_it_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, asked = mixer_of("deltanet"), []
    monkeypatch.setattr(mixer, "chosen_backend", lambda *arguments: asked.append(arguments) or "reference")
    mixer(input_of(2).bfloat16(), context_of([0, 2]))
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
