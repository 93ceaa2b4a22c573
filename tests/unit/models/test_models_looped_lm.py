"""The looped model: a row is its documents, a loop is the same blocks again, gates start closed."""

import copy

import pytest
import torch
from model_cases import (
    CONFIGS,
    NORMS,
    PATTERNS,
    UPDATES,
    context_of,
    gradients,
    make_config,
    moved_model,
    starting_model,
    tokens_of,
)
from torch import Tensor

from loopline.models.config import ModelConfig
from loopline.models.loop_plan import Step
from loopline.models.looped_lm import LoopedLM, run_step
from loopline.models.packing import Packing
from tests.tolerances import TOLERANCES, rms_ratio

LOGITS = TOLERANCES["fp32", "logits"]
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
UNTIED = {name: config for name, config in CONFIGS.items() if not config.tie_embeddings}
every_update = pytest.mark.parametrize("update", UPDATES)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


# Documents.


@every_config
def test_a_document_has_no_gradient_from_another(config: ModelConfig) -> None:
    model = moved_model(config.model_copy(update={"tie_embeddings": False}))
    tokens = torch.cat([tokens_of(1, 66, high=20), tokens_of(1, 3, low=20, high=40), tokens_of(1, 65, low=40)], dim=1)
    depths = model.forward_depths(tokens, [0, 66, 69, 134], depths=[1, 2, 3])
    rows = gradients(model, [x[:, 66:69] for x in depths])["embed.weight"].abs().sum(-1)
    assert rows[:20].sum() == 0
    assert rows[40:].sum() == 0
    assert torch.equal(rows[20:40] > 0, torch.isin(torch.arange(20, 40), tokens[:, 66:69]))


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65])
@every_pattern
def test_a_batch_is_its_rows(pattern: str, n_tokens: int) -> None:
    model, tokens = moved_model(make_config(pattern=pattern)), tokens_of(3, n_tokens)
    batch = model(tokens)
    assert batch.shape == (3, n_tokens, model.config.vocab_size)
    for row in range(3):
        assert rms_ratio(batch[row], model(tokens[row : row + 1])[0]) <= LOGITS


def test_several_rows_with_boundaries_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match=r"tokens have 2 rows.*one packed row"):
        starting_model(make_config())(tokens_of(2, 4), [0, 4])


def test_positions_restart_at_every_document() -> None:
    assert Packing.of([0, 1, 4, 6], "cpu").positions.tolist() == [[0, 0, 1, 2, 0, 1]]
    assert Packing.of_batch(2, 3, "cpu").cu_seqlens == [0, 3, 6]


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65, 257])
@every_pattern
def test_a_prefix_gives_the_logits_of_the_whole(pattern: str, n_tokens: int) -> None:
    model, tokens = moved_model(make_config(pattern=pattern)), tokens_of(1, 258)
    assert rms_ratio(model(tokens[:, :n_tokens]), model(tokens)[:, :n_tokens]) <= LOGITS


# Loops.


def unrolled(model: LoopedLM) -> LoopedLM:
    """A plain stack of n_loops * n_blocks blocks, each with its own copy of the weights of the block it stands for."""
    config = model.config
    names = ",".join(config.mixer_names * config.n_loops)
    stack = LoopedLM(
        config.model_copy(update={"n_blocks": config.plan.depth, "n_loops": 1, "pattern": names, "update": "replace"})
    )
    for part in ("embed", "final_norm", "head"):
        getattr(stack, part).load_state_dict(getattr(model, part).state_dict())
    for depth in range(config.plan.depth):
        stack.blocks[str(depth)].load_state_dict(model.blocks[str(depth % config.n_blocks)].state_dict())
    return stack


def stack_logits(stack: LoopedLM, tokens: Tensor, rho: list[Tensor] | None, norms: list[Tensor] | None) -> Tensor:
    """The unrolled stack's logits; every so many blocks, the update of the loop written out."""
    context = context_of([0, tokens.shape[1]])
    n_loops = len(rho or norms or [None])
    n_blocks = len(stack.blocks) // n_loops
    h = stack.embed.weight[tokens]
    for r in range(n_loops):
        h_in = h
        for b in range(n_blocks):
            h = stack.blocks[str(r * n_blocks + b)](h, context)
        if rho is not None:
            h = h + rho[r] * h_in
        if norms is not None:
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + stack.config.norm_eps) * norms[r]
    return stack.head(h if norms is not None else stack.final_norm(h))


@pytest.mark.parametrize("config", UNTIED.values(), ids=UNTIED)
def test_looped_model_is_its_blocks_unrolled_with_tied_weights(config: ModelConfig) -> None:
    model, tokens = moved_model(config), tokens_of(1, 67)
    stack, n_loops = unrolled(model), config.n_loops
    rho = norms = None
    if config.update == "gate":
        rho = [row.clone().requires_grad_() for row in model.loop_gate.rho.detach()]
    elif config.update == "norm":
        norms = [model.final_norm.weight.detach().clone().requires_grad_() for _ in range(n_loops)]
    else:
        assert torch.equal(stack(tokens), stack_logits(stack, tokens, None, None))
    looped = model(tokens)
    plain = stack(tokens) if config.update == "replace" else stack_logits(stack, tokens, rho, norms)
    assert rms_ratio(looped.detach(), plain.detach()) <= LOGITS

    upstream = torch.randn(looped.shape, generator=torch.Generator().manual_seed(7))
    (looped * upstream).sum().backward()
    (plain * upstream).sum().backward()
    expected = {name: p.grad for name, p in stack.named_parameters() if not name.startswith("blocks.")}
    if config.update == "gate":
        expected["loop_gate.rho"] = torch.stack([row.grad for row in rho])
    if config.update == "norm":
        expected["final_norm.weight"] = sum(copy.grad for copy in norms)
    for b in range(config.n_blocks):
        copies = [dict(stack.blocks[str(r * config.n_blocks + b)].named_parameters()) for r in range(n_loops)]
        expected |= {f"blocks.{b}.{name}": sum(c[name].grad for c in copies) for name in copies[0]}
    found = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in found}
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst


@every_pattern
def test_one_loop_is_a_plain_stack_bit_for_bit(pattern: str) -> None:
    model = moved_model(make_config(pattern=pattern, n_loops=1, update="replace"))
    tokens = tokens_of(1, 65)
    h, context = model.embed.weight[tokens], context_of([0, 65])
    for block in model.blocks.values():
        h = h + block.mixer(block.mixer_norm(h), context)
        h = h + block.ffn(block.ffn_norm(h))
    assert torch.equal(model(tokens), model.head(model.final_norm(h)))


@torch.no_grad()
def test_exit_probabilities_are_the_published_distribution_of_the_states_the_head_sees() -> None:
    """Ouro, arXiv:2510.25741: p_r = lambda_r prod_{j<r} (1 - lambda_j) for r < R, and what is left for R."""
    model, tokens = moved_model(make_config(update="norm", exit_gate=True)), tokens_of(2, 7)
    found = model.exit_probabilities(tokens)
    gates = [
        (model.exit_gate.bias + model.normed(h) @ model.exit_gate.weight[0]).sigmoid().view(2, 7)
        for h in model.states(tokens, None, 3)
    ]
    expected = torch.stack([gates[0], (1 - gates[0]) * gates[1], (1 - gates[0]) * (1 - gates[1])])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(0), torch.ones(2, 7))
    assert torch.equal(model.exit_probabilities(tokens, 1), torch.ones(1, 2, 7))


def test_blocks_run_in_the_order_of_the_plan() -> None:
    model, seen = moved_model(make_config(n_blocks=3)), []

    def record(block, x, context):  # type: ignore[no-untyped-def]
        assert block is model.blocks[str(context.block_idx)]
        seen.append(Step(context.block_idx, context.loop_idx))
        return run_step(block, x, context)

    model.run_step = record
    model(tokens_of(1, 5))
    assert seen == model.config.plan.steps()


@torch.no_grad()
@every_config
def test_loop_count_at_call_time_is_that_of_a_model_built_with_it(config: ModelConfig) -> None:
    model, tokens = moved_model(config), tokens_of(1, 65)
    for n_loops in (1, 2):
        shallow = LoopedLM(config.model_copy(update={"n_loops": n_loops}))
        weights = model.state_dict()
        if config.update == "gate":
            weights["loop_gate.rho"] = weights["loop_gate.rho"][:n_loops]
        shallow.load_state_dict(weights)
        assert torch.equal(model(tokens, n_loops=n_loops), shallow(tokens))
    assert torch.equal(model(tokens, n_loops=3), model(tokens))


@torch.no_grad()
@every_update
def test_more_loops_than_trained_reuse_the_last_gate(update: str) -> None:
    model, tokens = moved_model(make_config(update=update)), tokens_of(1, 65)
    deep = LoopedLM(model.config.model_copy(update={"n_loops": 5}))
    weights = model.state_dict()
    if update == "gate":
        rho = weights["loop_gate.rho"]
        weights["loop_gate.rho"] = torch.cat([rho, rho[-1:], rho[-1:]])
    deep.load_state_dict(weights)
    assert torch.equal(model(tokens, n_loops=5), deep(tokens))


@torch.no_grad()
@every_config
def test_logits_at_depths_are_those_of_each_loop_count_bit_for_bit(config: ModelConfig) -> None:
    model, tokens = moved_model(config), tokens_of(2, 9)
    expected = {n: model(tokens, n_loops=n) for n in (1, 2, 3, 4)}
    for depths in ([1, 2, 3], [1, 3], [2]):
        found = model.forward_depths(tokens, depths=depths)
        assert len(found) == len(depths)
        assert all(torch.equal(logits, expected[n]) for logits, n in zip(found, depths))
    (last,) = model.forward_depths(tokens)
    assert torch.equal(last, expected[3])
    first, deepest = model.forward_depths(tokens, n_loops=4, depths=[1, 4])
    assert torch.equal(first, expected[1])
    assert torch.equal(deepest, expected[4])


# Gates.


@pytest.mark.parametrize("norm", NORMS)
@every_pattern
def test_a_zero_loop_gate_is_plain_replacement_bit_for_bit(pattern: str, norm: str) -> None:
    tokens = tokens_of(1, 65)
    gated, plain = (starting_model(make_config(pattern=pattern, norm=norm, update=u)) for u in ("gate", "replace"))
    assert gated.loop_gate.rho.abs().sum() == 0
    found, expected = (m.forward_depths(tokens, depths=[1, 2, 3]) for m in (gated, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    found, expected = gradients(gated, found), gradients(plain, expected)
    rho_gradient = found.pop("loop_gate.rho")
    assert (rho_gradient != 0).any(-1).all()  # and it can open, at every loop
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_zero_output_gate_halves_what_attention_adds_bit_for_bit() -> None:
    context = context_of([0, 3, 68])
    config = make_config(pattern="full")
    open_config = make_config(pattern="full", full=config.full.model_copy(update={"output_gate": False}))
    gated, plain = (starting_model(c).blocks["0"].mixer for c in (config, open_config))
    assert gated.gate_proj.weight.abs().sum() == 0
    x = torch.randn(1, 68, 24, generator=torch.Generator().manual_seed(1))
    # sigmoid(0) = 1/2, and a factor of a power of two is exact.
    assert torch.equal(gated(x, context), 0.5 * plain(x, context))


def test_the_output_gate_is_a_sigmoid_per_channel_before_the_output_projection() -> None:
    context, mixer = context_of([0, 5]), moved_model(make_config(pattern="full")).blocks["0"].mixer
    x = torch.randn(1, 5, 24)
    plain = copy.deepcopy(mixer)
    plain.gate_proj, plain.o_proj = None, torch.nn.Identity()
    expected = mixer.o_proj(plain(x, context) * torch.sigmoid(x @ mixer.gate_proj.weight.T))
    torch.testing.assert_close(mixer(x, context), expected)


def test_a_tied_head_is_the_embedding() -> None:
    model = moved_model(make_config(tie_embeddings=True))
    free = LoopedLM(make_config())
    free.load_state_dict(model.state_dict())
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())
    tokens = tokens_of(1, 65)
    tied_logits, free_logits = model(tokens), free(tokens)
    assert torch.equal(tied_logits, free_logits)
    found, expected = gradients(model, [tied_logits]), gradients(free, [free_logits])
    expected["embed.weight"] = expected["embed.weight"] + expected.pop("head.weight")
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert all(ratio <= TOLERANCES["fp32", "gradients"] for ratio in worst.values()), worst
