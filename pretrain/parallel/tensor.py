"""Tensor parallelism applied to a built model: Megatron's linears put in by the tables of plans.py.

A mixer or feed-forward is a region: its input enters whole on every rank (`enter`), its column linears give each rank
some heads, its row linear leaves the region. With sequence parallelism the stream outside regions is cut over tokens:
entering gathers, leaving reduce-scatters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopline.models.block import Block
from loopline.models.layers import Embedding, GroupRMSNorm, Linear, RMSNorm
from loopline.models.looped_lm import LoopedLM, LoopGate
from loopline.models.mixers.mixer import Mixer
from loopline.pretrain.parallel import megatron as mg
from loopline.pretrain.parallel.plans import CUT_DIMS, FFN_PLAN, MIXER_PLANS
from loopline.pretrain.parallel.topology import Topology


class ColumnLinear(mg.ColumnParallelLinear):
    """Megatron's column-parallel linear with our precision rule and layout: [1, T, d_in] -> [1, T, d_out/tp]."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        return super()._forward_impl(input, weight.to(input.dtype), *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The region was entered once for all its column linears, so this one neither gathers nor reduces."""
        return super().forward(x.transpose(0, 1))[0].transpose(0, 1)


class RowLinear(mg.RowParallelLinear):
    """Megatron's row-parallel linear: [1, T, d_in/tp] -> [1, T, d_out], or [1, T/tp, d_out] with sequence parallel."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:  # type: ignore[no-untyped-def]
        return super()._forward_impl(input, weight.to(input.dtype), *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Sum over ranks in the compute dtype."""
        return super().forward(x.transpose(0, 1))[0].transpose(0, 1)


class VocabEmbedding(mg.VocabParallelEmbedding):
    """Rows of the table cut over ranks: [1, T] -> [1, T, C], or [1, T/tp, C] with sequence parallel."""

    def forward(self, tokens: Tensor) -> Tensor:
        """fp32, as models.layers.Embedding."""
        x = super().forward(tokens)
        return x.transpose(0, 1) if self.reduce_scatter_embeddings else x


class PartialRMSNorm(RMSNorm):
    """A whole norm used on part of the heads or tokens: its gradient is summed over tensor-parallel ranks."""

    tp_group: torch.distributed.ProcessGroup

    def scale(self) -> Tensor:
        """Identity forward, all-reduce backward, so the gradient is right whenever it is read, under any ZeRO stage."""
        return mg.copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)


class PartialLinear(Linear):
    """A whole linear whose outputs are used by part of the heads: its gradient is summed over ranks."""

    tp_group: torch.distributed.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], the same on every rank."""
        weight = mg.copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        return F.linear(x, weight.to(x.dtype))


class CutGroupRMSNorm(GroupRMSNorm):
    """A norm over channels of all heads, some of which are held here: groups are whole, or one group is cut."""

    tp_group: torch.distributed.ProcessGroup
    is_group_cut: bool

    def mean_square(self, x: Tensor) -> Tensor:
        """Over every rank's channels: forward and backward both sum, for each rank's output depends on the sum."""
        own = super().mean_square(x)
        if not self.is_group_cut:
            return own
        total = mg.reduce_from_tensor_model_parallel_region(own, group=self.tp_group)
        total = mg.copy_to_tensor_model_parallel_region(total, group=self.tp_group)
        return total / torch.distributed.get_world_size(self.tp_group)


class PartialLoopGate(LoopGate):
    """A whole loop gate used on part of the tokens."""

    tp_group: torch.distributed.ProcessGroup

    def vectors(self) -> Tensor:
        """As PartialRMSNorm.scale."""
        return mg.copy_to_tensor_model_parallel_region(self.rho, group=self.tp_group)


def apply_tensor_parallel(model: LoopedLM, topology: Topology, *, sequence_parallel: bool) -> None:
    """Cut `model` over the tensor-parallel ranks, in place. Call it on a model without weights (meta device)."""
    column = mg.ModelParallelConfig(
        tensor_model_parallel_size=topology.tp, use_cpu_initialization=True, perform_initialization=False
    )
    row = mg.ModelParallelConfig(
        tensor_model_parallel_size=topology.tp,
        use_cpu_initialization=True,
        perform_initialization=False,
        sequence_parallel=sequence_parallel,
    )
    enter = _entry(topology, sequence_parallel)

    def cut(module: nn.Module, plan: dict[str, str]) -> None:
        for name, kind in plan.items():
            part = getattr(module, name)
            if part is None:
                continue
            if kind == "shard":
                setattr(module, name, _cut_parameter(part, topology))
            elif kind == "norm":
                _cut_norm(part, topology)
            elif kind in ("column", "row"):
                setattr(module, name, _cut_linear(part, kind, topology, column if kind == "column" else row))
            elif kind == "partial" and isinstance(part, nn.Module):
                _make_partial(part, topology)  # a parameter of the mixer's own goes through Mixer.whole
        if isinstance(module, Mixer):
            _share_heads(module, topology)
        module.register_forward_pre_hook(enter)

    for name, block in model.blocks.items():
        assert isinstance(block, Block)
        cut(block.mixer, MIXER_PLANS[model.config.mixer_names[int(name)]])
        cut(block.ffn, FFN_PLAN)
    if isinstance(model.embed, Embedding):
        model.embed = VocabEmbedding(  # type: ignore[assignment]
            model.config.vocab_size,
            model.config.d_model,
            init_method=_no_init,
            reduce_scatter_embeddings=sequence_parallel,
            config=column,
            tp_group=topology.tp_group,
        )
    if isinstance(model.head, Linear):
        model.head = _cut_linear(model.head, "column", topology, column)  # type: ignore[assignment]
        model.head.register_forward_pre_hook(enter)
    if sequence_parallel:
        for module in model.modules():
            if type(module) in (RMSNorm, LoopGate):
                _make_partial(module, topology)


def mark_shards(model: LoopedLM, topology: Topology) -> None:
    """Write on each cut parameter how it was cut: `shard = (dim, rank, tp)` for us, `tensor_model_parallel` for
    DeepSpeed's gradient norm. Call it after weights are allocated: allocation makes new parameters."""
    kinds: dict[str, int] = {"embed.weight": 0, "head.weight": 0}
    for name in model.blocks:
        plans = {"mixer": MIXER_PLANS[model.config.mixer_names[int(name)]], "ffn": FFN_PLAN}
        for part, plan in plans.items():
            for key, kind in plan.items():
                if kind in CUT_DIMS:
                    prefix = f"blocks.{name}.{part}.{key}"
                    kinds[prefix if kind == "shard" else f"{prefix}.weight"] = CUT_DIMS[kind]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.tensor_model_parallel = name in kinds  # type: ignore[attr-defined]
        if name in kinds:
            parameter.shard = (kinds[name], topology.tp_rank, topology.tp)  # type: ignore[attr-defined]


def vocab_parallel_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token from vocabulary-cut logits.

    Args:
        logits: [1, T, vocab_size/tp].
        labels: [1, T], int64, none ignored.
    Returns:
        [1, T], fp32.
    """
    losses = mg.vocab_parallel_cross_entropy(logits.transpose(0, 1).float(), labels.transpose(0, 1))
    return losses.transpose(0, 1)


def _entry(topology: Topology, sequence_parallel: bool) -> Callable[[nn.Module, tuple], tuple]:
    """Pre-forward hook of a region: identity (backward sums), or gather over tokens (backward reduce-scatters)."""

    def enter(module: nn.Module, args: tuple) -> tuple:
        x = args[0]
        if sequence_parallel:
            x = mg.gather_from_sequence_parallel_region(x.transpose(0, 1), group=topology.tp_group).transpose(0, 1)
        else:
            x = mg.copy_to_tensor_model_parallel_region(x, group=topology.tp_group)
        return (x, *args[1:])

    return enter


def _cut_linear(part: Linear, kind: str, topology: Topology, config: mg.ModelParallelConfig) -> nn.Module:
    d_out, d_in = part.weight.shape
    if kind == "column":
        return ColumnLinear(
            d_in,
            d_out,
            config=config,
            init_method=_no_init,
            bias=False,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=topology.tp_group,
        )
    return RowLinear(
        d_in,
        d_out,
        config=config,
        init_method=_no_init,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=topology.tp_group,
    )


def _cut_parameter(part: Tensor, topology: Topology) -> nn.Parameter:
    return nn.Parameter(part.chunk(topology.tp, 0)[topology.tp_rank].clone())


def _cut_norm(norm: GroupRMSNorm, topology: Topology) -> None:
    norm.__class__ = CutGroupRMSNorm
    assert isinstance(norm, CutGroupRMSNorm)
    norm.weight = _cut_parameter(norm.weight, topology)
    norm.tp_group = topology.tp_group  # type: ignore[assignment]
    norm.is_group_cut = norm.n_groups == 1
    norm.n_groups = max(1, norm.n_groups // topology.tp)


def _share_heads(mixer: Mixer, topology: Topology) -> None:
    """Fill in what a mixer leaves to the layout. On the instance: a class made here would not be the mixer's own."""

    def whole(parameter: Tensor) -> Tensor:
        return mg.copy_to_tensor_model_parallel_region(parameter, group=topology.tp_group)

    def sum_over_ranks(x: Tensor) -> Tensor:
        x = x.contiguous()
        torch.distributed.all_reduce(x, group=topology.tp_group)
        return x

    mixer.share = (topology.tp_rank, topology.tp)
    mixer.whole = whole  # type: ignore[method-assign]
    mixer.sum_over_ranks = sum_over_ranks  # type: ignore[method-assign]


def _make_partial(module: nn.Module, topology: Topology) -> None:
    # The class changes and nothing else: parameters and their names stay.
    module.__class__ = {RMSNorm: PartialRMSNorm, LoopGate: PartialLoopGate, Linear: PartialLinear}[type(module)]
    module.tp_group = topology.tp_group  # type: ignore[assignment]


def _no_init(weight: Tensor) -> None:
    """init.py fills weights."""
