"""Recurrent mixers beside Gated DeltaNet: padding leaves what they keep, and what decays stays fp32."""

from pathlib import Path

import pytest
import torch
from hf_cases import FP64_TOLERANCE, build, hf_model, hf_model_fp64, tokens_of
from transformers import AutoModelForCausalLM

from loopline.models.hf.export import export_hf

NAMES = ["mamba2-gate-2", "mamba2-norm-1-groups", "gla-gate-2", "hgrn2-gate-2", "retnet-gate-2"]
every_name = pytest.mark.parametrize("name", NAMES)


@every_name
def test_right_padding_neither_decays_nor_writes_the_state(name: str) -> None:
    hf, tokens = hf_model_fp64(build(name)), tokens_of(1, 9)
    mask = (torch.arange(9) < 6).long()[None]
    with torch.no_grad():
        padded = hf(tokens, attention_mask=mask, use_cache=True).past_key_values
        alone = hf(tokens[:, :6], use_cache=True).past_key_values
    for a, b in zip(padded.layers, alone.layers, strict=True):
        found, expected = a.recurrent_states[0], b.recurrent_states[0]
        assert expected.any()
        assert (found - expected).abs().max() <= FP64_TOLERANCE


@every_name
def test_padding_leaves_every_state_at_zero(name: str) -> None:
    """A convolution's bias makes inputs of padding, and they are not written."""
    hf = hf_model(build(name))
    with torch.no_grad():
        cache = hf(tokens_of(1, 3), attention_mask=torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    for layer in cache.layers:
        assert not layer.recurrent_states[0].any()
        assert not layer.conv_states[0].any()


@every_name
def test_a_reset_cache_is_a_new_one(name: str) -> None:
    hf, tokens = hf_model_fp64(build(name)), tokens_of(1, 5)
    with torch.no_grad():
        cache = hf(tokens_of(1, 7, seed=1), use_cache=True).past_key_values
        cache.reset()
        found = hf(tokens, past_key_values=cache).logits
        expected = hf(tokens, use_cache=False).logits
    assert (found - expected).abs().max() <= FP64_TOLERANCE


def test_mamba2_decays_and_skip_stay_fp32_in_a_bf16_export(tmp_path: Path) -> None:
    model = build("mamba2-norm-1-groups")
    export_hf(model, tmp_path / "out", dtype="bfloat16", tolerance=1.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    mixer = loaded.model.layers[0].linear_attn
    fp32 = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {"A_log", "dt_bias", "D"}
    ours = dict(model.named_parameters())
    assert all(torch.equal(getattr(mixer, name), ours[f"blocks.0.mixer.{name}"]) for name in fp32)
    assert {p.dtype for name, p in loaded.named_parameters() if not name.endswith(tuple(fp32))} == {torch.bfloat16}
