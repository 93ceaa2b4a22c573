"""Import of Megatron's indexed datasets: `PREFIX.idx` and `PREFIX.bin` -> our shards and manifest.

The index: magic, version, dtype code, number of sequences n and of document bounds m, then int32 lengths [n], int64
byte pointers [n], int64 document bounds [m] (megatron.core.datasets.indexed_dataset, version 1). Both files are mapped;
nothing is allocated from a count before the files' sizes agree with it.
"""

import logging
import struct
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loopline.data_pipeline.build import HeldoutRule, check_numbers, existing_data, open_splits
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    Provenance,
    TokenizerEntry,
    dtype_for,
)
from loopline.data_pipeline.shards import DEFAULT_RECORD_TOKENS, DEFAULT_SHARD_BYTES
from loopline.data_pipeline.staging import open_staging
from loopline.data_pipeline.tokenizer import TOKENIZER_FILE, TokenizerFile

log = logging.getLogger(__name__)

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Codes of the integer types; 6 and 7 are floats, which hold no tokens.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class MegatronIndex:
    """The documents of an indexed dataset.

    Attributes:
        n_documents: documents, empty ones included.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Maps both files and checks all of the index.

        Args:
            prefix: path without `.idx` and `.bin`.
        Raises:
            DataError: a file is missing; the index is not one, or disagrees with itself or with the data.
        """
        text = str(prefix)
        text = text[: -len(".idx")] if text.endswith((".idx", ".bin")) else text
        self.idx_path, self.bin_path = Path(f"{text}.idx"), Path(f"{text}.bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist; give the prefix that the .bin and .idx file share")
        n_sequences, n_bounds = self._read_header()
        mapped = np.memmap(self.idx_path, np.uint8, mode="r")
        offset = _HEADER.size
        self._lengths = np.frombuffer(mapped, "<i4", n_sequences, offset)  # [n_sequences]
        self._pointers = np.frombuffer(mapped, "<i8", n_sequences, offset + 4 * n_sequences)  # [n_sequences], bytes
        self._bounds = np.frombuffer(mapped, "<i8", n_bounds, offset + 12 * n_sequences)  # [n_documents + 1]
        self.n_documents = n_bounds - 1
        self.n_bytes = self.bin_path.stat().st_size
        self._check_arrays()
        self._tokens = np.memmap(self.bin_path, np.uint8, mode="r")

    def __iter__(self) -> Iterator[np.ndarray]:
        """Tokens [n] of every document, in order; n may be 0."""
        for first, last in zip(self._bounds[:-1].tolist(), self._bounds[1:].tolist(), strict=True):
            sequences = [self._sequence(i) for i in range(first, last)]
            yield sequences[0] if len(sequences) == 1 else np.concatenate([np.empty(0, self._dtype), *sequences])

    def _sequence(self, i: int) -> np.ndarray:
        return np.frombuffer(self._tokens, self._dtype, int(self._lengths[i]), int(self._pointers[i]))

    def _read_header(self) -> tuple[int, int]:
        """(sequences, document bounds); sets the dtype."""
        with self.idx_path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise self._broken(f"begins with {header[:9]!r}, a Megatron index with {_MAGIC!r}")
        _, found, code, n_sequences, n_bounds = _HEADER.unpack(header)
        if found != 1:
            raise self._broken(f"has version {found}, only version 1 is known")
        if code not in _DTYPES:
            raise self._broken(f"has dtype code {code}, tokens have one of {sorted(_DTYPES)}")
        self._dtype = np.dtype(_DTYPES[code])
        size, expected = self.idx_path.stat().st_size, _HEADER.size + 12 * n_sequences + 8 * n_bounds
        if size == expected + n_sequences and n_sequences:
            raise self._broken("is multimodal (it has a mode per sequence); only text can be imported")
        if size != expected:
            raise self._broken(
                f"has {size} bytes, {n_sequences} sequences and {n_bounds} document bounds take {expected}"
            )
        if not n_sequences or n_bounds < 2:
            raise self._broken(f"lists {n_sequences} sequences and {n_bounds} document bounds; there is nothing in it")
        return n_sequences, n_bounds

    def _check_arrays(self) -> None:
        if self._lengths.min() < 0 or self._pointers.min() < 0:
            raise self._broken("has negative lengths or pointers")
        # int64 suffices: a pointer up to 2^63 is compared before the length is added.
        reach = self.n_bytes - self._lengths.astype(np.int64) * self._dtype.itemsize
        if (self._pointers > reach).any():
            i = int(np.argmax(self._pointers > reach))
            raise self._broken(
                f"puts sequence {i} ({self._lengths[i]} tokens of {self._dtype.itemsize} bytes at byte "
                f"{self._pointers[i]}) past the end of {self.bin_path} ({self.n_bytes} bytes)"
            )
        if self._bounds[0] != 0 or self._bounds[-1] != len(self._lengths) or (np.diff(self._bounds) < 0).any():
            raise self._broken(f"has document bounds that do not rise from 0 to its {len(self._lengths)} sequences")
        if not self.n_bytes:
            raise self._broken(f"belongs to an empty {self.bin_path}; there are no tokens")

    def _broken(self, what: str) -> DataError:
        return DataError(f"{self.idx_path} {what}. Copy both files again, or write them again with Megatron")


def import_megatron(
    prefix: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: TokenizerFile,
    heldout_fraction: float = 0.05,
    record_tokens: int = DEFAULT_RECORD_TOKENS,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
    progress: bool = True,
) -> Manifest:
    """Writes an indexed dataset as a data set of ours; returns the one there if it was imported with equal settings.

    Documents are those of the index, whole; eos is put at the end of those that lack it, and documents with nothing but
    eos are skipped and counted.

    Args:
        prefix: path without `.idx` and `.bin`.
        tokenizer: the one the tokens were made with; its `eos_id` ends documents.
        heldout_fraction, record_tokens, shard_bytes, seed, progress: as in `build`.
    Raises:
        DataError: broken files; a token outside the tokenizer's vocabulary; as in `build`.
    """
    check_numbers(heldout_fraction, record_tokens, shard_bytes)
    index, out = MegatronIndex(prefix), Path(out_dir)
    n_bytes = index.n_bytes + index.idx_path.stat().st_size
    source: dict[str, str | int] = {
        "kind": "megatron",
        "path": str(index.bin_path.with_suffix("")),
        "n_files": 2,
        "n_bytes": n_bytes,
    }
    limits = {"record_tokens": record_tokens, "shard_bytes": shard_bytes}
    settings: dict[str, str | int | float] = {
        "tokenizer": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "heldout_fraction": float(heldout_fraction),
        **limits,
        "seed": seed,
    }
    if (out / MANIFEST_FILE).exists():
        return existing_data(out, source, settings)
    dtype = dtype_for(tokenizer.vocab_size)
    is_heldout = HeldoutRule(seed, heldout_fraction)
    with open_staging(out) as staging:
        if (out / MANIFEST_FILE).exists():
            return existing_data(out, source, settings)
        tokenizer = tokenizer.copy_to(staging.tokenizer)
        with open_splits(staging.shards, dtype, limits) as writers:
            n_kept = n_skipped = 0
            bar = tqdm(index, "importing", index.n_documents, unit=" documents", disable=None if progress else True)
            for number, tokens in enumerate(bar):
                if not (tokens != tokenizer.eos_id).any():
                    n_skipped += 1
                    continue
                _check_tokens(tokens, number, tokenizer, index.bin_path)
                ending = [] if tokens[-1] == tokenizer.eos_id else [tokenizer.eos_id]
                writers["heldout" if is_heldout(n_kept) else "train"].add(np.append(tokens, ending).astype(dtype))
                n_kept += 1
            splits = {name: split for name, writer in writers.items() if (split := writer.close()) is not None}
        if "train" not in splits or (heldout_fraction > 0 and "heldout" not in splits):
            raise DataError(
                f"{n_kept} documents of {index.bin_path} ({n_skipped} empty) left a split empty; "
                "lower or raise heldout_fraction, change the seed, or set it to 0 for no held-out split"
            )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer=TokenizerEntry(file=TOKENIZER_FILE, sha256=tokenizer.sha256),
            provenance=Provenance(
                source=source, settings=settings, n_skipped=n_skipped, loopline_version=version("loopline")
            ),
            splits=splits,
        )
        staging.commit(manifest)
    if n_skipped:
        log.warning("skipped %d of %d documents: nothing but eos in them", n_skipped, index.n_documents)
    return manifest


def _check_tokens(tokens: np.ndarray, number: int, tokenizer: TokenizerFile, path: Path) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise DataError(
            f"{path}: document {number} holds token {low if low < 0 else high}, tokenizer {tokenizer.path} has "
            f"ids 0 to {tokenizer.vocab_size - 1}. Give the tokenizer the data was made with"
        )
