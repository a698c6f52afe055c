"""What a step refuses: targets that do not fit, and numbers that are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfacore.errors import DataError, NumericalError
from kfacore.nest import tensors_of

__all__ = ["check_form", "require_finite"]


def check_form(targets: Any, cases: int, device: torch.device) -> None:
    """One target a case, where the outputs are. Asks the device nothing.

    Raises:
        DataError: The message says what was found.
    """
    if not isinstance(targets, Tensor) or targets.dim() == 0:
        found = "a number" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        raise DataError(f"targets: a tensor with one target a case is needed, found {found}")
    if len(targets) != cases:
        raise DataError(f"targets: found {len(targets)} targets for {cases} cases of inputs")
    if targets.device != device:
        raise DataError(f"targets: they are on {targets.device}, the model's outputs on {device}; move them there")


def require_finite(
    what: str, value: Tensor, inputs: Any, targets: Tensor, *, step: int, damping: tuple[Tensor, Tensor]
) -> None:
    """Refuse to go on from NaN or infinity, and say where it came from. Waits for the device.

    Args:
        what: Name of the number.
        value: The number, ().
        inputs: Of the mini-batch.
        targets: Of the mini-batch.
        step: Number of the step.
        damping: lambda and gamma, for the message.

    Raises:
        DataError: The mini-batch has NaN or infinity.
        NumericalError: It has not, so the parameters have diverged.
    """
    # The inputs as well: an infinite one may saturate its units and leave every loss finite.
    finite = [torch.isfinite(value), *(torch.isfinite(x).all() for x in tensors_of(inputs))]
    if bool(torch.stack(finite).all()):
        return
    for name, tensor in (*(("inputs", x) for x in tensors_of(inputs)), ("targets", targets)):
        bad = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
        if bool(bad.any()):
            raise DataError(
                f"{name}: {int(bad.sum())} of {len(bad)} cases of the mini-batch of step {step} hold NaN "
                f"or infinity, the first is case {int(bad.nonzero()[0, 0])}; remove or repair them"
            )
    lam, gamma = damping
    raise NumericalError(
        f"step {step}: the {what} is not finite (lambda {float(lam):g}, gamma {float(gamma):g}); the parameters have "
        "diverged, or an earlier mini-batch held NaN or infinity. Check the data, or start with a larger "
        "damping.lambda0"
    )
