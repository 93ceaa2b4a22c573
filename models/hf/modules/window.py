"""Sliding-window attention."""

from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, settings_of
from loopline.models.hf.modules.full import LooplineAttention


class LooplineWindowAttention(LooplineAttention):
    """Attention to the last `window` keys, the query's own included."""

    name = "window"
    layer_type = "sliding_attention"

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__(config)
        self.window = settings_of(config, self.name).window

    def options(self, call: Call) -> dict[str, object]:
        """Flash attention takes the window itself; the others have it in their mask."""
        return {**call.options, "sliding_window": self.window}
