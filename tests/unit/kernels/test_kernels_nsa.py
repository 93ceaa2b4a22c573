"""Native Sparse Attention: blocks of queries equal the dense form, both equal forms of others, as does selection."""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loopline.kernels.attention.op import packed_attention
from loopline.kernels.attention.reference import dense_attention, masked_softmax
from loopline.kernels.errors import BackendError
from loopline.kernels.nsa.blocks import NsaSizes, choose_blocks, pool_blocks
from loopline.kernels.nsa.op import nsa, select_blocks
from loopline.kernels.nsa.reference import blocked, dense_nsa
from tests.tolerances import TOLERANCES, rms_ratio

Op = Callable[..., Tensor]
LENGTHS = [1, 7, 8, 63, 64, 65, 257]
PACKED = [[1, 1, 1], [1, 63, 1, 65, 2], [130, 1, 3], [8, 8], [5, 16, 5], [7, 1]]
HEADS = [(1, 1, 4), (2, 2, 8), (6, 2, 7), (4, 1, 5), (3, 3, 1)]
SIZES = NsaSizes(block_size=8, n_selected=4, window=11)


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op; shapes as in kernels/nsa/op.py. w_k and w_v pool keys and values."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    w_k: Tensor
    w_v: Tensor
    cu_seqlens: list[int]

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


def make_inputs(
    lengths: list[int], *, heads: tuple[int, int, int] = (4, 2, 6), block_size: int = 8, scale: float = 1.0
) -> Inputs:
    """Random inputs of (H, G, D) heads; `scale` on q sharpens every softmax."""
    n_heads, n_kv_heads, d_head = heads
    generator = torch.Generator().manual_seed(sum(lengths) + 31 * n_heads + d_head)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n_tokens = sum(lengths)
    return Inputs(
        q=normal(1, n_tokens, n_heads, d_head) * scale,
        k=normal(1, n_tokens, n_kv_heads, d_head),
        v=normal(1, n_tokens, n_kv_heads, d_head),
        gates=normal(1, n_tokens, n_heads, 3).sigmoid(),
        w_k=(normal(n_kv_heads, d_head, block_size) + 1) / block_size,
        w_v=(normal(n_kv_heads, d_head, block_size) + 1) / block_size,
        cu_seqlens=[sum(lengths[:i]) for i in range(len(lengths) + 1)],
    )


def pools(q: Tensor, k: Tensor, v: Tensor, w_k: Tensor, w_v: Tensor, cu_seqlens: list[int], block_size: int):  # type: ignore[no-untyped-def]
    pool = functools.partial(pool_blocks, cu_seqlens=cu_seqlens, block_size=block_size)
    return pool(k, weights=w_k), pool(v, weights=w_v)


def selection_of(inputs: Inputs, sizes: NsaSizes) -> Tensor:
    """[1, T, G, S], with the learned pooling."""
    k_pool = pool_blocks(inputs.k, cu_seqlens=inputs.cu_seqlens, block_size=sizes.block_size, weights=inputs.w_k)
    return select_blocks(inputs.q, inputs.k, sizes=sizes, cu_seqlens=inputs.cu_seqlens, k_pool=k_pool)


def results(op: Op, inputs: Inputs, sizes: NsaSizes = SIZES, **arguments: object) -> dict[str, Tensor]:
    """o, and the gradient of a fixed random projection of it with respect to every argument, pooling included."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.tensors().items()}
    q, k, v, gates, w_k, w_v = leaves.values()
    o = op(
        q,
        k,
        v,
        gates=gates,
        pooled=pools(q, k, v, w_k, w_v, inputs.cu_seqlens, sizes.block_size),
        selection=selection_of(inputs, sizes),
        sizes=sizes,
        cu_seqlens=inputs.cu_seqlens,
        scale=q.shape[-1] ** -0.5,
        **arguments,
    )
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad((o * upstream).sum(), list(leaves.values()))
    return {"o": o.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    worst = {}
    for name, value in expected.items():
        # A softmax of one key is 1 whatever q and k are: where each query sees one, their true gradients are 0. What
        # is then left is rounding, of the size of dv's.
        is_zero = name in ("dq", "dk", "dw_k", "dw_v") and bool(
            (value.abs() <= 1e-6 * expected["dv"].abs().max()).all()
        )
        worst[name] = rms_ratio(found[name], value, expected["dv"] if is_zero else None)
    assert all(ratio <= TOLERANCES["fp32", "op"] for ratio in worst.values()), worst


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_blocks_of_queries_equal_the_dense_form_with_every_gradient(n_tokens: int) -> None:
    inputs = make_inputs([n_tokens])
    assert_same(results(blocked, inputs), results(dense_nsa, inputs))


@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_blocks_of_queries_equal_the_dense_form_over_packed_documents(lengths: list[int]) -> None:
    inputs = make_inputs(lengths)
    assert_same(results(blocked, inputs), results(dense_nsa, inputs))


@pytest.mark.parametrize("heads", HEADS)
def test_blocks_of_queries_equal_the_dense_form_for_any_heads(heads: tuple[int, int, int]) -> None:
    inputs = make_inputs([67, 1], heads=heads)
    assert_same(results(blocked, inputs), results(dense_nsa, inputs))


@pytest.mark.parametrize(
    "sizes",
    [
        NsaSizes(1, 3, 1),
        NsaSizes(3, 5, 2),
        NsaSizes(64, 3, 64),
        NsaSizes(200, 3, 1000),
        NsaSizes(5, 100, 7),
    ],
    ids=str,
)
def test_blocks_of_queries_equal_the_dense_form_for_any_sizes(sizes: NsaSizes) -> None:
    inputs = make_inputs([67, 1, 130], block_size=sizes.block_size)
    assert_same(results(blocked, inputs, sizes), results(dense_nsa, inputs, sizes))


@pytest.mark.parametrize("n_rows", [1, 7, 64, 1000])
def test_result_does_not_depend_on_how_many_queries_go_at_a_time(n_rows: int) -> None:
    inputs = make_inputs([65, 1, 3])
    assert_same(results(blocked, inputs, n_rows=n_rows), results(dense_nsa, inputs))


def test_everything_selected_and_in_the_window_is_full_attention() -> None:
    inputs = make_inputs([65, 1, 16])
    q, k, v, cu_seqlens = inputs.q, inputs.k, inputs.v, inputs.cu_seqlens
    full = dense_attention(q, k, v, cu_seqlens)
    sizes = NsaSizes(block_size=8, n_selected=9, window=65)
    for gates in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.5, 0.5]):
        gates = torch.tensor(gates).expand(1, 82, 4, 3)
        o = nsa(q, k, v, gates=gates, sizes=sizes, cu_seqlens=cu_seqlens)
        assert rms_ratio(o, full) <= TOLERANCES["fp32", "op"]


def test_the_window_branch_is_windowed_attention() -> None:
    inputs = make_inputs([65, 1, 16])
    gates = torch.tensor([0.0, 0.0, 1.0]).expand(1, 82, 4, 3)
    o = nsa(inputs.q, inputs.k, inputs.v, gates=gates, sizes=SIZES, cu_seqlens=inputs.cu_seqlens)
    expected = packed_attention(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, window=SIZES.window)
    assert rms_ratio(o, expected) <= TOLERANCES["fp32", "op"]


@pytest.mark.parametrize("form", [dense_nsa, blocked])
def test_queries_without_a_complete_block_get_nothing_from_the_compressed_branch(form: Op) -> None:
    inputs = make_inputs([20, 7])
    gates = torch.tensor([1.0, 0.0, 0.0]).expand(1, 27, 4, 3)
    o = results(form, replace(inputs, gates=gates))["o"]
    is_empty = torch.tensor([*[True] * 7, *[False] * 13, *[True] * 7])
    assert torch.equal((o == 0).all(-1).all(-1)[0], is_empty)
    # The query that completes block 0 sees it alone: its pooled value, whatever the scores.
    v_pool = pool_blocks(inputs.v, cu_seqlens=inputs.cu_seqlens, block_size=8, weights=inputs.w_v)
    torch.testing.assert_close(o[0, 7], v_pool[0, 0].repeat_interleave(2, dim=0))


@pytest.mark.parametrize("form", [dense_nsa, blocked])
def test_each_document_is_computed_alone(form: Op) -> None:
    inputs = make_inputs([19, 1, 65])
    packed = results(form, inputs)["o"]
    for start, end in itertools.pairwise(inputs.cu_seqlens):
        rows = {name: getattr(inputs, name)[:, start:end] for name in ("q", "k", "v", "gates")}
        alone = results(form, replace(inputs, **rows, cu_seqlens=[0, end - start]))["o"]
        assert rms_ratio(packed[:, start:end], alone) <= TOLERANCES["fp32", "op"]


def test_a_token_changes_no_output_before_it() -> None:
    inputs = make_inputs([200])
    call = functools.partial(nsa, gates=inputs.gates, sizes=SIZES, cu_seqlens=[0, 200])
    before = call(inputs.q, inputs.k, inputs.v)
    for t in (0, 7, 8, 77, 128, 199):
        q, k, v = (x.clone() for x in (inputs.q, inputs.k, inputs.v))
        q[0, t], k[0, t], v[0, t] = q[0, t] + 3, k[0, t] + 3, v[0, t] - 3
        after = call(q, k, v)
        assert torch.equal(after[:, :t], before[:, :t]), t
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("n_queries", [1, 2, 9, 64, 69])
def test_the_last_queries_alone_equal_the_last_rows(n_queries: int) -> None:
    inputs = make_inputs([70])
    whole = nsa(inputs.q, inputs.k, inputs.v, gates=inputs.gates, sizes=SIZES, cu_seqlens=[0, 70])
    q, gates = inputs.q[:, -n_queries:], inputs.gates[:, -n_queries:]
    last = nsa(q, inputs.k, inputs.v, gates=gates, sizes=SIZES, cu_seqlens=[0, 70])
    assert rms_ratio(last, whole[:, -n_queries:]) <= TOLERANCES["fp32", "op"]
    selection = select_blocks(inputs.q, inputs.k, sizes=SIZES, cu_seqlens=[0, 70])
    alone = select_blocks(q, inputs.k, sizes=SIZES, cu_seqlens=[0, 70])
    assert torch.equal(alone, selection[:, -n_queries:])


def test_decoding_token_by_token_equals_the_whole_row() -> None:
    inputs = make_inputs([40])
    whole = nsa(inputs.q, inputs.k, inputs.v, gates=inputs.gates, sizes=SIZES, cu_seqlens=[0, 40])
    steps = [
        nsa(
            inputs.q[:, t : t + 1],
            inputs.k[:, : t + 1],
            inputs.v[:, : t + 1],
            gates=inputs.gates[:, t : t + 1],
            sizes=SIZES,
            cu_seqlens=[0, t + 1],
        )
        for t in range(40)
    ]
    assert rms_ratio(torch.cat(steps, dim=1), whole) <= TOLERANCES["fp32", "op"]


def test_bf16_inputs_give_bf16_outputs_computed_in_fp32() -> None:
    inputs = make_inputs([65, 1])
    half = {name: getattr(inputs, name).bfloat16() for name in ("q", "k", "v")}
    full = {name: x.float() for name, x in half.items()}
    call = functools.partial(nsa, gates=inputs.gates, sizes=SIZES, cu_seqlens=inputs.cu_seqlens)
    assert torch.equal(call(**half), call(**full).bfloat16())
    leaves = {name: x.requires_grad_() for name, x in half.items()}
    gradients = torch.autograd.grad(call(**leaves).float().sum(), list(leaves.values()))
    assert all(g.dtype == torch.bfloat16 and bool(g.isfinite().all()) for g in gradients)


def test_fp64_gradients_equal_finite_differences() -> None:
    inputs = make_inputs([7, 1], heads=(2, 1, 2), block_size=2)
    sizes = NsaSizes(block_size=2, n_selected=3, window=3)
    leaves = [x.double().requires_grad_() for x in inputs.tensors().values()]
    selection = selection_of(inputs, sizes)

    def op(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
        pooled = pools(q, k, v, w_k, w_v, inputs.cu_seqlens, 2)
        return nsa(q, k, v, gates=gates, sizes=sizes, cu_seqlens=inputs.cu_seqlens, pooled=pooled, selection=selection)

    assert op(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(op, leaves)


def test_a_common_factor_on_gates_and_a_scale_on_queries_act_as_they_should() -> None:
    inputs = make_inputs([65])
    call = functools.partial(nsa, k=inputs.k, v=inputs.v, sizes=SIZES, cu_seqlens=[0, 65])
    o = call(inputs.q, gates=inputs.gates)
    assert rms_ratio(call(inputs.q, gates=inputs.gates / 2), o / 2) <= TOLERANCES["fp32", "op"]
    assert rms_ratio(call(inputs.q * 2, gates=inputs.gates, scale=6**-0.5 / 2), o) <= TOLERANCES["fp32", "op"]


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


def test_nothing_of_the_size_of_the_row_squared_is_made_nor_kept_for_backward() -> None:
    inputs, sizes = make_inputs([1024], heads=(2, 1, 4)), SIZES
    n_kept = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal n_kept
        n_kept += x.numel() if x._base is None else 0
        return x

    with _LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results(blocked, inputs, sizes)
    assert largest.n_elements <= 2 * 64 * 1024  # H x n_rows x T
    assert n_kept < 1024**2 / 4
    with _LargestTensor() as largest:
        results(dense_nsa, inputs, sizes)
    assert largest.n_elements >= 1024**2  # the counter sees what it should


@pytest.mark.parametrize("field", ["q", "k", "v", "gates", "w_k", "w_v"])
def test_nan_in_an_input_reaches_the_comparison_and_fails(field: str) -> None:
    inputs = make_inputs([20])
    expected = results(dense_nsa, inputs)
    getattr(inputs, field)[0, 2] = float("nan")
    with pytest.raises(AssertionError, match="inf"):
        assert_same(results(blocked, inputs), expected)


# Pooling.


def test_pooled_blocks_are_the_complete_ones_of_each_document() -> None:
    x = torch.arange(27.0)[None, :, None, None].expand(1, 27, 2, 3)
    pooled = pool_blocks(x, cu_seqlens=[0, 1, 10, 14, 27], block_size=4)
    starts = [1, 5, 10, 14, 18, 22]  # documents of 1, 9, 4 and 13 tokens
    assert torch.equal(pooled, torch.tensor([s + 1.5 for s in starts])[None, :, None, None].expand(1, 6, 2, 3))
    assert pool_blocks(x, cu_seqlens=[0, 27], block_size=28).shape == (1, 0, 2, 3)


def test_uniform_weights_are_the_mean() -> None:
    inputs = make_inputs([65, 1, 16])
    mean = pool_blocks(inputs.k, cu_seqlens=inputs.cu_seqlens, block_size=8)
    uniform = pool_blocks(inputs.k, cu_seqlens=inputs.cu_seqlens, block_size=8, weights=torch.full((2, 6, 8), 1 / 8))
    assert rms_ratio(uniform, mean) <= TOLERANCES["fp32", "op"]


def test_a_weight_is_of_one_head_channel_and_place() -> None:
    x, weights = torch.randn(1, 9, 2, 3), torch.zeros(2, 3, 4)
    weights[1, 2, 3] = 5.0
    pooled = pool_blocks(x, cu_seqlens=[0, 9], block_size=4, weights=weights)
    expected = torch.zeros(1, 2, 2, 3)
    expected[0, 0, 1, 2], expected[0, 1, 1, 2] = 5 * x[0, 3, 1, 2], 5 * x[0, 7, 1, 2]
    torch.testing.assert_close(pooled, expected)


# Selection.


def loop_selection(inputs: Inputs, sizes: NsaSizes) -> list[list[set[int]]]:
    """Blocks of each token and key/value head, one at a time, with mean pooling."""
    size, chosen = sizes.block_size, []
    group = inputs.q.shape[2] // inputs.k.shape[2]
    for start, end in itertools.pairwise(inputs.cu_seqlens):
        for t in range(end - start):
            own, heads = t // size, []
            for g in range(inputs.k.shape[2]):
                importance = dict.fromkeys(range(own + 1), 0.0)
                complete = [b for b in range(own + 1) if b * size + size - 1 <= t]
                for h in range(g * group, (g + 1) * group) if complete else []:
                    keys = [inputs.k[0, start + b * size : start + b * size + size, g].mean(0) for b in complete]
                    scores = torch.stack([inputs.q[0, start + t, h] @ key for key in keys])
                    for b, p in zip(complete, (scores * inputs.q.shape[3] ** -0.5).softmax(0).tolist()):
                        importance[b] += p
                forced = {b for b in (0, own - 1, own) if b >= 0}
                rest = sorted(set(importance) - forced, key=lambda b: (-importance[b], b))
                heads.append(forced | set(rest[: max(0, sizes.n_selected - len(forced))]))
            chosen.append(heads)
    return chosen


def as_sets(selection: Tensor) -> list[list[set[int]]]:
    rows = [[[b for b in head if b >= 0] for head in token] for token in selection[0].tolist()]
    assert all(len(set(head)) == len(head) for token in rows for head in token), "a block twice"
    return [[set(head) for head in token] for token in rows]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[1], [8], [100], [1, 50, 1, 17]], ids=str)
def test_selected_blocks_are_those_of_an_explicit_loop(lengths: list[int], heads: tuple[int, int, int]) -> None:
    inputs, sizes = make_inputs(lengths, heads=heads, scale=3.0), NsaSizes(block_size=4, n_selected=5, window=1)
    selection = select_blocks(inputs.q, inputs.k, sizes=sizes, cu_seqlens=inputs.cu_seqlens)
    assert selection.shape == (1, sum(lengths), heads[1], 5)
    assert as_sets(selection) == loop_selection(inputs, sizes)


def test_selection_rises_fills_up_with_minus_one_and_has_no_gradient() -> None:
    inputs = make_inputs([50])
    q, k = inputs.q.requires_grad_(), inputs.k.requires_grad_()
    selection = select_blocks(q, k, sizes=SIZES, cu_seqlens=[0, 50])
    assert (selection.dtype, selection.requires_grad) == (torch.int64, False)
    for t, token in enumerate(selection[0].tolist()):
        for head in token:
            n_valid = min(SIZES.n_selected, t // 8 + 1)
            assert head[n_valid:] == [-1] * (SIZES.n_selected - n_valid)
            assert head[:n_valid] == sorted(head[:n_valid])
            assert {0, t // 8, max(t // 8 - 1, 0)} <= set(head)


def test_of_equally_important_blocks_the_lower_is_taken() -> None:
    k = torch.ones(1, 80, 1, 2)  # every block alike
    selection = select_blocks(torch.ones(1, 80, 4, 2), k, sizes=NsaSizes(8, 5, 1), cu_seqlens=[0, 80])
    assert selection[0, 79, 0].tolist() == [0, 1, 2, 8, 9]
    assert selection[0, 63, 0].tolist() == [0, 1, 2, 6, 7]


def test_forced_blocks_come_before_one_that_holds_all_probability() -> None:
    p = torch.zeros(1, 3, 1, 6)
    p[..., 3] = 1.0
    chosen = choose_blocks(p, positions=torch.tensor([47]), sizes=NsaSizes(8, 3, 1))
    assert chosen.tolist() == [[[0, 4, 5]]]


def test_importance_is_summed_over_the_query_heads_of_a_group() -> None:
    p = torch.zeros(1, 3, 1, 8)
    p[0, 0, 0, 2], p[0, :, 0, 3] = 0.9, 0.4  # the highest of one head, and the highest sum
    chosen = choose_blocks(p, positions=torch.tensor([63]), sizes=NsaSizes(8, 4, 1))
    assert chosen.tolist() == [[[0, 3, 6, 7]]]


@pytest.mark.parametrize("form", [dense_nsa, blocked, nsa])
def test_future_missing_and_repeated_blocks_of_a_selection_are_not_read(form: Op) -> None:
    inputs = make_inputs([20])
    gates = torch.tensor([0.0, 1.0, 0.0]).expand(1, 20, 4, 3)
    pooled = pools(inputs.q, inputs.k, inputs.v, inputs.w_k, inputs.w_v, [0, 20], 8)
    call = functools.partial(form, gates=gates, sizes=SIZES, cu_seqlens=[0, 20], pooled=pooled, scale=0.5)
    own = (torch.arange(20) // 8)[None, :, None, None].expand(1, 20, 2, 1)
    noise = torch.tensor([-1, 3, 99]).expand(1, 20, 2, 3)
    alone = call(inputs.q, inputs.k, inputs.v, selection=own)
    assert torch.equal(call(inputs.q, inputs.k, inputs.v, selection=torch.cat([own, own, own + 1, noise], -1)), alone)
    assert torch.equal(call(inputs.q, inputs.k, inputs.v, selection=noise), torch.zeros(1, 20, 4, 6))


def test_a_selection_given_is_used_and_the_default_is_that_of_select_blocks() -> None:
    inputs = make_inputs([65, 1])
    call = functools.partial(
        nsa, inputs.q, inputs.k, inputs.v, gates=inputs.gates, sizes=SIZES, cu_seqlens=inputs.cu_seqlens
    )
    selection = select_blocks(inputs.q, inputs.k, sizes=SIZES, cu_seqlens=inputs.cu_seqlens)
    assert torch.equal(call(), call(selection=selection))
    assert not torch.equal(call(), call(selection=selection[..., :1]))


def test_rows_that_see_nothing_are_zero_with_zero_gradient() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    visible = torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]])
    p = masked_softmax(scores, visible)
    torch.testing.assert_close(p.sum(-1), torch.tensor([1.0, 0.0, 1.0]))
    (gradient,) = torch.autograd.grad((p * torch.randn(3, 4)).sum(), scores)
    assert bool(gradient.isfinite().all())
    assert not gradient[~visible].any()


# Forms written by others.


def _fla_naive():  # type: ignore[no-untyped-def]
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed (it comes with loopline[gpu])")
    from fla.ops.nsa import naive

    return naive


def _fla_oracle() -> Op:
    """fla's three naive branches, one document at a time, under our gates; its own whole needs groups of 16."""
    naive = _fla_naive()
    from fla.ops.attn.naive import naive_parallel_attn

    def op(q, k, v, *, gates, pooled, selection, sizes, cu_seqlens, scale):  # type: ignore[no-untyped-def]
        outputs, size, n_pooled = [], sizes.block_size, 0
        for start, end in itertools.pairwise(cu_seqlens):
            row = slice(start, end)
            n_complete = (end - start) // size
            k_pool, v_pool = (x[:, n_pooled : n_pooled + n_complete] for x in pooled)
            n_pooled += n_complete
            o, g = 0, gates[:, row]
            if n_complete:
                o = (
                    naive.naive_nsa_compression(q=q[:, row], k_cmp=k_pool, v_cmp=v_pool, block_size=size, scale=scale)[
                        0
                    ]
                    * g[..., 0:1]
                )
            o = o + g[..., 1:2] * naive.naive_nsa_selection(
                q=q[:, row],
                k=k[:, row],
                v=v[:, row],
                block_indices=selection[:, row],
                block_size=size,
                scale=scale,
            )
            window = naive_parallel_attn(q=q[:, row], k=k[:, row], v=v[:, row], scale=scale, window_size=sizes.window)[
                0
            ]
            outputs.append(o + g[..., 2:3] * window)
        return torch.cat(outputs, dim=1)

    return op


@pytest.mark.parametrize("heads", [(4, 2, 6), (3, 3, 5), (16, 1, 4)])
@pytest.mark.parametrize("lengths", [[9], [65], [20, 1, 34]], ids=str)
def test_both_forms_equal_the_naive_branches_of_fla(lengths: list[int], heads: tuple[int, int, int]) -> None:
    inputs = make_inputs(lengths, heads=heads)
    expected = results(_fla_oracle(), inputs)
    assert_same(results(dense_nsa, inputs), expected)
    assert_same(results(blocked, inputs), expected)


@pytest.mark.parametrize("heads", [(4, 2, 6), (3, 3, 5), (16, 1, 4)])
@pytest.mark.parametrize("lengths", [[1], [100], [20, 1, 70]], ids=str)
def test_selection_equals_that_of_fla(lengths: list[int], heads: tuple[int, int, int]) -> None:
    naive = _fla_naive()
    inputs, sizes = make_inputs(lengths, heads=heads, scale=2.0), NsaSizes(block_size=4, n_selected=5, window=1)
    found = as_sets(select_blocks(inputs.q, inputs.k, sizes=sizes, cu_seqlens=inputs.cu_seqlens))
    for start, end in itertools.pairwise(inputs.cu_seqlens):
        # fla's pooled keys hold the last block even where it is incomplete, and never rank it.
        k_pool = torch.stack([x.mean(1) for x in inputs.k[:, start:end].split(4, dim=1)], dim=1)
        expected = naive.naive_nsa_topk(
            q=inputs.q[:, start:end], k_cmp=k_pool, block_counts=5, block_size=4, scale=heads[2] ** -0.5
        )
        assert found[start:end] == as_sets(expected)


# The public op.


def test_public_op_is_the_blocked_reference() -> None:
    inputs = make_inputs([65, 1])
    expected = results(blocked, inputs)
    for name, value in results(nsa, inputs, backend="reference").items():
        assert torch.equal(value, expected[name]), name


def _call(inputs: Inputs, **changes: object) -> Tensor:
    arguments = {name: x for name, x in vars(inputs).items() if name not in ("w_k", "w_v")}
    return nsa(**{**arguments, "sizes": SIZES, **changes})


@pytest.mark.parametrize(
    ("field", "shape", "named"),
    [
        ("k", (1, 20, 2, 7), ["(1, 20, 2, 7)", "(1, 20, 2, 6)"]),
        ("v", (1, 20, 1, 6), ["(1, 20, 1, 6)", "(1, 20, 2, 6)"]),
        ("q", (1, 20, 4, 7), ["(1, 20, 4, 7)", "(1, 20, 2, 6)"]),
        ("q", (1, 20, 3, 6), ["2 key/value heads", "3 query heads"]),
        ("q", (1, 21, 4, 6), ["21 queries", "20 keys"]),
        ("q", (1, 0, 4, 6), ["0 queries", "20 keys"]),
        ("gates", (1, 20, 4), ["(1, 20, 4)", "(1, 20, 4, 3)"]),
        ("gates", (1, 20, 2, 3), ["(1, 20, 2, 3)", "(1, 20, 4, 3)"]),
        ("selection", (1, 20, 4, 4), ["(1, 20, 4, 4)", "(1, 20, 2)"]),
        ("selection", (1, 20, 2), ["(1, 20, 2)", "[1, T_q, G, S]"]),
    ],
)
def test_shapes_that_disagree_are_refused_with_both(field: str, shape: tuple[int, ...], named: list[str]) -> None:
    dtype = torch.int64 if field == "selection" else torch.float32
    with pytest.raises(ValueError) as error:
        _call(make_inputs([20]), **{field: torch.zeros(shape, dtype=dtype)})
    assert all(text in str(error.value) for text in named), error.value


def test_a_selection_that_is_not_of_integers_is_refused_with_its_type() -> None:
    with pytest.raises(ValueError, match=r"torch.float32 must be integers"):
        _call(make_inputs([20]), selection=torch.zeros(1, 20, 2, 4))


@pytest.mark.parametrize("which", [0, 1])
def test_pooled_blocks_of_another_number_are_refused_with_both(which: int) -> None:
    pooled = [torch.zeros(1, 2, 2, 6)] * 2
    pooled[which] = torch.zeros(1, 3, 2, 6)
    with pytest.raises(ValueError, match=r"_pool \(1, 3, 2, 6\) must be \[1, NB, G, D\] = \(1, 2, 2, 6\)"):
        _call(make_inputs([20]), pooled=tuple(pooled))


def test_pooling_weights_of_another_shape_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"\(2, 6, 7\) must be \[G, D, B\] = \(2, 6, 8\)"):
        pool_blocks(torch.zeros(1, 20, 2, 6), cu_seqlens=[0, 20], block_size=8, weights=torch.zeros(2, 6, 7))


def test_fewer_queries_than_keys_of_many_documents_are_refused_with_all_counts() -> None:
    inputs = make_inputs([5, 15])
    with pytest.raises(ValueError, match=r"1 queries to 20 keys in 2 documents"):
        _call(inputs, q=inputs.q[:, -1:], gates=inputs.gates[:, -1:])


def test_a_batch_is_refused_with_its_size() -> None:
    inputs = make_inputs([5])
    with pytest.raises(ValueError, match=r"batch is 2.*cu_seqlens"):
        _call(inputs, **{name: torch.cat([getattr(inputs, name)] * 2) for name in ("q", "k", "v", "gates")})


@pytest.mark.parametrize("cu_seqlens", [[0, 4], [0, 6], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5], [0], []], ids=str)
def test_bad_boundaries_are_refused_with_the_token_count(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens .*must rise from 0 to T = 5"):
        _call(make_inputs([5]), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4, 4), "block_size 0 and window 4 must be at least 1"),
        ((8, 4, 0), "block_size 8 and window 0 must be at least 1"),
        ((8, 2, 4), "n_selected 2 must be at least 3"),
    ],
)
def test_sizes_too_small_are_refused_with_the_least(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NsaSizes(*sizes)


def test_unknown_backend_is_refused_and_the_known_named() -> None:
    with pytest.raises(BackendError, match=r"'fla' is unknown; known: reference"):
        _call(make_inputs([5]), backend="fla")
