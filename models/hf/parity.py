"""What an export was held to: how far its logits are from the training model's."""

from dataclasses import dataclass

# Decoding sums in another order than the forward pass, and Gated DeltaNet's output norm can magnify fp32 rounding a
# thousandfold: measured up to 5e-4 (8e-13 in fp64). Wrong caches were off by 1.5 and 4.7.
CACHED_FACTOR = 1000.0


@dataclass(frozen=True)
class ParityReport:
    """How close the reloaded export came to the training model, in fp32, with the exported weights on both sides.

    Attributes:
        max_diff: greatest |difference| of logits after 1, 2, ... n_loops + 1 loops.
        max_diff_cached: the same after n_loops loops, decoding from the cache, rows padded on the left among them.
        max_logit: greatest |logit|, for scale.
        tolerance: what max_diff does not exceed; max_diff_cached does not exceed CACHED_FACTOR times it.
        dtype: dtype of the stored weights.
    """

    max_diff: tuple[float, ...]
    max_diff_cached: float
    max_logit: float
    tolerance: float
    dtype: str
