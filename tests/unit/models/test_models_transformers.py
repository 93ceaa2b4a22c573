"""With weights mapped across, our blocks compute what transformers' Llama and Qwen3-Next do, gradients included."""

import inspect

import pytest
import torch
from model_cases import context_of, gradients, make_config, moved_model, tokens_of
from torch import Tensor, nn

from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.gdn import GatedDeltaConfig
from tests.tolerances import TOLERANCES, rms_ratio

LLAMA_NAMES = {
    "embed.": "model.embed_tokens.",
    "final_norm.": "model.norm.",
    "head.": "lm_head.",
    ".mixer_norm.": ".input_layernorm.",
    ".mixer.": ".self_attn.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".ffn.": ".mlp.",
    "blocks.": "model.layers.",
}


def llama_name(name: str) -> str:
    for ours, theirs in LLAMA_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 65, 257])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "d_head"), [(4, 4, 6), (6, 2, 10)])
def test_one_loop_of_full_attention_is_llama(n_heads: int, n_kv_heads: int, d_head: int, n_tokens: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    full = FullAttentionConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=d_head, rope_theta=500.0)
    config = make_config(pattern="full", n_blocks=3, n_loops=1, update="replace", norm_eps=1e-5, full=full)
    model = moved_model(config)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ffn,
            num_hidden_layers=config.n_blocks,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=d_head,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            max_position_embeddings=512,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    llama.load_state_dict({llama_name(name): weight for name, weight in model.state_dict().items()})
    tokens = tokens_of(2, n_tokens)
    found, expected = model(tokens), llama(tokens).logits
    assert rms_ratio(found.detach(), expected.detach()) <= TOLERANCES["fp32", "logits"]
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(7))
    (expected * upstream).sum().backward()
    theirs = {name: parameter.grad for name, parameter in llama.named_parameters()}
    worst = {}
    for name, gradient in gradients(model, [found]).items():
        expected_gradient = theirs.pop(llama_name(name))
        # With one token the softmax is 1 whatever q and k are: both gradients are 0 up to rounding.
        is_zero = n_tokens == 1 and name.endswith(("q_proj.weight", "k_proj.weight"))
        worst[name] = rms_ratio(gradient, expected_gradient, torch.ones(()) if is_zero else None)
    assert not theirs
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst


def fuse(ours: dict[str, Tensor], n_heads: int) -> dict[str, Tensor]:
    """Our Gated DeltaNet's tensors in Qwen3-Next's layout: projections interleaved head by head, one convolution. A
    rearrangement, so it maps weights and gradients alike."""

    def by_head(*names: str) -> Tensor:
        return torch.cat([ours[f"{n}.weight"].unflatten(0, (n_heads, -1)) for n in names], dim=1).flatten(0, 1)

    return {
        "in_proj_qkvz.weight": by_head("q_proj", "k_proj", "v_proj", "g_proj"),
        "in_proj_ba.weight": by_head("b_proj", "a_proj"),
        "conv1d.weight": torch.cat([ours["q_conv"], ours["k_conv"], ours["v_conv"]])[:, None],
        "A_log": ours["A_log"],
        "dt_bias": ours["dt_bias"],
        "norm.weight": ours["o_norm.weight"],
        "out_proj.weight": ours["o_proj.weight"],
    }


@pytest.fixture
def torch_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls the Triton kernels of fla and causal_conv1d where those are installed; keep to its torch, and
    to the recurrent form: the chunked one subtracts fp32 running sums of g, which costs the decay's gradient digits."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    recurrent = inspect.unwrap(modeling.torch_recurrent_gated_delta_rule)
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", recurrent)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", inspect.unwrap(modeling.causal_conv1d_fn))


@pytest.mark.usefixtures("torch_forms")
@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 257])
def test_gdn_mixer_is_qwen3_nexts(n_tokens: int) -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    gdn = GatedDeltaConfig(n_heads=3, d_head_k=6, d_head_v=10, conv_size=4)
    config = make_config(pattern="gdn", gdn=gdn, norm_eps=1e-3)
    mixer = moved_model(config).blocks["0"].mixer
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=config.d_model,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            linear_num_key_heads=gdn.n_heads,
            linear_num_value_heads=gdn.n_heads,
            linear_key_head_dim=gdn.d_head_k,
            linear_value_head_dim=gdn.d_head_v,
            linear_conv_kernel_dim=gdn.conv_size,
            rms_norm_eps=config.norm_eps,
            hidden_act="silu",
        ),
        layer_idx=0,
    )
    theirs.load_state_dict(fuse(mixer.state_dict(), gdn.n_heads))
    x = torch.randn(1, n_tokens, config.d_model, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def run(module: nn.Module, *arguments: object) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x_in = x.clone().requires_grad_()
        y = module(x_in, *arguments)
        (y * upstream).sum().backward()
        return y.detach(), x_in.grad, {name: p.grad for name, p in module.named_parameters()}

    y, dx, ours = run(mixer, context_of([0, n_tokens]))
    y_theirs, dx_theirs, expected = run(theirs)
    assert rms_ratio(y, y_theirs) <= TOLERANCES["fp32", "logits"]
    found = {"x": dx, **fuse(ours, gdn.n_heads)}
    expected["x"] = dx_theirs
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in found}
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst
