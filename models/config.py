"""What a model is, as strict frozen data. Torch-free: a login node reads it.

A mixer's settings stand here beside the others; its maths stands in mixers/. Derived sizes are properties.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from loopline.models.loop_plan import LoopPlan


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class FullAttentionConfig(Section):
    """Softmax attention with rotary positions and grouped queries."""

    n_heads: int = Field(4, ge=1, description="query heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads; none means n_heads")
    d_head: int | None = Field(None, ge=2, description="head size; none means d_model / n_heads")
    rope_theta: float = Field(10000.0, gt=0, description="rotary base")
    output_gate: bool = Field(False, description="multiply each head's output by sigmoid(W x), W zero at start")


class GatedDeltaConfig(Section):
    """Gated DeltaNet. The published sizes are d_head_k = 0.75 * d_model / n_heads and d_head_v = 2 * d_head_k."""

    n_heads: int = Field(4, ge=1, description="heads")
    d_head_k: int = Field(32, ge=1, description="key size of a head")
    d_head_v: int = Field(64, ge=1, description="value size of a head")
    conv_size: int = Field(4, ge=1, description="tokens the short convolutions see")
    allow_negative_eigenvalues: bool = Field(False, description="beta in (0, 2) instead of (0, 1)")
    backend: Literal["auto", "reference", "fla"] = Field("auto", description="kernel")


MixerConfig = FullAttentionConfig | GatedDeltaConfig
MIXERS = ("full", "gdn")  # the names a pattern may use; each has a field in ModelConfig


class ModelConfig(Section):
    """A looped language model: `n_blocks` stored blocks, applied `n_loops` times."""

    vocab_size: int = Field(4096, ge=2, description="rows of the embedding")
    d_model: int = Field(64, ge=2, description="width of the residual stream")
    n_blocks: int = Field(2, ge=1, description="stored blocks")
    n_loops: int = Field(2, ge=1, description="times the stack is applied")
    pattern: str = Field("full", description="mixers of the blocks, repeated to n_blocks: 'gdn*4,full'")
    d_ffn: int = Field(176, ge=1, description="inner width of the SwiGLU")
    norm: Literal["pre", "sandwich"] = Field("pre", description="norm before each branch, or before and after")
    norm_eps: float = Field(1e-6, gt=0)
    update: Literal["replace", "norm", "gate"] = Field(
        "gate",
        description="between loops: h <- M(h); h <- final_norm(M(h)) (Ouro); h <- M(h) + rho_r * h (LT2)",
    )
    tie_embeddings: bool = Field(False, description="the head uses the embedding's weights")
    full: FullAttentionConfig = FullAttentionConfig()
    gdn: GatedDeltaConfig = GatedDeltaConfig()

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        parse_pattern(self.pattern, self.n_blocks)
        if "full" in self.mixer_names:
            if self.full.d_head is None and self.d_model % self.full.n_heads:
                raise ValueError(
                    f"model.d_model ({self.d_model}) must be a multiple of model.full.n_heads ({self.full.n_heads}), "
                    "or set model.full.d_head"
                )
            if self.d_head % 2:
                raise ValueError(f"model.full.d_head ({self.d_head}) must be even: rotary positions turn pairs")
            if self.full.n_heads % self.n_kv_heads:
                raise ValueError(
                    f"model.full.n_heads ({self.full.n_heads}) must be a multiple of model.full.n_kv_heads "
                    f"({self.n_kv_heads})"
                )
        return self

    @property
    def mixer_names(self) -> list[str]:
        """Mixer of each stored block."""
        return parse_pattern(self.pattern, self.n_blocks)

    @property
    def plan(self) -> LoopPlan:
        """Order in which blocks run."""
        return LoopPlan(self.n_blocks, self.n_loops)

    @property
    def d_head(self) -> int:
        """Head size of full attention."""
        return self.full.d_head or self.d_model // self.full.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads of full attention."""
        return self.full.n_kv_heads or self.full.n_heads


def parse_pattern(pattern: str, n_blocks: int) -> list[str]:
    """'gdn*4,full' -> the mixer of each of `n_blocks` blocks, the pattern repeated and cut.

    Raises:
        ValueError: an unknown mixer or a bad count.
    """
    names: list[str] = []
    for item in pattern.split(","):
        name, _, count = item.strip().partition("*")
        if name not in MIXERS:
            raise ValueError(f"model.pattern {pattern!r}: unknown mixer {name!r}; known: {', '.join(MIXERS)}")
        if count and not (count.isascii() and count.isdigit() and int(count) >= 1):
            raise ValueError(f"model.pattern {pattern!r}: count {count!r} must be a whole number >= 1")
        names += [name] * int(count or 1)
    return [names[i % len(names)] for i in range(n_blocks)]
