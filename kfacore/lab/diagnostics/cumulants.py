r"""The error of the Kronecker approximation as cumulants (paper, section 3.1, equations 3 and 4).

An entry of F is E[a1 a2 g1 g2], the same entry of F-tilde is E[a1 a2] E[g1 g2], with a1, a2 two layer inputs (or the
homogeneous 1) and g1, g2 two output gradients. Because E[g | x] = 0 under the model's own distribution, every mixed
cumulant with a single g vanishes, and the difference is

    kappa(a1,a2,g1,g2) + kappa(a1) kappa(a2,g1,g2) + kappa(a2) kappa(a1,g1,g2)                                     (3)

which is bounded by the sum of the three absolute values (4). Here all cumulants come from their definition, the sum
over all partitions with the mixed terms kept, so that (3) can fail: it does for the empirical Fisher, where E[g | x]
is not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfacore.roles.samples import LayerSamples

__all__ = ["CumulantReport", "cumulant_report"]


@dataclass(frozen=True)
class CumulantReport:
    """Sums over all entries of F, diagonal and off-diagonal blocks alike.

    Attributes:
        error: Sum of |F - F-tilde|.
        identity: Sum of |expression (3)|; equals `error` if the identity holds.
        mismatch: Sum of |(F - F-tilde) - expression (3)|, divided by `error`.
        bound: Sum of the three absolute values (4).
        fourth: Share of the bound that comes from the fourth-order cumulants.
    """

    error: float
    identity: float
    mismatch: float
    bound: float
    fourth: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return dict(vars(self))


def cumulant_report(samples: Sequence[LayerSamples], *, centred: bool = True) -> CumulantReport:
    """Compare F - F-tilde with its expression in cumulants, entry by entry, and sum.

    Args:
        samples: What the layers of interest saw; passes are weighted vectors whose sum of squares is the expectation.
        centred: The gradients have mean zero given the inputs (the model's own distribution). A square root of the
            Fisher metric holds its second moment only; the first one is zero by Lemma 4 of the paper. False takes the
            first moment from the samples themselves (a single pass: training targets or drawn ones).

    Raises:
        ValueError: ``centred`` is False and there is more than one pass, whose weights a mean does not know.
    """
    if not centred and samples[0].gradients.shape[0] != 1:
        raise ValueError("the mean of g is only defined for a single pass")
    sums = torch.zeros(5, dtype=torch.float64)
    for first in samples:
        for second in samples:
            sums += _pair(first, second, centred=centred)
    error, identity, mismatch, bound, fourth = sums.tolist()
    return CumulantReport(error, identity, mismatch / error if error > 0 else 0.0, bound, fourth / max(bound, 1e-300))


def _pair(first: LayerSamples, second: LayerSamples, *, centred: bool) -> Tensor:
    """The five sums over one pair of layers. Indices: p, q inputs; u, v gradients."""
    n = first.cases
    a, b = first.inputs, second.inputs  # (n, p), (n, q)
    ab = torch.einsum("np,nq->npq", a, b).flatten(1)
    gh = torch.einsum("knu,knv->nuv", first.gradients, second.gradients).flatten(1)  # E[g1 g2 | case]
    shape = a.shape[1], b.shape[1], first.gradients.shape[2], second.gradients.shape[2]

    def over(x: Tensor, y: Tensor) -> Tensor:
        return x.T @ y / n

    E_abgh = over(ab, gh).view(shape)
    E_ab, E_gh = ab.mean(0).view(shape[:2]), gh.mean(0).view(shape[2:])
    mu_a, mu_b = a.mean(0), b.mean(0)
    E_agh, E_bgh = over(a, gh).view(shape[0], *shape[2:]), over(b, gh).view(shape[1], *shape[2:])
    if centred:
        g, h = a.new_zeros(n, shape[2]), a.new_zeros(n, shape[3])
    else:
        g, h = first.gradients[0], second.gradients[0]
    mu_g, mu_h = g.mean(0), h.mean(0)
    E_ag, E_ah, E_bg, E_bh = over(a, g), over(a, h), over(b, g), over(b, h)
    E_abg, E_abh = over(ab, g).view(*shape[:2], shape[2]), over(ab, h).view(*shape[:2], shape[3])

    # Cumulants of order three: E[xyz] - E[x]E[yz] - E[y]E[xz] - E[z]E[xy] + 2 E[x]E[y]E[z].
    def third(xgh: Tensor, mu_x: Tensor, xg: Tensor, xh: Tensor) -> Tensor:
        return (
            xgh
            - torch.einsum("x,uv->xuv", mu_x, E_gh)
            - torch.einsum("u,xv->xuv", mu_g, xh)
            - torch.einsum("v,xu->xuv", mu_h, xg)
            + 2.0 * torch.einsum("x,u,v->xuv", mu_x, mu_g, mu_h)
        )

    k_agh, k_bgh = third(E_agh, mu_a, E_ag, E_ah), third(E_bgh, mu_b, E_bg, E_bh)
    fourth = (
        E_abgh
        # one and three
        - torch.einsum("p,quv->pquv", mu_a, E_bgh)
        - torch.einsum("q,puv->pquv", mu_b, E_agh)
        - torch.einsum("u,pqv->pquv", mu_g, E_abh)
        - torch.einsum("v,pqu->pquv", mu_h, E_abg)
        # two and two
        - torch.einsum("pq,uv->pquv", E_ab, E_gh)
        - torch.einsum("pu,qv->pquv", E_ag, E_bh)
        - torch.einsum("pv,qu->pquv", E_ah, E_bg)
        # two, one and one
        + 2.0 * torch.einsum("p,q,uv->pquv", mu_a, mu_b, E_gh)
        + 2.0 * torch.einsum("p,u,qv->pquv", mu_a, mu_g, E_bh)
        + 2.0 * torch.einsum("p,v,qu->pquv", mu_a, mu_h, E_bg)
        + 2.0 * torch.einsum("q,u,pv->pquv", mu_b, mu_g, E_ah)
        + 2.0 * torch.einsum("q,v,pu->pquv", mu_b, mu_h, E_ag)
        + 2.0 * torch.einsum("u,v,pq->pquv", mu_g, mu_h, E_ab)
        - 6.0 * torch.einsum("p,q,u,v->pquv", mu_a, mu_b, mu_g, mu_h)
    )
    left = torch.einsum("p,quv->pquv", mu_a, k_bgh)
    right = torch.einsum("q,puv->pquv", mu_b, k_agh)
    error = E_abgh - torch.einsum("pq,uv->pquv", E_ab, E_gh)
    identity = fourth + left + right
    bound = fourth.abs() + left.abs() + right.abs()
    return torch.stack([x.abs().sum() for x in (error, identity, error - identity, bound, fourth)]).cpu()
