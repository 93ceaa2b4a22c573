"""The folder a data set is built in: one builder at a time, nothing visible before it is whole.

Everything is written below `<out>/.build/`; `commit` moves the finished files into `<out>` and writes the manifest
last. What a killed or failed build leaves there is what its rerun starts from.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest, fsync_folder
from loopline.data_pipeline.tokenizer import CONFIG_FILES, TOKENIZER_FILE

BUILD_FOLDER = ".build"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """Folders of one build in progress.

    Attributes:
        out: where the data set goes.
        chunks, tokenizer: kept from run to run.
        shards: emptied when the build begins.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._folder = out / BUILD_FOLDER
        self.chunks, self.tokenizer, self.shards = (self._folder / name for name in ("chunks", "tokenizer", "shards"))
        shutil.rmtree(self.shards, ignore_errors=True)
        for folder in (self.chunks, self.tokenizer, self.shards):
            folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.chunks.glob(".*"):
            left_over.unlink(missing_ok=True)

    def commit(self, manifest: Manifest) -> None:
        """Moves shards and tokenizer into `out`, saves the manifest, removes everything else of the build."""
        for shard in manifest.iter_shards():
            os.replace(self.shards / shard.name, self.out / shard.name)
        for name in (TOKENIZER_FILE, *CONFIG_FILES):
            if (self.tokenizer / name).exists():
                os.replace(self.tokenizer / name, self.out / name)
        fsync_folder(self.out)
        manifest.save(self.out)
        remove_staging(self.out)


@contextmanager
def open_staging(out: Path) -> Iterator[Staging]:
    """The staging folders of `out`, held by this process alone until the block ends.

    Raises:
        DataError: another process is building there; the disk is full, or a file system error, while in the block.
    """
    try:
        (out / BUILD_FOLDER).mkdir(parents=True, exist_ok=True)
        with (out / BUILD_FOLDER / "lock").open("w") as lock:
            _take(lock, out)
            yield Staging(out)
    except OSError as error:
        raise disk_error(error, out) from error


def remove_staging(out: Path) -> None:
    """Removes what a build keeps beside its result."""
    shutil.rmtree(out / BUILD_FOLDER, ignore_errors=True)


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
