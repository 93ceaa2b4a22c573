"""From a config to a model on this rank: blocks of its stage, cut over its tensor group, filled, and its optimizer."""

from collections.abc import Callable

import torch

from loopline.kernels.backends import check_backend
from loopline.kernels.errors import BackendError
from loopline.models.init import init_weights
from loopline.models.looped_lm import LoopedLM
from loopline.models.mixers.registry import MIXER_MODULES
from loopline.pretrain.config import RunConfig, parse_recompute
from loopline.pretrain.errors import ConfigError
from loopline.pretrain.objective import loss_sum, token_losses
from loopline.pretrain.optimizer import is_trained
from loopline.pretrain.parallel.topology import Topology
from loopline.pretrain.recompute import recomputing
from loopline.pretrain.step import Stepper

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(config: RunConfig, topology: Topology, fill: Callable[[LoopedLM], None] | None = None) -> LoopedLM:
    """This rank's part of the model, with weights.

    The order matters and is stated: whole model without storage, keep this stage, cut over tensor ranks, allocate, tie,
    mark cut parameters, fill.

    Args:
        fill: writes every parameter; None means initial weights from the run's seed.
    """
    with torch.device("meta"):
        model = LoopedLM(config.model, DTYPES[config.train.dtype])
        if topology.pp > 1:
            from loopline.pretrain.parallel.pipeline import keep_stage

            keep_stage(model, topology)
        if topology.tp > 1:
            from loopline.pretrain.parallel.tensor import apply_tensor_parallel

            apply_tensor_parallel(model, topology, sequence_parallel=config.parallel.sequence_parallel)
    model.to_empty(device=topology.device)
    if config.model.tie_embeddings and topology.pp == 1:
        model.head.weight = model.embed.weight  # allocation unties
    if topology.tp > 1:
        from loopline.pretrain.parallel.tensor import mark_shards

        mark_shards(model, topology)
    if config.model.tie_embeddings and topology.pp > 1 and topology.is_last_stage:
        model.head.weight.ds_pipe_replicated = True  # type: ignore[attr-defined]  # counted in the gradient norm on the first stage
    if fill is None:
        init_weights(model, config.run.seed)
    else:
        fill(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config.train.trainable))
    loops = parse_recompute(config.parallel.recompute)
    if loops != frozenset():
        model.run_step = recomputing(loops)
    return model


def build_stepper(config: RunConfig, topology: Topology, model: LoopedLM) -> Stepper:
    """The model's optimizer and schedule for this layout."""
    parallel = config.parallel

    def loss(model: LoopedLM, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss_sum(model, h, labels, losses)

    losses = token_losses
    if topology.tp > 1:
        from loopline.pretrain.parallel.tensor import vocab_parallel_token_losses

        losses = vocab_parallel_token_losses
    pipeline = None
    if topology.pp > 1:
        from loopline.pretrain.parallel.pipeline import Pipeline

        pipeline = Pipeline(model, topology, loss, parallel.sequence_parallel)
    shapes = {name: _twin(parameter) for name, parameter in model.named_parameters()}
    if parallel.zero_stage:
        from loopline.pretrain.parallel.zero import ZeroOptimizer

        optimizer = ZeroOptimizer(model, config.optimizer, topology, stage=parallel.zero_stage)
    else:
        from loopline.pretrain.parallel.replicated import ReplicatedOptimizer

        optimizer = ReplicatedOptimizer(model, config.optimizer, topology)  # type: ignore[assignment]
    mixers = [MIXER_MODULES[name] for name in config.model.sections]  # of all stages, so that ranks agree
    return Stepper(
        model=model,
        optimizer=optimizer,
        topology=topology,
        loss=loss,
        pipeline=pipeline,
        micro_batch_sequences=config.train.micro_batch_sequences,
        sequence_parallel=parallel.sequence_parallel,
        parameter_shapes=shapes,
        figure_names=tuple(name for mixer in mixers for name in mixer.figures),
        measured_names=tuple(name for mixer in mixers for name in mixer.measured),
    )


def _twin(parameter: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_like(parameter, device="meta")
    if hasattr(parameter, "shard"):
        twin.shard = parameter.shard  # type: ignore[attr-defined]
    return twin


def chosen_backends(config: RunConfig, device: torch.device) -> dict[str, str]:
    """Mixer -> the kernel it will run, resolved once; logged at the start.

    Raises:
        ConfigError: one asked for is not available.
    """
    chosen = {}
    for name, section in config.model.sections.items():
        module = MIXER_MODULES[name]
        try:
            chosen[name] = check_backend(
                module.op, module.backends, section.backend, device.type, DTYPES[config.train.dtype]
            )
        except BackendError as error:
            raise ConfigError(f"{section.field('backend')} = {section.backend!r}: {error}") from None
    return chosen
