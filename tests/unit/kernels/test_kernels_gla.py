"""Gated linear attention: chunks equal the recurrence, both equal what others wrote, bad arguments are refused."""

import importlib.util
import sys
import types
from dataclasses import replace

import pytest
import torch
from gated_delta_cases import Op, results
from gla_cases import Inputs, make_inputs, with_decay, with_some_strong
from packed_oracle import per_document
from torch import Tensor

from loopline.kernels.errors import BackendError
from loopline.kernels.gla.op import gla
from loopline.kernels.gla.reference import chunked, recurrent
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [1, 2, 63, 64, 65, 257]
PACKED = [[1], [1, 1, 1], [1, 63, 1, 65, 2], [257, 1, 3], [5, 5, 5], [2, 130, 64, 1]]
SIZES = [(8, 16), (16, 8), (12, 20), (1, 1), (7, 13), (32, 32)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert all(ratio <= (tolerance or TOLERANCES["fp32", "op"]) for ratio in worst.values()), worst


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


def test_chunks_equal_the_recurrence_in_fp64_without_rounding() -> None:
    inputs = make_inputs([65, 1, 130]).to(torch.float64)
    found, expected = results(chunked, inputs), results(recurrent, inputs)
    assert all(x.dtype == torch.float64 for x in (*found.values(), *expected.values()))
    assert_same(found, expected, 1e-12)


def test_chunks_equal_the_recurrence_without_decay() -> None:
    inputs = with_decay(make_inputs([130, 1]), 0.0)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_everything_is_forgotten(g: float, chunk_size: int) -> None:
    inputs = with_decay(make_inputs([130, 1]), g)
    found, expected = results(chunked, inputs, chunk_size=chunk_size), results(recurrent, inputs)
    # The true gradient of g is about exp(-50): what is left is fp64 rounding of terms of size 1 that cancel.
    assert found.pop("dg").abs().max() <= 1e-13
    assert expected.pop("dg").abs().max() <= 1e-18
    assert_same(found, expected)


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_some_channels_forget_everything(g: float, chunk_size: int) -> None:
    inputs = with_some_strong(make_inputs([130, 65]), g)
    assert_same(results(chunked, inputs, chunk_size=chunk_size), results(recurrent, inputs))


def test_chunks_equal_the_recurrence_when_some_tokens_forget_everything() -> None:
    inputs = make_inputs([130, 65])
    strong = torch.arange(195) % 7 == 3
    inputs = replace(inputs, g=torch.where(strong[None, :, None, None], -1000.0, inputs.g))
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_each_document_is_computed_alone(form: Op) -> None:
    inputs = make_inputs([3, 1, 65])
    packed = results(form, inputs)
    for i, (start, end) in enumerate([(0, 3), (3, 4), (4, 69)]):
        alone = Inputs(
            *(x[:, start:end] for x in (inputs.q, inputs.k, inputs.v, inputs.g)),
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
    q, k, v, g = (x[0, 0, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.g))
    expected = torch.diag(g.exp()) @ inputs.initial_state[0, 0] + torch.outer(k, v)
    o, final_state = recurrent(**vars(inputs), scale=0.5)
    torch.testing.assert_close(final_state[0, 0], expected)
    torch.testing.assert_close(o[0, 0, 0], 0.5 * expected.T @ q)


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_bf16_inputs_give_bf16_outputs_and_an_fp32_state(form: Op) -> None:
    inputs = make_inputs([65, 1])
    half = replace(inputs, q=inputs.q.bfloat16(), k=inputs.k.bfloat16(), v=inputs.v.bfloat16())
    o, state = form(**vars(half), scale=half.scale)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # Computed in fp32 inside: the state is that of the rounded inputs in fp32.
    rounded = replace(inputs, q=half.q.float(), k=half.k.float(), v=half.v.float())
    assert rms_ratio(state, recurrent(**vars(rounded), scale=half.scale)[1]) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize("field", ["q", "k", "v", "g", "initial_state"])
def test_nan_in_an_input_reaches_the_comparison_and_fails(field: str) -> None:
    inputs = make_inputs([5])
    expected = results(recurrent, inputs)
    getattr(inputs, field)[0, -1] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same(results(chunked, inputs), expected)


# Forms written by others.


def _fla(path: str) -> types.ModuleType:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    return importlib.import_module(path)


def _gla_oracle() -> Op:
    form = _fla("fla.ops.gla.naive").naive_recurrent_gla
    return per_document(lambda g, **rest: form(**rest, gk=g, output_final_state=True))


def _hgrn_oracle() -> Op:
    """HGRN, a gate for each number of a flat state, with K * V numbers written as k v^T and read by q."""
    form = _fla("fla.ops.hgrn.naive").naive_recurrent_hgrn

    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        written = k[..., :, None] * v[..., None, :]  # [1, T, H, K, V]
        states, _ = form(
            x=written.flatten(2),
            g=g[..., None].expand_as(written).flatten(2),
            initial_state=None if initial_state is None else initial_state.flatten(1),
        )
        states = states.view_as(written)
        return torch.einsum("bthk,bthkv->bthv", q * q.shape[-1] ** -0.5, states), states[:, -1]

    return per_document(op)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2], [65], [63, 1, 64]], ids=str)
@pytest.mark.parametrize("oracle", [_gla_oracle, _hgrn_oracle])
def test_both_forms_equal_those_of_other_libraries(oracle, lengths: list[int], has_state: bool) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(lengths, has_state=has_state)
    expected = results(oracle(), inputs)
    assert_same(results(recurrent, inputs), expected)
    assert_same(results(chunked, inputs), expected)


@pytest.mark.parametrize("oracle", [_gla_oracle, _hgrn_oracle])
def test_both_forms_equal_those_of_other_libraries_for_hgrn2(oracle) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs([65, 3])

    def hgrn2(form: Op) -> Op:  # the forget gate is f = exp(g) and the key 1 - f; 0 * k gives k a gradient of 0
        return lambda q, k, v, g, **rest: form(q, 1 - g.exp() + 0 * k, v, g=g, **rest)

    expected = results(hgrn2(oracle()), inputs)
    assert_same(results(hgrn2(recurrent), inputs), expected)
    assert_same(results(hgrn2(chunked), inputs), expected)


def test_both_forms_without_decay_equal_linear_attention() -> None:
    form = _fla("fla.ops.linear_attn.naive").naive_recurrent_linear_attn
    oracle = per_document(lambda g, v, **rest: form(**rest, v=v + 0 * g.sum(), output_final_state=True))
    inputs = with_decay(make_inputs([65, 1]), 0.0)
    expected = results(oracle, inputs)
    for both in (recurrent, chunked):
        found = results(both, inputs)
        assert_same(found, {**expected, "dg": found["dg"]})  # the oracle has no decay


# The public op.


def test_public_op_is_the_chunked_reference() -> None:
    inputs = make_inputs([65, 1])
    expected = results(chunked, inputs)
    for name, value in results(gla, inputs, backend="reference").items():
        assert torch.equal(value, expected[name]), name


def test_fla_is_called_with_the_names_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_gla(*, q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):  # type: ignore[no-untyped-def]
        assert output_final_state
        assert cu_seqlens.dtype == torch.int32
        return recurrent(q, k, v, g=g, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens.tolist())

    module = types.ModuleType("fla.ops.gla")
    module.chunk_gla = chunk_gla
    monkeypatch.setitem(sys.modules, "fla.ops.gla", module)
    inputs = make_inputs([5, 1])
    assert_same(results(gla, inputs, backend="fla"), results(recurrent, inputs))


def _call(inputs: Inputs, **changes: object) -> None:
    gla(**{**vars(inputs), "scale": 1.0, **changes})


@pytest.mark.parametrize(
    ("field", "shape", "named"),
    [
        ("k", (1, 5, 2, 11), ["(1, 5, 2, 12)", "(1, 5, 2, 11)"]),
        ("k", (1, 4, 2, 12), ["(1, 5, 2, 12)", "(1, 4, 2, 12)"]),
        ("v", (1, 4, 2, 20), ["(1, 5, 2, 12)", "(1, 4, 2, 20)"]),
        ("v", (1, 5, 3, 20), ["(1, 5, 2, 12)", "(1, 5, 3, 20)"]),
        ("v", (1, 5, 2), ["(1, 5, 2, 12)", "(1, 5, 2)"]),
        ("g", (1, 5, 2), ["(1, 5, 2)", "(1, 5, 2, 12)"]),
        ("g", (1, 5, 2, 20), ["(1, 5, 2, 20)", "(1, 5, 2, 12)"]),
        ("g", (1, 5, 1, 12), ["(1, 5, 1, 12)", "(1, 5, 2, 12)"]),
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
