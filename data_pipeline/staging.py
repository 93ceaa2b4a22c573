"""The folder a data set is built in: one builder at a time, nothing visible before it is whole.

Everything is written below `<out>/.build/`; `commit` moves the finished files into `<out>` and writes the manifest
last. What a killed or failed build leaves there is what its rerun starts from.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from loopline.data_pipeline.chunks import write_durably
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import MANIFEST_FILE, Manifest, fsync_folder
from loopline.data_pipeline.tokenizer import CONFIG_FILES, TOKENIZER_FILE

BUILD_FOLDER = ".build"
_LOCK = "lock"
# What a build writes beside its own folder.
_TARGETS = re.compile(
    rf"(train|heldout)-.*\.tar|{'|'.join(map(re.escape, (MANIFEST_FILE, TOKENIZER_FILE, *CONFIG_FILES)))}", re.DOTALL
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """Folders of one build in progress.

    Attributes:
        out: where the data set goes.
        chunks, tokenizer: kept from run to run.
        shards: emptied when the build begins.
    """

    def __init__(self, out: Path) -> None:
        """Removes what an interrupted `commit` left in `out`, where there is no manifest yet.

        Raises:
            DataError: other files there that a build would overwrite, or that look like its shards.
        """
        self.out = out
        self._folder = out / BUILD_FOLDER
        self._moved = self._folder / "moved.json"
        self.chunks, self.tokenizer, self.shards = (self._folder / name for name in ("chunks", "tokenizer", "shards"))
        if not (out / MANIFEST_FILE).exists():
            for left_over in self._left_over():
                left_over.unlink()
        shutil.rmtree(self.shards, ignore_errors=True)
        for folder in (self.chunks, self.tokenizer, self.shards):
            folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.chunks.glob(".*"):
            left_over.unlink(missing_ok=True)

    def commit(self, manifest: Manifest) -> None:
        """Moves shards and tokenizer into `out`, saves the manifest, removes everything else of the build.

        Raises:
            DataError: somebody put a file there meanwhile that this would overwrite.
        """
        files = [self.shards / shard.name for shard in manifest.iter_shards()]
        files += [file for name in (TOKENIZER_FILE, *CONFIG_FILES) if (file := self.tokenizer / name).exists()]
        self._left_over()
        # First, so that a rerun can tell our files from others'.
        write_durably(self._moved, json.dumps({file.name: _identity(file) for file in files}).encode())
        for file in files:
            os.replace(file, self.out / file.name)
        fsync_folder(self.out)
        manifest.save(self.out)
        remove_staging(self.out)

    def _left_over(self) -> list[Path]:
        """Our files in `out`, which an interrupted `commit` moved there; DataError where there are others."""
        moved = json.loads(self._moved.read_bytes()) if self._moved.exists() else {}
        found = sorted(path for path in self.out.iterdir() if _TARGETS.fullmatch(path.name))
        others = [path.name for path in found if moved.get(path.name) != _identity(path)]
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise DataError(
                f"{self.out} holds {', '.join(others[:3])}{more}, which no build under way there wrote: they would be "
                "overwritten, or taken for its shards. Choose another folder, or remove them"
            )
        return found


@contextmanager
def open_staging(out: Path) -> Iterator[Staging]:
    """The staging folders of `out`, held by this process alone until the block ends.

    Raises:
        DataError: another process is building there; the disk is full, or a file system error, while in the block.
    """
    try:
        (out / BUILD_FOLDER).mkdir(parents=True, exist_ok=True)
        if any((out / BUILD_FOLDER).iterdir()) and not _is_ours(out):
            raise DataError(f"{out / BUILD_FOLDER} is the folder of another program; choose another folder than {out}")
        with (out / BUILD_FOLDER / _LOCK).open("w") as lock:
            _take(lock, out)
            yield Staging(out)
    except OSError as error:
        raise disk_error(error, out) from error


def remove_staging(out: Path) -> None:
    """Removes what a build keeps beside its result."""
    if _is_ours(out):
        shutil.rmtree(out / BUILD_FOLDER, ignore_errors=True)


def _is_ours(out: Path) -> bool:
    return (out / BUILD_FOLDER / _LOCK).is_file()


def _identity(file: Path) -> list[int]:
    """Size and time of a file: renaming keeps them, and no other file has both."""
    status = file.lstat()
    return [status.st_size, status.st_mtime_ns]


def disk_error(error: OSError, where: Path) -> DataError:
    """What to tell the user about an operating system error of a build."""
    if error.errno in _FULL:
        return DataError(
            f"{where}: no room for more ({error.strerror}). Free space or raise the limit, then run the same command "
            "again: finished parts are kept. A build needs about twice the size of its shards while it runs"
        )
    return DataError(f"building {where} failed: {error}. Repair that, then run the same command again")


def _take(lock: IO[str], out: Path) -> None:
    try:
        # The kernel frees it however the process ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another process is building {out}; wait for it, or choose another folder") from None
