"""The two arrays of one record, read at the manifest's offsets and checked: what a reader trusts and `verify` tries.

Nothing is unpickled, and nothing is allocated before the manifest's own figures agree.
"""

import io
import os
from dataclasses import dataclass
from functools import cached_property
from operator import lt
from typing import TYPE_CHECKING, Final

import numpy as np

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.store import ShardFile, ShardStore

if TYPE_CHECKING:
    from loopline.data_pipeline.manifest import Record

_ENDS: Final = np.dtype("<i8")


@dataclass(frozen=True)
class RecordRules:
    """What every record of a data set keeps to."""

    dtype: str
    vocab_size: int
    eos_id: int

    @cached_property
    def _stored(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    def read(self, file: ShardFile, n_file_bytes: int, record: "Record") -> tuple[np.ndarray, list[int]]:
        """(tokens [n_tokens] of the data set's dtype, the exclusive end of each document).

        Raises:
            ValueError: what lies there is not the record.
            OSError: it cannot be read.
        """
        tokens = _read_npy(file, n_file_bytes, record.tokens_offset, self._stored, record.n_tokens)
        ends = _read_npy(file, n_file_bytes, record.ends_offset, _ENDS, record.n_documents)
        bounds = ends.tolist()
        if bounds[-1] != len(tokens) or not all(map(lt, [0, *bounds], bounds)):
            raise ValueError(f"document ends must rise from 1 or more to {len(tokens)}")
        if tokens.max() >= self.vocab_size:
            raise ValueError(f"token {tokens.max()} found, vocab_size is {self.vocab_size}")
        if (tokens[ends - 1] != self.eos_id).any():
            raise ValueError(f"a document does not end with eos ({self.eos_id})")
        return tokens, bounds


def broken_record(store: ShardStore, name: str, record: "Record", error: Exception) -> DataError:
    """The error of a record that `RecordRules.read` refused."""
    return DataError(
        f"shard {store.shown(name)}, record at byte {record.tokens_offset}, cannot be read: {error}. {store.repair}"
    )


def _read_npy(file: ShardFile, n_file_bytes: int, offset: int, dtype: np.dtype, n: int) -> np.ndarray:
    """A 1-D array at `offset`; nothing is allocated before the manifest's own figures agree, or used before its header
    is what they promise."""
    n_bytes = n * dtype.itemsize
    if offset + n_bytes > n_file_bytes:
        raise ValueError(f"the manifest claims {n_bytes} bytes at {offset}, the shard has {n_file_bytes}")
    expected = npy_header(dtype, n)
    header, array = bytearray(len(expected)), np.empty(n, dtype)
    # Not by the file's own position, which processes forked from here would share.
    start, n_read = offset + len(header), os.preadv(file.fileno(), [header, array.data], offset) - len(header)
    if header != expected:
        start, n_read = offset + _check_npy_header(os.pread(file.fileno(), 1100, offset), dtype, n), 0
    while n_read < n_bytes:  # after another header, or 2 GiB, the most that one call gives
        n_more = os.preadv(file.fileno(), [array.view(np.uint8).data[n_read:]], start + n_read)
        if not n_more:
            raise ValueError(f"ends after {n_read} of {n_bytes} bytes")
        n_read += n_more
    return array


def npy_header(dtype: np.dtype, n: int) -> bytes:
    """What numpy writes before a 1-D array. Comparing with it takes a twentieth of the time of numpy's parser."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({n},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def _check_npy_header(content: bytes, dtype: np.dtype, n: int) -> int:
    """Headers that other tools write differently; returns where the array's data begins."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not an npy array of version 1.0")
    try:
        shape, _, found = np.lib.format.read_array_header_1_0(file, max_header_size=1024)
    except Exception as error:
        # Beside ValueError: what the tokenizer and the parser of a Python literal raise for garbage.
        raise ValueError(f"npy header: {error}") from None
    # Object arrays (pickles) end here too: their dtype is never the one expected.
    if found != dtype or shape != (n,):
        raise ValueError(f"array of {found} {list(shape)} found, {dtype} [{n}] expected")
    return file.tell()
