"""Settings of gated linear attention."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.section import MixerSection


class GatedLinearConfig(MixerSection):
    """Gated linear attention. Published: d_head_k = 0.5 * d_model / n_heads, d_head_v = d_model / n_heads."""

    name: ClassVar[str] = "gla"

    n_heads: int = Field(4, ge=1, description="heads")
    d_head_k: int = Field(8, ge=1, description="key size of a head")
    d_head_v: int = Field(16, ge=1, description="value size of a head")
    gate_rank: int = Field(16, ge=1, description="inner width of the decay's low-rank projection")
    gate_normalizer: float = Field(16.0, gt=0, description="log decays are logsigmoid(.) over this")
    backend: Literal["auto", "reference", "fla"] = Field("auto", description="kernel")

    @property
    def d_keys(self) -> int:
        """Width of q and of k over all heads."""
        return self.n_heads * self.d_head_k

    @property
    def d_values(self) -> int:
        """Width of v over all heads."""
        return self.n_heads * self.d_head_v

    def head_counts(self) -> dict[str, int]:
        """Heads."""
        return {"n_heads": self.n_heads}

    def parameters(self, d_model: int) -> int:
        """q, k, v, gate, o; the decay's two matrices and bias; the output's norm."""
        return self._matrices(d_model) + self.d_keys + self.d_head_v

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Matrices, and 5 K V a head: decay, write, read."""
        return 2 * self._matrices(d_model) + 5 * self.n_heads * self.d_head_k * self.d_head_v

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """A matrix a head."""
        return self.n_heads * self.d_head_k * self.d_head_v, 0

    def _matrices(self, d_model: int) -> int:
        projections = d_model * (2 * self.d_keys + 3 * self.d_values)
        return projections + self.gate_rank * (d_model + self.d_keys)
