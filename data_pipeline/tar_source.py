"""Text in webdataset tar files: one document per sample, from its `.txt` member or a field of its `.json` member.

A tar may come from anywhere: names that leave the folder, links, pickles and sizes that the file does not hold are
refused, and nothing is unpacked to disk.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.parts import PART_BYTES, Part, Source, group_files, list_files, text_of_json
from loopline.data_pipeline.skips import NO_MEMBER, NOT_UTF8, Skip

# Sizes and chains of headers in a made-up tar can also end in the last four.
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)
# What common decoders would unpickle. No part of ours does; their presence means the data wants to run code.
_PICKLED = (".pkl", ".pickle", ".pth", ".pt", ".pyd")


class WebDatasetSource(Source):
    """Samples of webdataset tars in the order of the files; a sample is a run of members with one name up to the dot.

    A `.txt` member is the document; where a sample has none, it is the string under `field` of its `.json` member.
    Endings may be in capitals. Samples with neither, with white space only, or with a `.txt` that is not UTF-8 are
    skipped and counted; hidden members are left out; a `.txt` with more dots in its name is refused.
    """

    def __init__(self, path: str | Path, field: str = "text", *, part_bytes: int = PART_BYTES) -> None:
        """Lists the files; reads none of them.

        Args:
            path: a `.tar` file, or a folder of them.
            field: key of the text in `.json` members.
            part_bytes: small tars share parts of about this size.
        Raises:
            DataError: path does not exist; the folder holds no such file.
        """
        self.path = Path(path)
        self.field = field
        self.files = list_files(self.path, (".tar",))
        self._part_bytes = part_bytes

    def parts(self) -> list[Part]:
        return group_files(self.files, self._part_bytes)

    def read(self, part: Part) -> Iterator[str | Skip]:
        for file in part.files:
            yield from self._samples(file)

    def describe(self) -> dict[str, str | int]:
        return self._description("webdataset", field=self.field)

    def _samples(self, file: Path) -> Iterator[str | Skip]:
        key: tuple[str, str] | None = None
        members: dict[str, tuple[str, bytes]] = {}
        for name, data in self._members(file):
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            extension = extension.lower()  # as webdataset does
            if not stem:  # hidden; for webdataset no sample either
                continue
            if extension.endswith(".txt"):
                raise DataError(
                    f"{file}: member {name!r} is no document of its own: a sample's name ends at the first dot, so it "
                    f"is the part {extension!r} of sample {stem!r}. Rename it, so that its only dot is that of .txt"
                )
            if (folder, stem) != key:
                if key is not None:
                    yield self._text(file, members)
                key, members = (folder, stem), {}
            if extension in members:
                raise DataError(f"{file}: member {name!r} comes twice; every sample needs a name of its own")
            members[extension] = (name, data)
        if key is not None:
            yield self._text(file, members)

    def _text(self, file: Path, members: dict[str, tuple[str, bytes]]) -> str | Skip:
        if "txt" in members:
            name, data = members["txt"]
            try:
                return self._document(data.decode("utf-8"), f"{file}:{name}")
            except UnicodeDecodeError:
                return Skip(f"{file}:{name}", NOT_UTF8)
        if "json" in members:
            name, data = members["json"]
            return self._document(text_of_json(data, self.field, f"{file}:{name}"), f"{file}:{name}")
        return Skip(f"{file}:{next(iter(members.values()))[0]}", NO_MEMBER)

    def _members(self, file: Path) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the regular members; the content of members that hold no text is left empty."""
        n_bytes = file.stat().st_size
        with file.open("rb") as stream:
            try:
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        _check_member(file, member, n_bytes)
                        if member.isreg():
                            is_text = member.name.lower().endswith((".txt", ".json"))
                            if member.name.lower().endswith(".txt"):
                                self._check_size(member.size, f"{file}:{member.name}")
                            yield member.name, _content(archive.extractfile(member)) if is_text else b""
                        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                    _check_end(file, stream, archive.offset)
            except DataError:
                raise
            except _BROKEN as error:
                raise DataError(f"{file} cannot be read as a tar: {error}. Copy it again, or leave it out") from None


def _content(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    return stream.read()


def _check_member(file: Path, member: tarfile.TarInfo, n_bytes: int) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or re.search(r"[\\\0]", name):
        raise DataError(f"{file}: member {name!r} points outside the archive; names must be relative, without '..'")
    if name.lower().endswith(_PICKLED):
        raise DataError(
            f"{file}: member {name!r} holds a pickle, which can run code when it is read; "
            "pack the text as .txt or .json members alone"
        )
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise DataError(f"{file}: member {name!r} is a link, a device or sparse; pack it as a plain file")
    if member.size < 0 or member.offset_data + member.size > n_bytes:
        raise DataError(
            f"{file}: member {name!r} claims {member.size} bytes at {member.offset_data}, the file has {n_bytes}. "
            "It was cut short; copy it again"
        )


def _check_end(file: Path, stream: IO[bytes], offset: int) -> None:
    """tarfile takes a header it cannot read for the end, and would lose what follows without a word."""
    stream.seek(0, 2)
    n_bytes = stream.tell()
    stream.seek(offset)
    n_zeros = 0
    while block := stream.read(2**20):
        if block.strip(b"\0"):
            raise DataError(
                f"{file}: bytes after the last readable member at {offset}: damaged there, or several tars joined. "
                "Copy it again, or split it into its tars"
            )
        n_zeros += len(block)
    if n_zeros < tarfile.BLOCKSIZE:
        raise DataError(f"{file} ends at {n_bytes} without an end mark: it was cut short. Copy it again")
