"""AdamW's parameter groups and the learning-rate schedule: pure functions of the config."""

import math
from typing import Any

import torch
from torch import nn

from loopline.pretrain.config import OptimizerSection

MOMENTS = ("exp_avg", "exp_avg_sq")


def has_weight_decay(name: str) -> bool:
    """Matrices decay; norms, gates' vectors, decays, biases and convolutions do not."""
    return name.endswith(("_proj.weight", "embed.weight", "head.weight"))


def is_trained(name: str, trainable: str) -> bool:
    """Whether a parameter is trained at all, by `train.trainable`. No objective here reaches an exit gate."""
    if trainable == "indexer":
        return ".mixer.index_" in name
    return not name.startswith("exit_gate.")


def build_adamw(parameters: dict[str, nn.Parameter], config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over two groups, with and without decay; empty groups are left out."""
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in parameters.items() if has_weight_decay(n)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in parameters.items() if not has_weight_decay(n)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(step: int, total_steps: int, config: OptimizerSection) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Warm-up is linear from lr / warmup to lr. cosine falls to lr * min_lr_ratio at the last step; wsd holds, then falls
    linearly over the last `decay_fraction` (Schaipp et al., arXiv:2501.18965).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        n_decay = max(1, round(total_steps * config.decay_fraction))
        progress = max(0.0, (step - (total_steps - 1 - n_decay)) / n_decay)
        return config.lr - (config.lr - floor) * min(1.0, progress)
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write `lr` into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
