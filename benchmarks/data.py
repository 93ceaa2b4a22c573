"""Tokens/s of building and streaming a corpus against other readers of the same tokens; and what packing wastes.

    python benchmarks/data.py [--copies 4] [--seq-len 2048] [--seconds 1] [--rounds 9] [--mosaic-python PATH]

The corpus is the standard library, copied so many times. Readers: ours (concatenation and best-fit packing, labels and
boundaries included; once more cut into micro-batches), raw webdataset over the same shards (records decoded, nothing
packed), Megatron's IndexedDataset over the same documents (shuffled, laid end to end, no labels or boundaries) and its
GPTDataset, which a run of Megatron reads (labels, loss mask, positions), and MosaicML Streaming over the same records
(decoded, nothing packed) where the interpreter at PATH has it: it asks for other versions than we pin. Readers take
turns, a second each, so that other load on the machine meets all of them; speeds are by the clock, and by CPU time,
which is per core. Also what writing the same tokens takes each of them, the memory of a stream, the time to the first
batch when a run resumes after 100,000 steps, and a table of packings. Prints one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from loopline.data_pipeline.build import build, build_bundled
from loopline.data_pipeline.lane import record_order, seeded_permutation
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.packing import Window, pack_concatenated, plan_best_fit
from loopline.data_pipeline.shards import DEFAULT_RECORD_TOKENS, DEFAULT_SHARD_BYTES, SplitReader, SplitWriter
from loopline.data_pipeline.sources import open_source
from loopline.data_pipeline.stream import GlobalBatchStream

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

PEERS = ("webdataset", "megatron-core", "mosaicml-streaming")
LANES = 8
BATCH = 32
Slice = Callable[[float], tuple[float, float]]  # seconds -> tokens per second, tokens per second of CPU time


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


def ours(manifest: Manifest, seq_len: int, *, has_positions: bool = False, **settings: object) -> Iterator[int]:
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
        if has_positions:
            batch.micro_batches(1)
        yield batch.tokens.size


def raw_webdataset(manifest: Manifest) -> Iterator[int]:
    """Tokens of each record webdataset decodes."""
    import webdataset

    urls = [str(manifest.folder / shard.name) for shard in manifest.split("train").shards]
    while True:
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            yield len(sample["tokens.npy"])


def write_ours(records: list[list[np.ndarray]], folder: Path) -> None:
    """As the builder does: hashed, and on the disk at the end."""
    writer = SplitWriter(
        folder, "train", dtype="uint16", record_tokens=DEFAULT_RECORD_TOKENS, shard_bytes=DEFAULT_SHARD_BYTES
    )
    for documents in records:
        for document in documents:
            writer.add(document)
    writer.close()


def write_webdataset(records: list[list[np.ndarray]], folder: Path) -> None:
    """The same members."""
    import webdataset

    with webdataset.TarWriter(str(folder / "train.tar")) as writer:
        for i, documents in enumerate(records):
            ends = np.cumsum([len(document) for document in documents])
            writer.write({"__key__": f"{i:08d}", "tokens.npy": np.concatenate(documents), "ends.npy": ends})


def write_megatron(records: list[list[np.ndarray]], folder: Path) -> None:
    """The corpus as Megatron stores it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=np.uint16)
    for documents in records:
        for document in documents:
            builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "megatron.idx"))


def writing_speeds(records: list[list[np.ndarray]], scratch: Path, repeats: int = 3) -> dict[str, int]:
    """Tokens per second of each writer from documents in memory: the fastest of some tries."""
    n_tokens = sum(len(document) for documents in records for document in documents)
    writers = {
        "loopline": write_ours,
        "webdataset, records": write_webdataset,
        "megatron indexed": write_megatron,
    }
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    for i in range(repeats):
        for name, write in writers.items():
            folder = scratch / f"{name}{i}"
            folder.mkdir(parents=True)
            started = time.perf_counter()
            write(records, folder)
            seconds[name].append(time.perf_counter() - started)
    return {name: round(n_tokens / min(each)) for name, each in seconds.items()}


def megatron_index(folder: Path) -> "IndexedDataset":
    """What `write_megatron` wrote."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(folder / "megatron"))


def megatron(folder: Path, seq_len: int) -> Iterator[int]:
    """Tokens of sequences cut from Megatron's indexed documents in a shuffled order, in batches as ours."""
    dataset = megatron_index(folder)
    rest = np.empty(0, np.int64)
    while True:
        for i in np.random.default_rng(0).permutation(len(dataset)):
            rest = np.concatenate([rest, dataset[int(i)].astype(np.int64)])
            while len(rest) >= BATCH * seq_len:
                batch, rest = rest[: BATCH * seq_len].reshape(BATCH, seq_len), rest[BATCH * seq_len :]
                yield batch.size


def megatron_gpt(manifest: Manifest, folder: Path, seq_len: int, *, has_boundaries: bool) -> Iterator[int]:
    """Tokens of the samples Megatron trains on: labels, loss mask and positions, by documents if asked."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    index = megatron_index(folder)
    tokenizer = SimpleNamespace(
        eod=manifest.eos_id, pad=None, vocab_size=manifest.vocab_size, unique_identifiers={"class": "none"}
    )
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_len,
        blend=([str(folder / "megatron")], None),
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=has_boundaries,
        reset_attention_mask=False,
        eod_mask_loss=has_boundaries,
        create_attention_mask=False,
    )
    documents = np.arange(len(index), dtype=np.int32)
    dataset = GPTDataset(index, str(folder / "megatron"), documents, 100_000, Split.train, config)
    while True:
        for i in range(len(dataset)):
            yield len(dataset[i]["tokens"])


# Runs where MosaicML Streaming is: writes the records three times and prints the shortest time, then reads for as many
# seconds as each line says and prints both speeds. An epoch is 50 passes, for beginning one takes it long, which a
# corpus of useful size would hardly see.
MOSAIC = """
import json, sys, time
import numpy as np
from streaming import MDSWriter, StreamingDataset
folder = sys.argv[1]
tokens, bounds = np.load(folder + "/tokens.npy"), np.load(folder + "/bounds.npy")
def write(out):
    started = time.perf_counter()
    with MDSWriter(out=out, columns={"tokens": "ndarray:uint16"}) as writer:
        for start, end in zip(bounds[:-1], bounds[1:]):
            writer.write({"tokens": tokens[start:end]})
    return time.perf_counter() - started
print(min([write(folder + "/mds" + each) for each in ("", "1", "2")]), flush=True)
n_samples = 50 * (len(bounds) - 1)
def read():
    dataset = StreamingDataset(local=folder + "/mds", shuffle=True, batch_size=1, epoch_size=n_samples)
    while True:
        for sample in dataset:
            yield len(sample["tokens"])
reader = read()
next(reader)
for line in sys.stdin:
    clock, cpu, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - clock < float(line):
        n += next(reader)
    print(json.dumps([n / (time.perf_counter() - clock), n / (time.process_time() - cpu)]), flush=True)
"""


def mosaic(records: list[list[np.ndarray]], folder: Path, python: str) -> tuple[int, Slice]:
    """MosaicML Streaming's tokens per second of writing the same records, and it reading them."""
    joined = [np.concatenate(documents) for documents in records]
    bounds = np.cumsum([0, *map(len, joined)])
    np.save(folder / "tokens.npy", np.concatenate(joined))
    np.save(folder / "bounds.npy", bounds)
    process = subprocess.Popen(
        [python, "-c", MOSAIC, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    to_reader, from_reader = process.stdin, process.stdout
    written_in = float(from_reader.readline())

    def read(seconds: float) -> tuple[float, float]:
        to_reader.write(f"{seconds}\n")
        to_reader.flush()
        clock, cpu = json.loads(from_reader.readline())
        return clock, cpu

    return round(int(bounds[-1]) / written_in), read


def in_process(tokens: Iterator[int]) -> Slice:
    """A reader in this process, opened, and its caches filled, by a first item."""
    next(tokens)

    def read(seconds: float) -> tuple[float, float]:
        clock, cpu, n = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - clock < seconds:
            n += next(tokens)
        return n / (time.perf_counter() - clock), n / (time.process_time() - cpu)

    return read


def resident_bytes() -> int:
    """Of this process, without what it shares with files."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def stream_bytes(manifest_path: Path, seq_len: int, packing: str, shuffle_records: int) -> int:
    """What reading 300 batches adds to a fresh process."""
    manifest = Manifest.load(manifest_path)
    before = resident_bytes()
    tokens = ours(manifest, seq_len, packing=packing, shuffle_records=shuffle_records)
    for _ in range(300):
        next(tokens)
    return resident_bytes() - before


def packing_row(windows: list[list[np.ndarray]], seq_len: int, packing: str) -> dict[str, float]:
    """What packing windows of documents wastes, as shares.

    Returns:
        Padding among all inputs; of the documents that a sequence could hold, those that are cut; of all tokens, those
        in another sequence than their document's beginning.
    """
    n_padding = 0
    cuts: dict[tuple[int, int], int] = {}  # (window, document) -> offset of its first cut
    if packing == "concat":
        for _, (_, number, document, offset) in pack_concatenated([Window(0, *w) for w in enumerate(windows)], seq_len):
            if offset < len(windows[number][document]):
                cuts.setdefault((number, document), offset)
    else:
        for number, documents in enumerate(windows):
            for pieces in plan_best_fit([len(document) for document in documents], seq_len):
                n_padding += seq_len - sum(length for _, _, length in pieces)
                cuts.update({(number, document): seq_len for document, offset, _ in pieces if offset})
    lengths = {(w, d): len(document) for w, documents in enumerate(windows) for d, document in enumerate(documents)}
    n_tokens = sum(lengths.values())
    fitting = [place for place, length in lengths.items() if length <= seq_len]
    return {
        "padding": n_padding / (n_tokens + n_padding),
        "fitting_documents_cut": sum(place in cuts for place in fitting) / len(fitting),
        "tokens_without_beginning": sum(lengths[place] - offset for place, offset in cuts.items()) / n_tokens,
    }


def packing_table(folder: Path, seq_len: int) -> dict[str, dict[str, float]]:
    """The bundled corpus in windows of some of its records, and 10,000 documents of it, repeated, in one."""
    reader = SplitReader(Manifest.load(build_bundled("stdlib", folder)), "train")
    records = [reader.documents(record) for record in record_order(reader.n_records, 0, 0)]

    def windows(n_records: int, copies: int = 1) -> list[list[np.ndarray]]:
        chunks = [records[start : start + n_records] for start in range(0, len(records), n_records)]
        flat = [[document for record in chunk * copies for document in record] for chunk in chunks]
        return [[each[i] for i in seeded_permutation(len(each), "documents", i)] for i, each in enumerate(flat)]

    n_documents = sum(map(len, records))
    tables = {4: windows(4), 16: windows(16), f"all, {n_documents} documents": windows(len(records))}
    tables["10,000 documents"] = [windows(len(records), -(-10_000 // n_documents))[0][:10_000]]
    rows = {"concat, all": packing_row(windows(len(records)), seq_len, "concat")}
    return rows | {f"best_fit, {name}": packing_row(each, seq_len, "best_fit") for name, each in tables.items()}


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
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mosaic-python", default=sys.executable)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = copy_corpus(folder / "text", args.copies)
        builds = {}
        for workers in (0, 1, 2):
            manifest, seconds = timed_build(text, folder / f"built{workers}", workers)
            builds[f"workers {workers}"] = round(manifest.split("train").n_tokens / seconds)
        memory = {
            f"{packing}, window {window}": multiprocessing.get_context("spawn")
            .Pool(1)
            .apply(stream_bytes, (manifest.path, args.seq_len, packing, window))
            for packing, window in (("concat", 4), ("best_fit", 4), ("best_fit", 10**6))
        }
        reader = SplitReader(manifest, "train")
        records = [reader.documents(record) for record in range(reader.n_records)]
        writing = writing_speeds(records, folder / "written")
        write_megatron(records, folder)
        opened = readers(manifest, folder, args.seq_len)
        if subprocess.run([args.mosaic_python, "-c", "import streaming"], capture_output=True).returncode == 0:
            writing["mosaicml streaming, records"], opened["mosaicml streaming, records"] = mosaic(
                records, folder, args.mosaic_python
            )
        speeds = measure(opened, args.seconds, args.rounds)
        resume = {packing: resume_seconds(manifest, args.seq_len, packing) for packing in ("concat", "best_fit")}
        result = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in PEERS},
            "train_tokens": manifest.split("train").n_tokens,
            "build_tokens_per_s": builds,
            "write_tokens_per_s": writing,
            "stream_tokens_per_s": speeds,
            "stream_resident_bytes": memory,
            "resume_after_100000_steps_s": resume,
            "packing": packing_table(folder / "bundled", args.seq_len),
        }
        print(json.dumps(result, indent=1))


def readers(manifest: Manifest, folder: Path, seq_len: int) -> dict[str, Slice]:
    """The readers of this process, opened."""
    return {
        "loopline concat": in_process(ours(manifest, seq_len)),
        "loopline best_fit": in_process(ours(manifest, seq_len, packing="best_fit")),
        "loopline best_fit, positions": in_process(ours(manifest, seq_len, packing="best_fit", has_positions=True)),
        "webdataset, records": in_process(raw_webdataset(manifest)),
        "megatron indexed": in_process(megatron(folder, seq_len)),
        "megatron GPTDataset": in_process(megatron_gpt(manifest, folder, seq_len, has_boundaries=False)),
        "megatron GPTDataset, boundaries": in_process(megatron_gpt(manifest, folder, seq_len, has_boundaries=True)),
        "loopline best_fit, 1 worker": in_process(ours(manifest, seq_len, packing="best_fit", workers=1)),
    }


def measure(opened: dict[str, Slice], seconds: float, rounds: int) -> dict[str, dict[str, int]]:
    """Medians and best of the rounds, by the clock and by CPU time."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in opened}
    for _ in range(rounds):
        for name, read in opened.items():
            found[name].append(read(seconds))
    return {
        name: {
            "median": round(statistics.median(clock for clock, _ in each)),
            "best": round(max(clock for clock, _ in each)),
            "per_cpu_s_median": round(statistics.median(cpu for _, cpu in each)),
            "per_cpu_s_best": round(max(cpu for _, cpu in each)),
        }
        for name, each in found.items()
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
