"""One hash of the first global batches of a stream: equal hashes are equal training data, on any number of ranks."""

import hashlib
from collections.abc import Iterable, Sequence

from loopline.data_pipeline.batch import Batch, global_batch_sha256
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.stream import GlobalBatchStream


def batch_digest(batches: Sequence[Batch]) -> str:
    """sha256 of one global batch: tokens, labels, cu_seqlens and positions, in global order.

    Args:
        batches: every data-parallel rank's batch of one step, in any order.
    Raises:
        DataError: they are not the whole of one global batch.
    """
    digest = hashlib.sha256(global_batch_sha256(batches).encode())
    rows = [
        (int(index), row.positions)
        for batch in batches
        for index, row in zip(batch.global_index, batch.micro_batches(1))
    ]
    for _, positions in sorted(rows, key=lambda row: row[0]):
        digest.update(positions.astype("<i8").tobytes())
    return digest.hexdigest()


def combine(digests: Iterable[str]) -> str:
    """sha256 of the steps' digests, in order. Parts of a run that was stopped and resumed are simply chained."""
    digest = hashlib.sha256()
    for each in digests:
        digest.update(bytes.fromhex(each))
    return digest.hexdigest()


def stream_digest(ranks: Sequence[GlobalBatchStream], n_batches: int) -> str:
    """sha256 of the next `n_batches` global batches.

    Args:
        ranks: the streams of all data-parallel ranks, at one step.
    Raises:
        DataError: n_batches below 1; see `GlobalBatchStream.__next__`.
    """
    if n_batches < 1:
        raise DataError(f"batches={n_batches} must be 1 or more; raise it")
    return combine(batch_digest([next(rank) for rank in ranks]) for _ in range(n_batches))
