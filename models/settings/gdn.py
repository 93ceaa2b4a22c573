"""Settings of Gated DeltaNet."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.section import FLA_MAX_HEAD, TRITON_MAX_HEAD, MixerSection


class GatedDeltaConfig(MixerSection):
    """Gated DeltaNet. The published sizes are d_head_k = 0.75 * d_model / n_heads and d_head_v = 2 * d_head_k."""

    name: ClassVar[str] = "gdn"

    n_heads: int = Field(4, ge=1, description="heads")
    d_head_k: int = Field(32, ge=1, description="key size of a head")
    d_head_v: int = Field(64, ge=1, description="value size of a head")
    conv_size: int = Field(4, ge=1, description="tokens the short convolutions see")
    allow_negative_eigenvalues: bool = Field(False, description="beta in (0, 2) instead of (0, 1)")
    backend: Literal["auto", "fla", "triton", "reference"] = Field("auto", description="kernel")

    @property
    def d_keys(self) -> int:
        """Width of q and of k over all heads."""
        return self.n_heads * self.d_head_k

    @property
    def d_values(self) -> int:
        """Width of v over all heads."""
        return self.n_heads * self.d_head_v

    def problems(self, d_model: int) -> list[str]:
        """Heads that the backend asked for has no kernel for, or fla, which "auto" would take on a GPU."""
        if self.backend == "triton":
            sizes = {"d_head_k": self.d_head_k, "d_head_v": self.d_head_v}
            return [
                f"{self.field(name)} ({size}) must be a multiple of 32 up to {TRITON_MAX_HEAD} with "
                f"{self.field('backend')} = 'triton': change it, or set the backend to 'reference'"
                for name, size in sizes.items()
                if size % 32 or size > TRITON_MAX_HEAD
            ]
        if self.d_head_k > FLA_MAX_HEAD and self.backend != "reference":
            return [
                f"{self.field('d_head_k')} ({self.d_head_k}) must be at most {FLA_MAX_HEAD} with "
                f"{self.field('backend')} = {self.backend!r}: fla, which auto takes on a GPU, has no kernel for more; "
                "lower it, or set the backend to 'reference'"
            ]
        return []

    def head_counts(self) -> dict[str, int]:
        """Heads."""
        return {"n_heads": self.n_heads}

    def parameters(self, d_model: int) -> int:
        """q, k, v, gate, output, decay and beta projections; convolutions; A_log and dt_bias; the output's norm."""
        convolutions = self.conv_size * (2 * self.d_keys + self.d_values)
        return self._matrices(d_model) + convolutions + 2 * self.n_heads + self.d_head_v

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Matrices, convolutions, and 7 K V a head: decay, k^T S, rank-one update, q^T S."""
        convolutions = 2 * self.conv_size * (2 * self.d_keys + self.d_values)
        return 2 * self._matrices(d_model) + convolutions + 7 * self.n_heads * self.d_head_k * self.d_head_v

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """A matrix a head, and the convolutions' last inputs."""
        convolutions = self.conv_size * (2 * self.d_keys + self.d_values)
        return self.n_heads * self.d_head_k * self.d_head_v + convolutions, 0

    def _matrices(self, d_model: int) -> int:
        return d_model * (2 * self.d_keys + 3 * self.d_values + 2 * self.n_heads)
