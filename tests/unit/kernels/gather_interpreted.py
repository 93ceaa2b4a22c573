"""What the gather attention's Triton kernels differ by from their references, on a CPU.

Run as `python -m tests.unit.kernels.gather_interpreted` from the root with TRITON_INTERPRET=1: one line of JSON a case.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loopline.kernels.attention.reference import dense_attention
from loopline.kernels.dsa.gather_reference import gather_attention as reference
from loopline.kernels.dsa.tile_op import SCORERS, tile_lists
from loopline.kernels.dsa.tiles import IndexTiles, Tile, index_tiles
from tests.tolerances import rms_ratio
from tests.unit.kernels.dsa_cases import make_inputs, poisoned_integers, special_index
from tests.unit.kernels.interpreted import Case, Figures, figures, report


@dataclass(frozen=True)
class Shape:
    """A row of documents, its tiles, and how many keys a tile lists."""

    lengths: tuple[int, ...]
    tile: int
    top_k: int
    n_heads: int = 4
    n_kv_heads: int = 1
    d_head: int = 16
    d_value: int = 16

    @property
    def cu_seqlens(self) -> list[int]:
        return [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]

    def lists(self) -> Tensor:
        """By random scores."""
        n_tokens = sum(self.lengths)
        index = torch.randn(1, n_tokens, 2, 4), torch.randn(1, n_tokens, 4), torch.rand(1, n_tokens, 2)
        return tile_lists(*index, top_k=self.top_k, tile=self.tile, cu_seqlens=self.cu_seqlens, scored_by="past")

    def qkv(self) -> dict[str, Tensor]:
        n_tokens = sum(self.lengths)
        return {
            "q": torch.randn(1, n_tokens, self.n_heads, self.d_head),
            "k": torch.randn(1, n_tokens, self.n_kv_heads, self.d_head),
            "v": torch.randn(1, n_tokens, self.n_kv_heads, self.d_value),
        }


SHAPES = {
    "one_token": Shape((1,), tile=16, top_k=4),
    # Documents of a token, shorter than a tile, and a token longer than four; first tiles list nothing.
    "documents": Shape((1, 63, 1, 65, 2, 7), tile=16, top_k=20, n_kv_heads=2, d_head=24, d_value=12),
    "three_heads_a_group": Shape((257,), tile=16, top_k=70, n_heads=3, d_head=96, d_value=64),
    "a_head_a_group": Shape((63,), tile=16, top_k=17, n_heads=2, n_kv_heads=2),
    # 128 rows, the most; a second block of list entries, not full.
    "wide_tile": Shape((63, 145), tile=32, top_k=100, d_head=64, d_value=64),
    "tile_no_power_of_two": Shape((50,), tile=12, top_k=9, d_value=40),
}


def op(**arguments: Any) -> tuple[Tensor, Tensor]:
    from loopline.kernels.dsa.gather_launch import gather_attention

    return gather_attention(**arguments)


def case_of(shape: Shape, lists: Tensor) -> Case:
    options = {"cu_seqlens": shape.cu_seqlens, "tile": shape.tile}
    return Case(shape.qkv(), ("q", "k", "v"), op, reference, constants={"lists": lists}, options=options)


def named(found: Figures) -> Figures:
    """The harness calls a second output `final_state`."""
    return {"lse" if name == "final_state" else name: figure for name, figure in found.items()}


def by_scores(name: str, dtype: torch.dtype) -> Figures:
    return named(figures(case_of(SHAPES[name], SHAPES[name].lists()), dtype))


def no_lists(dtype: torch.dtype) -> Figures:
    shape = SHAPES["documents"]
    return named(figures(case_of(shape, torch.full_like(shape.lists(), -1)), dtype))


def hub(dtype: torch.dtype) -> Figures:
    """A key that every tile lists, more tiles than are added up at a time; holes; positions no tile may list."""
    shape = Shape((100, 20), tile=4, top_k=8)
    lists = torch.full((30, 8), -1, dtype=torch.int32)
    lists[:25, 1], lists[25:, 1] = 0, 100
    lists[3, 3:6] = torch.tensor([5, -1, 11], dtype=torch.int32)
    lists[4, 3:6] = torch.tensor([16, 17, 119], dtype=torch.int32)  # its own tokens, and another document's
    lists[28, 3:6] = torch.tensor([5, 101, 5000], dtype=torch.int32)  # another document's, and none of the row
    case = case_of(shape, lists)
    allowed = lists.masked_fill((lists == 5000), -1)
    case.reference = lambda **arguments: reference(**{**arguments, "lists": allowed})
    return named(figures(case, dtype))


def all_listed(dtype: torch.dtype) -> Figures:
    """Lists of everything before the tile are causal attention."""
    shape = Shape((70, 1, 58), tile=16, top_k=10_000, n_kv_heads=2)
    case = case_of(shape, shape.lists())
    case.op = lambda **arguments: op(**arguments)[0]
    case.reference = lambda q, k, v, *, lists, cu_seqlens, tile: dense_attention(q, k, v, cu_seqlens)
    return figures(case, dtype)


def results(dtype: torch.dtype, run: Callable[..., Any] = op, **more: int) -> dict[str, Tensor]:
    """Outputs and gradients in one shape with two key heads; the same inputs at every call."""
    torch.manual_seed(3)
    shape = replace(SHAPES["documents"], lengths=(1, 45, 18))
    lists = shape.lists()
    inputs = {name: x.to(dtype).requires_grad_() for name, x in shape.qkv().items()}
    o, lse = run(**inputs, lists=lists, cu_seqlens=shape.cu_seqlens, tile=shape.tile, **more)
    loss = (o.float().square()).sum() + (lse * torch.arange(lse.numel()).view(lse.shape)).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"o": o, "lse": lse, **{f"d{name}": x for name, x in zip(inputs, gradients)}}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Figures:
    """0 where they agree to the bit, else 1."""
    return {name: float(not torch.equal(found[name], x)) for name, x in expected.items()}


def repeated(dtype: torch.dtype) -> Figures:
    return difference(results(dtype), results(dtype))


def unit_bytes(dtype: torch.dtype) -> int:
    """Workspace of a tile and a key head in the shape of `results`."""
    shape = SHAPES["documents"]
    return shape.top_k * (shape.d_head + shape.d_value) * dtype.itemsize


def heads_in_turn(dtype: torch.dtype) -> Figures:
    return difference(results(dtype, workspace_bytes=6 * unit_bytes(dtype)), results(dtype))  # 6 tiles of the row


def tiles_in_turn(dtype: torch.dtype) -> Figures:
    found, expected = results(dtype, workspace_bytes=unit_bytes(dtype)), results(dtype)
    return {name: rms_ratio(found[name], x) for name, x in expected.items()}


def unlisted_keys(dtype: torch.dtype) -> Figures:
    """dk and dv of keys no tile lists, of a loss on the queries of other tiles: sums that must be exactly 0."""
    shape = Shape((48,), tile=16, top_k=4)
    lists = torch.tensor([[-1, -1], [2, 9], [9, 30]], dtype=torch.int32)
    inputs = {name: x.to(dtype).requires_grad_() for name, x in shape.qkv().items()}
    o, _ = op(**inputs, lists=lists, cu_seqlens=shape.cu_seqlens, tile=16)
    dk, dv = torch.autograd.grad(o[:, 32:].float().sum(), [inputs["k"], inputs["v"]])
    listed = torch.tensor([9, 30])
    is_unlisted = torch.ones(32, dtype=torch.bool).index_fill(0, listed, False)
    return {
        "dk_unlisted": float(dk[0, :32][is_unlisted].abs().sum()),
        "dv_unlisted": float(dv[0, :32][is_unlisted].abs().sum()),
        "is_dv_of_a_listed_key_zero": float((dv[0, listed].abs().sum((1, 2)) == 0).any()),
    }


def registered(dtype: torch.dtype) -> Figures:
    """opcheck of both custom ops: schema, fake tensors, autograd registration, AOT autograd."""
    from loopline.kernels.dsa.gather_launch import _backward, _forward
    from loopline.kernels.tables import on_host

    shape = Shape((21,), tile=8, top_k=4, n_heads=2)
    q, k, v = (x.to(dtype) for x in shape.qkv().values())
    rest = (shape.lists(), on_host(shape.cu_seqlens), 8, 0.25, 2**20)
    o, lse = _forward(q, k, v, *rest)
    leaves = (x.clone().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(_forward, (*leaves, *rest))
    torch.library.opcheck(_backward, (torch.ones_like(o), torch.ones_like(lse), q, k, v, o, lse, *rest))
    return {"opcheck": 0.0}


def compiled(dtype: torch.dtype) -> Figures:
    """In one graph, forward and backward."""
    run = torch.compile(op, fullgraph=True, backend="aot_eager")
    return difference(results(dtype, run), results(dtype))


SCORES = Tile(64, 256, 4, 1)
QUICK = IndexTiles(SCORES, *[SCORES] * 5)
# Documents; tokens of a tile; keys to list; index heads.
LISTS: dict[str, tuple[list[int], int, int, int]] = {
    "one_token": ([1], 16, 4, 3),
    "one_token_documents": ([1, 1, 1], 4, 2, 3),
    "documents": ([1, 63, 1, 130, 2], 16, 20, 3),
    "tile_no_power_of_two": ([130, 7], 12, 9, 1),
    "tile_of_five": ([97], 5, 17, 3),
    "tile_of_one": ([20, 3], 1, 5, 3),
    "tile_above_a_piece": ([257, 30], 100, 33, 3),
    "one_key": ([63], 8, 1, 3),
    "all_of_the_past": ([70, 1], 16, 1000, 3),
    "several_workspaces": ([530, 70], 16, 33, 1),
}


def listed(name: str, scored_by: str, dtype: torch.dtype) -> Figures:
    """Scores that are small integers, exact in any form and often equal: slots that differ from torch's lists."""
    from loopline.kernels.dsa.tile_launch import tile_lists_by_kernels

    lengths, tile, top_k, n_heads = LISTS[name]
    inputs = make_inputs(lengths, n_index_heads=n_heads, d_index=16, is_grid=True)
    index = {name: x if name == "weights" else x.to(dtype) for name, x in inputs.index.items()}
    row = {"top_k": top_k, "tile": tile, "cu_seqlens": inputs.cu_seqlens}
    with poisoned_integers():
        found = tile_lists_by_kernels(**index, **row, is_past=scored_by == "past", workspace_bytes=0, tiles=QUICK)
    return different(found, tile_lists(**index, **row, scored_by=scored_by))


def different(found: Tensor, expected: Tensor) -> Figures:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return {"different": float((found != expected).sum())}


def lists_of_own_tiles(dtype: torch.dtype) -> Figures:
    """Through the public function, with the tiles a GPU gets; inputs that are views."""
    inputs = make_inputs([70, 7], d_index=16, is_grid=True)
    index = {name: torch.stack([x.to(dtype)] * 2, dim=-1)[..., 1] for name, x in inputs.index.items()}
    row = {"top_k": 9, "tile": 16, "cu_seqlens": inputs.cu_seqlens, "scored_by": "past"}
    return different(tile_lists(**index, **row, backend="triton"), tile_lists(**index, **row))


def lists_of_special_scores(dtype: torch.dtype) -> Figures:
    """Both zeros, infinities, NaN, the smallest and largest numbers, in fp32."""
    from loopline.kernels.dsa.tile_launch import tile_lists_by_kernels

    index, n_tokens = special_index()
    total = 0.0
    for top_k, bounds in itertools.product((1, 13, 40), ([0, n_tokens], [0, 30, n_tokens])):
        row = {"top_k": top_k, "tile": 8, "cu_seqlens": bounds}
        found = tile_lists_by_kernels(**index, **row, is_past=True, tiles=QUICK)
        total += different(found, tile_lists(**index, **row, scored_by="past"))["different"]
    return {"different": total}


def lists_repeated(dtype: torch.dtype) -> Figures:
    """Real scores, twice, the second time in a graph; and torch's own checks of the op."""
    from loopline.kernels.dsa.tile_launch import sparse_tile_lists
    from loopline.kernels.tables import on_host

    inputs = make_inputs([50, 3], d_index=16)
    index = [x if name == "weights" else x.to(dtype) for name, x in inputs.index.items()]
    numbers = index_tiles(16, dtype.itemsize, 50).numbers()
    torch.library.opcheck(sparse_tile_lists, (*index, on_host(inputs.cu_seqlens), 9, 16, True, 0, numbers))
    row = {"top_k": 9, "tile": 16, "cu_seqlens": inputs.cu_seqlens, "scored_by": "past", "backend": "triton"}
    run = partial(tile_lists, **row)
    return different(torch.compile(run, fullgraph=True, backend="aot_eager")(*index), run(*index))


OUTPUTS = {"o", "dq", "dk", "dv"}
# How a case is made, and the figures it must have: written out, so that one that goes missing is noticed.
COMPARED: dict[str, tuple[Callable[[torch.dtype], Figures], set[str]]] = {
    **{name: (partial(by_scores, name), OUTPUTS | {"lse"}) for name in SHAPES},
    "no_lists": (no_lists, OUTPUTS | {"lse"}),
    "hub": (hub, OUTPUTS | {"lse"}),
    "all_listed": (all_listed, OUTPUTS),
    "tiles_in_turn": (tiles_in_turn, OUTPUTS | {"lse"}),
}
EXACT: dict[str, tuple[Callable[[torch.dtype], Figures], set[str]]] = {
    "repeated": (repeated, OUTPUTS | {"lse"}),
    "heads_in_turn": (heads_in_turn, OUTPUTS | {"lse"}),
    "unlisted_keys": (unlisted_keys, {"dk_unlisted", "dv_unlisted", "is_dv_of_a_listed_key_zero"}),
    "registered": (registered, {"opcheck"}),
    "compiled": (compiled, OUTPUTS | {"lse"}),
    **{
        f"lists_{name}_{scored_by}": (partial(listed, name, scored_by), {"different"})
        for name in LISTS
        for scored_by in SCORERS
    },
    "lists_own_tiles": (lists_of_own_tiles, {"different"}),
    "lists_special_scores": (lists_of_special_scores, {"different"}),
    "lists_repeated": (lists_repeated, {"different"}),
}

if __name__ == "__main__":
    report(
        {
            (name, dtype): run
            for cases, dtypes in ((COMPARED, ("fp32", "bf16")), (EXACT, ("bf16",)))
            for name, (run, _) in cases.items()
            for dtype in dtypes
        }
    )
