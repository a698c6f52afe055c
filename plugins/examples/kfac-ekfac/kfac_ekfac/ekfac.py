r"""EKFAC: the eigenbasis of K-FAC's factors with the second moments that the gradients really have in it.

Source: George, Laurent, Bouthillier, Ballas & Vincent, *Fast Approximate Natural Gradient Descent in a Kronecker
Factored Eigenbasis*, NeurIPS 2018. With A = U_A diag(a) U_A^T and G = U_G diag(g) U_G^T, K-FAC's block is

    A (x) G = (U_A (x) U_G) diag(a (x) g) (U_A (x) U_G)^T.

EKFAC keeps the basis and replaces the eigenvalues g_i a_j by the second moments that each case's gradient has in it,

    S = E[(sum_r (U_G^T g_r) (U_A^T abar_r)^T)^2],  entry by entry, (d_out, d_in), over the rows r of a case,

which is the diagonal matrix that comes nearest to the layer's Fisher block in that basis in the Frobenius norm, and so
never farther from it than K-FAC (their section 3). Three decisions of this implementation:

* **Damping** is the factored one of Martens & Grosse (2015, section 6.3), written in the eigenbasis:

      D_ij = S_ij + pi gamma g_i + (gamma / pi) a_j + gamma^2,

  which is (g_i + gamma / pi) (a_j + pi gamma) where S_ij = g_i a_j: EKFAC with K-FAC's eigenvalues is K-FAC with
  K-FAC's damping. The alternative, S + gamma^2 (their algorithm 1 adds a constant), is exact Tikhonov damping; on a
  small autoencoder it was slower in every trial (see the README), so it is not offered.
* **The first basis** comes with S = g a^T, K-FAC itself: no case has been seen in that basis yet.
* **When the basis changes**, from U to U', the average goes along: S' is the diagonal of the old matrix in the new one,

      S'_ij = sum_kl (U'_G^T U_G)_ik^2 S_kl (U'_A^T U_A)_jl^2,

  which keeps the trace, stays >= 0, and is S itself if the basis did not change. The running average forgets what
  this loses at its usual rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from kfacore.curvature.cases import case_chunks
from kfacore.curvature.kronecker import symmetric
from kfacore.curvature.linalg import EIGENPROBLEM, eigh_psd, log_pi_of, pi_of
from kfacore.curvature.moments import InputFactor, OutputFactor
from kfacore.errors import NumericalError
from kfacore.parallel.cores import share
from kfacore.plugin import PiRule
from kfacore.roles import Approximation, Factorisation, Inverse, Notice
from kfacore.roles.block import Block
from kfacore.roles.moment import Moment, Moments, Tally, blend, divisor_of
from kfacore.roles.samples import Samples
from torch import Tensor

from kfac_ekfac import EkfacConfig

__all__ = ["EigenMoment", "Ekfac", "EkfacInverse", "Spectrum"]

_FIRST_BASES = 3
"""The first averages of A and G still change much, and so do their eigenvectors."""


@dataclass(frozen=True)
class Spectrum:
    """Second moments of one layer in an eigenbasis; once in an inverse, none of the tensors is ever written to.

    Attributes:
        S: Of gradients, E[(sum_r (U_G^T g_r) (U_A^T abar_r)^T)^2], (d_out, d_in).
        a: Of inputs, the diagonal of U_A^T A U_A, (d_in,).
        g: Of output gradients, the diagonal of U_G^T G U_G, (d_out,).
        U_A: Eigenvectors of A in columns, (d_in, d_in).
        U_G: Eigenvectors of G in columns, (d_out, d_out).
    """

    S: Tensor
    a: Tensor
    g: Tensor
    U_A: Tensor
    U_G: Tensor


_NAMES = tuple(field.name for field in fields(Spectrum))


def _flat(spectra: Sequence[Spectrum]) -> list[Tensor]:
    """S of every layer, a of every layer, and so on, as moments list several tensors a layer."""
    return [getattr(spectrum, name) for name in _NAMES for spectrum in spectra]


def _spectra(values: Sequence[Tensor], layers: int) -> list[Spectrum]:
    """The inverse of `_flat`."""
    return [Spectrum(*values[i : len(_NAMES) * layers : layers]) for i in range(layers)]


class EigenMoment(Moment):
    """Running averages in the basis of the inverse in use: ``values`` are a flat `Spectrum` a layer and the basis' age.

    What must survive a checkpoint lies in ``values``, the basis too. The age is the number of mini-batches seen when
    the basis was made. Before the first inverse it is 0, and so are the bases and all averages.
    """

    def shapes(self, layers: Sequence[Block]) -> list[tuple[int, ...]]:
        """The tensors of a `Spectrum` for every layer, and one number."""
        return [
            *(layer.shape for layer in layers),
            *((layer.d_in,) for layer in layers),
            *((layer.d_out,) for layer in layers),
            *((layer.d_in, layer.d_in) for layer in layers),
            *((layer.d_out, layer.d_out) for layer in layers),
            (),
        ]

    @classmethod
    def serves(cls, block: Block) -> bool:
        """One Kronecker product of two whole factors."""
        return block.plain

    def tallies(self, samples: Samples) -> list[Tally]:
        """S for S and g, rows for a; the basis and its age are no averages."""
        total, rows = divisor_of(samples), [0 if s is None else s.rows for s in samples]
        per_total = [Tally(total, seen) for seen in rows]
        fixed = [Tally(0, 0)] * (2 * len(rows) + 1)
        return [*per_total, *(Tally(seen, seen) for seen in rows), *per_total, *fixed]

    def averaged(self) -> list[bool]:
        """All but the basis and its age."""
        n = len(self.layers)
        return [True] * (3 * n) + [False] * (2 * n + 1)

    def accumulate(
        self, values: Sequence[Tensor], samples: Samples, beta: Sequence[float], alpha: Sequence[float]
    ) -> None:
        """Rotate inputs and gradients and square them; one row's gradient squared is the outer product of squares."""
        n = len(self.layers)
        parts = _spectra(values, n), _spectra(self.values, n)  # the basis is that of the averages
        for i, (layer, value, basis, s) in enumerate(zip(self.layers, *parts, samples, strict=True)):
            if s is None:
                continue
            turned = replace(s, inputs=s.inputs @ basis.U_A, gradients=s.gradients @ basis.U_G)
            g = turned.gradients.square().sum(0)  # passes share abar, so they are summed first: (rows, d_out)
            abar = turned.inputs.square()  # (rows, d_in)
            a_sum, g_sum = abar.sum(0), g.sum(0)
            if s.positions == 1:
                value.S.addmm_(g.T, abar, beta=beta[i], alpha=alpha[i])
            elif s.positions is None:  # rows do not belong to cases: what the two factors say
                blend(value.S, torch.outer(g_sum, a_sum / s.rows), beta[i], alpha[i])
            else:  # a case's gradient is a sum over its rows
                for k, rows in enumerate(case_chunks(layer, turned)):
                    blend(value.S, rows.square().sum((0, 1)), beta[i] if k == 0 else 1.0, alpha[i])
            blend(value.a, a_sum, beta[n + i], alpha[n + i])
            blend(value.g, g_sum, beta[2 * n + i], alpha[2 * n + i])

    def refreshed(self, inverse: Inverse) -> None:
        """Go over to the basis of an inverse that has been taken up, with the averages expressed in it.

        The bases are shared with the inverse, not copied: neither side ever writes to them. The averages are copied,
        because `accumulate` writes to them.
        """
        if not isinstance(inverse, EkfacInverse):  # the inverse of an approximation that shares this moment
            return
        age = self.values[-1]
        if int(age) == inverse.made:  # the basis is in use already, and the averages may have moved on
            return
        fresh = [Spectrum(s.S.clone(), s.a.clone(), s.g.clone(), s.U_A, s.U_G) for s in inverse.spectra]
        self.values = [*_flat(fresh), age.fill_(inverse.made)]


class EkfacInverse(Inverse):
    """F-hat = (U_A (x) U_G) diag(D) (U_A (x) U_G)^T a layer, any graph of layers.

    Args:
        layers: The layers.
        spectra: Basis and second moments of each layer, without damping.
        curvature: D, the damped second moments, (d_out, d_in) a layer.
        made: Number of mini-batches seen when the basis was made.
        notices: What needed more than the parameters' precision.
    """

    def __init__(
        self,
        layers: Sequence[Block],
        spectra: Sequence[Spectrum],
        curvature: Sequence[Tensor],
        made: int,
        notices: Sequence[Notice] = (),
    ) -> None:
        self.layers = layers
        self.notices = tuple(notices)
        self.spectra, self.made = tuple(spectra), made
        self._curvature = list(curvature)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """U_G [(U_G^T V U_A) / D] U_A^T a layer."""
        return [
            s.U_G @ ((s.U_G.T @ V @ s.U_A) / D) @ s.U_A.T
            for s, D, V in zip(self.spectra, self._curvature, blocks, strict=True)
        ]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """U_G [(U_G^T V U_A) D] U_A^T a layer."""
        return [
            s.U_G @ ((s.U_G.T @ V @ s.U_A) * D) @ s.U_A.T
            for s, D, V in zip(self.spectra, self._curvature, blocks, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything; the moment needs the basis and its age too when the inverse is taken up again."""
        spectra = [{name: getattr(s, name) for name in _NAMES} for s in self.spectra]
        return {"spectra": spectra, "curvature": list(self._curvature), "made": self.made}

    def _like(self) -> Tensor:
        return self._curvature[0]


class EkfacFactorisation(Factorisation):
    """Second moments and their basis, shared by all candidates of gamma; each candidate is a few additions.

    Args:
        layers: The layers.
        spectra: Basis and second moments of each layer.
        factors: A and G of each layer, whose traces split gamma.
        made: Number of mini-batches seen when the basis was made.
        notices: What the eigenproblems had to report.
    """

    def __init__(
        self,
        layers: Sequence[Block],
        spectra: Sequence[Spectrum],
        factors: tuple[Sequence[Tensor], Sequence[Tensor]],
        made: int,
        notices: Sequence[Notice],
    ) -> None:
        self._layers, self._spectra, self._factors = layers, spectra, factors
        self._made, self._notices = made, notices

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Of all layers, so that pi = "net" may count other blocks too."""
        return log_pi_of(*self._factors)

    def damped(self, gamma: Tensor, *, pi: PiRule | Tensor = "layer") -> EkfacInverse:
        """D = S + pi gamma g + (gamma / pi) a + gamma^2, entry by entry.

        Raises:
            NumericalError: Some D is not finite, or not above 0; names the layer.
        """
        curvature = []
        for s, split in zip(self._spectra, pi_of(*self._factors, pi), strict=True):
            p = split.to(gamma.dtype)
            # In gamma's double precision until the last moment, so that the dtype of S decides about the rest.
            add_g, add_a, both = (x.to(s.S.dtype) for x in (p * gamma, gamma / p, gamma.square()))
            curvature.append(s.S + (add_g * s.g).unsqueeze(1) + add_a * s.a + both)
        usable = torch.stack([torch.isfinite(D).all() & (D > 0).all() for D in curvature]).tolist()  # one wait
        for layer, good in zip(self._layers, usable, strict=True):
            if not good:
                raise NumericalError(
                    f"{layer.name}: the second moments in the eigenbasis are not finite, or 0 without damping (gamma = "
                    f"{float(gamma):g}); check the data, or raise the damping (damping.lambda0)"
                )
        return EkfacInverse(self._layers, self._spectra, curvature, self._made, self._notices)


class Ekfac(Approximation):
    """Eigenvalue-corrected Kronecker factorisation, layers independent; any graph of layers."""

    Config = EkfacConfig
    config: EkfacConfig
    moments = (InputFactor, OutputFactor, EigenMoment)

    def factorise(self, moments: Moments) -> EkfacFactorisation:
        """The averages in the basis in use, or in a new one if that is due.

        Raises:
            NumericalError: An eigenproblem failed in double precision too; names the layer.
        """
        values, seen = moments[EigenMoment], moments.updates
        old, made = _spectra(values, len(moments.layers)), int(values[-1])
        notices: list[Notice] = []
        if made == 0 or seen <= _FIRST_BASES or seen - made >= self.config.basis_every:
            spectra = _new_spectra(moments, old if made else None, notices)
            made = seen
        else:
            spectra = [Spectrum(s.S.clone(), s.a.clone(), s.g.clone(), s.U_A, s.U_G) for s in old]
        factors = moments[InputFactor], moments[OutputFactor]
        return EkfacFactorisation(moments.layers, spectra, factors, made, notices)

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> EkfacInverse:
        """From its state."""
        return EkfacInverse(layers, [Spectrum(**s) for s in state["spectra"]], state["curvature"], int(state["made"]))


def _new_spectra(moments: Moments, old: Sequence[Spectrum] | None, notices: list[Notice]) -> list[Spectrum]:
    """Eigenvectors of A and G as they are now, with S carried over from the old basis, or K-FAC's if there is none."""
    found, count = [], len(moments.layers)
    factors = [
        (factor, layer.name, side)
        for side, kind in (("A", InputFactor), ("G", OutputFactor))
        for layer, factor in zip(moments.layers, symmetric(moments[kind]), strict=True)
    ]
    costs = [EIGENPROBLEM * factor.shape[0] ** 3 for factor, _, _ in factors]
    solved = share([partial(eigh_psd, *factor) for factor in factors], costs, factors[0][0].device)
    for i, ((a, U_A, more_A), (g, U_G, more_G)) in enumerate(zip(solved[:count], solved[count:], strict=True)):
        notices += [*more_A, *more_G]
        a, g = a.clamp_min(0.0), g.clamp_min(0.0)  # rounding makes eigenvalues of 0 negative
        if old is None:
            S = torch.outer(g, a)
        else:
            turn_A, turn_G = (U_A.T @ old[i].U_A).square_(), (U_G.T @ old[i].U_G).square_()
            S = turn_G @ old[i].S @ turn_A.T
        # Eigenvectors come in column-major order. A restored checkpoint lays them out in rows, and products of the two
        # differ in their last bits: a resumed run would leave the path of the one that never stopped.
        found.append(Spectrum(S, a, g, U_A.contiguous(), U_G.contiguous()))
    return found
