"""Rows of a batch one by one, without their padding: for mixers whose kernels take packed documents."""

from collections.abc import Callable

import torch
from torch import Tensor

from loopline.models.hf.modules.call import Call


def each_row(compute: Callable[..., Tensor], call: Call, *, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """Run `compute` on the tokens of each row and put its results where the row's new tokens are; zeros at padding.

    Args:
        compute: takes the row's number, then `queries` and `keys` of the row, [1, t, ...] and [1, s, ...]: its new
            tokens, and all its tokens, the new ones last. Gives [1, t, ...].
        queries: [B, T, ...] each, new tokens.
        keys: [B, S, ...] each, cached and new tokens.
    Returns:
        [B, T, ...].
    """
    n_rows, n_tokens = queries[0].shape[:2]
    keys = [x[:, : call.n_keys] for x in keys]
    if call.is_key is None:
        rows = [compute(i, *(x[i : i + 1] for x in (*queries, *keys))) for i in range(n_rows)]
        return torch.cat(rows)
    results: list[Tensor] = []
    for i, is_key in enumerate(call.is_key):
        is_new = is_key[-n_tokens:]
        if not is_new.any():  # nothing but padding: no document to give
            results.append(torch.zeros_like(queries[0][i : i + 1]))
            continue
        found = compute(i, *(x[i : i + 1, is_new] for x in queries), *(x[i : i + 1, is_key] for x in keys))
        padded = found.new_zeros(1, n_tokens, *found.shape[2:])
        padded[:, is_new] = found
        results.append(padded)
    return torch.cat(results)
