"""Torch's own optimizers behind the role, so that they train through the same command and run folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_plugins.optimizers import AdamConfig, AdamWConfig, MuonConfig, SgdConfig
from kfac_plugins.optimizers.gradient import GradientOptimizer
from kfac_plugins.optimizers.muon import MuonAndAdamW
from kfacore.errors import ConfigError
from kfacore.roles import Likelihood, Optimizer, StepReport

__all__ = ["Adam", "AdamW", "Muon", "Sgd", "TorchOptimizer", "split_matrices"]


class TorchOptimizer(GradientOptimizer):
    """Takes the gradient of h, weight decay included, and leaves the step to an optimizer of `torch.optim`.

    The decay is part of the objective, as everywhere in this project; torch's own (decoupled or not) stays off.

    Args:
        model: The model.
        likelihood: The likelihood.
        config: The component's config.
        weight_decay: eta.

    Attributes:
        inner: The optimizer of torch.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, config: Any, weight_decay: float = 0.0) -> None:
        super().__init__(model, likelihood, weight_decay)
        self.config = config
        self.inner = self.build(self.parameters)

    @abstractmethod
    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Torch's optimizer over the parameters, without weight decay."""

    def momentum(self) -> float | None:
        """The momentum coefficient to report: None where a method has none, and beta1 of Adam is not method.md's mu."""
        return None

    @classmethod
    def for_run(
        cls,
        config: Any,
        *,
        model: nn.Module,
        likelihood: Likelihood,
        parts: Mapping[str, Any],
        weight_decay: float,
        seed: int,
    ) -> Optimizer:
        """Build it for a run; it draws nothing and uses no other slot."""
        return cls(model, likelihood, config, weight_decay)

    def step(self, inputs: Any, targets: Tensor) -> StepReport:
        """Gradient of h, then torch's step."""
        self.steps += 1
        measured = self.measure(inputs, targets)
        for parameter, gradient in zip(self.parameters, measured.gradients, strict=True):
            parameter.grad = gradient
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        mu = self.momentum()
        return StepReport(
            step=self.steps,
            batch_size=int(targets.shape[0]),
            loss=measured.loss,
            objective=measured.objective,
            error=measured.error,
            alpha=torch.tensor(self.config.lr, dtype=torch.float64),
            mu=None if mu is None else torch.tensor(mu, dtype=torch.float64),
        )

    def state_dict(self) -> dict[str, Any]:
        """Torch's state and the number of steps."""
        return {"steps": self.steps, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state from `state_dict`."""
        self.steps = int(state["steps"])
        self.inner.load_state_dict(state["inner"])


class Sgd(TorchOptimizer):
    """`torch.optim.SGD`: v <- m v + g, theta <- theta - lr v."""

    config: SgdConfig

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """With momentum, Nesterov's or not.

        Raises:
            ConfigError: Nesterov without momentum.
        """
        if self.config.nesterov and self.config.momentum == 0.0:
            raise ConfigError("optimizer.nesterov needs optimizer.momentum above 0, found 0")
        return torch.optim.SGD(
            parameters, lr=self.config.lr, momentum=self.config.momentum, nesterov=self.config.nesterov
        )

    def momentum(self) -> float | None:
        """The constant coefficient."""
        return self.config.momentum


class Adam(TorchOptimizer):
    """`torch.optim.Adam` (Kingma & Ba 2015)."""

    config: AdamConfig

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """With the config's two decays."""
        config = self.config
        return torch.optim.Adam(parameters, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


class AdamW(TorchOptimizer):
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019): Adam, and weights shrink beside the gradient."""

    config: AdamWConfig

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """With the config's two decays of averages and the decoupled one of weights."""
        config = self.config
        return torch.optim.AdamW(
            parameters, config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.decay
        )


class Muon(TorchOptimizer):
    """Muon on matrices and kernels, AdamW on the rest and on embeddings, as its author has it."""

    config: MuonConfig

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """One optimizer for both.

        Raises:
            ConfigError: There is no matrix.
        """
        matrices, rest = split_matrices(self.model, parameters)
        return MuonAndAdamW(matrices, rest, self.config.lr, self.config.momentum, self.config.decay)

    def momentum(self) -> float | None:
        """The constant coefficient."""
        return self.config.momentum


def split_matrices(model: nn.Module, parameters: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """What Muon moves, and what it leaves to AdamW: vectors and embeddings, heads tied to them too.

    Raises:
        ConfigError: Nothing is left for Muon.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    matrices = [p for p in parameters if p.dim() > 1 and id(p) not in tables]
    if not matrices:
        raise ConfigError("muon moves weight matrices, and this model trains none; take adamw")
    taken = {id(p) for p in matrices}
    return matrices, [p for p in parameters if id(p) not in taken]
