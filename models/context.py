"""What goes with a packed row on its way through the loops: its layout, and what one loop leaves for later ones."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loopline.models.deferred import Deferred, Left, deliver
from loopline.models.packing import Packing


@dataclass(slots=True)
class RowContext:
    """One packed row (a micro-batch). It lives on the stage that holds a block and never crosses stages.

    Attributes:
        packing: documents and positions.
        n_loops: passes the row will make.
        auxiliary_scale: factor on the gradient of losses that mixers add of their own (an indexer's), the one the
            language-model loss has; None where nothing is trained.
        memory: by block, what its earlier loops left in this row. A block recomputed in backward writes the same again.
        is_measured: whether mixers record figures that cost extra, at evaluations.
        draw: what a mixer that samples draws by: the same in every layout, after a resumption and when a block is
            recomputed, another for every row.
        deferred: what the block that ran last wants delivered at its output; see `deferred.py`.
        figures: by name, numerator and denominator for the logs; see `BlockContext.record`.
    """

    packing: Packing
    n_loops: int
    auxiliary_scale: float | None = None
    is_measured: bool = False
    draw: int = 0
    memory: dict[int, dict[Any, Any]] = field(default_factory=dict)
    deferred: list[Deferred] = field(default_factory=list)
    figures: dict[str, dict[tuple[int, int], tuple[Tensor, Tensor | int]]] = field(default_factory=dict)

    def delivered(self, h: Tensor, h_in: Tensor) -> Tensor:
        """A block's output, [1, T, C], with what it deferred; `h_in` is its input."""
        for each in self.deferred:
            h = deliver(h, h_in, each)
        self.deferred.clear()
        return h

    def at(self, block_idx: int, loop_idx: int) -> "BlockContext":
        """The view of one application of one block."""
        return BlockContext(self, self.memory.setdefault(block_idx, {}), block_idx, loop_idx)

    def sums(self, name: str) -> tuple[float, float]:
        """Numerator and denominator of a figure over every block and loop of this row. Waits for the device."""
        found = self.figures.get(name, {}).values()
        return sum(float(numerator) for numerator, _ in found), sum(float(denominator) for _, denominator in found)


@dataclass(slots=True)
class BlockContext:
    """One application of one block to a row: what a mixer may know beyond its input.

    Attributes:
        memory: this block's, shared by its loops.
        loop_idx: which pass.
    """

    row: RowContext
    memory: dict[Any, Any]
    block_idx: int
    loop_idx: int

    @property
    def packing(self) -> Packing:
        """Documents and positions of the row."""
        return self.row.packing

    def defer(self, tensors: tuple[Tensor, ...], left: Left) -> None:
        """Leave something for later loops of this block, whose gradients for `tensors` are delivered in backward."""
        self.memory[self.loop_idx] = left
        self.row.deferred.append((tensors, self.memory, self.loop_idx))

    def record(self, name: str, numerator: Tensor, denominator: Tensor | int) -> None:
        """Keep a figure for the logs: a ratio of sums over tokens. By block and loop, so that a recomputed block does
        not count twice."""
        self.row.figures.setdefault(name, {})[self.block_idx, self.loop_idx] = (numerator, denominator)
