"""The modelling file computes what models/ computes, and what it computes does not depend on how tokens arrive."""

import pytest
import torch
from hf_cases import (
    DECODED,
    FP32_REORDERED_TOLERANCE,
    FP32_TOLERANCE,
    FP64_TOLERANCE,
    HYBRID,
    build,
    build_from,
    hf_model,
    hf_model_fp64,
    tokens_of,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from loopline.models.hf.modeling_loopline import LooplineForCausalLM
from loopline.models.looped_lm import LoopedLM


def max_diff(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@torch.no_grad()
def feed(
    hf: LooplineForCausalLM, tokens: Tensor, lengths: list[int], n_loops: int, mask: Tensor | None = None
) -> Tensor:
    """Logits after each loop, [R, B, T, V], with the tokens fed in pieces of the given lengths through a cache."""
    pieces, cache, start = [], None, 0
    for length in lengths:
        end = start + length
        seen = None if mask is None else mask[:, :end]
        out = hf(
            tokens[:, start:end],
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
            n_loops=n_loops,
            output_depth_logits=True,
        )
        cache, start = out.past_key_values, end
        pieces.append(torch.stack(out.depth_logits))
    assert start == tokens.shape[1]
    return torch.cat(pieces, dim=2)


@torch.no_grad()
def whole(hf: LooplineForCausalLM, tokens: Tensor, n_loops: int) -> Tensor:
    """Logits after each loop, [R, B, T, V], without a cache."""
    return torch.stack(hf(tokens, n_loops=n_loops, output_depth_logits=True, use_cache=False).depth_logits)


@pytest.mark.parametrize("n_tokens", [1, 7, 64, 131])
def test_logits_match_the_training_model_at_every_depth(model: LoopedLM, n_tokens: int) -> None:
    tokens, n_loops = tokens_of(2, n_tokens), model.config.n_loops + 1
    with torch.no_grad():
        want = model.forward_depths(tokens, n_loops=n_loops, depths=list(range(1, n_loops + 1)))
    # torch multiplies 1 x 1 matrices by another path than the training model's batch of them
    tolerance = FP32_TOLERANCE if n_tokens > 1 else FP32_REORDERED_TOLERANCE
    assert max_diff(whole(hf_model(model), tokens, n_loops), torch.stack(want)) <= tolerance


def test_fp32_is_close_to_fp64(model: LoopedLM) -> None:
    """Without this, the fp64 tests below could be about another model."""
    tokens = tokens_of(1, 12)
    diff = max_diff(whole(hf_model(model), tokens, 2).double(), whole(hf_model_fp64(model), tokens, 2))
    assert diff <= FP32_REORDERED_TOLERANCE


@pytest.mark.parametrize(
    "lengths", [[1] * 9, [5, 1, 1, 1], [1, 4, 1], [66, 3, 1]], ids=["by-one", "prefill", "from-one", "chunks"]
)
@pytest.mark.parametrize("n_rows", [1, 3])
def test_decoding_from_the_cache_matches_forward_at_every_depth(
    model: LoopedLM, lengths: list[int], n_rows: int
) -> None:
    hf, n_loops = hf_model_fp64(model), model.config.n_loops + 1
    tokens = tokens_of(n_rows, sum(lengths))
    assert max_diff(feed(hf, tokens, lengths, n_loops), whole(hf, tokens, n_loops)) <= FP64_TOLERANCE


@pytest.mark.parametrize("n_loops", [1, 2, 4])
@pytest.mark.parametrize("name", DECODED)
def test_decoding_at_any_number_of_loops_is_the_training_models_forward(name: str, n_loops: int) -> None:
    # Trained with two loops. Past 8 tokens windows, choices of keys and blocks leave some out.
    model, tokens = build_from(DECODED[name], torch.float64).double(), tokens_of(2, 17)
    with torch.no_grad():
        want = torch.stack(model.forward_depths(tokens, n_loops=n_loops, depths=list(range(1, n_loops + 1))))
    hf = hf_model_fp64(model)
    assert max_diff(whole(hf, tokens, n_loops), want) <= FP64_TOLERANCE
    assert max_diff(feed(hf, tokens, [7] + [1] * 10, n_loops), want) <= FP64_TOLERANCE


def test_decoding_matches_forward_in_fp32(model: LoopedLM) -> None:
    hf, tokens = hf_model(model), tokens_of(2, 12)
    diff = max_diff(feed(hf, tokens, [6] + [1] * 6, model.config.n_loops), whole(hf, tokens, model.config.n_loops))
    assert diff <= FP32_REORDERED_TOLERANCE


@pytest.mark.parametrize("lengths", [[9, 1, 1], [1] * 11, [4, 5, 2]], ids=["prefill", "by-one", "chunks"])
def test_left_padded_rows_equal_each_row_alone(model: LoopedLM, lengths: list[int]) -> None:
    hf, n_loops, total = hf_model_fp64(model), model.config.n_loops, sum(lengths)
    n_padding = [8, 5, 0]  # the first row's prompt is one token
    tokens = tokens_of(3, total)
    mask = (torch.arange(total) >= torch.tensor(n_padding)[:, None]).long()
    together = feed(hf, tokens, lengths, n_loops, mask)
    for row, padding in enumerate(n_padding):
        alone = whole(hf, tokens[row : row + 1, padding:], n_loops)
        assert max_diff(together[:, row : row + 1, padding:], alone) <= FP64_TOLERANCE
    assert together.isfinite().all()


def test_right_padding_leaves_earlier_tokens_alone(model: LoopedLM) -> None:
    hf, tokens = hf_model_fp64(model), tokens_of(1, 9)
    mask = (torch.arange(9) < 6).long()[None]
    with torch.no_grad():
        padded = hf(tokens, attention_mask=mask, use_cache=False).logits[:, :6]
    assert max_diff(padded, whole(hf, tokens[:, :6], model.config.n_loops)[-1]) <= FP64_TOLERANCE


def test_right_padding_neither_decays_nor_writes_the_state() -> None:
    hf, tokens = hf_model_fp64(build("gdn-gate-2")), tokens_of(1, 9)
    mask = (torch.arange(9) < 6).long()[None]
    with torch.no_grad():
        padded = hf(tokens, attention_mask=mask, use_cache=True).past_key_values
        alone = hf(tokens[:, :6], use_cache=True).past_key_values
    for a, b in zip(padded.layers, alone.layers):
        assert max_diff(a.recurrent_states[0], b.recurrent_states[0]) <= FP64_TOLERANCE


def test_padding_leaves_recurrent_and_convolution_states_at_zero() -> None:
    hf = hf_model(build("gdn-gate-2"))
    with torch.no_grad():
        cache = hf(tokens_of(1, 3), attention_mask=torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    for layer in cache.layers:
        assert not layer.recurrent_states[0].any()
        assert not layer.conv_states[0].any()


def test_eager_attention_matches_sdpa(model: LoopedLM) -> None:
    hf, tokens = hf_model_fp64(model), tokens_of(2, 9)
    want = whole(hf, tokens, 2)
    hf.set_attn_implementation("eager")
    assert max_diff(whole(hf, tokens, 2), want) <= FP64_TOLERANCE


def test_one_cache_layer_for_every_loop_and_block() -> None:
    hf = hf_model(build(HYBRID))
    for n_loops in (1, 3, 5):
        with torch.no_grad():
            cache = hf(tokens_of(2, 4), n_loops=n_loops, use_cache=True).past_key_values
        kinds = [type(layer).__name__ for layer in cache.layers]
        assert kinds == ["LinearAttentionLayer", "LinearAttentionLayer", "DynamicLayer"] * n_loops


def test_an_empty_cache_without_config_is_given_the_right_layers() -> None:
    hf, tokens = hf_model_fp64(build(HYBRID)), tokens_of(2, 8)
    cache = DynamicCache()
    with torch.no_grad():
        hf(tokens[:, :5], past_key_values=cache)
        logits = hf(tokens[:, 5:], past_key_values=cache).logits
    assert max_diff(logits, whole(hf, tokens, 3)[-1][:, 5:]) <= FP64_TOLERANCE


def test_a_cache_filled_with_other_loops_is_refused(model: LoopedLM) -> None:
    hf, n_loops = hf_model(model), model.config.n_loops
    with torch.no_grad():
        cache = hf(tokens_of(1, 4), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=rf"holds {n_loops} loops .*n_loops={n_loops + 1}"):
            hf(tokens_of(1, 1), past_key_values=cache, n_loops=n_loops + 1)


def test_cropping_full_attention_undoes_tokens() -> None:
    hf, tokens = hf_model_fp64(build("full-gate-2-gqa")), tokens_of(1, 9)
    with torch.no_grad():
        cache = hf(tokens[:, :7], use_cache=True).past_key_values
        cache.crop(-3)
        logits = hf(tokens[:, 4:], past_key_values=cache).logits
    assert max_diff(logits, whole(hf, tokens, 2)[-1][:, 4:]) <= FP64_TOLERANCE


def test_assisted_decoding_works_without_recurrent_states_and_is_refused_with_them() -> None:
    hf, prompt = hf_model_fp64(build("full-gate-2-gqa")), tokens_of(1, 6)
    settings = {"max_new_tokens": 10, "do_sample": False}
    assisted = hf.generate(prompt, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(assisted, hf.generate(prompt, **settings))
    with pytest.raises(ValueError, match="stateful"):
        hf_model(build(HYBRID)).generate(prompt, prompt_lookup_num_tokens=3, **settings)


def test_cropping_a_recurrent_state_is_refused() -> None:
    hf = hf_model(build(HYBRID))
    with torch.no_grad():
        cache = hf(tokens_of(1, 7), use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-3)


def test_packed_rows_are_refused_where_a_state_would_leak() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    hf = hf_model(build(HYBRID))
    with pytest.raises(ValueError, match="packed"):
        hf(tokens_of(1, 5), position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="4 dims"):
        hf(tokens_of(1, 5), attention_mask=torch.ones(1, 1, 5, 5), use_cache=False)


def test_n_loops_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="n_loops is 0"):
        hf_model(build(HYBRID))(tokens_of(1, 2), n_loops=0)


def test_loss_is_shifted_cross_entropy_and_reaches_every_weight(model: LoopedLM) -> None:
    hf, tokens = hf_model(model).train(), tokens_of(2, 10)
    labels = tokens.clone()
    labels[0, :4] = -100
    out = hf(tokens, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(hf(tokens, labels=labels, num_items_in_batch=5).loss * 5, want * 15)
    out.loss.backward()
    # The language-model loss reaches neither an indexer, which has a loss of its own in training, nor an exit gate.
    reached = [name for name, p in hf.named_parameters() if p.grad is not None and p.grad.any()]
    others = [name for name, _ in hf.named_parameters() if ".index_" in name or "exit_gate" in name]
    assert sorted([*reached, *others]) == sorted(dict(hf.named_parameters()))


def test_gradients_match_the_training_model(model: LoopedLM) -> None:
    hf, tokens = hf_model(model).train(), tokens_of(2, 10)
    hf(tokens, labels=tokens, use_cache=False).loss.backward()
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    want = model.embed.weight.grad
    assert max_diff(hf.model.embed_tokens.weight.grad, want) <= FP32_REORDERED_TOLERANCE * want.abs().max().item()


def test_gradient_checkpointing_changes_nothing() -> None:
    hf, tokens, grads = hf_model_fp64(build(HYBRID)).train(), tokens_of(2, 10), []
    for is_on in (False, True):
        if is_on:
            hf.gradient_checkpointing_enable()
        hf.zero_grad()
        hf(tokens, labels=tokens).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in hf.parameters()]))
    assert max_diff(*grads) <= FP64_TOLERANCE


def test_hidden_states_are_one_per_block_application() -> None:
    hf = hf_model(build(HYBRID))
    with torch.no_grad():
        out = hf(tokens_of(1, 4), output_hidden_states=True, logits_to_keep=1)
    assert len(out.hidden_states) == 3 * 3 + 1
    assert out.logits.shape[1] == 1
