"""Where text comes from: txt files, jsonl files, folders of source code, and the bundled corpus `stdlib`.

A source is iterated for its documents (one `str` each), always in the same order, as often as wanted; the builder
reads it twice, once to train the tokenizer and once to encode. Parquet and remote sources are not here yet.
"""

import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from loopline.data_pipeline.errors import DataError

BUNDLED = ("stdlib",)

# `test` and `tests` are half of the library by size and mostly tables of expected values.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)


class Source(Protocol):
    """An ordered, repeatable collection of documents."""

    n_skipped: int  # files or rows of the latest pass that held no usable text

    def __iter__(self) -> Iterator[str]:
        """Yields every document, none of them empty, in a fixed order."""
        ...

    def describe(self) -> dict[str, str | int]:
        """What the manifest records about this source; two sources with equal descriptions are taken as equal."""
        ...


class FileSource:
    """One document per file: a single file, or every file below a folder whose name ends in one of `suffixes`.

    Files that are not UTF-8 and files with nothing but white space are skipped and counted in `n_skipped`.
    """

    kind = "files"

    def __init__(
        self, path: str | Path, suffixes: Sequence[str] = (".txt",), *, skipped_folders: frozenset[str] = frozenset()
    ) -> None:
        """Lists the files; reads none of them.

        Args:
            path: a file (taken whatever its name) or a folder.
            suffixes: name endings that count, with the dot; used for a folder only.
            skipped_folders: folder names that are not entered. Hidden folders never are.
        Raises:
            DataError: path does not exist; the folder holds no such file.
        """
        self.path = Path(path)
        self.suffixes = tuple(suffixes)
        self.files = list_files(self.path, self.suffixes, skipped_folders)
        self.n_skipped = 0

    def __iter__(self) -> Iterator[str]:
        self.n_skipped = 0
        for file in self.files:
            try:
                # Bytes, not text mode: a document keeps its own line endings on every platform.
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                text = ""
            if text.strip():
                yield text
            else:
                self.n_skipped += 1

    def describe(self) -> dict[str, str | int]:
        return {
            "kind": self.kind,
            "path": str(self.path),
            "suffixes": " ".join(self.suffixes),
            "n_files": len(self.files),
            "n_bytes": sum(file.stat().st_size for file in self.files),
        }


class StdlibSource(FileSource):
    """The bundled corpus: the `.py` files of the running Python's own standard library (about 600 files, 11 MB).

    It needs no download and is on every machine that can run Loopline. Its content follows the Python version, which
    the description records.
    """

    kind = "stdlib"

    def __init__(self) -> None:
        super().__init__(sysconfig.get_path("stdlib"), (".py",), skipped_folders=_STDLIB_SKIPPED_FOLDERS)

    def describe(self) -> dict[str, str | int]:
        # No path: the same Python in another place is the same corpus.
        return {**super().describe(), "path": f"Python {platform.python_version()} standard library"}


class JsonlSource:
    """One document per line of `.jsonl` files: the string under `field` of each line's JSON object.

    Blank lines are ignored; rows whose text is only white space are skipped and counted in `n_skipped`.
    """

    def __init__(self, path: str | Path, field: str = "text") -> None:
        """Lists the files; reads none of them.

        Args:
            path: a file, or a folder of `.jsonl` files.
            field: key of the text in each row.
        Raises:
            DataError: path does not exist; the folder holds no `.jsonl` file.
        """
        self.path = Path(path)
        self.field = field
        self.files = list_files(self.path, (".jsonl",))
        self.n_skipped = 0

    def __iter__(self) -> Iterator[str]:
        """Raises DataError for a row that is not a JSON object with a string under `field`."""
        self.n_skipped = 0
        for file in self.files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    text = self._text_of(line, f"{file}:{number}")
                    if text.strip():
                        yield text
                    else:
                        self.n_skipped += 1

    def _text_of(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:  # covers bad JSON and bad UTF-8
            raise DataError(f"{where}: not JSON ({error}). Every line must be a JSON object; fix or drop it") from None
        text = row.get(self.field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"keys {sorted(row)}" if isinstance(row, dict) else f"a JSON {type(row).__name__}"
            raise DataError(
                f"{where}: found {found}; every row must be an object with a string under {self.field!r}. "
                "Name the right field, or fix the row"
            )
        return text

    def describe(self) -> dict[str, str | int]:
        return {
            "kind": "jsonl",
            "path": str(self.path),
            "field": self.field,
            "n_files": len(self.files),
            "n_bytes": sum(file.stat().st_size for file in self.files),
        }


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


def open_source(spec: str | Path, *, suffixes: Sequence[str] | None = None, field: str = "text") -> Source:
    """The source a user means by `spec`: a bundled name, a file, or a folder.

    Args:
        spec: `stdlib`, or a path. A bundled name wins over a file of that name (write `./stdlib` for the file).
        suffixes: name endings of a folder of source files; without it the folder must hold `.txt` or `.jsonl` files.
        field: key of the text in jsonl rows.
    Raises:
        DataError: nothing there, or it is not clear how to read it.
    """
    if spec in BUNDLED:
        return StdlibSource()
    path = Path(spec)
    if suffixes is not None and tuple(suffixes) != (".jsonl",):
        return FileSource(path, suffixes)
    if path.is_dir() and suffixes is None:
        kinds = sorted({file.suffix for file in list_files(path, (".txt", ".jsonl"))})
        if len(kinds) > 1:
            raise DataError(f"text source {path} holds both .txt and .jsonl files; say which with suffixes")
        return JsonlSource(path, field) if kinds == [".jsonl"] else FileSource(path)
    if path.is_file() and path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"text source {path} ends in {path.suffix!r}; files must be .txt or .jsonl, or name suffixes")
    return JsonlSource(path, field) if path.suffix == ".jsonl" or suffixes else FileSource(path)
