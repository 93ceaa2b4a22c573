"""Bytes from a URL, through fsspec: which URLs are allowed, timeouts, retries with back-off, size and hash checks.

http(s) goes through fsspec's aiohttp file system, opened as a plain stream with explicit timeouts on connecting, on
every read, and on the whole request; fsspec's own defaults would wait 5 minutes and its block cache would ask for
ranges. s3 and gs need s3fs and gcsfs. Where the bytes are kept is `store.py`.
"""

import hashlib
import itertools
import logging
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from loopline.data_pipeline.errors import DataError

SCHEMES = ("file", "http", "https", "s3", "gs")
_CHUNK_BYTES = 2**20
# Wrong content can be a broken transfer, so it is fetched again; a file that stays wrong is the server's.
_MAX_WRONG_CONTENT = 3
_FIRST_DELAY_S, _LAST_DELAY_S = 0.5, 30.0
# Request Timeout, Too Early, Too Many Requests: the client errors that pass.
_PASSING_STATUS = (408, 425, 429)
_URL_CHARACTERS = "%/:@!$&'()*+,;=~[]"
_INSTALL = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
# A jitter of our own, so that nothing draws from the generator a run has seeded.
_jitter = random.SystemRandom()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteSettings:
    """How remote data is fetched and kept.

    Attributes:
        cache_dir: folder for the fetched files; processes of one machine share it.
        cache_bytes: most bytes of shards kept there; the least recently used go first.
        retry_timeout_s: seconds from the first request for a file to its last byte, all retries included.
        read_timeout_s: seconds without a byte, or without a connection, after which a request is given up.
        rehash_cached: hash a shard found in the cache once per process before it is read.
    """

    cache_dir: Path = field(default_factory=lambda: Path("data"))
    cache_bytes: int = 64 * 2**30
    retry_timeout_s: float = 600.0
    read_timeout_s: float = 30.0
    rehash_cached: bool = True

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "retry_timeout_s", "read_timeout_s"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name}={getattr(self, name)} must be above 0; raise it")


@dataclass(frozen=True)
class Wanted:
    """What a fetch must end with; None is not known beforehand."""

    max_bytes: int
    n_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """What a fetch took: the file's bytes, and the tries that failed before."""

    n_bytes: int
    n_failed: int


def parse_location(location: str | Path) -> str | Path:
    """A local path, or a URL as a string.

    Anything that begins like `scheme:` is taken for a URL; `file:///...` becomes a path.

    Raises:
        DataError: a scheme that is not allowed (`pipe:` among them), a chained URL, a URL that is not plain.
    """
    text = str(location)
    scheme, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return Path(location)
    # Only the scheme is shown: what follows may hold a secret.
    if scheme.lower() not in SCHEMES or rest.startswith(":"):
        raise DataError(
            f"a location that begins with {scheme + ':'!r} is refused: data comes from a local path or a URL of "
            f"{', '.join(SCHEMES)}, never from a command or a chain of file systems. "
            "For a local path with a colon write ./ before it"
        )
    scheme = scheme.lower()
    if scheme == "file":
        if not re.match(r"///[^/]", rest):
            raise DataError(f"{text!r} names no local file; write file:///absolute/path, or the path alone")
        return Path(unquote(rest.removeprefix("//")))
    if not re.fullmatch(r"//[^/@]+(/.*)?", rest) or re.search(r"[?#\\\x00-\x20\x7f]|::", rest):
        raise DataError(
            f"{shown(text)!r} is not a plain URL: {scheme}://host/folder expected, without user, password, '?', '#', "
            "'::', backslash or blank (it is written into run folders, and a query would not carry over to the other "
            "files). Give credentials through fsspec's configuration files or the cloud's own, or copy the data"
        )
    # fsspec is told that http URLs are encoded; an object store has raw keys.
    return f"{scheme}:{quote(rest, safe=_URL_CHARACTERS) if scheme.startswith('http') else rest}"


def file_url(base: str, name: str) -> str:
    """The URL of a file in the folder `base`; no name, not even one with `%2f`, leaves the folder."""
    return f"{base}/{quote(name, safe='') if base.startswith('http') else name}"


def shown(url: str) -> str:
    """The URL without what may be secret, for messages: user, password, query."""
    return re.sub(r"//[^/]*@", "//", re.sub(r"[?#].*", "", url))


def download(url: str, out: BinaryIO, wanted: Wanted, settings: RemoteSettings, deadline: float) -> "Fetched":
    """Writes the file at `url` into `out` from its start, trying again after faults that may pass.

    Faults that may pass: no connection, a stalled, dropped or short answer, status 408, 425, 429 and 5xx; wrong content
    twice. The rest ends at once.

    Args:
        out: seekable; what a failed try wrote is overwritten from the start by the next. What lay in it beyond the
            file's bytes stays.
        deadline: on `time.monotonic()`; http ends by it, s3 and gs at most one read_timeout_s later.
    Raises:
        DataError: not fetched by the deadline; refused; not the wanted content.
    """
    n_wrong = 0
    for n_failed in itertools.count():
        try:
            return Fetched(_download_once(url, out, wanted, settings, deadline), n_failed)
        except _WrongContent as error:
            problem, n_wrong = str(error), n_wrong + 1
            if n_wrong == _MAX_WRONG_CONTENT:
                raise DataError(
                    f"{shown(url)} is not what was built: {problem}, {n_wrong} times. "
                    "Upload it again from where it was built, or build the data again"
                ) from None
        except _PassingFault as error:
            problem = str(error)
        delay = min(_FIRST_DELAY_S * 2**n_failed, _LAST_DELAY_S) * _jitter.uniform(0.5, 1)
        if time.monotonic() + delay >= deadline:
            raise DataError(
                f"{shown(url)} could not be fetched in {n_failed + 1} tries within {settings.retry_timeout_s:g} s "
                f"(data.retry_timeout_s); the last one: {problem}. Check the server and the network, or raise "
                "data.retry_timeout_s"
            )
        log.warning("%s: %s; try %d follows in %.1f s", shown(url), problem, n_failed + 2, delay)
        time.sleep(delay)
    raise AssertionError("unreachable")


def remote_size(url: str, settings: RemoteSettings) -> int | None:
    """Bytes of the file as the server states them, None where it does not say; one request, no retries.

    Raises:
        DataError: no such file; no answer.
    """
    filesystem, _ = _filesystem(url, settings, time.monotonic())
    try:
        size = filesystem.info(url)["size"]
    except FileNotFoundError:
        raise DataError(_missing(url)) from None
    except Exception as error:
        raise DataError(f"{shown(url)} cannot be reached: {_described(error)}. Check the server") from error
    return None if size is None else int(size)


class MissingFile(DataError):
    """The server says that there is no such file, or shows none to us."""


class _PassingFault(Exception):
    pass


class _WrongContent(Exception):
    pass


def _download_once(url: str, out: BinaryIO, wanted: Wanted, settings: RemoteSettings, deadline: float) -> int:
    filesystem, options = _filesystem(url, settings, deadline)
    digest, n_bytes = hashlib.sha256(), 0
    out.seek(0)
    try:
        source = filesystem.open(url, "rb", **_stream_options(url), **options)
    except Exception as error:
        raise _sorted_fault(url, error) from error
    with source:
        while True:
            try:
                chunk = source.read(_CHUNK_BYTES)
            except Exception as error:
                raise _sorted_fault(url, error) from error
            if not chunk:
                break
            n_bytes += len(chunk)
            if n_bytes > wanted.max_bytes:
                raise _WrongContent(f"more than {wanted.max_bytes} bytes")
            digest.update(chunk)
            _write(out, chunk)
            if time.monotonic() >= deadline:
                raise _PassingFault(f"too slow: {n_bytes} bytes came in time")
    if wanted.n_bytes not in (None, n_bytes):
        raise _WrongContent(f"{n_bytes} bytes came, {wanted.n_bytes} expected")
    if wanted.sha256 not in (None, digest.hexdigest()):
        raise _WrongContent(f"sha256 {digest.hexdigest()} found, {wanted.sha256} expected")
    return n_bytes


def _write(out: BinaryIO, chunk: bytes) -> None:
    try:
        out.write(chunk)
    except OSError as error:
        name = getattr(out, "name", "the buffer")
        raise DataError(
            f"{name} cannot be written: {error}. Free disk space, or choose another data.cache_dir"
        ) from error


def _filesystem(url: str, settings: RemoteSettings, deadline: float) -> tuple[Any, dict[str, Any]]:
    """The fsspec file system of a URL, and the options of one request."""
    import fsspec  # here, so that local data pays for no import

    scheme = url.partition(":")[0]
    idle = settings.read_timeout_s
    try:
        if scheme in ("http", "https"):
            import aiohttp

            left = max(deadline - time.monotonic(), 0.001)
            timeouts = [
                aiohttp.ClientTimeout(total=total, connect=idle, sock_connect=idle, sock_read=idle)
                for total in (idle, left)
            ]
            # The first is the file system's own, for small requests. encoded: parse_location and file_url have quoted.
            # trust_env: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as s3 and gs read them by themselves; also ~/.netrc.
            client = {"timeout": timeouts[0], "trust_env": True}
            filesystem = fsspec.filesystem(scheme, encoded=True, client_kwargs=client)
            return filesystem, {"timeout": timeouts[1]}
        if scheme == "s3":
            retries = {"max_attempts": 0}  # ours are the retries
            config = {"connect_timeout": idle, "read_timeout": idle, "retries": retries}
            filesystem = fsspec.filesystem(scheme, config_kwargs=config, use_listings_cache=False)
            filesystem.retries = 1  # of s3fs, above those of botocore
            return filesystem, {}
        return fsspec.filesystem(scheme, timeout=idle, use_listings_cache=False), {}
    except ImportError as error:
        raise DataError(
            f"{shown(url)} needs the package {_INSTALL[scheme]} ({error}): pip install {_INSTALL[scheme]}, "
            "or copy the data to a local path"
        ) from None


def _stream_options(url: str) -> dict[str, Any]:
    if url.startswith("http"):
        # One request for the whole file. A size saves the HEAD request that block_size 0 has no use for.
        return {"block_size": 0, "size": 1}
    return {"block_size": 8 * 2**20, "cache_type": "readahead"}


def _sorted_fault(url: str, error: Exception) -> Exception:
    """The error to raise for what a library raised: a fault that may pass, or one for the user."""
    passing: tuple[type[Exception], ...] = (OSError, TimeoutError)
    status = None
    if url.startswith("http"):
        import aiohttp

        passing += (aiohttp.ClientError,)
        status = error.status if isinstance(error, aiohttp.ClientResponseError) else None
        # A redirect loop has the status of no answer.
        lasting = (
            aiohttp.InvalidURL,
            aiohttp.NonHttpUrlClientError,
            aiohttp.TooManyRedirects,
            aiohttp.ClientConnectorCertificateError,
        )
        if isinstance(error, lasting) or (status is not None and 300 <= status < 500 and status not in _PASSING_STATUS):
            kind = MissingFile if status in (403, 410) else DataError
            return kind(f"{shown(url)} is refused: {_described(error)}. Check the URL and the server's access rules")
    if url.startswith("s3:"):
        from botocore.exceptions import ConnectionError as NoConnection
        from botocore.exceptions import HTTPClientError

        passing += (NoConnection, HTTPClientError)
    if isinstance(error, FileNotFoundError):
        return MissingFile(_missing(url))
    if isinstance(error, PermissionError):
        return MissingFile(f"{shown(url)} is refused: {_described(error)}. Check the URL and the credentials")
    if isinstance(error, passing):
        return _PassingFault(_described(error))
    return DataError(f"{shown(url)} cannot be fetched: {_described(error)}. Check the URL and the credentials")


def _missing(url: str) -> str:
    return (
        f"{shown(url)} is missing on the server. Check the URL; upload the file from where it was built, or build the "
        "data again"
    )


def _described(error: Exception) -> str:
    status = getattr(error, "status", None)
    if status and isinstance(status, int):
        return f"HTTP status {status} {getattr(error, 'message', '')}".strip()
    # The text of an error may repeat the URL, password included.
    text = re.sub(r"//[^/\s]*@", "//", str(error))
    return f"{type(error).__name__} {text}".strip()
