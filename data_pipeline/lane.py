"""One lane of the training stream: its seeded order of documents, packed, and the state it goes on from.

Two generators in the style of Meta Lingua: windows of records -> windows of packed sequences (`packing.py`). A state is
a small dict of plain JSON from which they are built again at the cost of reading one window, never by replay. How lanes
make batches is `stream.py`.

Order, per epoch e: the records of the split are permuted by (seed, e), all together or shard by shard, and dealt round
robin to the lanes. A lane takes its records `shuffle_records` at a time (a window) and permutes all documents of the
window by (seed, e, lane, window). Best-fit packing packs a window by itself and permutes its sequences by the same key.
Lanes pass into their next epoch independently; over all lanes every document of the split is read exactly once in
epoch e.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, islice, repeat
from typing import Any, Final, Literal, Self

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.packing import (
    Packed,
    PackedSequence,
    Place,
    Window,
    fill_sequences,
    pack_concatenated,
    plan_best_fit,
)
from loopline.data_pipeline.shards import SplitReader

DEFAULT_SHUFFLE_RECORDS: Final = 4
Packing = Literal["concat", "carry", "best_fit"]
Shuffle = Literal["records", "shards"]
# What a lane goes on from, plain JSON: `stream`, the name of the order it belongs to, so that no other order takes it
# up; `lane`; `epoch` and `window`; then `document` and `offset` of the next token where documents are concatenated, or
# `sequence`, the number already taken of the window's packing, with best fit.
LaneState = dict[str, Any]


@lru_cache(maxsize=8)
def record_order(n_records: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of the records in an epoch, [n_records], read-only. Every lane of a rank shares it."""
    order = seeded_permutation(n_records, "records", seed, epoch)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=8)
def shard_order(records_by_shard: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """The records in an epoch, [n_records], read-only: shard after shard in a permuted order, each one's permuted."""
    first = [0, *accumulate(records_by_shard)]
    shards = seeded_permutation(len(records_by_shard), "shards", seed, epoch).tolist()
    order = np.concatenate(
        [first[shard] + seeded_permutation(records_by_shard[shard], "shard", seed, epoch, shard) for shard in shards]
    )
    order.setflags(write=False)
    return order


def lane_records(
    records_by_shard: tuple[int, ...], shuffle: Shuffle, seed: int, epoch: int, lane: int, n_lanes: int
) -> np.ndarray:
    """The records of one lane in an epoch, in its order.

    Args:
        shuffle: 'records' permutes all records, and lane l takes places l, l + n_lanes, ... . 'shards' permutes shards
            and the records inside each, so that lanes that are as far read the same one or two; dealing goes on where
            the epoch before ended, or the lanes that get one record more would fall behind epoch by epoch.
    """
    if shuffle == "records":
        return record_order(sum(records_by_shard), seed, epoch)[lane::n_lanes]
    order = shard_order(records_by_shard, seed, epoch)
    return order[(lane - epoch * len(order)) % n_lanes :: n_lanes]


def seeded_permutation(n: int, *key: str | int) -> np.ndarray:
    """A permutation of range(n), [n], int64, that is a pure function of n and `key`.

    The first 16 bytes of blake2b over the JSON of `key` are the key of a Philox generator; the order is that of its
    first n raw 64-bit outputs. Raw outputs of a bit generator are what numpy promises never to change (NEP 19); its
    `Generator.permutation` may.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return _PHILOX.raw(digest, n).argsort(kind="stable")


class _Philox(threading.local):
    """A generator that takes key after key: making one costs eight times as much, for numpy then asks for entropy."""

    def __init__(self) -> None:
        self._generator = np.random.Philox(key=0)
        self._start = self._generator.state

    def raw(self, key: bytes, n: int) -> np.ndarray:
        """The first n outputs under a key of 16 bytes, [n], uint64."""
        self._start["state"]["key"][:] = np.frombuffer(key, "<u8")
        self._generator.state = self._start
        return self._generator.random_raw(n)


_PHILOX = _Philox()


class LaneStream:
    """The packed sequences of one lane; yields `(PackedSequence, LaneState)`, for ever or for some epochs."""

    def __init__(
        self,
        reader: SplitReader,
        *,
        seed: int,
        n_lanes: int,
        lane: int,
        seq_len: int,
        shuffle_records: int = DEFAULT_SHUFFLE_RECORDS,
        shuffle: Shuffle = "records",
        packing: Packing = "concat",
        max_epochs: int | None = None,
        state: LaneState | None = None,
    ) -> None:
        """Opens the lane at `state`, or at its beginning; reads no record yet.

        Args:
            reader: of the split; lanes may share one.
            shuffle_records: records per window; documents are shuffled, and packed by best fit, within a window.
            shuffle: see `lane_records`.
            max_epochs: end after as many; the last concatenated sequence is filled with eos. None never ends.
            state: as an earlier stream of this lane yielded it. max_epochs may differ from that stream's, and so may
                seq_len where documents are concatenated.
        Raises:
            DataError: a bad setting; fewer records than lanes; a state of another stream.
        """
        check_at_least_one(seq_len=seq_len, n_lanes=n_lanes, shuffle_records=shuffle_records)
        if max_epochs is not None:
            check_at_least_one(max_epochs=max_epochs)
        if packing not in ("concat", "carry", "best_fit"):
            raise DataError(f"packing={packing!r} is unknown; use 'concat', 'carry' or 'best_fit'")
        if shuffle not in ("records", "shards"):
            raise DataError(f"shuffle={shuffle!r} is unknown; use 'records' or 'shards'")
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
        self._shuffle: Shuffle = shuffle
        self._seq_len = seq_len
        place = ("sequence",) if packing == "best_fit" else ("document", "offset")
        self._state_fields = ("stream", "lane", "epoch", "window", *place)
        self._max_epochs = max_epochs
        self.stream_id = _stream_id(reader, seed, n_lanes, shuffle_records, shuffle, packing, seq_len)
        self.state = self._start() if state is None else self._checked(state)
        self._packed = self._iter_best_fit() if packing == "best_fit" else self._iter_concatenated()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[PackedSequence, LaneState]:
        """The next sequence, and the state after it.

        Raises:
            StopIteration: `max_epochs` were read.
            DataError: a damaged shard; a state that points past the lane's data.
        """
        return self.take(1)[0], self.state

    def take(self, n_sequences: int) -> list[PackedSequence]:
        """One step's sequences.

        Raises:
            StopIteration, DataError: see `__next__`.
        """
        packed = list(islice(self._packed, n_sequences))
        if len(packed) < n_sequences:
            raise StopIteration
        self.state = dict(zip(self._state_fields, (self.stream_id, self._lane, *packed[-1][1])))
        return [sequence for sequence, _ in packed]

    def _start(self) -> LaneState:
        return {**dict.fromkeys(self._state_fields, 0), "stream": self.stream_id, "lane": self._lane}

    def _iter_windows(self) -> Iterator[Window]:
        epoch, window = self.state["epoch"], self.state["window"]
        while self._max_epochs is None or epoch < self._max_epochs:
            records = lane_records(
                self._reader.records_by_shard, self._shuffle, self._seed, epoch, self._lane, self._n_lanes
            )
            if window * self._shuffle_records >= len(records):
                raise DataError(_bad_state(self.state, "it points past the lane's data"))
            for start in range(window * self._shuffle_records, len(records), self._shuffle_records):
                window = start // self._shuffle_records
                chunk = records[start : start + self._shuffle_records]
                documents = [document for record in chunk for document in self._reader.documents(int(record))]
                order = seeded_permutation(len(documents), "documents", self._seed, epoch, self._lane, window)
                yield Window(epoch, window, [documents[i] for i in order.tolist()])
            epoch, window = epoch + 1, 0

    def _iter_concatenated(self) -> Iterator[Packed]:
        start = Place(self.state["document"], self.state["offset"])
        # Only a stream that ends fills its last sequence.
        pad_id = None if self._max_epochs is None else self._reader.manifest.eos_id
        return pack_concatenated(self._iter_windows(), self._seq_len, start=start, pad_id=pad_id)

    def _iter_best_fit(self) -> Iterator[Packed]:
        taken = self.state["sequence"]
        for epoch, window, documents in self._iter_windows():
            plan = plan_best_fit([len(document) for document in documents], self._seq_len)
            if taken > len(plan):
                raise DataError(_bad_state(self.state, "it points past the lane's data"))
            # Without this the fullest sequences, which hold the longest documents, would come first.
            order = seeded_permutation(len(plan), "sequences", self._seed, epoch, self._lane, window)
            shuffled = map(plan.__getitem__, order[taken:].tolist())
            sequences = fill_sequences(documents, shuffled, self._seq_len, self._reader.manifest.eos_id)
            yield from zip(sequences, zip(repeat(epoch), repeat(window), range(taken + 1, len(plan) + 1)))
            taken = 0

    def _checked(self, state: Mapping[str, Any]) -> LaneState:
        start = self._start()
        if state.get("stream", self.stream_id) != self.stream_id:
            raise DataError(
                _bad_state(
                    state,
                    f"it belongs to stream {state['stream']!r}, this is {self.stream_id!r}: the data, the split, "
                    "data.shuffle, data.packing, data.seed, data.lanes or data.shuffle_records changed",
                )
            )
        if set(state) != set(start):
            raise DataError(_bad_state(state, f"its fields must be {', '.join(sorted(start))}"))
        # `type`, not isinstance: True is no position.
        if any(type(value) is not int or value < 0 for name, value in state.items() if name != "stream"):
            raise DataError(_bad_state(state, "its positions must be integers >= 0"))
        if state["lane"] != self._lane:
            raise DataError(_bad_state(state, f"it was given to lane {self._lane}"))
        return dict(state)


def _stream_id(
    reader: SplitReader,
    seed: int,
    n_lanes: int,
    shuffle_records: int,
    shuffle: Shuffle,
    packing: Packing,
    seq_len: int,
) -> str:
    """Names an order of sequences. seq_len is part of it with best fit only: a run that concatenates may go on with
    longer sequences. 'carry' is the order of 'concat'."""
    parts = [reader.manifest.content_sha256(reader.split), reader.split, seed, n_lanes, shuffle_records]
    parts += [] if shuffle == "records" else [shuffle]
    parts += [packing, seq_len] if packing == "best_fit" else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _bad_state(state: Mapping[str, Any], problem: str) -> str:
    return (
        f"data state {dict(state)} does not fit: {problem}. Resume with the settings and data of the saved run, "
        "or start without data state"
    )


def check_at_least_one(**settings: int) -> None:
    """Raises DataError where a setting is below 1."""
    for name, value in settings.items():
        if value < 1:
            raise DataError(f"{name}={value} must be 1 or more; raise it")
