"""Settings of Mamba-2."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.section import MixerSection


class Mamba2Config(MixerSection):
    """Mamba-2 (SSD). Published: n_heads * d_head = 2 * d_model; LT2 has d_head = 2 * d_model / n_heads, d_state 64."""

    name: ClassVar[str] = "mamba2"

    n_heads: int = Field(4, ge=1, description="heads")
    d_head: int = Field(32, ge=1, description="channels of a head")
    d_state: int = Field(16, ge=1, description="state size of a channel")
    n_groups: int = Field(1, ge=1, description="groups of heads that share B and C, and a norm")
    conv_size: int = Field(4, ge=1, description="tokens the short convolutions see")
    backend: Literal["auto", "reference", "fla"] = Field("auto", description="kernel")

    @property
    def d_inner(self) -> int:
        """Channels over all heads."""
        return self.n_heads * self.d_head

    @property
    def d_groups(self) -> int:
        """Width of B and of C over all groups."""
        return self.n_groups * self.d_state

    def problems(self, d_model: int) -> list[str]:
        """Heads that do not fill their groups."""
        if self.n_heads % self.n_groups:
            return [
                f"{self.field('n_heads')} ({self.n_heads}) must be a multiple of {self.field('n_groups')} "
                f"({self.n_groups}): change one of them"
            ]
        return []

    def head_counts(self) -> dict[str, int]:
        """Heads; and groups, unless one group serves every head."""
        return {"n_heads": self.n_heads} | ({"n_groups": self.n_groups} if self.n_groups > 1 else {})

    def parameters(self, d_model: int) -> int:
        """z, x, B, C, dt and output projections; convolutions with bias; A_log, dt_bias, D; the output's norm."""
        convolutions = (self.conv_size + 1) * (self.d_inner + 2 * self.d_groups)
        return self._matrices(d_model) + convolutions + 3 * self.n_heads + self.d_inner

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Matrices, convolutions, 5 N P a head for decay, write and read, and the skip."""
        convolutions = 2 * self.conv_size * (self.d_inner + 2 * self.d_groups)
        return 2 * self._matrices(d_model) + convolutions + 5 * self.d_inner * self.d_state + 2 * self.d_inner

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """A matrix a head, and the convolutions' last inputs."""
        return self.d_inner * self.d_state + self.conv_size * (self.d_inner + 2 * self.d_groups), 0

    def _matrices(self, d_model: int) -> int:
        return d_model * (3 * self.d_inner + 2 * self.d_groups + self.n_heads)
