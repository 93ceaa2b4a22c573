"""Tables of a packed row: every token in one piece, built once."""

import itertools

import pytest
import torch

from loopline.kernels.tables import (
    boundaries_on,
    first_pieces_on,
    kept,
    numbers_of,
    on_host,
    pieces_by_work_on,
    pieces_on,
)

CPU = torch.device("cpu")
ROWS = [(0, 1), (0, 64), (0, 65), (0, 1, 2, 130, 194), (0, 63, 64, 191)]


@pytest.mark.parametrize("length", [1, 16, 64])
@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_pieces_hold_every_token_once_in_the_order_of_the_row(bounds: tuple[int, ...], length: int) -> None:
    tokens = []
    for document, piece in pieces_on(bounds, length, CPU).tolist():
        first = bounds[document] + piece * length
        tokens += range(first, min(first + length, bounds[document + 1]))
    assert tokens == list(range(bounds[-1]))


@pytest.mark.parametrize("bounds", ROWS, ids=str)
def test_first_pieces_are_where_documents_begin(bounds: tuple[int, ...]) -> None:
    pieces, first = pieces_on(bounds, 64, CPU), first_pieces_on(bounds, 64, CPU)
    assert first.dtype == pieces.dtype == boundaries_on(bounds, CPU).dtype == torch.int32
    assert first[-1] == len(pieces)
    for document, (start, end) in enumerate(itertools.pairwise(first.tolist())):
        assert pieces[start:end].tolist() == [[document, piece] for piece in range(end - start)]


def test_late_queries_and_early_keys_go_first() -> None:
    assert pieces_by_work_on((0, 1, 130), 64, False, CPU).tolist() == [[1, 2], [1, 1], [0, 0], [1, 0]]
    assert pieces_by_work_on((0, 1, 130), 64, True, CPU).tolist() == [[0, 0], [1, 0], [1, 1], [1, 2]]


def test_a_table_is_built_once() -> None:
    built = []

    @kept
    def table_of_this_test(cu_seqlens: tuple[int, ...], length: int) -> list[int]:
        built.append((cu_seqlens, length))
        return list(range(length))

    assert table_of_this_test((0, 7), 3, CPU) is table_of_this_test((0, 7), 3, CPU)
    assert table_of_this_test((0, 7), 4, CPU).tolist() == [0, 1, 2, 3]
    assert built == [((0, 7), 3), ((0, 7), 4)]


@pytest.mark.parametrize("bounds", [[0], [0, 3, 3, 5], [1, 5], [0, 4], [0, 3, 2, 5]])
def test_boundaries_of_no_row_are_refused_where_an_op_reads_them(bounds: list[int]) -> None:
    assert numbers_of(on_host([0, 2, 5]), 5) == (0, 2, 5)
    for _ in range(2):  # what was refused is not remembered as good
        with pytest.raises(ValueError, match="must rise from 0 to T = 5"):
            numbers_of(on_host(bounds), 5)


def test_a_table_first_asked_for_in_inference_mode_can_be_saved_for_backward() -> None:
    with torch.inference_mode():
        boundaries_on((0, 3, 11), CPU)
    assert not boundaries_on((0, 3, 11), CPU).is_inference()
