"""What an optimizer is composed of, in one place that every phase of its step reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from kfacore.curvature.owned import require_divisible
from kfacore.errors import UnsupportedModelError
from kfacore.network import Linearizer
from kfacore.network.facts import agreed
from kfacore.optim.joint import Joint, joint_or_loss
from kfacore.optim.loss import Loss
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.parallel.shards import require_shards
from kfacore.registry import Registry
from kfacore.roles.approx import Approximation
from kfacore.roles.damping import Damping
from kfacore.roles.estimator import Estimator
from kfacore.roles.momentum import Momentum
from kfacore.roles.trust import Trust

__all__ = ["Part", "Parts", "compose", "fingerprint", "require_alike", "widest_side"]

P = TypeVar("P")

_AFFORDABLE = 1280, 5e4
"""Widest side of which a whole factor is always kept, and parameters' worth of further work that one may cost: a side d
costs about 5 d^3 operations a refresh, a step about 10 an example and a parameter."""


@dataclass
class Parts:
    """The parts of a `kfacore.KFAC`. One that is replaced is used from the next step on.

    Attributes:
        linearizer: What turns mini-batches into linearizations.
        loss: What the model is trained on.
        approx: The approximation of the Fisher.
        estimator: The statistics estimator.
        damping: The damping strategy.
        momentum: The momentum rule.
        trust: The rule of trust.
        generator: Source of every draw.
        ranks: The processes that train together.
    """

    linearizer: Linearizer
    loss: Loss | Joint
    approx: Approximation
    estimator: Estimator
    damping: Damping
    momentum: Momentum
    trust: Trust
    generator: torch.Generator
    ranks: Ranks

    def components(self) -> Iterator[tuple[str, Any]]:
        """Every component that may be somebody's own, with its slot."""
        losses = self.loss.heads.values() if isinstance(self.loss, Joint) else (self.loss,)
        yield from (("likelihood", loss.likelihood) for loss in losses)
        for slot in ("approx", "estimator", "damping", "momentum", "trust"):
            yield slot, getattr(self, slot)
        types = {id(user.type): user.type for layer in self.linearizer.layers for user in layer.users if user.type}
        yield from (("layer", each) for each in types.values())


class Part(Generic[P]):
    """An attribute of an optimizer that lies in its `Parts`, ``optimizer._parts``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Part[P]: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> P: ...
    def __get__(self, instance: Any, owner: type) -> Part[P] | P:
        return self if instance is None else getattr(instance._parts, self._name)

    def __set__(self, instance: Any, value: P) -> None:
        setattr(instance._parts, self._name, value)


def compose(registry: Registry, model: nn.Module, chosen: Mapping[str, Any], ranks: Ranks = ALONE) -> Parts:
    """Build the parts.

    Args:
        registry: Where components come from.
        model: The model.
        chosen: Every option with its value, see `kfacore.optim.options.complete`.
        ranks: The processes that train together.

    Raises:
        ConfigError: An option of a part is wrong.
        UnsupportedModelError: A module cannot be preconditioned; the message names it.
    """
    _require_whole(model)
    loss = joint_or_loss(chosen["likelihood"])
    approx: Approximation = registry.build("approx", chosen["approx"])
    estimator: Estimator = registry.build("estimator", chosen["estimator"])
    damping: Damping = registry.build("damping", chosen["damping"])
    momentum: Momentum = registry.build("momentum", chosen["momentum"])
    trust: Trust = registry.build("trust", chosen["trust"])
    linearizer = Linearizer(
        model,
        approx.structure,
        layers=registry.layers(),
        max_dim=widest_side(model, approx.config.max_dim),
        unsupported=chosen["unsupported"],
        output=loss.pack if isinstance(loss, Joint) else chosen["output"],
        reduce=chosen["reduce"],
        tangents=momentum.uses_model or damping.uses_model,
    )
    require_divisible(approx)
    approx.check_layers([x.info for x in linearizer.layers if approx.serves(x.info)])
    generator = torch.Generator(linearizer.parameters[0].device).manual_seed(chosen["seed"])
    loss.shared = not ranks.alone
    linearizer.agree = None if ranks.alone else lambda facts: agreed(ranks.gather("model", facts))
    return Parts(linearizer, loss, approx, estimator, damping, momentum, trust, generator, ranks)


def _require_whole(model: nn.Module) -> None:
    """Refuse parameters that are spread over processes.

    Raises:
        UnsupportedModelError: They are; says what takes them.
    """
    if require_shards({name: p for name, p in model.named_parameters() if p.requires_grad}):
        raise UnsupportedModelError(
            "KFAC takes no parameters that are sharded over processes (fully_shard): it takes forward-mode derivatives "
            "of whole ones. Preconditioned does, around any torch optimizer; or give KFAC the model unsharded"
        )


def require_alike(parts: Parts) -> None:
    """Refuse processes that do not train the same model with the same options.

    Raises:
        ConfigError: Something differs; the message names it, with both values.
    """
    if parts.ranks.alone:
        return
    linearizer = parts.linearizer
    remedy = "build model and optimizer alike on all processes: the same seed, or load_state_dict of one state"
    slots = ("approx", "estimator", "damping", "momentum", "trust")
    options = {f"the option {slot}": getattr(parts, slot).config for slot in slots}
    options["the likelihood"] = parts.loss.likelihood.config
    options["the seed"] = parts.generator.initial_seed()
    blocks = {
        "the order of blocks": [layer.info.name for layer in linearizer.layers],
        "the shapes of blocks": [layer.info.shape for layer in linearizer.layers],
        "which blocks follow each other": linearizer.following,
        "which blocks are pooled": sorted(linearizer.reduced),
    }
    values = {f"the parameter {name}": fingerprint(p) for name, p in linearizer.named.items()}
    parts.ranks.require_same("first step", {**options, **blocks, **values}, remedy)


def fingerprint(tensor: torch.Tensor) -> str:
    """A hash of the bits of a tensor."""
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(bits.tobytes(), digest_size=8).hexdigest()


def widest_side(model: nn.Module, limit: int) -> int:
    """Widest side of which a whole factor is kept: `approx.max_dim`, and what the rest of the net is worth.

    A net 4-1500-3 would otherwise spend a hundred times as long on the factors of its wide layer as on its steps.
    """
    always, worth = _AFFORDABLE
    size = sum(p.numel() for p in model.parameters() if p.requires_grad and not is_lazy(p))
    return min(limit, max(always, int((worth * size) ** (1 / 3)))) if size else limit
