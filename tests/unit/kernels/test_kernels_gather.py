"""Attention over key lists shared by tiles of queries: the lists, the reference, and the Triton kernels against it."""

import itertools

import pytest
import torch
from dsa_cases import PACKED, Inputs, make_inputs
from gather_interpreted import COMPARED, EXACT
from interpreted import Figures, Key, process
from torch import Tensor

from loopline.kernels.attention.reference import dense_attention
from loopline.kernels.dsa import op
from loopline.kernels.dsa.bitmask import Bitmask
from loopline.kernels.dsa.gather_launch import _slab, gather_attention
from loopline.kernels.dsa.gather_reference import gather_attention as reference
from loopline.kernels.dsa.gather_tiles import backward_tiles, forward_tiles, max_rows
from loopline.kernels.dsa.tile_op import select_by_tile, tile_lists
from loopline.kernels.dsa.visible import tile_selection, visible_bits
from loopline.kernels.errors import BackendError
from tests.tolerances import TOLERANCES, rms_ratio

KINDS = {"fp32": "op", "bf16": "interpreted_kernel"}
packed = pytest.mark.parametrize("lengths", PACKED, ids=str)


@pytest.fixture(scope="module")
def reported() -> tuple[dict[Key, Figures], str]:
    """One process computes every case."""
    return process("gather_interpreted")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), itertools.product(COMPARED, ("fp32", "bf16")))
def test_kernels_agree_with_the_reference(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> None:
    found, ending = reported
    assert (case, dtype) in found, ending
    figures = found[case, dtype]
    assert figures.keys() == COMPARED[case][1]
    assert all(ratio <= TOLERANCES[dtype, KINDS[dtype]] for ratio in figures.values()), figures


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_kernels_hold_to_the_bit(case: str, reported: tuple[dict[Key, Figures], str]) -> None:
    found, ending = reported
    assert (case, "bf16") in found, ending
    assert found[case, "bf16"] == dict.fromkeys(EXACT[case][1], 0.0)


def tiles_of(cu_seqlens: list[int], tile: int) -> list[range]:
    """The tokens of each tile, in the order of the row."""
    return [
        range(first, min(first + tile, end))
        for start, end in itertools.pairwise(cu_seqlens)
        for first in range(start, end, tile)
    ]


def visible_keys(lists: Tensor, cu_seqlens: list[int], tile: int) -> list[list[int]]:
    """What each query sees, written out: its tile's list, and its tile up to itself."""
    keys = []
    for listed, tokens in zip(lists.tolist(), tiles_of(cu_seqlens, tile), strict=True):
        keys += [[s for s in listed if s >= 0] + list(range(tokens.start, t + 1)) for t in tokens]
    return keys


def lists_by_loops(inputs: Inputs, *, top_k: int, tile: int, scored_by: str) -> list[list[int]]:
    """The keys of each tile, one tile and key at a time."""
    scores = op.index_scores(inputs.q_index[0], inputs.k_index[0], inputs.weights[0]).tolist()
    found = []
    for tokens in tiles_of(inputs.cu_seqlens, tile):
        start = max(bound for bound in inputs.cu_seqlens[:-1] if bound <= tokens.start)
        scorers = tokens if scored_by == "own" else range(max(start, tokens.start - tile + 1), tokens.start + 1)
        best = {s: max(scores[t][s] for t in scorers if t >= s) for s in range(start, tokens.start)}
        found.append(sorted(sorted(best, key=lambda s: (-best[s], s))[:top_k]))
    return found


def lists_of(inputs: Inputs, *, tile: int = 4, top_k: int = 6, scored_by: str = "past", **more: int) -> Tensor:
    return tile_lists(**inputs.index, top_k=top_k, tile=tile, cu_seqlens=inputs.cu_seqlens, scored_by=scored_by, **more)


@packed
@pytest.mark.parametrize("scored_by", ["past", "own"])
@pytest.mark.parametrize("is_grid", [False, True], ids=["real", "ties"])
def test_lists_are_the_highest_scores_before_the_tile(lengths: list[int], scored_by: str, is_grid: bool) -> None:
    inputs = make_inputs(lengths, is_grid=is_grid)
    for tile, top_k, block_size in ((1, 3, 128), (4, 6, 8), (16, 5, 1), (5, 1000, 12)):
        found = lists_of(inputs, tile=tile, top_k=top_k, scored_by=scored_by, block_size=block_size)
        expected = lists_by_loops(inputs, top_k=top_k, tile=tile, scored_by=scored_by)
        n_slots = min(top_k, max(lengths))
        assert found.dtype == torch.int32
        assert found.tolist() == [keys + [-1] * (n_slots - len(keys)) for keys in expected]


def test_lists_scored_by_the_past_are_those_decoding_finds() -> None:
    """At a tile's first token, with nothing after it there yet."""
    inputs = make_inputs([61], is_grid=True)
    lists = lists_of(inputs, tile=8)
    for i, first in enumerate(range(0, 61, 8)):
        prefix = {name: x[:, : first + 1] for name, x in inputs.index.items()}
        decoded = tile_lists(**prefix, top_k=6, tile=8, cu_seqlens=[0, first + 1], scored_by="past")[-1].tolist()
        assert decoded + [-1] * (6 - len(decoded)) == lists[i].tolist()


def test_lists_scored_by_their_own_queries_depend_on_later_tokens() -> None:
    """Why a causal model cannot be trained with them; were it otherwise, "past" would have no reason."""
    inputs = make_inputs([64])
    changed = {**inputs.index, "q_index": inputs.q_index.clone()}
    changed["q_index"][:, 48:] = torch.randn(
        1, 16, *inputs.q_index.shape[2:], generator=torch.Generator().manual_seed(1)
    )

    def lists(index: dict[str, Tensor], scored_by: str) -> Tensor:
        return tile_lists(**index, top_k=6, tile=16, cu_seqlens=[0, 64], scored_by=scored_by)

    changed["q_index"][:, 48] = inputs.q_index[:, 48]  # only tokens after the last tile's first one differ
    assert torch.equal(lists(changed, "past"), lists(inputs.index, "past"))
    assert not torch.equal(lists(changed, "own"), lists(inputs.index, "own"))


def test_a_nan_score_is_listed() -> None:
    inputs = make_inputs([40])
    inputs.k_index[0, 17] = torch.nan
    assert all(17 in keys for keys in lists_of(inputs, tile=4)[5:].tolist())


@packed
def test_reference_is_attention_over_the_keys_written_out(lengths: list[int]) -> None:
    inputs = make_inputs(lengths, d_value=5).map(lambda x: x.double())
    lists = lists_of(inputs)
    o, lse = reference(**inputs.attention, lists=lists, cu_seqlens=inputs.cu_seqlens, tile=4)
    q, k, v = (x[0] for x in inputs.attention.values())
    for t, keys in enumerate(visible_keys(lists, inputs.cu_seqlens, 4)):
        for head in range(q.shape[1]):
            scores = k[keys, head // 2] @ q[t, head] * inputs.scale
            assert rms_ratio(o[0, t, head], scores.softmax(0) @ v[keys, head // 2]) < 1e-12
            assert rms_ratio(lse[head, t], scores.logsumexp(0)) < 1e-12


@packed
def test_selection_of_each_query_gives_the_same_attention(lengths: list[int]) -> None:
    """The form in which the KL loss, the recall and a decoder take a tile's keys."""
    inputs = make_inputs(lengths).map(lambda x: x.double())
    lists = lists_of(inputs)
    selection = tile_selection(lists, tile=4, cu_seqlens=inputs.cu_seqlens)
    expected = visible_keys(lists, inputs.cu_seqlens, 4)
    n_slots = lists.shape[1] + 4
    assert selection.tolist() == [keys + [-1] * (n_slots - len(keys)) for keys in expected]
    found, _ = reference(**inputs.attention, lists=lists, cu_seqlens=inputs.cu_seqlens, tile=4)
    of_queries = op.sparse_attention(**inputs.attention, selection=selection, cu_seqlens=inputs.cu_seqlens)
    assert rms_ratio(found, of_queries) < 1e-12


@packed
@pytest.mark.parametrize("tile", [1, 4, 31, 32, 33, 100])
def test_bits_of_tiles_are_the_selection_of_each_query(lengths: list[int], tile: int) -> None:
    inputs = make_inputs(lengths)
    row = {"tile": tile, "cu_seqlens": inputs.cu_seqlens}
    for top_k in (1, 6, 1000):
        lists = lists_of(inputs, tile=tile, top_k=top_k)
        found = visible_bits(lists, **row)
        expected = Bitmask.from_positions(tile_selection(lists, **row), inputs.cu_seqlens)
        assert torch.equal(found.words, expected.words)


def test_a_position_that_no_list_may_hold_is_in_no_bits() -> None:
    """A key after its tile's first token would let a query see ahead."""
    lists = torch.tensor([[-1, 3], [0, 9], [7, 8]], dtype=torch.int32)
    found = visible_bits(lists, tile=4, cu_seqlens=[0, 10])
    keys = [[s for s in row if s >= 0] for row in found.positions([0, 10], 10).tolist()]
    own = [list(range(t - t % 4, t + 1)) for t in range(10)]
    assert keys == [*own[:4], *([0, *each] for each in own[4:8]), *([7, *each] for each in own[8:])]


@pytest.mark.parametrize("first_token", [1, 7, 8, 37, 60])
def test_a_decoder_finds_the_choices_of_the_last_tokens_alone(first_token: int) -> None:
    inputs = make_inputs([61], is_grid=True)
    whole = lists_of(inputs, tile=8)
    part = lists_of(inputs, tile=8, first_token=first_token)
    assert torch.equal(part, whole[first_token // 8 :])
    row = {"tile": 8, "cu_seqlens": inputs.cu_seqlens}
    found = tile_selection(part, **row, first_token=first_token)
    assert torch.equal(found, tile_selection(whole, **row)[first_token:])


@packed
def test_ops_take_a_choice_by_tile_as_what_each_query_sees(lengths: list[int]) -> None:
    inputs = make_inputs(lengths).map(lambda x: x.double())
    bounds = {"cu_seqlens": inputs.cu_seqlens}
    chosen = select_by_tile(**inputs.index, top_k=6, tile=4, **bounds)
    qk = {name: inputs.attention[name] for name in ("q", "k")}
    for run in (
        lambda selection: [op.sparse_attention(**inputs.attention, selection=selection, **bounds)],
        lambda selection: op.indexer_loss(**qk, selection=selection, **inputs.index, **bounds),
        lambda selection: op.attention_recall(**qk, selection=selection, **bounds),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(chosen), run(chosen.visible), strict=True))


def test_overlap_of_choices_by_tile_leaves_out_what_nobody_chose() -> None:
    """Own tokens, which two choices always share, and the first tiles of documents, which list nothing."""
    inputs = make_inputs([37, 3, 9])
    a, b = (select_by_tile(**inputs.index, top_k=k, tile=8, cu_seqlens=inputs.cu_seqlens) for k in (6, 3))
    shares = []
    for x, y in zip(a.lists.tolist(), b.lists.tolist(), strict=True):
        if x[0] >= 0:
            shares.append(len({*x} & {*y} - {-1}) / len({*x} - {-1}))
    total, count = op.selection_overlap(a, b)
    assert (total.item(), int(count)) == (pytest.approx(sum(shares)), len(shares))
    assert len(shares) == 5
    with pytest.raises(ValueError, match="one selection is a TileSelection and the other a Tensor"):
        op.selection_overlap(a, a.visible)


def test_recall_compares_with_the_best_as_many_keys() -> None:
    """A tile's first queries see fewer keys than its last: each is held to its own number."""
    inputs = make_inputs([37]).map(lambda x: x.double())
    qk = {name: inputs.attention[name] for name in ("q", "k")}
    chosen = select_by_tile(**inputs.index, top_k=3, tile=8, cu_seqlens=[0, 37])
    bits = Bitmask.from_positions(chosen.visible, [0, 37])
    found, expected = (op.attention_recall(**qk, selection=x, cu_seqlens=[0, 37]) for x in (chosen, bits))
    assert [x.item() for x in found] == pytest.approx([x.item() for x in expected], rel=1e-12)
    assert 0 < found[0] < found[1]


@packed
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_reference_with_everything_listed_is_dense(lengths: list[int], tile: int) -> None:
    inputs = make_inputs(lengths).map(lambda x: x.double())
    lists = lists_of(inputs, tile=tile, top_k=10_000)
    o, _ = reference(**inputs.attention, lists=lists, cu_seqlens=inputs.cu_seqlens, tile=tile)
    assert rms_ratio(o, dense_attention(**inputs.attention, cu_seqlens=inputs.cu_seqlens)) < 1e-12


def test_reference_gradients_pass_gradcheck() -> None:
    inputs = make_inputs([1, 6], n_heads=2, n_kv_heads=1, d_head=3, d_value=2, dtype=torch.float64)
    lists = lists_of(inputs, tile=2, top_k=2)
    leaves = [x.requires_grad_() for x in inputs.attention.values()]
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference(q, k, v, lists, cu_seqlens=inputs.cu_seqlens, tile=2), leaves
    )


@pytest.mark.parametrize(
    ("n_units", "expected"), [(24, (6, 4)), (100, (6, 4)), (23, (6, 3)), (6, (6, 1)), (5, (5, 1)), (1, (1, 1))]
)
def test_workspace_takes_whole_heads_first(n_units: int, expected: tuple[int, int]) -> None:
    assert _slab(6, 4, n_units) == expected


def test_tiles_hold_the_rows_and_the_tile() -> None:
    for width, is_half, capability in itertools.product((16, 64, 128, 256), (True, False), (80, 90)):
        for n_heads in (1, 3, 4, 16):
            for tile in range(1, max_rows(width) // n_heads + 1):
                for choose in (forward_tiles, backward_tiles):
                    chosen = choose(tile, tile * n_heads, width, is_half, capability)
                    assert chosen.n_rows >= tile * n_heads
                    assert chosen.n_own >= tile
                    assert not is_half or (chosen.n_keys >= 64 and chosen.n_own >= 64)  # what wgmma takes


def arguments(**changed: object) -> dict[str, object]:
    q, k = torch.zeros(1, 20, 4, 8), torch.zeros(1, 20, 2, 8)
    lists = torch.full((5, 3), -1, dtype=torch.int32)
    return {"q": q, "k": k, "v": k, "lists": lists, "cu_seqlens": [0, 20], "tile": 4, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(1, 20, 2, 9)}, r"q \(1, 20, 4, 8\), k \(1, 20, 2, 9\)"),
        ({"v": torch.zeros(1, 19, 2, 8)}, r"v \(1, 19, 2, 8\)"),
        ({"k": torch.zeros(1, 20, 3, 8), "v": torch.zeros(1, 20, 3, 8)}, "3 key/value heads must divide 4"),
        ({"q": torch.zeros(1, 20, 4, 8).bfloat16()}, "torch.bfloat16, torch.float32, torch.float32"),
        ({name: torch.zeros(1, 20, 2, 8).double() for name in "qkv"}, "torch.float64"),
        ({"v": torch.zeros(1, 20, 2, 512)}, "head sizes are 8 and 512; the kernels have at most 256"),
        ({"tile": 0}, "tile is 0"),
        ({"tile": 65}, "tile 65 x 2 query heads a key head is 130 rows"),
        ({"tile": 5}, r"lists \(5, 3\) must be \[NT, K\], K >= 1, NT = 4"),
        ({"lists": torch.zeros(5, 0, dtype=torch.int32)}, r"lists \(5, 0\)"),
        ({"lists": torch.zeros(5, 3)}, "lists are torch.float32"),
        ({"lists": torch.zeros(5, 3, dtype=torch.int32, device="meta")}, "on meta"),
        ({"cu_seqlens": [0, 19]}, "must rise from 0 to T = 20"),
        ({"workspace_bytes": 191}, "workspace_bytes is 191; one tile of one key head needs 192"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gather_attention(**arguments(**changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"tile": 0}, "tile is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"scored_by": "mean"}, "scored_by is 'mean'; it must be one of past, own"),
        ({"cu_seqlens": [0, 7]}, "must rise from 0 to T = 8"),
        ({"weights": torch.zeros(1, 8, 2)}, r"weights \(1, 8, 2\)"),
        ({"first_token": 8}, "first_token is 8, with 1 document"),
        ({"first_token": -1}, "first_token is -1"),
        ({"first_token": 3, "cu_seqlens": [0, 4, 8]}, "first_token is 3, with 2 document"),
        ({"first_token": 3, "backend": "triton"}, "backend 'triton': it must be"),
        ({"weights": torch.zeros(1, 8, 3).half(), "backend": "triton"}, "weights torch.float16"),
    ],
)
def test_bad_arguments_of_lists_are_refused(changed: dict[str, object], message: str) -> None:
    inputs = make_inputs([8])
    good = {**inputs.index, "top_k": 2, "tile": 4, "cu_seqlens": [0, 8], "scored_by": "past"}
    with pytest.raises(ValueError, match=message):
        tile_lists(**{**good, **changed})


def test_an_unknown_backend_of_lists_is_refused_with_those_known() -> None:
    inputs = make_inputs([8])
    with pytest.raises(BackendError, match=r"'fla' is unknown; known: triton, reference"):
        tile_lists(**inputs.index, top_k=2, tile=4, cu_seqlens=[0, 8], scored_by="past", backend="fla")
