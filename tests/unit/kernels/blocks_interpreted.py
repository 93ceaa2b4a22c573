"""Looped blocks on our Triton kernels against the same blocks on the references, and compiled as one graph.

Run as `python -m tests.unit.kernels.blocks_interpreted` from the root with TRITON_INTERPRET=1.
"""

from functools import partial

import torch
from torch import Tensor

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

CU_SEQLENS = [0, 1, 66, 97]
HEADS = {"n_heads": 2, "n_kv_heads": 1, "d_head": 16}
SETTINGS = {
    "gdn": GatedDeltaConfig(n_heads=2, d_head_k=32, d_head_v=64),
    "full": FullAttentionConfig(**HEADS),
    "window": WindowAttentionConfig(**HEADS, window=17),
    "dsa": SparseAttentionConfig(**HEADS, top_k=8, index_n_heads=2, index_d_head=16, index_d_rope=8),
}


def model_on(mixer: str, backend: str, dtype: torch.dtype) -> LoopedLM:
    """Two blocks of a mixer, two loops."""
    settings = SETTINGS[mixer].model_copy(update={"backend": backend})
    return moved_model(make_config(pattern=mixer, n_loops=2, **{mixer: settings}), dtype)


def results(model: LoopedLM, *, is_compiled: bool) -> dict[str, Tensor]:
    """Output of the looped blocks and every gradient, an indexer's of its own loss with them."""
    row = RowContext(Packing.of(CU_SEQLENS, "cpu"), n_loops=2, auxiliary_scale=0.1)
    generator = torch.Generator().manual_seed(5)
    h = x = torch.randn(1, CU_SEQLENS[-1], model.config.d_model, generator=generator).requires_grad_()
    if is_compiled:
        model.run_step = torch.compile(run_step, fullgraph=True, backend="aot_eager")
    for loop_idx in range(2):
        h = model.run_blocks(h, loop_idx, row)
    upstream = torch.randn(h.shape, generator=generator)
    used = {name: p for name, p in model.blocks.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((h * upstream).sum(), [x, *used.values()], allow_unused=True)
    return {"o": h.detach(), **{n: g for n, g in zip(["x", *used], gradients) if g is not None}}


def figures(mixer: str, dtype: torch.dtype) -> Figures:
    """RMS error ratio of the output and of all parameters' gradients together; the same of the compiled blocks."""
    expected = results(model_on(mixer, "reference", dtype), is_compiled=False)
    found = {
        name: results(model_on(mixer, "triton", dtype), is_compiled=name == "compiled") for name in ("eager", "compiled")
    }
    together = {}
    for name, result in found.items():
        assert result.keys() == expected.keys()
        together[f"{name} o"] = rms_ratio(result["o"], expected["o"])
        scaled = [
            torch.cat([(r[key] / expected[key].square().mean().sqrt()).flatten() for key in expected if key != "o"])
            for r in (result, expected)
        ]
        together[f"{name} gradients"] = rms_ratio(*scaled)
    return together


CASES = [(mixer, "fp32") for mixer in SETTINGS]

if __name__ == "__main__":
    report({(mixer, dtype): partial(figures, mixer) for mixer, dtype in CASES})
