"""Linear attention with one decay per head: groups, constant decay, and equality with Mamba2, RetNet and others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from packed_oracle import fla_form, over_documents, per_document, transformers_form
from recurrence_cases import (
    SIMPLE_GLA,
    Inputs,
    Op,
    assert_both_forms_equal,
    assert_same,
    per_head,
    replace_fla,
    results,
)
from recurrence_cases import make_simple_gla_inputs as make_inputs
from torch import Tensor

from loopline.kernels.gla import reference as gla_reference
from loopline.kernels.simple_gla.op import simple_gla
from loopline.kernels.simple_gla.reference import chunked, recurrent

GROUPS = [(1, 1), (1, 6), (2, 6), (3, 6), (6, 6)]  # (G, H)


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


@pytest.mark.parametrize("g", [-50.0, -1000.0])
def test_chunks_equal_the_recurrence_when_one_head_forgets_everything(g: float) -> None:
    inputs = make_inputs([130, 65])
    inputs = replace(inputs, g=inputs.g.index_fill(-1, torch.tensor([1]), g))
    assert_same(results(chunked, inputs), results(recurrent, inputs))


def _fla_oracle(name: str) -> Op:
    form = fla_form(f"fla.ops.simple_gla.naive.{name}")

    def op(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (per_head(x, v.shape[2]) for x in (q, k))
        return form(q=q, k=k, v=v, **rest, output_final_state=True)

    return per_document(op)


@pytest.mark.parametrize("has_state", [False, True])
@over_documents
@pytest.mark.parametrize("oracle", ["naive_recurrent_simple_gla", "naive_chunk_simple_gla"])
def test_both_forms_equal_those_of_fla(oracle: str, lengths: tuple[int, ...], has_state: bool) -> None:
    assert_both_forms_equal(_fla_oracle(oracle), SIMPLE_GLA, lengths, has_state=has_state)


def _without_state(form: Op) -> Op:
    """`form` with its final state replaced by a zero, to compare with forms that give none."""
    return lambda *arguments, **options: (form(*arguments, **options)[0], torch.zeros(1))


@over_documents
def test_both_forms_equal_the_parallel_form_of_fla(lengths: tuple[int, ...]) -> None:
    form = fla_form("fla.ops.simple_gla.naive.naive_parallel_simple_gla")

    def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: None) -> tuple[Tensor, Tensor]:
        return form(q=per_head(q, v.shape[2]), k=per_head(k, v.shape[2]), v=v, g=g)[0], torch.zeros(1)

    inputs = make_inputs(lengths, has_state=False)
    expected = results(_without_state(per_document(op)), inputs)
    assert_same(results(_without_state(recurrent), inputs), expected)
    assert_same(results(_without_state(chunked), inputs), expected)


@over_documents
def test_both_forms_equal_retention_under_its_decay(lengths: tuple[int, ...]) -> None:
    form = fla_form("fla.ops.retention.naive.naive_retention")  # head-first, with RetNet's decay inside

    def one_document(q: Tensor, k: Tensor, v: Tensor, initial_state: None) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (per_head(q, v.shape[2]), per_head(k, v.shape[2]), v))
        return form(q=q, k=k, v=v).transpose(1, 2), torch.zeros(1)

    def oracle(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        return per_document(one_document)(q, k, v + 0 * g.sum(), **rest)

    inputs = make_inputs(lengths, has_state=False, is_constant=True)
    expected = results(_without_state(oracle), inputs)
    for both in (recurrent, chunked):
        found = results(_without_state(both), inputs)
        assert_same(found, {**expected, "dg": found["dg"]})  # the oracle's decay is fixed


@dataclass(frozen=True)
class _SsdInputs(Inputs):
    """C, B, x and dt of Mamba2 in the places of q, k, v and g, and its A: [H]."""

    a: Tensor


def _ssd(form: Op) -> Op:
    def op(c: Tensor, b: Tensor, x: Tensor, *, g: Tensor, a: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        return form(c, b, g[..., None] * x, g=g * a, **rest)

    return op


def _mamba2_oracle(chunk_size: int) -> Op:
    form = transformers_form("mamba2", "mamba2_chunk_scan")

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


def _make_ssd_inputs(lengths: Sequence[int], **options: Any) -> _SsdInputs:
    inputs = make_inputs(lengths, **options)
    return _SsdInputs(**{**vars(inputs), "g": -inputs.g}, a=-torch.arange(1.0, 5.0))


SSD = replace(SIMPLE_GLA, name="ssd", recurrent=_ssd(recurrent), chunked=_ssd(chunked), make_inputs=_make_ssd_inputs)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [16, 256])
@over_documents
def test_both_forms_equal_mamba2_of_transformers(
    lengths: tuple[int, ...], chunk_size: int, n_groups: int, has_state: bool
) -> None:
    assert_both_forms_equal(_mamba2_oracle(chunk_size), SSD, lengths, n_groups=n_groups, has_state=has_state)


@pytest.fixture
def fla_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor | None]]:
    """fla's kernel replaced by one with its two traps, a head for each head and no gradient of g_gamma."""
    calls: list[dict[str, Tensor | None]] = []

    def kernel(q, k, v, g, g_gamma, **rest):  # type: ignore[no-untyped-def]
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert (g is None) != (g_gamma is None)
        calls.append({"g": g, "g_gamma": g_gamma})
        return recurrent(q, k, v, g=g if g_gamma is None else g_gamma.detach(), **rest)

    replace_fla(monkeypatch, SIMPLE_GLA, kernel)
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
    simple_gla(**inputs.arguments(), backend="fla")
    assert fla_calls == [{"g": None, "g_gamma": inputs.g}]


@pytest.mark.parametrize("n_heads", [3, 1])
def test_groups_that_do_not_divide_the_heads_are_refused_with_both(n_heads: int) -> None:
    inputs = replace(make_inputs([5]), v=torch.zeros(1, 5, n_heads, 20))
    with pytest.raises(ValueError, match=rf"2 groups .*{n_heads} heads"):
        simple_gla(**inputs.arguments())
