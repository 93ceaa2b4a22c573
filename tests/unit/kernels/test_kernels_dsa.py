"""DeepSeek sparse attention: blocks equal loops with every gradient, selections are exact, nothing T x T is held."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from dsa_cases import PACKED, Inputs, attention_results, make_inputs
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopline.kernels.attention.op import packed_attention
from loopline.kernels.backends import check_backend
from loopline.kernels.dsa import op, reference
from loopline.kernels.dsa.bitmask import Bitmask, population, spread
from loopline.kernels.dsa.blocks import ROW_TILE
from loopline.kernels.errors import BackendError
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [[1], [2], [63], [257]]
TOP_KS = [1, 7, 1000]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert all(ratio <= (tolerance or TOLERANCES["fp32", "op"]) for ratio in worst.values()), worst


def select(inputs: Inputs, top_k: int, **changes: Any) -> Tensor:
    return op.select(**inputs.index, top_k=top_k, cu_seqlens=inputs.cu_seqlens, **changes)


def loss_of(inputs: Inputs, selection: Tensor | Bitmask | None, **changes: Any) -> op.IndexerLoss:
    return op.indexer_loss(
        inputs.q, inputs.k, selection, **inputs.index, cu_seqlens=inputs.cu_seqlens, scale=inputs.scale, **changes
    )


def attend(inputs: Inputs, selection: Tensor | Bitmask | None, **changes: Any) -> Tensor:
    return op.sparse_attention(**inputs.attention, selection=selection, cu_seqlens=inputs.cu_seqlens, **changes)


def token_sets(selection: Tensor) -> list[list[int]]:
    return [[s for s in row if s >= 0] for row in selection.tolist()]


# Index scores and selection.


@pytest.mark.parametrize(("n_heads", "d_index"), [(1, 1), (3, 7), (4, 16)])
@pytest.mark.parametrize("n_tokens", [1, 2, 63])
def test_index_scores_equal_the_sum_over_heads(n_tokens: int, n_heads: int, d_index: int) -> None:
    inputs = make_inputs([n_tokens], n_index_heads=n_heads, d_index=d_index)
    row = [x[0] for x in inputs.index.values()]
    assert rms_ratio(op.index_scores(*row), reference.index_scores(*row)) <= TOLERANCES["fp32", "op"]
    assert op.index_scores(*(x.double() for x in row)).dtype == torch.float64
    assert op.index_scores(*(x.bfloat16() for x in row)).dtype == torch.float32


def test_index_scores_by_hand() -> None:
    q_index = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    k_index = torch.tensor([[3.0, -1.0], [-3.0, 1.0]])
    assert op.index_scores(q_index, k_index, torch.tensor([[10.0, -1.0]])).tolist() == [[30.0, -2.0]]


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("is_grid", [False, True], ids=["real", "many-ties"])
@pytest.mark.parametrize("lengths", LENGTHS + PACKED, ids=str)
def test_selection_equals_a_sort_by_score_and_position(lengths: list[int], is_grid: bool, top_k: int) -> None:
    inputs = make_inputs(lengths, is_grid=is_grid, dtype=torch.float32 if is_grid else torch.float64)
    found = select(inputs, top_k)
    assert found.dtype == torch.int32
    assert torch.equal(found, reference.select(**inputs.index, top_k=top_k, cu_seqlens=inputs.cu_seqlens))


@pytest.mark.parametrize("top_k", TOP_KS)
def test_every_query_selects_distinct_keys_of_its_own_past_as_many_as_there_are(top_k: int) -> None:
    inputs = make_inputs([1, 63, 1, 40], is_grid=True)
    for keys, seen in zip(token_sets(select(inputs, top_k)), reference.past(inputs.cu_seqlens)):
        assert len(keys) == len(set(keys)) == min(top_k, len(seen))
        assert set(keys) <= set(seen)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_equal_scores_select_the_lowest_positions(weight: float, sign: float) -> None:
    inputs = make_inputs([20, 9])
    # sign -1: every product is cut by the relu, and scores are zeros of either sign.
    inputs = replace(
        inputs,
        q_index=torch.full_like(inputs.q_index, sign),
        k_index=torch.ones_like(inputs.k_index),
        weights=torch.full_like(inputs.weights, weight),
    )
    expected = [positions[:4] for positions in reference.past(inputs.cu_seqlens)]
    assert token_sets(select(inputs, 4)) == expected


def test_zeros_of_both_signs_are_a_tie() -> None:
    inputs = make_inputs([6], n_index_heads=1, d_index=1)
    inputs = replace(inputs, q_index=torch.ones(1, 6, 1, 1), weights=torch.full((1, 6, 1), -1.0))
    inputs.k_index[0, :, 0] = torch.tensor([1.0, -1.0, 0.0, -1.0, 1.0, -0.0])  # scores -1, then 0 or -0
    assert token_sets(select(inputs, 2))[5] == [1, 2]


@pytest.mark.parametrize("block_size", [1, 2, 7, 64, 1000])
def test_selection_does_not_depend_on_the_block_size(block_size: int) -> None:
    inputs = make_inputs([65, 1, 3], is_grid=True)
    assert torch.equal(select(inputs, 7, block_size=block_size), select(inputs, 7))


def test_a_positive_scale_of_the_weights_does_not_change_the_selection() -> None:
    inputs = make_inputs([65], is_grid=True)
    assert torch.equal(select(replace(inputs, weights=inputs.weights * 0.125), 7), select(inputs, 7))


def test_selection_has_no_gradient() -> None:
    inputs = make_inputs([5]).map(lambda x: x.requires_grad_())
    assert not select(inputs, 2).requires_grad


def test_nan_scores_count_as_inf_and_still_name_keys_of_the_past() -> None:
    inputs = make_inputs([9])
    inputs.k_index[0, [2, 4, 6]] = float("nan")
    assert token_sets(select(inputs, 2))[4:] == [[2, 4]] * 5
    inputs.weights[0, 1] = float("nan")
    assert token_sets(select(inputs, 2))[:2] == [[0], [0, 1]]


# Attention.


@pytest.mark.parametrize("top_k", [*TOP_KS, None])
@pytest.mark.parametrize("lengths", LENGTHS + PACKED, ids=str)
def test_attention_equals_the_masked_form_with_every_gradient(lengths: list[int], top_k: int | None) -> None:
    inputs = make_inputs(lengths, dtype=torch.float64)
    selection = None if top_k is None else select(inputs, top_k)
    arguments = {"cu_seqlens": inputs.cu_seqlens, "scale": inputs.scale}
    exact = attention_results(reference.sparse_attention, inputs, selection, **arguments)
    assert_same(attention_results(op.sparse_attention, inputs, selection, **arguments), exact, 1e-12)
    narrow = attention_results(op.sparse_attention, inputs.map(Tensor.float), selection, **arguments)
    assert_same(narrow, exact)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize(("d_head", "d_value"), [(1, 1), (7, 13), (16, 5)])
def test_attention_equals_the_masked_form_for_any_groups_and_sizes(n_kv_heads: int, d_head: int, d_value: int) -> None:
    inputs = make_inputs([33, 1], n_heads=6, n_kv_heads=n_kv_heads, d_head=d_head, d_value=d_value)
    arguments = {"selection": select(inputs, 5), "cu_seqlens": inputs.cu_seqlens, "scale": 0.3}
    found = attention_results(op.sparse_attention, inputs, **arguments)
    assert_same(found, attention_results(reference.sparse_attention, inputs, **arguments))


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_attention_does_not_depend_on_the_block_size(block_size: int) -> None:
    inputs = make_inputs([65, 1, 3])
    arguments = {"selection": select(inputs, 7), "cu_seqlens": inputs.cu_seqlens}
    found = attention_results(op.sparse_attention, inputs, **arguments, block_size=block_size)
    assert_same(found, attention_results(op.sparse_attention, inputs, **arguments))


@pytest.mark.parametrize("lengths", [[1], [63], [257, 1, 3]], ids=str)
def test_selecting_everything_is_dense_attention(lengths: list[int]) -> None:
    inputs = make_inputs(lengths)
    everything = select(inputs, 1000)
    assert torch.equal(attend(inputs, everything), attend(inputs, None))
    dense = packed_attention(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens)
    assert rms_ratio(attend(inputs, everything), dense) <= TOLERANCES["fp32", "op"]


def test_keys_outside_the_past_are_ignored() -> None:
    inputs = make_inputs([10, 20])
    selection = select(inputs, 3)
    foreign = torch.full((30, 2), 29, dtype=torch.int32)  # the last token, in no other query's past
    foreign[:, 1] = 0  # the first document's, not in the second's past
    found = attend(inputs, torch.cat([selection, foreign], dim=1))
    assert torch.equal(found[:, 10:29], attend(inputs, selection)[:, 10:29])
    with_first = torch.cat([selection, foreign[:, 1:]], dim=1)
    assert torch.equal(found[:, :10], attend(inputs, with_first)[:, :10])


def test_one_selected_key_gives_its_value() -> None:
    inputs = make_inputs([20], n_heads=2)
    selection = select(inputs, 1)
    assert torch.equal(attend(inputs, selection)[0], inputs.v[0, selection[:, 0].long()])


def test_bf16_inputs_give_bf16_outputs_computed_in_fp32() -> None:
    half = make_inputs([65, 1]).map(Tensor.bfloat16)
    selection = select(half, 7)
    assert torch.equal(selection, select(half.map(Tensor.float), 7))
    arguments = {"selection": selection, "cu_seqlens": half.cu_seqlens}
    # block_size 8: gradients of k and v add up over nine blocks, and must do so before they are rounded.
    found = attention_results(op.sparse_attention, half, **arguments, block_size=8)
    expected = attention_results(op.sparse_attention, half.map(Tensor.float), **arguments, block_size=8)
    assert all(x.dtype == torch.bfloat16 for x in found.values())
    assert torch.equal(found["o"], expected["o"].bfloat16())
    assert_same(found, expected, 2**-8)  # the gradient of o is rounded on its way in, those of q, k, v on theirs
    assert all(x.dtype == torch.float32 for x in loss_of(half, selection))
    assert_same(loss_of(half, selection)._asdict(), loss_of(half.map(Tensor.float), selection)._asdict())


# Causality, documents, decoding.


@pytest.mark.parametrize("t", [0, 30, 64, 68])
def test_changing_a_token_changes_nothing_before_it_to_the_bit(t: int) -> None:
    inputs = make_inputs([30, 39])

    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, t] = 3.0
        return x

    other = inputs.map(changed)
    before, after = select(inputs, 5, block_size=16), select(other, 5, block_size=16)
    assert torch.equal(before[:t], after[:t])
    found = attend(inputs, before, block_size=16), attend(other, after, block_size=16)
    assert torch.equal(found[0][:, :t], found[1][:, :t])
    assert not torch.equal(found[0][:, t], found[1][:, t])
    if t < 30:  # the other document
        assert torch.equal(before[30:], after[30:])
        assert torch.equal(found[0][:, 30:], found[1][:, 30:])


def test_each_document_is_computed_alone() -> None:
    inputs = make_inputs([3, 1, 65], is_grid=True)
    selection = select(inputs, 7)
    o, losses = attend(inputs, selection), []
    for start, end in itertools.pairwise(inputs.cu_seqlens):
        alone = replace(inputs.map(lambda x: x[:, start:end]), cu_seqlens=[0, end - start])  # noqa: B023
        chosen = select(alone, 7)
        moved = torch.where(chosen >= 0, chosen + start, -1)
        assert torch.equal(selection[start:end, : chosen.shape[1]], moved)
        assert (selection[start:end, chosen.shape[1] :] == -1).all()
        assert rms_ratio(o[:, start:end], attend(alone, chosen)) <= TOLERANCES["fp32", "op"]
        losses.append(loss_of(alone, chosen).loss_sum)
    assert rms_ratio(loss_of(inputs, selection).loss_sum, sum(losses)) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize("n_queries", [1, 2, 40, 76, 77])
@pytest.mark.parametrize("top_k", [7, 1000])
def test_last_queries_against_all_keys_equal_the_full_computation(n_queries: int, top_k: int) -> None:
    inputs = make_inputs([77], is_grid=True)
    last = replace(
        inputs,
        q=inputs.q[:, -n_queries:],
        q_index=inputs.q_index[:, -n_queries:],
        weights=inputs.weights[:, -n_queries:],
    )
    full = select(inputs, top_k, block_size=16)
    assert torch.equal(select(last, top_k, block_size=16), full[-n_queries:])
    arguments = {"cu_seqlens": inputs.cu_seqlens, "block_size": 16}
    for selection in (full, None):
        rows = None if selection is None else selection[-n_queries:]
        found = op.sparse_attention(last.q, inputs.k, inputs.v, rows, **arguments)
        expected = op.sparse_attention(**inputs.attention, selection=selection, **arguments)[:, -n_queries:]
        assert rms_ratio(found, expected) <= TOLERANCES["fp32", "op"]


# The indexer's loss.


def judge(inputs: Inputs, selection: Tensor | None, targets: list[Tensor] | None = None) -> dict[str, Tensor]:
    """The loss written with autograd, and its gradients, under the names of `IndexerLoss`; targets are averaged."""
    arguments = {"cu_seqlens": inputs.cu_seqlens}
    if targets is None:
        p = reference.probabilities(inputs.q, inputs.k, selection, **arguments, scale=inputs.scale)
        targets = [p.sum(0)]
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.index.items()}
    target = torch.stack(targets).mean(0)
    loss = reference.indexer_loss(target, selection, **leaves, **arguments)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss_sum": loss.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


@pytest.mark.parametrize("top_k", [7, 1000, None])
@pytest.mark.parametrize("lengths", [[2], [63], [257], [1, 63, 1, 65, 2]], ids=str)
def test_loss_and_analytic_gradients_equal_autograd(lengths: list[int], top_k: int | None) -> None:
    inputs = make_inputs(lengths, dtype=torch.float64)
    selection = None if top_k is None else select(inputs, top_k)
    exact = judge(inputs, selection)
    assert_same(loss_of(inputs, selection)._asdict(), exact, 1e-10)
    assert_same(loss_of(inputs.map(Tensor.float), selection)._asdict(), exact)


def test_gradients_equal_autograd_where_products_are_exactly_zero() -> None:
    inputs = make_inputs([40], is_grid=True, d_index=2, dtype=torch.float64)
    products = torch.einsum("btjd,bsd->btjs", inputs.q_index, inputs.k_index)
    assert (products == 0).double().mean() > 0.2
    for selection in (select(inputs, 7), None):
        assert_same(loss_of(inputs, selection)._asdict(), judge(inputs, selection), 1e-10)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1]], ids=str)
def test_queries_with_one_key_add_exactly_nothing(lengths: list[int]) -> None:
    inputs = make_inputs(lengths)
    for selection in (select(inputs, 5), None):
        assert all((x == 0).all() for x in loss_of(inputs, selection))
    longer = make_inputs([30])
    assert all((x == 0).all() for x in loss_of(longer, select(longer, 1)))


def test_loss_is_zero_where_the_indexer_already_says_what_attention_does() -> None:
    inputs = make_inputs([40], n_heads=1, n_kv_heads=1, d_head=5, n_index_heads=2, d_index=5, dtype=torch.float64)
    # relu(x) - relu(-x) = x: two index heads can copy one attention head.
    inputs = replace(
        inputs,
        q_index=torch.cat([inputs.q, -inputs.q], dim=2),
        k_index=inputs.k[:, :, 0],
        weights=torch.tensor([1.0, -1.0], dtype=torch.float64).expand(1, 40, 2) * inputs.scale,
    )
    for selection in (select(inputs, 7), None):
        found = loss_of(inputs, selection)
        assert all(x.abs().max() < 1e-12 for x in found)


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_loss_does_not_depend_on_the_block_size(block_size: int) -> None:
    inputs = make_inputs([65, 1, 3])
    selection = select(inputs, 7)
    found = loss_of(inputs, selection, block_size=block_size)
    assert_same(found._asdict(), loss_of(inputs, selection)._asdict())


@pytest.mark.parametrize("is_sparse", [False, True])
def test_mean_of_gradients_over_loops_is_that_of_the_mean_target(is_sparse: bool) -> None:
    inputs = make_inputs([63, 1, 20], dtype=torch.float64)
    selection = select(inputs, 7) if is_sparse else None
    generator = torch.Generator().manual_seed(3)
    loops = [
        replace(inputs, **{name: torch.randn(x.shape, generator=generator).double() for name, x in main.items()})
        for main in [{"q": inputs.q, "k": inputs.k}] * 3
    ]
    found = [loss_of(loop, selection) for loop in loops]
    targets = [
        reference.probabilities(loop.q, loop.k, selection, cu_seqlens=inputs.cu_seqlens, scale=inputs.scale).sum(0)
        for loop in loops
    ]
    expected = judge(inputs, selection, targets)
    means = {name: torch.stack([getattr(x, name) for x in found]).mean(0) for name in expected}
    # The losses differ by what the targets differ among themselves, which no indexer can fit.
    assert means.pop("loss_sum") > expected.pop("loss_sum")
    assert_same(means, expected, 1e-10)


def test_heads_split_over_ranks_give_the_loss_of_all_heads() -> None:
    inputs = make_inputs([65, 1, 3], n_heads=6, n_kv_heads=2)
    selection = select(inputs, 7)
    halves = [replace(inputs, q=inputs.q[:, :, 3 * i : 3 * i + 3], k=inputs.k[:, :, i : i + 1]) for i in (0, 1)]
    sent: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        sent.append(x.clone())
        return x

    loss_of(halves[1], selection, sum_heads=record, block_size=16)
    found = loss_of(halves[0], selection, sum_heads=lambda x: x + sent.pop(0), block_size=16)
    assert not sent
    assert_same(found._asdict(), loss_of(inputs, selection)._asdict())


def test_loss_builds_no_graph() -> None:
    inputs = make_inputs([5]).map(lambda x: x.requires_grad_())
    assert not any(x.requires_grad for x in loss_of(inputs, None))


# A loss of some of the queries.


@pytest.mark.parametrize("block_size", [7, 64, 100])
@pytest.mark.parametrize("row_stride", [2, 3, 7])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_mean_over_samples_is_the_whole(is_sparse: bool, row_stride: int, block_size: int) -> None:
    inputs = make_inputs([1, 200, 65], dtype=torch.float64)
    selection = select(inputs, 7) if is_sparse else None
    sampled = partial(loss_of, inputs, selection, row_stride=row_stride, block_size=block_size)
    samples = [sampled(row_offset=i) for i in range(row_stride)]
    mean = op.IndexerLoss(*(torch.stack(parts).mean(0) for parts in zip(*samples)))
    assert_same(mean._asdict(), loss_of(inputs, selection)._asdict(), 1e-12)


def test_a_sample_is_of_whole_tiles_of_queries_each_counted_as_often() -> None:
    inputs = make_inputs([70, 200], dtype=torch.float64)  # tiles from 0, 64 (6 tokens); 70, 134, 198, 262 (8)
    whole, sample = loss_of(inputs, None), loss_of(inputs, None, row_stride=3, row_offset=1)
    is_in = torch.zeros(270, dtype=torch.bool)
    is_in[64:70] = is_in[198:262] = True
    assert ROW_TILE == 64
    assert_same({"in": sample.dq_index[:, is_in]}, {"in": 3 * whole.dq_index[:, is_in]}, 1e-12)
    assert (sample.dq_index[:, ~is_in] == 0).all()
    assert (sample.dweights[:, ~is_in] == 0).all()


def test_a_sample_without_queries_is_zero() -> None:
    inputs = make_inputs([20, 30])
    assert all((x == 0).all() for x in loss_of(inputs, None, row_stride=5, row_offset=2))


@pytest.mark.parametrize(("row_stride", "row_offset"), [(1, 1), (3, 3), (3, -1), (0, 0)])
def test_a_row_offset_out_of_range_is_refused_with_both(row_stride: int, row_offset: int) -> None:
    inputs = make_inputs([5])
    with pytest.raises(ValueError, match=rf"row_offset is {row_offset}.*\[0, {row_stride}\)"):
        loss_of(inputs, None, row_stride=row_stride, row_offset=row_offset)


# Selections as bits.


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("lengths", [*LENGTHS, *PACKED, [32], [33, 64]], ids=str)
def test_bits_and_lists_convert_into_each_other(lengths: list[int], top_k: int) -> None:
    inputs = make_inputs(lengths)
    selection = select(inputs, top_k)
    bits = Bitmask.from_positions(selection, inputs.cu_seqlens)
    assert bits.words.dtype == torch.int32
    assert bits.words.shape == (sum(lengths), -(-max(lengths) // 32))
    assert torch.equal(bits.positions(inputs.cu_seqlens, selection.shape[1]), selection)
    assert bits.counts().tolist() == [len(keys) for keys in token_sets(selection)]
    starts = [start for start, end in itertools.pairwise(inputs.cu_seqlens) for _ in range(start, end)]
    for row, keys, start in zip(spread(bits.words).tolist(), token_sets(selection), starts):
        assert [start + s for s, is_chosen in enumerate(row) if is_chosen] == keys


def test_conversions_do_not_depend_on_how_many_rows_they_do_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs([65, 1, 30])
    selection = select(inputs, 7)
    whole = Bitmask.from_positions(selection, inputs.cu_seqlens)
    monkeypatch.setattr("loopline.kernels.dsa.bitmask._BLOCK_ELEMENTS", 300)
    assert torch.equal(Bitmask.from_positions(selection, inputs.cu_seqlens).words, whole.words)
    assert torch.equal(whole.positions(inputs.cu_seqlens, 7), selection)


def test_bits_are_counted_as_a_loop_counts_them() -> None:
    words = torch.randint(-(2**31), 2**31, (200, 3), generator=torch.Generator().manual_seed(0)).int()
    words[:4] = torch.tensor([0, -1, -(2**31), 2**31 - 1], dtype=torch.int32)[:, None]
    expected = [sum((word & 0xFFFFFFFF).bit_count() for word in row) for row in words.tolist()]
    assert population(words).tolist() == expected


def test_counting_bits_makes_nothing_of_the_size_of_a_long_bitmask(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randint(-(2**31), 2**31, (2, 50, 7)).int()
    expected = [sum((word & 0xFFFFFFFF).bit_count() for word in row) for row in (a & b).tolist()]
    monkeypatch.setattr("loopline.kernels.dsa.bitmask._BLOCK_WORDS", 21)
    with LargestTensor() as largest:
        assert population(a, b).tolist() == expected
        op.selection_overlap(Bitmask(a), Bitmask(b))
    assert largest.n_elements == 50  # the counts


def test_positions_outside_the_past_are_no_bits_and_slots_that_lack_drop_the_highest() -> None:
    bounds = [0, 3, 8]
    lists = torch.tensor([[0, 1], [0, -1], [2, 3], [3, 2], [7, 3], [5, 4], [-1, -1], [3, 7]], dtype=torch.int32)
    found = Bitmask.from_positions(lists, bounds)
    assert token_sets(found.positions(bounds, 2)) == [[0], [0], [2], [3], [3], [4, 5], [], [3, 7]]
    assert token_sets(found.positions(bounds, 1)) == [[0], [0], [2], [3], [3], [4], [], [3]]


@pytest.mark.parametrize("lengths", [[63], [1, 63, 1, 65, 2]], ids=str)
def test_the_reference_takes_bits_as_it_takes_lists(lengths: list[int]) -> None:
    inputs = make_inputs(lengths)
    selection = select(inputs, 7)
    bits = Bitmask.from_positions(selection, inputs.cu_seqlens)
    assert torch.equal(attend(inputs, bits), attend(inputs, selection))
    for a, b in zip(loss_of(inputs, bits), loss_of(inputs, selection)):
        assert torch.equal(a, b)
    arguments = {"cu_seqlens": inputs.cu_seqlens, "block_size": 16}
    found = op.attention_recall(inputs.q, inputs.k, bits, **arguments)
    for a, b in zip(found, op.attention_recall(inputs.q, inputs.k, selection, **arguments)):
        assert rms_ratio(a, b) <= TOLERANCES["fp32", "op"]


def test_overlap_of_bits_is_that_of_lists() -> None:
    inputs = make_inputs([1, 63, 1, 20])
    lists = [select(inputs, 5), select(inputs.map(lambda x: x.flip(-1) - 0.3), 9)]
    bits = [Bitmask.from_positions(x, inputs.cu_seqlens) for x in lists]
    for i, j in itertools.product((0, 1), repeat=2):
        expected, n_queries = op.selection_overlap(lists[i], lists[j])
        total, n_found = op.selection_overlap(bits[i], bits[j])
        assert n_found == n_queries == 85
        assert rms_ratio(total, expected) <= TOLERANCES["fp32", "op"]


def test_bits_of_another_row_and_mixed_selections_are_refused() -> None:
    inputs = make_inputs([5])
    lists = select(inputs, 2)
    bits = Bitmask.from_positions(lists, [0, 5])
    with pytest.raises(ValueError, match=r"\(5, 1\).*\(40, 2\)"):
        bits.positions([0, 40], 2)
    for call in (attend, loss_of):
        with pytest.raises(ValueError, match=r"bitmask \(5, 2\) must be .* = \(5, 1\)"):
            call(inputs, Bitmask(torch.zeros(5, 2, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"n_slots is 0"):
        bits.positions([0, 5], 0)
    with pytest.raises(ValueError, match=r"selection \(5, 2\).*T = 4"):
        Bitmask.from_positions(lists, [0, 4])
    with pytest.raises(ValueError, match=r"one selection is a Bitmask.*from_positions"):
        op.selection_overlap(bits, lists)
    with pytest.raises(ValueError, match=r"\(5, 1\) and \(4, 1\)"):
        op.selection_overlap(bits, Bitmask(bits.words[:4]))


# Measures of a selection.


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("lengths", [[1], [63], [257], [1, 63, 1, 65, 2]], ids=str)
def test_recall_equals_the_loop_over_queries(lengths: list[int], top_k: int) -> None:
    inputs = make_inputs(lengths)
    selection = select(inputs, top_k)
    arguments = {"cu_seqlens": inputs.cu_seqlens, "scale": inputs.scale}
    found = op.attention_recall(inputs.q, inputs.k, selection, **arguments, block_size=16)
    expected = reference.attention_recall(inputs.q, inputs.k, selection, **arguments)
    for value, judged in zip(found, expected):
        assert rms_ratio(value, torch.tensor(judged)) <= TOLERANCES["fp32", "op"]
    assert found[0] <= found[1] * (1 + 1e-6)
    if top_k == 1000:
        assert rms_ratio(found[0], torch.tensor(float(sum(lengths)))) <= TOLERANCES["fp32", "op"]


def test_overlap_equals_that_of_sets() -> None:
    inputs = make_inputs([1, 63, 1, 20])
    a, b = select(inputs, 5), select(inputs.map(lambda x: x.flip(-1) - 0.3), 9)
    sets = [[set(row) for row in token_sets(x)] for x in (a, b)]
    for (left, lefts), (right, rights) in itertools.product([(a, sets[0]), (b, sets[1])], repeat=2):
        expected = sum(len(x & y) / len(x) for x, y in zip(lefts, rights))
        total, n_queries = op.selection_overlap(left, right)
        assert n_queries == 85
        assert rms_ratio(total, torch.tensor(expected)) <= TOLERANCES["fp32", "op"]
    # The order of slots does not matter.
    assert torch.equal(op.selection_overlap(a, b.flip(-1))[0], op.selection_overlap(a, b)[0])
    assert op.selection_overlap(a, a)[0] == 85


# Memory.


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation gives."""

    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.n_elements = max(self.n_elements, x.numel())
        return result


def test_no_tensor_of_tokens_by_tokens_is_made() -> None:
    n_tokens, block_size = 512, 16
    inputs = make_inputs([n_tokens])
    leaves = inputs.map(lambda x: x.requires_grad_())
    # Each op and its backward pass alone: the bound is heads x block x T.
    with LargestTensor() as largest:
        selection = select(inputs, 32, block_size=block_size)
        attend(leaves, selection, block_size=block_size).sum().backward()
        loss_of(inputs, selection, block_size=block_size)
        loss_of(inputs, None, block_size=block_size)
        op.attention_recall(inputs.q, inputs.k, selection, cu_seqlens=[0, n_tokens], block_size=block_size)
        op.selection_overlap(selection, selection)
    assert 0 < largest.n_elements <= 4 * block_size * n_tokens < n_tokens**2
    with LargestTensor() as dense:
        reference.sparse_attention(**inputs.attention, selection=None, cu_seqlens=[0, n_tokens], scale=1.0)
    assert dense.n_elements >= n_tokens**2  # the measure sees what it should


def test_probabilities_are_not_kept_for_the_backward_pass() -> None:
    n_tokens, block_size = 256, 16
    inputs = make_inputs([n_tokens]).map(lambda x: x.requires_grad_())
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    selection = select(inputs, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = attend(inputs, selection, block_size=block_size)
    # Probabilities of the last block alone would be 4 * 16 * 256; k and v have 2 heads of 12 features.
    assert kept
    assert max(kept) <= 2 * 12 * n_tokens < 4 * block_size * n_tokens
    o.sum().backward()
    assert inputs.k.grad is not None


# Forms written by others.


def _fla() -> Any:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    from fla.ops.dsa import naive

    return naive


def _fla_index(inputs: Inputs) -> dict[str, Any]:
    # fla puts DI ** -0.5 inside the relu, where a positive factor is the same as on the weights.
    return {
        "q_idx": inputs.q_index,
        "k_idx": inputs.k_index,
        "w_idx": inputs.weights,
        "cu_seqlens": torch.tensor(inputs.cu_seqlens),
    }


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("lengths", [[1], [2], [63], [257], [1, 63, 1, 65, 2]], ids=str)
def test_selection_equals_fla_indexer(lengths: list[int], top_k: int) -> None:
    inputs = make_inputs(lengths)
    indices = _fla().naive_dsa_indexer(**_fla_index(inputs), topk=top_k, activation="relu")[0]
    starts = [start for start, end in itertools.pairwise(inputs.cu_seqlens) for _ in range(start, end)]
    expected = [sorted(s + start for s in row) for row, start in zip(token_sets(indices), starts)]
    assert token_sets(select(inputs, top_k)) == expected


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("lengths", [[1], [63], [1, 63, 1, 65, 2]], ids=str)
def test_attention_equals_fla_with_every_gradient(lengths: list[int], top_k: int, n_kv_heads: int) -> None:
    inputs = make_inputs(lengths, n_kv_heads=n_kv_heads)
    expected = attention_results(partial(_fla().naive_dsa, **_fla_index(inputs), topk=top_k), inputs)
    found = attention_results(op.sparse_attention, inputs, select(inputs, top_k), cu_seqlens=inputs.cu_seqlens)
    assert_same(found, expected)


class TopkInputs(TorchFunctionMode):
    """Records what `Tensor.topk` is called on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is Tensor.topk:
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


def _rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions on the first 2 * angles.shape[-1] features, pairs (i, i + half)."""
    half = angles.shape[-1]
    angles = angles.view(1, x.shape[1], *[1] * (x.dim() - 3), half)
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("n_tokens", [1, 2, 63])
def test_scores_and_selection_equal_transformers_deepseek_v32(n_tokens: int, top_k: int) -> None:
    from transformers.models.deepseek_v32 import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

    n_heads, d_index, d_rope = 3, 8, 4
    inputs = make_inputs([n_tokens], n_index_heads=n_heads, d_index=d_index)
    config = DeepseekV32Config(
        hidden_size=d_index + n_heads,
        q_lora_rank=n_heads * d_index,
        qk_rope_head_dim=d_rope,
        index_n_heads=n_heads,
        index_head_dim=d_index,
        index_topk=top_k,
    )
    module = DeepseekV32Indexer(config, layer_idx=0)
    # Projections that pass our q, k and weights through: the query latent is q, the hidden state is k beside weights.
    module.wq_b.weight.data = torch.eye(n_heads * d_index)
    module.wk.weight.data = torch.eye(d_index, d_index + n_heads)
    module.weights_proj.weight.data = torch.eye(d_index + n_heads)[d_index:]
    module.k_norm = torch.nn.Identity()
    angles = torch.arange(n_tokens)[:, None] * torch.tensor([1.0, 0.1])  # [T, d_rope / 2]
    both = angles.repeat(1, 2)[None]
    with TopkInputs() as topk:
        indices = module(
            torch.cat([inputs.k_index, inputs.weights], dim=-1),
            inputs.q_index.flatten(2),
            (both.cos(), both.sin()),
            torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()[None],
            torch.arange(n_tokens)[None],
        )
    ours = replace(
        inputs,
        q_index=_rotate_halves(inputs.q_index, angles),
        k_index=_rotate_halves(inputs.k_index, angles),
        weights=inputs.weights * n_heads**-0.5 * d_index**-0.5,
    )
    past = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    scores = op.index_scores(*(x[0] for x in ours.index.values()))
    (theirs,) = topk.seen
    assert rms_ratio(scores[past], theirs[0][past]) <= TOLERANCES["fp32", "op"]
    # Where a query has fewer keys than top_k, transformers fills up with future ones, to be masked later.
    expected = [sorted(s for s in row if s <= t) for t, row in enumerate(indices[0].tolist())]
    assert token_sets(select(ours, top_k)) == expected


# Bad values.


@pytest.mark.parametrize("name", ["q", "k", "q_index", "k_index", "weights"])
def test_nan_in_an_input_reaches_the_comparison_and_fails(name: str) -> None:
    inputs = make_inputs([9])
    expected = loss_of(inputs, None)._asdict()
    vars(inputs)[name][0, 2] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same(loss_of(inputs, None)._asdict(), expected)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_in_attention_reaches_the_comparison_and_fails(name: str) -> None:
    inputs = make_inputs([9])
    expected = attend(inputs, None)
    vars(inputs)[name][0, 2] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same({"o": attend(inputs, None)}, {"o": expected})


def test_a_query_left_without_keys_is_nan_not_zero() -> None:
    inputs = make_inputs([5])
    selection = select(inputs, 2)
    selection[3] = -1
    assert attend(inputs, selection)[0, 3].isnan().all()


Call = Callable[[Inputs], object]
CALLS: dict[str, Call] = {
    "select": lambda x: select(x, 3),
    "attention": lambda x: attend(x, None),
    "loss": lambda x: loss_of(x, None),
    "recall": lambda x: op.attention_recall(x.q, x.k, torch.zeros(5, 1).int(), cu_seqlens=x.cu_seqlens),
}


@pytest.mark.parametrize(
    ("call", "field", "shape", "named"),
    [
        ("select", "q_index", (1, 5, 3, 8), ["(1, 5, 3, 8)", "(1, 5, 7)"]),
        ("select", "k_index", (1, 5, 1, 7), ["(1, 5, 3, 7)", "(1, 5, 1, 7)"]),
        ("select", "weights", (1, 5, 4), ["(1, 5, 3, 7)", "(1, 5, 4)"]),
        ("select", "weights", (1, 4, 3), ["(1, 5, 3, 7)", "(1, 4, 3)"]),
        ("select", "k_index", (1, 4, 7), ["5", "4"]),
        ("loss", "q_index", (1, 5, 3, 8), ["(1, 5, 3, 8)", "(1, 5, 7)"]),
        ("loss", "k_index", (1, 6, 7), ["[5, 5, 5, 6]"]),
        ("loss", "q", (1, 4, 4, 12), ["[4, 5, 5, 5]"]),
        ("attention", "q", (1, 5, 4, 11), ["(1, 5, 4, 11)", "(1, 5, 2, 12)"]),
        ("attention", "q", (1, 5, 3, 12), ["3 query heads", "2 key heads"]),
        ("attention", "v", (1, 4, 2, 12), ["(1, 5, 2, 12)", "(1, 4, 2, 12)"]),
        ("attention", "v", (1, 5, 1, 12), ["(1, 5, 2, 12)", "(1, 5, 1, 12)"]),
        ("attention", "q", (1, 6, 4, 12), ["6 queries", "5 keys"]),
        ("attention", "q", (2, 5, 4, 12), ["2", "1"]),
        ("recall", "k", (1, 5, 3, 12), ["4 query heads", "3 key heads"]),
    ],
)
def test_shapes_that_disagree_are_refused_with_both(
    call: str, field: str, shape: tuple[int, ...], named: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        CALLS[call](replace(make_inputs([5]), **{field: torch.zeros(shape)}))
    assert all(text in str(error.value) for text in named), error.value


@pytest.mark.parametrize("call", CALLS)
def test_a_batch_is_refused_with_its_size(call: str) -> None:
    with pytest.raises(ValueError, match=r"batch is 2.*cu_seqlens"):
        CALLS[call](make_inputs([5]).map(lambda x: torch.cat([x, x])))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cu_seqlens", [[0, 4], [0, 6], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5], [0], []], ids=str)
def test_bad_boundaries_are_refused_with_the_token_count(call: str, cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens .*must rise from 0 to T = 5") as error:
        CALLS[call](replace(make_inputs([5]), cu_seqlens=cu_seqlens))
    assert str(cu_seqlens[:4]) in str(error.value)


def test_fewer_queries_than_keys_are_refused_over_several_documents() -> None:
    inputs = make_inputs([3, 2])
    with pytest.raises(ValueError, match=r"4 queries against 5 keys in 2 document"):
        attend(replace(inputs, q=inputs.q[:, 1:]), None)


@pytest.mark.parametrize("shape", [(4, 2), (1, 5, 2)], ids=str)
def test_a_selection_of_other_queries_is_refused_with_both(shape: tuple[int, ...]) -> None:
    inputs = make_inputs([5])
    selection = torch.zeros(shape, dtype=torch.int32)
    for call in (attend, loss_of):
        with pytest.raises(ValueError, match=r"selection .*T = 5") as error:
            call(inputs, selection)
        assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match=r"over 5 and 4 queries"):
        op.selection_overlap(select(inputs, 2), torch.zeros(4, 2, dtype=torch.int32))


def test_top_k_and_block_size_below_one_are_refused() -> None:
    inputs = make_inputs([5])
    with pytest.raises(ValueError, match=r"top_k is 0; it must be at least 1"):
        select(inputs, 0)
    with pytest.raises(ValueError, match=r"block_size is -3; it must be at least 1"):
        select(inputs, 2, block_size=-3)


def test_only_the_reference_runs_on_a_cpu() -> None:
    assert check_backend("dsa", op.BACKENDS, "auto", "cpu") == "reference"
    with pytest.raises(BackendError, match=r"dsa backend 'fla' is not available on cpu; available: reference"):
        check_backend("dsa", op.BACKENDS, "fla", "cpu")
