"""What a run would do, in words, without torch: `loopline train --dry-run` and `loopline plan`."""

import json

from loopline.models.flops import model_parameters, train_flops
from loopline.pretrain.config import RunConfig


def describe(config: RunConfig, world_size: int) -> str:
    """The resolved config, sizes, and which blocks and loops each pipeline stage runs."""
    parallel, model, train = config.parallel, config.model, config.train
    dp = config.dp(world_size)
    n_micro = config.micro_batches(world_size)
    lines = ["resolved config:", json.dumps(config.model_dump(mode="json"), indent=1), ""]
    lines.append(f"parameters: {model_parameters(model):,} stored, {model.plan.depth} block applications a token")
    lines.append(
        f"FLOPs per trained token: {train_flops(model, train.seq_len):,.0f} over {model.n_loops} executed loops"
    )
    lines.append(f"tokens per step: {train.global_batch_sequences * train.seq_len:,}; micro-batches a rank: {n_micro}")
    lines.append(f"layout on {world_size} processes: tp {parallel.tp} x pp {parallel.pp} x dp {dp}")
    bubble = (parallel.pp - 1) / (model.n_loops * n_micro + parallel.pp - 1)
    lines.append(f"pipeline bubble: {bubble:.1%} ({model.n_loops} loops as virtual stages)")
    lines.append("stage map:")
    names = model.mixer_names
    for stage, blocks in enumerate(model.plan.stage_blocks(parallel.pp)):
        held = " ".join(f"{i}:{names[i]}" for i in blocks)
        ends = ("embedding, " if stage == 0 else "") + f"blocks {held}"
        ends += ", loop update, final norm, head" if stage == parallel.pp - 1 else ""
        lines.append(f"  stage {stage}: {ends}; chunks: loops 0..{model.n_loops - 1}")
    return "\n".join(lines)
