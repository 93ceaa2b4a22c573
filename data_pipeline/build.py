"""Text -> token shards, tokenizer and manifest: what `loopline data build` runs, and the bundled corpora.

The build is a pure function of the source's content and the settings: two builds give the same bytes, with any number
of workers and after any interruption. Workers tokenize the source's parts into chunks; the main process puts the chunks
together in order. `chunks.py`, `workers.py` and `staging.py` are the three pieces.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loopline.data_pipeline.chunks import Chunk, find_chunk, read_chunk, write_chunk, write_durably
from loopline.data_pipeline.errors import DataError, printable
from loopline.data_pipeline.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    Provenance,
    Split,
    TokenizerEntry,
    dtype_for,
    file_sha256,
)
from loopline.data_pipeline.parts import Part, Source
from loopline.data_pipeline.shards import DEFAULT_RECORD_TOKENS, DEFAULT_SHARD_BYTES, SplitWriter
from loopline.data_pipeline.skips import DEFAULT_MAX_SKIPPED_SHARE, NO_TOKENS, Skip, Skips
from loopline.data_pipeline.sources import BUNDLED, open_source
from loopline.data_pipeline.staging import Staging, disk_error, open_staging, remove_staging
from loopline.data_pipeline.tokenizer import TOKENIZER_FILE, TokenizerFile, check_vocab_size, train_tokenizer
from loopline.data_pipeline.workers import run_items

log = logging.getLogger(__name__)

_ENCODE_CHARACTERS = 1_000_000  # per call of the tokenizer: enough for every core, little enough to hold in memory
_SHOWN_CHARACTERS = 40  # of a document that has no other name
# What a given tokenizer is tried on before the build.
_SAMPLE_PARTS, _SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 8, 64, 10_000


def build(
    source: Source,
    out_dir: str | Path,
    *,
    tokenizer: TokenizerFile | None = None,
    vocab_size: int | None = None,
    heldout_fraction: float = 0.05,
    record_tokens: int = DEFAULT_RECORD_TOKENS,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    seed: int = 0,
    workers: int = 0,
    max_skipped_share: float = DEFAULT_MAX_SKIPPED_SHARE,
    progress: bool = True,
) -> Manifest:
    """Builds a data set into `out_dir`, or returns the one there if it was built with the same source and settings.

    A build that was killed goes on where it was when it is run again. With workers, a script must call this below
    `if __name__ == "__main__":`, as always with `multiprocessing`.

    Args:
        source: documents; see `sources.open_source`.
        tokenizer: use this one; exactly one of it and `vocab_size` is given.
        vocab_size: train a byte-level BPE of this size on the training documents.
        heldout_fraction: in [0, 1); the share of documents, chosen by a hash of (seed, document number), that goes to
            the split `heldout`; 0 makes none.
        record_tokens: target tokens per record, the unit that is shuffled and dealt to lanes. Training needs at least
            one record per lane; smaller records shuffle better and cost about 2.5 KB each.
        shard_bytes: target bytes per tar file.
        seed: of the held-out choice.
        workers: processes that read and tokenize; 0 does it in this one, where `tokenizers` still uses every core. The
            result is the same.
        max_skipped_share: in [0, 1]; the largest share of the documents that may be left out although they hold
            something: not UTF-8, or nothing that the tokenizer has tokens for. Those without text do not count.
        progress: show a progress bar, if on a terminal.
    Returns:
        The saved manifest.
    Raises:
        DataError: no text; a bad row; a bad setting; too much was skipped; out_dir holds other data, files that a build
            would overwrite or the source itself, or is being built by another process; the disk is full; a worker died.
    """
    _check_settings(tokenizer, vocab_size, workers, max_skipped_share)
    check_numbers(heldout_fraction, record_tokens, shard_bytes)
    out = Path(out_dir)
    description = source.describe()
    settings: dict[str, str | int | float] = {
        "tokenizer": tokenizer.sha256 if tokenizer else f"trained, vocab_size {vocab_size}",
        "heldout_fraction": float(heldout_fraction),
        "record_tokens": record_tokens,
        "shard_bytes": shard_bytes,
        "seed": seed,
    }
    if (out / MANIFEST_FILE).exists():
        return existing_data(out, description, settings)
    _refuse_source_in(out, source)
    with open_staging(out) as staging:
        if (out / MANIFEST_FILE).exists():  # another process finished it between the two looks
            return existing_data(out, description, settings)
        if tokenizer is None:
            assert vocab_size is not None
            tokenizer = _trained_tokenizer(source, staging.tokenizer, vocab_size, seed, heldout_fraction)
            source.skips.check(source.n_texts + source.n_skipped, max_skipped_share)
        else:
            _warn_of_lost_text(source, tokenizer)
            tokenizer = tokenizer.copy_to(staging.tokenizer)
        chunks = _iter_chunks(source, tokenizer, staging, workers, progress)
        rule = HeldoutRule(seed, heldout_fraction)
        limits = {"record_tokens": record_tokens, "shard_bytes": shard_bytes}
        splits, skips = _merge(chunks, staging, tokenizer, rule, limits)
        n_documents = sum(split.n_documents for split in splits.values())
        skips.check(n_documents + skips.n, max_skipped_share)
        _check_splits(set(splits), n_documents, heldout_fraction, source, skips)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dtype=dtype_for(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer=TokenizerEntry(file=TOKENIZER_FILE, sha256=tokenizer.sha256),
            provenance=Provenance(
                source=description, settings=settings, n_skipped=skips.n, loopline_version=version("loopline")
            ),
            splits=splits,
        )
        staging.commit(manifest)
    if skips.n:
        level = logging.WARNING if skips.n_lost else logging.INFO
        log.log(level, "skipped %d of %d documents: %s", skips.n, n_documents + skips.n, skips)
    for name, split in splits.items():
        log.info("%s: %d documents, %d tokens, %d shards", name, split.n_documents, split.n_tokens, len(split.shards))
    return manifest


def build_bundled(name: str, cache_dir: str | Path, vocab_size: int = 4096, *, progress: bool = True) -> Path:
    """Builds a bundled corpus into `<cache_dir>/<name>-bpe<vocab_size>/` unless it is there; returns its manifest.

    Any number of processes may call this at once: each builds in a folder of its own and renames it at the end; the
    first wins and the others use what it built.

    Raises:
        DataError: no such corpus; the target folder exists but holds no data set of this format.
    """
    if name not in BUNDLED:
        raise DataError(f"bundled corpus {name!r} does not exist; use one of {', '.join(BUNDLED)}, or build from files")
    target = Path(cache_dir) / f"{name}-bpe{vocab_size}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        own.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            # Small records and shards: enough of both for many lanes.
            build(
                open_source(name),
                own,
                vocab_size=vocab_size,
                record_tokens=16_384,
                shard_bytes=2 * 2**20,
                progress=progress,
            )
            os.rename(own, target)
        except OSError:
            # The rename fails where another process put its own there first.
            if not (target / MANIFEST_FILE).exists():
                raise
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return Manifest.load(target).path


def wait_for_manifest(path: str | Path, timeout_s: float) -> Manifest:
    """Waits until another process has built the data, then loads it.

    Args:
        path: `manifest.json`, or the folder that will hold it.
        timeout_s: seconds to wait at most.
    Raises:
        DataError: no manifest after timeout_s; a manifest that breaks a rule.
    """
    file = Path(path) if Path(path).name == MANIFEST_FILE else Path(path) / MANIFEST_FILE
    deadline = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() >= deadline:
            raise DataError(
                f"no {file} after {timeout_s:g} s: the rank that builds the data failed, is slower than that, or "
                "writes to a disk this host does not see. Look at that rank's log, raise the timeout, or build the "
                "data beforehand with `loopline data build`"
            )
        time.sleep(min(0.2, timeout_s))
    return Manifest.load(file)


def existing_data(out: Path, description: dict, settings: dict) -> Manifest:
    """The data set that is there, if it was made from equal things; DataError otherwise."""
    manifest = Manifest.load(out)
    found = {**manifest.provenance.source, **manifest.provenance.settings}
    asked = {**description, **settings}
    different = sorted(key for key in found | asked if found.get(key) != asked.get(key))
    if different:
        listed = ", ".join(f"{key} {found.get(key)!r} (now {asked.get(key)!r})" for key in different)
        raise DataError(f"{out} already holds other data: {listed}. Choose another folder, or delete this one")
    manifest.verify(hashes=False)
    remove_staging(out)  # of a build that was killed between its manifest and its tidying
    return manifest


def _refuse_source_in(out: Path, source: Source) -> None:
    target = out.resolve()
    for folder in {file.parent for file in source.files}:
        if folder.resolve().is_relative_to(target):
            raise DataError(
                f"{out} cannot take the data set: the source is in it ({folder}). Choose a folder of its own, such as "
                f"{target.parent / f'{target.name}-tokens'}"
            )


def _warn_of_lost_text(source: Source, tokenizer: TokenizerFile) -> None:
    """Encodes a few documents from all over the source; a warning where some of their text gets no token."""
    parts = source.parts()
    some = parts[:: -(-len(parts) // _SAMPLE_PARTS)] if parts else []
    texts = []
    for part in some:
        given = itertools.islice(source.read(part), max(1, _SAMPLE_DOCUMENTS // len(some)))
        texts += [text[:_SAMPLE_CHARACTERS] for text in given if not isinstance(text, Skip)]
    lost = tokenizer.lost_text(texts)
    if lost:
        log.warning(
            "tokenizer %s has no token for some text of %d of %d sampled documents, first near %r. It is lost: use a "
            "tokenizer with byte fallback, or one trained on such text",
            printable(tokenizer.path),
            len(lost),
            len(texts),
            lost[0],
        )


@dataclass(frozen=True)
class HeldoutRule:
    """Which documents are held out: a hash of (seed, document number), so whoever counts the same decides the same."""

    seed: int
    fraction: float

    def __call__(self, number: int) -> bool:
        digest = hashlib.blake2b(f"{self.seed}:{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.fraction * 2**64


def _trained_tokenizer(
    source: Source, folder: Path, vocab_size: int, seed: int, heldout_fraction: float
) -> TokenizerFile:
    """Trains on the training documents, or takes the one that an interrupted build of the same text left."""
    how = _reading(source)
    signatures = [_Signature.of(part) for part in source.parts()]
    facts = [signature.key(how) for signature in signatures]
    asked = [vocab_size, seed, heldout_fraction, version("tokenizers"), facts]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    mark, file = folder / "trained.json", folder / TOKENIZER_FILE
    if mark.is_file() and file.is_file() and mark.read_text() == json.dumps([key, file_sha256(file)]):
        return TokenizerFile(folder)
    log.info("training a tokenizer of %d entries", vocab_size)
    is_heldout = HeldoutRule(seed, heldout_fraction)
    texts = (text for number, text in enumerate(source) if not is_heldout(number))
    tokenizer = train_tokenizer(_or_raise_if_empty(texts, source), folder, vocab_size=vocab_size)
    for signature in signatures:
        signature.check()
    write_durably(mark, json.dumps([key, tokenizer.sha256]).encode())
    return tokenizer


@dataclass(frozen=True)
class _Signature:
    """A part and the sizes and times of its files when the build began."""

    part: Part
    stats: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, part: Part) -> "_Signature":
        stats = (file.stat() for file in part.files)
        return cls(part, tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))

    def key(self, how: dict[str, str | int], *more: str | int) -> str:
        """Hash of all that the part's texts depend on, and of `more`."""
        files = [str(file) for file in self.part.files]
        facts = [how, files, self.stats, self.part.start, self.part.stop, version("loopline"), more]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def check(self) -> None:
        """Raises DataError where a file is no longer what it was."""
        if _Signature.of(self.part) != self:
            raise DataError(
                f"{self.part} changed while it was read; leave the text alone during a build, and run the same command "
                "again"
            )


def _reading(source: Source) -> dict[str, str | int]:
    """How a source reads its files, whichever they are."""
    return {name: value for name, value in source.describe().items() if name not in ("n_files", "n_bytes")}


@dataclass(frozen=True)
class _Job:
    """One part to tokenize, the number of its chunk, and what the chunk's key must be."""

    part_idx: int
    signature: _Signature
    key: str

    def __str__(self) -> str:
        return str(self.signature.part)


class _Tokenize:
    """Turns a part into its chunk; picklable, and the same in any process."""

    def __init__(self, source: Source, tokenizer: Path, chunks: Path) -> None:
        self._source = source
        self._tokenizer_path = tokenizer
        self._chunks = chunks

    @functools.cached_property
    def _tokenizer(self) -> TokenizerFile:
        return TokenizerFile(self._tokenizer_path)

    def __call__(self, job: _Job) -> None:
        """Raises DataError: a bad row; a file that changed meanwhile; a full disk or an unreadable file."""
        skips = Skips()
        try:
            write_chunk(self._chunks, job.part_idx, job.key, self._batches(job, skips), skips)
        except OSError as error:
            raise disk_error(error, self._chunks.parent.parent) from error

    def _batches(self, job: _Job, skips: Skips) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pending: list[str] = []
        n_characters = 0
        for text in self._source.read(job.signature.part):
            if isinstance(text, Skip):
                skips.add(text)
                continue
            pending.append(text)
            n_characters += len(text)
            if n_characters >= _ENCODE_CHARACTERS:
                yield from self._encode(pending, job, skips)
                pending, n_characters = [], 0
        yield from self._encode(pending, job, skips)
        job.signature.check()

    def _encode(self, texts: list[str], job: _Job, skips: Skips) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens [n] of the data set's dtype, each document with eos last; exclusive ends [n_documents], int64), once;
        nothing where no document gives a token."""
        tokenizer = self._tokenizer
        dtype = dtype_for(tokenizer.vocab_size)
        documents = []
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            if ids:
                documents.append(np.array([*ids, tokenizer.eos_id], dtype))
            else:
                skips.add(Skip(f"{text[:_SHOWN_CHARACTERS]!r} of {job}", NO_TOKENS))
        if documents:
            yield np.concatenate(documents), np.cumsum([len(document) for document in documents])


def _iter_chunks(
    source: Source, tokenizer: TokenizerFile, staging: Staging, workers: int, progress: bool
) -> Iterator[tuple[int, Chunk]]:
    """(part number, chunk) of every part, in order; makes those that an earlier build did not leave."""
    more = (tokenizer.sha256, tokenizer.eos_id, version("tokenizers"))
    how = _reading(source)
    signatures = [_Signature.of(part) for part in source.parts()]
    jobs = [_Job(i, signature, signature.key(how, *more)) for i, signature in enumerate(signatures)]
    chunks = [find_chunk(staging.chunks, job.part_idx, job.key, check_hash=True) for job in jobs]
    missing = [job for job, chunk in zip(jobs, chunks, strict=True) if chunk is None]
    if len(missing) < len(jobs):
        log.info("%d of %d parts are there from an earlier build", len(jobs) - len(missing), len(jobs))
    task = _Tokenize(source, staging.tokenizer, staging.chunks)
    n_workers = workers if len(missing) > 1 else 0
    next_part = 0
    # disable=None: shown on a terminal only.
    with (
        tqdm(
            desc="tokenizing",
            total=sum(job.signature.part.n_bytes for job in jobs),
            initial=sum(job.signature.part.n_bytes for job, chunk in zip(jobs, chunks, strict=True) if chunk),
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        ) as bar,
        closing(run_items(task, missing, n_workers)) as finished,
    ):
        for index in finished:
            job = missing[index]
            chunks[job.part_idx] = find_chunk(staging.chunks, job.part_idx, job.key, check_hash=False)
            assert chunks[job.part_idx] is not None
            bar.update(job.signature.part.n_bytes)
            while next_part < len(chunks) and (chunk := chunks[next_part]) is not None:
                yield next_part, chunk
                next_part += 1
    while next_part < len(chunks) and (chunk := chunks[next_part]) is not None:  # where nothing was missing
        yield next_part, chunk
        next_part += 1
    assert next_part == len(chunks)


def _merge(
    chunks: Iterator[tuple[int, Chunk]],
    staging: Staging,
    tokenizer: TokenizerFile,
    is_heldout: HeldoutRule,
    limits: dict[str, int],
) -> tuple[dict[str, Split], Skips]:
    """Writes the shards; returns the splits by name, and what was left out."""
    with open_splits(staging.shards, dtype_for(tokenizer.vocab_size), limits) as writers:
        number, skips = 0, Skips()
        for part_idx, chunk in chunks:
            skips.merge(chunk.skipped)
            for tokens in read_chunk(staging.chunks, part_idx, chunk):
                writers["heldout" if is_heldout(number) else "train"].add(tokens)
                number += 1
        return {name: split for name, writer in writers.items() if (split := writer.close()) is not None}, skips


@contextmanager
def open_splits(folder: Path, dtype: str, limits: dict[str, int]) -> Iterator[dict[str, SplitWriter]]:
    """The writers of both splits; their files are closed at the end of the block, whatever happened in it."""
    writers = {name: SplitWriter(folder, name, dtype=dtype, **limits) for name in ("train", "heldout")}
    try:
        yield writers
    finally:
        for writer in writers.values():
            writer.discard()


def _or_raise_if_empty(texts: Iterator[str], source: Source) -> Iterator[str]:
    is_empty = True
    for text in texts:
        is_empty = False
        yield text
    if is_empty:
        raise DataError(_no_text(source, source.skips))


def _no_text(source: Source, skips: Skips) -> str:
    return (
        f"source {source.describe()} gave no documents to train on (skipped: {skips if skips.n else 'none'}); "
        "a build needs at least one document with text. Give a source with text"
    )


def _check_splits(found: set[str], n_documents: int, heldout_fraction: float, source: Source, skips: Skips) -> None:
    if "train" not in found:
        raise DataError(_no_text(source, skips))
    if heldout_fraction > 0 and "heldout" not in found:
        raise DataError(
            f"heldout_fraction={heldout_fraction} of {n_documents} documents left the held-out split empty; "
            "raise it, change the seed, or set it to 0 for no held-out split"
        )


def _check_settings(
    tokenizer: TokenizerFile | None, vocab_size: int | None, workers: int, max_skipped_share: float
) -> None:
    if (tokenizer is None) == (vocab_size is None):
        given = "neither" if tokenizer is None else "both"
        raise DataError(f"{given} of tokenizer and vocab_size given; give one: use a tokenizer, or train one")
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    if workers < 0:
        raise DataError(f"workers={workers} must be 0 or more; 0 builds in this process")
    if not 0 <= max_skipped_share <= 1:
        raise DataError(f"max_skipped_share={max_skipped_share} must be from 0 to 1; 0 allows none, 1 any number")


def check_numbers(heldout_fraction: float, record_tokens: int, shard_bytes: int) -> None:
    """Raises DataError for a setting outside its range."""
    if not 0 <= heldout_fraction < 1:
        raise DataError(f"heldout_fraction={heldout_fraction} must be at least 0 and below 1; 0.05 is usual")
    for name, value in (("record_tokens", record_tokens), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise DataError(f"{name}={value} must be 1 or more; leave it out for the default")
