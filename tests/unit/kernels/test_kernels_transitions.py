"""What R passes of a delta rule can do to a state: rank R beyond the gates, which is what looping the mixer buys.

Each matrix is the op itself run on an identity state with v = 0, not a formula. With diagonal gates the product differs
from the identity in full rank whatever R is, so it is compared with the product of the gates alone.
"""

import pytest
import torch
from recurrence_cases import Op
from torch import Tensor
from torch.nn import functional as F

from loopline.kernels.delta_rule import reference as delta_rule
from loopline.kernels.gated_delta import reference as gated_delta
from loopline.kernels.kda import reference as kda

D = 16
EYE = torch.eye(D, dtype=torch.float64)
RANKS = [1, 2, 4, 8]
FORMS = ["recurrent", "chunked"]


def _transition(op: Op, k: Tensor, beta: Tensor, **gates: Tensor) -> Tensor:
    """The [D, D] matrix that len(k) tokens apply to the state; k [R, D], beta [R], fp64."""
    k = k[None, :, None]
    _, state = op(
        k,
        k,
        torch.zeros_like(k),
        beta=beta[None, :, None],
        scale=1.0,
        cu_seqlens=[0, k.shape[1]],
        initial_state=EYE[None, None],
        **gates,
    )
    return state[0, 0]


def _generic(n_passes: int) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(n_passes)
    k = F.normalize(torch.randn(n_passes, D, generator=generator, dtype=torch.float64), dim=-1)
    beta = 0.2 + 1.7 * torch.rand(n_passes, generator=generator, dtype=torch.float64)  # in (0, 2), not at its ends
    return k, beta, generator


def _rank(matrix: Tensor) -> int:
    # Rounding leaves 1e-15; the smallest singular value of a generic case is above 1e-4.
    return int(torch.linalg.matrix_rank(matrix, atol=1e-10, rtol=0.0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_passes", RANKS)
def test_generic_delta_transitions_reach_rank_r(n_passes: int, form: str) -> None:
    k, beta, _ = _generic(n_passes)
    assert _rank(_transition(getattr(delta_rule, form), k, beta) - EYE) == n_passes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_passes", RANKS)
def test_scalar_gates_reach_rank_r_beyond_their_product(n_passes: int, form: str) -> None:
    k, beta, generator = _generic(n_passes)
    g = -torch.rand(n_passes, generator=generator, dtype=torch.float64)
    matrix = _transition(getattr(gated_delta, form), k, beta, g=g[None, :, None])
    assert _rank(matrix - g.sum().exp() * EYE) == n_passes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_passes", RANKS)
def test_diagonal_gates_reach_rank_r_beyond_their_product_only(n_passes: int, form: str) -> None:
    k, beta, generator = _generic(n_passes)
    g = -torch.rand(n_passes, D, generator=generator, dtype=torch.float64)
    matrix = _transition(getattr(kda, form), k, beta, g=g[None, :, None])
    assert _rank(matrix - torch.diag(g.sum(0).exp())) == n_passes
    assert _rank(matrix - EYE) == D


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_passes", RANKS)
def test_identical_keys_stay_at_rank_one(n_passes: int, form: str) -> None:
    k, beta, generator = _generic(n_passes)
    k = k[:1].expand(n_passes, D)
    g = -torch.rand(n_passes, generator=generator, dtype=torch.float64)
    assert _rank(_transition(getattr(delta_rule, form), k, beta) - EYE) == 1
    gated = _transition(getattr(gated_delta, form), k, beta, g=g[None, :, None])
    assert _rank(gated - g.sum().exp() * EYE) == 1
    # Equal gates on all channels commute with the keys; different ones turn each pass's key into another direction.
    even = _transition(getattr(kda, form), k, beta, g=g[None, :, None, None].expand(1, n_passes, 1, D))
    assert _rank(even - g.sum().exp() * EYE) == 1


@pytest.mark.parametrize("n_passes", RANKS)
def test_beta_2_reflects_and_beta_below_1_never_does(n_passes: int) -> None:
    k, beta, _ = _generic(n_passes)
    reflected = _transition(delta_rule.recurrent, k, torch.full_like(beta, 2.0))
    torch.testing.assert_close(reflected @ reflected.T, EYE)
    assert torch.linalg.det(reflected).item() == pytest.approx((-1.0) ** n_passes)
    kept = _transition(delta_rule.recurrent, k, beta / 2)
    assert torch.linalg.det(kept).item() == pytest.approx((1 - beta / 2).prod().item())
