"""A real HTTP server of a folder that can be told to misbehave."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

STALL_S = 20.0

# Answers one request in place of the file's bytes.
Fault = Callable[["Handler", bytes], None]


class FaultyServer(ThreadingHTTPServer):
    """Serves `folder`; `faults[name]` answer the next requests for a file, `always[name]` all of them."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.always: dict[str, Fault] = {}
        self.requested: list[str] = []
        self.is_closing = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data"

    def fail(self, name: str, faults: Iterable[Fault]) -> None:
        self.faults[name].extend(faults)

    def count(self, name: str) -> int:
        return self.requested.count(f"/data/{name}")

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        name = self.path.removeprefix("/data/")
        file = self.server.folder / name
        body = file.read_bytes() if "/" not in name and file.is_file() else None
        queue = self.server.faults[name]
        fault = queue.popleft() if queue else self.server.always.get(name)
        if fault is not None:
            fault(self, body or b"")
        elif body is None:
            self.answer(404)
        else:
            self.answer(200, body)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", *, n_claimed: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if n_claimed is None else n_claimed))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def stall(self) -> None:
        """Holds the connection open without a byte, until the test is over."""
        self.wfile.flush()
        self.server.is_closing.wait(STALL_S)
        self.hang_up()

    def log_message(self, format: str, *args: object) -> None:
        pass


def status(code: int) -> Fault:
    return lambda handler, body: handler.answer(code)


def stall_before_headers(handler: Handler, body: bytes) -> None:
    handler.stall()


def stall_mid_body(handler: Handler, body: bytes) -> None:
    handler.answer(200, body[: len(body) // 2], n_claimed=len(body))
    handler.stall()


def drip(handler: Handler, body: bytes) -> None:
    """A byte now and then: no read ever times out."""
    handler.answer(200, b"", n_claimed=len(body))
    while not handler.server.is_closing.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def drop_before_headers(handler: Handler, body: bytes) -> None:
    handler.hang_up()


def drop_mid_body(handler: Handler, body: bytes) -> None:
    handler.answer(200, body[: len(body) // 2], n_claimed=len(body))
    handler.hang_up()


def short_body(handler: Handler, body: bytes) -> None:
    """Cut short, and honest about the length it has."""
    handler.answer(200, body[:-1000])


def short_body_of_unknown_length(handler: Handler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body[:-1000])
    handler.hang_up()


def long_body(handler: Handler, body: bytes) -> None:
    handler.answer(200, body + b"more")


def endless_body(handler: Handler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while not handler.server.is_closing.is_set():
        handler.wfile.write(bytes(2**20))


def flipped_bit(handler: Handler, body: bytes) -> None:
    middle = len(body) // 2
    handler.answer(200, body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :])


def login_page(handler: Handler, body: bytes) -> None:
    handler.answer(200, b"<html>please sign in</html>")


def redirect(target: str) -> Fault:
    return lambda handler, body: handler.answer(302, Location=target)


def redirect_to_itself(handler: Handler, body: bytes) -> None:
    handler.answer(302, Location=handler.path)


def slow(seconds: float) -> Fault:
    """Half at once, the rest later."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.answer(200, body[: len(body) // 2], n_claimed=len(body))
        handler.wfile.flush()
        time.sleep(seconds)
        handler.wfile.write(body[len(body) // 2 :])

    return fault


def steady(seconds: float) -> Fault:
    """All of it, in ten parts."""

    def fault(handler: Handler, body: bytes) -> None:
        handler.answer(200, b"", n_claimed=len(body))
        step = -(-len(body) // 10)
        for start in range(0, len(body), step):
            handler.wfile.write(body[start : start + step])
            handler.wfile.flush()
            time.sleep(seconds / 10)

    return fault


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.is_closing.set()
            server.shutdown()
            thread.join()
