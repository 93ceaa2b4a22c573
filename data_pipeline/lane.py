"""One lane of the training stream: its seeded order of documents, packed, and the state it goes on from.

A chain of small generators in the style of Meta Lingua: windows of records -> documents -> packed sequences
(`packing.py`), each item with the state after it. A state is a small dict of plain JSON from which the chain is built
again at the cost of reading one window, never by replay. How lanes make batches is `stream.py`.

Order, per epoch e: the records of the split are permuted by (seed, e) and dealt round robin, lane l taking places
l, l + n_lanes, ... . A lane takes its records `shuffle_records` at a time (a window) and permutes all documents of the
window by (seed, e, lane, window). Best-fit packing packs a window by itself and permutes its sequences by the same key.
Lanes pass into their next epoch independently; over all lanes every document of the split is read exactly once in
epoch e.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, Self, TypedDict

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.packing import (
    DocumentPosition,
    PackedSequence,
    fill_sequence,
    pack_concatenated,
    plan_best_fit,
)
from loopline.data_pipeline.shards import SplitReader

DEFAULT_SHUFFLE_RECORDS: Final = 4
Packing = Literal["concat", "best_fit"]
# What a lane goes on from, plain JSON: `stream`, the name of the order it belongs to, so that no other order takes it
# up; `lane`; `epoch` and `window`; then `document` and `offset` of the next token where documents are concatenated, or
# `sequence`, the number already taken of the window's packing, with best fit.
LaneState = dict[str, Any]


class WindowPosition(TypedDict):
    """Which window of a lane."""

    epoch: int
    window: int


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
        packing: Packing = "concat",
        max_epochs: int | None = None,
        state: LaneState | None = None,
    ) -> None:
        """Opens the lane at `state`, or at its beginning; reads no record yet.

        Args:
            reader: of the split; lanes may share one.
            shuffle_records: records per window; documents are shuffled, and packed by best fit, within a window.
            max_epochs: end after as many; the last concatenated sequence is filled with eos. None never ends.
            state: as an earlier stream of this lane yielded it. max_epochs may differ from that stream's, and so may
                seq_len where documents are concatenated.
        Raises:
            DataError: a bad setting; fewer records than lanes; a state of another stream.
        """
        check_at_least_one(seq_len=seq_len, n_lanes=n_lanes, shuffle_records=shuffle_records)
        if max_epochs is not None:
            check_at_least_one(max_epochs=max_epochs)
        if packing not in ("concat", "best_fit"):
            raise DataError(f"packing={packing!r} is unknown; use 'concat' or 'best_fit'")
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
        self._packing = packing
        self._max_epochs = max_epochs
        self.stream_id = _stream_id(reader, seed, n_lanes, shuffle_records, packing, seq_len)
        self.state = self._start() if state is None else self._checked(state)
        self._sequences = self._iter_concatenated() if packing == "concat" else self._iter_best_fit()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[PackedSequence, LaneState]:
        """The next sequence, and the state after it.

        Raises:
            StopIteration: `max_epochs` were read.
            DataError: a damaged shard; a state that points past the lane's data.
        """
        sequence, position = next(self._sequences)
        self.state = {**position, "stream": self.stream_id, "lane": self._lane}
        return sequence, self.state

    def take(self, n_sequences: int) -> list[PackedSequence]:
        """One step's sequences.

        Raises:
            DataError: see `__next__`.
        """
        return [next(self)[0] for _ in range(n_sequences)]

    @property
    def epoch(self) -> int:
        """Epoch of the last sequence."""
        return self.state["epoch"]

    def _start(self) -> LaneState:
        place = {"document": 0, "offset": 0} if self._packing == "concat" else {"sequence": 0}
        return {"stream": self.stream_id, "lane": self._lane, "epoch": 0, "window": 0, **place}

    def _iter_windows(self) -> Iterator[tuple[list[np.ndarray], WindowPosition]]:
        epoch, window = self.state["epoch"], self.state["window"]
        while self._max_epochs is None or epoch < self._max_epochs:
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
            if is_first and (self._is_misplaced(position, state) or first >= len(documents)):
                raise DataError(_bad_state(state, "it points past the lane's data"))
            for i in range(first, len(documents)):
                yield documents[i], {**position, "document": i}
            is_first = False

    def _iter_concatenated(self) -> Iterator[tuple[PackedSequence, Mapping[str, int]]]:
        # Only a stream that ends fills its last sequence.
        pad_id = None if self._max_epochs is None else self._reader.manifest.eos_id
        yield from pack_concatenated(  # type: ignore[misc]  # a TypedDict of ints is such a mapping
            self._iter_documents(), self._seq_len, offset=self.state["offset"], pad_id=pad_id
        )

    def _iter_best_fit(self) -> Iterator[tuple[PackedSequence, Mapping[str, int]]]:
        state, is_first = self.state, True
        for documents, position in self._iter_windows():
            plan = plan_best_fit([len(document) for document in documents], self._seq_len)
            taken = state["sequence"] if is_first else 0
            if is_first and (self._is_misplaced(position, state) or taken > len(plan)):
                raise DataError(_bad_state(state, "it points past the lane's data"))
            # Without this the fullest sequences, which hold the longest documents, would come first.
            key = (self._seed, position["epoch"], self._lane, position["window"])
            order = seeded_permutation(len(plan), "sequences", *key)
            for i in range(taken, len(plan)):
                sequence = fill_sequence(documents, plan[order[i]], self._seq_len, self._reader.manifest.eos_id)
                yield sequence, {"epoch": position["epoch"], "window": position["window"], "sequence": i + 1}
            is_first = False

    def _is_misplaced(self, position: WindowPosition, state: LaneState) -> bool:
        return position != {"epoch": state["epoch"], "window": state["window"]}

    def _checked(self, state: Mapping[str, Any]) -> LaneState:
        start = self._start()
        if state.get("stream", self.stream_id) != self.stream_id:
            raise DataError(
                _bad_state(
                    state,
                    f"it belongs to stream {state['stream']!r}, this is {self.stream_id!r}: the data, the split, "
                    "data.packing, data.seed, data.lanes or data.shuffle_records changed",
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
    reader: SplitReader, seed: int, n_lanes: int, shuffle_records: int, packing: Packing, seq_len: int
) -> str:
    """Names an order of sequences. seq_len is part of it with best fit only: a run that concatenates may go on with
    longer sequences."""
    parts = [reader.manifest.content_sha256(reader.split), reader.split, seed, n_lanes, shuffle_records]
    parts += [] if packing == "concat" else [packing, seq_len]
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
