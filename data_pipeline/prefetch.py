"""The lanes of one rank, read where they are used or ahead of it in worker processes.

`LaneGroup` reads some lanes in this process. `PrefetchedLanes` deals a rank's lanes to worker processes, each with a
`LaneGroup` that reads ahead; every step comes with the states after it, so that the state of the rank is that of the
steps it was given, not of those read ahead. Which worker serves a lane changes nothing that the lane gives.

A worker ends with its parent: it waits for the parent's end beside its work. It leaves signals to the parent, which
finishes its step first. Workers are spawned, so a script that uses them keeps its work under
`if __name__ == "__main__":`.
"""

import atexit
import multiprocessing
import os
import queue
import signal
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import NamedTuple

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import LaneState, LaneStream, Packing, Shuffle
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.mixture import Mixture, MixtureLane, sources_of
from loopline.data_pipeline.packing import PackedSequence
from loopline.data_pipeline.shards import SplitReader

DEPTH = 2
TIMEOUT_S = 1500.0  # below train.hang_timeout_s, so that a stop ends with a message and not with stacks


@dataclass(frozen=True)
class LaneSettings:
    """What every lane of a stream has in common; see `GlobalBatchStream`."""

    data: Manifest | Mixture
    split: str
    seed: int
    seq_len: int
    n_lanes: int
    sequences_per_lane: int
    shuffle_records: int
    shuffle: Shuffle
    packing: Packing
    step: int


class Taken(NamedTuple):
    """One step of some lanes: their sequences, and the states after it."""

    sequences: dict[int, list[PackedSequence]]
    states: dict[int, LaneState]


class Sent(NamedTuple):
    """A step on its way through a pipe, which moves one large array far faster than many small ones.

    Attributes:
        rows: [S, T+1], the inputs of all sequences and the token after them, as stored.
        rest: the step without them.
    """

    rows: np.ndarray
    rest: Taken

    @classmethod
    def of(cls, taken: Taken) -> "Sent":
        sequences = [sequence for each in taken.sequences.values() for sequence in each]
        rows = np.concatenate([part for sequence in sequences for part in sequence.parts])
        emptied = {lane: [each._replace(parts=[]) for each in given] for lane, given in taken.sequences.items()}
        return cls(rows.reshape(len(sequences), -1), taken._replace(sequences=emptied))

    def taken(self) -> Taken:
        rows = iter(self.rows)
        filled = {
            lane: [each._replace(parts=[next(rows)]) for each in given] for lane, given in self.rest.sequences.items()
        }
        return self.rest._replace(sequences=filled)


class LaneGroup:
    """Some lanes, read in this process."""

    def __init__(self, settings: LaneSettings, lanes: Sequence[int], states: Mapping[int, LaneState] | None) -> None:
        """Opens the lanes; reads no record yet.

        Raises:
            DataError: see `GlobalBatchStream`.
        """
        self._n_sequences = settings.sequences_per_lane
        data = settings.data
        manifests = [source.manifest for source in data.sources] if isinstance(data, Mixture) else [data]
        readers = [SplitReader(manifest, settings.split) for manifest in manifests]
        self._lanes = {
            lane: _open_lane(settings, readers, lane, None if states is None else states[lane]) for lane in lanes
        }
        self.opened = Taken({}, self._states())

    def take(self) -> Taken:
        """The next step's sequences.

        Raises:
            DataError: a damaged shard; used-up data.
        """
        sequences = {lane: stream.take(self._n_sequences) for lane, stream in self._lanes.items()}
        return Taken(sequences, self._states())

    def close(self) -> None:
        """Nothing is held."""

    def _states(self) -> dict[int, LaneState]:
        return {lane: stream.state for lane, stream in self._lanes.items()}


def _open_lane(
    settings: LaneSettings, readers: Sequence[SplitReader], lane: int, state: LaneState | None
) -> LaneStream | MixtureLane:
    def stream(reader: SplitReader, state: LaneState | None, max_epochs: int | None = None) -> LaneStream:
        return LaneStream(
            reader,
            seed=settings.seed,
            n_lanes=settings.n_lanes,
            lane=lane,
            seq_len=settings.seq_len,
            shuffle_records=settings.shuffle_records,
            shuffle=settings.shuffle,
            packing=settings.packing,
            max_epochs=max_epochs,
            state=state,
        )

    if isinstance(settings.data, Manifest):
        return stream(readers[0], state)
    saved = {} if state is None else sources_of(state)
    streams = []
    for source, reader in zip(settings.data.sources, readers):
        opened = stream(reader, None, source.max_epochs)
        if opened.stream_id in saved:
            opened = stream(reader, saved[opened.stream_id]["state"], source.max_epochs)
        streams.append(opened)
    missing = set(saved) - {each.stream_id for each in streams}
    if missing:
        raise DataError(
            f"data state of lane {lane} has sources {', '.join(sorted(missing))} that this mixture lacks: a source was "
            "removed (keep it and give it weight 0), or its data, the split, data.shuffle, data.packing, data.seed, "
            "data.lanes or data.shuffle_records changed"
        )
    step = settings.step if state is None else state.get("step", settings.step)
    return MixtureLane(settings.data, streams, lane=lane, seq_len=settings.seq_len, step=step, states=saved)


class PrefetchedLanes:
    """A rank's lanes, read ahead by worker processes. Workers start with the first step."""

    def __init__(
        self,
        settings: LaneSettings,
        lanes: Sequence[int],
        states: Mapping[int, LaneState] | None,
        *,
        n_workers: int,
        depth: int = DEPTH,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Opens the lanes once here, so that bad settings and states are refused at once.

        Args:
            n_workers: at least 1; more than there are lanes start none.
            depth: steps waiting here from each worker; each reads one or two more.
            timeout_s: longest wait for a step.
        """
        self.opened = LaneGroup(settings, lanes, states).opened
        parts = [lanes[i::n_workers] for i in range(min(n_workers, len(lanes)))]
        self._tasks = [(settings, part, self.opened.states) for part in parts]
        self._depth = depth
        self._timeout_s = timeout_s
        self._workers: list[_Worker] = []
        self._failure: DataError | None = None
        self._end = weakref.finalize(self, _kill, self._workers)
        # Before multiprocessing's own exit handler, which would wait for workers that nothing ends.
        self._end.atexit = False
        atexit.register(self._end)

    def take(self) -> Taken:
        """The next step's sequences.

        Raises:
            DataError: as `LaneGroup.take`; a worker that ended or gave nothing for `timeout_s`. All later calls fail
                alike.
        """
        if self._failure is not None:
            raise self._failure
        if not self._workers:
            self._workers += [_Worker(*task, self._depth) for task in self._tasks]
        try:
            parts = [worker.take(self._timeout_s) for worker in self._workers]
        except DataError as error:
            self._failure = error
            self.close()
            raise
        return Taken(
            {lane: sequences for part in parts for lane, sequences in part.sequences.items()},
            {lane: state for part in parts for lane, state in part.states.items()},
        )

    def close(self) -> None:
        """Ends the workers."""
        self._end()
        atexit.unregister(self._end)
        self._failure = self._failure or DataError("the stream is closed; open another one")

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in self._workers]


class _Worker:
    """One worker process and the thread that takes its steps in."""

    def __init__(
        self, settings: LaneSettings, lanes: Sequence[int], states: Mapping[int, LaneState], depth: int
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads and device state of training
        self._receiver, sender = context.Pipe(duplex=False)
        self._lanes = list(lanes)
        mine = {lane: states[lane] for lane in lanes}
        self._process = context.Process(
            target=_work, args=(sender, settings, self._lanes, mine), name="loopline-data", daemon=True
        )
        self._process.start()
        sender.close()  # the worker's copy is the only one, so its death ends the pipe
        assert self._process.pid is not None
        self.pid = self._process.pid
        self._steps: queue.Queue[Taken | str] = queue.Queue(depth)
        self._is_closed = threading.Event()
        threading.Thread(
            target=_receive, args=(self._receiver, self._steps, self._is_closed), name="loopline-data", daemon=True
        ).start()

    def take(self, timeout_s: float) -> Taken:
        try:
            step = self._steps.get(timeout=timeout_s)
        except queue.Empty:
            raise DataError(
                f"data worker {self.pid} (lanes {self._lanes}) gave nothing for {timeout_s:g} s: the storage of the "
                "data hangs, or the machine has no time for it. Check the storage, or set data.workers = 0"
            ) from None
        if isinstance(step, Taken):
            return step
        if step:
            raise DataError(step)
        self._process.join(timeout=10)
        raise DataError(
            f"data worker {self.pid} (lanes {self._lanes}) ended with exit code {self._process.exitcode}"
            f"{_cause(self._process.exitcode)}. Restart the run: it goes on from its newest checkpoint"
        )

    def kill(self) -> None:
        self._is_closed.set()
        self._process.kill()
        self._process.join()


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f" (signal {signal.Signals(-exit_code).name}; out of memory ends processes by SIGKILL)"
    return "; its traceback is on stderr"


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()


def _receive(receiver: connection.Connection, steps: "queue.Queue[Taken | str]", is_closed: threading.Event) -> None:
    """Steps from the pipe into the bounded queue, until the worker ends; then an error's text, '' without one."""
    item: Taken | str = ""
    is_open = True
    while is_open:
        try:
            item = receiver.recv()
            if isinstance(item, Sent):
                item = item.taken()
        except (EOFError, OSError):
            item = ""
        is_open = isinstance(item, Taken)
        while not is_closed.is_set():
            try:
                steps.put(item, timeout=0.5)
                break
            except queue.Full:
                continue
        else:
            is_open = False
    receiver.close()


def _work(
    sender: connection.Connection, settings: LaneSettings, lanes: list[int], states: dict[int, LaneState]
) -> None:
    """A worker: gives step after step, as far ahead as the pipe and the queue behind it hold."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        group = LaneGroup(settings, lanes, states)
        while True:
            sender.send(Sent.of(group.take()))
    except DataError as error:
        sender.send(str(error))
    except BrokenPipeError:  # the parent is gone
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The sentinel alone would stay open in a process that the parent had forked off and left behind.
    while os.getppid() == parent.pid and not connection.wait([parent.sentinel], timeout=1.0):
        pass
    os._exit(1)
