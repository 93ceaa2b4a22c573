"""A trained model in one process, from a run folder, a checkpoint, or a Hugging Face export."""

from dataclasses import dataclass
from pathlib import Path

import torch

from loopline.data_pipeline.manifest import Manifest
from loopline.models.config import ModelConfig
from loopline.models.looped_lm import LoopedLM
from loopline.pretrain import checkpoint
from loopline.pretrain.config import RunConfig
from loopline.pretrain.corpus import open_corpus
from loopline.pretrain.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        path: the checkpoint.
        state: its JSON.
        config: the config of the run that saved it.
    """

    path: Path
    state: checkpoint.RunState
    config: RunConfig

    @property
    def step(self) -> int:
        """Optimizer steps trained."""
        return self.state.step


def open_source(where: str) -> Source:
    """A run folder (its newest checkpoint) or one checkpoint's folder, with every file's hash checked.

    Raises:
        CheckpointError: neither is there, or it is damaged.
    """
    path = checkpoint.resolve(where)
    state = checkpoint.check(path, hashes=True)
    return Source(path, state, RunConfig.model_validate(state.config))


def load_model(source: Source, device: torch.device, dtype: torch.dtype = torch.float32) -> LoopedLM:
    """The whole model on one device, weights in."""
    return model_from_weights(source.config.model, checkpoint.read_full(source.path), device, dtype)


def model_from_weights(
    config: ModelConfig, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> LoopedLM:
    """A model filled from full tensors by canonical name.

    Raises:
        CheckpointError: names or shapes differ.
    """
    with torch.device("meta"):
        model = LoopedLM(config, dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    parameters = dict(model.named_parameters())
    differing = sorted(parameters.keys() ^ weights.keys())
    differing += [n for n, p in parameters.items() if n in weights and weights[n].shape != p.shape]
    if differing:
        raise CheckpointError(f"weights do not fit the model's config: {', '.join(differing[:5])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model


def corpus_of(source: Source, manifest: str | None, cache_dir: str | None) -> Manifest:
    """The corpus a run was trained on, or another one."""
    data = source.config.data.model_copy(
        update={k: v for k, v in {"manifest": manifest, "cache_dir": cache_dir}.items() if v is not None}
    )
    return open_corpus(source.config.model_copy(update={"data": data}), local_rank=0)
