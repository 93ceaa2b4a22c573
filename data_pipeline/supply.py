"""Whether the sources of a mixture last a run, from the manifests alone and before a batch is read.

Every lane has its own records, other ones in every epoch, so one may run out while the whole still has tokens. A lane's
tokens are exact. How the sources shared them is exact too while the weights stay as they are; over `data.schedule` it
is known to a few sequences, and these are taken as used. With best-fit packing padding is not counted on, so a run
that padding would carry over the end is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import Shuffle, lane_records
from loopline.data_pipeline.mixture import Mixture, Source

# Between two moments under the same weights a source gives its share to within so many sequences: one at either end
# (`mixture.choose_source`), and its last one, which may be short.
_OFF_SHARE = 3


@dataclass(frozen=True)
class _Phase:
    """Steps with the same weights: the first, the sequences every lane gives in them, the sources' weights."""

    step: int
    n_sequences: int
    weights: np.ndarray

    @property
    def active(self) -> np.ndarray:
        return self.weights > 0


def check_supply(
    mixture: Mixture,
    states: Mapping[int, Mapping[str, Any]],
    *,
    seed: int,
    seq_len: int,
    sequences_per_lane: int,
    step: int,
    n_steps: int,
    shuffle: Shuffle = "records",
) -> None:
    """Refuses a run in which a lane would have no source left.

    Costs nothing where a source without `max_epochs` has a weight at every step; else a sum over the records per epoch.

    Args:
        states: of every lane, as `GlobalBatchStream.state_dict` of a single rank gives them after `step` steps.
        sequences_per_lane: in one step.
        n_steps: where the run ends.
    Raises:
        DataError: it names the lane that ends first, and about when.
    """
    phases = _phases(mixture, sequences_per_lane, step, n_steps)
    is_endless = np.array([source.max_epochs is None for source in mixture.sources])
    if all((phase.active & is_endless).any() for phase in phases):
        return
    n_needed = sum(phase.n_sequences for phase in phases)
    left = np.full((len(states), len(mixture.sources)), np.inf)  # [n_lanes, n_sources], sequences
    for i, source in enumerate(mixture.sources):
        if source.max_epochs is not None:
            given = np.array([_given(states[lane], i, seq_len * sequences_per_lane) for lane in sorted(states)])
            left[:, i] = _sequences_left(source, given, n_needed, seed, seq_len, shuffle)
    shortages = [(found, lane) for lane in range(len(left)) if (found := _shortage(left[lane], phases)) is not None]
    if not shortages:
        return
    (n_lasting, phase), lane = min(shortages, key=lambda each: (each[0][1].step, each[0][0]))
    names = ", ".join(source.name for source, is_active in zip(mixture.sources, phase.active) if is_active)
    raise DataError(
        f"data.sources run out in lane {lane} of {len(left)} at step {phase.step + n_lasting // sequences_per_lane} or "
        f"soon after, the run ends at step {n_steps}: from step {phase.step} on {names}, each read max_epochs times, "
        f"are sure to have {n_lasting} sequences of {seq_len} tokens there, and {phase.n_sequences} are needed. Raise "
        "max_epochs in data.sources, add a source, let one have no max_epochs, or lower train.steps"
    )


def _phases(mixture: Mixture, sequences_per_lane: int, step: int, n_steps: int) -> list[_Phase]:
    starts = [step, *sorted(start for start in mixture.schedule if step < start < n_steps)]
    return [
        _Phase(start, (end - start) * sequences_per_lane, np.array(mixture.weights_at(start), np.float64))
        for start, end in zip(starts, [*starts[1:], n_steps])
        if start < end
    ]


def _given(state: Mapping[str, Any], source_idx: int, tokens_per_step: int) -> int:
    """Tokens that a lane has taken from a source."""
    sources = list(state["sources"].values())
    given = [source["total_tokens"] for source in sources]
    if any(given):
        return given[source_idx]
    # Taken over from a run with one data set, whose states hold no count: the source that is past its beginning.
    place = sources[source_idx]["state"]
    has_begun = any(value for name, value in place.items() if name not in ("stream", "lane"))
    return state["step"] * tokens_per_step if has_begun else 0


def _sequences_left(
    source: Source, given: np.ndarray, n_needed: int, seed: int, seq_len: int, shuffle: Shuffle
) -> np.ndarray:
    """Sequences a source has for each lane, [n_lanes], as float; of those past `n_needed` maybe not all.

    Args:
        given: [n_lanes], int64, tokens that are taken already.
    """
    assert source.max_epochs is not None
    tables = [shard.records.table for shard in source.manifest.split("train").shards]
    lengths = np.concatenate([table[:, 1] for table in tables])  # [n_records], int64
    records_by_shard = tuple(map(len, tables))
    n_lanes = len(given)
    tokens = np.zeros(n_lanes, np.int64)
    for epoch in range(source.max_epochs):
        for lane in range(n_lanes):
            tokens[lane] += lengths[lane_records(records_by_shard, shuffle, seed, epoch, lane, n_lanes)].sum()
        if (tokens - given >= n_needed * seq_len).all():
            break
    return np.maximum(-(-(tokens - given) // seq_len), 0).astype(np.float64)


def _shortage(left: np.ndarray, phases: Sequence[_Phase]) -> tuple[int, _Phase] | None:
    """The phase that a lane's sources do not last, and the sequences they surely have for it; None where all do.

    Args:
        left: [n_sources], sequences; infinite without `max_epochs`.
    """
    at_first, error = left, 1.0  # error: most that an entry of `left` may be wrong by
    for i, phase in enumerate(phases):
        active = phase.active
        n_shared = sum(earlier.n_sequences for earlier in phases[:i] if (earlier.active & active).any())
        n_lasting = max(at_first[active].sum() - n_shared, left[active].sum() - error * active.sum(), 0)
        if n_lasting < phase.n_sequences:
            return int(n_lasting), phase
        due = phase.weights * _duration(left, phase)  # what a source would give if none ended
        # Sources that end in this phase do so a little earlier or later than here, and the others bear the difference.
        may_end = (left - due)[active].min() <= error + _OFF_SHARE
        n = int(active.sum())
        error = (n + 1) * (error + n * _OFF_SHARE) if may_end else error + _OFF_SHARE
        left = np.maximum(left - due, 0)
    return None


def _duration(left: np.ndarray, phase: _Phase) -> float:
    """t with sum(min(left, weights * t)) = phase.n_sequences: shares by weight, where sources that end leave theirs."""
    n, weight = float(phase.n_sequences), phase.weights.sum()
    active = np.flatnonzero(phase.active)
    for i in active[np.argsort(left[active] / phase.weights[active])]:
        if left[i] * weight >= n * phase.weights[i]:
            return n / weight
        n, weight = n - left[i], weight - phase.weights[i]
    return float((left[active] / phase.weights[active]).max())  # all end together, but for rounding
