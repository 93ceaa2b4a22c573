"""The data a run names, opened and checked before anything expensive starts."""

from pathlib import Path

from loopline.data_pipeline.build import build_bundled, wait_for_manifest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.pretrain.config import RunConfig
from loopline.pretrain.errors import ConfigError

BUILD_TIMEOUT_S = 600.0


def open_corpus(config: RunConfig, local_rank: int) -> Manifest:
    """The run's manifest. A bundled corpus is built first where it is missing: one process a machine builds, the others
    wait for its manifest.

    Raises:
        DataError: missing or altered shards, or another tokenizer than the manifest's.
        ConfigError: the model's vocabulary is smaller than the corpus's.
    """
    name = config.data.manifest
    if name.startswith("bundled:"):
        name = name.removeprefix("bundled:")
        folder = Path(config.data.cache_dir) / f"{name}-bpe{config.model.vocab_size}"
        if local_rank == 0:
            build_bundled(name, Path(config.data.cache_dir), config.model.vocab_size)
        manifest = wait_for_manifest(folder / "manifest.json", BUILD_TIMEOUT_S)
    else:
        if not Path(name).exists():
            raise DataError(
                f"data.manifest = {name!r} does not exist: build it with `loopline data build`, or use 'bundled:stdlib'"
            )
        manifest = Manifest.load(Path(name))
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the corpus's vocabulary "
            f"{manifest.vocab_size} ({manifest.path}): raise it to at least that"
        )
    if config.eval.every:
        manifest.split("heldout")  # refused now, not at the first evaluation
    manifest.verify(hashes=config.data.verify_hashes and local_rank == 0)
    return manifest
