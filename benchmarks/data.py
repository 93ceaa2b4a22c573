"""Tokens/s of building and streaming a corpus against other readers of the same tokens, in one process, in turn.

    python benchmarks/data.py [--copies 4] [--seq-len 2048] [--seconds 5]

The corpus is the standard library, copied so many times. Readers: ours (concatenation and best-fit packing, labels,
positions and boundaries included), raw webdataset over the same shards (records decoded, nothing packed), Megatron's
IndexedDataset over the same documents (shuffled, laid end to end, no labels or boundaries), and MosaicML Streaming if
installed. Also the time to the first batch when a run resumes after 100,000 steps. Prints one JSON object.
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from loopline.data_pipeline.build import build
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.shards import SplitReader
from loopline.data_pipeline.sources import open_source
from loopline.data_pipeline.stream import GlobalBatchStream

PEERS = ("webdataset", "megatron-core", "mosaicml-streaming")
LANES = 8
BATCH = 32


def copy_corpus(folder: Path, copies: int) -> Path:
    """The standard library's source files, `copies` times, as a folder of .txt files."""
    for i in range(copies):
        (folder / str(i)).mkdir(parents=True)
        for j, text in enumerate(open_source("stdlib")):
            (folder / str(i) / f"{j:04d}.txt").write_text(text, encoding="utf-8")
    return folder


def timed_build(text: Path, out: Path, workers: int) -> tuple[Manifest, float]:
    """A build with a tokenizer trained before, so that only reading, encoding and writing are timed."""
    from loopline.data_pipeline.tokenizer import TokenizerFile, train_tokenizer

    tokenizer_dir = out.parent / "tokenizer"
    if not tokenizer_dir.exists():
        tokenizer_dir.mkdir()
        train_tokenizer(open_source("stdlib"), tokenizer_dir, vocab_size=4096)
    started = time.perf_counter()
    manifest = build(open_source(text), out, tokenizer=TokenizerFile(tokenizer_dir), workers=workers, progress=False)
    return manifest, time.perf_counter() - started


def ours(manifest: Manifest, seq_len: int, **settings: object) -> Iterator[int]:
    """Tokens of each batch of our stream."""
    stream = GlobalBatchStream(
        manifest,
        seed=0,
        seq_len=seq_len,
        n_lanes=LANES,
        global_batch_sequences=BATCH,
        **settings,  # type: ignore[arg-type]
    )
    for batch in stream:
        yield batch.tokens.size


def raw_webdataset(manifest: Manifest) -> Iterator[int]:
    """Tokens of each record webdataset decodes."""
    import webdataset

    urls = [str(manifest.folder / shard.name) for shard in manifest.split("train").shards]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            yield len(sample["tokens.npy"])


def megatron(manifest: Manifest, folder: Path, seq_len: int) -> Iterator[int]:
    """Tokens of sequences cut from Megatron's indexed documents in a shuffled order, in batches as ours."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    prefix = folder / "megatron"
    reader = SplitReader(manifest, "train")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for record in range(reader.n_records):
        for document in reader.documents(record):
            builder.add_document(document.astype(np.uint16), [len(document)])
    builder.finalize(f"{prefix}.idx")
    dataset = IndexedDataset(str(prefix))
    rest = np.empty(0, np.int64)
    while True:
        for i in np.random.default_rng(0).permutation(len(dataset)):
            rest = np.concatenate([rest, dataset[int(i)].astype(np.int64)])
            while len(rest) >= BATCH * seq_len:
                batch, rest = rest[: BATCH * seq_len].reshape(BATCH, seq_len), rest[BATCH * seq_len :]
                yield batch.size


def mosaic(manifest: Manifest, folder: Path) -> Iterator[int]:
    """Tokens of each record MosaicML Streaming reads from its own shards of the same records."""
    from streaming import MDSWriter, StreamingDataset

    reader = SplitReader(manifest, "train")
    with MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray:uint16"}) as writer:
        for record in range(reader.n_records):
            writer.write({"tokens": np.concatenate(reader.documents(record)).astype(np.uint16)})
    while True:
        for sample in StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=1):
            yield len(sample["tokens"])


def tokens_per_second(tokens: Iterator[int], seconds: float) -> float:
    """After a first item, which opens files and fills caches."""
    next(tokens)
    started, total = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        total += next(tokens)
    return total / (time.perf_counter() - started)


def resume_seconds(manifest: Manifest, seq_len: int, packing: str) -> float:
    """From a state as far along as 100,000 steps to the first batch."""
    settings = {"seed": 0, "seq_len": seq_len, "n_lanes": LANES, "global_batch_sequences": BATCH, "packing": packing}
    stream = GlobalBatchStream(manifest, **settings)  # type: ignore[arg-type]
    for _ in range(10):
        next(stream)
    epochs = 100_000 * BATCH * seq_len // manifest.split("train").n_tokens
    states = {lane: {**state, "epoch": epochs} for lane, state in stream.state_dict().items()}
    for state in states.values():  # the window's documents differ by epoch: its beginning is always there
        state.update({key: 0 for key in ("window", "document", "offset", "sequence") if key in state})
    started = time.perf_counter()
    next(GlobalBatchStream(manifest, **settings, states=states))  # type: ignore[arg-type]
    return time.perf_counter() - started


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = copy_corpus(folder / "text", args.copies)
        builds = {}
        for workers in (0, 1, 2):
            manifest, seconds = timed_build(text, folder / f"built{workers}", workers)
            builds[f"workers {workers}"] = round(manifest.split("train").n_tokens / seconds)
        readers = {
            "loopline concat": lambda: ours(manifest, args.seq_len),
            "loopline best_fit": lambda: ours(manifest, args.seq_len, packing="best_fit"),
            "loopline best_fit, 1 worker": lambda: ours(manifest, args.seq_len, packing="best_fit", workers=1),
            "webdataset, records": lambda: raw_webdataset(manifest),
            "megatron indexed": lambda: megatron(manifest, Path(tempfile.mkdtemp(dir=folder)), args.seq_len),
            "mosaicml streaming, records": lambda: mosaic(manifest, Path(tempfile.mkdtemp(dir=folder))),
        }
        speeds: dict[str, list[float]] = {}
        for _ in range(args.rounds):  # in turn, so that a busy moment meets all
            for name, reader in readers.items():
                try:
                    speeds.setdefault(name, []).append(tokens_per_second(reader(), args.seconds))
                except ImportError:
                    speeds.pop(name)
        resume = {packing: resume_seconds(manifest, args.seq_len, packing) for packing in ("concat", "best_fit")}
        print(
            json.dumps(
                {
                    "machine": platform.machine(),
                    "python": platform.python_version(),
                    "versions": {
                        name: _version(name) for name in ("webdataset", "megatron-core", "mosaicml-streaming")
                    },
                    "train_tokens": manifest.split("train").n_tokens,
                    "build_tokens_per_s": builds,
                    "stream_tokens_per_s_median": {k: round(statistics.median(v)) for k, v in speeds.items()},
                    "stream_tokens_per_s_all": {k: [round(x) for x in v] for k, v in speeds.items()},
                    "resume_after_100000_steps_s": resume,
                    "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                },
                indent=1,
            )
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
