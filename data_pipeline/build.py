"""Text -> token shards, tokenizer and manifest: what `loopline data build` runs, and the bundled corpora.

The build is a pure function of the source's content and the settings: two builds give the same bytes. It runs in one
process; `tokenizers` uses the machine's cores.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    Provenance,
    TokenizerEntry,
    dtype_for,
)
from loopline.data_pipeline.shards import DEFAULT_RECORD_TOKENS, DEFAULT_SHARD_BYTES, SplitWriter
from loopline.data_pipeline.sources import BUNDLED, Source, open_source
from loopline.data_pipeline.tokenizer import TOKENIZER_FILE, TokenizerFile, train_tokenizer

log = logging.getLogger(__name__)

_ENCODE_CHARACTERS = 1_000_000  # per call of the tokenizer: enough for every core, and a progress bar that moves


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
    progress: bool = True,
) -> Manifest:
    """Builds a data set into `out_dir`, or returns the one there if it was built with the same source and settings.

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
        progress: show a progress bar, if on a terminal.
    Returns:
        The saved manifest.
    Raises:
        DataError: no text; a bad setting; out_dir holds other data.
    """
    _check_settings(tokenizer, vocab_size, heldout_fraction, record_tokens, shard_bytes)
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
        return _existing(out, description, settings)

    out.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        assert vocab_size is not None
        log.info("training a tokenizer of %d entries", vocab_size)
        train_texts = (text for text, is_heldout in _iter_split(source, seed, heldout_fraction) if not is_heldout)
        tokenizer = train_tokenizer(_or_raise_if_empty(train_texts, source), out, vocab_size=vocab_size)
    else:
        tokenizer = tokenizer.copy_to(out)
    writers = {
        name: SplitWriter(
            out, name, dtype=dtype_for(tokenizer.vocab_size), record_tokens=record_tokens, shard_bytes=shard_bytes
        )
        for name in ("train", "heldout")
    }
    n_documents = 0
    for tokens, is_heldout in _iter_encoded(source, tokenizer, seed, heldout_fraction, progress):
        writers["heldout" if is_heldout else "train"].add(tokens)
        n_documents += 1
    splits = {name: split for name, writer in writers.items() if (split := writer.close()) is not None}
    _check_splits(set(splits), n_documents, heldout_fraction, source)

    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dtype=dtype_for(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer=TokenizerEntry(file=TOKENIZER_FILE, sha256=tokenizer.sha256),
        provenance=Provenance(
            source=description, settings=settings, n_skipped=source.n_skipped, loopline_version=version("loopline")
        ),
        splits=splits,
    )
    manifest.save(out)
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


def _existing(out: Path, description: dict, settings: dict) -> Manifest:
    manifest = Manifest.load(out)
    found = {**manifest.provenance.source, **manifest.provenance.settings}
    asked = {**description, **settings}
    different = sorted(key for key in found | asked if found.get(key) != asked.get(key))
    if different:
        listed = ", ".join(f"{key} {found.get(key)!r} (now {asked.get(key)!r})" for key in different)
        raise DataError(f"{out} already holds other data: {listed}. Choose another folder, or delete this one")
    manifest.verify(hashes=False)
    return manifest


def _iter_split(source: Source, seed: int, heldout_fraction: float) -> Iterator[tuple[str, bool]]:
    for index, text in enumerate(source):
        digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
        yield text, int.from_bytes(digest, "little") < heldout_fraction * 2**64


def _iter_encoded(
    source: Source, tokenizer: TokenizerFile, seed: int, heldout_fraction: float, progress: bool
) -> Iterator[tuple[np.ndarray, bool]]:
    """(tokens [n] with eos last, whether held out) of every document, in the source's order."""

    def encode(pending: list[tuple[str, bool]]) -> Iterator[tuple[np.ndarray, bool]]:
        encoded = tokenizer.encode_batch([text for text, _ in pending])
        for ids, (_, is_heldout) in zip(encoded, pending, strict=True):
            yield np.array([*ids, tokenizer.eos_id]), is_heldout

    pending, n_characters = [], 0
    # disable=None: shown on a terminal only.
    with tqdm(desc="encoding", unit=" documents", disable=None if progress else True) as bar:
        for item in _iter_split(source, seed, heldout_fraction):
            pending.append(item)
            n_characters += len(item[0])
            if n_characters >= _ENCODE_CHARACTERS:
                yield from encode(pending)
                bar.update(len(pending))
                pending, n_characters = [], 0
        yield from encode(pending)
        bar.update(len(pending))


def _or_raise_if_empty(texts: Iterator[str], source: Source) -> Iterator[str]:
    is_empty = True
    for text in texts:
        is_empty = False
        yield text
    if is_empty:
        raise DataError(_no_text(source))


def _no_text(source: Source) -> str:
    return (
        f"source {source.describe()} gave no documents to train on ({source.n_skipped} empty or unreadable skipped); "
        "a build needs at least one document with text. Give a source with text"
    )


def _check_splits(found: set[str], n_documents: int, heldout_fraction: float, source: Source) -> None:
    if "train" not in found:
        raise DataError(_no_text(source))
    if heldout_fraction > 0 and "heldout" not in found:
        raise DataError(
            f"heldout_fraction={heldout_fraction} of {n_documents} documents left the held-out split empty; "
            "raise it, change the seed, or set it to 0 for no held-out split"
        )


def _check_settings(
    tokenizer: TokenizerFile | None,
    vocab_size: int | None,
    heldout_fraction: float,
    record_tokens: int,
    shard_bytes: int,
) -> None:
    if (tokenizer is None) == (vocab_size is None):
        given = "neither" if tokenizer is None else "both"
        raise DataError(f"{given} of tokenizer and vocab_size given; give one: use a tokenizer, or train one")
    if not 0 <= heldout_fraction < 1:
        raise DataError(f"heldout_fraction={heldout_fraction} must be at least 0 and below 1; 0.05 is usual")
    for name, value in (("record_tokens", record_tokens), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise DataError(f"{name}={value} must be 1 or more; leave it out for the default")
