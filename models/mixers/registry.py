"""Mixer name -> module. Every name in models.config.MIXERS has a row here; a test checks it."""

from torch import nn

from loopline.models.config import ModelConfig
from loopline.models.mixers.full import FullAttention
from loopline.models.mixers.gdn import GatedDelta

MIXER_MODULES: dict[str, type[nn.Module]] = {"full": FullAttention, "gdn": GatedDelta}


def build_mixer(name: str, config: ModelConfig) -> nn.Module:
    """The mixer module of a block; parameters are left unfilled."""
    return MIXER_MODULES[name](config)
