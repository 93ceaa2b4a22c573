"""Parameters and FLOPs from the config alone, torch-free. Tests hold them to the built model.

FLOPs count multiply and add as two, per token, per *executed* loop: a looped model runs its blocks n_loops times.
"""

from loopline.models.config import ModelConfig


def block_parameters(config: ModelConfig, name: str) -> int:
    """Parameters of one stored block with mixer `name`."""
    n_norms = 4 if config.norm == "sandwich" else 2
    mixer = getattr(config, name).parameters(config.d_model)
    return mixer + 3 * config.d_model * config.d_ffn + n_norms * config.d_model


def model_parameters(config: ModelConfig) -> int:
    """Stored parameters of the model; tied embeddings count once."""
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    gate = config.n_loops * config.d_model if config.update == "gate" else 0
    exit_gate = config.d_model + 1 if config.exit_gate else 0
    return embeddings + config.d_model + gate + exit_gate + sum(block_parameters(config, m) for m in config.mixer_names)


def forward_flops(config: ModelConfig, seq_len: int, n_loops: int | None = None) -> float:
    """Forward FLOPs per token with documents of `seq_len` tokens: executed loops of the stack, and one head."""
    n_loops = config.n_loops if n_loops is None else n_loops
    mixers = {name: section.flops(config.d_model, seq_len) for name, section in config.sections.items()}
    blocks = sum(mixers[name] + 6 * config.d_model * config.d_ffn for name in config.mixer_names)
    return n_loops * blocks + 2 * config.d_model * config.vocab_size


def train_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs per trained token: backward costs twice the forward. Recomputation is not counted (MFU, not HFU)."""
    return 3 * forward_flops(config, seq_len)
