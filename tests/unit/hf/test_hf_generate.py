"""generate() gives what full forward passes give."""

from pathlib import Path

import pytest
import torch
from hf_cases import HYBRID, build, build_from, config_of, hf_model, hf_model_fp64, tokens_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopline.models.hf.errors import CheckpointError
from loopline.models.hf.export import export_hf
from loopline.models.hf.generate import generate_text
from loopline.models.looped_lm import LoopedLM

N_NEW = 7


@torch.no_grad()
def greedy(model: LoopedLM, prompt: Tensor, n_loops: int | None = None) -> Tensor:
    """The training model run over the whole text for every token."""
    for _ in range(N_NEW):
        prompt = torch.cat([prompt, model(prompt, n_loops=n_loops)[:, -1:].argmax(-1)], dim=1)
    return prompt


@pytest.mark.parametrize("n_tokens", [1, 6])
def test_greedy_generation_matches_full_forward_passes(model: LoopedLM, n_tokens: int) -> None:
    prompt = tokens_of(2, n_tokens)
    output = hf_model(model).generate(prompt, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(output, greedy(model, prompt))


def test_generation_takes_n_loops(model: LoopedLM) -> None:
    hf, prompt = hf_model(model), tokens_of(1, 4)
    outputs = [hf.generate(prompt, max_new_tokens=N_NEW, do_sample=False, n_loops=n) for n in (1, 2, 5)]
    for output, n_loops in zip(outputs, (1, 2, 5)):
        assert torch.equal(output, greedy(model, prompt, n_loops))
    assert not torch.equal(outputs[0], outputs[2])
    hf.config.n_loops = 5
    assert torch.equal(hf.generate(prompt, max_new_tokens=N_NEW, do_sample=False), outputs[2])


def test_left_padded_batch_generates_what_each_prompt_does_alone(model: LoopedLM) -> None:
    hf, lengths = hf_model(model), (1, 4, 7)
    prompts = [tokens_of(1, n, seed=n) for n in lengths]
    padded = torch.cat([torch.cat([torch.zeros(1, 7 - p.shape[1], dtype=torch.long), p], dim=1) for p in prompts])
    mask = torch.cat([(torch.arange(7) >= 7 - n).long()[None] for n in lengths])
    output = hf.generate(padded, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False)
    for row, prompt in enumerate(prompts):
        assert torch.equal(output[row, 7:], greedy(model, prompt)[0, prompt.shape[1] :])


def test_beam_search_reorders_every_cache_layer(model: LoopedLM) -> None:
    hf, prompt = hf_model_fp64(model), tokens_of(2, 5)
    settings = {"max_new_tokens": N_NEW, "num_beams": 4, "num_return_sequences": 3, "do_sample": False}
    cached = hf.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, hf.generate(prompt, use_cache=False, **settings))


def test_prefill_in_chunks_generates_the_same(model: LoopedLM) -> None:
    prompt = tokens_of(2, 9)
    output = hf_model(model).generate(prompt, max_new_tokens=N_NEW, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(output, greedy(model, prompt))


def test_sampling_several_continuations_is_seeded(model: LoopedLM) -> None:
    hf, outputs = hf_model(model), []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(hf.generate(tokens_of(1, 3), max_new_tokens=N_NEW, do_sample=True, num_return_sequences=3))
    assert torch.equal(*outputs)
    assert outputs[0].shape == (3, 3 + N_NEW)


def test_generation_continues_on_a_cache_it_returned(model: LoopedLM) -> None:
    hf, prompt = hf_model(model), tokens_of(1, 4)
    first = hf.generate(prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    output = hf.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=N_NEW - 3, do_sample=False
    )
    assert torch.equal(output, greedy(model, prompt))


def test_a_static_cache_generates_the_same(model: LoopedLM) -> None:
    prompt = tokens_of(2, 4)
    output = hf_model(model).generate(
        prompt, max_new_tokens=N_NEW, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(output, greedy(model, prompt))


@pytest.mark.parametrize("pattern", ["dsa", "window,dsa", "dsa,gdn", "retnet,dsa", "dsa,full", "nsa,window"])
def test_a_static_cache_generates_each_left_padded_row_as_if_alone(pattern: str) -> None:
    """generate() prepares masks for a static cache by layer type, and padding must be read off whichever there is."""
    hf, prompt, n_padding = hf_model_fp64(build_from(config_of(pattern=pattern))), tokens_of(3, 9), [0, 4, 7]
    mask = (torch.arange(9) >= torch.tensor(n_padding)[:, None]).long()
    settings = {"max_new_tokens": N_NEW, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    together = hf.generate(prompt, attention_mask=mask, **settings, **static)
    for row, padding in enumerate(n_padding):
        alone = hf.generate(prompt[row : row + 1, padding:], **settings)
        assert torch.equal(together[row, 9:], alone[0, 9 - padding :]), row


def test_a_static_cache_too_small_for_n_loops_is_refused() -> None:
    with pytest.raises(ValueError, match="StaticCache has 4 layers and n_loops=3 needs 6"):
        hf_model(build("full-gate-2-gqa")).generate(
            tokens_of(1, 4), max_new_tokens=2, cache_implementation="static", disable_compile=True, n_loops=3
        )


def test_generate_text_is_transformers_generation_on_the_export(tmp_path: Path, tokenizer_dir: Path) -> None:
    model, prompt = build(HYBRID), "loops within"
    export_hf(model, tmp_path / "out", tokenizer_dir=tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    for n_loops in (None, 1):
        output = hf.generate(**inputs, max_new_tokens=N_NEW, do_sample=False, n_loops=n_loops or 3)
        want = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found = generate_text(tmp_path / "out", prompt, max_new_tokens=N_NEW, n_loops=n_loops, device="cpu")
        assert found == want

    state = torch.get_rng_state()
    texts = [generate_text(tmp_path / "out", prompt, temperature=1.0, seed=seed, device="cpu") for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(generate_text(tmp_path / "out", "", max_new_tokens=2, device="cpu"), str)


def test_generate_text_says_what_is_wrong(tmp_path: Path) -> None:
    export_hf(build(HYBRID), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        generate_text(tmp_path / "out", "loops")
    with pytest.raises(ValueError, match="temperature=-1"):
        generate_text(tmp_path / "out", "loops", temperature=-1)
