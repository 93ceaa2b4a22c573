"""The training stream: the batches a data-parallel rank takes from lanes, and held-out batches.

The global stream is cut into `n_lanes` logical lanes (`lane.py`). Rank d of D serves the lanes l with l % D == d, and
every step takes the same number of sequences from every lane. So a global batch is the same for every D that divides
n_lanes, and a run may resume on another D. A lane reads one data set, or several by weight (`mixture.py`), in this
process or ahead of it in workers (`prefetch.py`).
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from loopline.data_pipeline.batch import Batch
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import DEFAULT_SHUFFLE_RECORDS, LaneState, Packing, Shuffle, check_at_least_one
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.mixture import Mixture, sources_of
from loopline.data_pipeline.packing import Window, pack_concatenated, padding_sequence
from loopline.data_pipeline.prefetch import LaneGroup, LaneSettings, PrefetchedLanes
from loopline.data_pipeline.shards import SplitReader

log = logging.getLogger(__name__)


class GlobalBatchStream:
    """One data-parallel rank's batches, one per step, for ever.

    The order inside a global batch: sequence k of lane l is number k * n_lanes + l; a rank has its lanes' numbers, in
    rising order, with k below `global_batch_sequences / n_lanes`.
    """

    def __init__(
        self,
        manifest: Manifest | Mixture | str | Path,
        *,
        split: str = "train",
        seed: int,
        seq_len: int,
        n_lanes: int,
        global_batch_sequences: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        shuffle_records: int = DEFAULT_SHUFFLE_RECORDS,
        shuffle: Shuffle = "records",
        packing: Packing = "concat",
        workers: int = 0,
        states: Mapping[int | str, LaneState] | None = None,
        step: int = 0,
    ) -> None:
        """Opens the lanes of this rank; reads no record yet.

        Args:
            manifest: a manifest, its path, or its folder; or a mixture of manifests.
            shuffle: what an epoch permutes: all 'records', or 'shards' and the records inside each, for corpora that
                are larger than the cache of their shards.
            packing: 'concat' lays documents end to end; 'carry' does so with one lane for each sequence of a batch, so
                that a sequence goes on where the one at its place in the batch before ended; 'best_fit' cuts only
                documents longer than seq_len.
            workers: processes that read ahead for this rank; 0 reads in this one. They start with the first batch,
                end with this process or `close`, and change nothing but time.
            states: lane -> state, at least for the lanes of this rank: the union of what the ranks of a run on any
                dp_size gave as `state_dict`. Keys may be strings, as JSON has them. None starts at the beginning.
                A mixture goes on from the states of a mixture with fewer sources, or of a run with one of them.
            step: steps done before `states`, where they are of a run with one data set; a mixture's states know.
        Raises:
            DataError: a bad setting (n_lanes not a multiple of dp_size, global_batch_sequences not a multiple of
                n_lanes, 'carry' with other lanes or several sources, ...); fewer records than lanes; a shard missing or
                cut short; states that do not fit.
        """
        check_at_least_one(
            seq_len=seq_len, n_lanes=n_lanes, global_batch_sequences=global_batch_sequences, dp_size=dp_size
        )
        _check_multiple("n_lanes", n_lanes, "dp_size", dp_size, "set data.lanes to a multiple of it")
        _check_multiple(
            "global_batch_sequences",
            global_batch_sequences,
            "n_lanes",
            n_lanes,
            "lanes take equal parts, change either",
        )
        if packing == "carry":
            _check_carry(manifest, n_lanes, global_batch_sequences)
        _check_rank(dp_rank, dp_size)
        if workers < 0:
            raise DataError(f"workers={workers} must be 0 or more; raise it")
        self.data = Manifest.load(manifest) if isinstance(manifest, str | Path) else manifest
        self._lanes = range(dp_rank, n_lanes, dp_size)
        # Sequence k of lane l is number k * n_lanes + l.
        self._global_index = np.add.outer(np.arange(0, global_batch_sequences, n_lanes), self._lanes).ravel()
        by_lane = None if states is None else {int(lane): state for lane, state in states.items()}
        if by_lane is not None and not set(self._lanes) <= set(by_lane):
            raise DataError(
                f"data state lacks lanes {sorted(set(self._lanes) - set(by_lane))} of {n_lanes}; "
                "give the union of the states of every data-parallel rank of the saved run"
            )
        settings = LaneSettings(
            data=self.data,
            split=split,
            seed=seed,
            seq_len=seq_len,
            n_lanes=n_lanes,
            sequences_per_lane=global_batch_sequences // n_lanes,
            shuffle_records=shuffle_records,
            shuffle=shuffle,
            packing=packing,
            step=step,
        )
        self._settings = settings
        self._group = (
            PrefetchedLanes(settings, self._lanes, by_lane, n_workers=workers)
            if workers
            else LaneGroup(settings, self._lanes, by_lane)
        )
        self._states = self._group.opened.states

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            DataError: a damaged shard; used-up sources; a worker that ended. `state_dict` then still describes the
                last batch that was returned.
        """
        taken = self._group.take()
        self._log_ended(taken.states)
        self._states = taken.states
        by_lane = [taken.sequences[lane] for lane in self._lanes]
        return Batch.stack([sequence for turn in zip(*by_lane) for sequence in turn], self._global_index)

    def state_dict(self) -> dict[int, LaneState]:
        """Lane -> state for the lanes of this rank, after exactly the batches returned so far. Plain JSON values."""
        return copy.deepcopy(self._states)

    @property
    def epoch(self) -> int:
        """The latest epoch that any lane of this rank, or any source of it, has begun."""
        places = [source["state"] for state in self._states.values() for source in sources_of(state).values()]
        return max(place["epoch"] for place in places)

    def figures(self, batch: Batch) -> dict[str, tuple[float, float]]:
        """What this rank's data looks like, as numerators and denominators to be summed over ranks.

        Returns:
            `padding_share` of the batch's tokens, where packing pads; `mix/NAME`, each source's share of the tokens
            since the weights last changed. The names are the same on every rank.
        """
        figures: dict[str, tuple[float, float]] = {}
        if self._settings.packing == "best_fit":
            figures["padding_share"] = (float(batch.n_padding.sum()), batch.tokens.size)
        if isinstance(self.data, Mixture):
            # Dicts keep their order, and a lane's state lists the sources in the mixture's.
            lanes = [list(state["sources"].values()) for state in self._states.values()]
            total = sum(source["tokens"] for lane in lanes for source in lane)
            for i, source in enumerate(self.data.sources):
                figures[f"mix/{source.name}"] = (sum(lane[i]["tokens"] for lane in lanes), total)
        return figures

    def close(self) -> None:
        """Ends the workers. A stream without any needs no closing."""
        self._group.close()

    def _log_ended(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        if not isinstance(self.data, Mixture):
            return
        for lane, state in states.items():
            before = self._states[lane]["sources"].values()
            for source, was, now in zip(self.data.sources, before, state["sources"].values()):
                if now["ended_after"] and not was["ended_after"]:
                    log.warning(
                        "lane %d has read data source %s %d times, its max_epochs: the other sources share its weight",
                        lane,
                        source.name,
                        source.max_epochs,
                    )


def heldout_batches(
    manifest: Manifest | str | Path,
    *,
    seq_len: int,
    batch_sequences: int,
    max_batches: int | None = None,
    split: str = "heldout",
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Batch]:
    """One pass over a split in the manifest's order, packed like training, for evaluation.

    Every token of the split is an input once (unless `max_batches` ends the pass). Every batch has the same shape and
    every rank the same number of batches: what is missing at the end is filled with eos as segments of their own with
    labels -100, so the last batch, and a rank's share of it, may have n_valid == 0.

    Args:
        manifest: a manifest, its path, or its folder.
        batch_sequences: sequences per batch over all ranks; rank d of D gets sequences d, d + D, ... of each.
        max_batches: stop after as many; None for all.
    Raises:
        DataError: a bad setting, at the call; a damaged shard, while iterating.
    """
    check_at_least_one(seq_len=seq_len, batch_sequences=batch_sequences, dp_size=dp_size)
    if max_batches is not None:
        check_at_least_one(max_batches=max_batches)
    _check_multiple("batch_sequences", batch_sequences, "dp_size", dp_size, "set it to a multiple")
    _check_rank(dp_rank, dp_size)
    opened = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
    reader = SplitReader(opened, split)

    def iter_batches() -> Iterator[Batch]:
        windows = (Window(0, record, reader.documents(record)) for record in range(reader.n_records))
        packed = pack_concatenated(windows, seq_len, pad_id=opened.eos_id)
        sequences = (sequence for sequence, _ in packed)
        padding = padding_sequence(seq_len, opened.eos_id, opened.dtype)
        mine = range(dp_rank, batch_sequences, dp_size)
        n_batches = 0
        while n_batches != max_batches:
            rows = list(islice(sequences, batch_sequences))
            if not rows:
                return
            rows += [padding] * (batch_sequences - len(rows))
            yield Batch.stack([rows[i] for i in mine], mine)
            n_batches += 1

    return iter_batches()


def _check_carry(data: object, n_lanes: int, global_batch_sequences: int) -> None:
    if n_lanes != global_batch_sequences:
        raise DataError(
            f"packing='carry' with n_lanes={n_lanes} and global_batch_sequences={global_batch_sequences}: every place "
            f"of a batch must be a lane of its own; set data.lanes = {global_batch_sequences}"
        )
    if isinstance(data, Mixture) and len(data.sources) > 1:
        names = ", ".join(source.name for source in data.sources)
        raise DataError(
            f"packing='carry' with data.sources {names}: a lane takes every sequence from another source, so none goes "
            "on where the one before ended; give one source, or set data.packing = 'concat'"
        )


def _check_multiple(name: str, value: int, of_name: str, of_value: int, fix: str) -> None:
    if value % of_value:
        raise DataError(f"{name}={value} must be a multiple of {of_name}={of_value}; {fix}")


def _check_rank(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank={dp_rank} must be from 0 to dp_size - 1 = {dp_size - 1}; pass this rank's own place")
