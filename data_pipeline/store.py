"""Where the files of a data set are: a local folder as it is, or a URL whose shards are kept in a bounded cache.

A cached shard is named by its sha256 and appears in one step, complete and checked; a killed process leaves at most a
`.part` file that the next one takes over or removes. Processes and ranks of one machine share a cache through file
locks, which the kernel drops with the process. Fetching is `download.py`; what the bytes mean is `shards.py`.
"""

import fcntl
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loopline.data_pipeline.download import RemoteSettings, Wanted, download, file_url, remote_size, shown
from loopline.data_pipeline.errors import DataError

# The second is a file that this process has just fetched.
ShardFile = io.BufferedReader | io.BufferedRandom
_POLL_S = 0.05

log = logging.getLogger(__name__)


class Listed(Protocol):
    """A file as a manifest lists it. `name` is a plain name, `sha256` 64 hex digits; the manifest checks both."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...


class ShardStore(Protocol):
    """Opens the shards of one data set."""

    @property
    def may_stay_open(self) -> bool:
        """Whether a reader may keep a shard open from record to record. In a bounded cache it may not: the file would
        look unused, and its bytes would stay on the disk after it was evicted."""

    @property
    def repair(self) -> str:
        """What to do about a damaged shard, for messages."""

    def shown(self, name: str) -> str:
        """The place of a file, for messages."""

    def check(self, listed: Listed, *, ask_server: bool = False) -> None:
        """Raises DataError where the shard is missing or has another size, or can never be kept in the cache."""

    def open(self, listed: Listed) -> ShardFile:
        """The shard, open for reading; stays readable until closed, whatever happens to its name.

        Raises:
            DataError: missing, not fetched in time, or other content than listed.
        """


@dataclass(frozen=True)
class LocalStore:
    """Files in a folder, read where they are."""

    folder: Path

    @property
    def may_stay_open(self) -> bool:
        return True

    @property
    def repair(self) -> str:
        return "Copy it again from where it was built, or build the data again"

    def shown(self, name: str) -> str:
        return str(self.folder / name)

    def check(self, listed: Listed, *, ask_server: bool = False) -> None:
        path = self.folder / listed.name
        if not path.is_file():
            raise DataError(
                f"shard {path} is listed in the manifest but missing. Copy it here, or build the data again"
            )
        _check_size(str(path), path.stat().st_size, listed, self.repair)

    def open(self, listed: Listed) -> ShardFile:
        try:
            return (self.folder / listed.name).open("rb")
        except OSError as error:
            raise DataError(f"shard {self.folder / listed.name} cannot be read: {error}. {self.repair}") from None


@dataclass(frozen=True)
class RemoteStore:
    """Files below a URL; shards are fetched whole into `cache_dir/shards` when they are first read.

    Attributes:
        url: of the folder, without a trailing slash.
        counts: of this process: shards and bytes fetched, failed tries.
    """

    url: str
    settings: RemoteSettings
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("shards", "bytes", "retries"), 0), compare=False
    )
    # Shards whose content this process has seen to be right.
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def may_stay_open(self) -> bool:
        return False

    @property
    def repair(self) -> str:
        return f"Delete its cached copy in {self._cache.folder}; if it comes back so, build the data again"

    def shown(self, name: str) -> str:
        return shown(file_url(self.url, name))

    def check(self, listed: Listed, *, ask_server: bool = False) -> None:
        self._cache.check_fits(self.shown(listed.name), listed.n_bytes)
        if ask_server:
            found = remote_size(file_url(self.url, listed.name), self.settings)
            if found is not None:
                _check_size(self.shown(listed.name), found, listed, "Upload it again, or build the data again")

    def open(self, listed: Listed) -> ShardFile:
        deadline = time.monotonic() + self.settings.retry_timeout_s
        cache = self._cache
        while True:
            file = cache.open(listed)
            if file is None:
                file = cache.add(listed, lambda out: self._download(listed, out, deadline), deadline)
            if file is not None and self._is_right(listed, file):
                return file
            if file is not None:
                file.close()
                log.warning("the cached copy of %s was damaged; fetching it again", self.shown(listed.name))
                cache.remove(listed)
            if time.monotonic() >= deadline:
                raise DataError(
                    f"the cached copy of {self.shown(listed.name)} was evicted or damaged as often as it was fetched. "
                    "Raise data.cache_bytes, and check the disk"
                )

    def _is_right(self, listed: Listed, file: ShardFile) -> bool:
        if self.settings.rehash_cached and listed.sha256 not in self._checked:
            if hashlib.file_digest(file, "sha256").hexdigest() != listed.sha256:
                return False
            file.seek(0)
            self._checked.add(listed.sha256)
        return True

    def _download(self, listed: Listed, out: ShardFile, deadline: float) -> None:
        wanted = Wanted(max_bytes=listed.n_bytes, n_bytes=listed.n_bytes, sha256=listed.sha256)
        fetched = download(file_url(self.url, listed.name), out, wanted, self.settings, deadline)
        self._checked.add(listed.sha256)
        for name, n in (("shards", 1), ("bytes", fetched.n_bytes), ("retries", fetched.n_failed)):
            self.counts[name] += n

    @property
    def _cache(self) -> "ShardCache":
        return ShardCache(self.settings.cache_dir / "shards", self.settings.cache_bytes)


@dataclass(frozen=True)
class ShardCache:
    """At most `max_bytes` of files named by their sha256, the least recently opened evicted first.

    Files under way count from their first byte, so the bound holds for all processes together.
    """

    folder: Path
    max_bytes: int

    def check_fits(self, what: str, n_bytes: int) -> None:
        """Raises DataError where a file is larger than the whole cache."""
        if n_bytes > self.max_bytes:
            raise DataError(
                f"{what} has {n_bytes} bytes, the cache in {self.folder} holds at most {self.max_bytes} "
                "(data.cache_bytes). Raise that to several shards, or build the data with smaller shards"
            )

    def open(self, listed: Listed) -> ShardFile | None:
        """The file, marked as used now; None where it is not here (a copy of another size is removed)."""
        try:
            file = self._path(listed).open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._broken(error) from error
        if os.fstat(file.fileno()).st_size != listed.n_bytes:
            file.close()
            self.remove(listed)
            return None
        with suppress(PermissionError):  # another user's file, in a cache they share
            os.utime(file.fileno())
        return file

    def remove(self, listed: Listed) -> None:
        self._path(listed).unlink(missing_ok=True)

    def add(self, listed: Listed, fill: Callable[[ShardFile], None], deadline: float) -> ShardFile | None:
        """Fills a new file and gives it its name; one process at a time for each name.

        Args:
            fill: writes the whole, checked content; its error leaves nothing here.
        Returns:
            The file, open; None where another process has added it meanwhile.
        Raises:
            DataError: no room or no turn by the deadline; the folder cannot be written.
        """
        self.check_fits(listed.name, listed.n_bytes)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self._take_part(listed, deadline)
            if file is None:
                return None
            try:
                self._reserve(file, listed, deadline)
                fill(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(self._part(listed), self._path(listed))
            except BaseException:
                self._part(listed).unlink(missing_ok=True)
                file.close()
                raise
            fsync_folder(self.folder)
            fcntl.flock(file, fcntl.LOCK_UN)
            file.seek(0)
            return file
        except OSError as error:
            raise self._broken(error) from error

    def _broken(self, error: OSError) -> DataError:
        return DataError(
            f"the cache in {self.folder} cannot be used: {error}. Repair that, or choose another data.cache_dir"
        )

    def _path(self, listed: Listed) -> Path:
        return self.folder / listed.sha256

    def _part(self, listed: Listed) -> Path:
        return self.folder / f"{listed.sha256}.part"

    def _take_part(self, listed: Listed, deadline: float) -> ShardFile | None:
        """The file being filled, locked by us; None where the finished one has appeared."""
        part = self._part(listed)
        while not self._path(listed).exists():
            # Not fdopen: the name of its file is a number, and goes into messages.
            raw = io.FileIO(part, "r+", opener=lambda path, _: os.open(path, os.O_RDWR | os.O_CREAT, 0o644))
            file = io.BufferedRandom(raw)
            # Between opening and locking it may have been finished and renamed, or swept: then the lock is of no use.
            if _try_lock(file.fileno()) and _is_at(file, part):
                if not self._path(listed).exists():
                    return file
                part.unlink(missing_ok=True)
            file.close()
            if time.monotonic() >= deadline:
                raise DataError(
                    f"another process has not finished fetching {listed.name} into {self.folder} in time. See its log "
                    "for the reason, or raise data.retry_timeout_s"
                )
            time.sleep(_POLL_S)
        return None

    def _reserve(self, file: ShardFile, listed: Listed, deadline: float) -> None:
        """Makes room and gives the part its final size, so that others count it."""
        while True:
            with _locked(self.folder / ".lock", deadline):
                if self._evict(listed.n_bytes, keep=self._part(listed).name):
                    os.ftruncate(file.fileno(), listed.n_bytes)
                    return
            if time.monotonic() >= deadline:
                raise DataError(
                    f"no room for {listed.name} ({listed.n_bytes} bytes): other processes are filling all "
                    f"{self.max_bytes} bytes of the cache in {self.folder}. Raise data.cache_bytes"
                )
            time.sleep(_POLL_S)

    def _evict(self, n_needed: int, keep: str) -> bool:
        """Removes the oldest files until `n_needed` bytes are free; where that cannot be, removes none: False."""
        n_under_way, finished = 0, []
        for entry in os.scandir(self.folder):
            if entry.name == keep or not re.fullmatch(r"[0-9a-f]{64}(\.part)?", entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not entry.name.endswith(".part"):
                finished.append((status.st_mtime_ns, status.st_size, entry.path))
            elif not _sweep(Path(entry.path)):
                n_under_way += status.st_size
        if n_under_way + n_needed > self.max_bytes:
            return False
        n_used = n_under_way + sum(n_bytes for _, n_bytes, _ in finished)
        for _, n_bytes, path in sorted(finished):
            if n_used + n_needed <= self.max_bytes:
                break
            # A reader that has it open keeps its bytes until it closes it.
            Path(path).unlink(missing_ok=True)
            n_used -= n_bytes
        return True


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_size(what: str, n_bytes: int, listed: Listed, repair: str) -> None:
    if n_bytes != listed.n_bytes:
        raise DataError(
            f"shard {what} has {n_bytes} bytes, the manifest says {listed.n_bytes}: cut short or replaced. {repair}"
        )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: ShardFile, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sweep(part: Path) -> bool:
    """Removes what a killed process left; False where a living one still fills it."""
    try:
        file = part.open("rb")
    except FileNotFoundError:
        return True
    with file:
        if not _try_lock(file.fileno()):
            return False
        if _is_at(file, part):
            part.unlink(missing_ok=True)
        return True


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    with path.open("ab") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                raise DataError(f"{path} stays locked by another process; end that process")
            time.sleep(_POLL_S)
        yield
