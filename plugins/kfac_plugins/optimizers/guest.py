"""`kfacore.Preconditioned` behind the role: what it does in somebody's loop, in runs and studies of the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kfac_plugins.optimizers import AdamWConfig, GuestConfig, MuonConfig, SgdConfig
from kfac_plugins.optimizers.torch_optimizers import AdamW, Muon, Sgd, TorchOptimizer
from kfacore.errors import ConfigError
from kfacore.optim.guest import Preconditioned
from kfacore.roles import Likelihood

__all__ = ["Guest"]


class Guest(TorchOptimizer):
    """A guest around one of the optimizers here; the run's estimator and approximation are its own.

    Args:
        model: The model.
        likelihood: The likelihood, that of the guest's statistics too.
        config: The component's config.
        parts: The built ``approx`` and ``estimator``.
        weight_decay: eta.
        seed: Of the sampled targets.

    Attributes:
        inner: The guest.
    """

    config: GuestConfig
    inner: Preconditioned

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        config: GuestConfig,
        parts: Mapping[str, Any],
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.base = _base(model, likelihood, config)
        super().__init__(model, likelihood, config, weight_decay)
        self.inner = Preconditioned(
            model,
            self.base.inner,
            likelihood=likelihood,
            approx=parts["approx"],
            estimator=parts["estimator"],
            every=config.every,
            scale=config.scale,
            damping=config.damping,
            seed=seed,
        )

    @classmethod
    def for_run(
        cls,
        config: GuestConfig,
        *,
        model: nn.Module,
        likelihood: Likelihood,
        parts: Mapping[str, Any],
        weight_decay: float,
        seed: int,
    ) -> Guest:
        """Build it for a run."""
        return cls(model, likelihood, config, parts, weight_decay, seed)

    def build(self, parameters: list[Tensor]) -> Any:
        """The base's; the guest goes around it once there is one."""
        return self.base.inner

    def momentum(self) -> float | None:
        """The base's."""
        return self.base.momentum()

    def outputs(self, inputs: Any, targets: Tensor) -> Tensor:
        """The forward pass, from which statistics are taken when they are due."""
        with self.inner.watch():
            z: Tensor = self.model(inputs)
        self.inner.observe(z, targets)
        return z

    def step(self, inputs: Any, targets: Tensor) -> Any:
        """Gradient of h, then the base's step along K-FAC's directions."""
        due = self.inner.due
        return replace(super().step(inputs, targets), refreshed=due)


def _base(model: nn.Module, likelihood: Likelihood, config: GuestConfig) -> TorchOptimizer:
    """The optimizer that the guest is around; the decay of the objective is in the gradients already.

    Raises:
        ConfigError: sgd has no decoupled decay.
    """
    if config.base == "adamw":
        return AdamW(model, likelihood, AdamWConfig(lr=config.lr, decay=config.decay))
    if config.base == "muon":
        return Muon(model, likelihood, MuonConfig(lr=config.lr, decay=config.decay))
    if config.decay:
        raise ConfigError(
            f"optimizer.decay is decoupled, and sgd has no such decay, found {config.decay:g}; set weight_decay"
        )
    return Sgd(model, likelihood, SgdConfig(lr=config.lr))
