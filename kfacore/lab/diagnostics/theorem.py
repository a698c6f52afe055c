"""Theorem 1 on a model: an approximation takes the same steps in a random reparameterisation of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfacore.errors import KfacError
from kfacore.lab.diagnostics.exact import ExactModel
from kfacore.lab.diagnostics.invariance import Agreement, TransformedChain, agreement, function_path, random_transform
from kfacore.lab.diagnostics.subject import Subject
from kfacore.roles.approx import Approximation

__all__ = ["InvarianceReport", "measure_invariance"]

_INVARIANCE_LIMIT = 20_000
_PATH = 5


@dataclass(frozen=True)
class InvarianceReport:
    """One approximation in the model and in a random reparameterisation of it.

    Attributes:
        approx: The approximation.
        undamped: Without any damping.
        damped: At the subject's gamma.
        notices: Factors of the undamped steps that needed jitter: then Theorem 1 does not apply.
    """

    approx: str
    undamped: Agreement
    damped: Agreement
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "approx": self.approx,
            "undamped": vars(self.undamped),
            "damped": vars(self.damped),
            "notices": list(self.notices),
        }


def measure_invariance(
    subject: Subject, approximations: Mapping[str, Approximation]
) -> tuple[list[InvarianceReport], dict[str, str]]:
    """Theorem 1 for each approximation.

    Args:
        subject: The model.
        approximations: By name.

    Returns:
        What was measured, and what could not be, by name, with the reason.
    """
    exact = subject.exact
    found: list[InvarianceReport] = []
    skipped: dict[str, str] = {}
    if exact.parameters > _INVARIANCE_LIMIT:
        skipped["invariance"] = (
            f"the model has {exact.parameters:,} parameters; measured for up to {_INVARIANCE_LIMIT:,}"
        )
        return found, skipped
    if not exact.plain or exact.draws:
        reason = "its random draws would differ" if exact.draws else _unlike_the_paper(exact)
        skipped["invariance"] = f"Theorem 1 is measured on plain chains of Linear layers; {reason}"
        return found, skipped
    try:
        other = TransformedChain(exact.model, random_transform(exact.model, subject.generator("transform")))
    except KfacError as error:
        skipped["invariance"] = str(error)
        return found, skipped
    for name, approx in approximations.items():
        try:
            found.append(_invariance_of(subject, name, approx, other))
        except KfacError as error:
            skipped[f"invariance of {name}"] = str(error)
    return found, skipped


def _unlike_the_paper(exact: ExactModel) -> str:
    """What of the model the paper's setting does not have."""
    for layer in exact.layers:
        if not layer.plain:
            return f"{layer.name} has curvature of the kind '{layer.kind}'"
    return f"{exact.layers[0].name} or the loss sees several positions, uses or options"


def _invariance_of(subject: Subject, name: str, approx: Approximation, other: TransformedChain) -> InvarianceReport:
    """The same steps in both nets, without damping and with it."""
    exact = subject.exact
    # Every step must refresh: Theorem 1 is about the inverse at the parameters of the step.
    fresh = type(approx)(approx.config.model_copy(update={"refresh_every": 1}))
    found: list[Agreement] = []
    notices: tuple[str, ...] = ()
    for gamma in (None, subject.gamma):
        options: dict[str, Any] = {
            "likelihood": exact.likelihood,
            "approx": fresh,
            "estimator": {"kind": "exact", "tau1": 1.0},
            "damping": {"kind": "fixed", "lambda0": 0.0, "gamma": gamma, "pi": subject.pi},
            "momentum": "none",
            "weight_decay": 0.0,
        }
        path, twin = (function_path(m, exact.inputs, exact.targets, _PATH, **options) for m in (exact.model, other))
        found.append(agreement(path, twin))
        if gamma is None:
            notices = path.notices
    return InvarianceReport(name, found[0], found[1], notices)
