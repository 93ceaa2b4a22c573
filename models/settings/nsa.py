"""Settings of native sparse attention."""

from typing import ClassVar, Literal

from pydantic import Field

from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.section import mean_keys


class NativeSparseConfig(FullAttentionConfig):
    """Native sparse attention: compressed blocks, selected blocks and a window, mixed by learned gates."""

    name: ClassVar[str] = "nsa"

    block_size: int = Field(64, ge=1, description="tokens of a compressed or selected block")
    n_selected: int = Field(
        16, ge=3, description="blocks a query attends to in full; three are always the first and the last two"
    )
    window: int = Field(512, ge=1, description="keys of the window branch, the query's own included")
    pooling: Literal["mean", "learned"] = Field("mean", description="how a block is compressed")
    backend: Literal["auto", "reference"] = Field("auto", description="kernel")  # type: ignore[assignment]

    def parameters(self, d_model: int) -> int:
        """Full attention's, three gates a head, and weights of the pooling where it is learned."""
        pooling = 2 * self.kv_heads * self.head_size(d_model) * self.block_size if self.pooling == "learned" else 0
        return super().parameters(d_model) + 3 * d_model * self.n_heads + pooling

    def flops(self, d_model: int, n_tokens: int) -> float:
        """Matrices; pooling, 2 a key and value number; and 4 H D a key of each branch."""
        kv_numbers = 2 * self.kv_heads * self.head_size(d_model)
        matrices = super().parameters(d_model) + 3 * d_model * self.n_heads
        return 2 * matrices + 2 * kv_numbers + 4 * self.n_heads * self.head_size(d_model) * self._keys(n_tokens)

    def _keys(self, n_tokens: int) -> float:
        compressed = mean_keys(n_tokens, n_tokens) / self.block_size
        selected = mean_keys(n_tokens, self.n_selected * self.block_size)
        return compressed + selected + mean_keys(n_tokens, self.window)
