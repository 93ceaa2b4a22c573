"""Settings of sliding-window attention."""

from typing import ClassVar

from pydantic import Field

from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.section import mean_keys


class WindowAttentionConfig(FullAttentionConfig):
    """Full attention's settings, and how far back a query sees."""

    name: ClassVar[str] = "window"

    window: int = Field(2048, ge=2, description="keys a query sees, itself included")

    def cache_numbers(self, d_model: int) -> tuple[int, int]:
        """Keys and values of the window's tokens but the newest."""
        return 2 * (self.window - 1) * self.kv_heads * self.head_size(d_model), 0

    def _keys(self, n_tokens: int) -> float:
        return mean_keys(n_tokens, self.window)
