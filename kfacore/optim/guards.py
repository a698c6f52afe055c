"""What a step refuses: targets that do not fit, numbers that are not finite; and which states an optimizer refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfacore import host
from kfacore.errors import ConfigError, DataError, NumericalError, UnsupportedModelError
from kfacore.nest import map_nest, tensors_of
from kfacore.network.misfit import require_dense
from kfacore.optim.targets import DeferredRefusal

__all__ = ["as_parameters", "check_form", "require_finite", "require_state"]


def check_form(targets: Any, cases: int, device: torch.device) -> None:
    """One target a case, where the outputs are. Asks the device nothing.

    Raises:
        DataError: The message says what was found.
    """
    require_dense("targets", targets)
    if not isinstance(targets, Tensor) or targets.dim() == 0:
        found = "a number" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        raise DataError(f"targets: a tensor with one target an example is needed, found {found}")
    if len(targets) != cases:
        raise DataError(f"targets: found {len(targets)} targets for {cases} examples of inputs")
    if targets.device != device:
        raise DataError(f"targets: they are on {targets.device}, the model's outputs on {device}; move them there")


def _all_finite(x: Tensor) -> Tensor:
    """Whether every entry is finite; on the host one sum tells it of all but sums that overflow."""
    if host.is_free(x) and x.dtype in (torch.float32, torch.float64) and math.isfinite(float(x.detach().sum())):
        return torch.ones((), dtype=torch.bool)
    return torch.isfinite(x).all()


def require_finite(
    what: str,
    value: Tensor,
    inputs: Any,
    targets: Any,
    *,
    step: int,
    damping: tuple[Tensor, Tensor],
    deferred: DeferredRefusal | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse to go on from NaN or infinity, and say where it came from. Waits for the device.

    Args:
        what: Name of the number.
        value: The number, ().
        inputs: Of the mini-batch.
        targets: Of the mini-batch.
        step: Number of the step.
        damping: lambda and gamma, for the message.
        deferred: Wrong targets that only the device knows of.
        held: The model's parameters and buffers before the step, for the message.

    Raises:
        DataError: The mini-batch has NaN or infinity, or an earlier one had wrong targets.
        NumericalError: It has not, so the parameters have diverged, or the forward pass makes it of finite numbers.
    """
    # The inputs as well: an infinite one may saturate its units and leave every loss finite.
    finite = [torch.isfinite(value), *(_all_finite(x) for x in tensors_of(inputs))]
    if deferred is not None and deferred.fine is not None:
        finite.append(deferred.fine)
    if bool(torch.stack(finite).all()):
        return
    if deferred is not None:
        deferred.refuse()
    for name, tensor in (*(("inputs", x) for x in tensors_of(inputs)), *(("targets", y) for y in tensors_of(targets))):
        bad = ~torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
        if bool(bad.any()):
            raise DataError(
                f"{name}: {int(bad.sum())} of {len(bad)} examples of the mini-batch of step {step} hold NaN "
                f"or infinity, the first is example {int(bad.nonzero()[0, 0])}; remove or repair them"
            )
    lam, gamma = float(damping[0]), float(damping[1])
    if step == 1 and held is not None:
        raise _from_the_start(what, held)
    # Ten times what it fell apart with; a lambda of 0 (constant damping by gamma alone) has no multiple.
    larger = f"damping.lambda0={10.0 * lam:.2g}" if 0.0 < lam < math.inf else f"damping.gamma={10.0 * gamma:.2g}"
    raise NumericalError(
        f"step {step}: the {what} is not finite (lambda {lam:g}, gamma {gamma:g}); the parameters have diverged, or an "
        f"earlier mini-batch held NaN or infinity. Check the data, or try a larger damping, --set {larger}"
    )


def _from_the_start(what: str, held: Mapping[str, Tensor]) -> NumericalError:
    """No step has been taken and the data is finite, so no damping is to blame."""
    culprit = next((name for name, tensor in held.items() if not bool(torch.isfinite(tensor).all())), None)
    if culprit is not None:
        return NumericalError(
            f"step 1: the {what} is not finite, and {culprit} holds NaN or infinity; initialise or load it anew"
        )
    return NumericalError(
        f"step 1: the {what} is not finite, though data, parameters and buffers are: the forward pass makes NaN or "
        "infinity of them (0 / 0, the logarithm of a negative number, an overflow). Look at what each layer returns "
        "for this mini-batch; smaller inputs or first weights help against an overflow"
    )


def require_state(own: Mapping[str, Any] | None, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What KFAC has saved in an optimizer state, if it is of this approximation and its layers have these shapes.

    Args:
        own: What KFAC has saved in it; None or something else if it has not.
        kind: Name of the approximation.
        shapes: (d_out, d_in) of the optimizer's layers by name.

    Raises:
        ConfigError: The state is of another optimizer or approximation.
        UnsupportedModelError: A layer has another shape; the message names it.
    """
    if own is None:
        raise ConfigError("the state is not of a KFAC optimizer: none of its tensors is KFAC's")
    if "layers" not in own:
        raise ConfigError("the state is not of a KFAC optimizer, but of Preconditioned: load it into one of these")
    if own["approx"] != kind:
        raise ConfigError(f"the state is of approx = {own['approx']!r}, this optimizer has {kind!r}")
    for name, saved in zip(own["layers"], own["shapes"], strict=True):
        if name in shapes and shapes[name] != tuple(saved):
            raise UnsupportedModelError(
                f"{name}: its weight block has shape {shapes[name]}, in the saved optimizer state {tuple(saved)}; "
                "build the model as it was when the state was saved"
            )
    return dict(own)


def as_parameters(nest: Any, saved: torch.dtype, like: Tensor) -> Any:
    """Curvature of a saved state on the parameters' device and in their dtype.

    Args:
        nest: Tensors of any kind.
        saved: The dtype that the parameters had when it was saved.
        like: A parameter.

    Returns:
        The same nest; what was in another dtype than the parameters, and scalars such as gamma, keep it. What was
        symmetric up to rounding in the old precision is symmetric in the new one.
    """

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.to(like.device)
        if tensor.dtype != saved or tensor.dim() == 0 or saved == like.dtype:
            return tensor
        return _symmetric(tensor.to(like.dtype), torch.finfo(saved).eps)

    return map_nest(move, nest)


def _symmetric(M: Tensor, eps: float) -> Tensor:
    """The symmetric part of a matrix that has no other, up to rounding: eigenproblems look at one half of it only."""
    if M.dim() < 2 or M.shape[-1] != M.shape[-2] or M.numel() == 0:
        return M
    close = float((M - M.mT).abs().max()) <= 16 * eps * M.shape[-1] ** 0.5 * float(M.abs().max())
    return (M + M.mT) * 0.5 if close else M
