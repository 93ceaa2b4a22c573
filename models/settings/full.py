"""Settings of full attention."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.section import FLA_MAX_HEAD, TRITON_MAX_HEAD, MixerSection, mean_keys


class FullAttentionConfig(MixerSection):
    """Softmax attention with rotary positions and grouped queries."""

    name: ClassVar[str] = "full"

    n_heads: int = Field(4, ge=1, description="query heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads; none means n_heads")
    d_head: int | None = Field(None, ge=2, description="head size; none means d_model / n_heads")
    rope_theta: float = Field(10000.0, gt=0, description="rotary base")
    output_gate: bool = Field(False, description="multiply each head's output by sigmoid(W x), W zero at start")
    backend: Literal["auto", "sdpa", "fla", "triton", "flex", "reference"] = Field("auto", description="kernel")

    def head_size(self, d_model: int) -> int:
        """D."""
        return self.d_head or d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.n_kv_heads or self.n_heads

    def problems(self, d_model: int) -> list[str]:
        """Sizes that do not divide, and heads that the backend asked for has no kernel for."""
        found = []
        if self.d_head is None and d_model % self.n_heads:
            found.append(
                f"model.d_model ({d_model}) must be a multiple of {self.field('n_heads')} ({self.n_heads}), "
                f"or set {self.field('d_head')}"
            )
        elif self.head_size(d_model) % 2:
            found.append(
                f"{self.field('d_head')} ({self.head_size(d_model)}) must be even: rotary positions turn pairs; "
                "change it or n_heads"
            )
        if self.n_heads % self.kv_heads:
            found.append(
                f"{self.field('n_heads')} ({self.n_heads}) must be a multiple of {self.field('n_kv_heads')} "
                f"({self.kv_heads}): change one of them"
            )
        if self.head_size(d_model) > FLA_MAX_HEAD and self.backend == "fla":
            found.append(
                f"{self.field('d_head')} ({self.head_size(d_model)}) must be at most {FLA_MAX_HEAD} with "
                f"{self.field('backend')} = 'fla', which has no kernel for more: lower it, or set the backend to 'sdpa'"
            )
        if self.backend == "triton" and (self.head_size(d_model) % 16 or self.head_size(d_model) > TRITON_MAX_HEAD):
            found.append(
                f"{self.field('d_head')} ({self.head_size(d_model)}) must be a multiple of 16 up to {TRITON_MAX_HEAD} "
                f"with {self.field('backend')} = 'triton': change it, or choose another backend"
            )
        return found

    def head_counts(self) -> dict[str, int]:
        """Query and key/value heads."""
        return {"n_heads": self.n_heads, "n_kv_heads": self.kv_heads}

    def parameters(self, d_model: int) -> int:
        """q, k, v, o and the gate."""
        q, kv = self.n_heads * self.head_size(d_model), self.kv_heads * self.head_size(d_model)
        return d_model * (2 * q + 2 * kv + (q if self.output_gate else 0))

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Matrices, and 4 H D a key for q k^T and p v."""
        return 2 * self.parameters(d_model) + 4 * self.n_heads * self.head_size(d_model) * self._keys(n_tokens)

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """A key and a value a token."""
        return 0, 2 * self.kv_heads * self.head_size(d_model)

    def _keys(self, n_tokens: int) -> float:
        return mean_keys(n_tokens, n_tokens)
