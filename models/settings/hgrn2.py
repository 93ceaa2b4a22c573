"""Settings of HGRN2."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.section import MixerSection


class HGRN2Config(MixerSection):
    """HGRN2. Published: d_head_k (its expansion ratio) = 128; LT2 has d_model / n_heads for both head sizes."""

    name: ClassVar[str] = "hgrn2"

    n_heads: int = Field(4, ge=1, description="heads")
    d_head_k: int = Field(16, ge=1, description="forget-gate channels of a head")
    d_head_v: int = Field(16, ge=1, description="value size of a head")
    backend: Literal["auto", "reference", "fla"] = Field("auto", description="kernel")

    @property
    def d_keys(self) -> int:
        """Width of q and of the forget gate over all heads."""
        return self.n_heads * self.d_head_k

    @property
    def d_values(self) -> int:
        """Width of the values over all heads."""
        return self.n_heads * self.d_head_v

    def head_counts(self) -> dict[str, int]:
        """Heads."""
        return {"n_heads": self.n_heads}

    def parameters(self, d_model: int) -> int:
        """q, forget gate, value and output projections; the output's norm, over all heads together."""
        return d_model * (2 * self.d_keys + 2 * self.d_values) + self.d_values

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Matrices, and 5 K V a head: decay, write, read."""
        recurrence = 5 * self.n_heads * self.d_head_k * self.d_head_v
        return 2 * d_model * (2 * self.d_keys + 2 * self.d_values) + recurrence

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """A matrix a head."""
        return self.n_heads * self.d_head_k * self.d_head_v, 0
