"""The `loopline` command. Heavy imports happen inside the command that needs them."""

import argparse
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loopline.data_pipeline.errors import DataError, printable
from loopline.pretrain import train as train_module
from loopline.pretrain.errors import CheckpointError, ConfigError, ExportError

if TYPE_CHECKING:
    from loopline.data_pipeline.manifest import Manifest
    from loopline.data_pipeline.stream import GlobalBatchStream

READER_GONE = 128 + signal.SIGPIPE  # exit status, as a shell gives it


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn a user's mistake into one message and exit status 2."""
    parser = argparse.ArgumentParser(prog="loopline", description="Pretrain, continue, evaluate and export looped LMs.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_data(commands)
    train = commands.add_parser("train", help="train a recipe, or continue its run")
    train_module.add_arguments(train)
    train.set_defaults(run=train_module.run_command)
    plan = commands.add_parser("plan", help="print the resolved config and the stage map; loads no torch")
    train_module.add_arguments(plan)
    plan.set_defaults(run=_plan)
    _add_eval(commands)
    _add_export(commands)
    _add_import(commands)
    _add_generate(commands)
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except (ConfigError, DataError, CheckpointError, ExportError) as error:
        return train_module.report(error)
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        return READER_GONE
    return status


def _has_lost_its_reader() -> bool:
    """Whether nobody reads standard output any longer, as after `| head`; what is left for it then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _plan(args: argparse.Namespace) -> int:
    args.dry_run = True
    return train_module.run_command(args)


def _add_data(commands) -> None:  # type: ignore[no-untyped-def]
    data = commands.add_parser("data", help="build and check corpora").add_subparsers(
        dest="data_command", required=True
    )
    build = data.add_parser("build", help="text -> token shards, manifest and held-out split")
    build.add_argument("source", help="'stdlib', or a file or folder: txt, jsonl(.gz/.zst), parquet, tar, datasets")
    build.add_argument("out", type=Path, help="new folder for the corpus")
    tokenizer = build.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--vocab-size", type=int, help="train a byte-level BPE with this many entries")
    tokenizer.add_argument("--tokenizer", type=Path, help="use this tokenizer.json, or a tokenizer's local folder")
    build.add_argument("--suffixes", default=None, help="file endings to read from a folder: .py,.md")
    build.add_argument("--text-field", default="text", help="field or column of a record that holds the text")
    build.add_argument("--workers", type=int, default=None, help="processes; 0: this one alone; default: one per core")
    build.add_argument(
        "--max-skipped-share",
        type=float,
        default=0.01,
        help="most documents that may be left out as not UTF-8 or without tokens, as a share; more fail the build",
    )
    build.add_argument(
        "--max-document-bytes", type=int, default=16 * 2**20, help="a larger document fails the build: memory, 150 x"
    )
    _add_data_sizes(build)
    build.set_defaults(run=_build)
    megatron = data.add_parser("import-megatron", help="Megatron .bin/.idx -> token shards and manifest")
    megatron.add_argument("prefix", help="path of the two files, without .bin and .idx")
    megatron.add_argument("out", type=Path, help="new folder for the corpus")
    megatron.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer the tokens were made with")
    megatron.add_argument("--eos-id", type=int, default=None, help="id that ends documents; default: the tokenizer's")
    _add_data_sizes(megatron)
    megatron.set_defaults(run=_import_megatron)
    inspect = data.add_parser("inspect", help="counts, histogram of lengths, decoded samples")
    inspect.add_argument("manifest", help="manifest.json, or the folder that holds it: a path or a URL")
    inspect.add_argument("--samples", type=int, default=3, help="documents to decode per split")
    inspect.set_defaults(run=_inspect)
    verify = data.add_parser("verify", help="compare every shard and the tokenizer with the manifest's hashes")
    verify.add_argument("manifest", help="manifest.json, or the folder that holds it: a path or a URL")
    verify.set_defaults(run=_verify)
    _add_digest(data)


def _add_data_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heldout-fraction", type=float, default=0.05)
    parser.add_argument("--record-tokens", type=int, default=65_536, help="target tokens in one record of a shard")
    parser.add_argument("--shard-bytes", type=int, default=256 * 2**20, help="target bytes of one shard")
    parser.add_argument("--seed", type=int, default=0, help="chooses the held-out documents")


def _build(args: argparse.Namespace) -> int:
    from loopline.data_pipeline.build import build
    from loopline.data_pipeline.manifest import MANIFEST_FILE
    from loopline.data_pipeline.sources import open_source
    from loopline.data_pipeline.tokenizer import TokenizerFile

    suffixes = tuple(args.suffixes.split(",")) if args.suffixes else None
    was_there = (args.out / MANIFEST_FILE).exists()
    manifest = build(
        open_source(args.source, suffixes=suffixes, field=args.text_field, max_document_bytes=args.max_document_bytes),
        args.out,
        tokenizer=TokenizerFile(args.tokenizer) if args.tokenizer else None,
        vocab_size=args.vocab_size,
        heldout_fraction=args.heldout_fraction,
        record_tokens=args.record_tokens,
        shard_bytes=args.shard_bytes,
        seed=args.seed,
        workers=len(os.sched_getaffinity(0)) if args.workers is None else args.workers,
        max_skipped_share=args.max_skipped_share,
    )
    return _print_built(manifest, was_there)


def _import_megatron(args: argparse.Namespace) -> int:
    from loopline.data_pipeline.manifest import MANIFEST_FILE
    from loopline.data_pipeline.megatron_index import import_megatron
    from loopline.data_pipeline.tokenizer import TokenizerFile

    was_there = (args.out / MANIFEST_FILE).exists()
    manifest = import_megatron(
        args.prefix,
        args.out,
        tokenizer=TokenizerFile(args.tokenizer, eos_id=args.eos_id),
        heldout_fraction=args.heldout_fraction,
        record_tokens=args.record_tokens,
        shard_bytes=args.shard_bytes,
        seed=args.seed,
    )
    return _print_built(manifest, was_there)


def _inspect(args: argparse.Namespace) -> int:
    from loopline.data_pipeline.inspection import inspect_lines
    from loopline.data_pipeline.manifest import Manifest

    if args.samples < 0:
        raise DataError(f"--samples is {args.samples}: give 0 or more")
    for line in inspect_lines(Manifest.load(args.manifest), args.samples):
        print(printable(line))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from loopline.data_pipeline.manifest import Manifest

    manifest = Manifest.load(args.manifest)
    manifest.verify()
    shards = list(manifest.iter_shards())
    n_bytes = sum(shard.n_bytes for shard in shards)
    place = printable(manifest.location)
    print(f"{place}: tokenizer and {len(shards):,} shards, {n_bytes:,} bytes: every record readable, all as built")
    return 0


def _print_built(manifest: "Manifest", was_there: bool) -> int:
    if was_there:
        print("already there, built from the same source with the same settings")
    for name, split in manifest.splits.items():
        print(f"{name}: {split.n_documents:,} documents, {split.n_tokens:,} tokens, {len(split.shards)} shards")
    n_skipped = manifest.provenance.n_skipped
    if n_skipped:
        n_documents = n_skipped + sum(split.n_documents for split in manifest.splits.values())
        print(f"skipped: {n_skipped:,} of {n_documents:,} documents")
    print(f"manifest: {printable(manifest.path)}")
    return 0


def _add_digest(data) -> None:  # type: ignore[no-untyped-def]
    digest = data.add_parser(
        "digest",
        help="one hash of the first global batches of a corpus, or of the data of a recipe",
        description="Prints one hash of the first global batches: of a corpus, read with the options below, or of what "
        "a recipe trains on, mixture and schedule included. It is the same for every --dp and --workers.",
    )
    digest.add_argument("manifest", nargs="?", help="manifest.json of a built corpus, or its folder: a path or a URL")
    digest.add_argument("--recipe", help="instead of a manifest: a shipped recipe, or a .toml file, with its data")
    digest.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change a field of the recipe"
    )
    digest.add_argument("--batches", type=int, default=10, help="global batches to hash")
    digest.add_argument("--dp", type=int, default=1, help="data-parallel ranks to read them on")
    digest.add_argument("--workers", type=int, help="worker processes per rank; default: the recipe's, else 0")
    alone = digest.add_argument_group(
        "with a manifest", "A recipe has these as fields of its own; change them by --set."
    )
    for name, value in _DIGEST_DEFAULTS.items():
        alone.add_argument(_option(name), type=type(value), choices=_DIGEST_CHOICES.get(name), help=f"default: {value}")
    digest.set_defaults(run=_digest)


# Of a stream that no recipe describes.
_DIGEST_DEFAULTS = {
    "seed": 0,
    "seq_len": 128,
    "lanes": 8,
    "global_batch_sequences": 8,
    "shuffle_records": 4,
    "shuffle": "records",
    "packing": "concat",
}
_DIGEST_CHOICES = {"shuffle": ["records", "shards"], "packing": ["concat", "carry", "best_fit"]}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _digest(args: argparse.Namespace) -> int:
    from loopline.data_pipeline.digest import stream_digest

    if args.dp < 1:
        raise DataError(f"--dp is {args.dp}: give at least 1")
    if (args.manifest is None) == (args.recipe is None):
        raise DataError("give either a manifest or --recipe: the first is one corpus, the second what a run reads")
    ranks = _recipe_ranks(args) if args.recipe else _manifest_ranks(args)
    try:
        print(stream_digest(ranks, args.batches))
    finally:
        for rank in ranks:
            rank.close()
    return 0


def _recipe_ranks(args: argparse.Namespace) -> "list[GlobalBatchStream]":
    from loopline.pretrain import corpus
    from loopline.pretrain.config import load_config

    given = [_option(name) for name in _DIGEST_DEFAULTS if getattr(args, name) is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)} with --recipe: change the recipe's own field, by --set train.seq_len=128"
        )
    workers = [] if args.workers is None else [f"data.workers={args.workers}"]
    config = load_config(args.recipe, [*args.overrides, *workers])
    data = corpus.open_data(config, local_rank=0)
    return [train_module.open_stream(config, data, rank, args.dp, None) for rank in range(args.dp)]


def _manifest_ranks(args: argparse.Namespace) -> "list[GlobalBatchStream]":
    from loopline.data_pipeline.manifest import Manifest
    from loopline.data_pipeline.stream import GlobalBatchStream

    if args.overrides:
        raise ConfigError("--set changes a field of a recipe, and none is given: name it by --recipe")
    chosen = {name: getattr(args, name) for name in _DIGEST_DEFAULTS if getattr(args, name) is not None}
    settings = {**_DIGEST_DEFAULTS, **chosen}
    settings["n_lanes"] = settings.pop("lanes")
    manifest = Manifest.load(args.manifest)
    return [
        GlobalBatchStream(manifest, dp_rank=rank, dp_size=args.dp, workers=args.workers or 0, **settings)
        for rank in range(args.dp)
    ]


def _add_eval(commands) -> None:  # type: ignore[no-untyped-def]
    parser = commands.add_parser("eval", help="held-out loss at every depth")
    parser.add_argument("source", help="a run folder or one of its checkpoints")
    parser.add_argument("--manifest", default=None, help="another corpus than the run's")
    parser.add_argument("--cache-dir", default=None, help="where bundled corpora are")
    parser.add_argument("--max-loops", type=int, default=None, help="deepest loop count measured; default: the trained")
    parser.add_argument("--max-batches", type=int, default=None, help="measure only so many batches")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from loopline.pretrain.evaluate import evaluate
    from loopline.pretrain.parallel.topology import pick_device
    from loopline.pretrain.source import corpus_of, load_model, open_source

    max_loops = args.max_loops
    if max_loops is not None and max_loops < 1:
        raise ConfigError(f"--max-loops is {max_loops}: give at least 1")
    source = open_source(args.source)
    figures = evaluate(
        load_model(source, pick_device(args.device, 0)),
        corpus_of(source, args.manifest, args.cache_dir),
        seq_len=source.config.train.seq_len,
        max_loops=max_loops or source.config.model.n_loops,
        max_batches=args.max_batches,
    )
    print(json.dumps({"checkpoint": str(source.path), "step": source.step, **figures.__dict__}, indent=1))
    return 0


def _add_export(commands) -> None:  # type: ignore[no-untyped-def]
    export = commands.add_parser("export", help="write a model for other libraries")
    hf = export.add_subparsers(dest="format", required=True).add_parser("hf", help="Hugging Face folder")
    hf.add_argument("source", help="a run folder or one of its checkpoints")
    hf.add_argument("out", type=Path, help="new folder")
    hf.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    hf.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)
    hf.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from loopline.pretrain.huggingface import export_run
    from loopline.pretrain.source import open_source

    source = open_source(args.source)
    report = export_run(source, args.out, dtype=args.dtype, max_shard_bytes=args.max_shard_bytes)
    print(json.dumps({"export": str(args.out), "checkpoint": str(source.path), **report.__dict__}, indent=1))
    return 0


def _add_import(commands) -> None:  # type: ignore[no-untyped-def]
    importer = commands.add_parser("import", help="bring a model in as a checkpoint")
    hf = importer.add_subparsers(dest="format", required=True).add_parser("hf", help="an exported Hugging Face folder")
    hf.add_argument("source", type=Path, help="the exported folder; nothing in it is executed")
    hf.add_argument("out", type=Path, help="new run folder; use it in eval, export, or checkpoint.init_from")
    hf.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    from loopline.pretrain.huggingface import import_export

    print(f"imported into {import_export(args.source, args.out)}")
    return 0


def _add_generate(commands) -> None:  # type: ignore[no-untyped-def]
    parser = commands.add_parser("generate", help="continue a prompt with an exported model")
    parser.add_argument("export", type=Path, help="a folder written by `loopline export hf`")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--n-loops", type=int, default=None, help="loops to run; default: the trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from loopline.models.hf.generate import generate_text

    text = generate_text(
        args.export,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        n_loops=args.n_loops,
        seed=args.seed,
    )
    print(args.prompt + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
