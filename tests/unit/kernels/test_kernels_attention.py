"""Packed attention equals the dense form with every gradient, and that the forms of others; bad values are refused."""

import importlib.util
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loopline.kernels.attention.op import BACKENDS, packed_attention
from loopline.kernels.attention.reference import dense_attention
from loopline.kernels.backends import available_backends, check_backend
from loopline.kernels.errors import BackendError
from tests.tolerances import TOLERANCES, rms_ratio

Op = Callable[..., Tensor]
LENGTHS = [[1], [2], [63], [64], [65], [257], [1, 1, 1], [4, 4], [3, 1, 65, 2], [1, 2]]
HEADS = [(2, 2, 8), (6, 2, 7), (4, 1, 5)]
WINDOWS = [1, 2, 7, 64, 130, 1000]
WINDOWED_LENGTHS = [[1], [63], [128], [129], [257], [300, 300], [1, 130, 1, 257, 2], [1, 1, 1]]


def boundaries(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def make_inputs(
    lengths: list[int], heads: tuple[int, int, int] = (4, 2, 6), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k and v of (H, G, D) heads."""
    n_heads, n_kv_heads, d_head = heads
    generator = torch.Generator().manual_seed(sum(lengths) + n_heads)
    shapes = [(1, sum(lengths), h, d_head) for h in (n_heads, n_kv_heads, n_kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(op: Op, inputs: list[Tensor], lengths: list[int], **arguments: object) -> dict[str, Tensor]:
    """o, and the gradient of a fixed random projection of it with respect to q, k and v."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    o = op(*leaves, boundaries(lengths), **arguments)
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(7))
    return {"o": o.detach(), **dict(zip(["dq", "dk", "dv"], torch.autograd.grad((o * upstream).sum(), leaves)))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], is_one_key: bool = False) -> None:
    """Where each query sees one key its softmax is 1 whatever q and k are: their true gradient is 0."""
    scale = {name: expected["dv" if is_one_key else name] for name in expected}
    worst = {name: rms_ratio(found[name], expected[name], scale[name]) for name in expected}
    assert all(ratio <= TOLERANCES["fp32", "op"] for ratio in worst.values()), worst


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_equals_the_dense_form_with_every_gradient(
    lengths: list[int], heads: tuple[int, int, int]
) -> None:
    inputs = make_inputs(lengths, heads)
    expected = results(dense_attention, inputs, lengths)
    assert_same(results(packed_attention, inputs, lengths), expected, max(lengths) == 1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", WINDOWED_LENGTHS, ids=str)
def test_windows_equal_the_dense_form_with_every_gradient(lengths: list[int], window: int) -> None:
    inputs = make_inputs(lengths)
    expected = results(dense_attention, inputs, lengths, window=window)
    assert_same(results(packed_attention, inputs, lengths, window=window), expected, min(max(lengths), window) == 1)


@pytest.mark.parametrize("heads", HEADS)
def test_windows_equal_the_dense_form_for_any_heads(heads: tuple[int, int, int]) -> None:
    inputs = make_inputs([200, 3], heads)
    expected = results(dense_attention, inputs, [200, 3], window=33)
    assert_same(results(packed_attention, inputs, [200, 3], window=33), expected)


def test_a_window_no_shorter_than_every_document_changes_nothing() -> None:
    inputs = make_inputs([65, 1, 64])
    whole = results(packed_attention, inputs, [65, 1, 64])
    for name, value in results(packed_attention, inputs, [65, 1, 64], window=65).items():
        assert torch.equal(value, whole[name]), name


def test_the_window_counts_the_query_itself() -> None:
    q, k, v = make_inputs([5], (1, 1, 4))
    assert torch.equal(packed_attention(q, k, v, [0, 5], window=1), v)
    o = packed_attention(q, k, v, [0, 5], window=2)
    p = (torch.stack([q[0, 4, 0] @ k[0, 3, 0], q[0, 4, 0] @ k[0, 4, 0]]) / 2).softmax(0)
    torch.testing.assert_close(o[0, 4, 0], p[0] * v[0, 3, 0] + p[1] * v[0, 4, 0])


def test_documents_of_equal_length_and_of_unequal_length_take_the_same_values() -> None:
    q = torch.randn(1, 13, 2, 4)
    equal = packed_attention(q[:, :12], q[:, :12], q[:, :12], [0, 6, 12])
    unequal = packed_attention(q, q, q, [0, 6, 12, 13])
    assert rms_ratio(unequal[:, :12], equal) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize("window", [None, 5, 130])
def test_each_document_is_computed_alone(window: int | None) -> None:
    inputs = make_inputs([3, 1, 200])
    packed = packed_attention(*inputs, [0, 3, 4, 204], window=window)
    for start, end in itertools.pairwise([0, 3, 4, 204]):
        alone = packed_attention(*(x[:, start:end] for x in inputs), [0, end - start], window=window)
        assert rms_ratio(packed[:, start:end], alone) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("window", [None, 40])
def test_a_token_changes_no_output_before_it_nor_behind_its_window(window: int | None, backend: str) -> None:
    q, k, v = make_inputs([300])
    before = packed_attention(q, k, v, [0, 300], window=window, backend=backend)
    for t in (0, 77, 255, 299):
        k_new, v_new = k.clone(), v.clone()
        k_new[0, t] += 3
        v_new[0, t] -= 3
        after = packed_attention(q, k_new, v_new, [0, 300], window=window, backend=backend)
        end = 300 if window is None else t + window
        assert torch.equal(after[:, :t], before[:, :t])
        assert torch.equal(after[:, end:], before[:, end:])
        assert bool((after[:, t:end] != before[:, t:end]).flatten(2).any(-1).all())


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_bf16_inputs_give_bf16_outputs_about_as_good_as_their_inputs(backend: str, window: int | None) -> None:
    exact = make_inputs([130, 1])
    half = [x.bfloat16() for x in exact]
    expected = results(dense_attention, exact, [130, 1], window=window)
    rounded = results(dense_attention, [x.float() for x in half], [130, 1], window=window)
    found = results(packed_attention, half, [130, 1], window=window, backend=backend)
    for name in expected:
        assert found[name].dtype == torch.bfloat16
        ratio = rms_ratio(found[name], expected[name]) / rms_ratio(rounded[name], expected[name])
        assert ratio <= TOLERANCES["bf16", "weight_rounding"], name


def test_the_reference_computes_bf16_inputs_in_fp32() -> None:
    half = make_inputs([130, 1], dtype=torch.bfloat16)
    o = dense_attention(*half, [0, 130, 131])
    assert torch.equal(o, dense_attention(*(x.float() for x in half), [0, 130, 131]).bfloat16())


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_fp64_gradients_equal_finite_differences(backend: str, window: int | None) -> None:
    inputs = [x.requires_grad_() for x in make_inputs([12, 1], (2, 1, 3), torch.float64)]
    assert packed_attention(*inputs, [0, 12, 13], window=window, backend=backend).dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, [0, 12, 13], window=window, backend=backend), inputs
    )


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.n_elements = max(self.n_elements, x.numel())
        return out


def test_a_window_holds_nothing_of_the_size_of_the_row_squared() -> None:
    inputs = make_inputs([2048], (2, 1, 4))
    with _LargestTensor() as largest:
        results(packed_attention, inputs, [2048], window=64)
    assert largest.n_elements <= 2 * 128 * 192  # H x BQ x BK, far from 2048 ** 2
    with _LargestTensor() as largest:
        results(packed_attention, inputs, [2048], window=64, backend="reference")
    assert largest.n_elements >= 2048**2  # the counter sees what it should


def test_nan_in_an_input_reaches_the_comparison_and_fails() -> None:
    inputs = make_inputs([5])
    expected = results(dense_attention, inputs, [5])
    inputs[2][0, 2] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same(results(packed_attention, inputs, [5]), expected)


# Forms written by others.


def _fla_oracle() -> Op:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    from fla.ops.attn.naive import naive_parallel_attn

    return lambda q, k, v, window: naive_parallel_attn(q=q, k=k, v=v, window_size=window)[0]


def _transformers_oracle() -> Op:
    from transformers import LlamaConfig, masking_utils
    from transformers.models.llama import modeling_llama

    def op(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        config = LlamaConfig(attn_implementation="eager", sliding_window=window)
        arguments = {
            "config": config,
            "inputs_embeds": q.flatten(2),
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": torch.arange(q.shape[1])[None],
        }
        make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
        module = torch.nn.Module()
        module.num_key_value_groups = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return modeling_llama.eager_attention_forward(module, q, k, v, make(**arguments), scaling=q.shape[-1] ** -0.5)[
            0
        ]

    return op


ORACLES = {"fla-naive": _fla_oracle, "transformers-eager": _transformers_oracle}


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("lengths", [[1], [65], [63, 1, 64]], ids=str)
@pytest.mark.parametrize("oracle", ORACLES)
def test_dense_form_equals_those_of_other_libraries(oracle: str, lengths: list[int], window: int | None) -> None:
    form = ORACLES[oracle]()

    def op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> Tensor:
        bounds = itertools.pairwise(cu_seqlens)
        return torch.cat([form(q[:, a:b], k[:, a:b], v[:, a:b], window) for a, b in bounds], dim=1)

    inputs = make_inputs(lengths)
    expected = results(op, inputs, lengths)
    assert_same(results(dense_attention, inputs, lengths, window=window), expected, max(lengths) == 1)
    assert_same(results(packed_attention, inputs, lengths, window=window), expected, max(lengths) == 1)


@pytest.mark.parametrize("window", [None, 1, 17, 1000])
@pytest.mark.parametrize("lengths", [[1], [63, 1, 200], [257]], ids=str)
def test_flex_attention_sees_what_the_dense_form_sees(lengths: list[int], window: int | None) -> None:
    inputs = make_inputs(lengths, (4, 2, 16))
    with torch.no_grad():  # torch has no backward for it on a CPU
        found = packed_attention(*inputs, boundaries(lengths), window=window, backend="flex")
        expected = dense_attention(*inputs, boundaries(lengths), window=window)
    assert rms_ratio(found, expected) <= TOLERANCES["fp32", "op"]


# The public op.


def test_automatic_choice_is_sdpa() -> None:
    assert {check_backend("attention", BACKENDS, "auto", device) for device in ("cpu", "cuda")} == {"sdpa"}
    assert available_backends(BACKENDS, "cpu") == ["sdpa", "reference"]


def test_fla_takes_the_arguments_it_is_given() -> None:
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    import inspect

    from fla.ops.attn.parallel import parallel_attn

    known = inspect.signature(inspect.unwrap(parallel_attn)).parameters
    assert {"q", "k", "v", "scale", "window_size", "cu_seqlens"} <= known.keys()


def _call(inputs: list[Tensor], **changes: object) -> None:
    arguments = dict(zip("qkv", inputs)) | {"cu_seqlens": [0, inputs[0].shape[1]]}
    packed_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("field", "shape", "named"),
    [
        ("k", (1, 5, 2, 7), ["(1, 5, 2, 7)", "(1, 5, 2, 6)"]),
        ("v", (1, 5, 2, 7), ["(1, 5, 2, 7)", "(1, 5, 2, 6)"]),
        ("v", (1, 5, 1, 6), ["(1, 5, 1, 6)", "(1, 5, 2, 6)"]),
        ("q", (1, 5, 4, 7), ["(1, 5, 4, 7)", "(1, 5, 2, 6)"]),
        ("q", (1, 4, 4, 6), ["(1, 4, 4, 6)", "(1, 5, 2, 6)"]),
        ("q", (1, 5, 24), ["(1, 5, 24)", "(1, 5, 2, 6)"]),
        ("q", (1, 5, 3, 6), ["2 key/value heads", "3 query heads"]),
        ("q", (1, 5, 1, 6), ["2 key/value heads", "1 query heads"]),
    ],
)
def test_shapes_that_disagree_are_refused_with_both(field: str, shape: tuple[int, ...], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        _call(make_inputs([5]), **{field: torch.zeros(shape)})
    assert all(text in str(error.value) for text in named), error.value


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_a_key_is_refused_with_both(window: int) -> None:
    with pytest.raises(ValueError, match=rf"window {window} must be at least 1"):
        _call(make_inputs([5]), window=window)


def test_a_batch_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"batch is 2.*cu_seqlens"):
        _call([torch.cat([x, x]) for x in make_inputs([5])])


@pytest.mark.parametrize("cu_seqlens", [[0, 4], [0, 6], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5], [0], []], ids=str)
def test_bad_boundaries_are_refused_with_the_token_count(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens .*must rise from 0 to T = 5"):
        _call(make_inputs([5]), cu_seqlens=cu_seqlens)


def test_unknown_backend_is_refused_and_the_known_named() -> None:
    with pytest.raises(BackendError, match=r"'fast' is unknown; known: sdpa, fla, triton, flex, reference"):
        _call(make_inputs([5]), backend="fast")
