"""The training stream: lanes, their seeded order, and the batches a data-parallel rank takes from them.

A chain of small generators, each yielding `(item, state)` in the style of Meta Lingua: windows of records -> documents
-> packed sequences (`packing.py`). A state is a small dict of plain JSON from which the chain is built again at the
cost of reading one window, never by replay.

The global stream is cut into `n_lanes` logical lanes. Rank d of D serves the lanes l with l % D == d, and every step
takes the same number of sequences from every lane. So a global batch is the same for every D that divides n_lanes, and
a run may resume on another D.

Order, per epoch e: the records of the split are permuted by (seed, e) and dealt round robin, lane l taking places
l, l + n_lanes, ... . A lane takes its records `shuffle_records` at a time (a window) and permutes all documents of the
window by (seed, e, lane, window). Lanes pass into their next epoch independently; over all lanes every document of the
split is read exactly once in epoch e. Mixtures and prefetching are not here yet.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np

from loopline.data_pipeline.batch import Batch
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.packing import (
    DocumentPosition,
    PackedSequence,
    TokenPosition,
    pack_concatenated,
    padding_sequence,
)
from loopline.data_pipeline.shards import SplitReader

DEFAULT_SHUFFLE_RECORDS = 4


class WindowPosition(TypedDict):
    """Which window of a lane."""

    epoch: int
    window: int


class LaneState(TokenPosition):
    """All a lane needs to go on. `stream` names the order it belongs to, so that no other order takes it up."""

    stream: str
    lane: int


@lru_cache(maxsize=8)
def record_order(n_records: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the records in an epoch, [n_records], read-only. Every lane of a rank shares it."""
    order = seeded_permutation(n_records, "records", seed, epoch)
    order.setflags(write=False)
    return order


def seeded_permutation(n: int, *key: str | int) -> np.ndarray:
    """A permutation of range(n), [n], int64, that is a pure function of n and `key`.

    The first 16 bytes of blake2b over the JSON of `key` are the key of a Philox generator; the order is that of its
    first n raw 64-bit outputs. Raw outputs of a bit generator are what numpy promises never to change (NEP 19); its
    `Generator.permutation` may.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(raw, kind="stable")


class LaneStream:
    """The endless packed sequences of one lane; yields `(PackedSequence, LaneState)`."""

    def __init__(
        self,
        reader: SplitReader,
        *,
        seed: int,
        n_lanes: int,
        lane: int,
        seq_len: int,
        shuffle_records: int = DEFAULT_SHUFFLE_RECORDS,
        state: LaneState | None = None,
    ) -> None:
        """Opens the lane at `state`, or at its beginning; reads no record yet.

        Args:
            reader: of the split; lanes may share one.
            shuffle_records: records per window; documents are shuffled within a window.
            state: as an earlier stream of this lane yielded it; seq_len alone may differ from that stream's.
        Raises:
            DataError: a bad setting; fewer records than lanes; a state of another stream.
        """
        _check_at_least_one(seq_len=seq_len, n_lanes=n_lanes, shuffle_records=shuffle_records)
        if not 0 <= lane < n_lanes:
            raise DataError(f"lane={lane} must be from 0 to n_lanes - 1 = {n_lanes - 1}; name one of those")
        if reader.n_records < n_lanes:
            raise DataError(
                f"too few documents for the batch: split {reader.split!r} of {reader.manifest.path} has "
                f"{reader.n_records} records for {n_lanes} lanes, and every lane needs one. Lower data.lanes to "
                f"{reader.n_records} or less, or build the data with a smaller record_tokens"
            )
        self._reader = reader
        self._seed = seed
        self._n_lanes = n_lanes
        self._lane = lane
        self._shuffle_records = shuffle_records
        self._seq_len = seq_len
        self._stream = _stream_id(reader, seed, n_lanes, shuffle_records)
        self.state = self._start() if state is None else self._checked(state)
        self._sequences = pack_concatenated(self._iter_documents(), seq_len, offset=self.state["offset"])

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[PackedSequence, LaneState]:
        """The next sequence, and the state after it.

        Raises:
            DataError: a damaged shard; a state that points past the lane's data.
        """
        sequence, position = next(self._sequences)
        self.state = {**position, "stream": self._stream, "lane": self._lane}
        return sequence, self.state

    def _start(self) -> LaneState:
        return {"stream": self._stream, "lane": self._lane, "epoch": 0, "window": 0, "document": 0, "offset": 0}

    def _iter_windows(self) -> Iterator[tuple[list[np.ndarray], WindowPosition]]:
        epoch, window = self.state["epoch"], self.state["window"]
        while True:
            records = record_order(self._reader.n_records, self._seed, epoch)[self._lane :: self._n_lanes]
            for start in range(window * self._shuffle_records, len(records), self._shuffle_records):
                window = start // self._shuffle_records
                chunk = records[start : start + self._shuffle_records]
                documents = [document for record in chunk for document in self._reader.documents(int(record))]
                order = seeded_permutation(len(documents), "documents", self._seed, epoch, self._lane, window)
                yield [documents[i] for i in order], {"epoch": epoch, "window": window}
            epoch, window = epoch + 1, 0

    def _iter_documents(self) -> Iterator[tuple[np.ndarray, DocumentPosition]]:
        state, is_first = self.state, True
        for documents, position in self._iter_windows():
            first = state["document"] if is_first else 0
            is_misplaced = position != {"epoch": state["epoch"], "window": state["window"]}
            if is_first and (is_misplaced or first >= len(documents)):
                raise DataError(_bad_state(state, "it points past the lane's data"))
            for i in range(first, len(documents)):
                yield documents[i], {**position, "document": i}
            is_first = False

    def _checked(self, state: Mapping[str, Any]) -> LaneState:
        start = self._start()
        if set(state) != set(start):
            raise DataError(_bad_state(state, f"its fields must be {', '.join(sorted(start))}"))
        if state["stream"] != self._stream:
            raise DataError(
                _bad_state(
                    state,
                    f"it belongs to stream {state['stream']!r}, this is {self._stream!r}: the data, the split, "
                    "data.seed, data.lanes or data.shuffle_records changed",
                )
            )
        # `type`, not isinstance: True is no position.
        if any(type(value) is not int or value < 0 for name, value in state.items() if name != "stream"):
            raise DataError(_bad_state(state, "its positions must be integers >= 0"))
        if state["lane"] != self._lane:
            raise DataError(_bad_state(state, f"it was given to lane {self._lane}"))
        return LaneState(
            stream=self._stream,
            lane=self._lane,
            epoch=state["epoch"],
            window=state["window"],
            document=state["document"],
            offset=state["offset"],
        )


class GlobalBatchStream:
    """One data-parallel rank's batches, one per step, for ever.

    The order inside a global batch: sequence k of lane l is number k * n_lanes + l; a rank has its lanes' numbers, in
    rising order, with k below `global_batch_sequences / n_lanes`.
    """

    def __init__(
        self,
        manifest: Manifest | str | Path,
        *,
        split: str = "train",
        seed: int,
        seq_len: int,
        n_lanes: int,
        global_batch_sequences: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        shuffle_records: int = DEFAULT_SHUFFLE_RECORDS,
        states: Mapping[int | str, LaneState] | None = None,
    ) -> None:
        """Opens the lanes of this rank; reads no record yet.

        Args:
            manifest: a manifest, its path, or its folder.
            states: lane -> state, at least for the lanes of this rank: the union of what the ranks of a run on any
                dp_size gave as `state_dict`. Keys may be strings, as JSON has them. None starts at the beginning.
        Raises:
            DataError: a bad setting (n_lanes not a multiple of dp_size, global_batch_sequences not a multiple of
                n_lanes, ...); fewer records than lanes; a shard missing or cut short; states that do not fit.
        """
        _check_at_least_one(
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
        _check_rank(dp_rank, dp_size)
        self.manifest = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
        self._n_lanes = n_lanes
        self._lanes = range(dp_rank, n_lanes, dp_size)
        by_lane = None if states is None else {int(lane): state for lane, state in states.items()}
        if by_lane is not None and not set(self._lanes) <= set(by_lane):
            raise DataError(
                f"data state lacks lanes {sorted(set(self._lanes) - set(by_lane))} of {n_lanes}; "
                "give the union of the states of every data-parallel rank of the saved run"
            )
        reader = SplitReader(self.manifest, split)
        self._streams = [
            LaneStream(
                reader,
                seed=seed,
                n_lanes=n_lanes,
                lane=lane,
                seq_len=seq_len,
                shuffle_records=shuffle_records,
                state=None if by_lane is None else by_lane[lane],
            )
            for lane in self._lanes
        ]
        self._states = {stream.state["lane"]: stream.state for stream in self._streams}
        self._sequences_per_lane = global_batch_sequences // n_lanes

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next step's batch.

        Raises:
            DataError: a damaged shard. `state_dict` then still describes the last batch that was returned.
        """
        turns = [(k, stream) for k in range(self._sequences_per_lane) for stream in self._streams]
        sequences = [next(stream)[0] for _, stream in turns]
        self._states = {stream.state["lane"]: stream.state for stream in self._streams}
        return Batch.stack(sequences, [k * self._n_lanes + stream.state["lane"] for k, stream in turns])

    def state_dict(self) -> dict[int, LaneState]:
        """Lane -> state for the lanes of this rank, after exactly the batches returned so far. Plain JSON values."""
        return {lane: state.copy() for lane, state in self._states.items()}


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
    _check_at_least_one(seq_len=seq_len, batch_sequences=batch_sequences, dp_size=dp_size)
    if max_batches is not None:
        _check_at_least_one(max_batches=max_batches)
    _check_multiple("batch_sequences", batch_sequences, "dp_size", dp_size, "set it to a multiple")
    _check_rank(dp_rank, dp_size)
    opened = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
    reader = SplitReader(opened, split)

    def iter_documents() -> Iterator[tuple[np.ndarray, DocumentPosition]]:
        for record in range(reader.n_records):
            for i, document in enumerate(reader.documents(record)):
                yield document, {"epoch": 0, "window": record, "document": i}

    def iter_batches() -> Iterator[Batch]:
        sequences = pack_concatenated(iter_documents(), seq_len, pad_id=opened.eos_id)
        padding = padding_sequence(seq_len, opened.eos_id)
        mine = range(dp_rank, batch_sequences, dp_size)
        n_batches = 0
        while n_batches != max_batches:
            rows = [sequence for sequence, _ in islice(sequences, batch_sequences)]
            if not rows:
                return
            rows += [padding] * (batch_sequences - len(rows))
            yield Batch.stack([rows[i] for i in mine], mine)
            n_batches += 1

    return iter_batches()


def _stream_id(reader: SplitReader, seed: int, n_lanes: int, shuffle_records: int) -> str:
    """Names an order of tokens. seq_len is not part of it: a run may go on with longer sequences."""
    parts = [reader.manifest.content_sha256(reader.split), reader.split, seed, n_lanes, shuffle_records]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _bad_state(state: Mapping[str, Any], problem: str) -> str:
    return (
        f"data state {dict(state)} does not fit: {problem}. Resume with the settings and data of the saved run, "
        "or start without data state"
    )


def _check_at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise DataError(f"{name}={value} must be 1 or more; raise it")


def _check_multiple(name: str, value: int, of_name: str, of_value: int, fix: str) -> None:
    if value % of_value:
        raise DataError(f"{name}={value} must be a multiple of {of_name}={of_value}; {fix}")


def _check_rank(dp_rank: int, dp_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank={dp_rank} must be from 0 to dp_size - 1 = {dp_size - 1}; pass this rank's own place")
