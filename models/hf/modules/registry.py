"""Mixer name -> module. An export ships a registry of the mixers it has (models/hf/shipping.py)."""

from torch import nn

from loopline.models.hf.modules.deltanet import LooplineDeltaNet
from loopline.models.hf.modules.dsa import LooplineSparseAttention
from loopline.models.hf.modules.full import LooplineAttention
from loopline.models.hf.modules.gdn import LooplineGatedDeltaNet
from loopline.models.hf.modules.gla import LooplineGatedLinearAttention
from loopline.models.hf.modules.hgrn2 import LooplineHGRN2
from loopline.models.hf.modules.kda import LooplineKimiDelta
from loopline.models.hf.modules.mamba2 import LooplineMamba2
from loopline.models.hf.modules.nsa import LooplineNativeSparseAttention
from loopline.models.hf.modules.retnet import LooplineRetention
from loopline.models.hf.modules.window import LooplineWindowAttention

MIXERS: dict[str, type[nn.Module]] = {
    "full": LooplineAttention,
    "window": LooplineWindowAttention,
    "gdn": LooplineGatedDeltaNet,
    "kda": LooplineKimiDelta,
    "deltanet": LooplineDeltaNet,
    "mamba2": LooplineMamba2,
    "gla": LooplineGatedLinearAttention,
    "hgrn2": LooplineHGRN2,
    "retnet": LooplineRetention,
    "nsa": LooplineNativeSparseAttention,
    "dsa": LooplineSparseAttention,
}
