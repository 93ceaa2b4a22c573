"""What a data set holds, for people: counts, lengths and decoded samples as text. `loopline data inspect` prints it."""

from collections.abc import Iterator

import numpy as np

from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.tokenizer import TokenizerFile

_BAR_WIDTH = 40
_SAMPLE_CHARACTERS = 300


def inspect_lines(manifest: Manifest, n_samples: int = 3) -> Iterator[str]:
    """The lines that describe a data set.

    Args:
        n_samples: documents decoded per split, spread evenly over its records; 0 decodes none.
    Raises:
        DataError: a sampled shard, or one of a split without a stored histogram, is missing or damaged; the tokenizer
            is not the manifest's.
    """
    yield f"{manifest.location}: format {manifest.format_version}, tokens {manifest.dtype}"
    yield f"tokenizer: {manifest.vocab_size:,} ids, eos {manifest.eos_id}, sha256 {manifest.tokenizer.sha256}"
    facts = {**manifest.provenance.source, **manifest.provenance.settings}
    yield "built from: " + ", ".join(f"{key} {value!r}" for key, value in facts.items())
    yield f"skipped: {manifest.provenance.n_skipped:,} documents; loopline {manifest.provenance.loopline_version}"
    for name, split in manifest.splits.items():
        n_bytes = sum(shard.n_bytes for shard in split.shards)
        yield ""
        yield (
            f"{name}: {split.n_documents:,} documents, {split.n_tokens:,} tokens, {split.n_records:,} records, "
            f"{len(split.shards):,} shards, {n_bytes:,} bytes"
        )
        yield from _histogram_lines(length_histogram(manifest, name))
        if n_samples:
            yield from _sample_lines(manifest, name, n_samples)


def length_histogram(manifest: Manifest, split: str) -> tuple[int, ...]:
    """Documents by length: entry b counts those of 2^b to 2^(b+1) - 1 tokens.

    From the manifest, or from the shards where an older build stored none.

    Raises:
        DataError: no such split; a missing or damaged shard, where they are read.
    """
    stored = manifest.split(split).length_histogram
    if stored is not None:
        return stored
    reader = SplitReader(manifest, split)
    lengths = [len(document) for i in range(reader.n_records) for document in reader.documents(i)]
    # Exact for lengths below 2^53.
    return tuple(np.bincount(np.frexp(np.array(lengths, np.float64))[1] - 1).tolist())


def _histogram_lines(histogram: tuple[int, ...]) -> Iterator[str]:
    first = next(i for i, count in enumerate(histogram) if count)
    for b, count in enumerate(histogram[first:], first):
        bar = "#" * -(-_BAR_WIDTH * count // max(histogram))
        yield f"  {2**b:>11,} to {2 ** (b + 1) - 1:>11,} tokens  {count:>13,}  {bar}".rstrip()


def _sample_lines(manifest: Manifest, split: str, n_samples: int) -> Iterator[str]:
    manifest.verify_tokenizer()
    tokenizer = TokenizerFile(manifest.folder / manifest.tokenizer.file, eos_id=manifest.eos_id)
    reader = SplitReader(manifest, split)
    n_samples = min(n_samples, manifest.split(split).n_documents)
    # Records in even steps; a record that is named k times gives its first k documents.
    records = [i * reader.n_records // n_samples for i in range(n_samples)]
    for record in sorted(set(records)):
        for document in reader.documents(record)[: records.count(record)]:
            text = tokenizer.decode(document[:-1].tolist())
            cut = "..." if len(text) > _SAMPLE_CHARACTERS else ""
            # repr: text from anywhere must not steer the terminal.
            yield f"  [record {record}, {len(document):,} tokens] {text[:_SAMPLE_CHARACTERS]!r}{cut}"
