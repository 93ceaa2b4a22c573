"""Looping window attention widens what a token sees: N blocks looped R times see N R (w - 1) + 1 tokens, no more."""

import pytest
import torch
from model_cases import make_config, moved_model
from torch import Tensor

from loopline.models.settings.window import WindowAttentionConfig


def reach_of_gradients(n_blocks: int, n_loops: int, window: int, update: str, n_tokens: int, t: int) -> list[Tensor]:
    """After each loop, [T]: the size of the gradient of token t's logits with respect to every token's embedding."""
    config = make_config(
        vocab_size=n_tokens,
        n_blocks=n_blocks,
        n_loops=n_loops,
        pattern="window",
        update=update,
        window=WindowAttentionConfig(n_heads=4, n_kv_heads=2, d_head=6, window=window),
    )
    model = moved_model(config, torch.float64).double()
    tokens = torch.arange(n_tokens)[None]  # each once, so that a row of the table is one token's embedding
    depths = model.forward_depths(tokens, depths=list(range(1, n_loops + 1)))
    upstream = torch.randn(n_tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    losses = [(logits[0, t] * upstream).sum() for logits in depths]
    return [torch.autograd.grad(loss, model.embed.weight, retain_graph=True)[0].abs().sum(-1) for loss in losses]


@pytest.mark.parametrize("update", ["replace", "gate"])
@pytest.mark.parametrize(
    ("n_blocks", "n_loops", "window"), [(1, 1, 2), (1, 4, 3), (3, 2, 4), (2, 3, 5), (4, 1, 8), (1, 2, 70), (2, 2, 33)]
)
def test_a_token_sees_as_far_as_blocks_times_loops_times_the_window_and_no_further(
    n_blocks: int, n_loops: int, window: int, update: str
) -> None:
    reach = n_blocks * n_loops * (window - 1)
    n_tokens = reach + 6
    for t in (n_tokens - 1, n_tokens - 3):
        sizes = reach_of_gradients(n_blocks, n_loops, window, update, n_tokens, t)
        for loop_idx, size in enumerate(sizes):
            first = t - n_blocks * (loop_idx + 1) * (window - 1)
            assert (size[first : t + 1] > 0).all(), (t, loop_idx)  # N R (w - 1) + 1 tokens, the farthest included
            assert size[:first].sum() == 0, (t, loop_idx)
            assert size[t + 1 :].sum() == 0, (t, loop_idx)
