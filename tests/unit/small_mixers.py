"""Tiny settings of every mixer, no size a power of two, for tests of models and of their exports."""

from loopline.models.settings.deltanet import DeltaNetConfig
from loopline.models.settings.dsa import SparseAttentionConfig
from loopline.models.settings.full import FullAttentionConfig
from loopline.models.settings.gdn import GatedDeltaConfig
from loopline.models.settings.gla import GatedLinearConfig
from loopline.models.settings.hgrn2 import HGRN2Config
from loopline.models.settings.kda import KimiDeltaConfig
from loopline.models.settings.mamba2 import Mamba2Config
from loopline.models.settings.nsa import NativeSparseConfig
from loopline.models.settings.retnet import RetentionConfig
from loopline.models.settings.section import MixerSection
from loopline.models.settings.window import WindowAttentionConfig

SMALL: dict[str, MixerSection] = {
    "full": FullAttentionConfig(n_heads=4, n_kv_heads=2, d_head=6, output_gate=True),
    "window": WindowAttentionConfig(n_heads=4, n_kv_heads=2, d_head=6, window=5, output_gate=True),
    "gdn": GatedDeltaConfig(n_heads=4, d_head_k=6, d_head_v=10),
    "kda": KimiDeltaConfig(n_heads=4, d_head_k=6, d_head_v=10, gate_rank=5),
    "deltanet": DeltaNetConfig(n_heads=4, d_head_k=6, d_head_v=10, conv_size=3, allow_negative_eigenvalues=True),
    "mamba2": Mamba2Config(n_heads=4, d_head=6, d_state=5),
    "gla": GatedLinearConfig(n_heads=4, d_head_k=6, d_head_v=10, gate_rank=5),
    "hgrn2": HGRN2Config(n_heads=4, d_head_k=6, d_head_v=10),
    "retnet": RetentionConfig(n_heads=4, d_head_k=6, d_head_v=10),
    "nsa": NativeSparseConfig(
        n_heads=4, n_kv_heads=2, d_head=6, block_size=3, n_selected=3, window=4, pooling="learned", output_gate=True
    ),
    "dsa": SparseAttentionConfig(
        n_heads=4, n_kv_heads=2, d_head=6, top_k=7, index_n_heads=3, index_d_head=6, index_d_rope=4, output_gate=True
    ),
}
