"""Tables with a text column: parquet files, and Hugging Face `datasets` saved on disk. One document per row."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.parts import PART_BYTES, Part, Source, list_files, refuse_row
from loopline.data_pipeline.skips import Skip

_BATCH_ROWS = 256  # decoded at a time: bounds memory, also where a row group holds gigabytes
DATASET_MARKS = ("state.json", "dataset_info.json")  # what `Dataset.save_to_disk` leaves in a folder
DATASET_DICT_MARK = "dataset_dict.json"


class _TableSource(Source):
    """What sources of rows share."""

    field: str

    def _documents(self, column: Any, where: Path, first_row: int) -> Iterator[str | Skip]:
        """The strings of an arrow column; rows are counted from 0, as table libraries do."""
        for row, value in enumerate(column, first_row):
            place = f"{where}:{row}"
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: {self.field!r} is not UTF-8 ({error.reason}); fix or drop the row") from None
            if not isinstance(text, str):
                refuse_row(place, "null" if text is None else f"a {type(text).__name__}", self.field)
            yield self._document(text, place)


class ParquetSource(_TableSource):
    """The string column `field` of parquet files; parts are runs of row groups."""

    def __init__(self, path: str | Path, field: str = "text", *, part_bytes: int = PART_BYTES) -> None:
        """Lists the files; reads none of them.

        Args:
            path: a `.parquet` file, or a folder of them.
            field: name of the text column.
            part_bytes: uncompressed bytes of the text column per part.
        Raises:
            DataError: path does not exist; the folder holds no such file.
        """
        self.path = Path(path)
        self.field = field
        self.files = list_files(self.path, (".parquet",))
        self._part_bytes = part_bytes

    def parts(self) -> list[Part]:
        parts = []
        for file in self.files:
            with _open_parquet(file, self.field) as table:
                sizes = [_column_bytes(table.metadata.row_group(i), self.field) for i in range(table.num_row_groups)]
            start, n_bytes = 0, 0
            for group, size in enumerate(sizes):
                n_bytes += size
                if n_bytes >= self._part_bytes or group == len(sizes) - 1:
                    parts.append(Part((file,), start, group + 1, n_bytes))
                    start, n_bytes = group + 1, 0
        return parts

    def read(self, part: Part) -> Iterator[str | Skip]:
        import pyarrow

        [file] = part.files
        with _open_parquet(file, self.field) as table:
            groups = range(part.start, table.num_row_groups if part.stop is None else part.stop)
            row = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
            try:
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=list(groups), columns=[self.field]):
                    yield from self._documents(batch.column(0), file, row)
                    row += batch.num_rows
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(file, error) from None

    def describe(self) -> dict[str, str | int]:
        return self._description("parquet", field=self.field)


class HFDatasetSource(_TableSource):
    """The string column `field` of a folder that `datasets.Dataset.save_to_disk` wrote; parts are ranges of rows.

    Read through the `datasets` library, which runs no code for data on disk.
    """

    def __init__(self, path: str | Path, field: str = "text", *, part_bytes: int = PART_BYTES) -> None:
        """Args as those of `ParquetSource`; path is the saved folder.

        Raises:
            DataError: not such a folder, or one with several splits; no string column `field`.
        """
        self.path = Path(path)
        self.field = field
        self._part_bytes = part_bytes
        self._dataset: Any = None
        if (self.path / DATASET_DICT_MARK).is_file():
            splits = sorted(folder.name for folder in self.path.iterdir() if is_dataset_folder(folder))
            raise DataError(
                f"text source {self.path} holds the splits {', '.join(splits)}; a build reads one. "
                f"Give its own folder, such as {self.path / (splits[0] if splits else 'train')}"
            )
        self._open()
        self.files = sorted(self.path / name for name in _data_files(self.path))

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself.
        return {**self.__dict__, "_dataset": None}

    def parts(self) -> list[Part]:
        n_rows, n_bytes = self._open().num_rows, sum(file.stat().st_size for file in self.files)
        if not n_rows:
            return []
        rows = max(1, n_rows * self._part_bytes // max(n_bytes, 1))  # per part
        starts = range(0, n_rows, rows)
        stops = [min(start + rows, n_rows) for start in starts]
        return [
            Part(tuple(self.files), start, stop, n_bytes * (stop - start) // n_rows)
            for start, stop in zip(starts, stops, strict=True)
        ]

    def read(self, part: Part) -> Iterator[str | Skip]:
        import pyarrow

        dataset = self._open()
        stop = dataset.num_rows if part.stop is None else part.stop
        try:
            for row in range(part.start, stop, _BATCH_ROWS):
                batch = dataset[row : min(row + _BATCH_ROWS, stop)]
                yield from self._documents(batch.column(self.field), self.path, row)
        except (OSError, pyarrow.ArrowException) as error:
            raise _damaged(self.path, error) from None

    def describe(self) -> dict[str, str | int]:
        return self._description("datasets", field=self.field)

    def _open(self) -> Any:
        """The dataset, giving arrow tables of the one column; opened once per process."""
        if self._dataset is None:
            import datasets

            if not is_dataset_folder(self.path):
                raise DataError(
                    f"text source {self.path} is no folder of `Dataset.save_to_disk`: it needs "
                    f"{' and '.join(DATASET_MARKS)}. Save the data set there, or give another folder"
                )
            for name in _data_files(self.path):
                # The library would follow it out of the folder.
                if Path(name).name != name:
                    raise DataError(
                        f"{self.path / DATASET_MARKS[0]} lists the data file {name!r}; data files lie in the folder "
                        "itself, under plain names. Save the data set again"
                    )
            try:
                dataset = datasets.load_from_disk(str(self.path))
            except (OSError, ValueError, KeyError, TypeError) as error:  # what it raises for damaged folders
                raise _damaged(self.path, error) from None
            _check_column({name: str(getattr(f, "dtype", f)) for name, f in dataset.features.items()}, self)
            self._dataset = dataset.select_columns([self.field]).with_format("arrow")
        return self._dataset


def is_dataset_folder(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder, by the files it leaves."""
    return all((path / name).is_file() for name in DATASET_MARKS)


def _data_files(folder: Path) -> list[str]:
    """Names of the files that hold a saved data set; others, such as `cache-*.arrow` of a `map`, are not part of it."""
    mark = folder / DATASET_MARKS[0]
    try:
        return [str(listed["filename"]) for listed in json.loads(mark.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from None


def _open_parquet(file: Path, field: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(file, error) from None
    columns = {column.name: str(column.type) for column in table.schema_arrow}
    if "string" not in columns.get(field, ""):
        table.close()
        raise DataError(_no_column(file, field, columns))
    return table


def _check_column(columns: dict[str, str], source: HFDatasetSource) -> None:
    if "string" not in columns.get(source.field, ""):
        raise DataError(_no_column(source.path, source.field, columns))


def _no_column(where: Path, field: str, columns: dict[str, str]) -> str:
    found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    return f"{where} has no string column {field!r}, only {found}; name the column of the text (--text-field)"


def _column_bytes(group: Any, field: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)


def _damaged(where: Path, error: Exception) -> DataError:
    return DataError(f"{where} cannot be read: {error}. Copy it again from where it came, or leave it out")
