"""DeepSeek sparse attention for grouped queries: an indexer picks keys, attention sees only those, a KL term trains it.

The model learns through `sparse_attention` only and the indexer through `indexer_loss` only; nothing flows through the
selection. Projections and rotary positions are the mixer's. What is written out here is the reference, plain torch by
blocks of queries; launch.py has the Triton kernels.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopline.kernels.backends import Boundaries, check_boundaries, known, listed, unknown
from loopline.kernels.dsa.bitmask import Bitmask, longest, n_words, population
from loopline.kernels.dsa.blocks import Block, PerQuery, blocks, sampled_blocks
from loopline.kernels.dsa.visible import Selection, TileSelection, per_query
from loopline.kernels.precision import wide

BACKENDS = ("triton", "reference")  # preferred first

SumHeads = Callable[[Tensor], Tensor]  # sums over this rank's heads, of any shape -> the same over all heads


class IndexerLoss(NamedTuple):
    """The indexer's KL loss and its gradients, all fp32 (fp64 for fp64 inputs).

    Attributes:
        loss_sum: scalar, sum over queries.
        dq_index: [1, T, HI, DI].
        dk_index: [1, T, DI].
        dweights: [1, T, HI].
    """

    loss_sum: Tensor
    dq_index: Tensor
    dk_index: Tensor
    dweights: Tensor


def index_scores(q_index: Tensor, k_index: Tensor, weights: Tensor) -> Tensor:
    """I_ts = sum_j w_tj relu(q_tj . k_s), of every query with every key, no mask.

    There is no scale here: the caller multiplies `weights` by HI ** -0.5 * DI ** -0.5. It does not change which keys
    are selected, but it is the temperature of the softmax that `indexer_loss` fits.

    Args:
        q_index: [T, HI, DI].
        k_index: [S, DI], one key for all index heads.
        weights: [T, HI].
    Returns:
        [T, S], fp32, or fp64 for fp64 inputs.
    Reference: DeepSeek-V3.2, arXiv:2512.02556, eq. 1.
    """
    return _weigh(_index_heads(q_index, k_index), weights)


@overload
def select(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    cu_seqlens: Boundaries,
    block_size: int = 128,
    backend: Literal["reference"] = "reference",
) -> Tensor: ...


@overload
def select(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    cu_seqlens: Boundaries,
    block_size: int = 128,
    backend: str,
) -> PerQuery: ...


@torch.no_grad()
def select(
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    *,
    top_k: int,
    cu_seqlens: Boundaries,
    block_size: int = 128,
    backend: str = "reference",
) -> PerQuery:
    """The `top_k` keys of each query's own past with the highest index scores, shared by all attention heads.

    A query with fewer than top_k tokens up to its own takes each of them once. Of equal scores the lower position wins.
    NaN counts as inf.

    Args:
        q_index: [1, Tq, HI, DI]. Tq < T only with a single document: then its last Tq tokens (decoding).
        k_index: [1, T, DI].
        weights: [1, Tq, HI], scaled by the caller, see `index_scores`.
        top_k: >= 1.
        cu_seqlens: N + 1 document boundaries over T, on the host, from 0 to T, rising.
        block_size: queries scored at once by the reference; memory is block_size * HI * T.
        backend: "triton" wants Tq = T and no fp64.
    Returns:
        What the other functions here take. From "triton" a Bitmask; from "reference" [Tq, K], int32,
        K = min(top_k, longest document): positions in the row, rising, then -1 in the empty slots. No gradient.
    Raises:
        ValueError: shapes disagree, bad cu_seqlens, top_k or block_size below 1, or what no kernel serves.
        BackendError: unknown backend.
    Reference: DeepSeek-V3.2, arXiv:2512.02556, eq. 1 and 2.
    """
    _check_index(q_index, k_index, weights)
    _check_row(q_index, k_index, cu_seqlens, block_size)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if _is_triton(backend):
        from loopline.kernels.dsa.launch import select_bits

        return select_bits(q_index, k_index, weights, top_k=top_k, cu_seqlens=cu_seqlens)
    cu_seqlens = listed(cu_seqlens)
    n_slots = min(top_k, longest(cu_seqlens))
    selection = torch.empty(q_index.shape[1], n_slots, dtype=torch.int32, device=q_index.device)
    for block in blocks(cu_seqlens, q_index.shape[1], block_size):
        scores = index_scores(q_index[0, block.queries], k_index[0, block.keys], weights[0, block.queries])
        positions = torch.arange(block.keys.start, block.keys.stop, device=scores.device)
        selection[block.queries] = highest(scores, block.causal(scores.device), positions, n_slots)
    return selection


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    *,
    cu_seqlens: Boundaries,
    scale: float | None = None,
    block_size: int = 128,
    backend: str = "reference",
) -> Tensor:
    """softmax(scale q k^T) v over the selected keys of each query; gradients to q, k and v.

    Probabilities are not kept for the backward pass.

    Args:
        q: [1, Tq, H, D]. Tq < T only with a single document: then its last Tq tokens (decoding).
        k: [1, T, G, D], G divides H (grouped queries).
        v: [1, T, G, V].
        selection: from `select`, or `tile_op.select_by_tile`; None means all of the past (dense warm-up). Keys outside
            a query's past are ignored; a query left with none gives NaN, and 0 from "triton".
        cu_seqlens: N + 1 document boundaries over T, on the host, from 0 to T, rising.
        scale: factor on q k^T; None means D ** -0.5.
        block_size: queries attended at once by the reference; memory is block_size * H * T.
        backend: "triton" wants Tq = T, bits, and what kernels/attention has tiles for; of a choice by tile what
            gather_launch.py has, and it takes the lists.
    Returns:
        [1, Tq, H, V] in v.dtype. The reference computes in fp32, or in fp64 for fp64 inputs.
    Raises:
        ValueError: shapes disagree, bad cu_seqlens, block_size below 1, or what no kernel serves.
        BackendError: unknown backend.
    Reference: DeepSeek-V3.2, arXiv:2512.02556, eq. 2; GQA: Ainslie et al., arXiv:2305.13245.
    """
    return sparse_attention_with_lse(
        q, k, v, selection, cu_seqlens=cu_seqlens, scale=scale, block_size=block_size, backend=backend
    )[0]


def sparse_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    *,
    cu_seqlens: Boundaries,
    scale: float | None = None,
    block_size: int = 128,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """`sparse_attention`, and what `indexer_loss` of the same backend reuses of it.

    Returns:
        o: as `sparse_attention`.
        lse: [H, T], fp32, log of the sum of exp(scale q k^T) over the selection, without gradient. The reference's loss
            finds its own: None.
    """
    if _is_triton(backend) and isinstance(selection, TileSelection):
        from loopline.kernels.dsa.gather_launch import gather_attention

        lists, tile = selection.lists, selection.tile
        o, lse = gather_attention(q, k, v, lists, cu_seqlens=cu_seqlens, tile=tile, scale=scale)
        return o, lse.detach()
    visible = per_query(selection)
    _check_attention(q, k, visible)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must agree in [1, T, G]")
    _check_row(q, k, cu_seqlens, block_size, visible)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _is_triton(backend):
        from loopline.kernels.attention.launch import flash_attention

        bits = _bits(visible)
        return flash_attention(
            q, k, v, cu_seqlens=cu_seqlens, window=None, bitmask=None if bits is None else bits.words, scale=scale
        )
    dtype, needs_grad = v.dtype, torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    q, k, v = (wide(x[0]) for x in (q, k, v))  # once, so that gradients of k and v add up over blocks in fp32
    outputs = []  # a block is recomputed in the backward pass
    for block in blocks(listed(cu_seqlens), q.shape[0], block_size):
        inputs = (q[block.queries], k[block.keys], v[block.keys], visible, block, scale)
        if needs_grad:
            outputs.append(checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(*inputs))
    return torch.cat(outputs)[None].to(dtype), None


@torch.no_grad()
def indexer_loss(
    q: Tensor,
    k: Tensor,
    selection: Selection | None,
    *,
    q_index: Tensor,
    k_index: Tensor,
    weights: Tensor,
    cu_seqlens: Boundaries,
    scale: float | None = None,
    sum_heads: SumHeads | None = None,
    row_stride: int = 1,
    row_offset: int = 0,
    block_size: int = 128,
    backend: str = "reference",
    lse: Tensor | None = None,
) -> IndexerLoss:
    """sum_t KL(p_t || softmax(I_t)) over a set of keys, with its gradients; p_t is what attention did, I the scores.

    p_t is the sum over heads of softmax(scale q_t k^T) over the set, divided by its own sum. The gradient in I is
    softmax(I_t) - p_t, linear in p_t: where several loops share one selection and indexer, the mean of the gradients
    returned for each is that of KL(mean of p_t || softmax(I_t)). No graph is built; pass the gradients on by hand.
    A query with one key in its set adds exactly 0.

    Under tensor parallelism the two backends sum different things over ranks. The reference sums the head sums of each
    block, so that loss_sum is of all heads' mean attention. "triton" sums the gradients, once a call, which is the
    same; its loss_sum is the mean over ranks, by heads, of each rank's divergence, which is no less, by what the ranks'
    attention differs among itself.

    Args:
        q: [1, T, H, D], the main attention's.
        k: [1, T, G, D], G divides H.
        selection: the set is the selected keys (sparse stage); None: all of the past (dense warm-up).
        q_index, k_index, weights: [1, T, HI, DI], [1, T, DI], [1, T, HI], as given to `select`.
        cu_seqlens: N + 1 document boundaries over T, on the host, from 0 to T, rising.
        scale: factor on q k^T; None means D ** -0.5.
        sum_heads: adds up over all tensor-parallel ranks (an all-reduce); called as often, with the same shapes, on
            every rank. None: this rank has all heads.
        row_stride, row_offset: every `row_stride`-th tile of 64 queries enters, from number `row_offset` <
            `row_stride` on, and counts that many times. The mean over all offsets is the whole.
        block_size: queries at once in the reference; memory is block_size * (H + HI) * T.
        backend: "triton" wants a Bitmask and `lse`.
        lse: [H, T], from `sparse_attention_with_lse` over the same selection; the reference does not look at it.
    Raises:
        ValueError: shapes disagree, bad cu_seqlens, block_size or row_stride below 1, row_offset out of range, or what
            no kernel serves.
        BackendError: unknown backend.
    Reference: DeepSeek-V3.2, arXiv:2512.02556, eq. 3 (dense) and 4 (sparse).
    """
    visible = per_query(selection)
    _check_attention(q, k, visible)
    _check_index(q_index, k_index, weights)
    if not q.shape[1] == k.shape[1] == q_index.shape[1] == k_index.shape[1]:
        tokens = [x.shape[1] for x in (q, k, q_index, k_index)]
        raise ValueError(f"tokens in q, k, q_index, k_index are {tokens}; the loss wants all alike")
    _check_row(q, k, cu_seqlens, block_size, visible)
    if not 0 <= row_offset < row_stride:
        raise ValueError(f"row_offset is {row_offset}; it must be in [0, row_stride) = [0, {row_stride})")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _is_triton(backend):
        from loopline.kernels.dsa.launch import loss_sums

        if lse is None:
            raise ValueError(
                "indexer_loss with backend 'triton' wants lse, [H, T]: take it from sparse_attention_with_lse over the "
                "same selection"
            )
        sums = loss_sums(
            q,
            k,
            _bits(visible),
            lse=lse,
            q_index=q_index,
            k_index=k_index,
            weights=weights,
            cu_seqlens=cu_seqlens,
            scale=scale,
            row_stride=row_stride,
            row_offset=row_offset,
        )
        return _over_heads(IndexerLoss(*sums), q.shape[2], row_stride, sum_heads)
    q, k, q_index, k_index, weights = (wide(x[0]) for x in (q, k, q_index, k_index, weights))
    loss_sum = q_index.new_zeros(())
    dq_index, dk_index, dweights = (torch.zeros_like(x) for x in (q_index, k_index, weights))
    for block in sampled_blocks(listed(cu_seqlens), q.shape[0], block_size, row_stride, row_offset):
        rows, keys = block.queries, block.keys
        allowed = block.allowed(visible, q.device)
        target = _head_mass(q[rows], k[keys], allowed, scale, sum_heads)  # [BT, S]
        heads = _index_heads(q_index[rows], k_index[keys])
        log_predicted = _weigh(heads, weights[rows]).masked_fill(~allowed, float("-inf")).log_softmax(-1)
        # Outside the set target is 0 and log_predicted -inf: their product would be NaN.
        cross = target * log_predicted.masked_fill(~allowed, 0.0)
        loss_sum += (torch.xlogy(target, target) - cross).sum()
        dscores = log_predicted.exp() - target  # [BT, S], 0 outside the set
        dweights[rows] = torch.einsum("ts,tjs->tj", dscores, heads)
        dheads = dscores[:, None] * weights[rows][..., None] * (heads > 0)  # [BT, HI, S]; relu has slope 0 at 0
        dq_index[rows] = torch.einsum("tjs,sd->tjd", dheads, k_index[keys])
        dk_index[keys] += torch.einsum("tjs,tjd->sd", dheads, q_index[rows])
    found = IndexerLoss(loss_sum, dq_index[None], dk_index[None], dweights[None])
    return found if row_stride == 1 else IndexerLoss(*(row_stride * x for x in found))


@torch.no_grad()
def attention_recall(
    q: Tensor,
    k: Tensor,
    selection: Selection,
    *,
    cu_seqlens: Boundaries,
    scale: float | None = None,
    sum_heads: SumHeads | None = None,
    block_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """How much of dense attention's mass the selection holds, and how much the best choice of as many keys would.

    A query's mass is its dense probabilities averaged over heads. Recall is the ratio of the two sums.

    Args:
        q, k, cu_seqlens, scale, sum_heads, block_size: as in `indexer_loss`, computed as its reference does.
        selection: from `select` or `tile_op.select_by_tile`; as many keys a query are what the best choice gets.
    Returns:
        mass_selected_sum, mass_best_sum: scalars, fp32 (fp64 for fp64 inputs), sums over queries.
    Raises:
        ValueError: shapes disagree, bad cu_seqlens, block_size below 1.
    """
    visible = per_query(selection)
    _check_attention(q, k, visible)
    _check_row(q, k, cu_seqlens, block_size, visible)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q, k = wide(q[0]), wide(k[0])
    selected_sum, best_sum = q.new_zeros(()), q.new_zeros(())
    for block in blocks(listed(cu_seqlens), q.shape[0], block_size):
        mass = _head_mass(q[block.queries], k[block.keys], block.causal(q.device), scale, sum_heads)
        selected_sum += mass.masked_fill(~block.allowed(visible, q.device), 0.0).sum()
        if isinstance(visible, Bitmask):
            n_best = population(visible.words[block.queries])
            is_beyond = torch.arange(block.n_keys, device=q.device) >= n_best[:, None]
            best_sum += mass.sort(dim=-1, descending=True).values.masked_fill(is_beyond, 0.0).sum()
        else:
            n_best = (visible[block.queries] >= 0).sum(-1)
            best = mass.topk(min(visible.shape[1], block.n_keys), dim=-1).values
            is_beyond = torch.arange(best.shape[1], device=q.device) >= n_best[:, None]
            best_sum += best.masked_fill(is_beyond, 0.0).sum()
    return selected_sum, best_sum


def selection_overlap(a: Selection, b: Selection) -> tuple[Tensor, Tensor | int]:
    """How far two selections of one row agree, e.g. those of two loops.

    Args:
        a, b: both as bits, both as lists, or both by tile: then lists are compared, without the tiles' own tokens.
    Returns:
        sum of |A and B| / |A| over queries, or over tiles that list keys, a scalar in fp32; and the number of these.
    Raises:
        ValueError: different numbers of queries, or unlike selections.
    """
    if isinstance(a, TileSelection) and isinstance(b, TileSelection):
        share, is_listed = _shared(a.lists, b.lists), (a.lists >= 0).any(-1)
        return share.masked_fill(~is_listed, 0.0).sum(), is_listed.sum()
    if isinstance(a, Bitmask) and isinstance(b, Bitmask):
        return (population(a.words, b.words) / a.counts()).sum(), a.words.shape[0]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise ValueError(
            f"one selection is a {type(a).__name__} and the other a {type(b).__name__}: compare like with like, bits "
            "and lists by Bitmask.from_positions"
        )
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"selections are over {a.shape[0]} and {b.shape[0]} queries; they must be of one row")
    return _shared(a, b).sum(), a.shape[0]


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """|A and B| / |A| of index lists, row by row: [N, K], [N, K'] -> [N], fp32; NaN where A is empty."""
    ordered = b.masked_fill(b < 0, torch.iinfo(b.dtype).max).sort(dim=-1).values  # empty slots last
    place = torch.searchsorted(ordered, a.contiguous()).clamp_max(b.shape[1] - 1)
    is_valid = a >= 0
    is_shared = (ordered.gather(1, place) == a) & is_valid
    return is_shared.sum(-1) / is_valid.sum(-1)


def highest(scores: Tensor, allowed: Tensor, positions: Tensor, n_slots: int) -> Tensor:
    """The positions of the `n_slots` highest allowed scores of each row; of equal ones those further left win.

    A threshold and a count rather than the indices of topk, which promises nothing about ties. NaN counts as inf.

    Args:
        scores: [N, S].
        allowed: [N, S], bool.
        positions: [S], rising.
    Returns:
        [N, n_slots], int32: rising, then -1 where fewer are allowed.
    """
    n = min(n_slots, scores.shape[1])
    # NaN does not compare: as inf, it is selected and the loss shows it.
    scores = scores.masked_fill(scores.isnan(), float("inf")).masked_fill(~allowed, float("-inf"))
    threshold = scores.topk(n, dim=-1).values[:, -1:]  # -inf where fewer than n are allowed
    is_above = scores > threshold
    is_tied = scores == threshold
    n_tied = n - is_above.sum(-1, keepdim=True)
    chosen = (is_above | (is_tied & (is_tied.cumsum(-1) <= n_tied))) & allowed
    slot = (chosen.cumsum(-1) - 1).masked_fill(~chosen, n_slots)  # one spare slot takes the rest
    empty = torch.full((scores.shape[0], n_slots + 1), -1, dtype=torch.int32, device=scores.device)
    return empty.scatter_(1, slot, positions.int().expand_as(slot))[:, :n_slots]


def _index_heads(q_index: Tensor, k_index: Tensor) -> Tensor:
    """relu(q_tj . k_s): [BT, HI, DI], [S, DI] -> [BT, HI, S]."""
    return torch.einsum("tjd,sd->tjs", wide(q_index), wide(k_index)).relu()


def _weigh(heads: Tensor, weights: Tensor) -> Tensor:
    """[BT, HI, S], [BT, HI] -> [BT, S]."""
    return torch.einsum("tjs,tj->ts", heads, wide(weights))


def _probabilities(q: Tensor, k: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """[BT, H, D], [S, G, D], [BT, S] -> [G, H/G, BT, S]."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # [BT, G, H/G, D]
    scores = torch.einsum("tgrd,sgd->grts", grouped * scale, k)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def _over_heads(sums: IndexerLoss, n_heads: int, row_stride: int, sum_heads: SumHeads | None) -> IndexerLoss:
    """Sums over a rank's heads -> the mean over all heads, sampled rows counted `row_stride` times."""
    if sum_heads is None:
        return IndexerLoss(*(x * (row_stride / n_heads) for x in sums))
    # One all-reduce of [T, HI (DI + 1) + DI], the number of heads with it.
    flat = sum_heads(torch.cat([*(x.flatten() for x in sums), sums.loss_sum.new_full((1,), n_heads)]))
    parts = (flat[:-1] * (row_stride / flat[-1])).split([x.numel() for x in sums])
    return IndexerLoss(*(part.view(x.shape) for part, x in zip(parts, sums)))


def _attend(q: Tensor, k: Tensor, v: Tensor, selection: PerQuery | None, block: Block, scale: float) -> Tensor:
    """[BT, H, D], [S, G, D], [S, G, V] -> [BT, H, V]."""
    p = _probabilities(q, k, block.allowed(selection, q.device), scale)
    return torch.einsum("grts,sgv->tgrv", p, v).flatten(1, 2)


def _head_mass(q: Tensor, k: Tensor, allowed: Tensor, scale: float, sum_heads: SumHeads | None) -> Tensor:
    """Attention probabilities summed over all heads, each query's then brought to sum 1: [BT, S]."""
    mass = _probabilities(q, k, allowed, scale).sum((0, 1))
    mass = mass if sum_heads is None else sum_heads(mass)
    return mass / mass.sum(-1, keepdim=True)


def _is_triton(backend: str) -> bool:
    if backend not in BACKENDS:
        raise unknown("dsa", backend, BACKENDS)
    return backend == "triton"


def _bits(selection: PerQuery | None) -> Bitmask | None:
    if isinstance(selection, Tensor):
        raise ValueError(
            f"backend 'triton' wants a Bitmask and got index lists {tuple(selection.shape)}: select with backend "
            "'triton' too, or use Bitmask.from_positions"
        )
    return selection


def _check_attention(q: Tensor, k: Tensor, selection: PerQuery | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [1, T, H, D] and [1, T, G, D]")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    given = selection.words if isinstance(selection, Bitmask) else selection
    if given is not None and (given.dim() != 2 or given.shape[0] != q.shape[1]):
        raise ValueError(f"selection {tuple(given.shape)} must be [T, K] with T = {q.shape[1]}, the queries")


def _check_index(q_index: Tensor, k_index: Tensor, weights: Tensor) -> None:
    is_alike = q_index.dim() == 4 and k_index.dim() == 3 and q_index.shape[3] == k_index.shape[2]
    if not is_alike or weights.shape != q_index.shape[:3]:
        raise ValueError(
            f"q_index {tuple(q_index.shape)}, k_index {tuple(k_index.shape)}, weights {tuple(weights.shape)}: "
            "want [1, T, HI, DI], [1, T, DI], [1, T, HI]"
        )


def _check_row(
    q: Tensor, k: Tensor, cu_seqlens: Boundaries, block_size: int, selection: PerQuery | None = None
) -> None:
    """`q` and `k`: whatever has a token axis second, queries and keys."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"batch of queries is {q.shape[0]} and of keys {k.shape[0]}; both must be 1")
    check_boundaries(cu_seqlens, k.shape[0], n_keys)
    if n_queries > n_keys or (n_queries < n_keys and len(cu_seqlens) != 2):
        raise ValueError(
            f"{n_queries} queries against {n_keys} keys in {len(cu_seqlens) - 1} document(s): "
            "only a single document may have fewer queries, its last tokens"
        )
    bounds = known(cu_seqlens)
    if isinstance(selection, Bitmask) and bounds is not None and selection.words.shape[1] != n_words(bounds):
        want = (n_queries, n_words(bounds))
        raise ValueError(f"bitmask {tuple(selection.words.shape)} must be [T, ceil(longest document / 32)] = {want}")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
