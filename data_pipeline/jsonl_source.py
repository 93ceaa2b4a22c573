"""JSON lines: plain files in byte ranges, `.gz` and `.zst` files whole, since those cannot be entered half-way."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from loopline.data_pipeline.errors import DataError, printable
from loopline.data_pipeline.parts import PART_BYTES, Part, Source, group_files, list_files, text_of_json
from loopline.data_pipeline.skips import Skip

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
# A few kilobytes of zstd can claim gigabytes of one line. A line holds more than its document, whose own limit is far
# below this: escapes of six bytes a character, and other fields.
MAX_LINE_BYTES = 2**30


class JsonlSource(Source):
    """One document per line: the string under `field` of each line's JSON object.

    Blank lines are ignored; rows whose text is only white space are skipped and counted.
    """

    def __init__(
        self,
        path: str | Path,
        field: str = "text",
        suffixes: Sequence[str] = JSONL_SUFFIXES,
        *,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """Lists the files; reads none of them.

        Args:
            path: a file, or a folder of such files.
            field: key of the text in each row.
            suffixes: name endings that count, for a folder only.
            part_bytes: bytes per part of a plain file.
        Raises:
            DataError: path does not exist; the folder holds no such file.
        """
        self.path = Path(path)
        self.field = field
        self.files = list_files(self.path, tuple(suffixes))
        self._part_bytes = part_bytes

    def parts(self) -> list[Part]:
        parts: list[Part] = []
        small: list[Path] = []  # neighbours that go into one part together
        for file in self.files:
            n_bytes = file.stat().st_size
            if file.suffix in _COMPRESSION or n_bytes <= self._part_bytes:
                small.append(file)
                continue
            parts += group_files(small, self._part_bytes)
            small = []
            starts = range(0, n_bytes, self._part_bytes)
            stops = [*starts[1:], n_bytes]
            parts += [Part((file,), start, stop, stop - start) for start, stop in zip(starts, stops, strict=True)]
        return parts + group_files(small, self._part_bytes)

    def read(self, part: Part) -> Iterator[str | Skip]:
        """Raises DataError for a row that is not a JSON object with a string under `field`, and for damaged files."""
        for file in part.files:
            for number, start, line in self._lines(file, part.start, part.stop):
                if not line.strip():
                    continue
                # Counting the lines before a part costs a pass over the file.
                where = f"{file} at byte {start}" if part.start else f"{file}:{number}"
                try:
                    document = self._document(text_of_json(line, self.field, where), where)
                except DataError as error:
                    n_before = _count_lines(file, part.start)
                    raise DataError(str(error).replace(printable(where), f"{file}:{n_before + number}", 1)) from None
                yield document

    def describe(self) -> dict[str, str | int]:
        return self._description("jsonl", field=self.field)

    def _lines(self, file: Path, start: int, stop: int | None) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, offset, line) of every line whose first byte lies in [start, stop)."""
        with _open(file) as stream:
            position = start
            if start:
                # From one byte before: a line that begins exactly at `start` is ours.
                stream.seek(start - 1)
                position = start - 1 + len(stream.readline())
            number = 0
            while stop is None or position < stop:
                line = _readline(stream, file)
                if not line:
                    return
                number += 1
                yield number, position, line
                position += len(line)


def _open(file: Path) -> io.BufferedReader:
    compression = _COMPRESSION.get(file.suffix)
    if compression is None:
        return file.open("rb")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty: not even a {compression} header. Copy it again, or leave it out")
    # pyarrow, not the standard library's gzip: one reader for both, and it refuses a stream that is cut short.
    import pyarrow

    try:
        return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression), 2**20)
    except OSError as error:
        raise _damaged(file, error) from None


def _readline(stream: io.BufferedReader, file: Path) -> bytes:
    try:
        line = stream.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise _damaged(file, error) from None
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{file} has a line of more than {MAX_LINE_BYTES} bytes; split that document, or drop it")
    return line


def _damaged(file: Path, error: OSError) -> DataError:
    return DataError(f"{file} cannot be read: {error}. Copy it again from where it came, or leave it out")


def _count_lines(file: Path, stop: int) -> int:
    """Lines that begin before byte `stop`; 0 for a file that is read from its beginning."""
    n_lines, n_left, last = 0, stop, b"\n"
    with file.open("rb") as stream:
        while n_left and (block := stream.read(min(n_left, 2**20))):
            n_lines += block.count(b"\n")
            n_left -= len(block)
            last = block[-1:]
    return n_lines + (last != b"\n")
