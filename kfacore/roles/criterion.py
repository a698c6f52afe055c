"""Torch's own losses read as likelihoods: `Likelihood.of`.

A loss is read where it is the negative logarithm of a predictive distribution, up to a factor and constants, so that
its Fisher metric is known. Which number is which, torch writes in the documentation of each loss; the value is
compared on the first mini-batch as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from kfacore.errors import ConfigError
from kfacore.registry import get_registry

if TYPE_CHECKING:
    from kfacore.roles.likelihood import Likelihood

__all__ = ["ALIASES", "is_criterion", "read_criterion"]

Options = dict[str, Any]

ALIASES: Mapping[str, Callable[[], nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "cross-entropy": nn.CrossEntropyLoss,
    "crossentropy": nn.CrossEntropyLoss,
    "ce": nn.CrossEntropyLoss,
    "bce": nn.BCEWithLogitsLoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
    "mse_loss": nn.MSELoss,
    "l2": nn.MSELoss,
}
"""Names that people know torch's losses by. They mean the loss with its defaults, a mean over all numbers for "mse"."""

_FUNCTIONS: Mapping[Any, Callable[[], nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.mse_loss: nn.MSELoss,
}

_REFUSED: Mapping[type[nn.Module], str] = {
    nn.NLLLoss: "it takes log-probabilities, whose metric is not that of the model's outputs: let the model return "
    "what it gave to log_softmax, and use nn.CrossEntropyLoss",
    nn.BCELoss: "it takes probabilities: let the model return what it gave to the sigmoid, and use "
    "nn.BCEWithLogitsLoss",
    nn.PoissonNLLLoss: "no built-in likelihood is a Poisson distribution; write one as a plug-in "
    "(kfacore.roles.Likelihood)",
}


def is_criterion(value: Any) -> bool:
    """Whether `read_criterion` is meant: a loss of torch, its function, or a name that it is known by."""
    if isinstance(value, str):
        return value in ALIASES
    return isinstance(value, nn.Module) or (callable(value) and not isinstance(value, type))


def read_criterion(criterion: Any, **options: Any) -> Likelihood:
    """The likelihood of a loss; see `kfacore.roles.Likelihood.of`.

    Args:
        criterion: A loss module, its function with default arguments, or an alias.
        options: Further options of the likelihood's config.

    Raises:
        ConfigError: No likelihood belongs to it; the message says what to use.
    """
    if isinstance(criterion, str) and criterion in ALIASES:
        criterion = ALIASES[criterion]()
    elif not isinstance(criterion, nn.Module) and criterion in _FUNCTIONS:
        criterion = _FUNCTIONS[criterion]()
    name = f"nn.{type(criterion).__name__}"
    for kind, reason in _REFUSED.items():
        if isinstance(criterion, kind):
            raise ConfigError(f"{name} is not taken: {reason}")
    reader = next((read for kind, read in _READERS.items() if isinstance(criterion, kind)), None)
    if reader is None:
        raise ConfigError(
            f"{name if isinstance(criterion, nn.Module) else repr(criterion)} is no loss whose Fisher metric is known; "
            f"taken are {', '.join(f'nn.{kind.__name__}' for kind in _READERS)}, the names of likelihoods (kfac list) "
            "and instances of kfacore.roles.Likelihood"
        )
    if isinstance(criterion, nn.GaussianNLLLoss) and "variance" not in options:
        raise ConfigError(
            f"{name} takes the variance with each call; with a fixed one use Likelihood.of({name}(), variance=...), or "
            "likelihood = {'kind': 'gaussian', 'variance': ...}. A variance that the model returns is not supported"
        )
    table = {**reader(criterion, name), **options}
    likelihood = get_registry().build("likelihood", table)
    likelihood.criterion = criterion
    likelihood.class_second = isinstance(criterion, nn.CrossEntropyLoss)
    return likelihood


def _per(criterion: Any, name: str) -> str:
    """The divisor that a reduction stands for."""
    reduction = criterion.reduction
    if reduction == "none":
        raise ConfigError(f"{name}(reduction='none') gives no single number; use reduction='mean' or 'sum'")
    return "batch" if reduction == "sum" else "position"


def _numbers(values: Tensor | None, name: str) -> tuple[float, ...] | None:
    """A tensor of weights as numbers for a configuration: one, or one an output."""
    if values is None:
        return None
    if values.numel() > 1 and values.shape[-1] != values.numel():
        raise ConfigError(
            f"{name} has shape {tuple(values.shape)}; one number an output is taken, shape (outputs,): weights of "
            "positions or examples belong to the data"
        )
    return tuple(float(value) for value in values.detach().reshape(-1).tolist())


def _cross_entropy(criterion: Any, name: str) -> Options:
    return {
        "kind": "categorical",
        "per": _per(criterion, name),
        "ignore_index": int(criterion.ignore_index),
        "label_smoothing": float(criterion.label_smoothing),
        "weight": _numbers(criterion.weight, f"{name}.weight"),
        "soft": True,
    }


def _binary(criterion: Any, name: str) -> Options:
    return {
        "kind": "bernoulli",
        "per": _per(criterion, name),
        "mean_outputs": criterion.reduction == "mean",
        "weight": _numbers(criterion.weight, f"{name}.weight"),
        "pos_weight": _numbers(criterion.pos_weight, f"{name}.pos_weight"),
    }


def _squared(criterion: Any, name: str) -> Options:
    # (y - z)^2 is twice the unit Gaussian's nll
    return {
        "kind": "gaussian",
        "per": _per(criterion, name),
        "mean_outputs": criterion.reduction == "mean",
        "scale": 2.0,
    }


def _gaussian(criterion: Any, name: str) -> Options:
    return {"kind": "gaussian", "per": _per(criterion, name), "mean_outputs": criterion.reduction == "mean"}


_READERS: Mapping[type[nn.Module], Callable[[Any, str], Options]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.BCEWithLogitsLoss: _binary,
    nn.MSELoss: _squared,
    nn.GaussianNLLLoss: _gaussian,
}
