"""Recomputation per (block, loop): loops multiply activations, so what is kept is chosen step by step of the plan."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopline.models.block import Block
from loopline.models.context import BlockContext
from loopline.models.looped_lm import RunStep, run_step


def recomputing(loops: frozenset[int] | None) -> RunStep:
    """A `run_step` that keeps only the inputs of blocks in `loops` (None: all) and rebuilds the rest in backward."""

    def run(block: Block, x: Tensor, context: BlockContext) -> Tensor:
        if x.requires_grad and (loops is None or context.loop_idx in loops):
            return checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
        return run_step(block, x, context)

    return run
