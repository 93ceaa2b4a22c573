"""What "auto" takes: the order of an op's backends, for GPUs on which it was measured and for any other device.

A row of MEASURED is printed by `python -m loopline.kernels.bench` on that GPU and committed with its figures in
docs/benchmarks.md. No kernel is chosen by timing it in a run: two ranks, or two starts, could then choose differently.
"""

# GPU, as torch names it -> op -> backends, fastest first. Empty: no GPU has been measured yet.
MEASURED: dict[str, dict[str, tuple[str, ...]]] = {}

# Taken only where measured, or asked for by name: correct under Triton's interpreter says nothing of a GPU's compiler,
# and FlexAttention compiles for minutes when a run starts.
ONLY_ON_REQUEST = ("triton", "flex")


def preferred(op: str, backends: tuple[str, ...], gpu: str | None) -> tuple[str, ...]:
    """The backends that "auto" may take, best first.

    Args:
        backends: all the op has, in its own order.
        gpu: its name; None on a CPU.
    """
    measured = MEASURED.get(gpu or "", {}).get(op)
    return measured or tuple(name for name in backends if name not in ONLY_ON_REQUEST)
