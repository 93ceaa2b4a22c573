"""Chunks: the tokens of one part, on disk between a worker and the merge, and from a killed build to its rerun.

A chunk is `part-000123.tokens` (npy arrays one after the other: tokens [n], ends [d], tokens, ends, ...) and
`part-000123.json`, which is written last and says what the chunk was made from. Both appear by renaming, so a chunk is
whole or absent. The format is private to one build: `.build/` goes away when the manifest is saved.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from loopline.data_pipeline.manifest import file_sha256, fsync_folder
from loopline.data_pipeline.skips import Skips


@dataclass(frozen=True)
class Chunk:
    """What `part-*.json` holds.

    Attributes:
        key: hash of everything the tokens depend on.
        n_batches, n_documents, n_tokens: counts.
        skipped: `Skips.facts` of the part.
        n_bytes, sha256: of the tokens file.
    """

    key: str
    n_batches: int
    n_documents: int
    n_tokens: int
    skipped: list[tuple[str, int, Sequence[str]]]
    n_bytes: int
    sha256: str


def write_chunk(
    folder: Path, part_idx: int, key: str, batches: Iterable[tuple[np.ndarray, np.ndarray]], skips: Skips
) -> None:
    """Writes one chunk durably.

    Args:
        batches: (tokens [n], exclusive document ends [d], int64); written as they come, so memory holds one.
        skips: what the part leaves out; filled while `batches` is consumed.
    """
    path = _tokens_path(folder, part_idx)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    n_batches = n_documents = n_tokens = 0
    try:
        with temporary.open("w+b") as file:
            for tokens, ends in batches:
                for array in (tokens, ends):
                    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
                n_batches, n_documents, n_tokens = n_batches + 1, n_documents + len(ends), n_tokens + len(tokens)
            file.flush()
            os.fsync(file.fileno())
            n_bytes = file.tell()
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    chunk = Chunk(key, n_batches, n_documents, n_tokens, skips.facts, n_bytes, sha256)
    write_durably(_facts_path(folder, part_idx), json.dumps(asdict(chunk)).encode())


def find_chunk(folder: Path, part_idx: int, key: str, *, check_hash: bool) -> Chunk | None:
    """The chunk of a part if it is whole and was made from what `key` says; else None.

    Args:
        check_hash: also read it and compare its sha256: for one that an earlier process wrote.
    """
    try:
        facts = json.loads(_facts_path(folder, part_idx).read_bytes())
        chunk = Chunk(**facts)
        path = _tokens_path(folder, part_idx)
        if chunk.key != key or path.stat().st_size != chunk.n_bytes:
            return None
        return None if check_hash and file_sha256(path) != chunk.sha256 else chunk
    except (FileNotFoundError, ValueError, TypeError):  # absent, or another version's
        return None


def read_chunk(folder: Path, part_idx: int, chunk: Chunk) -> Iterator[np.ndarray]:
    """The documents of a chunk in order: views [n] of the token dtype."""
    with _tokens_path(folder, part_idx).open("rb") as file:
        for _ in range(chunk.n_batches):
            tokens = np.lib.format.read_array(file, allow_pickle=False)
            ends = np.lib.format.read_array(file, allow_pickle=False)
            yield from np.split(tokens, ends[:-1])


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file in one step: after a crash it is there whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def _tokens_path(folder: Path, part_idx: int) -> Path:
    return folder / f"part-{part_idx:06d}.tokens"


def _facts_path(folder: Path, part_idx: int) -> Path:
    return folder / f"part-{part_idx:06d}.json"
