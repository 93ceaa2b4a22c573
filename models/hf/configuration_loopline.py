"""Configuration of an exported Loopline model. Needs transformers only; it is shipped, as it is, with every export.

What the fields mean is written in modeling_loopline.py's first lines and in the model card.
"""

from typing import Any

from transformers import PreTrainedConfig

# Cache layer of each mixer, in transformers' words.
LAYER_TYPES = {
    "full": "full_attention",
    "window": "sliding_attention",
    "gdn": "linear_attention",
    "kda": "linear_attention",
    "deltanet": "linear_attention",
    "mamba2": "linear_attention",
    "gla": "linear_attention",
    "hgrn2": "linear_attention",
    "retnet": "linear_attention",
    "nsa": "full_attention",
    "dsa": "indexed_attention",
}


class LooplineConfig(PreTrainedConfig):
    """`n_blocks` stored blocks, applied `n_loops` times.

    Attributes:
        n_blocks, n_loops: stored blocks, and passes over them. `n_loops` is also the number of rows of the loop gate.
        mixer_pattern: mixers of the blocks as the recipe has them: "gdn*4,full", or a list.
        mixer_names: the same spelled out, a name for every block.
        mixers: settings of every mixer named, by name; the fields are those of Loopline's recipes.
        norm_placement: "pre" (before each branch) or "sandwich" (before and after).
        loop_update: what the next loop starts from: "replace" h <- M(h), "norm" h <- norm(M(h)), "gate"
            h <- M(h) + rho_r * h.
        exit_gate: whether the model gives the chance of stopping after each loop.
        max_position_embeddings: longest sequence seen in training; nothing in the model enforces it.
    """

    model_type = "loopline"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 4096
    hidden_size: int = 64
    intermediate_size: int = 176
    n_blocks: int = 1
    n_loops: int = 2
    mixer_pattern: str | list[str] = "full"
    mixer_names: list[str] | None = None
    mixers: dict[str, Any] | None = None
    norm_placement: str = "pre"
    rms_norm_eps: float = 1e-6
    loop_update: str = "gate"
    tie_word_embeddings: bool = False
    exit_gate: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def names(self) -> list[str]:
        """Mixer of each stored block."""
        return self.mixer_names or []

    def slot_types(self, n_loops: int) -> list[str]:
        """Cache layer of each slot. Every (loop, block) has its own keys, values and states, so to a cache the model is
        n_loops * n_blocks layers deep: slot = loop_idx * n_blocks + block_idx."""
        types = [LAYER_TYPES[name] for name in self.names] * n_loops
        if types and set(types) == {"linear_attention"}:
            # generate() asks a cache how many tokens it holds, and one of recurrent layers alone raises (transformers
            # 5.23). A hybrid layer can tell: the model keeps one number a token in its attention half.
            types[0] = "hybrid"
        return types

    # transformers sizes caches and masks by the following.
    @property
    def layer_types(self) -> list[str]:
        """Cache layer of each slot, with the config's n_loops."""
        return self.slot_types(self.n_loops)

    @property
    def num_hidden_layers(self) -> int:
        """Block applications in a forward pass, which is the number of cache slots."""
        return self.n_blocks * self.n_loops

    @property
    def sliding_window(self) -> int | None:
        """Window of the sliding-window mixer."""
        return self.mixers["window"]["window"] if self.mixers and "window" in self.mixers else None

    @property
    def num_attention_heads(self) -> int:
        """Query heads of softmax attention; heads of the first mixer where there is none."""
        return self.attention["n_heads"]

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""
        return self.attention.get("n_kv_heads") or self.attention["n_heads"]

    @property
    def head_dim(self) -> int:
        """Head size."""
        return self.attention.get("d_head") or self.hidden_size // self.attention["n_heads"]

    @property
    def attention(self) -> dict[str, Any]:
        """Settings of the first softmax mixer, else of the first mixer."""
        mixers = self.mixers or {"full": {"n_heads": 1}}
        softmax = [name for name in mixers if LAYER_TYPES[name] != "linear_attention"]
        return mixers[(softmax or list(mixers))[0]]
