"""Where text comes from: `open_source` picks the reader for what a user names; text and source files are read here.

A source is iterated for its documents (one `str` each), always in the same order, as often as wanted; the builder
reads it twice, once to train the tokenizer and once to encode, the second time part by part. Local files only.
"""

import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.jsonl_source import JSONL_SUFFIXES, JsonlSource
from loopline.data_pipeline.parts import DEFAULT_MAX_DOCUMENT_BYTES, PART_BYTES, Part, Source, group_files, list_files
from loopline.data_pipeline.skips import NOT_UTF8, Skip
from loopline.data_pipeline.table_sources import DATASET_DICT_MARK, HFDatasetSource, ParquetSource, is_dataset_folder
from loopline.data_pipeline.tar_source import WebDatasetSource

BUNDLED = ("stdlib",)

# `test` and `tests` are half of the library by size and mostly tables of expected values.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)


class FileSource(Source):
    """One document per file: a single file, or every file below a folder whose name ends in one of `suffixes`.

    Files that are not UTF-8 and files with nothing but white space are skipped and counted in `skips`.
    """

    kind = "files"

    def __init__(
        self,
        path: str | Path,
        suffixes: Sequence[str] = (".txt",),
        *,
        skipped_folders: frozenset[str] = frozenset(),
        part_bytes: int = PART_BYTES,
    ) -> None:
        """Lists the files; reads none of them.

        Args:
            path: a file (taken whatever its name) or a folder.
            suffixes: name endings that count, with the dot; used for a folder only.
            skipped_folders: folder names that are not entered.
            part_bytes: small files share parts of about this size.
        Raises:
            DataError: path does not exist; the folder holds no such file.
        """
        self.path = Path(path)
        self.suffixes = tuple(suffixes)
        self.files = list_files(self.path, self.suffixes, skipped_folders)
        self._part_bytes = part_bytes

    def parts(self) -> list[Part]:
        return group_files(self.files, self._part_bytes)

    def read(self, part: Part) -> Iterator[str | Skip]:
        for file in part.files:
            self._check_size(file.stat().st_size, str(file))
            try:
                # Bytes, not text mode: a document keeps its own line endings on every platform.
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                yield Skip(str(file), NOT_UTF8)
            else:
                yield self._document(text, str(file))

    def describe(self) -> dict[str, str | int]:
        return self._description(self.kind, suffixes=" ".join(self.suffixes))


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


# File ending -> reader; a plain file of any other ending is text only where the user says so.
_READERS: dict[str, Callable[[Path, str], Source]] = {
    ".txt": lambda path, field: FileSource(path),
    **dict.fromkeys(JSONL_SUFFIXES, JsonlSource),
    ".parquet": ParquetSource,
    ".tar": WebDatasetSource,
}
_COMPRESSED = (".gz", ".zst")


def open_source(
    spec: str | Path,
    *,
    suffixes: Sequence[str] | None = None,
    field: str = "text",
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
) -> Source:
    """The source a user means by `spec`: a bundled name, a file, or a folder.

    Args:
        spec: `stdlib`, or a path. A bundled name wins over a file of that name (write `./stdlib` for the file).
        suffixes: name endings to read from a folder, or of a file with an unusual name. Without it a folder must hold
            files of one kind: `.txt`, `.jsonl` (also `.gz`, `.zst`), `.parquet`, `.tar`, or a saved Hugging Face data
            set. Endings of no kind are source files, one document each; `.gz` and `.zst` of any name are jsonl.
        field: key or column of the text.
        max_document_bytes: a larger document is refused, for the memory it takes to tokenize.
    Raises:
        DataError: nothing there, or it is not clear how to read it; max_document_bytes below 1.
    """
    if max_document_bytes < 1:
        raise DataError(f"max_document_bytes={max_document_bytes} must be 1 or more; leave it out for the default")
    try:
        source = _open(spec, suffixes, field)
    except OSError as error:
        raise DataError(f"text source {spec} cannot be read: {error}. Make it readable, or give another") from None
    source.max_document_bytes = max_document_bytes
    return source


def _open(spec: str | Path, suffixes: Sequence[str] | None, field: str) -> Source:
    if spec in BUNDLED:
        return StdlibSource()
    if str(spec).startswith("pipe:") or "://" in str(spec):
        raise DataError(f"text source {spec!r} is a command or an address; copy the data to a local file or folder")
    path = Path(spec)
    if suffixes is not None:
        return _open_as(path, tuple(suffixes), field)
    if is_dataset_folder(path) or (path / DATASET_DICT_MARK).is_file():
        return HFDatasetSource(path, field)
    if path.is_dir():
        # The longest ending first: `.jsonl.gz` is also a `.gz`.
        kinds = sorted({_ending(file) for file in list_files(path, tuple(_READERS))}, key=list(_READERS).index)
        readers = {_READERS[kind] for kind in kinds}
        if len(readers) > 1:
            raise DataError(f"text source {path} holds both {' and '.join(kinds)} files; say which with suffixes")
        return readers.pop()(path, field)
    if path.is_file() and _ending(path) not in _READERS:
        raise DataError(
            f"text source {path} ends in {path.suffix!r}; files must be {', '.join(_READERS)}, or name suffixes"
        )
    return _READERS.get(_ending(path), _READERS[".txt"])(path, field)


def _open_as(path: Path, suffixes: tuple[str, ...], field: str) -> Source:
    if all(suffix in JSONL_SUFFIXES or suffix.endswith(_COMPRESSED) for suffix in suffixes):
        return JsonlSource(path, field, suffixes)
    if suffixes == (".parquet",):
        return ParquetSource(path, field)
    if suffixes == (".tar",):
        return WebDatasetSource(path, field)
    special = [suffix for suffix in suffixes if suffix in _READERS and suffix != ".txt"]
    special += [suffix for suffix in suffixes if suffix.endswith(_COMPRESSED)]
    if special:
        raise DataError(f"suffixes {' '.join(suffixes)} mix {special[0]} with others; build each kind by itself")
    return FileSource(path, suffixes)


def _ending(file: Path) -> str:
    """The ending the readers go by: the longest known one, else the file's own."""
    known = [suffix for suffix in _READERS if file.name.endswith(suffix)]
    return max(known, key=len) if known else file.suffix
