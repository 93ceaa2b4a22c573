"""Is a shard the tar its manifest describes? Walks the headers and extracts nothing.

Our reader seeks by the manifest and never looks at tar headers, but other tools read them. `tarfile` is used for the
512 bytes of one header only: its own walk trusts the sizes that extended headers claim.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from loopline.data_pipeline.errors import DataError

if TYPE_CHECKING:
    from loopline.data_pipeline.manifest import Shard


def check_tar(file: BinaryIO, what: str, shard: "Shard") -> None:
    """Compares the members of an open shard with its manifest entry.

    Args:
        what: the shard's place, for messages.
    Raises:
        DataError: a member that is no regular file or whose name leaves the folder, or a damaged header; a record of
            the manifest that is no pair of members; a record that the manifest lacks; no end of archive.
    """
    try:
        members = dict(_iter_members(file))  # offset of the data -> name
        for record in shard.records:
            keys = []
            for offset, suffix in ((record.tokens_offset, ".tokens.npy"), (record.ends_offset, ".ends.npy")):
                name = members.pop(offset, "")
                if not name.endswith(suffix):
                    raise ValueError(f"the manifest has a record at byte {offset}, the tar has no *{suffix} there")
                keys.append(name.removesuffix(suffix))
            if keys[0] != keys[1]:
                raise ValueError(f"the manifest's record at byte {record.tokens_offset} is of {' and '.join(keys)}")
        for offset, name in members.items():
            if name.endswith((".tokens.npy", ".ends.npy")):
                raise ValueError(f"the tar has {name!r} at byte {offset}, which is no record of the manifest")
    except (ValueError, tarfile.HeaderError) as error:
        raise DataError(f"shard {what} is not the tar its manifest describes: {error}. Build the data again") from None


def _iter_members(file: BinaryIO) -> Iterator[tuple[int, str]]:
    n_bytes = file.seek(0, os.SEEK_END)
    position = 0
    while True:
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        if not any(header):
            if len(header) < tarfile.BLOCKSIZE:
                raise ValueError(f"it ends at byte {position} without the blocks that end an archive")
            return
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        start = position + tarfile.BLOCKSIZE
        if not info.isreg() or info.issparse():
            raise ValueError(f"member {info.name!r} at byte {position} is no regular file")
        if info.name in ("", ".", "..") or re.search(r"[/\\:\0]", info.name):
            raise ValueError(f"member {info.name!r} at byte {position} has a name that is not plain")
        if not 0 <= info.size <= n_bytes - start:
            raise ValueError(f"member {info.name!r} claims {info.size} bytes, {n_bytes - start} are left")
        yield start, info.name
        position = start + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
