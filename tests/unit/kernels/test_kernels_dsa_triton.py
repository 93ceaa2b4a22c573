"""DeepSeek sparse attention on our Triton kernels agrees with torch on a CPU: choices to the bit, the loss and every
gradient within rounding; and refuses what no kernel serves."""

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


@pytest.mark.parametrize("workspace_bytes", [0, 2**25, 2**27])
@pytest.mark.parametrize("n_tokens", [1, 4096, 131072])
def test_scores_held_at_once_are_bounded_however_many_queries_there_are(n_tokens: int, workspace_bytes: int) -> None:
    from loopline.kernels.dsa.launch import _Scores
    from loopline.kernels.dsa.tiles import index_tiles

    index = (torch.empty(1, n_tokens, 4, 64, device="meta"), *[torch.empty(0, device="meta")] * 3)
    n_pieces = -(-n_tokens // 64)
    pieces = torch.empty(n_pieces, 2, device="meta", dtype=torch.int32)
    scores = _Scores(*index, pieces, n_tokens, index_tiles(64, 2, n_tokens).scores, torch.float32)
    held, total = 0, 0
    for chunk in scores.chunks(n_pieces, workspace_bytes, 1, 0):
        assert chunk.first == total
        assert chunk.n_pieces * 64 <= scores.workspace.shape[0]
        held, total = max(held, scores.workspace.nbytes), total + chunk.n_pieces
    assert total == n_pieces
    assert held <= max(workspace_bytes, 512 * 4 * max(n_tokens, 128))
    assert n_tokens < 131072 or held <= n_tokens**2 * 4 / 128


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
