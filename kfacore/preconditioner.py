r"""What turns gradients into preconditioned gradients: moments, factorisation, solve.

It knows no model and no step, so it can serve `kfacore.KFAC` and other training loops alike: feed it what an
estimator saw, refresh it at chosen gammas, and ask for F-hat^-1 v.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kfacore.errors import ConfigError, NumericalError
from kfacore.layers import LayerInfo
from kfacore.moments import Moments
from kfacore.roles.approx import Approximation, Factorisation, Inverse, Notice
from kfacore.roles.estimator import LayerSamples

__all__ = ["Preconditioner"]

_FIRST_REFRESHES = 3
"""The first steps always refresh: their averages still change much (method, section 2, step 4)."""


class Preconditioner:
    """Running statistics and the approximate inverse made of them.

    Args:
        approx: The approximation of the Fisher.
        layers: The layers, in execution order.
        like: A tensor with the parameters' dtype and device.
        decay: Largest weight of the past in the running averages.

    Raises:
        UnsupportedModelError: The approximation refuses the layers.

    Attributes:
        moments: The running averages.
        inverse: The inverse in use, or None before the first refresh.
        counts: How often each notice was given, by its text.
    """

    def __init__(self, approx: Approximation, layers: Sequence[LayerInfo], like: Tensor, decay: float) -> None:
        self.approx = approx
        self.layers = list(layers)
        self.decay = decay
        approx.check_layers(self.layers)  # moments may be large: first ask whether the approximation takes the net
        self.moments = Moments(approx.moments, self.layers, like)
        self.inverse: Inverse | None = None
        self.counts: Counter[str] = Counter()

    def update(self, samples: Sequence[LayerSamples]) -> None:
        """Take in what the estimator saw in a mini-batch."""
        self.moments.update(samples, self.decay)

    def due(self, step: int) -> bool:
        """Whether the inverse is refreshed in this step: the first three, and every T_3."""
        return self.inverse is None or step <= _FIRST_REFRESHES or step % self.approx.config.refresh_every == 0

    def refresh(self, gammas: Sequence[Tensor], *, pi: bool) -> tuple[list[tuple[Tensor, Inverse]], list[Notice]]:
        """New inverses at each gamma, from the statistics as they are now. Does not yet use any: see `use`.

        Returns:
            Pairs of gamma and inverse, and what must be reported. A gamma whose factorisation failed is left out; if
            all failed there is no pair, and the inverse in use stays.

        Raises:
            NumericalError: All failed and there is no earlier inverse; the message names the layer.
        """
        notices: list[Notice] = []
        made: list[tuple[Tensor, Inverse]] = []
        failure: NumericalError | None = None
        factorisation: Factorisation | None = None
        for gamma in gammas:
            try:
                factorisation = factorisation or self.approx.factorise(self.moments)
                inverse = factorisation.damped(gamma, pi=pi)
            except NumericalError as error:
                failure = error
                if factorisation is None:  # what does not depend on gamma failed: no other gamma will do better
                    break
                continue
            made.append((gamma, inverse))
            notices += inverse.notices
        if failure is not None:
            if not made and self.inverse is None:
                raise failure
            layer, _, message = str(failure).partition(": ")
            kept = "the other candidates were used" if made else "the previous inverse was kept"
            notices.append(Notice(layer, f"{message} ({kept})"))
        self.counts.update(str(notice) for notice in notices)
        return made, notices

    def use(self, inverse: Inverse) -> None:
        """Take up one of the refreshed inverses."""
        self.inverse = inverse
        self.moments.refreshed(inverse)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """F-hat^-1 v with the inverse in use.

        Raises:
            ConfigError: There has been no refresh yet.
        """
        if self.inverse is None:
            raise ConfigError("the preconditioner has no inverse yet: call update, refresh and use first")
        return self.inverse.solve(blocks)

    def state_dict(self) -> dict[str, Any]:
        """Averages, the inverse in use, and counts."""
        return {
            "layers": [layer.name for layer in self.layers],
            "moments": self.moments.state_dict(),
            "inverse": None if self.inverse is None else self.inverse.state_dict(),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of the same approximation and layers."""
        self.moments.load_state_dict(state["moments"])
        saved = state["inverse"]
        self.inverse = None if saved is None else self.approx.load_inverse(saved, self.layers)
        self.counts = Counter(state["counts"])
