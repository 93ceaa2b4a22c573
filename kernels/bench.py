"""Check and time the kernels on this machine's GPU: correctness first, then milliseconds and times the floor.

    python -m loopline.kernels.bench [--op gated_delta ...] [--check] [--json FILE]

Every backend that can run here does the same work: bf16, packed rows, forward and backward. A backend must first agree
with the fp32 reference on the same rounded inputs, outputs and every gradient; one that does not is reported and not
timed, and the exit status is 1. The floor is the larger of the least bytes over the memory's speed and the least
arithmetic over what the tensor cores sustain. Prints the row of kernels/defaults.py that the timings give. Without a
GPU it says so and does nothing; `--device cpu --check` compares the backends that exist there.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.attention import op as attention
from loopline.kernels.backends import available_backends
from loopline.kernels.dsa import gather_reference
from loopline.kernels.dsa import op as dsa
from loopline.kernels.gated_delta import op as gated_delta

# Largest RMS error ratio of a bf16 kernel against fp32: half again what tests/tolerances.py allows bf16 kernels under
# the interpreter, which lacks the tensor cores' own rounding.
GATE = 1.2e-2
CHECKED_TOKENS = 1000  # no multiple of any tile; the reference holds T x T scores


@dataclass(frozen=True)
class Peak:
    """What a GPU sustains. Sources: docs/benchmarks.md."""

    bytes_per_s: float
    bf16_flops_per_s: float


PEAKS = {"NVIDIA H200": Peak(4.8e12, 790e12), "NVIDIA H100 80GB HBM3": Peak(3.35e12, 790e12)}


@dataclass(frozen=True)
class Work:
    """The least a pass has to do."""

    flops: float
    n_bytes: float

    def floor_ms(self, peak: Peak) -> float:
        """No implementation can be faster."""
        return 1e3 * max(self.flops / peak.bf16_flops_per_s, self.n_bytes / peak.bytes_per_s)


@dataclass(frozen=True)
class Case:
    """One op in one shape.

    Attributes:
        op: its folder.
        name: the shape, for the table.
        lengths: of the documents of the row.
        make: (row length, device) -> differentiable inputs, fp32.
        run: (inputs, boundaries, backend) -> outputs.
        backends: that do this work.
        forward, backward: the least work of the whole row.
        peers: timed beside them though they do other work, which this one has to beat; nothing to agree with.
    """

    op: str
    name: str
    lengths: list[int]
    make: Callable[[int, torch.device], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor], list[int], str], Tensor]
    backends: tuple[str, ...]
    forward: Work
    backward: Work
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """One line of the table. `floors` are times the floor, None where the GPU has no row in PEAKS; a peer has no
    `worst_error`."""

    op: str
    case: str
    backend: str
    worst_error: float | None
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_floors: float | None = None
    backward_floors: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None


# The cases.


def gated_delta_case(n_documents: int, length: int, n_heads: int, d_k: int, d_v: int) -> Case:
    """Floors are those of the smallest known algorithm with chunks of 64 tokens, bf16 in and out."""

    def make(n_tokens: int, device: torch.device) -> dict[str, Tensor]:
        shape = (1, n_tokens, n_heads)
        q, k = (F.normalize(torch.randn(*shape, d_k, device=device), dim=-1) for _ in range(2))
        v = torch.randn(*shape, d_v, device=device)
        g = F.logsigmoid(torch.randn(shape, device=device) + 3)
        return {"q": q, "k": k, "v": v, "g": g, "beta": torch.rand(shape, device=device)}

    def run(inputs: dict[str, Tensor], cu_seqlens: list[int], backend: str) -> Tensor:
        return gated_delta.gated_delta(**inputs, scale=d_k**-0.5, cu_seqlens=cu_seqlens, backend=backend)[0]  # type: ignore[arg-type]

    tokens_heads, chunk = n_documents * length * n_heads, 64
    return Case(
        op="gated_delta",
        name=f"B{n_documents} T{length} H{n_heads} K{d_k} V{d_v}",
        lengths=[length] * n_documents,
        make=make,
        run=run,
        backends=gated_delta.BACKENDS,
        forward=Work(
            tokens_heads * (4 * chunk * (d_k + d_v) + 6 * d_k * d_v), tokens_heads * (2 * (2 * d_k + 2 * d_v) + 8)
        ),
        backward=Work(
            tokens_heads * (11 * chunk * (d_k + d_v) + 16 * d_k * d_v), tokens_heads * (2 * (4 * d_k + 3 * d_v) + 16)
        ),
    )


def attention_case(
    n_documents: int, length: int, n_heads: int, n_kv_heads: int, d_head: int, window: int | None
) -> Case:
    """Full or windowed; the floor counts the scores inside the mask only."""

    def run(inputs: dict[str, Tensor], cu_seqlens: list[int], backend: str) -> Tensor:
        if backend == "cudnn":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                return attention.packed_attention(**inputs, cu_seqlens=cu_seqlens, window=window, backend="sdpa")
        return attention.packed_attention(**inputs, cu_seqlens=cu_seqlens, window=window, backend=backend)

    reach = min(window or length, length)
    pairs = n_documents * (reach * length - reach * (reach - 1) / 2)
    return Case(
        op="attention",
        name=f"B{n_documents} T{length} H{n_heads} G{n_kv_heads} D{d_head} {f'window {window}' if window else 'full'}",
        lengths=[length] * n_documents,
        make=partial(_qkv, n_heads, n_kv_heads, d_head),
        run=run,
        backends=(*attention.BACKENDS, *(() if window else ("cudnn",))),
        forward=_attention_work(4, pairs, n_documents * length, n_heads, n_kv_heads, d_head),
        backward=_attention_work(10, pairs, n_documents * length, n_heads, n_kv_heads, d_head),
    )


def sparse_case(length: int, top_k: int, n_heads: int, n_kv_heads: int, d_head: int, n_documents: int) -> Case:
    """Attention over a choice made by random index scores, the choice included; "sdpa" and "cudnn" are dense attention,
    which sparse attention has to beat. The floor counts the chosen keys only."""

    def make(n_tokens: int, device: torch.device) -> dict[str, Tensor]:
        index = {
            "q_index": torch.randn(1, n_tokens, 4, 64, device=device),
            "k_index": torch.randn(1, n_tokens, 64, device=device),
            "weights": torch.rand(1, n_tokens, 4, device=device),
        }
        return _qkv(n_heads, n_kv_heads, d_head, n_tokens, device) | index

    def run(inputs: dict[str, Tensor], cu_seqlens: list[int], backend: str) -> Tensor:
        q, k, v = (inputs[name] for name in "qkv")
        if backend in ("sdpa", "cudnn"):
            return attention_case(1, 1, n_heads, n_kv_heads, d_head, None).run(
                {"q": q, "k": k, "v": v}, cu_seqlens, backend
            )
        index = [inputs[name].detach() for name in ("q_index", "k_index", "weights")]
        chosen = dsa.select(*index, top_k=top_k, cu_seqlens=cu_seqlens, backend=backend)
        return dsa.sparse_attention(q, k, v, chosen, cu_seqlens=cu_seqlens, backend=backend)

    reach = min(top_k, length)
    pairs = n_documents * (reach * length - reach * (reach - 1) / 2)
    return Case(
        op="dsa",
        name=f"B{n_documents} T{length} H{n_heads} G{n_kv_heads} D{d_head} k{top_k}",
        lengths=[length] * n_documents,
        make=make,
        run=run,
        backends=dsa.BACKENDS,
        peers=("sdpa", "cudnn"),
        forward=_attention_work(4, pairs, n_documents * length, n_heads, n_kv_heads, d_head),
        backward=_attention_work(10, pairs, n_documents * length, n_heads, n_kv_heads, d_head),
    )


def indexer_case(length: int, top_k: int | None, n_heads: int, n_kv_heads: int, d_head: int, n_documents: int) -> Case:
    """A DSA block's choice, its attention, and the indexer's loss with its gradients, which forward computes; without
    `top_k` attention and loss are dense (warm-up)."""
    n_index, d_index = 4, 64

    def make(n_tokens: int, device: torch.device) -> dict[str, Tensor]:
        return sparse_case(length, 1, n_heads, n_kv_heads, d_head, 1).make(n_tokens, device)

    def run(inputs: dict[str, Tensor], cu_seqlens: list[int], backend: str) -> Tensor:
        index: dict[str, Any] = {name: inputs[name] for name in ("q_index", "k_index", "weights")}
        q, k, v = (inputs[name].detach() for name in "qkv")
        row: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": backend}
        chosen = dsa.select(**index, top_k=top_k, **row) if top_k else None
        _, lse = dsa.sparse_attention_with_lse(q, k, v, chosen, **row)
        loss = dsa.indexer_loss(q, k, chosen, **index, lse=lse, **row)
        return _WithGradients.apply(*index.values(), *loss)  # type: ignore[no-untyped-call]

    causal = n_documents * length * (length + 1) / 2
    reach = min(top_k or length, length)
    pairs = n_documents * (reach * length - reach * (reach - 1) / 2)
    index_bytes = 2 * n_documents * length * (n_index * (d_index + 1) + d_index)
    return Case(
        op="indexer",
        name=f"B{n_documents} T{length} H{n_heads} G{n_kv_heads} D{d_head} {f'k{top_k}' if top_k else 'dense'}",
        lengths=[length] * n_documents,
        make=make,
        run=run,
        backends=dsa.BACKENDS,
        # The choice scores every causal pair; the set's pairs go through attention, its probabilities once more, and
        # the index products three times.
        forward=Work(
            (causal if top_k else 0) * 2 * n_index * d_index + pairs * (6 * n_heads * d_head + 6 * n_index * d_index),
            3 * index_bytes,
        ),
        backward=Work(0, 2 * index_bytes),
    )


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, w: Tensor, loss: Tensor, dq: Tensor, dk: Tensor, dw: Tensor) -> Tensor:
        ctx.save_for_backward(dq, dk, dw)
        ctx.dtypes = q.dtype, k.dtype, w.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *((grad * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes)), None, None, None, None


def gather_case(length: int, top_k: int, n_heads: int, n_kv_heads: int, d_head: int, tile: int) -> Case:
    """Attention over random lists that `tile` neighbouring queries share, for long rows; the choice is not included."""

    def run(inputs: dict[str, Tensor], cu_seqlens: list[int], backend: str) -> Tensor:
        q, k, v = (inputs[name] for name in "qkv")
        if backend in ("sdpa", "cudnn"):
            return attention_case(1, 1, n_heads, n_kv_heads, d_head, None).run(
                {"q": q, "k": k, "v": v}, cu_seqlens, backend
            )
        attend = gather_reference.gather_attention if backend == "reference" else _gather_on_triton()
        lists = _random_lists(tuple(cu_seqlens), tile, top_k, q.device)
        return attend(q, k, v, lists, cu_seqlens=cu_seqlens, tile=tile)[0]

    reach = min(top_k, length)
    pairs = reach * length - reach * (reach - 1) / 2
    return Case(
        op="gather",
        name=f"T{length} H{n_heads} G{n_kv_heads} D{d_head} k{top_k} by {tile}",
        lengths=[length],
        make=partial(_qkv, n_heads, n_kv_heads, d_head),
        run=run,
        backends=("triton", "reference"),
        peers=("sdpa", "cudnn"),
        forward=_attention_work(4, pairs, length, n_heads, n_kv_heads, d_head),
        backward=_attention_work(10, pairs, length, n_heads, n_kv_heads, d_head),
    )


def _gather_on_triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from loopline.kernels.dsa.gather_launch import gather_attention  # Triton, which a CPU machine may lack

    return gather_attention


@functools.lru_cache(maxsize=2)
def _random_lists(cu_seqlens: tuple[int, ...], tile: int, top_k: int, device: torch.device) -> Tensor:
    """For each tile of each document, `top_k` random positions before it, rising; fewer where there are fewer."""
    rows = []
    for start, end in itertools.pairwise(cu_seqlens):
        for first in range(start, end, tile):
            chosen = start + torch.randperm(first - start)[:top_k].sort().values
            rows.append(F.pad(chosen, (0, top_k - len(chosen)), value=-1))
    return torch.stack(rows).to(device, torch.int32)


def _qkv(n_heads: int, n_kv_heads: int, d_head: int, n_tokens: int, device: torch.device) -> dict[str, Tensor]:
    heads = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}
    return {name: torch.randn(1, n_tokens, n, d_head, device=device) for name, n in heads.items()}


def _attention_work(
    flops_a_channel: int, pairs: float, n_tokens: int, n_heads: int, n_kv_heads: int, d_head: int
) -> Work:
    """Two products of queries and keys forward, 4 FLOPs a pair, head and channel, and five backward, 10. What moves is
    q, k, v and o, and backward also their gradients."""
    row_bytes = 2 * n_tokens * d_head * (n_heads + n_kv_heads)  # q and k, or o and v
    return Work(flops_a_channel * pairs * n_heads * d_head, (2 if flops_a_channel == 4 else 4) * row_bytes)


CASES = [
    gated_delta_case(4, 4096, 16, 128, 128),
    gated_delta_case(1, 32768, 32, 128, 128),
    gated_delta_case(8, 2048, 16, 128, 128),
    gated_delta_case(4, 4096, 16, 96, 192),
    attention_case(4, 4096, 16, 16, 128, None),
    attention_case(1, 32768, 32, 8, 128, None),
    attention_case(8, 2048, 16, 4, 128, None),
    attention_case(4, 4096, 16, 4, 128, 512),
    attention_case(4, 4096, 16, 4, 128, 2048),
    *(sparse_case(t, k, 16, 4, 128, max(1, 16384 // t)) for t in (4096, 16384, 65536) for k in (256, 512, 2048)),
    *(indexer_case(t, k, 16, 4, 128, max(1, 16384 // t)) for t in (4096, 16384) for k in (512, None)),
    *(gather_case(t, k, 16, 4, 128, 16) for t in (16384, 65536) for k in (256, 512, 2048)),
]


# Checking and timing.


def worst_error(case: Case, backend: str, device: torch.device, n_tokens: int = CHECKED_TOKENS) -> float:
    """Largest RMS error ratio over output and gradients, bf16 against the fp32 reference of the same rounded inputs.

    The row is cut to `n_tokens`: a document of 1 token, one of 63, and the rest. NaN gives infinity.
    """
    torch.manual_seed(0)
    bounds = [0, 1, 64, n_tokens]
    inputs = case.make(n_tokens, device)
    rounded = {name: x if name in ("g", "beta", "weights") else x.bfloat16() for name, x in inputs.items()}
    grad_of_o: Tensor | None = None
    results = []
    for name, precision in (("reference", torch.float32), (backend, torch.bfloat16)):
        leaves = {
            key: (x.to(precision) if x.dtype == torch.bfloat16 else x).clone().requires_grad_()
            for key, x in rounded.items()
        }
        o = case.run(leaves, bounds, name)
        grad_of_o = torch.randn_like(o).bfloat16() if grad_of_o is None else grad_of_o
        gradients = torch.autograd.grad(o, list(leaves.values()), grad_of_o.to(o.dtype), allow_unused=True)
        results.append([o, *(g for g in gradients if g is not None)])
    errors = [_ratio(found, expected) for expected, found in zip(*results, strict=True)]
    return max(errors)


def _ratio(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    ratio = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-12))
    return ratio if ratio == ratio else float("inf")


def time_case(case: Case, backend: str, device: torch.device, error: float | None) -> Timing:
    """Median times of forward and of backward alone, the caches of the GPU flushed before each."""
    n_tokens = sum(case.lengths)
    bounds = [sum(case.lengths[:i]) for i in range(len(case.lengths) + 1)]
    inputs = {
        name: (x if name in ("g", "beta", "weights") else x.bfloat16()).requires_grad_()
        for name, x in case.make(n_tokens, device).items()
    }
    with torch.no_grad():
        forward_ms = _median_ms(lambda: case.run(inputs, bounds, backend), device)
    o = case.run(inputs, bounds, backend)
    grad_of_o = torch.randn_like(o)
    leaves = list(inputs.values())
    backward_ms = _median_ms(
        lambda: torch.autograd.grad(o, leaves, grad_of_o, retain_graph=True, allow_unused=True), device
    )
    peak = PEAKS.get(gpu_name(device) or "")
    return Timing(
        case.op,
        case.name,
        backend,
        error,
        forward_ms,
        backward_ms,
        forward_ms / case.forward.floor_ms(peak) if peak else None,
        backward_ms / case.backward.floor_ms(peak) if peak else None,
        case.forward.flops / forward_ms / 1e9,
        case.backward.flops / backward_ms / 1e9,
    )


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        import triton.testing

        return float(triton.testing.do_bench(run, return_mode="median"))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[2]


def measure(cases: list[Case], device: torch.device, *, times_too: bool) -> Iterator[Timing]:
    """A line for every case and backend that can run here."""
    for case in cases:
        for name in (*case.backends, *case.peers):
            package = "sdpa" if name == "cudnn" else name  # torch's, told which of its kernels to take
            is_peer = name in case.peers
            if not available_backends((package,), device.type) or (name == "cudnn" and device.type != "cuda"):
                continue
            if is_peer and not times_too:
                continue
            try:
                error = None if is_peer else worst_error(case, name, device)
            except (RuntimeError, NotImplementedError) as failure:  # a refusal is a line of the report
                print(f"{case.op} {case.name} {name}: {str(failure).splitlines()[0]}", file=sys.stderr)
                continue
            is_timed = times_too and (error is None or error <= GATE) and name != "reference"
            yield time_case(case, name, device, error) if is_timed else Timing(case.op, case.name, name, error)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def order_row(timings: list[Timing]) -> dict[str, tuple[str, ...]]:
    """Op -> its backends by total time over the cases that all of them ran, "reference" last: a row of MEASURED."""
    row: dict[str, tuple[str, ...]] = {}
    backends = {(case.op, name) for case in CASES for name in case.backends if name != "cudnn"}
    for op in dict.fromkeys(timing.op for timing in timings):
        timed = [t for t in timings if t.forward_ms is not None and t.op == op and (op, t.backend) in backends]
        cases = {t.case for t in timed}
        totals = {}
        for name in {t.backend for t in timed}:
            mine = [t for t in timed if t.backend == name]
            if {t.case for t in mine} == cases:
                totals[name] = sum((t.forward_ms or 0) + (t.backward_ms or 0) for t in mine)
        row[op] = (*sorted(totals, key=lambda name: totals[name]), "reference")
    return row


def environment(device: torch.device) -> dict[str, str]:
    """What the figures were taken on."""
    found = {"device": gpu_name(device) or platform.processor() or "cpu", "python": platform.python_version()}
    for package in ("torch", "triton", "fla-core"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0]
    return found


def gpu_name(device: torch.device) -> str | None:
    """As torch names it; None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def main() -> int:
    """Parse, check, time, print; 1 where a backend is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=sorted({case.op for case in CASES}), help="only this one")
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device; kernels are compared with their references in tests/unit/kernels instead")
        return 0
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference is fp32
    where = environment(device)
    print(json.dumps(where))
    timings = []
    for t in measure([c for c in CASES if not args.op or c.op in args.op], device, times_too=not args.check):
        timings.append(t)
        print(_line(t), flush=True)
    wrong = [t for t in timings if t.worst_error is not None and not t.worst_error <= GATE]
    for t in wrong:
        print(f"WRONG: {t.op} {t.case} {t.backend}: error {t.worst_error:.1e}, at most {GATE:.1e}", file=sys.stderr)
    if not args.check:
        print(f"kernels/defaults.py: {where['device']!r}: {order_row(timings)}")
    if args.json:
        args.json.write_text(json.dumps({"where": where, "timings": [asdict(t) for t in timings]}, indent=1))
    return 1 if wrong else 0


def _line(t: Timing) -> str:
    agreement = "other work   " if t.worst_error is None else f"error {t.worst_error:.1e}"
    line = f"{t.op:12} {t.case:34} {t.backend:10} {agreement}"
    if t.forward_ms is None or t.backward_ms is None:
        return line
    floors = ""
    if t.forward_floors is not None and t.backward_floors is not None:
        floors = f"  x floor {t.forward_floors:5.1f} {t.backward_floors:5.1f}"
    return (
        f"{line}  ms {t.forward_ms:8.3f} {t.backward_ms:8.3f}{floors}"
        f"  TFLOP/s {t.forward_tflops:5.0f} {t.backward_tflops:5.0f}"
    )


if __name__ == "__main__":
    sys.exit(main())
