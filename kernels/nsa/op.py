"""Native Sparse Attention, public op: pooled blocks, the blocks each query reads, and the three gated branches."""

from torch import Tensor

from loopline.kernels.backends import check_boundaries, check_heads, unknown
from loopline.kernels.nsa.blocks import NsaSizes, n_complete_blocks, pool_blocks, select
from loopline.kernels.nsa.reference import blocked

BACKENDS = ("reference",)  # why not fla: README.md

_N_ROWS = 64  # queries at a time


def nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Tensor,
    sizes: NsaSizes,
    cu_seqlens: list[int],
    pooled: tuple[Tensor, Tensor] | None = None,
    selection: Tensor | None = None,
    scale: float | None = None,
    backend: str = "reference",
) -> Tensor:
    """o_t = g_cmp o_cmp + g_sel o_sel + g_win o_win: attention to pooled blocks, selected blocks and the last keys.

    The selection has no gradient; the pooled keys have theirs through the compressed branch alone. Fewer queries than
    keys are the last ones of a row with one document: one query against all keys is a step of decoding.

    Args:
        q: [1, T_q, H, D], positions already in it.
        k, v: [1, T, G, D], G divides H.
        gates: [1, T_q, H, 3], in (0, 1), in the order compressed, selected, window.
        sizes: of the branches.
        cu_seqlens: N + 1 document boundaries over the keys, on the host, from 0 to T.
        pooled: (k_pool, v_pool) of `blocks.pool_blocks`, [1, NB, G, D] each; None means the mean over each block.
        selection: [1, T_q, G, S], integers, as from `select_blocks`; None means to select here. Blocks in the future
            are not read, -1 and blocks that do not exist are no blocks, and a block named twice is read once.
        scale: factor on q; None means D ** -0.5.
        backend: "reference".
    Returns:
        [1, T_q, H, D] in v.dtype.
    Raises:
        ValueError: shapes disagree, G does not divide H, or cu_seqlens does not rise from 0 to T.
        BackendError: unknown backend.
    Reference: Yuan et al., Native Sparse Attention, arXiv:2502.11089.
    """
    _check_row(q, k, v, cu_seqlens)
    if backend not in BACKENDS:
        raise unknown("nsa", backend, BACKENDS)
    if pooled is None:
        k_pool, v_pool = (pool_blocks(x, cu_seqlens=cu_seqlens, block_size=sizes.block_size) for x in (k, v))
    else:
        k_pool, v_pool = pooled
    _check_pooled(k_pool, "k_pool", k, sizes, cu_seqlens)
    _check_pooled(v_pool, "v_pool", k, sizes, cu_seqlens)
    if selection is None:
        selection = select_blocks(q, k, sizes=sizes, cu_seqlens=cu_seqlens, k_pool=k_pool, scale=scale)
    want = (*q.shape[:3], 3)
    if gates.shape != want:
        raise ValueError(f"gates {tuple(gates.shape)} must be [1, T_q, H, 3] = {want}")
    want = (*q.shape[:2], k.shape[2])
    if selection.dim() != 4 or selection.shape[:3] != want or selection.is_floating_point():
        raise ValueError(
            f"selection {tuple(selection.shape)} of {selection.dtype} must be integers [1, T_q, G, S] with {want} first"
        )
    return blocked(
        q,
        k,
        v,
        gates=gates,
        pooled=(k_pool, v_pool),
        selection=selection,
        sizes=sizes,
        cu_seqlens=cu_seqlens,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        n_rows=_N_ROWS,
    )


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    sizes: NsaSizes,
    cu_seqlens: list[int],
    k_pool: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The blocks each query of a key/value head's group reads, by attention to the pooled keys.

    Importance of a block is the sum over the group's query heads of its probability among the blocks complete at t.
    The first block, the query's own and the one before it are taken first of all; then by importance, the lower of
    equal ones; never a block after the query's own, and all there are where those are fewer than n_selected.

    Args:
        q, k, sizes, cu_seqlens, scale: as in `nsa`.
        k_pool: [1, NB, G, D]; None means the mean over each block.
    Returns:
        [1, T_q, G, S], int64, S = n_selected: block numbers in the document, rising, then -1. Without gradient.
    Raises:
        ValueError: as `nsa`.
    Reference: Yuan et al., arXiv:2502.11089, section 3.3.2, with one block size for both branches.
    """
    _check_row(q, k, k, cu_seqlens)
    if k_pool is None:
        k_pool = pool_blocks(k, cu_seqlens=cu_seqlens, block_size=sizes.block_size)
    _check_pooled(k_pool, "k_pool", k, sizes, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return select(q, k_pool, sizes=sizes, cu_seqlens=cu_seqlens, scale=scale, n_rows=_N_ROWS)


def _check_row(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> None:
    check_heads(q, k, v)
    check_boundaries(cu_seqlens, k.shape[0], k.shape[1])
    n_queries, n_keys, n_documents = q.shape[1], k.shape[1], len(cu_seqlens) - 1
    if n_queries != n_keys and (n_documents > 1 or not 0 < n_queries < n_keys):
        raise ValueError(
            f"{n_queries} queries to {n_keys} keys in {n_documents} documents: want as many, or fewer in one document"
        )


def _check_pooled(x: Tensor, name: str, k: Tensor, sizes: NsaSizes, cu_seqlens: list[int]) -> None:
    want = (1, n_complete_blocks(cu_seqlens, sizes.block_size), *k.shape[2:])
    if x.shape != want:
        raise ValueError(f"{name} {tuple(x.shape)} must be [1, NB, G, D] = {want}")
