"""HGRN2."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from loopline.kernels.gla.op import BACKENDS, gla
from loopline.kernels.precision import wide
from loopline.models.hf.configuration_loopline import LooplineConfig
from loopline.models.hf.modules.call import Call, LinearMixer, LooplineRMSNorm, settings_of


class LooplineHGRN2(LinearMixer):
    """A state per head that forgets by f = sigmoid(W_f x) and is written with keys 1 - f; the output is RMSNorm over
    all heads together, projected back.

    Reference: Qin et al., HGRN2, arXiv:2404.07904.
    """

    name = "hgrn2"
    op_name = "gla"
    backends = BACKENDS

    def __init__(self, config: LooplineConfig) -> None:
        super().__init__()
        d, settings = config.hidden_size, settings_of(config, self.name)
        self.d_head_k, self.d_head_v = settings.d_head_k, settings.d_head_v
        self.backend = settings.backend
        d_keys, d_values = settings.n_heads * self.d_head_k, settings.n_heads * self.d_head_v
        self.q_proj = nn.Linear(d, d_keys, bias=False)
        self.f_proj = nn.Linear(d, d_keys, bias=False)
        self.i_proj = nn.Linear(d, d_values, bias=False)
        self.o_norm = LooplineRMSNorm(d_values, config.rms_norm_eps)
        self.o_proj = nn.Linear(d_values, d, bias=False)

    def init_parameters(self) -> None:
        """Matrices and the norm only, which transformers fills."""

    def forward(self, x: Tensor, slot: int, call: Call, cache: Cache | None) -> tuple[Tensor, None]:
        """[B, T, C] -> [B, T, C]."""
        x = self.without_padding(x, call)
        q = F.silu(self.q_proj(x)).unflatten(-1, (-1, self.d_head_k))  # [B, T, H, K]
        f = wide(self.f_proj(x)).unflatten(-1, (-1, self.d_head_k))
        o = self.recur(
            gla,
            slot,
            call,
            cache,
            q=q,
            k=(-f).sigmoid().to(q.dtype),  # 1 - sigmoid(f), which subtraction would round to 0 at f = 17
            v=self.i_proj(x).unflatten(-1, (-1, self.d_head_v)),  # [B, T, H, V]
            g=F.logsigmoid(f),
            scale=self.d_head_k**-0.5,
        )
        return self.o_proj(self.o_norm(o.flatten(2))), None
