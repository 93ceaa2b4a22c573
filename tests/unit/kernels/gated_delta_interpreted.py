"""What our Triton kernels of the gated delta rule differ by from its recurrence, on a CPU.

Run as `python -m tests.unit.kernels.gated_delta_interpreted` from the root with TRITON_INTERPRET=1: one line of JSON a
case. Nothing of the kernels is imported before they are made ready to be interpreted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.unit.kernels.interpreted import Case, Figures, figures, report

ALL = {"o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state"}
FROM_ZERO = ALL - {"dinitial_state"}


def make_case(
    cu_seqlens: Sequence[int],
    *,
    heads: tuple[int, int] = (1, 1),
    sizes: tuple[int, int] = (32, 32),
    has_state: bool = True,
    normalize: bool = False,
    segment_chunks: int | None = None,
    output_final_state: bool = True,
    asks: Callable[[Tensor, Any], Any] | None = None,
    change: Callable[[dict[str, Tensor]], None] = lambda inputs: None,
) -> Case:
    """Random inputs over documents, of unit length where the op does not normalise.

    Args:
        heads, sizes: of keys and of values.
        asks: what is made of o and the final state, and differentiated.
        change: edits the inputs.
    """
    from loopline.kernels.gated_delta.launch import gated_delta_triton
    from loopline.kernels.gated_delta.reference import recurrent
    from loopline.kernels.precision import l2_normalize

    n_tokens, (n_key_heads, n_heads), (d_k, d_v) = cu_seqlens[-1], heads, sizes
    q, k = (torch.randn(1, n_tokens, n_key_heads, d_k) for _ in range(2))
    inputs = {
        "q": 3 * q if normalize else F.normalize(q, dim=-1),
        "k": 3 * k if normalize else F.normalize(k, dim=-1),
        "v": torch.randn(1, n_tokens, n_heads, d_v),
        "g": -F.softplus(torch.randn(1, n_tokens, n_heads) - 0.5),
        "beta": 2.0 * torch.randn(1, n_tokens, n_heads).sigmoid(),  # above 1: negative eigenvalues
    }
    if has_state:
        inputs["initial_state"] = torch.randn(len(cu_seqlens) - 1, n_heads, d_k, d_v)
    change(inputs)

    def judge(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        if normalize:
            q, k = l2_normalize(q), l2_normalize(k)
        return recurrent(q, k, v, **rest)

    def asked_for(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        return op if asks is None else lambda **arguments: asks(*op(**arguments))

    op = partial(
        gated_delta_triton,
        normalize=normalize,
        output_final_state=output_final_state,
        segment_chunks=segment_chunks,
    )
    options = {"scale": d_k**-0.5, "cu_seqlens": list(cu_seqlens)}
    return Case(inputs, ("q", "k", "v"), asked_for(op), asked_for(judge), options=options)


def forget_everything_at_times(inputs: dict[str, Tensor]) -> None:
    """A decay of exp(-1000) at every seventh token, of exp(-inf) at two, small ones between."""
    token = torch.arange(inputs["g"].shape[1])
    inputs["g"] = inputs["g"].masked_fill((token % 7 == 3)[:, None], -1000.0)
    inputs["g"] = inputs["g"].masked_fill((token % 50 == 40)[:, None], -torch.inf)


def keep_everything(inputs: dict[str, Tensor]) -> None:
    inputs["g"] = torch.zeros_like(inputs["g"])


def write_alike_keys(inputs: dict[str, Tensor]) -> None:
    """Keys that point one way, no decay, beta 1.5: powers of A reach 1e5, entries of its inverse stay below 2."""
    keep_everything(inputs)
    inputs["k"] = F.normalize(inputs["k"][:, :1] + 0.2 * inputs["k"], dim=-1)
    inputs["beta"] = torch.full_like(inputs["beta"], 1.5)


DOCUMENTS = [0, 68, 69, 97]  # more than a chunk of 64, one token, part of a chunk
LONG = [0, 257, 258, 330]
TRAINING: dict[str, Any] = {"has_state": False, "output_final_state": False, "asks": lambda o, _: o}
# What is different about a case, and the tensors compared: written out, so that one that goes missing is noticed.
MAKERS: dict[str, tuple[Callable[[], Case], set[str]]] = {
    "documents": (partial(make_case, DOCUMENTS), ALL),
    "one_token": (partial(make_case, [0, 1]), ALL),
    "a_token_short_of_a_chunk": (partial(make_case, [0, 63], normalize=True), ALL),
    "value_heads_share_keys": (partial(make_case, DOCUMENTS, heads=(2, 4), normalize=True), ALL),
    "four_value_heads_share_a_key": (partial(make_case, [0, 65], heads=(1, 4)), ALL),
    "sizes_of_lt2": (partial(make_case, [0, 130], sizes=(96, 192), normalize=True), ALL),
    "sizes_we_optimise_for": (partial(make_case, [0, 130], sizes=(128, 128), normalize=True), ALL),
    "keys_in_a_padded_tile": (partial(make_case, [0, 65], sizes=(224, 32), normalize=True), ALL),
    "largest_keys": (partial(make_case, [0, 65], sizes=(256, 32)), ALL),
    "segments": (partial(make_case, LONG, segment_chunks=1), ALL),
    "segments_of_two_chunks": (partial(make_case, LONG, segment_chunks=2, sizes=(96, 64), normalize=True), ALL),
    "segments_from_zero": (partial(make_case, [0, 130], segment_chunks=1, has_state=False), FROM_ZERO),
    "everything_is_forgotten_at_times": (partial(make_case, [0, 130], change=forget_everything_at_times), ALL),
    "nothing_is_forgotten": (partial(make_case, [0, 130], change=keep_everything), ALL),
    # The hard ones in bf16: dg is a sum over the state that nearly cancels in one head or another, hence eight of them.
    "random_states_of_many_heads": (partial(make_case, [0, 65], heads=(8, 8)), ALL),
    "nothing_is_forgotten_by_many_heads": (
        partial(make_case, [0, 130], heads=(8, 8), change=keep_everything, **TRAINING),
        FROM_ZERO - {"final_state"},
    ),
    "alike_keys": (partial(make_case, [0, 65], change=write_alike_keys), ALL),
    "training": (partial(make_case, DOCUMENTS, **TRAINING), FROM_ZERO - {"final_state"}),
    "training_in_segments": (partial(make_case, LONG, segment_chunks=1, **TRAINING), FROM_ZERO - {"final_state"}),
    "tiny_documents": (partial(make_case, [0, 8, 9, 73, 81], **TRAINING), FROM_ZERO - {"final_state"}),
    "tiny_documents_go_on": (partial(make_case, [0, 8, 74], has_state=False), FROM_ZERO),
    "documents_end": (
        partial(make_case, [0, 8, 74], output_final_state=False, asks=lambda o, _: o),
        ALL - {"final_state"},
    ),
    "final_state_unused": (partial(make_case, DOCUMENTS, asks=lambda o, _: o), ALL - {"final_state"}),
    "final_state_unused_in_segments": (
        partial(make_case, LONG, segment_chunks=2, asks=lambda o, _: o),
        ALL - {"final_state"},
    ),
    "final_state_alone": (partial(make_case, [0, 65], asks=lambda o, final_state: (0 * o, final_state)), ALL),
}
# In bf16 those in which rounding takes another way through the kernels.
CASES = [(name, "fp32") for name in MAKERS if not name.endswith("many_heads")] + [
    (name, "bf16")
    for name in (
        "documents",
        "value_heads_share_keys",
        "sizes_of_lt2",
        "sizes_we_optimise_for",
        "segments_of_two_chunks",
        "everything_is_forgotten_at_times",
        "random_states_of_many_heads",
        "nothing_is_forgotten_by_many_heads",
        "training",
        "tiny_documents",
    )
]


def run(name: str, dtype: torch.dtype) -> Figures:
    """A case by name, made anew."""
    return figures(MAKERS[name][0](), dtype)


def differing_bits(dtype: torch.dtype) -> Figures:
    """How many numbers of two runs of one call, cut into segments, are not the same."""
    case = make_case([0, 130], heads=(1, 2), segment_chunks=1, normalize=True)
    leaves = {
        name: x.to(dtype if name in case.rounded else x.dtype).requires_grad_() for name, x in case.inputs.items()
    }
    runs = []
    for _ in range(2):
        o, final_state = case.op(**leaves, **case.options)
        gradients = torch.autograd.grad(o.float().sum() + final_state.sum(), list(leaves.values()))
        runs.append([o, final_state, *gradients])
    return {"numbers": float(sum((a != b).sum() for a, b in zip(*runs)))}


def operator_contract(dtype: torch.dtype) -> Figures:
    """torch's own check of the custom ops: schema, fake outputs, autograd registration, tracing.

    A row that is cut has outputs that a whole one has not, and one with states some that one without has not; only in
    bf16 is an output in q's dtype no fp32 one.
    """
    from loopline.kernels.gated_delta import launch  # noqa: F401 - registers the ops
    from loopline.kernels.tables import on_host

    ops = torch.ops.loopline
    failures: dict[str, Any] = {}
    for segment_chunks, rounded, is_whole in ((1, dtype, True), (2, torch.bfloat16, True), (2, dtype, False)):
        case = make_case([0, 65], heads=(1, 2), segment_chunks=segment_chunks, normalize=True, has_state=is_whole)
        inputs = {name: x.to(rounded if name in case.rounded else x.dtype) for name, x in case.inputs.items()}
        tensors = [inputs.get(name) for name in ("q", "k", "v", "g", "beta", "initial_state")]
        row = (on_host(case.options["cu_seqlens"]), case.options["scale"], True)
        arguments = (*tensors, *row, is_whole, segment_chunks)
        o, final_state, before, maps = ops.gated_delta_fwd(*arguments)
        d_final = final_state if is_whole else None
        backward = (o, d_final, *tensors, before, maps, *row, segment_chunks)
        leaves = tuple(
            x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
        )
        found = torch.library.opcheck(ops.gated_delta_fwd.default, leaves, raise_exception=False)
        tests = ("test_schema", "test_faketensor")
        found |= {
            f"{test} of the backward op": result
            for test, result in torch.library.opcheck(
                ops.gated_delta_bwd.default, backward, test_utils=tests, raise_exception=False
            ).items()
        }
        failures |= {f"{test}, {rounded}": result for test, result in found.items() if result != "SUCCESS"}
    if failures:
        raise RuntimeError(failures)
    return {"failures": float(len(failures))}


def looped_graph(dtype: torch.dtype) -> Figures:
    """Graphs of two loops around the op, compiled forward and backward, and how far that is from running them: without
    final states, with one of them used, and with nothing else used."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from loopline.kernels.gated_delta.op import gated_delta

    bounds, width = [0, 30, 31, 70], 64
    weights = {name: (torch.randn(width, width) * width**-0.5).to(dtype) for name in "qkvo"}
    gates = torch.randn(width, 4) * width**-0.5

    def looped(x: Tensor, output_final_state: bool) -> tuple[Tensor, Tensor | None]:
        for _ in range(2):
            q, k, v = ((x @ weights[name]).unflatten(-1, (2, 32)) for name in "qkv")
            g, beta = (x.float() @ gates).split(2, dim=-1)
            o, final_state = gated_delta(
                q,
                k,
                v,
                g=-F.softplus(g),
                beta=beta.sigmoid(),
                scale=32**-0.5,
                cu_seqlens=bounds,
                normalize=True,
                output_final_state=output_final_state,
                backend="triton",
            )
            x = x + o.flatten(2) @ weights["o"]
        return x, final_state

    uses: tuple[Callable[..., Tensor], ...] = (
        lambda x: looped(x, False)[0].float().square().sum(),
        lambda x: sum(y.float().square().sum() for y in looped(x, True)),
        lambda x: looped(x, True)[1].square().sum(),
    )
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(1, bounds[-1], width).to(dtype).requires_grad_()
    difference = 0.0
    for use in uses:
        results = [
            (loss, *torch.autograd.grad(loss, x))
            for loss in (use(x), torch.compile(use, fullgraph=True, backend=counter)(x))
        ]
        difference += sum(float((found - expected).abs().max()) for found, expected in zip(*results))
    return {"graphs": float(counter.frame_count), "difference": difference}


# Figures of their own.
CLAIMS: dict[str, tuple[Callable[[torch.dtype], Figures], Figures]] = {
    "differing_bits": (differing_bits, {"numbers": 0.0}),
    "operator_contract": (operator_contract, {"failures": 0.0}),
    "looped_graph": (looped_graph, {"graphs": 3.0, "difference": 0.0}),
}


if __name__ == "__main__":
    compared: dict[tuple[str, str], Callable[[torch.dtype], Figures]] = {
        (name, dtype): partial(run, name) for name, dtype in CASES
    }
    report(compared | {(name, "fp32"): claim for name, (claim, _) in CLAIMS.items()})
