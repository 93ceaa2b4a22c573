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

# Enough text that handing out a part costs nothing beside tokenizing it (seconds), little enough to share out evenly.
PART_BYTES = 8 * 2**20


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
        n_skipped: files or rows of the latest whole pass that held no usable text.
    """

    path: Path
    files: list[Path]
    n_skipped: int = 0

    @abstractmethod
    def parts(self) -> list[Part]:
        """The parts; one after the other they are the source.

        Raises:
            DataError: a file is damaged in a way that hides where its parts are.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[str | None]:
        """The documents of a part in order; None in place of a file or row that holds no text.

        Raises:
            DataError: a bad row, by file and row; a damaged file.
        """

    @abstractmethod
    def describe(self) -> dict[str, str | int]:
        """What the manifest records about this source; two sources with equal descriptions are taken as equal."""

    def __iter__(self) -> Iterator[str]:
        """Every document, none of them empty, in the source's order."""
        self.n_skipped = 0
        for part in self.parts():
            for text in self.read(part):
                if text is None:
                    self.n_skipped += 1
                else:
                    yield text

    def _description(self, kind: str, **more: str | int) -> dict[str, str | int]:
        sizes = {"n_files": len(self.files), "n_bytes": sum(file.stat().st_size for file in self.files)}
        return {"kind": kind, "path": str(self.path), **more, **sizes}


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

    Raises:
        DataError: path does not exist; no such file below it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"text source {path} does not exist; give a file or a folder that does")
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if name not in skipped_folders and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(tuple(suffixes))]
    if not found:
        raise DataError(
            f"text source {path} holds no file ending in {' or '.join(suffixes)}; "
            "name another folder or the endings it does hold"
        )
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def text_or_none(text: str) -> str | None:
    """The text as it is; None where there is only white space."""
    return text if text.strip() else None


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
        refuse_row(where, f"keys {sorted(row)}" if isinstance(row, dict) else f"a JSON {type(row).__name__}", field)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: {field!r} is not valid Unicode ({error.reason}); fix or drop the row") from None
    return text


def refuse_row(where: str, found: str, field: str) -> NoReturn:
    """Raises the DataError of a row without text."""
    raise DataError(
        f"{where}: found {found}; every row must be an object with a string under {field!r}. "
        "Name the right field, or fix the row"
    )
