"""Documents packed into a row are as each document alone, for every mixer: logits at every depth, every gradient."""

import itertools

import pytest
import torch
from model_cases import EVERY_MIXER, add_gradients, moved_model, tokens_of

from loopline.models.config import ModelConfig
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [1, 63, 257, 1, 64, 65, 2]
CU_SEQLENS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
# These choose keys by score: another rounding may turn a choice, and then no tolerance holds. In fp64 none turns.
CHOOSING = {"nsa", "dsa"}
every_mixer = pytest.mark.parametrize("config", EVERY_MIXER.values(), ids=EVERY_MIXER)


@torch.no_grad()
@every_mixer
def test_packed_documents_give_the_logits_of_each_document_alone_at_every_loop(config: ModelConfig) -> None:
    dtype = torch.float64 if CHOOSING & set(config.mixer_names) else torch.float32
    if "retnet" in config.mixer_names:
        # As in the gradients' tests. At 1e-3 its norm magnifies the rounding of a document of one token, on some
        # processors to 9e-5 after three loops (3e-13 in fp64).
        config = config.model_copy(update={"norm_eps": 0.3})
    model, tokens, depths = moved_model(config, dtype).to(dtype), tokens_of(1, CU_SEQLENS[-1]), [1, 2, 3]
    packed = model.forward_depths(tokens, CU_SEQLENS, depths=depths)
    for start, end in itertools.pairwise(CU_SEQLENS):
        alone = model.forward_depths(tokens[:, start:end], depths=depths)
        for depth in range(3):  # rms_ratio is infinite where anything is not finite
            ratio = rms_ratio(packed[depth][:, start:end], alone[depth])
            assert ratio <= TOLERANCES["fp32", "logits"], (start, end, depth)


@every_mixer
def test_packed_documents_give_every_gradient_of_the_documents_alone(config: ModelConfig) -> None:
    # fp64: loops magnify rounding, of DeltaNet's gradients beyond the tolerance; here what differs is not rounding.
    packed, alone = (moved_model(config, torch.float64).double() for _ in range(2))
    tokens, generator = tokens_of(1, CU_SEQLENS[-1]), torch.Generator().manual_seed(7)
    shape = (config.n_loops, *tokens.shape, config.vocab_size)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    add_gradients(packed, tokens, CU_SEQLENS, upstream)
    for start, end in itertools.pairwise(CU_SEQLENS):
        add_gradients(alone, tokens[:, start:end], [0, end - start], upstream[:, :, start:end])
    expected = {name: parameter.grad for name, parameter in alone.named_parameters()}
    worst = {name: rms_ratio(p.grad, expected[name]) for name, p in packed.named_parameters()}
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst
