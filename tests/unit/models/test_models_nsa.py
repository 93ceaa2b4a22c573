"""The native sparse attention mixer is fla's plain-torch branches put together by hand, gradients included."""

import importlib.util
import itertools

import pytest
import torch
from model_cases import context_of, make_config, moved_model, starting_model, tokens_of
from torch import Tensor

from loopline.models.mixers.nsa import NativeSparseAttention
from loopline.models.settings.nsa import NativeSparseConfig
from tests.tolerances import TOLERANCES, rms_ratio


def settings_of(**changes: object) -> NativeSparseConfig:
    values = {"n_heads": 6, "n_kv_heads": 2, "d_head": 6, "rope_theta": 500.0, "pooling": "learned"}
    return NativeSparseConfig(**{**values, "block_size": 4, "n_selected": 5, "window": 7, **changes})


def mixer_of(settings: NativeSparseConfig) -> NativeSparseAttention:
    mixer = moved_model(make_config(pattern="nsa", nsa=settings)).blocks["0"].mixer
    assert isinstance(mixer, NativeSparseAttention)
    return mixer


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions on [1, T, H, D], channels i and i + D/2 as one complex number."""
    n_tokens, d_half = x.shape[1], x.shape[3] // 2
    pairs = torch.complex(x[..., :d_half].contiguous(), x[..., d_half:].contiguous())
    angle = torch.arange(n_tokens)[:, None] * theta ** (-torch.arange(d_half) / d_half)
    pairs = pairs * torch.polar(torch.ones(()), angle)[None, :, None]
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def by_hand(x: Tensor, weights: dict[str, Tensor], settings: NativeSparseConfig) -> Tensor:
    """One document [1, T, C] through fla's naive branches, under our gates; fla's whole wants groups of 16."""
    from fla.ops.attn.naive import naive_parallel_attn
    from fla.ops.nsa import naive

    n_tokens, size, scale = x.shape[1], settings.block_size, settings.head_size(x.shape[2]) ** -0.5
    q, k, v = ((x @ weights[f"{name}_proj.weight"].T).unflatten(-1, (-1, 6)) for name in "qkv")
    q, k = turned(q, settings.rope_theta), turned(k, settings.rope_theta)
    gates = (x @ weights["g_proj.weight"].T).sigmoid().unflatten(-1, (-1, 3))

    n_complete = n_tokens // size
    pooled = []
    for name, y in (("k_pool", k), ("v_pool", v)):
        blocks = y[:, : n_complete * size].unflatten(1, (n_complete, size))  # [1, NB, B, G, D]
        if settings.pooling == "learned":
            blocks = blocks * weights[name].unflatten(0, (-1, 6)).permute(2, 0, 1) * size
        pooled.append(blocks.mean(2))
    k_pool, v_pool = pooled
    # fla ranks complete blocks only, but the query's own block must have a row to be taken, complete or not.
    rows = torch.cat([k_pool, k_pool.new_zeros(1, 1, *k_pool.shape[2:])], dim=1)[:, : -(-n_tokens // size)]
    chosen = naive.naive_nsa_topk(
        q=q.detach(), k_cmp=rows.detach(), block_counts=settings.n_selected, block_size=size, scale=scale
    )

    o = gates[..., 1:2] * naive.naive_nsa_selection(q=q, k=k, v=v, block_indices=chosen, block_size=size, scale=scale)
    window, _ = naive_parallel_attn(q=q, k=k, v=v, scale=scale, window_size=settings.window)
    o = o + gates[..., 2:3] * window
    if n_complete:
        compressed, _ = naive.naive_nsa_compression(q=q, k_cmp=k_pool, v_cmp=v_pool, block_size=size, scale=scale)
        o = o + gates[..., 0:1] * compressed
    o = o.flatten(2)
    if settings.output_gate:
        o = o * (x @ weights["gate_proj.weight"].T).sigmoid()
    return o @ weights["o_proj.weight"].T


@pytest.mark.parametrize("lengths", [[1], [3], [65], [20, 1, 34]], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        settings_of(),
        settings_of(pooling="mean", output_gate=True),
        settings_of(n_kv_heads=6, block_size=3, n_selected=3, window=1, output_gate=True),
    ],
    ids=["learned", "mean-gated", "small"],
)
def test_mixer_is_the_naive_branches_of_fla_with_every_gradient(
    lengths: list[int], settings: NativeSparseConfig
) -> None:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    mixer, cu_seqlens = mixer_of(settings), [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    weights = {name: p.detach().clone().requires_grad_() for name, p in mixer.named_parameters()}
    x = torch.randn(1, sum(lengths), 24, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    x_ours, x_theirs = (x.clone().requires_grad_() for _ in range(2))
    y = mixer(x_ours, context_of(cu_seqlens))
    rows = [by_hand(x_theirs[:, a:b], weights, settings) for a, b in itertools.pairwise(cu_seqlens)]
    y_theirs = torch.cat(rows, dim=1)
    assert rms_ratio(y.detach(), y_theirs.detach()) <= TOLERANCES["fp32", "logits"]
    (y * upstream).sum().backward()
    (y_theirs * upstream).sum().backward()
    found = {"x": x_ours.grad} | {name: p.grad for name, p in mixer.named_parameters()}
    expected = {"x": x_theirs.grad} | {name: p.grad for name, p in weights.items()}
    worst = {}
    for name, gradient in found.items():
        # A query that sees one key has no use for q and k, nor one without a complete block for pools: gradients of 0,
        # which autograd leaves out or rounds. Their size is then that of the values' gradient.
        theirs = torch.zeros_like(gradient) if expected[name] is None else expected[name]
        is_zero = theirs.abs().max() <= 1e-6 * expected["v_proj.weight"].abs().max()
        worst[name] = rms_ratio(gradient, theirs, expected["v_proj.weight"] if is_zero else None)
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst


def test_learned_pooling_starts_as_the_mean_and_mean_pooling_has_no_parameters() -> None:
    learned, mean = (
        starting_model(make_config(pattern="nsa", nsa=settings_of(pooling=pooling))) for pooling in ("learned", "mean")
    )
    pools = {name for name, _ in learned.named_parameters()} - {name for name, _ in mean.named_parameters()}
    assert pools == {f"blocks.{i}.mixer.{name}" for i in range(2) for name in ("k_pool", "v_pool")}
    tokens = tokens_of(1, 65)
    with torch.no_grad():
        assert rms_ratio(learned(tokens), mean(tokens)) <= TOLERANCES["fp32", "logits"]
        assert rms_ratio(moved_model(learned.config)(tokens), learned(tokens)) > 1e-2


@pytest.mark.parametrize("branch", range(3), ids=["compressed", "selected", "window"])
def test_rows_of_the_gate_are_three_for_each_head_in_turn(branch: int) -> None:
    """Rows 3 h to 3 h + 2 are head h's: with tensor parallelism a rank's rows are those of its heads."""
    mixer, context = mixer_of(settings_of()), context_of([0, 30])
    x = torch.randn(1, 30, 24, generator=torch.Generator().manual_seed(1))
    mixer.o_proj = torch.nn.Identity()  # heads side by side
    with torch.no_grad():
        before = mixer(x, context)
        mixer.g_proj.weight[3 * 4 + branch] += 1.0
        is_changed = (mixer(x, context) != before).unflatten(-1, (-1, 6)).any(-1).any(1)[0]
    assert is_changed.nonzero().flatten().tolist() == [4]
