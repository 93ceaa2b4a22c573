"""Runs to and from Hugging Face folders: `loopline export hf` and `loopline import hf`."""

import json
from pathlib import Path

import torch

from loopline.data_pipeline.tokenizer import TokenizerFile
from loopline.models.hf.export import export_hf, import_hf
from loopline.models.hf.parity import ParityReport
from loopline.pretrain import checkpoint
from loopline.pretrain.config import RunConfig, TrainSection
from loopline.pretrain.errors import CheckpointError
from loopline.pretrain.source import Source, load_model

TOKENIZER_FOLDER = "tokenizer"  # in the run folder, so that an export needs nothing but the run


def export_run(
    source: Source, out: Path, *, dtype: str = "float32", max_shard_bytes: int = 5_000_000_000
) -> ParityReport:
    """Write a run's model, with its tokenizer, as a Hugging Face folder; held to the training model's logits.

    Raises:
        ExportError: `out` exists, or logits differ.
    """
    tokenizer = source.path.parent.parent / TOKENIZER_FOLDER
    return export_hf(
        load_model(source, torch.device("cpu")),
        out,
        tokenizer_dir=tokenizer if tokenizer.is_dir() else None,
        dtype=dtype,  # type: ignore[arg-type]
        max_shard_bytes=max_shard_bytes,
        max_tokens=source.config.train.seq_len,
    )


def import_export(exported: Path, out: Path) -> Path:
    """Write an exported Hugging Face model as a run folder with a checkpoint of step 0.

    Args:
        exported: folder written by `export_hf`. Only JSON and safetensors are read; no code in it runs.
        out: new run folder.
    Raises:
        CheckpointError: the folder is foreign or damaged, or `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists: choose a new folder, or remove it first")
    model, weights = import_hf(exported)
    # The length the exporter recorded, so that evaluating the import measures what evaluating the original did.
    trained = json.loads((exported / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    config = RunConfig(model=model, train=TrainSection(seq_len=trained) if trained else TrainSection())
    state = checkpoint.RunState(step=0, updates=0, tokens=0, lanes={}, data="", config=config.model_dump(mode="json"))
    path = checkpoint.save_weights(out / "checkpoints", weights, state)
    if (exported / "tokenizer.json").exists():
        TokenizerFile(exported).copy_to(out / TOKENIZER_FOLDER)
    return path
