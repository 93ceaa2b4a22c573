"""Linear attention with one decay per head: chunks equal the recurrence, both equal Mamba2, RetNet and others."""

import importlib.util
import inspect
import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch
from gated_delta_cases import Op, results
from gla_cases import Inputs, with_decay, with_some_strong
from packed_oracle import per_document
from simple_gla_cases import make_inputs, per_head
from torch import Tensor

from loopline.kernels.errors import BackendError
from loopline.kernels.gla import reference as gla_reference
from loopline.kernels.simple_gla.op import simple_gla
from loopline.kernels.simple_gla.reference import chunked, recurrent
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [1, 2, 63, 64, 65, 257]
PACKED = [[1], [1, 1, 1], [1, 63, 1, 65, 2], [257, 1, 3], [5, 5, 5], [2, 130, 64, 1]]
SIZES = [(8, 16), (16, 8), (12, 20), (1, 1), (7, 13), (32, 32)]
GROUPS = [(1, 1), (1, 6), (2, 6), (3, 6), (6, 6)]  # (G, H)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    assert found.keys() == expected.keys()
    worst = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert all(ratio <= (tolerance or TOLERANCES["fp32", "op"]) for ratio in worst.values()), worst


@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_chunks_equal_the_recurrence_with_every_gradient(n_tokens: int, has_state: bool, is_constant: bool) -> None:
    inputs = make_inputs([n_tokens], has_state=has_state, is_constant=is_constant)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_chunks_equal_the_recurrence_over_packed_documents(
    lengths: list[int], has_state: bool, is_constant: bool
) -> None:
    inputs = make_inputs(lengths, has_state=has_state, is_constant=is_constant)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize(("d_k", "d_v"), SIZES)
def test_chunks_equal_the_recurrence_for_any_head_sizes(d_k: int, d_v: int) -> None:
    inputs = make_inputs([67, 1], n_groups=1, n_heads=3, d_k=d_k, d_v=d_v)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize(("n_groups", "n_heads"), GROUPS)
def test_chunks_equal_the_recurrence_for_any_number_of_groups(n_groups: int, n_heads: int) -> None:
    inputs = make_inputs([67, 1], n_groups=n_groups, n_heads=n_heads)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("form", [recurrent, chunked])
@pytest.mark.parametrize(("n_groups", "n_heads"), GROUPS)
def test_groups_equal_their_q_and_k_spelled_out_at_every_head(n_groups: int, n_heads: int, form: Op) -> None:
    inputs = make_inputs([67, 1], n_groups=n_groups, n_heads=n_heads)

    def spelled_out(q: Tensor, k: Tensor, v: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        return form(per_head(q, n_heads), per_head(k, n_heads), v, **rest)

    assert_same(results(form, inputs), results(spelled_out, inputs))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 1000])
def test_result_does_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    inputs = make_inputs([65, 1, 3])
    assert_same(results(chunked, inputs, chunk_size=chunk_size), results(recurrent, inputs))


@pytest.mark.parametrize("is_constant", [False, True])
def test_chunks_equal_the_recurrence_in_fp64_without_rounding(is_constant: bool) -> None:
    inputs = make_inputs([65, 1, 130], is_constant=is_constant).to(torch.float64)
    found, expected = results(chunked, inputs), results(recurrent, inputs)
    assert all(x.dtype == torch.float64 for x in (*found.values(), *expected.values()))
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_constant_decay_equals_the_same_spelled_out_at_every_token(form: Op) -> None:
    inputs = make_inputs([65, 1, 3], is_constant=True)
    spelled_out = replace(inputs, g=inputs.g.repeat(1, 69, 1))
    expected = results(form, spelled_out)
    expected["dg"] = expected["dg"].sum((0, 1))
    assert_same(results(form, inputs), expected)


@pytest.mark.parametrize("form", [recurrent, chunked])
def test_one_decay_per_head_is_one_decay_for_all_its_key_channels(form: Op) -> None:
    inputs = make_inputs([65, 1], n_groups=4, n_heads=4)

    def by_channel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        return gla_reference.recurrent(q, k, v, g=g[..., None].expand_as(k), **rest)

    assert_same(results(form, inputs), results(by_channel, inputs))


@pytest.mark.parametrize("is_constant", [False, True])
def test_chunks_equal_the_recurrence_without_decay(is_constant: bool) -> None:
    inputs = with_decay(make_inputs([130, 1], is_constant=is_constant), 0.0)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_everything_is_forgotten(g: float, is_constant: bool) -> None:
    inputs = with_decay(make_inputs([130, 1], is_constant=is_constant), g)
    found, expected = results(chunked, inputs), results(recurrent, inputs)
    # The true gradient of g is about exp(-50): what is left is fp64 rounding of terms of size 1 that cancel.
    assert found.pop("dg").abs().max() <= 1e-13
    assert expected.pop("dg").abs().max() <= 1e-18
    assert_same(found, expected)


@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_some_tokens_forget_everything(g: float) -> None:
    inputs = with_some_strong(make_inputs([130, 65]), g)
    assert_same(results(chunked, inputs), results(recurrent, inputs))


@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_one_head_forgets_everything(g: float) -> None:
    inputs = make_inputs([130, 65])
    inputs = replace(inputs, g=inputs.g.index_fill(-1, torch.tensor([1]), g))
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
    inputs = make_inputs([1], n_groups=1, n_heads=2, d_k=2, d_v=3)
    q, k = inputs.q[0, 0, 0], inputs.k[0, 0, 0]
    o, final_state = recurrent(**vars(inputs), scale=0.5)
    for head in range(2):
        decay, state = inputs.g[0, 0, head].exp(), inputs.initial_state[0, head]
        expected = decay * state + torch.outer(k, inputs.v[0, 0, head])
        torch.testing.assert_close(final_state[0, head], expected)
        torch.testing.assert_close(o[0, 0, head], 0.5 * expected.T @ q)


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


def _fla_oracle(name: str) -> Op:
    form = getattr(_fla("fla.ops.simple_gla.naive"), name)

    def op(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (per_head(x, v.shape[2]) for x in (q, k))
        return form(q=q, k=k, v=v, **rest, output_final_state=True)

    return per_document(op)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2], [65], [63, 1, 64]], ids=str)
@pytest.mark.parametrize("oracle", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_both_forms_equal_those_of_fla(oracle: str, lengths: list[int], has_state: bool) -> None:
    inputs = make_inputs(lengths, has_state=has_state)
    expected = results(_fla_oracle(oracle), inputs)
    assert_same(results(recurrent, inputs), expected)
    assert_same(results(chunked, inputs), expected)


def _without_state(form: Op) -> Op:
    """`form` with its final state replaced by a zero, to compare with forms that give none."""
    return lambda *arguments, **options: (form(*arguments, **options)[0], torch.zeros(1))


@pytest.mark.parametrize("lengths", [[1], [2], [65], [63, 1, 64]], ids=str)
def test_both_forms_equal_the_parallel_form_of_fla(lengths: list[int]) -> None:
    form = _fla("fla.ops.simple_gla.naive").naive_parallel_simple_gla

    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: None) -> tuple[Tensor, Tensor]:
        return form(q=per_head(q, v.shape[2]), k=per_head(k, v.shape[2]), v=v, g=g)[0], torch.zeros(1)

    inputs = make_inputs(lengths, has_state=False)
    expected = results(_without_state(per_document(op)), inputs)
    assert_same(results(_without_state(recurrent), inputs), expected)
    assert_same(results(_without_state(chunked), inputs), expected)


@pytest.mark.parametrize("lengths", [[1], [2], [65], [63, 1, 64]], ids=str)
def test_both_forms_equal_retention_under_its_decay(lengths: list[int]) -> None:
    naive_retention = _fla("fla.ops.retention.naive").naive_retention  # head-first, with RetNet's decay inside

    def one_document(q: Tensor, k: Tensor, v: Tensor, initial_state: None) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (per_head(q, v.shape[2]), per_head(k, v.shape[2]), v))
        return naive_retention(q=q, k=k, v=v).transpose(1, 2), torch.zeros(1)

    def oracle(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        return per_document(one_document)(q, k, v + 0 * g.sum(), **rest)

    inputs = make_inputs(lengths, has_state=False, is_constant=True)
    expected = results(_without_state(oracle), inputs)
    for form in (recurrent, chunked):
        found = results(_without_state(form), inputs)
        assert_same(found, {**expected, "dg": found["dg"]})  # the oracle's decay is fixed


@dataclass(frozen=True)
class _SsdInputs(Inputs):
    """C, B, x and dt of Mamba2 in the places of q, k, v and g, and its A: [H]."""

    a: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "a": self.a}


def _make_ssd_inputs(lengths: list[int], n_groups: int, has_state: bool) -> _SsdInputs:
    inputs = make_inputs(lengths, n_groups=n_groups, has_state=has_state)
    return _SsdInputs(**{**vars(inputs), "g": -inputs.g}, a=-torch.arange(1.0, 5.0))


def _ssd(form: Op) -> Op:
    def op(c: Tensor, b: Tensor, x: Tensor, *, g: Tensor, a: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        return form(c, b, g[..., None] * x, g=g * a, **rest)

    return op


def _mamba2_oracle(chunk_size: int) -> Op:
    from transformers.models.mamba2 import modeling_mamba2

    # transformers puts mamba_ssm's CUDA kernel in the function's place where that is installed; torch's is inside.
    form = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan)

    def op(c: Tensor, b: Tensor, x: Tensor, *, a: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        def one_document(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            o, state = form(
                hidden_states=v,
                dt=g,
                A=a,
                B=k,
                C=q * q.shape[-1] ** -0.5,  # SSD has no scale
                chunk_size=chunk_size,
                initial_states=None if initial_state is None else initial_state.mT,  # [N, H, V, K]
                return_final_states=True,
            )
            return o, state.mT

        return per_document(one_document)(c, b, x, **rest)

    return op


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [16, 256])
@pytest.mark.parametrize("lengths", [[1], [2], [65], [63, 1, 64]], ids=str)
def test_both_forms_equal_mamba2_of_transformers(
    lengths: list[int], chunk_size: int, n_groups: int, has_state: bool
) -> None:
    inputs = _make_ssd_inputs(lengths, n_groups, has_state)
    expected = results(_mamba2_oracle(chunk_size), inputs)
    assert_same(results(_ssd(recurrent), inputs), expected)
    assert_same(results(_ssd(chunked), inputs), expected)


# The public op.


@pytest.mark.parametrize("is_constant", [False, True])
def test_public_op_is_the_chunked_reference(is_constant: bool) -> None:
    inputs = make_inputs([65, 1], is_constant=is_constant)
    expected = results(chunked, inputs)
    for name, value in results(simple_gla, inputs, backend="reference").items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def fla_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor | None]]:
    """fla's kernel replaced by one with its two traps, a head for each head and no gradient of g_gamma."""
    calls: list[dict[str, Tensor | None]] = []

    def chunk_simple_gla(  # type: ignore[no-untyped-def]
        *, q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens
    ):
        assert output_final_state
        assert cu_seqlens.dtype == torch.int32
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert (g is None) != (g_gamma is None)
        calls.append({"g": g, "g_gamma": g_gamma})
        decay = g if g_gamma is None else g_gamma.detach()
        return recurrent(q, k, v, g=decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens.tolist())

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = chunk_simple_gla
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    return calls


@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_fla_gets_every_head_and_a_decay_that_has_a_gradient(
    n_groups: int, is_constant: bool, fla_calls: list[dict[str, Tensor | None]]
) -> None:
    inputs = make_inputs([5, 1], n_groups=n_groups, is_constant=is_constant)
    assert_same(results(simple_gla, inputs, backend="fla"), results(recurrent, inputs))
    assert fla_calls[0]["g"].shape == (1, 6, 4)


def test_fla_gets_a_decay_that_does_not_learn_as_one_number_a_head(
    fla_calls: list[dict[str, Tensor | None]],
) -> None:
    inputs = make_inputs([5, 1], is_constant=True)
    _call(inputs, backend="fla")
    assert fla_calls == [{"g": None, "g_gamma": inputs.g}]


def _call(inputs: Inputs, **changes: object) -> None:
    simple_gla(**{**vars(inputs), "scale": 1.0, **changes})


@pytest.mark.parametrize(
    ("field", "shape", "named"),
    [
        ("k", (1, 5, 2, 11), ["(1, 5, 2, 12)", "(1, 5, 2, 11)"]),
        ("k", (1, 5, 4, 12), ["(1, 5, 2, 12)", "(1, 5, 4, 12)"]),
        ("k", (1, 4, 2, 12), ["(1, 5, 2, 12)", "(1, 4, 2, 12)"]),
        ("v", (1, 4, 4, 20), ["(1, 5, 2, 12)", "(1, 4, 4, 20)"]),
        ("v", (1, 5, 4), ["(1, 5, 2, 12)", "(1, 5, 4)"]),
        ("v", (1, 5, 3, 20), ["2 groups", "3 heads"]),
        ("v", (1, 5, 1, 20), ["2 groups", "1 heads"]),
        ("g", (1, 5, 2), ["(1, 5, 2)", "(1, 5, 4)"]),
        ("g", (1, 5, 4, 12), ["(1, 5, 4, 12)", "(1, 5, 4)"]),
        ("g", (2,), ["(2,)", "(4,)"]),
        ("g", (1,), ["(1,)", "(4,)"]),
        ("g", (5, 4), ["(5, 4)", "(1, 5, 4)"]),
        ("initial_state", (2, 4, 12, 20), ["(2, 4, 12, 20)", "(1, 4, 12, 20)"]),
        ("initial_state", (1, 2, 12, 20), ["(1, 2, 12, 20)", "(1, 4, 12, 20)"]),
        ("initial_state", (1, 4, 20, 12), ["(1, 4, 20, 12)", "(1, 4, 12, 20)"]),
    ],
)
def test_shapes_that_disagree_are_refused_with_both(field: str, shape: tuple[int, ...], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        _call(make_inputs([5]), **{field: torch.zeros(shape)})
    assert all(text in str(error.value) for text in named), error.value


@pytest.mark.parametrize("is_constant", [False, True])
def test_a_batch_is_refused_with_its_size(is_constant: bool) -> None:
    inputs = make_inputs([5], is_constant=is_constant)
    batch = {name: torch.cat([x, x]) for name, x in inputs.tensors().items() if x.dim() > 1}
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
