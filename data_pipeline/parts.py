"""What a text source is: parts that can be read alone, in any process, and together make one fixed order.

The builder hands parts to worker processes and puts their documents together again in the order of the parts. Which
parts there are changes how the work is divided and never what is built.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.skips import NO_TEXT, Skip, Skips

# Enough text that handing out a part costs nothing beside tokenizing it (seconds), little enough to share out evenly.
PART_BYTES = 8 * 2**20
# The tokenizer holds a whole document at about 150 bytes of memory a byte (docs/data.md): 2.5 GB for this many.
DEFAULT_MAX_DOCUMENT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Part:
    """One piece of a source.

    Attributes:
        files: what it reads, in order.
        start, stop: range within the only file (bytes, rows or row groups, as the source defines); None is the end.
        n_bytes: size of what it reads, roughly; for the progress bar alone.
    """

    files: tuple[Path, ...]
    start: int = 0
    stop: int | None = None
    n_bytes: int = 0

    def __str__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}" + (f" [{self.start}:{self.stop}]" if self.stop is not None else "")


class Source(ABC):
    """An ordered, repeatable collection of documents. Picklable: worker processes get a copy.

    Attributes:
        max_document_bytes: a larger document, as UTF-8, is refused; may be set before the source is read.
        n_texts, skips: documents that the latest whole pass gave, and files or rows without usable text.
    """

    path: Path
    files: list[Path]
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    n_texts: int = 0
    skips: Skips = Skips()

    @property
    def n_skipped(self) -> int:
        return self.skips.n

    @abstractmethod
    def parts(self) -> list[Part]:
        """The parts; one after the other they are the source.

        Raises:
            DataError: a file is damaged in a way that hides where its parts are.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[str | Skip]:
        """The documents of a part in order; a `Skip` in place of a file or row that holds no usable text.

        Raises:
            DataError: a bad row, by file and row; a damaged file; a document of more than `max_document_bytes`.
        """

    @abstractmethod
    def describe(self) -> dict[str, str | int]:
        """What the manifest records about this source; two sources with equal descriptions are taken as equal."""

    def __iter__(self) -> Iterator[str]:
        """Every document, none of them empty, in the source's order."""
        self.n_texts, self.skips = 0, Skips()
        for part in self.parts():
            for text in self.read(part):
                if isinstance(text, Skip):
                    self.skips.add(text)
                else:
                    self.n_texts += 1
                    yield text

    def _document(self, text: str, where: str) -> str | Skip:
        """The text as it is; a skip where there is only white space. Raises DataError for one that is too large."""
        if 4 * len(text) > self.max_document_bytes:  # UTF-8 has at most 4 bytes a character
            self._check_size(len(text.encode()), where)
        return text if text.strip() else Skip(where, NO_TEXT)

    def _check_size(self, n_bytes: int, where: str) -> None:
        if n_bytes > self.max_document_bytes:
            raise DataError(
                f"{where} is a document of {n_bytes} bytes, max_document_bytes is {self.max_document_bytes}: the "
                "tokenizer takes about 150 bytes of memory for each. Split the document or leave it out, or raise the "
                "limit (--max-document-bytes) where memory allows"
            )

    def _description(self, kind: str, **more: str | int) -> dict[str, str | int]:
        sizes = {"n_files": len(self.files), "n_bytes": sum(file.stat().st_size for file in self.files)}
        # A path need not be UTF-8, and a manifest must be.
        path = os.fsencode(self.path).decode("utf-8", "backslashreplace")
        return {"kind": kind, "path": path, **more, **sizes}


def group_files(files: Iterable[Path], part_bytes: int = PART_BYTES) -> list[Part]:
    """Whole files in their order, as parts of at least `part_bytes` each (the last may be smaller)."""
    parts: list[Part] = []
    group: list[Path] = []
    n_bytes = 0
    for file in files:
        group.append(file)
        n_bytes += file.stat().st_size
        if n_bytes >= part_bytes:
            parts.append(Part(tuple(group), n_bytes=n_bytes))
            group, n_bytes = [], 0
    if group:
        parts.append(Part(tuple(group), n_bytes=n_bytes))
    return parts


def list_files(path: Path, suffixes: Sequence[str], skipped_folders: frozenset[str] = frozenset()) -> list[Path]:
    """Every file below `path` whose name ends in one of `suffixes`, sorted by relative path; `[path]` for a file.

    Links are followed, to files and to folders. Hidden files and folders, whose names begin with a dot, are left out.

    Raises:
        DataError: path does not exist; no such file below it; something below it that cannot be read: a folder, a link
            to nothing, a FIFO or socket; a folder that is reached twice.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        found = "is no file and no folder" if path.exists() else "does not exist"
        raise DataError(f"text source {path} {found}; give a file or a folder")
    files = [file for file in _iter_names(path, skipped_folders) if file.name.endswith(tuple(suffixes))]
    for file in files:
        # Opening a FIFO would wait for ever.
        if not file.is_file():
            found = "is no regular file (a FIFO, socket or device)" if file.exists() else "is a link to nothing"
            raise DataError(f"{file} {found}; remove it from the source, or put the file there")
    if not files:
        raise DataError(
            f"text source {path} holds no file ending in {' or '.join(suffixes)}; "
            "name another folder or the endings it does hold"
        )
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _iter_names(path: Path, skipped_folders: frozenset[str]) -> Iterator[Path]:
    """All that is not a folder below `path`. What is not listed here is lost, so nothing is passed over in silence."""
    seen: dict[tuple[int, int], Path] = {}
    folders = [path]
    while folders:
        folder = folders.pop()
        try:
            status = folder.stat()
            entries = [(entry.name, entry.is_dir()) for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError as error:
            what = error.filename or folder
            raise DataError(f"{what} cannot be read: {error.strerror}. Make it readable, or leave it out") from None
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first is not folder:
            raise DataError(
                f"{folder} is the same folder as {first}, by a link: its documents would be read twice. Remove the link"
            )
        for name, is_folder in sorted(entries):
            if not is_folder:
                yield folder / name
            elif name not in skipped_folders:
                folders.append(folder / name)


def text_of_json(data: bytes, field: str, where: str) -> str:
    """The string under `field` of a JSON object.

    Raises:
        DataError: not JSON, not an object, no string there; `where` says which row.
    """
    try:
        row: Any = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise DataError(f"{where}: not JSON ({error}). Every row must be a JSON object; fix or drop it") from None
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        refuse_row(where, _found_in(row, field), field)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: {field!r} is not valid Unicode ({error.reason}); fix or drop the row") from None
    return text


def _found_in(row: Any, field: str) -> str:
    """What a JSON row holds in place of a text."""
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}"
    if field not in row:
        return f"keys {sorted(row)}"
    value = row[field]
    return f"{'null' if value is None else f'a JSON {type(value).__name__}'} under {field!r}"


def refuse_row(where: str, found: str, field: str) -> NoReturn:
    """Raises the DataError of a row without text."""
    raise DataError(
        f"{where}: found {found}; every row must be an object with a string under {field!r}. "
        "Name the right field, or fix the row"
    )
