"""HGRN2: a gated linear RNN whose keys are what its forget gate lets go."""

from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.gla.op import BACKENDS, gla
from loopline.kernels.precision import wide
from loopline.models.config import ModelConfig
from loopline.models.context import BlockContext
from loopline.models.layers import GroupRMSNorm, Linear
from loopline.models.mixers.mixer import Mixer


class HGRN2(Mixer):
    """Per head, S_t = Diag(f_t) S_{t-1} + (1 - f_t) v_t^T and o_t = S_t^T q_t / sqrt(K), with f = sigmoid(W_f x), q =
    silu(W_q x) and v = W_i x. The output is RMSNorm(o) over all heads together, projected back. State starts from zero
    in every document and loop.

    The paper has no factor 1/sqrt(K); fla's layer, which LT2 calls, takes it from its kernel, and the norm after it
    leaves it without effect but for eps. The paper also bounds f from below, more in deeper layers; LT2 gives fla's
    layer no bound, and in a loop a block has no one depth, so there is none here.
    Reference: Qin et al., HGRN2, arXiv:2404.07904.
    """

    name = "hgrn2"
    op = "gla"
    backends = BACKENDS

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, hgrn2 = config.d_model, config.hgrn2
        self.d_head_k, self.d_head_v = hgrn2.d_head_k, hgrn2.d_head_v
        self.backend = hgrn2.backend
        self.q_proj = Linear(d, hgrn2.d_keys)
        self.f_proj = Linear(d, hgrn2.d_keys)
        self.i_proj = Linear(d, hgrn2.d_values)
        self.o_norm = GroupRMSNorm(hgrn2.d_values, config.norm_eps)
        self.o_proj = Linear(hgrn2.d_values, d)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """[1, T, C] -> [1, T, C]. Head counts follow from the projections' widths."""
        q = F.silu(self.q_proj(x)).unflatten(-1, (-1, self.d_head_k))  # [1, T, H, K]
        f = wide(self.f_proj(x)).unflatten(-1, (-1, self.d_head_k))
        o, _ = gla(
            q,
            (-f).sigmoid().to(q.dtype),  # 1 - sigmoid(f), which subtraction would round to 0 at f = 17
            self.i_proj(x).unflatten(-1, (-1, self.d_head_v)),  # [1, T, H, V]
            g=F.logsigmoid(f),
            scale=self.d_head_k**-0.5,
            cu_seqlens=context.packing.boundaries,
            backend=self.chosen_backend(x.device),
        )
        return self.o_proj(self.o_norm(o.flatten(2)))
