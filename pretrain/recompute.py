"""Recomputation per (block, loop): loops multiply activations, so what is kept is chosen step by step of the plan."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loopline.models.block import Block
from loopline.models.loop_plan import Step
from loopline.models.looped_lm import RunStep, run_step
from loopline.models.packing import Packing


def recomputing(loops: frozenset[int] | None) -> RunStep:
    """A `run_step` that keeps only the inputs of blocks in `loops` (None: all) and rebuilds the rest in backward."""

    def run(block: Block, step: Step, x: Tensor, packing: Packing) -> Tensor:
        if x.requires_grad and (loops is None or step.loop_idx in loops):
            return checkpoint(block, x, packing, use_reentrant=False, preserve_rng_state=False)
        return run_step(block, step, x, packing)

    return run
