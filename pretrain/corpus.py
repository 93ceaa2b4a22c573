"""The data a run names, opened and checked before anything expensive starts."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopline.data_pipeline import supply
from loopline.data_pipeline.build import build_bundled, wait_for_manifest
from loopline.data_pipeline.download import RemoteSettings, parse_location
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.mixture import Mixture, Source
from loopline.pretrain.config import RunConfig
from loopline.pretrain.errors import ConfigError

BUILD_TIMEOUT_S = 600.0

log = logging.getLogger(__name__)


def open_corpus(config: RunConfig, local_rank: int) -> Manifest:
    """The run's manifest. A bundled corpus is built first where it is missing: one process a machine builds, the others
    wait for its manifest. Of a corpus at a URL only the manifest and the tokenizer are fetched here; its shards are
    fetched and checked when they are first read.

    Raises:
        DataError: missing or altered shards, or another tokenizer than the manifest's; a location that is refused.
        ConfigError: the model's vocabulary is smaller than the corpus's.
    """
    name = config.data.manifest or config.data.sources[0].manifest
    if name.startswith("bundled:"):
        name = name.removeprefix("bundled:")
        folder = Path(config.data.cache_dir) / f"{name}-bpe{config.model.vocab_size}"
        if local_rank == 0:
            build_bundled(name, Path(config.data.cache_dir), config.model.vocab_size)
        manifest = wait_for_manifest(folder / "manifest.json", BUILD_TIMEOUT_S)
    else:
        location = parse_location(name)
        if isinstance(location, Path) and not location.exists():
            raise DataError(
                f"data.manifest = {name!r} does not exist: build it with `loopline data build`, or use 'bundled:stdlib'"
            )
        manifest = Manifest.load(location, remote_settings(config))
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the corpus's vocabulary "
            f"{manifest.vocab_size} ({manifest.path}): raise it to at least that"
        )
    if config.eval.every:
        manifest.split("heldout")  # refused now, not at the first evaluation
    if manifest.is_remote:
        manifest.verify_tokenizer()
        _warn_of_small_cache(config, manifest)
    else:
        manifest.verify(hashes=config.data.verify_hashes and local_rank == 0)
    return manifest


def remote_settings(config: RunConfig) -> RemoteSettings:
    """How this run fetches what lies at a URL."""
    return RemoteSettings(
        cache_dir=Path(config.data.cache_dir),
        cache_bytes=config.data.cache_bytes,
        retry_timeout_s=config.data.retry_timeout_s,
        read_timeout_s=config.data.read_timeout_s,
        rehash_cached=config.data.verify_hashes,
    )


def _warn_of_small_cache(config: RunConfig, manifest: Manifest) -> None:
    n_bytes = sum(shard.n_bytes for shard in manifest.iter_shards())
    if n_bytes <= config.data.cache_bytes:
        return
    if config.data.shuffle == "records":  # every record from another shard
        log.warning(
            "the shards of %s have %d bytes, data.cache_bytes is %d: the order visits them at random, so shards will "
            "be fetched again and again. Raise data.cache_bytes to hold them all, or begin the run with "
            "data.shuffle = 'shards', which needs room for a few",
            config.data.manifest,
            n_bytes,
            config.data.cache_bytes,
        )
        return
    shards = manifest.split("train").shards
    n_records = sum(len(shard.records) for shard in shards)
    # What all lanes' windows span, the shard they have not quite left, and one more for lanes that are ahead.
    n_open = 2 + config.data.lanes * config.data.shuffle_records * len(shards) // n_records
    if n_open * max(shard.n_bytes for shard in shards) > config.data.cache_bytes:
        log.warning(
            "data.cache_bytes is %d, too little for the %d shards of %s that %d lanes with windows of %d records read "
            "at a time: shards will be fetched again and again. Raise data.cache_bytes, or build the data with larger "
            "shards",
            config.data.cache_bytes,
            n_open,
            config.data.manifest,
            config.data.lanes,
            config.data.shuffle_records,
        )


def open_data(config: RunConfig, local_rank: int) -> Manifest | Mixture:
    """The run's corpus, or the mixture of its `data.sources`.

    Raises:
        DataError, ConfigError: as `open_corpus`; sources that do not go together.
    """
    if not config.data.sources:
        return open_corpus(config, local_rank)

    def opened(manifest: str) -> Manifest:
        data = config.data.model_copy(update={"manifest": manifest})
        return open_corpus(config.model_copy(update={"data": data}), local_rank)

    return Mixture(
        tuple(Source(s.name, opened(s.manifest), s.weight, s.max_epochs) for s in config.data.sources),
        temperature=config.data.temperature,
        schedule={entry.step: entry.weights for entry in config.data.schedule},
    )


def check_supply(
    config: RunConfig, data: Manifest | Mixture, states: Mapping[int, Mapping[str, Any]], step: int
) -> None:
    """Refuse a run whose sources end before it does.

    Args:
        data: as `open_data` gave it; a single corpus never ends.
        states: of every lane, after `step` steps.
    Raises:
        DataError: a lane runs out; it names the sources.
    """
    if isinstance(data, Mixture):
        supply.check_supply(
            data,
            states,
            seed=config.run.seed,
            seq_len=config.train.seq_len,
            sequences_per_lane=config.train.global_batch_sequences // config.data.lanes,
            step=step,
            n_steps=config.train.stop_at_step or config.train.steps,
            shuffle=config.data.shuffle,
        )


def main_manifest(data: Manifest | Mixture) -> Manifest:
    """The corpus whose held-out split and tokenizer are the run's: a mixture's first."""
    return data.sources[0].manifest if isinstance(data, Mixture) else data


def data_id(data: Manifest | Mixture) -> str:
    """Identity of the tokens a run trains on."""
    return data.data_id if isinstance(data, Mixture) else data.content_sha256("train")
