"""What holds of every linear recurrence: chunks equal the recurrence, and the public op refuses bad arguments."""

import functools
from dataclasses import replace

import pytest
import torch
from recurrence_cases import (
    CONSTANT_DECAY,
    DELTA_RULE,
    RECURRENCES,
    SIMPLE_GLA,
    Inputs,
    Recurrence,
    assert_same,
    per_head,
    replace_fla,
    results,
    with_decay,
)
from torch import Tensor

from loopline.kernels.errors import BackendError
from tests.tolerances import TOLERANCES, rms_ratio

DOCUMENTS = [[1], [2], [63], [64], [65], [257], [1, 1, 1], [1, 63, 1, 65, 2], [257, 1, 3], [5, 5, 5], [2, 130, 64, 1]]
SIZES = [(8, 16), (16, 8), (12, 20), (1, 1), (7, 13), (32, 32), (96, 192)]  # the last is LT2's

DECAYING = [recurrence for recurrence in RECURRENCES if recurrence.takes("g")]
ERASING = [recurrence for recurrence in RECURRENCES if recurrence.takes("beta")]
each = pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
each_decaying = pytest.mark.parametrize("recurrence", DECAYING, ids=str)
each_erasing = pytest.mark.parametrize("recurrence", ERASING, ids=str)
each_form = pytest.mark.parametrize("form", ["recurrent", "chunked"])


@each
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_chunks_equal_the_recurrence_with_every_gradient(
    recurrence: Recurrence, lengths: list[int], has_state: bool
) -> None:
    inputs = recurrence.make_inputs(lengths, has_state=has_state)
    assert_same(results(recurrence.chunked, inputs), results(recurrence.recurrent, inputs))


@each
@pytest.mark.parametrize(("d_k", "d_v"), SIZES)
def test_chunks_equal_the_recurrence_for_any_head_sizes(recurrence: Recurrence, d_k: int, d_v: int) -> None:
    inputs = recurrence.make_inputs([67, 1], n_heads=3, d_k=d_k, d_v=d_v)
    assert_same(results(recurrence.chunked, inputs), results(recurrence.recurrent, inputs))


@functools.cache
def _judged(
    recurrence: Recurrence, lengths: tuple[int, ...], where: str = "", g: float = 0.0
) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs, with decay g where told, and what the recurrence makes of them: one judge for all sizes of chunk."""
    inputs = recurrence.make_inputs(lengths)
    if where == "everywhere":
        inputs = with_decay(inputs, g)
    elif where == "tokens":  # in all heads and channels
        token = torch.arange(sum(lengths)).view(-1, *[1] * (inputs.g.dim() - 2))
        inputs = replace(inputs, g=inputs.g.masked_fill(token % 7 == 3, g))
    elif where == "numbers":  # at some tokens of each head or channel
        number = torch.arange(inputs.g.numel()).view_as(inputs.g)
        inputs = replace(inputs, g=inputs.g.masked_fill(number % 7 == 3, g))
    return inputs, results(recurrence.recurrent, inputs)


@each
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 1000])
def test_result_does_not_depend_on_the_chunk_size(recurrence: Recurrence, chunk_size: int) -> None:
    inputs, expected = _judged(recurrence, (65, 1, 3))
    assert_same(results(recurrence.chunked, inputs, chunk_size=chunk_size), expected)


@each
def test_chunks_equal_the_recurrence_in_fp64_without_rounding(recurrence: Recurrence) -> None:
    largest = {"beta_max": 2.0} if recurrence.takes("beta") else {}
    inputs = recurrence.make_inputs([130, 1, 65], **largest).to(torch.float64)
    found, expected = results(recurrence.chunked, inputs), results(recurrence.recurrent, inputs)
    assert all(x.dtype == torch.float64 for x in (*found.values(), *expected.values()))
    assert_same(found, expected, 1e-12)


@each_erasing
def test_chunks_equal_the_recurrence_with_negative_eigenvalues(recurrence: Recurrence) -> None:
    inputs = recurrence.make_inputs([130, 1], beta_max=2.0)
    assert inputs.beta.max() > 1.9
    assert_same(results(recurrence.chunked, inputs), results(recurrence.recurrent, inputs))


@each_erasing
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_chunks_equal_the_recurrence_at_the_ends_of_beta(recurrence: Recurrence, beta: float) -> None:
    inputs = recurrence.make_inputs([65])
    inputs = replace(inputs, beta=torch.full_like(inputs.beta, beta))
    assert_same(results(recurrence.chunked, inputs), results(recurrence.recurrent, inputs))


@each_decaying
def test_chunks_equal_the_recurrence_without_decay(recurrence: Recurrence) -> None:
    inputs = with_decay(recurrence.make_inputs([130, 1]), 0.0)
    assert_same(results(recurrence.chunked, inputs), results(recurrence.recurrent, inputs))


@each_decaying
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_everything_is_forgotten(
    recurrence: Recurrence, g: float, chunk_size: int
) -> None:
    inputs, judge = _judged(recurrence, (130, 1), "everywhere", g)
    found, expected = results(recurrence.chunked, inputs, chunk_size=chunk_size), dict(judge)
    for name, (found_limit, expected_limit) in recurrence.vanishing.items():
        assert found.pop(name).abs().max() <= found_limit
        assert expected.pop(name).abs().max() <= expected_limit
    assert_same(found, expected)


@pytest.mark.parametrize("recurrence", [x for x in DECAYING if x is not CONSTANT_DECAY], ids=str)
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("where", ["tokens", "numbers"])
@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_some_is_forgotten(
    recurrence: Recurrence, g: float, where: str, chunk_size: int
) -> None:
    inputs, expected = _judged(recurrence, (130, 65), where, g)
    assert_same(results(recurrence.chunked, inputs, chunk_size=chunk_size), expected)


@each
@each_form
def test_each_document_is_computed_alone(recurrence: Recurrence, form: str) -> None:
    inputs = recurrence.make_inputs([3, 1, 65])
    op = getattr(recurrence, form)
    packed_o, packed_state = op(**inputs.arguments())
    for i, (start, end) in enumerate([(0, 3), (3, 4), (4, 69)]):
        o, state = op(**inputs.cut(start, end, inputs.initial_state[i : i + 1]).arguments())
        assert rms_ratio(packed_o[:, start:end], o) <= TOLERANCES["fp32", "op"]
        assert rms_ratio(packed_state[i : i + 1], state) <= TOLERANCES["fp32", "op"]


@each
@each_form
def test_splitting_a_document_and_passing_its_state_changes_nothing(recurrence: Recurrence, form: str) -> None:
    whole = recurrence.make_inputs([97])
    op = getattr(recurrence, form)
    o, state = op(**whole.arguments())
    parts, carried = [], whole.initial_state
    for start, end in [(0, 40), (40, 41), (41, 97)]:
        part, carried = op(**whole.cut(start, end, carried).arguments())
        parts.append(part)
    assert rms_ratio(torch.cat(parts, dim=1), o) <= TOLERANCES["fp32", "op"]
    assert rms_ratio(carried, state) <= TOLERANCES["fp32", "op"]


@each
def test_one_token_by_hand(recurrence: Recurrence) -> None:
    inputs = recurrence.make_inputs([1], n_heads=2, d_k=2, d_v=3)
    o, final_state = recurrence.recurrent(**{**inputs.arguments(), "scale": 0.5})
    for head in range(2):
        q, k = (per_head(x, 2)[0, 0, head] for x in (inputs.q, inputs.k))
        transition, written = torch.eye(2), torch.outer(k, inputs.v[0, 0, head])
        if inputs.g is not None:
            transition = torch.diag(inputs.g.reshape(2, -1)[head].expand(2).exp())  # one for all channels, or each its
        if inputs.beta is not None:
            beta = inputs.beta[0, 0, head]
            # The gate acts on the state first; with different decays the two factors do not commute.
            transition = (torch.eye(2) - beta * torch.outer(k, k)) @ transition
            written = beta * written
        expected = transition @ inputs.initial_state[0, head] + written
        torch.testing.assert_close(final_state[0, head], expected)
        torch.testing.assert_close(o[0, 0, head], 0.5 * expected.T @ q)


@each
@each_form
def test_bf16_inputs_give_bf16_outputs_and_an_fp32_state(recurrence: Recurrence, form: str) -> None:
    half = recurrence.make_inputs([65, 1]).rounded(torch.bfloat16)
    o, state = getattr(recurrence, form)(**half.arguments())
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # Computed in fp32 inside: the state is that of the rounded inputs in fp32.
    _, expected = recurrence.recurrent(**half.rounded(torch.float32).arguments())
    assert rms_ratio(state, expected) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize(
    ("recurrence", "field"), [(x, name) for x in RECURRENCES for name in x.make_inputs([5]).tensors()], ids=str
)
@pytest.mark.parametrize("place", [lambda n: n // 2, lambda n: n - 1], ids=["in the middle", "last"])
def test_one_nan_in_an_input_reaches_the_comparison_and_fails(recurrence: Recurrence, field: str, place) -> None:  # type: ignore[no-untyped-def]
    inputs = recurrence.make_inputs([5])
    expected = results(recurrence.recurrent, inputs)
    x = inputs.tensors()[field]
    x[tuple(map(place, x.shape))] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same(results(recurrence.chunked, inputs), expected)


# The public op.


@each
def test_public_op_is_the_chunked_reference(recurrence: Recurrence) -> None:
    inputs = recurrence.make_inputs([65, 1])
    expected = results(recurrence.chunked, inputs)
    for name, value in results(recurrence.op, inputs, backend="reference").items():
        assert torch.equal(value, expected[name]), name


# Simple GLA's call of fla is its own; fla has no fp32 kernel of the delta rule.
@pytest.mark.parametrize(
    ("recurrence", "dtype"),
    [
        (recurrence, dtype)
        for recurrence in RECURRENCES
        for dtype in (torch.float32, torch.bfloat16)
        if recurrence.op is not SIMPLE_GLA.op and (recurrence, dtype) != (DELTA_RULE, torch.float32)
    ],
    ids=str,
)
def test_fla_gets_keywords_it_knows_and_every_argument(
    recurrence: Recurrence, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def kernel(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(arguments["cu_seqlens"])
        return recurrence.recurrent(**arguments)

    replace_fla(monkeypatch, recurrence, kernel)
    inputs = recurrence.make_inputs([65, 1]).rounded(dtype)
    found, expected = results(recurrence.op, inputs, backend="fla"), results(recurrence.recurrent, inputs)
    assert calls == [[0, 65, 66]]
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


ALIKE = [
    ("k", (1, 5, 2, 11), (1, 5, 2, 12)),
    ("k", (1, 4, 2, 12), (1, 5, 2, 12)),
    ("v", (1, 4, 2, 20), (1, 5, 2, 12)),
    ("v", (1, 5, 3, 20), (1, 5, 2, 12)),
    ("initial_state", (2, 2, 12, 20), (1, 2, 12, 20)),
    ("initial_state", (1, 1, 12, 20), (1, 2, 12, 20)),
    ("initial_state", (1, 2, 20, 12), (1, 2, 12, 20)),
]
PER_CHANNEL = [
    ("g", (1, 5, 2), (1, 5, 2, 12)),
    ("g", (1, 5, 2, 1), (1, 5, 2, 12)),
    ("g", (1, 5, 2, 20), (1, 5, 2, 12)),
    ("g", (1, 5, 1, 12), (1, 5, 2, 12)),
]
BETA = [("beta", (1, 5), (1, 5, 2)), ("beta", (1, 5, 2, 1), (1, 5, 2))]
# The argument, the shape it is given, and the one it disagrees with.
REFUSED = {
    "gated_delta": [*ALIKE, ("g", (1, 5, 3), (1, 5, 2)), ("g", (1, 5, 2, 12), (1, 5, 2)), *BETA],
    "kda": [*ALIKE, *PER_CHANNEL, *BETA],
    "delta_rule": [*ALIKE, *BETA],
    "gla": [*ALIKE, *PER_CHANNEL, ("v", (1, 5, 2), (1, 5, 2, 12))],
    "simple_gla": [
        ("k", (1, 5, 2, 11), (1, 5, 2, 12)),
        ("k", (1, 5, 4, 12), (1, 5, 2, 12)),
        ("k", (1, 4, 2, 12), (1, 5, 2, 12)),
        ("v", (1, 4, 4, 20), (1, 5, 2, 12)),
        ("v", (1, 5, 4), (1, 5, 2, 12)),
        ("g", (1, 5, 2), (1, 5, 4)),
        ("g", (1, 5, 4, 12), (1, 5, 4)),
        ("g", (2,), (4,)),
        ("g", (1,), (4,)),
        ("g", (5, 4), (1, 5, 4)),
        ("initial_state", (2, 4, 12, 20), (1, 4, 12, 20)),
        ("initial_state", (1, 2, 12, 20), (1, 4, 12, 20)),
        ("initial_state", (1, 4, 20, 12), (1, 4, 12, 20)),
    ],
}


@pytest.mark.parametrize(
    ("recurrence", "field", "shape", "other"),
    [(x, *row) for x in RECURRENCES for row in REFUSED.get(x.name, [])],
    ids=str,
)
def test_shapes_that_disagree_are_refused_with_both(
    recurrence: Recurrence, field: str, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    inputs = replace(recurrence.make_inputs([5]), **{field: torch.zeros(shape)})
    with pytest.raises(ValueError) as error:
        recurrence.op(**inputs.arguments())
    assert all(str(named) in str(error.value) for named in (shape, other)), error.value


@each
def test_a_batch_is_refused_with_its_size(recurrence: Recurrence) -> None:
    inputs = recurrence.make_inputs([5])
    batch = {name: torch.cat([x, x]) for name, x in inputs.tensors().items() if x.dim() > 1}
    with pytest.raises(ValueError, match=r"batch is 2.*cu_seqlens"):
        recurrence.op(**replace(inputs, **batch).arguments())


@each
@pytest.mark.parametrize("cu_seqlens", [[0, 4], [0, 6], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5], [0], []], ids=str)
def test_bad_boundaries_are_refused_with_the_token_count(recurrence: Recurrence, cu_seqlens: list[int]) -> None:
    inputs = replace(recurrence.make_inputs([5], has_state=False), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens .*must rise from 0 to T = 5") as error:
        recurrence.op(**inputs.arguments())
    assert str(cu_seqlens[:4]) in str(error.value)


@each
def test_unknown_backend_is_refused_and_the_known_named(recurrence: Recurrence) -> None:
    with pytest.raises(BackendError, match=r"'fast' is unknown; known: fla, (triton, )?reference"):
        recurrence.op(**recurrence.make_inputs([5]).arguments(), backend="fast")
