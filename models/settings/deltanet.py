"""Settings of DeltaNet."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.gdn import GatedDeltaConfig


class DeltaNetConfig(GatedDeltaConfig):
    """DeltaNet: Gated DeltaNet's settings, without decay and without output gate. Published: both head sizes are
    d_model / n_heads."""

    name: ClassVar[str] = "deltanet"

    backend: Literal["auto", "fla", "reference"] = Field("auto", description="kernel")  # type: ignore[assignment]

    def parameters(self, d_model: int) -> int:
        """q, k, v, o and beta projections; convolutions; the output's norm."""
        return self._matrices(d_model) + self.conv_size * (2 * self.d_keys + self.d_values) + self.d_head_v

    def flops(self, d_model: int, n_tokens: int) -> float:
        """As Gated DeltaNet without the decay: 6 K V a head."""
        return super().flops(d_model, n_tokens) - self.n_heads * self.d_head_k * self.d_head_v

    def _matrices(self, d_model: int) -> int:
        return d_model * (2 * self.d_keys + 2 * self.d_values + self.n_heads)
