"""Nothing looks ahead: whatever the mixer and however often it is looped, a token acts on itself and on later ones."""

import pytest
import torch
from model_cases import EVERY_MIXER, moved_model, tokens_of
from torch import Tensor

from loopline.kernels.delta_rule.reference import recurrent
from loopline.models.config import ModelConfig

every_mixer = pytest.mark.parametrize("config", EVERY_MIXER.values(), ids=EVERY_MIXER)
SEES_ALL = {"full", "gdn"}  # a window ends, a sparse mixer chooses, and what decays far enough rounds to nothing


@torch.no_grad()
def changed_logits(config: ModelConfig, cu_seqlens: list[int], at: list[int]) -> list[list[Tensor]]:
    """For each place in `at` and each loop, [T]: which tokens' logits differ in any bit once the token there does."""
    model, n_tokens, depths = moved_model(config), cu_seqlens[-1], [1, 2, 3]
    tokens = tokens_of(1, n_tokens)
    before = model.forward_depths(tokens, cu_seqlens, depths=depths)
    found = []
    for place in at:
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % config.vocab_size
        after = model.forward_depths(changed, cu_seqlens, depths=depths)
        assert all(logits.isfinite().all() for logits in after)
        found.append([(old != new).any(-1)[0] for old, new in zip(before, after)])
    return found


@every_mixer
def test_a_token_changes_its_own_logits_and_none_before_it_at_every_loop(config: ModelConfig) -> None:
    at = [0, 1, 63, 64, 130]  # chunks are of 64 tokens
    for t, depths in zip(at, changed_logits(config, [0, 131], at)):
        for loop_idx, is_changed in enumerate(depths):
            assert not is_changed[:t].any(), (t, loop_idx)
            assert is_changed[t], (t, loop_idx)
            if set(config.mixer_names) <= SEES_ALL:
                assert is_changed[t:].all(), (t, loop_idx)


@every_mixer
def test_a_token_changes_no_logits_of_another_document(config: ModelConfig) -> None:
    start, end = 66, 131
    at = [start, start + 1, start + 30, end - 1]
    for t, depths in zip(at, changed_logits(config, [0, 65, 66, 131, 132, 150], at)):
        for loop_idx, is_changed in enumerate(depths):
            assert not is_changed[:t].any(), (t, loop_idx)
            assert is_changed[t], (t, loop_idx)
            assert not is_changed[end:].any(), (t, loop_idx)


def two_loops(inputs: list[float], *, is_state_carried: bool) -> list[float]:
    """The delta rule with beta = 1/2 and k = q = 1 over two tokens, its output fed to it again as values."""
    ones = torch.ones(1, 2, 1, 1)
    x, state = torch.tensor(inputs).view(1, 2, 1, 1), None
    for _ in range(2):
        x, final = recurrent(ones, ones, x, beta=0.5 * ones[..., 0], scale=1.0, cu_seqlens=[0, 2], initial_state=state)
        state = final if is_state_carried else None
    return x.flatten().tolist()


def test_every_loop_starts_from_a_zero_state_because_a_carried_one_knows_the_future() -> None:
    assert two_loops([1.0, 2.0], is_state_carried=False) == [0.25, 0.75]
    assert two_loops([1.0, 4.0], is_state_carried=False)[0] == 0.25
    # What we must not do: the state at the end of a loop has seen every token, and the next loop's first would read it.
    assert two_loops([1.0, 2.0], is_state_carried=True)[0] == 0.875
    assert two_loops([1.0, 4.0], is_state_carried=True)[0] == 1.375
