"""Kimi Delta Attention: chunks equal the recurrence, both equal forms written by others, bad arguments are refused."""

import inspect
from dataclasses import replace

import pytest
import torch
from gated_delta_cases import Inputs, Op, results
from kda_cases import make_inputs, widened
from packed_oracle import per_document
from torch import Tensor

from loopline.kernels.errors import BackendError
from loopline.kernels.gated_delta import reference as gated_delta_reference
from loopline.kernels.kda.op import kda
from loopline.kernels.kda.reference import chunked, recurrent
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [1, 2, 63, 64, 65, 257]
PACKED = [[1], [1, 1, 1], [1, 63, 1, 65, 2], [257, 1, 3], [5, 5, 5], [2, 130, 64, 1]]
SIZES = [(8, 16), (16, 8), (1, 1), (7, 13), (32, 32), (96, 192)]
STRONG = [-50.0, -1000.0, float("-inf")]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    limit = TOLERANCES["fp32", "op"] if tolerance is None else tolerance
    assert all(ratio <= limit for ratio in worst.values()), worst


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_chunks_equal_the_recurrence_with_every_gradient(n_tokens: int, has_state: bool) -> None:
    inputs = make_inputs([n_tokens], has_state=has_state)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_chunks_equal_the_recurrence_over_packed_documents(lengths: list[int], has_state: bool) -> None:
    inputs = make_inputs(lengths, has_state=has_state)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize(("d_k", "d_v"), SIZES)
def test_chunks_equal_the_recurrence_for_any_head_sizes(d_k: int, d_v: int) -> None:
    inputs = make_inputs([67, 1], n_heads=3, d_k=d_k, d_v=d_v)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 1000])
def test_result_does_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    inputs = make_inputs([65, 1, 3])
    assert_same(results(chunked, inputs, chunk_size=chunk_size), results(recurrent, inputs))


def test_chunks_equal_the_recurrence_with_negative_eigenvalues() -> None:
    inputs = make_inputs([130, 1], beta_max=2.0)
    assert inputs.beta.max() > 1.9
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_chunks_equal_the_recurrence_at_the_ends_of_beta(beta: float) -> None:
    inputs = make_inputs([65])
    inputs = replace(inputs, beta=torch.full_like(inputs.beta, beta))
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("g", [0.0, *STRONG])
def test_chunks_equal_the_recurrence_with_one_decay_everywhere(g: float) -> None:
    inputs = make_inputs([130, 1])
    inputs = replace(inputs, g=torch.full_like(inputs.g, g))
    assert_same(results(chunked, inputs), results(recurrent, inputs))


def _with_strong_decay(where: str, g: float) -> Inputs:
    inputs = make_inputs([130, 65])
    strong = {
        "tokens": (torch.arange(195) % 7 == 3)[:, None, None],
        "channels": torch.arange(12) % 3 == 1,
        "scattered": torch.rand(inputs.g.shape, generator=torch.Generator().manual_seed(3)) < 0.2,
    }[where]
    return replace(inputs, g=torch.where(strong, g, inputs.g))


# Held to the ordinary tolerance: no running sum is subtracted, so a strong decay costs no digits.
@pytest.mark.parametrize("where", ["tokens", "channels", "scattered"])
@pytest.mark.parametrize("g", STRONG)
def test_chunks_equal_the_recurrence_when_some_channels_forget_everything(g: float, where: str) -> None:
    inputs = _with_strong_decay(where, g)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_strong_decay_costs_no_digits_against_fp64(form: Op) -> None:
    inputs = _with_strong_decay("scattered", -1000.0)
    found = {name: x.double() for name, x in results(form, inputs).items()}
    assert_same(found, results(recurrent, widened(inputs)))


def test_chunks_equal_the_recurrence_in_fp64() -> None:
    inputs = widened(make_inputs([130, 1, 65], beta_max=2.0))
    found = results(chunked, inputs)
    assert all(x.dtype == torch.float64 for x in found.values())
    assert_same(found, results(recurrent, inputs), 1e-12)


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_one_decay_for_all_channels_is_the_gated_delta_rule(form: Op) -> None:
    inputs = make_inputs([65, 1])
    shared = inputs.g[..., :1]
    found = results(form, replace(inputs, g=shared.expand_as(inputs.g)))
    found["dg"] = found["dg"].sum(-1)
    assert_same(found, results(gated_delta_reference.recurrent, replace(inputs, g=shared[..., 0])))


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_each_document_is_computed_alone(form: Op) -> None:
    inputs = make_inputs([3, 1, 65])
    packed = results(form, inputs)
    for i, (start, end) in enumerate([(0, 3), (3, 4), (4, 69)]):
        alone = Inputs(
            *(x[:, start:end] for x in (inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta)),
            initial_state=inputs.initial_state[i : i + 1],
            cu_seqlens=[0, end - start],
        )
        o, state = form(**vars(alone), scale=alone.scale)
        assert rms_ratio(packed["o"][:, start:end], o) <= TOLERANCES["fp32", "op"]
        assert rms_ratio(packed["final_state"][i : i + 1], state) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_splitting_a_document_and_passing_its_state_changes_nothing(form: Op) -> None:
    whole = make_inputs([97])
    o, state = form(**vars(whole), scale=whole.scale)
    parts, carried = [], whole.initial_state
    for start, end in [(0, 40), (40, 41), (41, 97)]:
        cut = {name: x[:, start:end] for name, x in whole.tensors().items() if name != "initial_state"}
        part, carried = form(**cut, initial_state=carried, scale=whole.scale, cu_seqlens=[0, end - start])
        parts.append(part)
    assert rms_ratio(torch.cat(parts, dim=1), o) <= TOLERANCES["fp32", "op"]
    assert rms_ratio(carried, state) <= TOLERANCES["fp32", "op"]


def test_one_token_by_hand() -> None:
    inputs = make_inputs([1], n_heads=1, d_k=2, d_v=3)
    k, v, state = inputs.k[0, 0, 0], inputs.v[0, 0, 0], inputs.initial_state[0, 0]
    # The gate acts on the state first; with different decays the two factors do not commute.
    transition = (torch.eye(2) - inputs.beta.squeeze() * torch.outer(k, k)) @ torch.diag(inputs.g[0, 0, 0].exp())
    expected = transition @ state + inputs.beta.squeeze() * torch.outer(k, v)
    o, final_state = recurrent(**vars(inputs), scale=0.5)
    torch.testing.assert_close(final_state[0, 0], expected)
    torch.testing.assert_close(o[0, 0, 0], 0.5 * expected.T @ inputs.q[0, 0, 0])


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_bf16_inputs_give_bf16_outputs_and_an_fp32_state(form: Op) -> None:
    inputs = make_inputs([65, 1])
    half = replace(inputs, q=inputs.q.bfloat16(), k=inputs.k.bfloat16(), v=inputs.v.bfloat16())
    o, state = form(**vars(half), scale=half.scale)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # Computed in fp32 inside: the state is that of the rounded inputs in fp32.
    rounded = replace(inputs, q=half.q.float(), k=half.k.float(), v=half.v.float())
    assert rms_ratio(state, recurrent(**vars(rounded), scale=half.scale)[1]) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize("field", ["q", "k", "v", "g", "beta", "initial_state"])
def test_nan_in_an_input_reaches_the_comparison_and_fails(field: str) -> None:
    inputs = make_inputs([5])
    expected = results(recurrent, inputs)
    inputs.tensors()[field][0, -1] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same(results(chunked, inputs), expected)


# Forms written by others.


def _fla_oracle(name: str) -> Op:
    naive = pytest.importorskip("fla.ops.kda.naive", reason="flash-linear-attention comes with loopline[gpu]")

    def form(**arguments: Tensor) -> tuple[Tensor, Tensor]:
        if name == "naive_recurrent_kda":
            return naive.naive_recurrent_kda(**arguments, output_final_state=True)
        n_tokens = arguments["q"].shape[1]
        # It takes whole chunks only, and its exp is not masked: short ones keep it finite.
        size = next(size for size in range(16, 0, -1) if n_tokens % size == 0)
        return naive.naive_chunk_kda(**arguments, output_final_state=True, chunk_size=size)

    return per_document(form)


def _transformers_oracle(name: str) -> Op:
    from transformers.models.kimi_linear import modeling_kimi_linear

    # transformers puts fla's Triton kernel in the function's place where fla is installed; the torch form is inside.
    form = inspect.unwrap(getattr(modeling_kimi_linear, name))
    return per_document(
        lambda q, k, v, g, beta, initial_state: form(
            query=q, key=k, value=v, g=g, beta=beta, initial_state=initial_state, output_final_state=True
        )
    )


ORACLES = {
    "fla-recurrent": lambda: _fla_oracle("naive_recurrent_kda"),
    "fla-chunk": lambda: _fla_oracle("naive_chunk_kda"),
    "transformers-recurrent": lambda: _transformers_oracle("recurrent_kimi_delta_attention"),
    "transformers-chunk": lambda: _transformers_oracle("chunk_kimi_delta_attention"),
}


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2], [65], [63, 1, 64]], ids=str)
@pytest.mark.parametrize("oracle", ORACLES)
def test_both_forms_equal_those_of_other_libraries(oracle: str, lengths: list[int], has_state: bool) -> None:
    inputs = make_inputs(lengths, beta_max=2.0, has_state=has_state)
    expected = results(ORACLES[oracle](), inputs)
    for form in (recurrent, chunked):
        found = results(form, inputs)
        if lengths == [1] and not has_state:
            # Nothing is there to decay: the true gradient of g is 0, and the oracle's chunks leave rounding of it.
            assert not found["dg"].any()
            assert expected["dg"].abs().max() <= 1e-6
            found["dg"] = expected["dg"]
        assert_same(found, expected)


# The public op.


def test_public_op_is_the_chunked_reference() -> None:
    inputs = make_inputs([65, 1])
    expected = results(chunked, inputs)
    for name, value in results(kda, inputs, backend="reference").items():
        assert torch.equal(value, expected[name]), name


def test_fla_gets_keywords_it_knows_and_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    fla = pytest.importorskip("fla.ops.kda", reason="flash-linear-attention comes with loopline[gpu]")
    # fla swallows keywords it does not know, so a wrong name would change the result without an error.
    known = set(inspect.signature(fla.chunk_kda).parameters)

    def stand_in(**arguments: object) -> tuple[Tensor, Tensor]:
        assert arguments.keys() <= known
        assert arguments.pop("output_final_state") is True
        boundaries = arguments.pop("cu_seqlens")
        assert (boundaries.dtype, boundaries.tolist()) == (torch.int32, [0, 65, 66])
        return recurrent(**arguments, cu_seqlens=boundaries.tolist())

    monkeypatch.setattr(fla, "chunk_kda", stand_in)
    inputs = make_inputs([65, 1])
    assert_same(results(kda, inputs, backend="fla"), results(recurrent, inputs))


def _call(inputs: Inputs, **changes: object) -> None:
    kda(**{**vars(inputs), "scale": 1.0, **changes})


@pytest.mark.parametrize(
    ("field", "shape", "named"),
    [
        ("k", (1, 5, 2, 11), ["(1, 5, 2, 12)", "(1, 5, 2, 11)"]),
        ("k", (1, 4, 2, 12), ["(1, 5, 2, 12)", "(1, 4, 2, 12)"]),
        ("v", (1, 4, 2, 20), ["(1, 5, 2, 12)", "(1, 4, 2, 20)"]),
        ("v", (1, 5, 3, 20), ["(1, 5, 2, 12)", "(1, 5, 3, 20)"]),
        ("g", (1, 5, 2), ["(1, 5, 2)", "(1, 5, 2, 12)"]),
        ("g", (1, 5, 2, 1), ["(1, 5, 2, 1)", "(1, 5, 2, 12)"]),
        ("beta", (1, 5), ["(1, 5)", "(1, 5, 2)"]),
        ("initial_state", (2, 2, 12, 20), ["(2, 2, 12, 20)", "(1, 2, 12, 20)"]),
        ("initial_state", (1, 1, 12, 20), ["(1, 1, 12, 20)", "(1, 2, 12, 20)"]),
        ("initial_state", (1, 2, 20, 12), ["(1, 2, 20, 12)", "(1, 2, 12, 20)"]),
    ],
)
def test_shapes_that_disagree_are_refused_with_both(field: str, shape: tuple[int, ...], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        _call(make_inputs([5]), **{field: torch.zeros(shape)})
    assert all(text in str(error.value) for text in named), error.value


def test_a_batch_is_refused_with_its_size() -> None:
    inputs = make_inputs([5])
    batch = {name: torch.cat([x, x]) for name, x in inputs.tensors().items()}
    with pytest.raises(ValueError, match=r"batch is 2.*cu_seqlens"):
        _call(inputs, **batch)


@pytest.mark.parametrize("cu_seqlens", [[0, 4], [0, 6], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5], [0], []], ids=str)
def test_bad_boundaries_are_refused_with_the_token_count(cu_seqlens: list[int]) -> None:
    inputs = make_inputs([5], has_state=False)
    with pytest.raises(ValueError, match=r"cu_seqlens .*must rise from 0 to T = 5") as error:
        _call(inputs, cu_seqlens=cu_seqlens)
    assert str(cu_seqlens[:4]) in str(error.value)


def test_unknown_backend_is_refused_and_the_known_named() -> None:
    with pytest.raises(BackendError, match=r"'fast' is unknown; known: fla, reference"):
        _call(make_inputs([5]), backend="fast")
