"""Mixer name -> module. Every name in models.config.MIXERS has a row here; a test checks it."""

from loopline.models.config import ModelConfig
from loopline.models.mixers.deltanet import DeltaNet
from loopline.models.mixers.dsa import SparseAttention
from loopline.models.mixers.full import FullAttention
from loopline.models.mixers.gdn import GatedDelta
from loopline.models.mixers.gla import GatedLinear
from loopline.models.mixers.hgrn2 import HGRN2
from loopline.models.mixers.kda import KimiDelta
from loopline.models.mixers.mamba2 import Mamba2
from loopline.models.mixers.mixer import Mixer
from loopline.models.mixers.nsa import NativeSparseAttention
from loopline.models.mixers.retnet import Retention
from loopline.models.mixers.window import WindowAttention

MIXER_MODULES: dict[str, type[Mixer]] = {
    module.name: module
    for module in (
        FullAttention,
        WindowAttention,
        GatedDelta,
        KimiDelta,
        DeltaNet,
        Mamba2,
        GatedLinear,
        HGRN2,
        Retention,
        NativeSparseAttention,
        SparseAttention,
    )
}


def build_mixer(name: str, config: ModelConfig) -> Mixer:
    """The mixer module of a block; parameters are left unfilled."""
    return MIXER_MODULES[name](config)
