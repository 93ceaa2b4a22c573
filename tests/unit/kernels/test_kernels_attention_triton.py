"""Our Triton attention, interpreted, agrees with the dense form, gradients included; bad calls are refused."""

import pytest
import torch
from attention_interpreted import CASES, COMPARED, EXACT
from interpreted import Figures, Key, process
from torch import Tensor

from loopline.kernels.attention.reference import masked_attention, selected_keys, visible_keys
from loopline.kernels.attention.tiles import Tile, Tiles, split_head, tiles_for
from tests.tolerances import TOLERANCES

KINDS = {"fp32": "op", "bf16": "interpreted_kernel"}


@pytest.fixture(scope="module")
def reported() -> tuple[dict[Key, Figures], str]:
    """One process computes every case."""
    return process("attention_interpreted")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [key for key in CASES if key[0] in COMPARED])
def test_kernels_agree_with_the_dense_form(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> None:
    found, ending = reported
    assert (case, dtype) in found, ending
    figures = found[case, dtype]
    assert figures.keys() == COMPARED[case][1]
    assert all(ratio <= TOLERANCES[dtype, KINDS[dtype]] for ratio in figures.values()), figures


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), [key for key in CASES if key[0] in EXACT])
def test_nothing_is_counted_that_should_not_be(case: str, dtype: str, reported: tuple[dict[Key, Figures], str]) -> None:
    found, ending = reported
    assert (case, dtype) in found, ending
    assert found[case, dtype]
    assert not any(found[case, dtype].values()), found[case, dtype]


# The dense forms that judge.


def test_a_bit_stands_for_a_key_of_its_querys_document() -> None:
    bounds = [0, 2, 36]
    bitmask = torch.zeros(36, 2, dtype=torch.int32)
    bitmask[1, 0] = 0b11
    bitmask[35, 0] = -(2**31)  # bit 31: key 31 of the document, token 33
    bitmask[35, 1] = 0b10  # key 33, token 35
    bitmask[3, 0] = 0b1000  # key 3 of the document, after the query
    selected = selected_keys(bitmask, bounds)
    assert selected.nonzero().tolist() == [[1, 0], [1, 1], [3, 5], [35, 33], [35, 35]]
    assert not bool((selected & visible_keys(bounds, None, bitmask.device))[3].any())


def test_a_query_that_sees_nothing_is_zero_in_the_dense_form_too() -> None:
    q, k, v = (torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(3))
    visible = torch.tensor([[True, False, False], [False, False, False], [True, False, True]])
    o, lse = masked_attention(q, k, v, visible, scale=0.5)
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert bool((o[0, 1] == 0).all())
    assert bool((gradients[0][0, 1] == 0).all())
    assert all(bool(x.isfinite().all()) for x in gradients)
    assert lse[0, 1] == -torch.inf
    torch.testing.assert_close(lse[0, 0], 0.5 * (q[0, 0, 0] @ k[0, 0, 0]))


# Tiles.


@pytest.mark.parametrize("size", range(16, 257, 16))
def test_a_head_is_covered_by_powers_of_two_with_no_more_padding_than_one_tile(size: int) -> None:
    first, rest = split_head(size)
    assert first + rest >= size
    assert all(part & (part - 1) == 0 and (part == 0 or part >= 16) for part in (first, rest))
    assert first + rest <= max(16, 1 << (size - 1).bit_length())


def test_heads_of_96_and_192_are_not_padded() -> None:
    assert split_head(96) == (64, 32)
    assert split_head(192) == (128, 64)
    assert split_head(128) == (128, 0)
    assert split_head(112) == (128, 0)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize(("d_head", "d_value"), [(16, 16), (64, 128), (96, 64), (192, 128), (256, 256)])
def test_every_head_size_has_tiles_that_a_bitmask_can_use(d_head: int, d_value: int, element_bytes: int) -> None:
    tiles = tiles_for(d_head, d_value, element_bytes, has_bits=True)
    assert all(tile.columns % 32 == 0 for tile in (tiles.fwd, tiles.dq, tiles.dkv))
    assert Tiles.of_numbers(tiles.numbers()) == tiles


# What is refused, before any launch.


def _call(**changes: object) -> None:
    from loopline.kernels.attention.launch import flash_attention

    q, k, v = torch.zeros(1, 5, 4, 16), torch.zeros(1, 5, 2, 16), torch.zeros(1, 5, 2, 32)
    flash_attention(**{"q": q, "k": k, "v": v, "cu_seqlens": [0, 5], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(1, 5, 2, 32)}, r"q \(1, 5, 4, 16\), k \(1, 5, 2, 32\)"),
        ({"v": torch.zeros(1, 5, 4, 32)}, r"k \(1, 5, 2, 16\), v \(1, 5, 4, 32\)"),
        ({"q": torch.zeros(1, 4, 4, 16), "cu_seqlens": [0, 4]}, "of as many tokens"),
        ({"q": torch.zeros(5, 4, 16)}, r"want q \[1, T, H, D\]"),
        ({"q": torch.zeros(1, 5, 3, 16)}, "2 key/value heads must divide 3 query heads"),
        ({"v": torch.zeros(1, 5, 2, 24)}, "multiples of 16 from 16 to 256"),
        ({"v": torch.zeros(1, 5, 2, 272)}, "multiples of 16 from 16 to 256"),
        ({"v": torch.zeros(1, 5, 2, 32).half()}, r"q torch.float32, k torch.float32 and v torch.float16"),
        ({"v": torch.zeros(1, 5, 2, 32, device="meta")}, "v on meta must be on one device"),
        ({"cu_seqlens": [0, 4]}, r"must rise from 0 to T = 5"),
        ({"window": 0}, "window 0 must be at least 1"),
        ({"scale": 0.0}, "scale 0.0 must be above 0"),
        ({"scale": float("nan")}, "scale nan must be above 0"),
        ({"bitmask": torch.zeros(5, 2, dtype=torch.int32)}, r"bitmask \(5, 2\) torch.int32 must be .* \(5, 1\)"),
        ({"bitmask": torch.zeros(5, 1, dtype=torch.int64)}, r"torch.int64 must be"),
        ({"bitmask": torch.zeros(5, 2, dtype=torch.int32)[:, :1]}, "must be contiguous"),
        ({"bitmask": torch.zeros(5, 1, dtype=torch.int32, device="meta")}, "bitmask on meta must be on cpu"),
        (
            {"bitmask": torch.zeros(5, 1, dtype=torch.int32), "tiles": Tiles(*[Tile(16, 16, 4, 1)] * 3)},
            "columns 16 of a tile must be a multiple of 32",
        ),
    ],
)
def test_what_no_kernel_serves_is_refused_with_what_was_found(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_fp64_is_refused_with_the_types_there_are() -> None:
    with pytest.raises(ValueError, match=r"q torch.float64.*torch.bfloat16, torch.float16, torch.float32"):
        _call(**{name: torch.zeros(1, 5, 2, 16, dtype=torch.float64) for name in "qkv"})
