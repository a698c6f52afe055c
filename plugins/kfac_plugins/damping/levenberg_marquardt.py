r"""Adaptive damping (Martens & Grosse 2015, sections 6.5 and 6.6; method, sections 2.5 and 5).

lambda follows the reduction ratio rho = (h(theta + delta) - h(theta)) / M(delta) by the Levenberg-Marquardt rule,

    rho < 1/4 (or NaN):  lambda <- lambda / w1,      rho > 3/4:  lambda <- lambda w1,      w1 = (19/20)^T_1,

and gamma is chosen every T_2 steps among {w2 gamma, gamma, gamma / w2}, w2 = sqrt(19/20)^T_2, by the value of the
quadratic model. The clamp of the candidates is the authors' program's; the paper has none.

Without a lambda_0, lambda starts at 0.15 times the mean diagonal entry of the Fisher on the first mini-batch, so
that it follows the scale of the objective: h and F times c need lambda times c. The factor was measured, see docs.

Small mini-batches flatter a step: it fits their own noise, rho is near 1 whatever lambda is, and lambda would fall for
ever. A new mini-batch tells whether a step v went too far: the slope along it that is left where it ended, b_v, is 0
after a step to the minimum, and half of v^T F v after one that changed nothing. With ``confirmed`` lambda falls only
while the running mean of slopes is below half of that of curvatures, and rises where it is above that by more than
twice its standard error. Both are free: they are in the new mini-batch's quadratic model.

That is evidence about the length of a step only while the curvature decides it. Of the step to the minimum the model
promises (v^T F v + lambda v^T v) / 2, so v^T F v in units of that is 2 without lambda, and 1 where lambda does as much
as the curvature. Below 1 a larger lambda only scales the step, and a slope that stays, as it does where mini-batches
are drawn from few examples without replacement and so disagree more than chance, would raise it for ever. There new
mini-batches are not listened to: lambda falls if rho says so, until they can be.

Tied, gamma is sqrt(lambda + eta) at every refresh: the paper's first value, kept up, which Ba et al. (2017, section
A.2) use throughout. It needs one inverse where the comparison needs three.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kfac_plugins.damping import LevenbergMarquardtConfig
from kfacore import host
from kfacore.roles.damping import Damping

__all__ = ["LevenbergMarquardt"]

_DECAY = 19.0 / 20.0

_LEAST = 1e-3
"""Share of an automatic lambda_0 below which lambda does not fall: far below the mean curvature it bounds nothing."""

_MEMORY = 0.9
"""Decay of the running means of what new mini-batches see."""

_LOST = 0.5
"""Slope left, in units of the curvature, below which lambda may fall, and above which it rises: at one half a step has
changed nothing. A gap between the two would keep lambda where a few bad steps had put it (docs/notes, noise)."""

_SURE = 2.0
"""Standard errors by which the slope must be above that before lambda rises."""

_DECISIVE = 1.0
"""Curvature, in units of the promised decrease, from which it decides the length of a step; below, lambda does."""

_LARGEST = 4.0
"""Slopes and curvatures, in units of the promised decrease, count no more than this: no mini-batch decides alone."""

_AUTOMATIC = 0.15
"""The automatic lambda_0, in units of the mean diagonal entry of the Fisher."""


class LevenbergMarquardt(Damping):
    """lambda by rho, gamma by comparison."""

    Config = LevenbergMarquardtConfig
    config: LevenbergMarquardtConfig

    def start(self, weight_decay: float, device: torch.device) -> None:
        """lambda_0, gamma_0 = sqrt(lambda_0 + eta); if automatic, as for a mean curvature of 1 until it is known."""
        c = self.config
        first = _AUTOMATIC if c.lambda0 is None else c.lambda0
        self.lam = torch.tensor(first, dtype=torch.float64, device=device)
        self.gamma = torch.tensor(math.sqrt(first + weight_decay), dtype=torch.float64, device=device)
        self._seen, self._least = _unseen(self.lam), torch.zeros_like(self.lam)
        self.follow(weight_decay)

    def follow(self, weight_decay: float) -> None:
        """eta in sqrt(lambda + eta) and in the clamp of the candidates."""
        self._eta = weight_decay
        self._lowest = math.sqrt(weight_decay) if self.config.gamma_min is None else self.config.gamma_min

    def observe(self, curvature: Tensor) -> None:
        """Set lambda by the mean diagonal of the Fisher, if automatic; a curvature of zero or NaN says nothing."""
        if self.config.lambda0 is None:
            self.lam = _AUTOMATIC * torch.where(curvature > 0, curvature, torch.ones_like(curvature))
            self._least = _LEAST * self.lam
            self.gamma = (self.lam + self._eta).sqrt()

    def candidates(self, step: int) -> list[Tensor]:
        """Three gammas every T_2 steps; only the new ones are clamped, so a gamma above the clamp can come down."""
        c = self.config
        if c.gamma_rule == "tied":
            return [(self.lam + self._eta).sqrt()]
        if step % c.gamma_every:
            return [self.gamma]
        w2 = math.sqrt(_DECAY) ** c.gamma_every
        lower = (self.gamma * w2).clamp(min=self._lowest)
        upper = (self.gamma / w2).clamp(max=c.gamma_max) if c.gamma_max is not None else self.gamma / w2
        return [lower, self.gamma, upper]

    def adapts(self, step: int) -> bool:
        """Every T_1 steps."""
        return step % self.config.lambda_every == 0

    def adapt(self, rho: Tensor) -> None:
        """The Levenberg-Marquardt rule, on the device; NaN counts as a failure of the model."""
        w1 = self.config.rate**self.config.lambda_every
        bad, good = ~(rho >= 0.25), rho > 0.75
        if self.config.confirmed:
            slope, curvature, square = self._seen
            error = ((square - slope * slope).clamp(min=0.0) * ((1.0 - _MEMORY) / (1.0 + _MEMORY))).sqrt()
            decisive = curvature >= _DECISIVE
            bad = bad | (decisive & (slope > _LOST * curvature + _SURE * error))
            good = good & (~decisive | (slope < _LOST * curvature))
        # Chosen among tensors of lambda's dtype: between plain numbers torch.where answers in its default dtype.
        lower = torch.maximum(self.lam * w1, torch.minimum(self.lam, self._least))
        self.lam = torch.where(bad, self.lam / w1, torch.where(good, lower, self.lam))

    def strengthen(self, factor: float, where: Tensor) -> None:
        """lambda times the factor."""
        self.lam = torch.where(where, self.lam * factor, self.lam)

    def caution(self, factor: float, where: Tensor) -> None:
        """lambda times the factor, unless lambda decides how long steps are already."""
        decisive = self._seen[1] >= _DECISIVE
        self.strengthen(factor, where & decisive if self.config.confirmed else where)

    def confirm(self, slope: Tensor, curvature: Tensor) -> None:
        """Running means of both and of the slope's square, which tells how sure its mean is."""
        x = slope.clamp(-_LARGEST, _LARGEST)
        new = torch.stack([x, curvature.clamp(max=_LARGEST), x * x])
        if host.is_free(new):
            if math.isfinite(float(new.sum())):
                self._seen = self._seen.lerp(new, 1.0 - _MEMORY)
            return
        self._seen = torch.where(torch.isfinite(new.sum()), self._seen.lerp(new, 1.0 - _MEMORY), self._seen)

    def state_dict(self) -> dict[str, Any]:
        """Lambda, gamma, what new mini-batches saw, and the least lambda."""
        return {**super().state_dict(), "seen": self._seen, "least": self._least}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up all of it; a state from before there was more than lambda and gamma has no more."""
        super().load_state_dict(state)
        self._seen = state.get("seen", _unseen(self.lam)).to(self.lam)
        self._least = state.get("least", torch.zeros_like(self.lam)).to(self.lam)


def _unseen(like: Tensor) -> Tensor:  # (3,)
    """Slope, curvature and squared slope before there was a step: as after one that stopped half-way."""
    return like.new_tensor([-1.0, 2.0, 1.0])
