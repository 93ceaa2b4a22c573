"""What our Triton attention, run by the interpreter, differs by from the dense form, on a CPU.

Run as `python -m tests.unit.kernels.attention_interpreted` from the root with TRITON_INTERPRET=1: one line of JSON a
case. Small tiles bring tiles that are whole, cut by an edge, and skipped, into rows of a few hundred tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from loopline.kernels.attention.reference import masked_attention, selected_keys, visible_keys
from loopline.kernels.attention.tiles import Tile, Tiles, tiles_for
from tests.tolerances import rms_ratio
from tests.unit.kernels.interpreted import DTYPES, Case, Figures, Key, figures, report

SMALL = Tiles(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), Tile(32, 64, 4, 1))
EVEN = Tiles(*[Tile(32, 32, 4, 1)] * 3)
MIDDLE = Tiles(*[Tile(64, 64, 4, 1)] * 3)
WIDE = Tiles(Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1))
BF16_TILES = tiles_for(64, 64, 2)
PACKED = [0, 1, 98, 99, 161]  # one token, more than a tile, one token, part of a tile


@dataclass(frozen=True)
class Shape:
    """A call of flash_attention. `heads` are (H, G, D, V); `bits` makes the bitmask; None is no bitmask."""

    bounds: list[int]
    heads: tuple[int, int, int, int] = (2, 1, 16, 16)
    window: int | None = None
    bits: Callable[[list[int]], Tensor] | None = None
    tiles: Tiles | None = SMALL  # None: those of the op

    def make(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
        """q, k and v, and the bitmask: the same at every call."""
        torch.manual_seed(11)
        n_heads, n_kv_heads, d_head, d_value = self.heads
        sizes = ((n_heads, d_head), (n_kv_heads, d_head), (n_kv_heads, d_value))
        inputs = [torch.randn(1, self.bounds[-1], *size).to(dtype) for size in sizes]
        return inputs, None if self.bits is None else self.bits(self.bounds)

    def visible(self, bitmask: Tensor | None) -> Tensor:
        """[T, T], bool."""
        seen = visible_keys(self.bounds, self.window, torch.device("cpu"))
        return seen if bitmask is None else seen & selected_keys(bitmask, self.bounds)


def words(bounds: list[int]) -> tuple[int, int]:
    """[T, W], the shape of a bitmask."""
    return bounds[-1], -(-max(end - start for start, end in pairwise(bounds)) // 32)


def random_bits(bounds: list[int], n_rounds: int = 1) -> Tensor:
    """Each bit set with probability 2 ** -n_rounds; bits of the future and beyond documents too."""
    bits = torch.full(words(bounds), -1, dtype=torch.int32)
    for _ in range(n_rounds):
        bits &= torch.randint(-(2**31), 2**31, bits.shape).int()
    return bits


def all_bits(bounds: list[int]) -> Tensor:
    return torch.full(words(bounds), -1, dtype=torch.int32)


def no_bits(bounds: list[int]) -> Tensor:
    return torch.zeros(words(bounds), dtype=torch.int32)


def clustered_bits(bounds: list[int]) -> Tensor:
    """Queries 32 to 95 of each document select nothing, the others words 0 and 3: empty rows, empty tiles both ways."""
    bits = random_bits(bounds)
    bits[:, 1:3] = 0
    bits[:, 4:] = 0
    for start, end in pairwise(bounds):
        bits[min(start + 32, end) : min(start + 96, end)] = 0
    return bits


def sparse_bits(bounds: list[int]) -> Tensor:
    """Some queries select a key or two, many none."""
    return random_bits(bounds, n_rounds=6)


SHAPES: dict[str, Shape] = {
    "one_token": Shape([0, 1], heads=(4, 1, 16, 16), tiles=None),
    "own_tiles": Shape([0, 63], heads=(4, 2, 96, 64), tiles=None),
    "many_tiles": Shape([0, 257]),
    "many_tiles_wide": Shape([0, 257], tiles=WIDE),
    "packed": Shape(PACKED, heads=(4, 2, 96, 64)),
    "one_token_documents": Shape([0, 1, 2, 3], heads=(4, 1, 16, 32)),
    "split_heads": Shape([0, 70], heads=(2, 2, 192, 96), tiles=WIDE),
    "padded_heads": Shape([0, 70], heads=(2, 1, 112, 208), tiles=WIDE),
    "largest_heads": Shape([0, 40], heads=(1, 1, 256, 256), tiles=None),
    "window_1": Shape(PACKED, window=1),
    "window_17": Shape(PACKED, heads=(4, 2, 96, 64), window=17, tiles=MIDDLE),
    "window_17_many_tiles": Shape([0, 257], window=17, tiles=WIDE),
    "window_130_many_tiles": Shape([0, 257], window=130),
    "window_130_many_tiles_wide": Shape([0, 257], window=130, tiles=WIDE),
    "window_own_tiles": Shape([0, 3, 257], heads=(2, 1, 64, 64), window=100, tiles=BF16_TILES),
    "window_beyond_documents": Shape(PACKED, window=1000),
    "bitmask_random": Shape(PACKED, heads=(4, 2, 96, 64), bits=random_bits, tiles=MIDDLE),
    "bitmask_many_tiles": Shape([0, 257], bits=random_bits, tiles=WIDE),
    "bitmask_own_tiles": Shape([0, 257], heads=(2, 1, 64, 64), bits=random_bits, tiles=BF16_TILES),
    "bitmask_all": Shape(PACKED, bits=all_bits),
    "bitmask_empty_tiles_and_rows": Shape([0, 257, 290], heads=(4, 1, 16, 16), bits=clustered_bits),
    "bitmask_sparse": Shape([0, 100, 257], bits=sparse_bits, tiles=WIDE),
    "bitmask_in_a_window": Shape([0, 257, 290], window=70, bits=random_bits),
    "bitmask_longer_than_a_block": Shape([0, 300, 900], heads=(1, 1, 16, 16), bits=sparse_bits, tiles=BF16_TILES),
}


def results(op: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], **options: object) -> dict[str, Tensor]:
    """o, lse, and the gradient of a fixed random projection of o with respect to q, k and v."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, lse = op(*leaves, **options)
    assert not lse.requires_grad
    # Weights exact in bf16: the gradient handed to a bf16 output is not rounded.
    upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(o.dtype)
    return {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, upstream)))}


def errors(shape: Shape, dtype: torch.dtype, change: Callable[[Tensor], None] = lambda k: None) -> Figures:
    """RMS error ratios of o, lse and the gradients, against the dense form of the same rounded inputs in fp64.

    Args:
        change: alters the keys in place.
    """
    from loopline.kernels.attention.launch import flash_attention

    inputs, bitmask = shape.make(dtype)
    change(inputs[1])
    options = {"cu_seqlens": shape.bounds, "window": shape.window, "bitmask": bitmask, "tiles": shape.tiles}
    found = results(flash_attention, inputs, **options)
    visible = shape.visible(bitmask)
    exact = [x.double() for x in inputs]
    expected = results(masked_attention, exact, visible=visible, scale=shape.heads[2] ** -0.5)
    sees = expected["lse"] > -torch.inf
    if not torch.equal(found["lse"] > -torch.inf, sees) or not bool((found["lse"][~sees] == -torch.inf).all()):
        return {**dict.fromkeys(found, torch.inf)}
    for x in (found, expected):
        x["lse"] = x["lse"][sees]
    scales = dict(expected)
    if int(visible.sum(-1).max()) == 1:  # a softmax over one key is 1 whatever q and k are: their true gradient is 0
        scales |= {"dq": expected["dv"], "dk": expected["dv"]}
    return {name: rms_ratio(found[name], expected[name], scales[name]) for name in expected}


def nothing_selected(dtype: torch.dtype) -> Figures:
    """Numbers that are not 0 in o and the gradients, and not -inf in lse."""
    from loopline.kernels.attention.launch import flash_attention

    shape = Shape(PACKED, bits=no_bits)
    inputs, bitmask = shape.make(dtype)
    found = results(flash_attention, inputs, cu_seqlens=PACKED, bitmask=bitmask, tiles=SMALL)
    found["lse"] = torch.where(found["lse"] == -torch.inf, 0, 1)
    return {name: float((x != 0).sum()) for name, x in found.items()}


def huge_unseen_keys(dtype: torch.dtype) -> Figures:
    """Keys that no query selects, with scores far beyond the range of exp."""
    shape = Shape([0, 161], bits=clustered_bits)
    return errors(shape, dtype, lambda k: k[:, 32:96].mul_(1e6))


def skipped(dtype: torch.dtype) -> Figures:
    """Numbers that are not finite, where what a program has no business with is NaN: a masked product would show it."""
    from loopline.kernels.attention.launch import flash_attention

    shape = Shape([0, 161], bits=clustered_bits, tiles=EVEN)
    inputs, bitmask = shape.make(dtype)
    for x in inputs:
        x[:, 32:96] = torch.nan  # keys nobody selects, and queries that select nothing
    of_bits = results(flash_attention, inputs, cu_seqlens=shape.bounds, bitmask=bitmask, tiles=EVEN)
    found = {f"bitmask_{name}": of_bits[name].float() for name in ("o", "dq", "dk", "dv")}

    shape = Shape([0, 257])
    options = {"cu_seqlens": shape.bounds, "window": 17, "tiles": EVEN}
    q, k, v = shape.make(dtype)[0]
    for x in (k, v):
        x[:, :192] = torch.nan  # queries from 224 on see keys from 208 on
    of_queries = results(flash_attention, [q, k, v], **options)
    found |= {f"window_{name}": of_queries[name][:, 224:].float() for name in ("o", "dq")}
    q, k, v = shape.make(dtype)[0]
    q[:, 96:] = torch.nan  # keys before 64 are seen by queries before 80
    of_keys = results(flash_attention, [q, k, v], **options)
    found |= {f"window_{name}": of_keys[name][:, :64].float() for name in ("dk", "dv")}
    return {name: float((~x.isfinite()).sum()) for name, x in found.items()}


def tile_lists(dtype: torch.dtype) -> Figures:
    """Pieces of rows listed with other tiles than those in which the dense mask has an entry."""
    from loopline.kernels.attention import launch
    from loopline.kernels.tables import on_host, pieces_on

    bounds, tile = [0, 1, 300, 557], Tile(64, 32, 4, 1)
    pieces = pieces_on(tuple(bounds), tile.rows, torch.device("cpu"))
    found = {}
    for window, is_query in ((0, True), (0, False), (40, True), (40, False)):
        shape = Shape(bounds, window=window or None, bits=clustered_bits)
        bitmask = shape.make(dtype)[1]
        visible = shape.visible(bitmask)
        row = launch._Row(torch.empty(1, 557), bitmask, on_host(bounds), window or None)
        lists = row.tile_lists(bitmask if is_query else row.transposed(bitmask), pieces, tile, is_query=is_query)
        different = 0
        for (document, piece), listed, count in zip(pieces.tolist(), lists["p_list"], lists["p_count"]):
            start, end = bounds[document : document + 2]
            of_document = (visible if is_query else visible.T)[start:end, start:end]
            columns = of_document[piece * tile.rows : (piece + 1) * tile.rows].any(0)
            expected = [i for i, part in enumerate(columns.split(tile.columns)) if part.any()]
            different += listed[:count].tolist() != expected
        found[f"{'queries' if is_query else 'keys'}, window {window}"] = float(different)
    return found


def repeated(dtype: torch.dtype) -> Figures:
    """Tensors that differ in any bit between two runs."""
    from loopline.kernels.attention.launch import flash_attention

    different = 0
    for shape in (Shape(PACKED, window=17), Shape([0, 100, 161], heads=(2, 1, 96, 64), bits=random_bits)):
        inputs, bitmask = shape.make(dtype)
        options = {"cu_seqlens": shape.bounds, "window": shape.window, "bitmask": bitmask, "tiles": shape.tiles}
        first, second = (results(flash_attention, inputs, **options) for _ in range(2))
        different += sum(not torch.equal(first[name], second[name]) for name in first)
    return {"different": float(different)}


def strided(dtype: torch.dtype) -> Figures:
    """Views into one projection give what their copies give: results that differ in any bit."""
    from loopline.kernels.attention.launch import flash_attention

    torch.manual_seed(11)
    projection = torch.randn(1, 65, 4 * 16 + 2 * 16 + 2 * 16).to(dtype)
    q, k, v = (x.unflatten(2, (-1, 16)) for x in projection.split([64, 32, 32], dim=2))
    turned = projection[..., :64].unflatten(2, (16, 4)).transpose(2, 3)  # its last dim is not contiguous
    different = 0
    for inputs in ([q, k, v], [turned, k, v]):
        runs = []
        for given in (inputs, [x.contiguous() for x in inputs]):
            leaves = [x.detach().requires_grad_() for x in given]
            o, _ = flash_attention(*leaves, cu_seqlens=[0, 65], tiles=SMALL)
            runs.append([o, *torch.autograd.grad(o.float().square().sum(), leaves)])
        different += sum(not torch.equal(a, b) for a, b in zip(*runs))
    return {"different": float(different)}


def traced(dtype: torch.dtype) -> Figures:
    """torch's own checks of the op; then, of a compiled function and an eager one, results that differ in any bit."""
    from loopline.kernels.attention import launch
    from loopline.kernels.tables import on_host

    bounds = [0, 40, 47]
    for window, bits in ((None, None), (9, random_bits)):
        inputs, bitmask = Shape(bounds, bits=bits).make(dtype)
        leaves = [x.requires_grad_() for x in inputs]
        options = {"window": window, "scale": 0.25, "tiles": SMALL.numbers()}
        torch.library.opcheck(launch.attention_fwd, (*leaves, bitmask, on_host(bounds)), options)

    shape = Shape(PACKED, window=17, bits=random_bits)
    inputs, bitmask = shape.make(dtype)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = launch.flash_attention(q, k, v, cu_seqlens=PACKED, window=17, bitmask=bitmask, tiles=SMALL)
        return o.float().square().sum() + torch.where(lse > -torch.inf, lse, 0).sum()

    runs = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = run(*leaves)
        runs.append([value, *torch.autograd.grad(value, leaves)])
    return {"different": float(sum(not torch.equal(a, b) for a, b in zip(*runs)))}


def through_the_op(dtype: torch.dtype) -> Figures:
    """packed_attention with backend "triton"."""
    from loopline.kernels.attention.op import packed_attention
    from loopline.kernels.attention.reference import dense_attention

    inputs = Shape(PACKED, heads=(4, 2, 32, 32)).make(torch.float32)[0]
    options = {"cu_seqlens": PACKED, "window": 17}
    return figures(
        Case(
            inputs=dict(zip("qkv", inputs)),
            rounded=("q", "k", "v"),
            op=partial(packed_attention, **options, backend="triton"),
            reference=partial(dense_attention, **options),
        ),
        dtype,
    )


GRADIENTS = {"o", "dq", "dk", "dv"}
# Cases that report error ratios, and the tensors they compare: written out, so that one that goes missing is noticed.
COMPARED: dict[str, tuple[Callable[[torch.dtype], Figures], set[str]]] = {
    **{name: (partial(errors, shape), GRADIENTS | {"lse"}) for name, shape in SHAPES.items()},
    "huge_unseen_keys": (huge_unseen_keys, GRADIENTS | {"lse"}),
    "through_the_op": (through_the_op, GRADIENTS),
}
# Cases that count what should not be.
EXACT: dict[str, Callable[[torch.dtype], Figures]] = {
    "nothing_selected": nothing_selected,
    "skipped": skipped,
    "tile_lists": tile_lists,
    "repeated": repeated,
    "strided": strided,
    "traced": traced,
}
# In bf16 only the rounding is another, and each place that rounds is in one of these.
IN_BF16 = ("own_tiles", "split_heads", "window_17", "bitmask_random", "strided", "traced", "through_the_op")
CASES: list[Key] = [
    (name, dtype) for name in (*COMPARED, *EXACT) for dtype in DTYPES if dtype == "fp32" or name in IN_BF16
]


def run(name: str) -> Callable[[torch.dtype], Figures]:
    """A case by name."""
    return COMPARED[name][0] if name in COMPARED else EXACT[name]


if __name__ == "__main__":
    report({(name, dtype): run(name) for name, dtype in CASES})
