"""`manifest.json`: the list of everything a training run may read, with counts and hashes.

The manifest is written last, so a folder that has one is complete. It may lie at a URL: then the manifest and the
tokenizer are copied to the cache, and the shards are fetched as they are read. Reading them is `shards.py`.
"""

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from loopline.data_pipeline.download import (
    MissingFile,
    RemoteSettings,
    Wanted,
    download,
    file_url,
    parse_location,
    shown,
)
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.record_arrays import RecordRules, broken_record
from loopline.data_pipeline.store import LocalStore, RemoteStore, ShardStore, file_sha256, fsync_folder
from loopline.data_pipeline.tar_layout import check_tar

FORMAT_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
# Of a manifest and of a tokenizer file: far above any real one, far below what fills a machine.
MAX_MANIFEST_BYTES = 2**30
MAX_TOKENIZER_BYTES = 2**28
_REBUILD = "Build the data again with `loopline data build`"
_RECORDS: Final = {"splits": {"__all__": {"shards": {"__all__": {"records"}}}}}


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


class RecordTable(Sequence[Record]):
    """The records of a shard, a sequence of `Record`s kept as one array: 32 bytes each, where objects take 400.

    A corpus of 100 billion tokens has 1.5 million records, and every process that reads it holds them.

    Attributes:
        table: [n_records, 4], int64, read-only; the columns are `Record`'s fields.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.table = np.array(records, dtype=np.int64).reshape(-1, len(Record._fields))
        self.table.setflags(write=False)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: Any) -> Any:
        rows = self.table[i].tolist()
        return tuple(Record(*row) for row in rows) if isinstance(i, slice) else Record(*rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordTable) and np.array_equal(self.table, other.table)

    def __repr__(self) -> str:
        return f"RecordTable({len(self)} records)"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """In JSON a list of lists of four; in Python a table, or a tuple of records."""
        listed = handler.generate_schema(Annotated[tuple[Record, ...], Field(min_length=1)])
        from_list = core_schema.no_info_after_validator_function(cls, listed)
        return core_schema.json_or_python_schema(
            json_schema=from_list,
            python_schema=core_schema.union_schema([core_schema.is_instance_schema(cls), from_list]),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda records: records.table.tolist()),
        )


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
    records: RecordTable

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        table = self.records.table
        if (table[:, 1] < table[:, 3]).any():
            raise ValueError("a record has more documents than tokens; each needs one")
        if (table[:, 0] + table[:, 1] > self.n_bytes).any() or (table[:, 2] + 8 * table[:, 3] > self.n_bytes).any():
            raise ValueError(f"a record reaches past the end of the shard ({self.n_bytes} bytes)")
        _check_sum("n_tokens", self.n_tokens, int(table[:, 1].sum()), "its records")
        _check_sum("n_documents", self.n_documents, int(table[:, 3].sum()), "its records")
        return self


class Split(_Strict):
    """One part of the data: `train`, or `heldout` for evaluation.

    `length_histogram[b]` counts the documents of 2^b to 2^(b+1) - 1 tokens; older builds have none.
    """

    n_documents: Count
    n_tokens: Count
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]
    length_histogram: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**53)], ...], Field(max_length=64)] | None = None

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
    # None for a local data set.
    _remote: RemoteStore | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.dtype != dtype_for(self.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not fit vocab_size {self.vocab_size}")
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} must be below vocab_size {self.vocab_size}")
        shards = list(self.iter_shards())
        for field in ("name", "sha256"):
            if len({getattr(shard, field) for shard in shards}) < len(shards):
                raise ValueError(f"a shard is listed twice: two have one {field}")
        for shard in shards:
            _check_apart(shard, np.dtype(self.dtype).itemsize)
        for name, split in self.splits.items():
            if split.length_histogram is not None:
                counted = f"the counts of splits.{name}.length_histogram"
                _check_sum("n_documents", split.n_documents, sum(split.length_histogram), counted)
        return self

    @property
    def folder(self) -> Path:
        """Where manifest and tokenizer are, and the shards of a local data set; known once it was loaded or saved."""
        assert self._folder is not None
        return self._folder

    @property
    def path(self) -> Path:
        return self.folder / MANIFEST_FILE

    @property
    def location(self) -> str:
        """The manifest's path or URL, for people."""
        return str(self.path) if self._remote is None else self._remote.shown(MANIFEST_FILE)

    @property
    def is_remote(self) -> bool:
        return self._remote is not None

    @property
    def store(self) -> ShardStore:
        """Where the shards are opened."""
        return self._remote or LocalStore(self.folder)

    @classmethod
    def load(cls, path: str | Path, remote: RemoteSettings | None = None) -> "Manifest":
        """Reads and checks a manifest; touches no shard.

        Args:
            path: `manifest.json`, or the folder that holds it: local, or a URL of http, https, s3, gs or file.
            remote: how files of a URL are fetched and kept; None is `RemoteSettings()`.
        Raises:
            DataError: no such file; a field that breaks a rule; a location that is refused; nothing fetched in time.
        """
        location = parse_location(path)
        if isinstance(location, str):
            return cls._load_remote(location, remote or RemoteSettings())
        file = location / MANIFEST_FILE if location.is_dir() else location
        if not file.is_file():
            raise DataError(
                f"{file} does not exist: no data here, or its build was interrupted (the manifest is written last). "
                f"{_REBUILD}"
            )
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{file} has {file.stat().st_size} bytes, {MAX_MANIFEST_BYTES} at most. {_REBUILD}")
        manifest = cls._parse(file.read_bytes(), str(file))
        manifest._folder = file.parent
        return manifest

    @classmethod
    def _parse(cls, content: bytes, what: str) -> "Manifest":
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise DataError(f"{what} breaks a rule: {_first_problem(error)}. {_REBUILD}") from None

    @classmethod
    def _load_remote(cls, url: str, settings: RemoteSettings) -> "Manifest":
        url = url.rstrip("/") if url.endswith(".json") else f"{url.rstrip('/')}/{MANIFEST_FILE}"
        base = url.rpartition("/")[0]
        content = _fetched(url, MAX_MANIFEST_BYTES, None, settings)
        manifest = cls._parse(content, shown(url))
        folder = settings.cache_dir / "manifests" / hashlib.sha256(content).hexdigest()
        try:
            _fetch_tokenizer(manifest.tokenizer, base, folder, settings)
            _write_aside(folder / MANIFEST_FILE, content)
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error}. Choose another data.cache_dir") from error
        manifest._folder = folder
        manifest._remote = RemoteStore(base, settings)
        return manifest

    def save(self, folder: str | Path) -> None:
        """Writes `folder/manifest.json` in one step: readers see no manifest, or all of it."""
        target = Path(folder) / MANIFEST_FILE
        tables = (shard.records.table for shard in self.iter_shards())
        fields = self.model_dump(mode="json", exclude_none=True, exclude=_RECORDS)
        for split in fields["splits"].values():
            for shard in split["shards"]:
                shard["records"] = None
        # No other null: exclude_none, and quotes inside a string are escaped.
        text = re.sub(
            r'( *)"records": null', lambda found: _listed(next(tables), found[1]), json.dumps(fields, indent=1)
        )
        _write_aside(target, (text + "\n").encode())
        self._folder = target.parent

    def split(self, name: str) -> Split:
        """Raises DataError where the manifest has no such split."""
        if name not in self.splits:
            raise DataError(
                f"{self.location} has no split {name!r}, only {', '.join(sorted(self.splits))}; "
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
            hashes: also read every byte, compare sha256, check that the tar's members are the manifest's records, and
                read every record as a stream would; remote shards are all fetched for it, through the cache. Without
                it existence and sizes only.
        Raises:
            DataError: a shard is missing, or has another size or hash; a tar member that the manifest does not
                describe; a record that a stream would refuse; the tokenizer is missing or another one.
        """
        store, rules = self.store, RecordRules(self.dtype, self.vocab_size, self.eos_id)
        for shard in self.iter_shards():
            store.check(shard, ask_server=not hashes)
            if hashes:
                with store.open(shard) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != shard.sha256:
                        raise DataError(
                            f"shard {store.shown(shard.name)} is not the one that was built: sha256 {found}, the "
                            f"manifest says {shard.sha256}. {store.repair}"
                        )
                    check_tar(file, store.shown(shard.name), shard)
                    for record in shard.records:
                        try:
                            rules.read(file, shard.n_bytes, record)
                        except (OSError, ValueError) as error:
                            raise broken_record(store, shard.name, record, error) from None
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


def _fetched(url: str, max_bytes: int, sha256: str | None, settings: RemoteSettings) -> bytes:
    out = io.BytesIO()
    n_bytes = download(
        url, out, Wanted(max_bytes=max_bytes, sha256=sha256), settings, time.monotonic() + settings.retry_timeout_s
    ).n_bytes
    return out.getvalue()[:n_bytes]


def _fetch_tokenizer(entry: TokenizerEntry, base: str, folder: Path, settings: RemoteSettings) -> None:
    """Copies the tokenizer and its Hugging Face files, which the manifest does not list, beside the cached manifest."""
    from loopline.data_pipeline.tokenizer import CONFIG_FILES  # imports a large library

    if entry.file in (MANIFEST_FILE, *CONFIG_FILES):
        raise DataError(f"{shown(base)} has a manifest that names {entry.file!r} as its tokenizer. {_REBUILD}")
    target = folder / entry.file
    if target.is_file() and file_sha256(target) == entry.sha256:
        return
    for name in CONFIG_FILES:
        try:
            content = _fetched(file_url(base, name), MAX_TOKENIZER_BYTES, None, settings)
        except MissingFile:
            continue
        _write_aside(folder / name, content)
    # Last, so that a folder with a tokenizer has its other files.
    _write_aside(target, _fetched(file_url(base, entry.file), MAX_TOKENIZER_BYTES, entry.sha256, settings))


def _write_aside(target: Path, content: bytes) -> None:
    """Writes a file in one durable step: readers see no file, or all of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)
    fsync_folder(target.parent)


def _listed(table: np.ndarray, indent: str) -> str:
    """The field `records`, [n_records, 4], as JSON: one line per record keeps the file readable."""
    rows = ",\n".join(f"{indent} [{a}, {b}, {c}, {d}]" for a, b, c, d in table.tolist())
    return f'{indent}"records": [\n{rows}\n{indent}]'


def _check_apart(shard: Shard, token_bytes: int) -> None:
    table = shard.records.table
    # Of every record its tokens, then its ends: in the order of most files, which makes sorting them quick.
    starts = table[:, [0, 2]].ravel()
    stops = starts + (table[:, [1, 3]] * [token_bytes, 8]).ravel()
    order = np.argsort(starts, kind="stable")
    is_over = starts[order][1:] < stops[order][:-1]
    if is_over.any():
        at = starts[order][1:][is_over][0]
        raise ValueError(f"shard {shard.name} has records that overlap or are listed twice, at byte {at}")


def _check_sum(name: str, stated: int, summed: int, what: str) -> None:
    if stated != summed:
        raise ValueError(f"{name} is {stated} but {what} add up to {summed}")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the file"
    value = problem["input"]
    shown = f" = {value!r}" if isinstance(value, str | int | float) and len(repr(value)) < 120 else ""
    return f"{field}{shown}: {problem['msg']}"
