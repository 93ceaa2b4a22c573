"""Loops as virtual pipeline stages: Megatron's interleaved 1F1B, where chunk r of a rank is (its blocks, loop r).

All chunks of a rank share one set of parameters, so there are no weight copies and no gradient sync between stages, and
the bubble falls from (P-1)/(M+P-1) to (P-1)/(R*M+P-1). With one loop the plain 1F1B schedule runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loopline.models.looped_lm import LoopedLM
from loopline.pretrain.batches import MicroBatch
from loopline.pretrain.objective import DepthMeter, LossFn
from loopline.pretrain.parallel import megatron as mg
from loopline.pretrain.parallel.topology import Topology


def keep_stage(model: LoopedLM, topology: Topology) -> None:
    """Drop from `model`, in place, what other stages hold. The embedding stays with the first stage; the head, final
    norm and both gates with the last. Names of what stays do not change. Tied embeddings live on both ends."""
    mine = model.config.plan.stage_blocks(topology.pp)[topology.pp_rank]
    for name in list(model.blocks):
        if int(name) not in mine:
            del model.blocks[name]
    if not topology.is_first_stage:
        model.embed = None  # type: ignore[assignment]
    if not topology.is_last_stage:
        model.head = model.final_norm = model.loop_gate = model.exit_gate = None  # type: ignore[assignment]


class Carry:
    """What goes from stage to stage: the stream, and beside it the loop's input where the update rule needs it.

    The loop update runs on the last stage but needs what the loop started from, which the first stage saw. Sending
    both in one tensor keeps autograd exact with no bookkeeping, for twice the (overlapped) traffic.
    """

    def __init__(self, model: LoopedLM) -> None:
        self.has_input = model.config.update == "gate"
        self.width = model.config.d_model * (2 if self.has_input else 1)

    def pack(self, h: Tensor, h_in: Tensor) -> Tensor:
        """[1, T, C] twice -> [T, 1, width], contiguous, as Megatron's transfers want it."""
        both = torch.cat([h, h_in], dim=-1) if self.has_input else h
        return both.transpose(0, 1).contiguous()

    def unpack(self, carried: Tensor) -> tuple[Tensor, Tensor]:
        """[T, 1, width] -> stream and loop input, [1, T, C] each (the same tensor where no input travels)."""
        x = carried.transpose(0, 1)
        if not self.has_input:
            return x, x
        h, h_in = x.chunk(2, dim=-1)
        return h, h_in


class LoopChunk(nn.Module):
    """This stage's blocks in loop `vp_stage`: one model chunk, as Megatron's schedules expect one."""

    share_embeddings_and_output_weights = False

    def __init__(self, model: LoopedLM, loop_idx: int, topology: Topology, config: mg.ModelParallelConfig) -> None:
        super().__init__()
        # Through a tuple: the chunks share one model and must not each register it as a child.
        self._model = (model,)
        self.carry = Carry(model)
        self.topology = topology
        self.config = config
        self.model_type = mg.ModelType.encoder_or_decoder
        self.vp_stage = loop_idx
        self.input: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Called by the schedule with what the previous stage sent; None in the first chunk."""
        self.input = tensors[0]

    def forward(self, batch: MicroBatch) -> Tensor:
        """[T, 1, width] to send on; the last stage's state after its update in the last chunk."""
        model, topology = self._model[0], self.topology
        if self.input is None:
            h = h_in = model.embed_tokens(batch.tokens)
        else:
            h, h_in = self.carry.unpack(self.input)
            if topology.is_first_stage:
                h_in = h  # a new loop starts from what the last stage sent
        h = model.run_blocks(h, self.vp_stage, batch.row)
        if topology.is_last_stage:
            h = model.finish_loop(h, h_in, self.vp_stage)
            if self.vp_stage == model.config.n_loops - 1:
                return h
            h_in = h  # what travels back to the first stage starts the next loop
        return self.carry.pack(h, h_in)


@dataclass
class Pipeline:
    """The ring of one model over pipeline stages.

    Attributes:
        model: this stage's part.
        loss: summed loss of a micro-batch from the state after a loop.
    """

    model: LoopedLM
    topology: Topology
    loss: LossFn
    sequence_parallel: bool
    chunks: list[LoopChunk] = field(init=False)

    def __post_init__(self) -> None:
        n_loops = self.model.config.n_loops
        config = mg.ModelParallelConfig(
            tensor_model_parallel_size=self.topology.tp,
            pipeline_model_parallel_size=self.topology.pp,
            virtual_pipeline_model_parallel_size=n_loops if n_loops > 1 else None,
            sequence_parallel=self.sequence_parallel,
            pipeline_dtype=self.model.dtype,
            # False is silently wrong with two stages and chunks (megatron-core 0.16.1; only Megatron-LM's argument
            # parser guards it).
            overlap_p2p_comm=n_loops > 1,
            batch_p2p_comm=False,
            deallocate_pipeline_outputs=False,
        )
        # Fields that megatron's schedules read and only its larger TransformerConfig declares.
        config.fine_grained_activation_offloading = False
        config.hidden_size = Carry(self.model).width
        self.config = config
        self.chunks = [LoopChunk(self.model, r, self.topology, config) for r in range(n_loops)]

    def train(self, batches: list[MicroBatch], scale: float) -> Tensor:
        """Forward and backward of one step's micro-batches; gradients gather in `.grad`.

        Args:
            batches: equal row lengths; their number is a multiple of the stages.
            scale: factor on the summed loss that backward starts from.
        Returns:
            Summed loss, scalar; zero on stages other than the last.
        """

        def forward_step(data: Iterator[MicroBatch], chunk: LoopChunk):  # type: ignore[no-untyped-def]
            batch = next(data)

            def loss(h: Tensor) -> tuple[Tensor, Tensor]:
                total = self.loss(self.model, h, batch.labels)
                # The schedule divides by the number of micro-batches; our loss is scaled once, by `scale`.
                return total * (scale * len(batches)), total.detach()

            return chunk(batch), loss

        return self._sum(self._run(forward_step, batches, forward_only=False))

    def measure(self, batches: list[MicroBatch]) -> Tensor:
        """Forward only, every loop read out: summed `DepthMeter` rows; zeros on stages other than the last."""
        meters = [DepthMeter(self.model, self.loss) for _ in batches]

        def forward_step(data: Iterator[tuple[MicroBatch, DepthMeter]], chunk: LoopChunk):  # type: ignore[no-untyped-def]
            batch, meter = next(data)
            out = chunk(batch)
            is_last_chunk = chunk.vp_stage == len(self.chunks) - 1
            if is_last_chunk:
                batch.row.memory.clear()  # no loop follows here
            if self.topology.is_last_stage:
                meter.add(out if is_last_chunk else chunk.carry.unpack(out)[0], batch.labels)
            return out, lambda h: (h.new_zeros(()), meter.row())

        rows = self._run(forward_step, list(zip(batches, meters)), forward_only=True)
        return self._sum(rows, DepthMeter.width(self.model))

    def _sum(self, values: list[Tensor], *shape: int) -> Tensor:
        return torch.stack(values).sum(0) if values else torch.zeros(shape, device=self.topology.device)

    def _run(self, forward_step, items: list, forward_only: bool) -> list[Tensor]:  # type: ignore[no-untyped-def]
        first = items[0][0] if forward_only else items[0]
        n_tokens = first.tokens.shape[1]
        iterators = [iter(items) for _ in self.chunks]
        is_ring = len(self.chunks) > 1
        schedule = (
            mg.forward_backward_pipelining_with_interleaving
            if is_ring
            else mg.forward_backward_pipelining_without_interleaving
        )
        assert self.config.overlap_p2p_comm or not is_ring
        with mg.run_without_cuda():
            return schedule(
                forward_step_func=forward_step,
                data_iterator=iterators if is_ring else iterators[0],
                model=list(self.chunks) if is_ring else self.chunks[0],
                num_microbatches=len(items),
                seq_length=n_tokens,
                micro_batch_size=1,
                decoder_seq_length=n_tokens,
                forward_only=forward_only,
                p2p_communicator=mg.P2PCommunicator(pp_group=self.topology.pp_group, config=self.config),
                pg_collection=self._groups(),
            )

    def _groups(self) -> mg.ProcessGroupCollection:
        state = mg.parallel_state
        groups = mg.ProcessGroupCollection()
        groups.tp = self.topology.tp_group
        groups.pp = self.topology.pp_group
        groups.cp = state.get_context_parallel_group()
        groups.embd = state.get_embedding_group(check_initialized=False)
        groups.pos_embd = state.get_position_embedding_group(check_initialized=False)
        groups.dp_cp = state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
        return groups
