"""Packed attention equals a masked softmax written out by hand, gradients included."""

import pytest
import torch
from torch import Tensor

from loopline.kernels.attention.op import packed_attention
from tests.tolerances import TOLERANCES, rms_ratio

LENGTHS = [[1], [2], [63], [64], [65], [257], [1, 1, 1], [4, 4], [3, 1, 65, 2], [1, 2]]


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> Tensor:
    """[1, T, H, D], with the T x T mask of the packed row written out."""
    n_tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))  # head h reads key/value head h // group
    document = torch.bucketize(torch.arange(n_tokens), torch.tensor(cu_seqlens[1:]), right=True)
    visible = (document[:, None] == document[None, :]) & torch.ones(n_tokens, n_tokens).tril().bool()
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "d_head"), [(2, 2, 8), (6, 2, 7), (4, 1, 5)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_equals_the_masked_softmax(
    lengths: list[int], n_heads: int, n_kv_heads: int, d_head: int
) -> None:
    n_tokens, cu_seqlens = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    generator = torch.Generator().manual_seed(n_tokens)
    heads = (n_heads, n_kv_heads, n_kv_heads)
    q, k, v = (torch.randn(1, n_tokens, h, d_head, generator=generator, requires_grad=True) for h in heads)
    upstream = torch.randn(1, n_tokens, n_heads, d_head, generator=generator)
    found, expected = packed_attention(q, k, v, cu_seqlens), masked_softmax(q, k, v, cu_seqlens)
    assert found.shape == expected.shape
    assert rms_ratio(found.detach(), expected.detach()) <= TOLERANCES["fp32", "op"]
    gradients = [torch.autograd.grad((o * upstream).sum(), [q, k, v]) for o in (found, expected)]
    for name, mine, theirs in zip("qkv", *gradients):
        # The softmax of one key is 1 whatever q and k are: their true gradient is 0 and only rounding is left.
        scale = theirs if max(lengths) > 1 else v.detach()
        assert rms_ratio(mine, theirs, scale) <= TOLERANCES["fp32", "op"], name


def test_documents_of_equal_length_and_of_unequal_length_take_the_same_values() -> None:
    q = torch.randn(1, 13, 2, 4)
    equal = packed_attention(q[:, :12], q[:, :12], q[:, :12], [0, 6, 12])
    unequal = packed_attention(q, q, q, [0, 6, 12, 13])
    assert rms_ratio(unequal[:, :12], equal) <= TOLERANCES["fp32", "op"]
