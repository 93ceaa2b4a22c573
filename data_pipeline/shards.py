"""Shard format 1: webdataset tar files of token records; the writer and the reader.

A record is two members, `{key}.tokens.npy` (uint16 or uint32, [n_tokens], whole documents one after the other, each
ending with eos) and `{key}.ends.npy` (int64, [n_documents], exclusive end of each document). A document is never split
over records. The bytes depend on the tokens alone (fixed owner, mode and time), and `webdataset.WebDataset` reads the
files; our own reader seeks to a record by the manifest's offsets. One record is `record_arrays.py`, where the files are
`store.py`.
"""

import contextlib
import hashlib
import io
import os
import tarfile
import weakref
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np

from loopline.data_pipeline.manifest import Manifest, Record, RecordTable, Shard, Split
from loopline.data_pipeline.record_arrays import RecordRules, broken_record
from loopline.data_pipeline.store import ShardFile

DEFAULT_RECORD_TOKENS = 65_536
DEFAULT_SHARD_BYTES = 256 * 2**20
MAX_OPEN_SHARDS = 32  # of a reader


class SplitWriter:
    """Writes the documents of one split, in the order given, as `{split}-{000000..}.tar`.

    A record is closed once it holds at least `record_tokens` tokens, a shard once it holds at least `shard_bytes`
    bytes, so both are targets that the last document or record overshoots.
    """

    def __init__(self, folder: Path, split: str, *, dtype: str, record_tokens: int, shard_bytes: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._record_tokens = record_tokens
        self._shard_bytes = shard_bytes
        self._documents: list[np.ndarray] = []
        self._n_pending_tokens = 0
        self._n_records = 0
        self._shards: list[Shard] = []
        self._tar: _TarFile | None = None
        self._n_by_length = [0] * 64  # documents by bit length of their token count, less one

    def add(self, tokens: np.ndarray) -> None:
        """Appends one document: integers, [n], n >= 1, eos last."""
        assert len(tokens) > 0
        self._documents.append(tokens)
        self._n_pending_tokens += len(tokens)
        self._n_by_length[len(tokens).bit_length() - 1] += 1
        if self._n_pending_tokens >= self._record_tokens:
            self._write_record()

    def close(self) -> Split | None:
        """Writes what is left; returns the manifest entry, None where no document came."""
        if self._documents:
            self._write_record()
        if self._tar is not None:
            self._close_shard()
        if not self._shards:
            return None
        histogram = self._n_by_length
        while not histogram[-1]:
            histogram = histogram[:-1]
        return Split(
            n_documents=sum(shard.n_documents for shard in self._shards),
            n_tokens=sum(shard.n_tokens for shard in self._shards),
            shards=tuple(self._shards),
            length_histogram=tuple(histogram),
        )

    def discard(self) -> None:
        """Gives up: closes the open file, whatever it holds."""
        if self._tar is not None:
            self._tar.discard()
            self._tar = None

    def _write_record(self) -> None:
        if self._tar is None:
            self._tar = _TarFile(self._folder / f"{self._split}-{len(self._shards):06d}.tar")
        key = f"{self._split}-{self._n_records:08d}"
        # astype last: numpy's joins and sums give the machine's own byte order, the format is little-endian.
        tokens = np.concatenate(self._documents).astype(self._dtype)  # [n_tokens]
        ends = np.cumsum([len(document) for document in self._documents]).astype("<i8")  # [n_documents]
        tokens_offset = self._tar.add(f"{key}.tokens.npy", _npy_bytes(tokens))
        ends_offset = self._tar.add(f"{key}.ends.npy", _npy_bytes(ends))
        self._tar.records.append(Record(tokens_offset, len(tokens), ends_offset, len(ends)))
        self._n_records += 1
        self._documents, self._n_pending_tokens = [], 0
        if self._tar.n_bytes >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._tar is not None
        sha256 = self._tar.close()
        self._shards.append(
            Shard(
                name=self._tar.path.name,
                sha256=sha256,
                n_bytes=self._tar.n_bytes,
                n_documents=sum(record.n_documents for record in self._tar.records),
                n_tokens=sum(record.n_tokens for record in self._tar.records),
                records=RecordTable(self._tar.records),
            )
        )
        self._tar = None


class _TarFile:
    """A tar written block by block: `tarfile` gives no data offsets while writing, and this hashes on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes = 0
        self.records: list[Record] = []
        self._sha256 = hashlib.sha256()
        self._file = path.open("wb")

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; returns the offset of its data."""
        info = tarfile.TarInfo(name)  # time, owner and group are zero, mode is 0644
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.n_bytes
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> str:
        """Ends the archive durably; returns its sha256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha256.hexdigest()

    def discard(self) -> None:
        """Closes the file; that it cannot be completed, on a full disk, is known already."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.n_bytes += len(data)


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class SplitReader:
    """Reads the records of a split by number, 0 to n_records - 1, in the manifest's order."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        """Checks that every local shard of the split is there and as long as the manifest says.

        Remote shards are fetched, and checked, when a record of theirs is first read.

        Raises:
            DataError: no such split; a shard is missing or has another size, or does not fit into the cache.
        """
        self.manifest = manifest
        self.split = split
        self._shards = manifest.split(split).shards
        self._store = manifest.store
        for shard in self._shards:
            self._store.check(shard)
        self._open: dict[int, ShardFile] = {}
        weakref.finalize(self, _close_all, self._open)
        self._rules = RecordRules(manifest.dtype, manifest.vocab_size, manifest.eos_id)
        # First record number of each shard, and the number of all.
        self.records_by_shard = tuple([len(shard.records) for shard in self._shards])
        self._first_record = [0, *accumulate(self.records_by_shard)]
        self.n_records = self._first_record[-1]

    def documents(self, record_idx: int) -> list[np.ndarray]:
        """The documents of one record: views [n] of the manifest's dtype, eos last.

        A damaged record is always an error, never skipped: ranks that read other copies of it, and a run that resumes
        with it repaired, would no longer see one order.

        Raises:
            DataError: what lies there is not the record the manifest describes; a remote shard cannot be fetched.
        """
        shard_idx = bisect_right(self._first_record, record_idx) - 1
        shard = self._shards[shard_idx]
        record = shard.records[record_idx - self._first_record[shard_idx]]
        file = self._open.pop(shard_idx, None) or self._store.open(shard)
        try:
            tokens, bounds = self._rules.read(file, shard.n_bytes, record)
        except (OSError, ValueError) as error:
            file.close()
            raise broken_record(self._store, shard.name, record, error) from None
        self._keep(shard_idx, file)
        return [tokens[start:end] for start, end in zip([0, *bounds], bounds)]

    def _keep(self, shard_idx: int, file: ShardFile) -> None:
        if not self._store.may_stay_open:
            file.close()
            return
        self._open[shard_idx] = file  # last, so that the first is the one not read for longest
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).close()


def _close_all(files: dict[int, ShardFile]) -> None:
    for file in files.values():
        file.close()
