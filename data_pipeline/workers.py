"""Worker processes for the builder: each gets the task once, then items one by one, until there are none.

A worker that dies is an error at once, naming its item; nothing waits for it. Workers end when the main process does,
however that ends, so no orphan goes on writing. `concurrent.futures` leaves orphans waiting for ever after a SIGKILL of
the main process, hence this.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeVar

from loopline.data_pipeline.errors import DataError

Item = TypeVar("Item")


def run_items(task: Callable[[Item], None], items: Sequence[Item], n_workers: int) -> Generator[int, None, None]:
    """Runs the task on every item; yields each item's index when it is done, in whatever order that is.

    Args:
        task: picklable where n_workers > 0; its DataError is raised here.
        items: picklable likewise.
        n_workers: processes; 0 runs everything in this one, in order.
    Raises:
        DataError: the task's own; a worker died (killed, out of memory).
    """
    if n_workers == 0:
        for index, item in enumerate(items):
            task(item)
            yield index
        return
    # spawn: a fork would copy the threads' locks of tokenizers and pyarrow in whatever state they are.
    context = multiprocessing.get_context("spawn")
    waiting = iter(range(len(items)))
    current: dict[Connection, int] = {}
    workers: dict[Connection, SpawnProcess] = {}

    def hand_out(connection: Connection) -> None:
        index = next(waiting, None)
        if index is not None:
            current[connection] = index
            connection.send(items[index])

    try:
        for _ in range(min(n_workers, len(items))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(task, theirs), daemon=True)
            worker.start()
            theirs.close()  # the worker's death must be the end of the pipe
            workers[ours] = worker
        for connection in workers:
            _guarded(hand_out, connection, workers, current, items)
        while current:
            for ready in wait(list(current)):
                assert isinstance(ready, Connection)
                problem = _guarded(Connection.recv, ready, workers, current, items)
                if problem is not None:
                    raise DataError(problem)
                yield current.pop(ready)
                _guarded(hand_out, ready, workers, current, items)
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _guarded(act: Callable, connection: Connection, workers: dict, current: dict, items: Sequence) -> str | None:
    """`act(connection)`; a broken pipe says that the worker is gone."""
    try:
        return act(connection)
    except (EOFError, OSError):
        worker = workers[connection]
        worker.join(5)
        raise DataError(
            f"a worker process died (exit status {worker.exitcode}; -9 is a kill, often for want of memory) while it "
            f"worked on {items[current[connection]]}. Nothing is lost: run the same command again, with fewer workers "
            "if memory ran out, and it goes on from the finished parts"
        ) from None


def _serve(task: Callable[[Item], None], connection: Connection) -> None:
    """What a worker runs: receives items, answers None or the message of a DataError."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One thread each: the processes already share out the cores. The library reads this when it is called.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):  # closed: the main process is done, or has failed and says why
            return
        try:
            task(item)
            problem = None
        except DataError as error:
            problem = str(error)
        try:
            connection.send(problem)
        except OSError:  # likewise
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
