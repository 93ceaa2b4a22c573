"""Looped blocks on our Triton kernels against the same blocks on the references, and compiled as one graph.

Run as `python -m tests.unit.kernels.blocks_interpreted` from the root with TRITON_INTERPRET=1.
"""

from functools import partial

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from loopline.models.context import RowContext
from loopline.models.looped_lm import LoopedLM, run_step
from loopline.models.packing import Packing
from loopline.models.settings.dsa import SparseAttentionConfig
from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.gdn import GatedDeltaConfig
from loopline.models.settings.window import WindowAttentionConfig
from tests.tolerances import rms_ratio
from tests.unit.kernels.interpreted import Figures, report
from tests.unit.models.model_cases import make_config, moved_model

ROWS = [[0, 1, 66, 70], [0, 70], [0, 4, 5, 69, 70]]
HEADS = {"n_heads": 2, "n_kv_heads": 1, "d_head": 16}
SETTINGS = {
    "gdn": GatedDeltaConfig(n_heads=2, d_head_k=32, d_head_v=64),
    "full": FullAttentionConfig(**HEADS),
    "window": WindowAttentionConfig(**HEADS, window=17),
    "dsa": SparseAttentionConfig(**HEADS, top_k=8, index_n_heads=2, index_d_head=16, index_d_rope=8),
}


def model_on(mixer: str, backend: str, dtype: torch.dtype) -> LoopedLM:
    """One block of a mixer, two loops: a loop more runs it on what a loop has left."""
    settings = SETTINGS[mixer].model_copy(update={"backend": backend})
    return moved_model(make_config(pattern=mixer, n_blocks=1, n_loops=2, **{mixer: settings}), dtype)


def results(model: LoopedLM, cu_seqlens: list[int]) -> dict[str, Tensor]:
    """Output of the looped blocks and every gradient, an indexer's of its own loss with them."""
    row = RowContext(Packing.of(cu_seqlens, "cpu"), n_loops=2, auxiliary_scale=0.1)
    generator = torch.Generator().manual_seed(5)
    h = x = torch.randn(1, cu_seqlens[-1], model.config.d_model, generator=generator).requires_grad_()
    for loop_idx in range(2):
        h = model.run_blocks(h, loop_idx, row)
    upstream = torch.randn(h.shape, generator=generator)
    used = {name: p for name, p in model.blocks.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((h * upstream).sum(), [x, *used.values()], allow_unused=True)
    return {"o": h.detach(), **{n: g for n, g in zip(["x", *used], gradients) if g is not None}}


def ratios(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """RMS error ratio of the output, and of all gradients together."""
    assert found.keys() == expected.keys()
    scaled = [
        torch.cat([(r[key] / expected[key].square().mean().sqrt()).flatten() for key in expected if key != "o"])
        for r in (found, expected)
    ]
    return rms_ratio(found["o"], expected["o"]), rms_ratio(*scaled)


def figures(mixer: str, dtype: torch.dtype) -> Figures:
    """Errors of the blocks on our kernels; the same of compiled blocks, the worst of several rows; and the graphs that
    were compiled for rows beyond the second."""
    graphs = CompileCounterWithBackend("aot_eager")
    eager, compiled = model_on(mixer, "triton", dtype), model_on(mixer, "triton", dtype)
    compiled.run_step = torch.compile(run_step, fullgraph=True, backend=graphs)
    expected = results(model_on(mixer, "reference", dtype), ROWS[0])
    plain = [results(eager, cu_seqlens) for cu_seqlens in ROWS]
    found = dict(zip(("eager o", "eager gradients"), ratios(plain[0], expected)))
    errors, n_graphs = [], []
    for cu_seqlens, uncompiled in zip(ROWS, plain):
        errors.append(ratios(results(compiled, cu_seqlens), uncompiled))
        n_graphs.append(graphs.frame_count)
    worst = dict(zip(("compiled o", "compiled gradients"), map(max, zip(*errors))))
    return {**found, **worst, "graphs of other rows": float(n_graphs[-1] - n_graphs[1])}


CASES = [(mixer, "fp32") for mixer in SETTINGS]

if __name__ == "__main__":
    report({(mixer, dtype): partial(figures, mixer) for mixer, dtype in CASES})
