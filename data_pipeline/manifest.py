"""`manifest.json`: the list of everything a training run may read, with counts and hashes.

The manifest is written last, so a folder that has one is complete. Reading the shards is `shards.py`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from loopline.data_pipeline.errors import DataError

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
_REBUILD = "Build the data again with `loopline data build`"


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The token dtype of a vocabulary: uint16 below 65536 entries, else uint32."""
    return "uint16" if vocab_size < 65536 else "uint32"


def _plain_name(name: str) -> str:
    if not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise ValueError("must be the plain name of a file in the manifest's own folder")
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# The upper bound keeps sums of a few of them inside int64.
Count = Annotated[int, Field(ge=1, lt=2**53)]
Offset = Annotated[int, Field(ge=0, lt=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Record(NamedTuple):
    """Where one record lies in its shard. Offsets are of the raw `.npy` bytes, past the tar header."""

    tokens_offset: Offset
    n_tokens: Count
    ends_offset: Offset
    n_documents: Count


class TokenizerEntry(_Strict):
    """The tokenizer the tokens were made with."""

    file: PlainName
    sha256: Sha256


class Provenance(_Strict):
    """How the data came to be; nothing reads it to train."""

    source: dict[str, str | int]
    settings: dict[str, str | int | float]
    n_skipped: Annotated[int, Field(ge=0)]
    loopline_version: str


class Shard(_Strict):
    """One tar file."""

    name: PlainName
    sha256: Sha256
    n_bytes: Count
    n_documents: Count
    n_tokens: Count
    records: Annotated[tuple[Record, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        table = np.array(self.records, dtype=np.int64)  # [n_records, 4]
        if (table[:, 1] < table[:, 3]).any():
            raise ValueError("a record has more documents than tokens; each needs one")
        if (table[:, 0] + table[:, 1] > self.n_bytes).any() or (table[:, 2] + 8 * table[:, 3] > self.n_bytes).any():
            raise ValueError(f"a record reaches past the end of the shard ({self.n_bytes} bytes)")
        _check_sum("n_tokens", self.n_tokens, int(table[:, 1].sum()), "its records")
        _check_sum("n_documents", self.n_documents, int(table[:, 3].sum()), "its records")
        return self


class Split(_Strict):
    """One part of the data: `train`, or `heldout` for evaluation."""

    n_documents: Count
    n_tokens: Count
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]

    @property
    def n_records(self) -> int:
        return sum(len(shard.records) for shard in self.shards)

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        _check_sum("n_tokens", self.n_tokens, sum(shard.n_tokens for shard in self.shards), "its shards")
        _check_sum("n_documents", self.n_documents, sum(shard.n_documents for shard in self.shards), "its shards")
        return self


class Manifest(_Strict):
    """Everything known about one built data set. `load` reads it; `verify` compares it with the disk."""

    format_version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Count
    eos_id: Annotated[int, Field(ge=0)]
    tokenizer: TokenizerEntry
    provenance: Provenance
    splits: Annotated[dict[str, Split], Field(min_length=1)]
    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.dtype != dtype_for(self.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not fit vocab_size {self.vocab_size}")
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} must be below vocab_size {self.vocab_size}")
        names = [shard.name for split in self.splits.values() for shard in split.shards]
        if len(set(names)) < len(names):
            raise ValueError("a shard is listed twice")
        return self

    @property
    def folder(self) -> Path:
        """Where the shards are; known once the manifest was loaded or saved."""
        assert self._folder is not None
        return self._folder

    @property
    def path(self) -> Path:
        return self.folder / MANIFEST_FILE

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Reads and checks a manifest; touches no shard.

        Args:
            path: `manifest.json`, or the folder that holds it.
        Raises:
            DataError: no such file; a field that breaks a rule.
        """
        file = Path(path) / MANIFEST_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise DataError(
                f"{file} does not exist: no data here, or its build was interrupted (the manifest is written last). "
                f"{_REBUILD}"
            )
        try:
            manifest = cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise DataError(f"{file} breaks a rule: {_first_problem(error)}. {_REBUILD}") from None
        manifest._folder = file.parent
        return manifest

    def save(self, folder: str | Path) -> None:
        """Writes `folder/manifest.json` in one step: readers see no manifest, or all of it."""
        target = Path(folder) / MANIFEST_FILE
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        # One line per record keeps the file readable.
        text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3, \4]", text)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        fsync_folder(target.parent)
        self._folder = target.parent

    def split(self, name: str) -> Split:
        """Raises DataError where the manifest has no such split."""
        if name not in self.splits:
            raise DataError(
                f"{self.path} has no split {name!r}, only {', '.join(sorted(self.splits))}; "
                "name one of those, or build the data with heldout_fraction > 0"
            )
        return self.splits[name]

    def iter_shards(self) -> Iterator[Shard]:
        """Every shard of every split."""
        for split in self.splits.values():
            yield from split.shards

    def verify(self, *, hashes: bool = True) -> None:
        """Compares the manifest with the files.

        Args:
            hashes: also read every byte and compare sha256; without it existence and sizes only.
        Raises:
            DataError: a shard is missing, or has another size or hash; the tokenizer is missing or another one.
        """
        for shard in self.iter_shards():
            check_shard_size(self.folder, shard)
            if hashes:
                found = file_sha256(self.folder / shard.name)
                if found != shard.sha256:
                    raise DataError(
                        f"shard {self.folder / shard.name} is not the one that was built: sha256 {found}, the manifest "
                        f"says {shard.sha256}. Copy it again from where it was built, or build the data again"
                    )
        self.verify_tokenizer()

    def verify_tokenizer(self) -> None:
        """Raises DataError where the tokenizer file is missing or has another sha256."""
        path = self.folder / self.tokenizer.file
        found = file_sha256(path) if path.is_file() else "no file"
        if found != self.tokenizer.sha256:
            raise DataError(
                f"{path} is a tokenizer that does not match the manifest: found {found}, expected sha256 "
                f"{self.tokenizer.sha256}. Put back the file the data was built with, or build the data again"
            )

    def content_sha256(self, split: str) -> str:
        """Identity of a split's tokens and their order on disk: changes when any shard does, not when it is moved."""
        listed = [shard.sha256 for shard in self.split(split).shards]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def check_shard_size(folder: Path, shard: Shard) -> None:
    """Raises DataError where the shard is missing or not as long as the manifest says."""
    path = folder / shard.name
    if not path.is_file():
        raise DataError(f"shard {path} is listed in the manifest but missing. Copy it here, or build the data again")
    n_bytes = path.stat().st_size
    if n_bytes != shard.n_bytes:
        raise DataError(
            f"shard {path} has {n_bytes} bytes, the manifest says {shard.n_bytes}: cut short or replaced. "
            "Copy it again from where it was built, or build the data again"
        )


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


def _check_sum(name: str, stated: int, summed: int, what: str) -> None:
    if stated != summed:
        raise ValueError(f"{name} is {stated} but {what} add up to {summed}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the file"
    value = problem["input"]
    shown = f" = {value!r}" if isinstance(value, str | int | float) and len(repr(value)) < 120 else ""
    return f"{field}{shown}: {problem['msg']}"
