"""Configuration of an exported Loopline model. Needs transformers only; it is shipped, as it is, with every export.

What the fields mean is written in modeling_loopline.py's first lines and in the model card.
"""

from transformers import PreTrainedConfig

LAYER_TYPES = {"full": "full_attention", "gdn": "linear_attention"}


class LooplineConfig(PreTrainedConfig):
    """`n_blocks` stored blocks, applied `n_loops` times.

    Attributes:
        n_blocks, n_loops: stored blocks, and passes over them. `n_loops` is also the number of rows of the loop gate.
        mixer_pattern: mixers of the blocks, repeated to n_blocks: "gdn*4,full".
        norm_placement: "pre" (before each branch) or "sandwich" (before and after).
        loop_update: what the next loop starts from: "replace" h <- M(h), "norm" h <- norm(M(h)), "gate"
            h <- M(h) + rho_r * h.
        num_key_value_heads, head_dim: None means num_attention_heads, and hidden_size / num_attention_heads.
        attn_output_gate: full attention's output is multiplied by sigmoid(W x).
        linear_*: sizes of Gated DeltaNet; linear_allow_neg_eigval doubles beta's range to (0, 2).
        linear_backend: "reference" keeps to torch; anything else uses fla's kernels on CUDA where fla is installed.
        max_position_embeddings: longest sequence seen in training; nothing in the model enforces it.
    """

    model_type = "loopline"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    vocab_size: int = 4096
    hidden_size: int = 64
    intermediate_size: int = 176
    n_blocks: int = 2
    n_loops: int = 2
    mixer_pattern: str = "full"
    norm_placement: str = "pre"
    rms_norm_eps: float = 1e-6
    loop_update: str = "gate"
    tie_word_embeddings: bool = False
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    attn_output_gate: bool = False
    linear_num_heads: int = 4
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = False
    linear_backend: str = "auto"
    initializer_range: float = 0.02
    max_position_embeddings: int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def block_types(self) -> list[str]:
        """Mixer of each stored block, in transformers' words for cache layers."""
        names: list[str] = []
        for item in self.mixer_pattern.split(","):
            name, _, count = item.strip().partition("*")
            names += [LAYER_TYPES[name]] * int(count or 1)
        return [names[i % len(names)] for i in range(self.n_blocks)]

    def slot_types(self, n_loops: int) -> list[str]:
        """Cache layer of each slot. Every (loop, block) has its own keys, values and states, so to a cache the model is
        n_loops * n_blocks layers deep: slot = loop_idx * n_blocks + block_idx."""
        types = self.block_types * n_loops
        if "full_attention" not in types:
            # generate() asks a cache how many tokens it holds, and one of recurrent layers alone raises (transformers
            # 5.23). A hybrid layer can tell: the model keeps one number a token in its attention half.
            types[0] = "hybrid"
        return types

    # transformers sizes caches by the next two.
    @property
    def layer_types(self) -> list[str]:
        """Cache layer of each slot, with the config's n_loops."""
        return self.slot_types(self.n_loops)

    @property
    def num_hidden_layers(self) -> int:
        """Block applications in a forward pass, which is the number of cache slots."""
        return self.n_blocks * self.n_loops
