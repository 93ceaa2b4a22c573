"""Settings of multi-scale retention."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.section import MixerSection


class RetentionConfig(MixerSection):
    """Multi-scale retention (RetNet). Published: d_head_k = d_model / n_heads, d_head_v = 2 * d_head_k."""

    name: ClassVar[str] = "retnet"

    n_heads: int = Field(4, ge=1, description="heads")
    d_head_k: int = Field(16, ge=2, description="key size of a head")
    d_head_v: int = Field(32, ge=1, description="value size of a head")
    rope_theta: float = Field(10000.0, gt=0, description="rotary base")
    backend: Literal["auto", "reference", "fla"] = Field("auto", description="kernel")

    @property
    def d_keys(self) -> int:
        """Width of q and of k over all heads."""
        return self.n_heads * self.d_head_k

    @property
    def d_values(self) -> int:
        """Width of v over all heads."""
        return self.n_heads * self.d_head_v

    def problems(self, d_model: int) -> list[str]:
        """An odd head size."""
        if self.d_head_k % 2:
            return [f"{self.field('d_head_k')} ({self.d_head_k}) must be even: rotary positions turn pairs; change it"]
        return []

    def head_counts(self) -> dict[str, int]:
        """Heads."""
        return {"n_heads": self.n_heads}

    def parameters(self, d_model: int) -> int:
        """q, k, v, gate, o; the output's norm. The decays are constants."""
        return d_model * (2 * self.d_keys + 3 * self.d_values) + self.d_head_v

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Matrices, and 5 K V a head: decay, write, read."""
        recurrence = 5 * self.n_heads * self.d_head_k * self.d_head_v
        return 2 * d_model * (2 * self.d_keys + 3 * self.d_values) + recurrence

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """A matrix a head."""
        return self.n_heads * self.d_head_k * self.d_head_v, 0
