"""The gated delta rule on its Triton kernels: two custom ops, forward and backward, and how a row is cut for them.

To the kernels a segment is a document: where documents are too few to fill a GPU, each is cut into segments, and a
first scan finds the state each of them starts from. README.md has the equations.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopline.kernels.backends import Boundaries
from loopline.kernels.devices import on_its_device
from loopline.kernels.gated_delta.backward_kernels import gated_delta_bwd_gradients_kernel, gated_delta_bwd_scan_kernel
from loopline.kernels.gated_delta.forward_kernels import (
    gated_delta_fwd_chunk_kernel,
    gated_delta_fwd_kernel,
    gated_delta_fwd_states_kernel,
    gated_delta_merge_kernel,
)
from loopline.kernels.gated_delta.tiles import tiles
from loopline.kernels.tables import boundaries_on, first_pieces_on, numbers_of, on_host, pieces_on

CHUNK = 64  # tokens
GATES = 6
DTYPES = (torch.bfloat16, torch.float32)


def gated_delta_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    scale: float,
    cu_seqlens: Boundaries,
    initial_state: Tensor | None = None,
    normalize: bool = False,
    output_final_state: bool = False,
    segment_chunks: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`op.gated_delta` on the kernels here. Inputs that are not contiguous are copied.

    Args:
        segment_chunks: cut documents every so many chunks of 64 tokens; None: as many as the GPU needs to be full.
    Raises:
        ValueError: head sizes or dtypes the kernels have no tiles for.
    """
    _check(q, k, v, g, beta, initial_state)
    o, final_state, _, _ = torch.ops.loopline.gated_delta_fwd(
        *(x.contiguous() for x in (q, k, v, g, beta)),
        None if initial_state is None else initial_state.contiguous(),
        on_host(cu_seqlens),
        scale,
        normalize,
        output_final_state,
        segment_chunks,
    )
    return o, final_state if output_final_state else None


@dataclass(frozen=True)
class Segments:
    """A row's documents cut into segments.

    Attributes:
        boundaries: NS + 1 token boundaries of segments, from 0 to T.
        first: number of the segment at which each document begins, and NS at the end: N + 1.
        longest: segments of the document that has most.
    """

    boundaries: tuple[int, ...]
    first: tuple[int, ...]
    longest: int


@functools.lru_cache(maxsize=16)
def cut(cu_seqlens: tuple[int, ...], n_chunks: int) -> Segments:
    """Documents in segments of at most `n_chunks` chunks."""
    starts = [list(range(a, b, n_chunks * CHUNK)) for a, b in itertools.pairwise(cu_seqlens)]
    return Segments(
        boundaries=(*itertools.chain(*starts), cu_seqlens[-1]),
        first=(0, *itertools.accumulate(len(s) for s in starts)),
        longest=max(len(s) for s in starts),
    )


def chunks_of_segment(cu_seqlens: Sequence[int], n_programs: int, n_processors: int) -> int:
    """Length of segments, in chunks, at which a scan takes least time on `n_processors`.

    A cut document is scanned twice, for the states its segments start from and for its outputs, so that segments pay
    where at least three of the longest document's run at once; else documents stay whole.

    Args:
        n_programs: of a scan, for each segment.
    """
    lengths = [-(-(b - a) // CHUNK) for a, b in itertools.pairwise(cu_seqlens)]
    n_segments = n_processors // n_programs  # that run at once
    chunks = -(-sum(lengths) // max(1, n_segments))
    return chunks if max(lengths) >= 3 * chunks else max(lengths)


@functools.cache
def _n_processors(device: torch.device) -> int:
    # 132: an H200's, where kernels are compiled or interpreted without a GPU.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@torch.library.custom_op("loopline::gated_delta_fwd", mutates_args=())
@on_its_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    scale: float,
    normalize: bool,
    output_final_state: bool,
    segment_chunks: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o; final_state, empty unless asked for; and for the backward pass, without rows where no document is cut, the
    state before each segment [NS, HV, K, V] and each segment's map of states [NS, HV, K, V + K]."""
    row = _Row(q, k, v, g, beta, cu_seqlens, scale, normalize, segment_chunks)
    before, maps = (g.new_empty(0, v.shape[2], k.shape[3], width) for width in (v.shape[3], v.shape[3] + k.shape[3]))
    if row.longest > 1:
        maps, before = row.maps(), row.states(0.0)
        if initial_state is not None:
            before[row.first_segments[:-1]] = initial_state
        row.merge(maps, maps, before, is_reverse=False)
        initial_state = before
    o, final = torch.empty_like(v), row.states() if output_final_state else None
    gated_delta_fwd_kernel[row.scan_grid](
        q,
        k,
        v,
        beta,
        row.inverse,
        row.scores,
        row.gates,
        initial_state,
        o,
        final,
        row.boundaries,
        row.n_tokens,
        **row.scan,
    )
    if final is None:
        return o, g.new_empty(0), before, maps
    return o, final if row.longest == 1 else final[row.first_segments[1:] - 1], before, maps


@torch.library.custom_op("loopline::gated_delta_bwd", mutates_args=())
@on_its_device
def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    before: Tensor,
    maps: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    normalize: bool,
    segment_chunks: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dg, dbeta, and the gradient of the initial states, empty without them."""
    row = _Row(q, k, v, g, beta, cu_seqlens, scale, normalize, segment_chunks)
    start = initial_state if row.longest == 1 else before
    states, new = row.chunk_states(start), torch.empty_like(v)
    gated_delta_fwd_states_kernel[row.scan_grid](
        k,
        v,
        beta,
        row.inverse,
        row.gates,
        start,
        states,
        new,
        None,
        row.boundaries,
        row.first_pieces,
        row.n_tokens,
        **row.scan,
    )

    def scan(d_after: Tensor | None, d_states: Tensor | None, d_x: Tensor | None, d_before: Tensor | None) -> None:
        gated_delta_bwd_scan_kernel[row.scan_grid](
            q,
            k,
            d_o,
            row.inverse,
            row.scores,
            row.gates,
            d_after,
            d_states,
            d_x,
            d_before,
            row.boundaries,
            row.first_pieces,
            row.n_tokens,
            **row.scan,
        )

    d_after = d_final
    if row.longest > 1:
        d_after = row.states(0.0)
        if d_final is not None:
            d_after[row.first_segments[1:] - 1] = d_final
        d_added = row.states()
        scan(None, None, None, d_added)
        row.merge(maps, d_added, d_after, is_reverse=True)
    d_states, d_x = row.chunk_states(d_after), torch.empty_like(v)
    d_before = None if initial_state is None else row.states()
    scan(d_after, d_states, d_x, d_before)

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dg, dbeta = torch.empty_like(g), torch.empty_like(beta)
    gated_delta_bwd_gradients_kernel[(row.n_chunks, k.shape[2])](
        q,
        k,
        v,
        d_o,
        beta,
        row.scores,
        row.gates,
        row.norms,
        states,
        new,
        d_states,
        d_x,
        dq,
        dk,
        dv,
        dg,
        dbeta,
        row.boundaries,
        row.pieces,
        scale,
        row.n_tokens,
        IS_FROM_ZERO=start is None,
        IS_TO_ZERO=d_after is None,
        **row.gradients,
    )
    if d_before is None:
        return dq, dk, dv, dg, dbeta, g.new_empty(0)
    return dq, dk, dv, dg, dbeta, d_before if row.longest == 1 else d_before[row.first_segments[:-1]]


@_forward.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, output_final_state, *_):  # type: ignore[no-untyped-def]
    n_heads, d_k, d_v = v.shape[2], k.shape[3], v.shape[3]
    final = g.new_empty(cu_seqlens.shape[0] - 1, n_heads, d_k, d_v) if output_final_state else g.new_empty(0)
    n_segments = torch.library.get_ctx().new_dynamic_size()
    before = g.new_empty(n_segments, n_heads, d_k, d_v)
    return torch.empty_like(v), final, before, g.new_empty(n_segments, n_heads, d_k, d_v + d_k)


@_backward.register_fake
def _(d_o, d_final, q, k, v, g, beta, initial_state, *rest):  # type: ignore[no-untyped-def]
    d_initial = g.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return *(torch.empty_like(x) for x in (q, k, v, g, beta)), d_initial


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # a final state nobody used has no gradient, not one of zeros
    *tensors, cu_seqlens, ctx.scale, ctx.normalize, ctx.output_final_state, ctx.segment_chunks = inputs
    ctx.save_for_backward(*tensors, *output[2:], cu_seqlens)


def _differentiate(ctx, d_o, d_final, *_):  # type: ignore[no-untyped-def]
    d_o = torch.zeros_like(ctx.saved_tensors[2]) if d_o is None else d_o.contiguous()
    d_final = d_final.contiguous() if d_final is not None and ctx.output_final_state else None
    *gradients, d_initial = torch.ops.loopline.gated_delta_bwd(
        d_o, d_final, *ctx.saved_tensors, ctx.scale, ctx.normalize, ctx.segment_chunks
    )
    return *gradients, d_initial if ctx.needs_input_grad[5] else None, *[None] * 5


_forward.register_autograd(_differentiate, setup_context=_save)


class _Row:
    """One call's row: what every scan over it needs, computed by the inverse kernel, and the launches of shared parts.

    Attributes:
        inverse: (I + A)^-1 of each chunk, [T, HV, 64] in q.dtype.
        scores: P = tril(R o Q K^T) of each chunk, the same.
        gates: [GATES, HV, T], fp32, as named in forward_kernels.py.
        norms: 1 / ||q|| and 1 / ||k||, [2, H, T], fp32; None without normalisation.
        boundaries, pieces, first_pieces, first_segments: tables of the segments.
        longest: segments of the document that has most.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor,
        scale: float,
        normalize: bool,
        segment_chunks: int | None,
    ) -> None:
        (n_tokens, n_key_heads, d_k), (n_heads, d_v) = k.shape[1:], v.shape[2:]
        self.k, self.v, self.beta = k, v, beta
        self.sizes = tiles(d_k, d_v, q.dtype)
        bounds = numbers_of(cu_seqlens, n_tokens)
        if segment_chunks is None:
            segment_chunks = chunks_of_segment(bounds, n_heads * (d_v // self.sizes.bv), _n_processors(q.device))
        segments = cut(bounds, segment_chunks)
        self.longest = segments.longest
        self.boundaries = boundaries_on(segments.boundaries, q.device)
        self.pieces = pieces_on(segments.boundaries, CHUNK, q.device)
        self.first_pieces = first_pieces_on(segments.boundaries, CHUNK, q.device)
        self.first_segments = boundaries_on(segments.first, q.device)
        self.shape = {"H": n_key_heads, "HV": n_heads, "K": d_k, "V": d_v}
        self.n_tokens, self.n_chunks = n_tokens, self.pieces.shape[0]
        self.inverse, self.scores = q.new_empty(n_tokens, n_heads, CHUNK), q.new_empty(n_tokens, n_heads, CHUNK)
        self.gates = g.new_empty(GATES, n_heads, n_tokens)
        self.norms = g.new_empty(2, n_key_heads, n_tokens) if normalize else None
        gated_delta_fwd_chunk_kernel[(self.n_chunks, n_key_heads)](
            q,
            k,
            g,
            beta,
            self.inverse,
            self.scores,
            self.gates,
            self.norms,
            self.boundaries,
            self.pieces,
            scale,
            n_tokens,
            H=n_key_heads,
            HV=n_heads,
            K=d_k,
            BK=self.sizes.chunk_bk,
            PRECISION=self.sizes.precision,
            num_warps=1,
            num_stages=2,
        )

    @property
    def scan(self) -> dict[str, Any]:
        """Constants and options of a scan."""
        sizes = self.sizes
        return {
            **self.shape,
            "K0": sizes.k0,
            "K1": sizes.k1,
            "BV": sizes.bv,
            "PRECISION": sizes.precision,
            "num_warps": sizes.warps,
            "num_stages": sizes.stages,
        }

    @property
    def gradients(self) -> dict[str, Any]:
        """Constants and options of the kernel of dq, dk, dv."""
        sizes = self.sizes
        return {
            **self.shape,
            "K0": sizes.gradient_k0,
            "K1": sizes.gradient_k1,
            "BV": sizes.gradient_bv,
            "PRECISION": sizes.precision,
            "num_warps": sizes.gradient_warps,
            "num_stages": sizes.gradient_stages,
        }

    @property
    def scan_grid(self) -> tuple[int]:
        return (self.shape["V"] // self.sizes.bv * self.shape["HV"] * (self.boundaries.shape[0] - 1),)

    def states(self, value: float | None = None) -> Tensor:
        """A state for each segment, [NS, HV, K, V], fp32."""
        shape = (self.boundaries.shape[0] - 1, *(self.shape[name] for name in ("HV", "K", "V")))
        if value is None:
            return torch.empty(shape, dtype=torch.float32, device=self.k.device)
        return torch.full(shape, value, dtype=torch.float32, device=self.k.device)

    def chunk_states(self, edge: Tensor | None) -> Tensor:
        """Room for the states before all chunks, or their gradients after all, in q.dtype: [NT, HV, K, V].

        Without an `edge`, what is given before the first chunk or after the last of each segment, that one is zero and
        has no place: [NT - NS, HV, K, V].
        """
        n_states = self.n_chunks - (self.boundaries.shape[0] - 1 if edge is None else 0)
        return self.k.new_empty(n_states, *(self.shape[name] for name in ("HV", "K", "V")))

    def maps(self) -> Tensor:
        """S_ext and M of each segment, side by side: [NS, HV, K, V + K], fp32."""
        n_segments, n_heads, d_k, d_v = self.states().shape
        maps = torch.empty(n_segments, n_heads, d_k, d_v + d_k, dtype=torch.float32, device=self.k.device)
        n_blocks = d_v // self.sizes.bv + -(-d_k // self.sizes.bv)
        gated_delta_fwd_states_kernel[(n_blocks * n_heads * n_segments,)](
            self.k,
            self.v,
            self.beta,
            self.inverse,
            self.gates,
            None,
            None,
            None,
            maps,
            self.boundaries,
            self.first_pieces,
            self.n_tokens,
            **self.scan,
        )
        return maps

    def merge(self, maps: Tensor, added: Tensor, states: Tensor, *, is_reverse: bool) -> None:
        """Fill `states` of each document's segments from its first one's, or from its last one's in reverse."""
        n_documents = self.first_segments.shape[0] - 1
        d_k, d_v = self.shape["K"], self.shape["V"]
        for i_step in range(1, self.longest):
            gated_delta_merge_kernel[(n_documents * self.shape["HV"] * (d_k // 32), d_v // 32)](
                maps,
                added,
                states,
                self.first_segments,
                i_step,
                HV=self.shape["HV"],
                K=d_k,
                V=d_v,
                ADDED=added.shape[3],
                IS_REVERSE=is_reverse,
                num_warps=4,
            )


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None) -> None:
    for name, size in {"K": k.shape[3], "V": v.shape[3]}.items():
        if size % 32 or not 32 <= size <= 256:
            raise ValueError(f"{name} = {size}: the triton kernels need a multiple of 32 from 32 to 256")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: the triton kernels need one of {DTYPES} for all three"
        )
    fp32 = {"g": g, "initial_state": initial_state}
    for name, x in fp32.items():
        if x is not None and x.dtype != torch.float32:
            raise ValueError(f"{name} is {x.dtype}: the triton kernels need {torch.float32}")
    devices = {name: x.device for name, x in dict(q=q, k=k, v=v, beta=beta, **fp32).items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"inputs lie on different devices: {devices}")
