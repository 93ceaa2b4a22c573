"""DeepSeek sparse attention on our Triton kernels agrees with torch on a CPU: choices to the bit, the loss and every
gradient within rounding; and refuses what no kernel serves."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dsa_cases import Inputs, make_inputs
from dsa_interpreted import BLOCKS, CASES, CHOSEN, COMPARED, EXACT
from interpreted import Figures, Key, process
from torch import Tensor

from loopline.kernels.dsa import op
from loopline.kernels.dsa.bitmask import Bitmask, n_words
from loopline.kernels.dsa.launch import LOSS_BYTES, SELECT_BYTES
from loopline.kernels.dsa.workspace import MIN_PIECES, MOST_PROGRAMS, chunks, stored_queries, stored_tiles
from loopline.kernels.errors import BackendError
from tests.tolerances import TOLERANCES

KINDS = {"fp32": "op", "bf16": "interpreted_kernel"}


@pytest.fixture(scope="module")
def reported() -> tuple[dict[Key, Figures], str]:
    """One process computes every case."""
    return process("dsa_interpreted")


def figures_of(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> Figures:
    found, ending = reported
    assert (case, dtype) in found, ending
    return found[case, dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [key for key in CASES if key[0] in COMPARED])
def test_loss_and_attention_agree_with_torch(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> None:
    figures = figures_of(case, dtype, reported)
    assert figures.keys() == COMPARED[case][1]
    assert all(ratio <= TOLERANCES[dtype, KINDS[dtype]] for ratio in figures.values()), figures


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [key for key in CASES if key[0] in EXACT])
def test_nothing_is_found_that_should_not_be(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> None:
    figures = figures_of(case, dtype, reported)
    assert figures
    assert all(count == 0 for count in figures.values()), figures


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [key for key in CASES if key[0] in CHOSEN])
def test_real_scores_choose_what_torch_chooses_but_at_near_ties(
    case: str, dtype: str, reported: tuple[dict[Key, Figures], str]
) -> None:
    assert figures_of(case, dtype, reported)["missed"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [key for key in CASES if key[0] in BLOCKS])
def test_a_block_agrees_with_the_same_on_the_reference(
    case: str, dtype: str, reported: tuple[dict[Key, Figures], str]
) -> None:
    figures = figures_of(case, dtype, reported)
    assert figures.keys() == {"logits", "recorded", "gradients"}
    assert all(ratio <= TOLERANCES[dtype, "op"] for ratio in figures.values()), figures


def bounds_of(lengths: list[int]) -> tuple[int, ...]:
    return tuple(itertools.accumulate([0, *lengths]))


ROWS = {
    "one token": [1],
    "4096": [4096],
    "131072": [131072],
    "unlike": [65536, *[8192] * 8],
    "a long one, then many short": [65536, *[64] * 1024],
    "odd": [1, 63, 1, 130, 2, 9999, 1],
}


@pytest.mark.parametrize("room", [0, 2**10, 2**12])
@pytest.mark.parametrize("row", ROWS)
def test_scores_held_at_once_are_bounded_however_many_queries_there_are(row: str, room: int) -> None:
    stored = stored_queries(bounds_of(ROWS[row]), 128, 1, 0)
    widths = [after[2] - piece[2] for piece, after in itertools.pairwise(stored)]
    first = 0
    for chunk in chunks(stored, room):
        held = widths[chunk.first : chunk.first + chunk.n_pieces]
        assert chunk == (first, len(held), max(held), sum(held))
        assert chunk.n_pieces <= MIN_PIECES or (chunk.n_tiles <= room and len(held) * max(held) <= MOST_PROGRAMS)
        first += chunk.n_pieces
    assert first == len(widths)


@pytest.mark.parametrize("row", ROWS)
def test_scores_take_the_past_of_each_document_and_no_more(row: str) -> None:
    bounds = bounds_of(ROWS[row])
    stored = stored_queries(bounds, 128, 1, 0)
    expected = [
        (document, first // 64, -(-min(first + 64, length) // 128))
        for document, length in enumerate(ROWS[row])
        for first in range(0, length, 64)
    ]
    found = [(a[0], a[1], b[2] - a[2]) for a, b in itertools.pairwise(stored)]
    assert found == expected
    for offset in range(3):
        sampled = stored_queries(bounds, 128, 3, offset)
        assert [(a[0], a[1], b[2] - a[2]) for a, b in itertools.pairwise(sampled)] == expected[offset::3]


def test_a_row_of_unlike_documents_takes_few_launches() -> None:
    """With the width of the longest document for all rows, as it was, each takes 256."""
    stored = stored_queries(bounds_of(ROWS["unlike"]), 128, 1, 0)
    assert [len(chunks(stored, n_bytes // (4 * 64 * 128))) for n_bytes in (SELECT_BYTES, LOSS_BYTES)] == [147, 76]


@pytest.mark.parametrize("tile", [1, 12, 16, 100])
@pytest.mark.parametrize("lengths", [[1], [257], [1, 63, 1, 130, 2]], ids=str)
def test_scores_of_tiles_take_what_is_before_each_tile(lengths: list[int], tile: int) -> None:
    together = max(1, 64 // tile)
    stored = stored_tiles(bounds_of(lengths), 128, tile, together)
    expected = [
        (document, i // together, -(-tile * (min(i + together, n_tiles) - 1) // 128))
        for document, n_tiles in enumerate(-(-length // tile) for length in lengths)
        for i in range(0, n_tiles, together)
    ]
    assert [(a[0], a[1], b[2] - a[2]) for a, b in itertools.pairwise(stored)] == expected


# Refusals: made before a kernel is launched, so in a process that could not run one.

BOUNDS = [0, 5]


def bits_of(n_tokens: int = 5) -> Bitmask:
    return Bitmask(torch.ones(n_tokens, n_words([0, n_tokens]), dtype=torch.int32))


def select(inputs: Inputs) -> Any:
    return op.select(**inputs.index, top_k=3, cu_seqlens=BOUNDS, backend="triton")


def attend(inputs: Inputs, selection: Tensor | Bitmask | None = None) -> Any:
    return op.sparse_attention(**inputs.attention, selection=selection, cu_seqlens=BOUNDS, backend="triton")


def loss_of(inputs: Inputs, selection: Tensor | Bitmask | None = None, **changes: Any) -> Any:
    arguments = {"lse": torch.zeros(4, 5), "cu_seqlens": BOUNDS, "backend": "triton", **changes}
    return op.indexer_loss(inputs.q, inputs.k, selection, **inputs.index, **arguments)


def last_two(inputs: Inputs) -> Inputs:
    """Decoding: the last two queries against every key."""
    queries = ("q", "q_index", "weights")
    return replace(inputs, **{name: vars(inputs)[name][:, -2:] for name in queries})


REFUSED: dict[str, tuple[Callable[[Inputs], object], list[str]]] = {
    "choice while decoding": (lambda x: select(last_two(x)), ["2 queries", "5 keys", "reference"]),
    "attention while decoding": (lambda x: attend(last_two(x)), ["(1, 2, 4, 16)", "(1, 5, 2, 16)"]),
    "choice in fp64": (lambda x: select(x.map(Tensor.double)), ["float64"]),
    "choice in two types": (
        lambda x: select(replace(x, k_index=x.k_index.bfloat16())),
        ["torch.float32", "torch.bfloat16"],
    ),
    "weights in another type": (lambda x: select(replace(x, weights=x.weights.half())), ["float32", "float16"]),
    "large index heads": (
        lambda x: select(replace(x, q_index=torch.zeros(1, 5, 3, 192), k_index=torch.zeros(1, 5, 192))),
        ["192", "128"],
    ),
    "attention over lists": (
        lambda x: attend(x, torch.zeros(5, 2, dtype=torch.int32)),
        ["Bitmask", "(5, 2)", "from_positions"],
    ),
    "loss over lists": (
        lambda x: loss_of(x, torch.zeros(5, 2, dtype=torch.int32)),
        ["Bitmask", "(5, 2)", "from_positions"],
    ),
    "loss without lse": (lambda x: loss_of(x, lse=None), ["lse", "[H, T]", "sparse_attention_with_lse"]),
    "loss with another lse": (lambda x: loss_of(x, lse=torch.zeros(3, 5)), ["(3, 5)", "(4, 5)"]),
    "loss with lse in bf16": (lambda x: loss_of(x, lse=torch.zeros(4, 5).bfloat16()), ["bfloat16", "float32"]),
    "loss in fp64": (lambda x: loss_of(replace(x, q=x.q.double(), k=x.k.double())), ["q torch.float64"]),
    "large heads": (
        lambda x: loss_of(replace(x, q=torch.zeros(1, 5, 4, 320), k=torch.zeros(1, 5, 2, 320))),
        ["320", "256"],
    ),
    "bits of other words": (lambda x: loss_of(x, Bitmask(torch.zeros(5, 2).int())), ["(5, 2)", "(5, 1)"]),
    "bits of other queries": (lambda x: loss_of(x, bits_of(4)), ["(4, 1)", "T = 5"]),
    "attention over bits of other words": (
        lambda x: attend(x, Bitmask(torch.zeros(5, 2).int())),
        ["(5, 2)", "(5, 1)"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_serves_is_refused_with_what_was_found(name: str) -> None:
    call, named = REFUSED[name]
    with pytest.raises(ValueError) as error:
        call(make_inputs([5], d_head=16, d_value=16))
    assert all(text in str(error.value) for text in named), error.value


def test_an_unknown_backend_is_refused_with_those_known() -> None:
    inputs = make_inputs([5], d_head=16, d_value=16)
    row = {"cu_seqlens": BOUNDS, "backend": "fla"}
    calls: list[Callable[[], object]] = [
        lambda: op.select(**inputs.index, top_k=3, **row),
        lambda: op.sparse_attention(**inputs.attention, selection=None, **row),
        lambda: op.indexer_loss(inputs.q, inputs.k, None, **inputs.index, **row),
    ]
    for call in calls:
        with pytest.raises(BackendError, match=r"'fla' is unknown; known: triton, reference"):
            call()
