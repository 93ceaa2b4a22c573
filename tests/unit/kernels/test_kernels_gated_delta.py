"""The gated delta rule: chunks equal the recurrence, both equal forms written by others, bad arguments are refused."""

import importlib.util
import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from gated_delta_cases import Inputs, Op, make_inputs, results, with_decay
from torch import Tensor

from loopline.kernels.errors import BackendError
from loopline.kernels.gated_delta.op import gated_delta
from loopline.kernels.gated_delta.reference import chunked, recurrent
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [1, 2, 63, 64, 65, 257]
PACKED = [[1], [1, 1, 1], [1, 63, 1, 65, 2], [257, 1, 3], [5, 5, 5], [2, 130, 64, 1]]
SIZES = [(8, 16), (16, 8), (12, 20), (1, 1), (7, 13), (32, 32), (96, 192)]  # the last is LT2's


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert all(ratio <= TOLERANCES["fp32", "op"] for ratio in worst.values()), worst


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


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 1000])
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


def test_chunks_equal_the_recurrence_without_decay() -> None:
    inputs = with_decay(make_inputs([130, 1]), 0.0)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_everything_is_forgotten(g: float) -> None:
    inputs = with_decay(make_inputs([130, 1]), g)
    found, expected = results(chunked, inputs), results(recurrent, inputs)
    # The true gradients of g and of the initial state are about exp(-50): what is left is rounding of terms of size 1.
    for name in ("dg", "dinitial_state"):
        assert found.pop(name).abs().max() <= 1e-5
        assert expected.pop(name).abs().max() <= 1e-20
    assert_same(found, expected)


@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_some_tokens_forget_everything(g: float) -> None:
    inputs = make_inputs([130, 65])
    strong = torch.arange(195) % 7 == 3
    inputs = replace(inputs, g=torch.where(strong[None, :, None], g, inputs.g))
    assert_same(results(chunked, inputs), results(recurrent, inputs))


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
        o, state = form(**{**vars(alone)}, scale=alone.scale)
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
    transition = torch.eye(2) - inputs.beta.squeeze() * torch.outer(k, k)
    expected = inputs.g.squeeze().exp() * transition @ state + inputs.beta.squeeze() * torch.outer(k, v)
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


def test_nan_in_an_input_reaches_the_comparison_and_fails() -> None:
    inputs = make_inputs([5])
    expected = results(recurrent, inputs)
    inputs.v[0, 2] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same(results(chunked, inputs), expected)


# Forms written by others.


def _dense_oracle(form):  # type: ignore[no-untyped-def]
    """A batched form without cu_seqlens behind our signature, one document at a time."""

    def op(q, k, v, *, g, beta, scale, cu_seqlens, initial_state):  # type: ignore[no-untyped-def]
        assert scale == q.shape[-1] ** -0.5  # every oracle's default
        outputs, states = [], []
        for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
            cut = [x[:, start:end] for x in (q, k, v, g, beta)]
            state = None if initial_state is None else initial_state[i : i + 1]
            o, final_state = form(*cut, state)
            outputs.append(o)
            states.append(final_state)
        return torch.cat(outputs, dim=1), torch.cat(states)

    return op


def _fla_oracle(name: str) -> Op:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    from fla.ops.gated_delta_rule import naive

    form = getattr(naive, name)
    # Keywords: the two naive forms order g and beta differently.
    return _dense_oracle(
        lambda q, k, v, g, beta, state: form(
            q=q, k=k, v=v, g=g, beta=beta, initial_state=state, output_final_state=True
        )
    )


def _transformers_oracle(name: str) -> Op:
    from transformers.models.qwen3_next import modeling_qwen3_next

    # transformers puts fla's Triton kernel in the function's place where fla is installed; the torch form is inside.
    form = inspect.unwrap(getattr(modeling_qwen3_next, name))
    return _dense_oracle(
        lambda q, k, v, g, beta, state: form(
            query=q, key=k, value=v, g=g, beta=beta, initial_state=state, output_final_state=True
        )
    )


ORACLES = {
    "fla-recurrent": lambda: _fla_oracle("naive_recurrent_gated_delta_rule"),
    "fla-chunk": lambda: _fla_oracle("naive_chunk_gated_delta_rule"),
    "transformers-recurrent": lambda: _transformers_oracle("torch_recurrent_gated_delta_rule"),
    "transformers-chunk": lambda: _transformers_oracle("torch_chunk_gated_delta_rule"),
}


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2], [65], [63, 1, 64]], ids=str)
@pytest.mark.parametrize("oracle", ORACLES)
def test_both_forms_equal_those_of_other_libraries(oracle: str, lengths: list[int], has_state: bool) -> None:
    inputs = make_inputs(lengths, beta_max=2.0, has_state=has_state)
    expected = results(ORACLES[oracle](), inputs)
    assert_same(results(recurrent, inputs), expected)
    assert_same(results(chunked, inputs), expected)


# The public op.


def test_public_op_is_the_chunked_reference() -> None:
    inputs = make_inputs([65, 1])
    expected = results(chunked, inputs)
    for name, value in results(gated_delta, inputs, backend="reference").items():
        assert torch.equal(value, expected[name]), name


def _call(inputs: Inputs, **changes: object) -> None:
    gated_delta(**{**vars(inputs), "scale": 1.0, **changes})


@pytest.mark.parametrize(
    ("field", "shape", "named"),
    [
        ("k", (1, 5, 2, 11), ["(1, 5, 2, 12)", "(1, 5, 2, 11)"]),
        ("k", (1, 4, 2, 12), ["(1, 5, 2, 12)", "(1, 4, 2, 12)"]),
        ("v", (1, 4, 2, 20), ["(1, 5, 2, 12)", "(1, 4, 2, 20)"]),
        ("v", (1, 5, 3, 20), ["(1, 5, 2, 12)", "(1, 5, 3, 20)"]),
        ("g", (1, 5, 3), ["(1, 5, 3)", "(1, 5, 2)"]),
        ("g", (1, 5, 2, 12), ["(1, 5, 2, 12)", "(1, 5, 2)"]),
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
