"""Parameters and FLOPs from the config alone, torch-free. Tests hold them to the built model.

FLOPs count multiply and add as two, per token, per *executed* loop: a looped model runs its blocks n_loops times.
"""

from loopline.models.config import ModelConfig


def mixer_parameters(config: ModelConfig, name: str) -> int:
    """Parameters of one mixer."""
    d = config.d_model
    if name == "full":
        q, kv = config.full.n_heads * config.d_head, config.n_kv_heads * config.d_head
        return d * (2 * q + 2 * kv) + (d * q if config.full.output_gate else 0)
    gdn = config.gdn
    keys, values = gdn.n_heads * gdn.d_head_k, gdn.n_heads * gdn.d_head_v
    projections = d * (2 * keys + 3 * values + 2 * gdn.n_heads)
    return projections + gdn.conv_size * (2 * keys + values) + 2 * gdn.n_heads + gdn.d_head_v


def block_parameters(config: ModelConfig, name: str) -> int:
    """Parameters of one stored block."""
    n_norms = 4 if config.norm == "sandwich" else 2
    return mixer_parameters(config, name) + 3 * config.d_model * config.d_ffn + n_norms * config.d_model


def model_parameters(config: ModelConfig) -> int:
    """Stored parameters of the model; tied embeddings count once."""
    embeddings = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    gate = config.n_loops * config.d_model if config.update == "gate" else 0
    return embeddings + config.d_model + gate + sum(block_parameters(config, m) for m in config.mixer_names)


def mixer_flops(config: ModelConfig, name: str, mean_context: float) -> float:
    """Forward FLOPs per token of one mixer. `mean_context` is the mean number of keys a query sees."""
    d = config.d_model
    if name == "full":
        matrices = mixer_parameters(config, name)
        return 2 * matrices + 4 * config.full.n_heads * config.d_head * mean_context
    gdn = config.gdn
    keys, values = gdn.n_heads * gdn.d_head_k, gdn.n_heads * gdn.d_head_v
    projections = 2 * d * (2 * keys + 3 * values + 2 * gdn.n_heads)
    convolutions = 2 * gdn.conv_size * (2 * keys + values)
    # The recurrence itself: decay, k^T S, rank-one update and q^T S are 7 K V operations a head; the chunked form does
    # more arithmetic, which is the kernel's choice and not the model's work.
    return projections + convolutions + 7 * gdn.n_heads * gdn.d_head_k * gdn.d_head_v


def forward_flops(config: ModelConfig, seq_len: int, n_loops: int | None = None) -> float:
    """Forward FLOPs per token with documents of `seq_len` tokens: executed loops of the stack, and one head."""
    n_loops = config.n_loops if n_loops is None else n_loops
    mean_context = (seq_len + 1) / 2
    blocks = sum(mixer_flops(config, m, mean_context) + 6 * config.d_model * config.d_ffn for m in config.mixer_names)
    return n_loops * blocks + 2 * config.d_model * config.vocab_size


def train_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs per trained token: backward costs twice the forward. Recomputation is not counted (MFU, not HFU)."""
    return 3 * forward_flops(config, seq_len)
