"""A small data set of real text (standard-library files), built once, and helpers that read or damage copies of it."""

import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from loopline.data_pipeline.build import build
from loopline.data_pipeline.manifest import FORMAT_VERSION, Manifest, Provenance, TokenizerEntry, dtype_for
from loopline.data_pipeline.shards import SplitReader, SplitWriter
from loopline.data_pipeline.sources import FileSource

VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 45 files of 0.5 to 9 KB."""
    folder = tmp_path_factory.mktemp("text")
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(stdlib.glob("*.py")) if 500 < file.stat().st_size < 9000][:45]
    assert len(files) > 40
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def source(text_folder: Path) -> FileSource:
    return FileSource(text_folder, (".py",))


@pytest.fixture(scope="session")
def small(source: FileSource, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Read-only: several records per lane, several shards. Damage a `copy` instead."""
    return build(
        source,
        tmp_path_factory.mktemp("small"),
        vocab_size=VOCAB_SIZE,
        heldout_fraction=0.15,
        record_tokens=3000,
        shard_bytes=50_000,
    )


@pytest.fixture
def copy(small: Manifest, tmp_path: Path) -> Manifest:
    """A copy of `small` to damage."""
    shutil.copytree(small.folder, tmp_path / "copy")
    return Manifest.load(tmp_path / "copy")


@pytest.fixture
def save_documents(small: Manifest, tmp_path: Path) -> Callable[..., Manifest]:
    """Writes given documents (token ids, eos is added) as a data set with `small`'s tokenizer."""

    def save(
        documents: Sequence[Sequence[int]], *, record_tokens: int = 1, shard_bytes: int = 4000, vocab_size: int = 0
    ) -> Manifest:
        folder = tmp_path / f"documents-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        shutil.copyfile(small.folder / small.tokenizer.file, folder / small.tokenizer.file)
        size = vocab_size or small.vocab_size
        splits = {}
        for name in ("train", "heldout"):
            writer = SplitWriter(
                folder, name, dtype=dtype_for(size), record_tokens=record_tokens, shard_bytes=shard_bytes
            )
            for document in documents:
                writer.add(np.array([*document, small.eos_id]))
            splits[name] = writer.close()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=dtype_for(size),
            vocab_size=size,
            eos_id=small.eos_id,
            tokenizer=TokenizerEntry(file=small.tokenizer.file, sha256=small.tokenizer.sha256),
            provenance=Provenance(source={"kind": "test"}, settings={}, n_skipped=0, loopline_version="test"),
            splits=splits,
        )
        manifest.save(folder)
        return Manifest.load(folder)

    return save


@pytest.fixture(scope="session")
def all_documents() -> Callable[..., list[tuple[int, ...]]]:
    """Every document of a split in disk order, as tuples of ids."""

    def read(manifest: Manifest, split: str = "train") -> list[tuple[int, ...]]:
        reader = SplitReader(manifest, split)
        return [tuple(doc.tolist()) for record in range(reader.n_records) for doc in reader.documents(record)]

    return read
