"""Sparse attention in the looped model: who trains what, and what loops share."""

import gc
import itertools

import pytest
import torch
from model_cases import make_config, moved_model, tokens_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.llama import modeling_llama

from loopline.kernels.dsa import reference
from loopline.kernels.dsa.visible import Selection, per_query
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext, RowContext
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers import dsa
from loopline.models.packing import Packing
from loopline.models.settings.dsa import SparseAttentionConfig
from tests.tolerances import TOLERANCES, rms_ratio
from tests.unit.small_mixers import SMALL

LENGTHS = [9, 1, 25]
BOUNDARIES = [0, *itertools.accumulate(LENGTHS)]
SHARING = {"every loop": None, "first loop": (0,), "first and third": (0, 2)}
SCALE = 0.25  # of the auxiliary gradient


def config_of(**settings: object) -> ModelConfig:
    dsa = SMALL["dsa"].model_copy(update={"top_k": 4, **settings})
    return make_config(pattern="full,dsa", n_loops=3, dsa=dsa)


def model_of(config: ModelConfig) -> LoopedLM:
    """In fp64: selections are discrete, and rounding must not decide them."""
    return moved_model(config, torch.float64).double()


def run(model: LoopedLM, row: RowContext, tokens: Tensor, *, recompute: bool = False) -> Tensor:
    """Logits after the last loop."""
    if recompute:
        model.run_step = lambda block, x, context: checkpoint(block, x, context, use_reentrant=False)
    h = model.embed_tokens(tokens)
    for loop_idx in range(row.n_loops):
        h = model.finish_loop(model.run_blocks(h, loop_idx, row), h, loop_idx)
    return model.read_out(h)


def row_of(scale: float | None = SCALE) -> RowContext:
    return RowContext(Packing.of(BOUNDARIES, "cpu"), 3, scale)


def gradients_of(model: LoopedLM, row: RowContext, *, recompute: bool = False) -> dict[str, Tensor | None]:
    """Of a fixed random projection of the logits."""
    logits = run(model, row, tokens_of(1, sum(LENGTHS)), recompute=recompute)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("loss", ["sparse", "dense"])
def test_the_language_model_loss_trains_all_but_the_indexer_and_the_indexers_loss_the_indexer_alone(loss: str) -> None:
    model = model_of(config_of(index_loss=loss))
    without, with_it = gradients_of(model, row_of(None)), gradients_of(model, row_of())
    for name in without:
        if ".index_" in name:
            assert without[name] is None, name
            assert with_it[name].abs().sum() > 0, name
        else:
            assert torch.equal(with_it[name], without[name]), name


class Recorder:
    """Puts what attention saw in each loop aside, by wrapping the block's `learn`."""

    def __init__(self, model: LoopedLM) -> None:
        self.mixer = model.blocks["1"].mixer
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.inputs: list[Tensor] = []
        learn, index = self.mixer.learn, self.mixer.index

        def record(q: Tensor, k: Tensor, visible: Selection | None, *others: object, lse: Tensor | None) -> None:
            self.seen.append((q, k, per_query(visible)))
            learn(q, k, visible, *others, lse=lse)

        def record_input(x: Tensor, context: BlockContext) -> tuple[Tensor, Tensor, Tensor]:
            self.inputs.append(x)
            return index(x, context)

        self.mixer.learn, self.mixer.index = record, record_input
        self.plain_index = index


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", ["sparse", "dense"])
@pytest.mark.parametrize("tile", [None, 5])
@pytest.mark.parametrize("sharing", SHARING)
def test_the_indexers_gradient_is_that_of_its_divergence_from_the_mean_attention_of_the_loops_it_served(
    sharing: str, tile: int | None, loss: str, recompute: bool
) -> None:
    """Against the loss written out with autograd: one divergence a choice, its target the mean over loops."""
    model = model_of(config_of(index_loss=loss, selection_loops=SHARING[sharing], selection_tile=tile))
    recorder = Recorder(model)
    found = gradients_of(model, row_of(), recompute=recompute)
    del recorder.seen[3:], recorder.inputs[len(SHARING[sharing] or (0, 1, 2)) :]  # what recomputation saw again

    chosen_in = [model.config.dsa.selecting_loop(r) for r in range(3)]
    scale = model.config.dsa.head_size(model.config.d_model) ** -0.5
    total = torch.zeros((), dtype=torch.float64)
    for x, loop_idx in zip(recorder.inputs, sorted(set(chosen_in)), strict=True):
        q_index, k_index, weights = recorder.plain_index(x, row_of().at(1, loop_idx))
        served = [recorder.seen[r] for r in range(3) if chosen_in[r] == loop_idx]
        targets = [
            reference.probabilities(q, k, visible, cu_seqlens=BOUNDARIES, scale=scale).sum(0)
            for q, k, visible in served
        ]
        target = torch.stack([p / p.sum(-1, keepdim=True) for p in targets]).mean(0)  # [T, T]
        scores = reference.index_scores(q_index[0], k_index[0], weights[0])
        scores = scores.masked_fill(target == 0, float("-inf")).log_softmax(-1)
        total = total + torch.where(target > 0, target * (target.clamp_min(1e-300).log() - scores), 0).sum()
    parameters = {name: p for name, p in model.named_parameters() if ".index_" in name}
    expected = torch.autograd.grad(SCALE * total, list(parameters.values()))
    for name, value in zip(parameters, expected):
        assert rms_ratio(found[name], value) <= 1e-9, name


@pytest.mark.parametrize("sharing", SHARING)
def test_recomputed_blocks_give_the_same_gradients(sharing: str) -> None:
    config = config_of(selection_loops=SHARING[sharing])
    plain, again = gradients_of(model_of(config), row_of()), gradients_of(model_of(config), row_of(), recompute=True)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_a_shared_choice_is_made_once_and_used_by_the_loops_it_serves() -> None:
    model = model_of(config_of(selection_loops=(0, 2)))
    recorder = Recorder(model)
    row = row_of(None)
    run(model, row, tokens_of(1, sum(LENGTHS)))
    first, second, third = (visible for _, _, visible in recorder.seen)
    assert first is second
    assert third is not first
    assert len(recorder.inputs) == 2
    assert set(row.memory[1]) == {0, 2}
    assert row.memory[0] == {}  # full attention leaves nothing


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
def test_nothing_a_loop_leaves_outlives_the_backward_pass(sharing: str, recompute: bool) -> None:
    """A step keeps its micro-batches for their figures: choices kept with them would add up over the step."""
    model, row = model_of(config_of(selection_loops=SHARING[sharing])), row_of()
    gradients_of(model, row, recompute=recompute)
    assert not any(row.memory.values())
    assert row.sums("indexer_loss")[1] == 3 * sum(LENGTHS)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_forward_pass_without_its_backward_leaves_nothing(recompute: bool) -> None:
    """As after an exception between the two: a recomputation's hooks hold the memory, and it must not hold them."""
    gc.collect()
    n_before = sum(isinstance(each, dsa._Served) for each in gc.get_objects())
    run(model_of(config_of()), row_of(), tokens_of(1, sum(LENGTHS)), recompute=recompute)
    gc.collect()
    assert sum(isinstance(each, dsa._Served) for each in gc.get_objects()) == n_before


def test_a_tile_shares_the_choice_of_its_past_and_sees_itself_besides() -> None:
    """Four tokens share; the lists are found from index scores, one key at a time."""
    model, row = model_of(config_of(selection_tile=4)), row_of(None)
    recorder = Recorder(model)
    run(model, row, tokens_of(1, sum(LENGTHS)))
    q_index, k_index, weights = recorder.plain_index(recorder.inputs[0], row.at(1, 0))
    scores = reference.index_scores(q_index[0], k_index[0], weights[0]).tolist()
    for t, visible in enumerate(recorder.seen[0][2].tolist()):
        start = max(bound for bound in BOUNDARIES if bound <= t)
        first = t - (t - start) % 4
        scorers = range(max(start, first - 3), first + 1)
        best = {s: max(scores[u][s] for u in scorers if u >= s) for s in range(start, first)}
        listed = sorted(best, key=lambda s: (-best[s], s))[:4]
        assert [s for s in visible if s >= 0] == [*sorted(listed), *range(first, t + 1)]


def test_overlap_of_choices_is_recorded_where_there_are_two() -> None:
    tokens = tokens_of(1, sum(LENGTHS))
    shared, each = row_of(None), row_of(None)
    run(model_of(config_of(selection_loops=(0,))), shared, tokens)
    assert shared.sums("selection_overlap") == (0, 0)
    run(model_of(config_of()), each, tokens)
    total, count = each.sums("selection_overlap")
    assert count == 2 * sum(LENGTHS)  # loop 1 against 0, and 2 against 1
    selections = [served.selection for served in each.memory[1].values()]
    expected = 0.0
    for a, b in itertools.pairwise(selections):
        for x, y in zip(a.tolist(), b.tolist()):
            x, y = set(x) - {-1}, set(y) - {-1}
            expected += len(x & y) / len(x)
    assert total == pytest.approx(expected)


def test_dense_warm_up_is_full_attention() -> None:
    config = config_of(index_loss="dense")
    dense, sparse = model_of(config), model_of(config_of(top_k=1000))
    full = LoopedLM(config.model_copy(update={"pattern": "full", "full": SMALL["full"]}), torch.float64).double()
    full.load_state_dict({n: p for n, p in dense.state_dict().items() if ".index_" not in n})
    tokens = tokens_of(1, sum(LENGTHS))
    expected = full(tokens, BOUNDARIES)
    for model in (dense, sparse):  # a top_k past every document leaves nothing out
        assert rms_ratio(model(tokens, BOUNDARIES), expected) <= 1e-9


def test_index_heads_turn_with_position_in_their_first_channels_only() -> None:
    """Partial rotary positions in the half-split layout, as transformers' Llama turns whole heads."""
    mixer = model_of(config_of()).blocks["1"].mixer
    x = torch.randn(1, sum(LENGTHS), 24, dtype=torch.float64)
    q, k, _ = mixer.index(x, row_of().at(1, 0))
    raw_q = mixer.index_q_proj(x).unflatten(-1, (3, 6))
    raw_k = mixer.index_k_norm(mixer.index_k_proj(x))
    assert torch.equal(q[..., 4:], raw_q[..., 4:])
    assert torch.equal(k[..., 4:], raw_k[..., 4:])
    cos, sin = (table[:, :, 0] for table in row_of().packing.rotary(4, 10000.0))
    turned_q, turned_k = modeling_llama.apply_rotary_pos_emb(raw_q[..., :4], raw_k[:, :, None, :4], cos, sin, 2)
    torch.testing.assert_close(q[..., :4], turned_q)
    torch.testing.assert_close(k[..., :4], turned_k[:, :, 0])


def test_a_loop_past_the_trained_ones_reuses_the_last_choice() -> None:
    model = model_of(config_of(selection_loops=(0,)))
    logits = model.forward_depths(tokens_of(2, 11), n_loops=5, depths=[3, 5])
    assert all(x.isfinite().all() for x in logits)


@pytest.mark.parametrize("top_k", [1, 4, 7])
def test_fp32_follows_fp64(top_k: int) -> None:
    """Scores differ by rounding only, so choices agree but at near ties, of which this seed has none."""
    config, tokens = config_of(top_k=top_k), tokens_of(1, sum(LENGTHS))
    with torch.no_grad():
        found, expected = moved_model(config)(tokens, BOUNDARIES), model_of(config)(tokens, BOUNDARIES)
    assert rms_ratio(found, expected) <= TOLERANCES["fp32", "logits"]


# Learning from some of the queries.


@pytest.mark.parametrize("loss", ["sparse", "dense"])
def test_indexer_gradients_averaged_over_samples_are_those_of_all_queries(loss: str) -> None:
    """Three documents, so three tiles of queries, one of which enters."""
    whole = gradients_of(model_of(config_of(index_loss=loss)), row_of())
    sampled = model_of(config_of(index_loss=loss, index_loss_rows=3))
    samples = []
    for i in range(3):
        row = row_of()
        row.draw = i
        samples.append(gradients_of(sampled, row))
    for name, expected in whole.items():
        found = torch.stack([sample[name] for sample in samples])
        if ".index_" in name:
            assert rms_ratio(found.mean(0), expected) <= 1e-9, name
            assert rms_ratio(found[0], expected) > 1e-2, name
        else:
            assert all(torch.equal(x, expected) for x in found), name


def test_blocks_loops_and_rows_sample_other_queries_and_a_row_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []
    indexer_loss = dsa.indexer_loss

    def noting(*arguments, row_offset: int, **options):  # type: ignore[no-untyped-def]
        offsets.append(row_offset)
        return indexer_loss(*arguments, row_offset=row_offset, **options)

    monkeypatch.setattr(dsa, "indexer_loss", noting)
    model = model_of(config_of(index_loss_rows=1000))
    for draw in (5, 5, 7):
        row = row_of()
        row.draw = draw
        gradients_of(model, row)
    first, again, other = (offsets[i : i + len(offsets) // 3] for i in range(0, len(offsets), len(offsets) // 3))
    assert first == again
    assert all(a != b for a, b in zip(first, other))
    assert len(set(first)) > 1  # blocks and loops of one row


def test_recomputed_blocks_sample_the_same_queries() -> None:
    config = config_of(index_loss_rows=2)
    plain, again = gradients_of(model_of(config), row_of()), gradients_of(model_of(config), row_of(), recompute=True)
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_a_sample_of_no_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match=r"index_loss_rows[\s\S]*greater than or equal to 1"):
        SparseAttentionConfig(index_loss_rows=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index_d_head": 192}, r"model.dsa.index_d_head \(192\) must be at most 128 .*'triton'.*'reference'"),
        ({"d_head": 24}, r"model.dsa.d_head \(24\) must be a multiple of 16 .*'triton'"),
    ],
    ids=str,
)
def test_sizes_without_a_kernel_are_refused_with_triton_alone(settings: dict[str, int], message: str) -> None:
    sizes = {"d_head": 16, "index_d_head": 64, "index_d_rope": 32, **settings}
    config_of(**sizes, backend="reference")
    with pytest.raises(ValueError, match=message):
        make_config(pattern="dsa", dsa=SMALL["dsa"].model_copy(update={**sizes, "backend": "triton"}))
