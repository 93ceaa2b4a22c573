"""What DeepSeek sparse attention on our Triton kernels, run by the interpreter, differs by from torch, on a CPU.

Run as `python -m tests.unit.kernels.dsa_interpreted` from the root with TRITON_INTERPRET=1: one line of JSON a case.
Large tiles keep the interpreter quick; tiles that a GPU would get have cases of their own.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loopline.kernels.dsa import op
from loopline.kernels.dsa.bitmask import Bitmask
from loopline.kernels.dsa.tiles import IndexTiles, Tile
from loopline.kernels.dsa.visible import Selection
from loopline.models.context import RowContext
from loopline.models.packing import Packing
from tests.tolerances import rms_ratio
from tests.unit.kernels.dsa_cases import (
    Inputs,
    attention_results,
    make_inputs,
    poisoned_integers,
    special_index,
)
from tests.unit.kernels.interpreted import DTYPES, Case, Figures, Key, figures, report
from tests.unit.small_mixers import SMALL

LARGE = Tile(64, 256, 4, 1)
QUICK = IndexTiles(LARGE, LARGE, LARGE, LARGE, Tile(128, 256, 4, 1), Tile(64, 64, 4, 1))
NARROW = IndexTiles(
    scores=Tile(64, 128, 4, 1),
    choose=Tile(32, 32, 4, 1),
    lse=Tile(64, 64, 4, 1),
    loss=Tile(64, 64, 4, 1),
    dq=Tile(64, 32, 4, 1),
    dk=Tile(32, 64, 4, 1),
)
DIGITS = replace(QUICK, choose=Tile(1, 2048, 4, 1))
PACKED = [1, 63, 1, 130, 2]
# Documents; index heads; their size; keys to choose; tiles.
CHOICES: dict[str, tuple[list[int], int, int, int, IndexTiles]] = {
    "one_token": ([1], 1, 16, 3, QUICK),
    "one_token_documents": ([1, 1, 1], 3, 16, 3, QUICK),
    "shorter_than_top_k": ([63], 4, 64, 1000, QUICK),
    "one_key": ([63], 3, 16, 1, QUICK),
    "one_head": ([257], 1, 96, 7, QUICK),
    "many_tiles": ([257], 3, 16, 40, NARROW),
    "many_heads": ([70], 16, 64, 17, QUICK),
    "packed": (PACKED, 3, 96, 7, QUICK),
    "several_workspaces": ([530, 70], 1, 16, 33, QUICK),
    "unlike_documents": ([5, 400, 1, 1, 90, 64, 64], 1, 16, 33, NARROW),
    "by_digits": ([257], 3, 16, 40, DIGITS),
    "by_digits_packed": (PACKED, 3, 16, 7, DIGITS),
    "by_digits_in_turns": ([150], 3, 16, 40, replace(DIGITS, choose=Tile(1, 64, 4, 1))),
}


@contextmanager
def tiles_of(tiles: IndexTiles) -> Iterator[None]:
    """Inside, ops launch with these tiles."""
    from loopline.kernels.dsa import launch

    before = launch.index_tiles
    launch.index_tiles = lambda *_: tiles  # type: ignore[assignment]
    try:
        yield
    finally:
        launch.index_tiles = before


def index_of(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The indexer's tensors, queries and keys as a model gives them in `dtype`."""
    return {name: x if name == "weights" else x.to(dtype) for name, x in inputs.index.items()}


def n_different(bits: Bitmask, selection: Tensor, cu_seqlens: list[int]) -> float:
    """Words that are not those of index lists."""
    return float((bits.words != Bitmask.from_positions(selection, cu_seqlens).words).sum())


def exact_choice(name: str, dtype: torch.dtype) -> Figures:
    """Scores that are small integers, exact in any form and often equal: words that differ from torch's choice."""
    from loopline.kernels.dsa.launch import select_bits

    lengths, n_heads, d_index, top_k, tiles = CHOICES[name]
    inputs = make_inputs(lengths, n_index_heads=n_heads, d_index=d_index, is_grid=True)
    index = index_of(inputs, dtype)
    with poisoned_integers():
        bits = select_bits(**index, top_k=top_k, cu_seqlens=inputs.cu_seqlens, workspace_bytes=0, tiles=tiles)
    selection = op.select(**index, top_k=top_k, cu_seqlens=inputs.cu_seqlens)
    return {"different": n_different(bits, selection, inputs.cu_seqlens)}


def own_tiles_choice(dtype: torch.dtype) -> Figures:
    """The same through the op, with the tiles a GPU gets, of short and of long documents."""
    from loopline.kernels.dsa.launch import select_bits
    from loopline.kernels.dsa.tiles import LONG, index_tiles

    inputs = make_inputs([40, 7], d_index=16, is_grid=True)
    index, bounds = index_of(inputs, dtype), inputs.cu_seqlens
    selection = op.select(**index, top_k=7, cu_seqlens=bounds)
    through = op.select(**index, top_k=7, cu_seqlens=bounds, backend="triton")
    long = select_bits(**index, top_k=7, cu_seqlens=bounds, tiles=index_tiles(16, dtype.itemsize, LONG))
    return {name: n_different(x, selection, bounds) for name, x in (("different", through), ("different_long", long))}


def special_scores(tiles: IndexTiles, dtype: torch.dtype) -> Figures:
    """Both zeros, infinities, NaN, the smallest and largest numbers."""
    index, n_tokens = special_index()
    different = 0.0
    with tiles_of(tiles):
        for top_k, bounds in itertools.product((1, 5, 13, 40, 77), ([0, n_tokens], [0, 30, n_tokens])):
            bits = op.select(**index, top_k=top_k, cu_seqlens=bounds, backend="triton")
            different += n_different(bits, op.select(**index, top_k=top_k, cu_seqlens=bounds), bounds)
    return {"different": different}


def rounded_choice(dtype: torch.dtype) -> Figures:
    """Real scores, which may be rounded otherwise here and there: share of torch's keys that were not chosen."""
    inputs = make_inputs([257, 1, 63], n_index_heads=4, d_index=64)
    index, bounds = index_of(inputs, dtype), inputs.cu_seqlens
    with tiles_of(QUICK):
        bits = op.select(**index, top_k=31, cu_seqlens=bounds, backend="triton")
    expected = Bitmask.from_positions(op.select(**index, top_k=31, cu_seqlens=bounds), bounds)
    total, n_queries = op.selection_overlap(expected, bits)
    assert torch.equal(expected.counts(), bits.counts())
    return {"missed": 1 - float(total) / n_queries}


# The indexer's loss: documents; heads (H, G, D); index heads (HI, DI); keys chosen; tiles.
Loss = tuple[list[int], tuple[int, int, int], tuple[int, int], int | None, IndexTiles]
LOSSES: dict[str, Loss] = {
    "sparse": ([257], (4, 2, 32), (3, 16), 33, QUICK),
    "dense": ([257], (4, 2, 32), (3, 16), None, QUICK),
    "sparse_packed": (PACKED, (4, 1, 96), (4, 96), 7, NARROW),
    "dense_packed": (PACKED, (2, 2, 16), (1, 64), None, NARROW),
    "many_heads": ([70], (8, 2, 64), (16, 64), 20, QUICK),
    "shorter_than_top_k": ([63, 2], (2, 1, 16), (4, 16), 1000, QUICK),
}


def loss_inputs(shape: Loss, dtype: torch.dtype) -> tuple[Inputs, Tensor | None]:
    """Inputs as a model gives them, and a choice that no rounding decides."""
    lengths, (n_heads, n_kv_heads, d_head), (n_index_heads, d_index), top_k, _ = shape
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "d_value": d_head}
    inputs = make_inputs(lengths, **sizes, n_index_heads=n_index_heads, d_index=d_index)
    # Scores of both signs before the relu, unlike those of make_inputs.
    inputs = replace(inputs, k_index=torch.randn(inputs.k_index.shape), q_index=torch.randn(inputs.q_index.shape))
    inputs = replace(inputs.map(lambda x: x.to(dtype)), weights=inputs.weights)
    if top_k is None:
        return inputs, None
    return inputs, op.select(**index_double(inputs), top_k=top_k, cu_seqlens=inputs.cu_seqlens)


def index_double(inputs: Inputs) -> dict[str, Tensor]:
    return inputs.map(Tensor.double).index


def loss_of(inputs: Inputs, selection: Selection | None, **options: Any) -> op.IndexerLoss:
    """The loss on the kernels, its lse from attention on the kernels."""
    if isinstance(selection, Tensor):
        selection = Bitmask.from_positions(selection, inputs.cu_seqlens)
    bounds = {"cu_seqlens": inputs.cu_seqlens, "backend": "triton"}
    _, lse = op.sparse_attention_with_lse(**inputs.attention, selection=selection, **bounds)
    return op.indexer_loss(inputs.q, inputs.k, selection, **inputs.index, lse=lse, **bounds, **options)


def judged_loss(inputs: Inputs, selection: Tensor | None, **options: Any) -> op.IndexerLoss:
    """The loss in torch and fp64."""
    x = inputs.map(Tensor.double)
    return op.indexer_loss(x.q, x.k, selection, **x.index, cu_seqlens=inputs.cu_seqlens, **options)


def ratios(found: op.IndexerLoss, expected: op.IndexerLoss) -> Figures:
    return {name: rms_ratio(getattr(found, name), getattr(expected, name)) for name in expected._fields}


def loss(name: str, dtype: torch.dtype) -> Figures:
    """The loss and its gradients."""
    inputs, selection = loss_inputs(LOSSES[name], dtype)
    with tiles_of(LOSSES[name][-1]):
        return ratios(loss_of(inputs, selection), judged_loss(inputs, selection))


def zero_products(dtype: torch.dtype) -> Figures:
    """Small integers: a fifth of the products of index queries and keys are exactly 0, where relu has slope 0."""
    inputs = make_inputs([70], n_heads=2, n_kv_heads=1, d_head=16, d_value=16, d_index=2, is_grid=True)
    products = torch.einsum("btjd,bsd->btjs", inputs.q_index, inputs.k_index)
    assert (products == 0).double().mean() > 0.2
    with tiles_of(QUICK):
        return ratios(loss_of(inputs, None), judged_loss(inputs, None))


def own_tiles_loss(dtype: torch.dtype) -> Figures:
    """With the tiles a GPU gets."""
    inputs, selection = loss_inputs(([65, 1], (2, 1, 16), (2, 64), 7, QUICK), dtype)
    return ratios(loss_of(inputs, selection), judged_loss(inputs, selection))


def loss_in_several_workspaces(dtype: torch.dtype) -> Figures:
    """Gradients of keys add up over workspaces of 512 queries."""
    from loopline.kernels.dsa.launch import loss_sums

    shape: Loss = ([530, 70], (1, 1, 16), (1, 16), 33, QUICK)
    inputs, selection = loss_inputs(shape, dtype)
    bits = Bitmask.from_positions(selection, inputs.cu_seqlens)
    arguments = {"cu_seqlens": inputs.cu_seqlens, "scale": inputs.scale, "tiles": QUICK}
    _, lse = op.sparse_attention_with_lse(
        **inputs.attention, selection=bits, cu_seqlens=inputs.cu_seqlens, backend="triton"
    )
    sums = loss_sums(inputs.q, inputs.k, bits, lse=lse, **inputs.index, **arguments, workspace_bytes=0)
    return ratios(op.IndexerLoss(*sums), judged_loss(inputs, selection))  # one head: sums are means


def sampled_loss(dtype: torch.dtype) -> Figures:
    """A third of the tiles of queries: worst over offsets against torch, and the mean over offsets against the whole.

    More offsets than tiles in the last case: some samples are empty.
    """
    found: Figures = {}
    for lengths, selected, stride in (([1, 200, 70], 9, 3), ([140], None, 5)):
        inputs, selection = loss_inputs((lengths, (2, 1, 16), (3, 16), selected, QUICK), dtype)
        with tiles_of(QUICK):
            samples = [loss_of(inputs, selection, row_stride=stride, row_offset=i) for i in range(stride)]
        judged = [judged_loss(inputs, selection, row_stride=stride, row_offset=i) for i in range(stride)]
        whole = judged_loss(inputs, selection)
        mean = op.IndexerLoss(*(torch.stack(parts).mean(0) for parts in zip(*samples)))
        for part in (ratios(mean, whole), *(ratios(a, b) for a, b in zip(samples, judged))):
            found = {name: max(ratio, found.get(name, 0.0)) for name, ratio in part.items()}
    return found


def split_heads(dtype: torch.dtype) -> Figures:
    """Heads on two ranks, three and one key head of them: gradients are those of all heads, and the loss is the mean of
    the ranks' own."""
    inputs, selection = loss_inputs(([130, 1], (4, 4, 16), (3, 16), 9, QUICK), dtype)
    ranks = [replace(inputs, **{n: x[:, :, a:b] for n, x in inputs.attention.items()}) for a, b in ((0, 3), (3, 4))]
    sent: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        sent.append(x)
        return x

    with tiles_of(QUICK):
        loss_of(ranks[1], selection, sum_heads=keep)
        found = loss_of(ranks[0], selection, sum_heads=lambda x: x + sent.pop())
    own = [judged_loss(rank, selection).loss_sum for rank in ranks]
    whole = judged_loss(inputs, selection)
    assert not sent
    assert found.loss_sum > whole.loss_sum
    return ratios(found, whole._replace(loss_sum=(3 * own[0] + own[1]) / 4))


def conserved(dtype: torch.dtype) -> Figures:
    """The gradient of a query's scores sums to 0. With one key for all it is all that dweights has: its size over that
    of the gradient's parts, from keys that differ by their sign."""
    inputs, selection = loss_inputs(([200], (4, 2, 32), (1, 16), 40, QUICK), dtype)
    alike = replace(inputs, q_index=inputs.q_index.abs(), k_index=torch.ones_like(inputs.k_index))
    parts = replace(alike, k_index=alike.k_index * torch.randn(1, 200, 1).sign().to(dtype))
    with tiles_of(QUICK):
        total, part = loss_of(alike, selection).dweights, loss_of(parts, selection).dweights
    return {"dweights": rms_ratio(total, torch.zeros_like(total), part)}


def single_keys(dtype: torch.dtype) -> Figures:
    """Queries with one key in their set, whatever rounding does to lse: numbers that are not exactly 0."""
    inputs, selection = loss_inputs(([70, 1, 2], (2, 1, 16), (3, 16), 1, QUICK), dtype)
    bits = Bitmask.from_positions(selection, inputs.cu_seqlens)
    row = {"cu_seqlens": inputs.cu_seqlens, "backend": "triton"}
    with tiles_of(QUICK):
        _, lse = op.sparse_attention_with_lse(**inputs.attention, selection=bits, **row)
        found = op.indexer_loss(inputs.q, inputs.k, bits, **inputs.index, lse=lse + 1e-5, **row)
    return {name: float((x != 0).sum()) for name, x in found._asdict().items()}


def nan_is_seen(dtype: torch.dtype) -> Figures:
    """Inputs with a NaN that leave the loss finite."""
    inputs, _ = loss_inputs(([70], (2, 1, 16), (3, 16), None, QUICK), dtype)
    finite = 0
    with tiles_of(QUICK):
        for name in ("q", "k", "q_index", "k_index", "weights"):
            x = vars(inputs)[name].clone()
            x[0, 20] = torch.nan
            finite += int(loss_of(replace(inputs, **{name: x}), None).loss_sum.isfinite())
    return {"finite": float(finite)}


def repeated(dtype: torch.dtype) -> Figures:
    """Tensors that differ in any bit between two runs, or between two ways to choose."""
    inputs, _ = loss_inputs(([1, 70], (2, 1, 16), (3, 16), None, QUICK), dtype)
    runs = []
    for tiles in (QUICK, QUICK, DIGITS):
        with tiles_of(tiles):
            bits = op.select(**inputs.index, top_k=7, cu_seqlens=inputs.cu_seqlens, backend="triton")
            runs.append([bits.words, *loss_of(inputs, bits), *loss_of(inputs, None)])
    return {"different": float(sum(not torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run)))}


def strided(dtype: torch.dtype) -> Figures:
    """Inputs that are views: tensors that differ in any bit from those of their copies."""
    inputs, selection = loss_inputs(([70], (2, 2, 16), (3, 16), 9, QUICK), dtype)
    views = inputs.map(lambda x: torch.stack([x, x], dim=-1)[..., 1])
    runs = []
    with tiles_of(QUICK):
        for x in (inputs, views):
            bits = op.select(**x.index, top_k=9, cu_seqlens=x.cu_seqlens, backend="triton")
            runs.append([bits.words, *loss_of(x, selection)])
    return {"different": float(sum(not torch.equal(a, b) for a, b in zip(*runs)))}


def traced(dtype: torch.dtype) -> Figures:
    """torch's own checks of the ops; then, of a compiled function and an eager one, results that differ in any bit."""
    from loopline.kernels.dsa import launch
    from loopline.kernels.tables import on_host

    inputs, selection = loss_inputs(([40, 7], (2, 1, 16), (3, 16), 9, QUICK), dtype)
    index, bounds = list(inputs.index.values()), on_host(inputs.cu_seqlens)
    torch.library.opcheck(launch.sparse_index_select, (*index, bounds, 9, 0, QUICK.numbers()))
    words = Bitmask.from_positions(selection, inputs.cu_seqlens).words
    for given in (words, None):
        arguments = (inputs.q, inputs.k, torch.zeros(2, 47), given, *index, bounds, 0.25, 1, 0, 0, QUICK.numbers())
        torch.library.opcheck(launch.sparse_index_loss, arguments)

    def step(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        row = {"cu_seqlens": inputs.cu_seqlens, "backend": "triton"}
        bits = op.select(**inputs.index, top_k=9, **row)
        o, lse = op.sparse_attention_with_lse(q, k, v, bits, **row)
        learned = op.indexer_loss(q.detach(), k.detach(), bits, **inputs.index, lse=lse, **row)
        return [o.float().square().sum(), bits.words, *learned]

    runs = []
    with tiles_of(QUICK):
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = [x.clone().requires_grad_() for x in inputs.attention.values()]
            total, *rest = run(*leaves)
            runs.append([total, *rest, *torch.autograd.grad(total, leaves)])
    return {"different": float(sum(not torch.equal(a, b) for a, b in zip(*runs)))}


def attention(is_dense: bool, dtype: torch.dtype) -> Figures:
    """sparse_attention on flash attention with the bitmask."""
    inputs = make_inputs([97, 1, 40], n_heads=4, n_kv_heads=2, d_head=32, d_value=32)
    bounds = {"cu_seqlens": inputs.cu_seqlens}
    selection = None if is_dense else op.select(**inputs.index, top_k=11, **bounds)
    bits = None if selection is None else Bitmask.from_positions(selection, inputs.cu_seqlens)
    return figures(
        Case(
            inputs=inputs.attention,
            rounded=("q", "k", "v"),
            op=partial(op.sparse_attention, selection=bits, **bounds, backend="triton"),
            reference=partial(op.sparse_attention, selection=selection, **bounds),
        ),
        dtype,
    )


def attention_of_lists_and_of_bits(dtype: torch.dtype) -> Figures:
    """The reference takes either: tensors that differ in any bit."""
    inputs = make_inputs([40, 3])
    bounds = {"cu_seqlens": inputs.cu_seqlens}
    selection = op.select(**inputs.index, top_k=5, **bounds)
    given = (selection, Bitmask.from_positions(selection, inputs.cu_seqlens))
    a, b = (attention_results(op.sparse_attention, inputs, x, **bounds) for x in given)
    return {"different": float(sum(not torch.equal(a[name], b[name]) for name in a))}


def block(index_loss: str, n_rows: int, tile: int | None, dtype: torch.dtype) -> Figures:
    """A model's block of this mixer, forward and backward in two loops, against the same on the reference."""
    from tests.unit.models.model_cases import make_config, moved_model, tokens_of

    bounds = [0, 70, 71, 100]

    def run(backend: str) -> dict[str, Tensor]:
        changes = {"top_k": 8, "d_head": 16, "index_loss": index_loss, "index_loss_rows": n_rows, "backend": backend}
        dsa = SMALL["dsa"].model_copy(update=changes | {"selection_tile": tile})
        model = moved_model(make_config(pattern="dsa", n_blocks=1, n_loops=2, dsa=dsa), dtype)
        row = RowContext(Packing.of(bounds, "cpu"), 2, auxiliary_scale=0.25, is_measured=True)
        h = model.embed_tokens(tokens_of(1, bounds[-1]))
        for loop_idx in range(2):
            h = model.finish_loop(model.run_blocks(h, loop_idx, row), h, loop_idx)
        logits = model.read_out(h)
        (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
        recorded = {name: torch.tensor(row.sums(name)) for name in ("indexer_loss", "selection_overlap")}
        recorded["indexer_recall"] = torch.tensor(row.sums("indexer_recall"))
        gradients = {f"d{name}": p.grad for name, p in model.named_parameters()}
        assert any(".index_" in name for name in gradients)
        return {"logits": logits.detach(), **recorded, **gradients}

    with tiles_of(QUICK):
        found, expected = run("triton"), run("reference")
    errors = {name: rms_ratio(found[name], expected[name]) for name in expected}
    return {
        "logits": errors.pop("logits"),
        "recorded": max(errors.pop(name) for name in ("indexer_loss", "selection_overlap", "indexer_recall")),
        "gradients": max(errors.values()),
    }


LOSS = {"loss_sum", "dq_index", "dk_index", "dweights"}
ATTENTION = {"o", "dq", "dk", "dv"}
Run = Callable[[torch.dtype], Figures]
# Cases that report error ratios, and the tensors they compare: written out, so that one that goes missing is noticed.
COMPARED: dict[str, tuple[Run, set[str]]] = {
    **{f"loss_{name}": (partial(loss, name), LOSS) for name in LOSSES},
    "loss_zero_products": (zero_products, LOSS),
    "loss_own_tiles": (own_tiles_loss, LOSS),
    "loss_several_workspaces": (loss_in_several_workspaces, LOSS),
    "loss_sampled": (sampled_loss, LOSS),
    "loss_split_heads": (split_heads, LOSS),
    "loss_conserved": (conserved, {"dweights"}),
    "attention_sparse": (partial(attention, False), ATTENTION),
    "attention_dense": (partial(attention, True), ATTENTION),
}
# Cases that count what should not be.
EXACT: dict[str, Run] = {
    **{f"choice_{name}": partial(exact_choice, name) for name in CHOICES},
    "choice_own_tiles": own_tiles_choice,
    "choice_special_scores": partial(special_scores, QUICK),
    "choice_special_scores_by_digits": partial(special_scores, DIGITS),
    "loss_single_keys": single_keys,
    "loss_nan": nan_is_seen,
    "attention_of_lists_and_of_bits": attention_of_lists_and_of_bits,
    "repeated": repeated,
    "strided": strided,
    "traced": traced,
}
BLOCKS: dict[str, Run] = {
    "block_sparse": partial(block, "sparse", 1, None),
    "block_dense": partial(block, "dense", 1, None),
    "block_sampled": partial(block, "sparse", 2, None),
    "block_tiles": partial(block, "sparse", 1, 16),
}
CHOSEN: dict[str, Run] = {"choice_rounded": rounded_choice}
RUNS: dict[str, Run] = {**{name: run for name, (run, _) in COMPARED.items()}, **EXACT, **BLOCKS, **CHOSEN}
# In bf16 only the rounding is another, and each place that rounds is in one of these.
IN_BF16 = (
    *("loss_sparse", "loss_dense_packed", "loss_many_heads", "loss_own_tiles", "attention_sparse"),
    *("choice_packed", "choice_own_tiles", "choice_rounded", "repeated"),
)
CASES: list[Key] = [(name, dtype) for name in RUNS for dtype in DTYPES if dtype == "fp32" or name in IN_BF16]


if __name__ == "__main__":
    report({(name, dtype): RUNS[name] for name, dtype in CASES})
