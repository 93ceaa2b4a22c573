"""The order in which blocks run. Forward, pipeline cut, recompute, FLOPs and cache slots all read it; torch-free."""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One application of a block.

    Attributes:
        block_idx: which weights.
        loop_idx: which pass over the stack.
    """

    block_idx: int
    loop_idx: int


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """`n_loops` passes over a stack of `n_blocks` blocks."""

    n_blocks: int
    n_loops: int

    def steps(self) -> list[Step]:
        """Every block application, in order of depth."""
        return [Step(b, r) for r in range(self.n_loops) for b in range(self.n_blocks)]

    @property
    def depth(self) -> int:
        """Block applications in one forward pass."""
        return self.n_blocks * self.n_loops

    def slot(self, step: Step) -> int:
        """Cache slot of a step: one for every (loop, block), loops outermost."""
        return step.loop_idx * self.n_blocks + step.block_idx

    def stage_blocks(self, n_stages: int) -> list[range]:
        """Blocks each pipeline stage keeps. Where they do not divide evenly the earlier stages take one more, because
        the last stage also runs the head.

        Raises:
            ValueError: fewer blocks than stages.
        """
        if n_stages > self.n_blocks:
            raise ValueError(f"{self.n_blocks} blocks cannot fill {n_stages} stages")
        base, extra = divmod(self.n_blocks, n_stages)
        starts = [s * base + min(s, extra) for s in range(n_stages + 1)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]
