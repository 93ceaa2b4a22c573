"""Settings of Kimi Delta Attention."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.gdn import GatedDeltaConfig


class KimiDeltaConfig(GatedDeltaConfig):
    """Kimi Delta Attention: Gated DeltaNet's settings, with a decay of its own for every key channel, and the decay and
    the output gate made through low-rank projections."""

    name: ClassVar[str] = "kda"

    gate_rank: int | None = Field(None, ge=1, description="inner width of both low-rank projections; none: d_head_v")
    backend: Literal["auto", "fla", "reference"] = Field("auto", description="kernel")  # type: ignore[assignment]

    @property
    def rank(self) -> int:
        """Inner width of the low-rank projections."""
        return self.gate_rank or self.d_head_v

    def parameters(self, d_model: int) -> int:
        """As Gated DeltaNet, with the low-rank projections in _matrices and dt_bias of every key channel."""
        convolutions = self.conv_size * (2 * self.d_keys + self.d_values)
        return self._matrices(d_model) + convolutions + self.n_heads + self.d_keys + self.d_head_v

    def _matrices(self, d_model: int) -> int:
        low_rank = 2 * d_model * self.rank + self.rank * (self.d_keys + self.d_values)
        return d_model * (2 * self.d_keys + 2 * self.d_values + self.n_heads) + low_rank
