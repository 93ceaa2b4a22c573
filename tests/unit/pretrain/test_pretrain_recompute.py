"""Recomputation changes what is kept and nothing that is computed."""

import pytest
import torch
from torch import Tensor

from loopline.models.config import ModelConfig
from loopline.models.init import init_weights
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.recompute import recomputing

TOKENS = torch.randint(64, (1, 67), generator=torch.Generator().manual_seed(0))
LOOPS = [None, frozenset({0}), frozenset({2}), frozenset({0, 2}), frozenset()]
N_LOOPS = 3


def make_model(update: str = "gate", dtype: torch.dtype = torch.float32) -> LoopedLM:
    full = {"n_heads": 4, "output_gate": True}
    config = ModelConfig(vocab_size=64, pattern="gdn,full", n_loops=N_LOOPS, update=update, full=full)
    model = LoopedLM(config, dtype)
    init_weights(model, seed=0)
    return model


def run(model: LoopedLM) -> dict[str, Tensor]:
    """Logits and every gradient."""
    logits = model(TOKENS, [0, 1, 3, 67])
    logits.float().square().sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", ["replace", "norm", "gate"])
@pytest.mark.parametrize("loops", LOOPS, ids=str)
def test_recompute_equals_no_recompute_bit_for_bit(
    loops: frozenset[int] | None, update: str, dtype: torch.dtype
) -> None:
    expected = run(make_model(update, dtype))
    model = make_model(update, dtype)
    model.run_step = recomputing(loops)
    found = run(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("loops", LOOPS, ids=str)
def test_the_chosen_loops_and_no_others_run_again(loops: frozenset[int] | None) -> None:
    model, calls = make_model(), {"0": 0, "1": 0}
    for name, block in model.blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    model.run_step = recomputing(loops)
    run(model)
    again = N_LOOPS if loops is None else len(loops)
    assert calls == {"0": N_LOOPS + again, "1": N_LOOPS + again}


def kept_bytes(loops: frozenset[int] | None) -> int:
    """Bytes of activations held at the end of the forward pass."""
    model, kept = make_model(), {}
    weights = {p.data_ptr() for p in model.parameters()}
    model.run_step = recomputing(loops)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(TOKENS)
    return sum(size for size, _ in kept.values())


def test_each_recomputed_loop_keeps_less() -> None:
    none, one, two, every = (kept_bytes(loops) for loops in (frozenset(), frozenset({1}), frozenset({0, 1}), None))
    assert none > one > two > every
    assert every < none / 3
