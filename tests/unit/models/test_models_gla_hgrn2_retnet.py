"""GLA, HGRN2 and RetNet mixers are fla's layers: those are written out here, over fla's naive ops and over our own."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from model_cases import context_of, make_config, moved_model
from torch import Tensor
from torch.nn import functional as F

from loopline.models.mixers.mixer import Mixer
from loopline.models.mixers.retnet import Retention
from loopline.models.settings.gla import GatedLinearConfig
from loopline.models.settings.hgrn2 import HGRN2Config
from loopline.models.settings.retnet import RetentionConfig
from tests.tolerances import TOLERANCES, rms_ratio

Weights = dict[str, Tensor]
Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, decay -> o

# A document's first token has o = v times q.k, which the norm takes out but for eps: at a small eps the gradients of q
# and k are what a cancellation leaves.
EPS = 0.1
SETTINGS = {
    "gla": [
        GatedLinearConfig(n_heads=3, d_head_k=6, d_head_v=10, gate_rank=5),
        GatedLinearConfig(n_heads=1, d_head_k=5, d_head_v=7, gate_rank=2, gate_normalizer=1.0),
    ],
    "hgrn2": [HGRN2Config(n_heads=3, d_head_k=6, d_head_v=10), HGRN2Config(n_heads=1, d_head_k=5, d_head_v=7)],
    "retnet": [
        RetentionConfig(n_heads=3, d_head_k=6, d_head_v=10),
        RetentionConfig(n_heads=5, d_head_k=2, d_head_v=3, rope_theta=500.0),
    ],
}
CASES = [(name, settings) for name, cases in SETTINGS.items() for settings in cases]


def mixer_of(name: str, settings: object) -> Mixer:
    mixer = moved_model(make_config(pattern=name, norm_eps=EPS, **{name: settings})).blocks["0"].mixer
    assert isinstance(mixer, Mixer)
    return mixer


def random_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(x: Tensor, n_heads: int) -> Tensor:
    """[1, T, H * D] -> [1, T, H, D]."""
    return x.reshape(*x.shape[:2], n_heads, -1)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def token_by_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """S <- Diag(decay) S + k v^T, o = S^T q / sqrt(K), over [1, T, H, K|V]."""
    state, outputs = q.new_zeros(*q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        state = decay[0, t][..., None] * state + k[0, t][..., None] * v[0, t][..., None, :]
        outputs.append((q[0, t][..., None] * state).sum(-2) / math.sqrt(q.shape[-1]))
    return torch.stack(outputs)[None]


def masked_product(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The same with constant decays [H], as one masked product over the document."""
    t = torch.arange(q.shape[1])
    mask = (decay[:, None, None] ** (t[:, None] - t).clamp_min(0)).tril()  # [H, T, T]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]) * mask
    return torch.einsum("bhqk,bkhd->bqhd", scores, v)


def fla_gla(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """What fla's layers of GLA and HGRN2 call, in fla's naive form, which computes in fp32."""
    naive = pytest.importorskip("fla.ops.gla.naive", reason="flash-linear-attention comes with loopline[gpu]")
    return naive.naive_recurrent_gla(q=q, k=k, v=v, gk=decay.log())[0]


def fla_retention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The same for RetNet: head-first, and the decays are fla's own."""
    naive = pytest.importorskip("fla.ops.retention.naive", reason="flash-linear-attention comes with loopline[gpu]")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return naive.naive_retention(q=q, k=k, v=v).transpose(1, 2)


def turn(x: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers: x_i + i x_{i + D/2} times exp(i t theta^(-2i/D))."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def gla_layer(x: Tensor, w: Weights, settings: GatedLinearConfig, recur: Recurrence) -> Tensor:
    """fla/layers/gla.py without convolutions."""
    n = settings.n_heads
    q, k, v = (heads(F.linear(x, w[f"{name}_proj.weight"]), n) for name in "qkv")
    gk = F.linear(F.linear(x, w["gk_a_proj.weight"]), w["gk_b_proj.weight"], w["gk_bias"])
    decay = heads(gk, n).sigmoid() ** (1 / settings.gate_normalizer)
    o = rms_norm(recur(q, k, v, decay), w["o_norm.weight"]).flatten(2)
    gate = F.linear(x, w["g_proj.weight"])
    return F.linear(o * gate * gate.sigmoid(), w["o_proj.weight"])


def hgrn2_layer(x: Tensor, w: Weights, settings: HGRN2Config, recur: Recurrence) -> Tensor:
    """fla/layers/hgrn2.py without convolutions and lower bound."""
    n = settings.n_heads
    q, f, i = (heads(F.linear(x, w[f"{name}_proj.weight"]), n) for name in "qfi")
    f = f.sigmoid()
    o = recur(q * q.sigmoid(), 1 - f, i, f)
    return F.linear(rms_norm(o.flatten(2), w["o_norm.weight"]), w["o_proj.weight"])


def retnet_layer(x: Tensor, w: Weights, settings: RetentionConfig, recur: Recurrence) -> Tensor:
    """fla/layers/multiscale_retention.py without convolutions."""
    n = settings.n_heads
    q, k, v = (heads(F.linear(x, w[f"{name}_proj.weight"]), n) for name in "qkv")
    q, k = (turn(part, settings.rope_theta) for part in (q, k))
    decay = 1 - 2.0 ** (-5 - torch.arange(n, dtype=torch.float64))
    o = rms_norm(recur(q, k, v, decay), w["o_norm.weight"]).flatten(2)
    gate = F.linear(x, w["g_proj.weight"])
    return F.linear(o * gate * gate.sigmoid(), w["o_proj.weight"])


LAYERS: dict[str, Callable[..., Tensor]] = {"gla": gla_layer, "hgrn2": hgrn2_layer, "retnet": retnet_layer}
RECURRENCES: dict[str, dict[str, Recurrence]] = {
    "written-out": {"gla": token_by_token, "hgrn2": token_by_token, "retnet": masked_product},
    "fla-naive": {"gla": fla_gla, "hgrn2": fla_gla, "retnet": fla_retention},
}


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 65, 257])
@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_mixer_is_the_layer_written_out(recurrence: str, name: str, settings: object, n_tokens: int) -> None:
    mixer = mixer_of(name, settings)
    x = random_of(1, 1, n_tokens, 24)
    upstream = random_of(2, 1, n_tokens, 24)
    weights = {local: p.detach().double().requires_grad_() for local, p in mixer.named_parameters()}
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    found = mixer(inputs[0], context_of([0, n_tokens]))
    expected = LAYERS[name](inputs[1], weights, settings, RECURRENCES[recurrence][name])
    assert rms_ratio(found.detach(), expected.detach()) <= TOLERANCES["fp32", "logits"]
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    pairs = {local: (p.grad, weights[local].grad) for local, p in mixer.named_parameters()}
    pairs["x"] = (inputs[0].grad, inputs[1].grad)
    if n_tokens == 1:  # nothing has decayed, so the gate of a decay that is no key has no gradient
        zero = [pairs.pop(local) for local in list(pairs) if local.startswith("gk_")]
        assert not any(gradient.any() for pair in zero for gradient in pair)
    worst = {local: rms_ratio(*pair) for local, pair in pairs.items()}
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_packed_documents_equal_each_alone(name: str, settings: object) -> None:
    mixer, boundaries = mixer_of(name, settings), [0, 1, 3, 70, 71, 75]
    x = random_of(3, 1, 75, 24)
    packed = mixer(x, context_of(boundaries))
    alone = [mixer(x[:, a:b], context_of([0, b - a])) for a, b in itertools.pairwise(boundaries)]
    assert rms_ratio(packed, torch.cat(alone, dim=1)) <= TOLERANCES["fp32", "op"]


def test_hgrn2_writes_what_a_saturated_forget_gate_lets_go() -> None:
    """At f = 20 a sigmoid is 1 in fp32: the keys are 2e-9, and taken as 1 - sigmoid(f) they would be 0."""
    settings = HGRN2Config(n_heads=1, d_head_k=4, d_head_v=4)
    mixer = moved_model(make_config(pattern="hgrn2", norm_eps=1e-30, hgrn2=settings)).blocks["0"].mixer
    x = torch.ones(1, 5, 24)
    with torch.no_grad():
        mixer.f_proj.weight.fill_(20 / 24)
    y = mixer(x, context_of([0, 5]))
    assert y.isfinite().all()
    assert y.abs().min() > 1e-4


@pytest.mark.parametrize("count", [1, 2, 4])
def test_retention_decays_are_numbered_over_all_heads(count: int) -> None:
    """A rank that holds some of 24 heads takes their slice; late heads, whose decay is 1 in fp32, still decay."""
    mixer = mixer_of("retnet", RetentionConfig(n_heads=24, d_head_k=2, d_head_v=1))
    assert isinstance(mixer, Retention)
    found = []
    for index in range(count):
        mixer.share = (index, count)
        found.append(mixer.log_decay(torch.empty(1, 1, 24 // count, 2)))
    expected = [math.log1p(-(2.0 ** (-5 - h))) for h in range(24)]
    torch.testing.assert_close(torch.cat(found).tolist(), expected, rtol=1e-6, atol=0)
    assert max(expected) < 0
