"""Tables of a packed row: every token in one piece, built once."""

import itertools

import pytest
import torch

from loopline.kernels.tables import boundaries_on, first_pieces_on, kept, pieces_on

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


def test_a_table_is_built_once_and_is_a_constant_of_a_graph() -> None:
    built = []

    @kept
    def table(n: int) -> torch.Tensor:
        built.append(n)
        return torch.arange(n)

    graphs = []

    def noting(graph, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: x + table(3) + table(3), fullgraph=True, backend=noting)
    assert compiled(torch.zeros(3)).tolist() == [0, 2, 4]
    assert built == [3]
    assert not [node for graph in graphs for node in graph.graph.nodes if "arange" in str(node.target)]
