"""The loss of the best predictor that sees no context: what any trained model must beat."""

import numpy as np

from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.shards import SplitReader


def unigram_entropy(manifest: Manifest, split: str = "heldout") -> float:
    """Entropy of the labels of a split, in nats per token, from exact counts.

    The labels are every token but the first of each document, as `packing.py` makes them. No predictor that gives every
    label the same distribution has a lower mean loss on this split.

    Raises:
        DataError: no such split; a damaged shard.
    """
    reader = SplitReader(manifest, split)
    counts = np.zeros(manifest.vocab_size, np.int64)
    for record in range(reader.n_records):
        for document in reader.documents(record):
            counts += np.bincount(document[1:], minlength=manifest.vocab_size)
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum())
