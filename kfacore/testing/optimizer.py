"""The conformance suite of optimizers: what the training loop and the run folder rely on."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from kfacore.host import seed_generators
from kfacore.registry import get_registry
from kfacore.roles.likelihood import Likelihood
from kfacore.roles.optimizer import Optimizer, StepReport
from kfacore.schema.table import SLOT_DEFAULTS
from kfacore.testing.base import ComponentSuite, devices, differs, reload

__all__ = ["OptimizerSuite"]

_ETA = 1e-3
_REQUIRED = ("loss", "objective", "error")


class OptimizerSuite(ComponentSuite):
    """Tests of an optimizer. Set `name`.

    Attributes:
        parts: Tables of the slots that the optimizer uses, by slot; their defaults if left out.
        steps: Steps in which the objective of a small net must fall.
        likelihood: Name of the likelihood it is tried with.
    """

    slot = "optimizer"
    parts: ClassVar[dict[str, Any]] = {}
    steps: ClassVar[int] = 30
    likelihood: ClassVar[str] = "gaussian"

    def build(self, **options: Any) -> Optimizer:
        """A fresh optimizer of a fresh small net."""
        return self.start(_net(), **options)

    def start(self, model: nn.Module, *, weight_decay: float = _ETA, seed: int = 0, **options: Any) -> Optimizer:
        """A fresh optimizer of a model, built as `kfac train` does it."""
        registry = get_registry()
        optimizer: type[Optimizer] = registry.load(self.component)
        used = sorted(self.component.uses)
        return optimizer.for_run(
            self.make_config(**options),
            model=model,
            likelihood=registry.build("likelihood", self.likelihood),
            parts={slot: registry.build(slot, self.parts.get(slot, _STANDARD.get(slot))) for slot in used},
            weight_decay=weight_decay,
            seed=seed,
        )

    def data(self, n: int = 40, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs of four numbers and the targets that the likelihood takes."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3]], 1)
        if self.likelihood == "categorical":
            return x.to(device, dtype), y.argmax(1).to(device)
        return x.to(device, dtype), (y.sigmoid() if self.likelihood == "bernoulli" else y).to(device, dtype)

    def test_first_report(self) -> None:
        """Loss, objective with its weight decay, and error at the parameters before the step."""
        model, (x, y) = _net(), self.data()
        likelihood: Likelihood = get_registry().build("likelihood", self.likelihood)
        with torch.no_grad():
            z = model(x)
            penalty = 0.5 * _ETA * torch.stack([p.square().sum() for p in model.parameters()]).sum()
            loss = likelihood.nll(z, y).mean()
            wanted = {"loss": loss, "objective": loss + penalty, "error": likelihood.error(z, y).mean()}
        report = self.start(model).step(x, y)
        assert isinstance(report, StepReport), f"step must return a StepReport, found {type(report).__name__}"
        assert report.step == 1, f"the first step is number 1, the report says {report.step}"
        assert report.batch_size == len(x), f"the mini-batch has {len(x)} cases, the report says {report.batch_size}"
        for name, value in wanted.items():
            error = differs(getattr(report, name).reshape(1), value.reshape(1))
            assert error < 1e-10, (
                f"{name} of the first step is {float(getattr(report, name)):.6g}, before the step it was "
                f"{float(value):.6g}: a mean over cases at the parameters before the step, the objective with "
                "eta/2 ||theta||^2 over weights and biases"
            )

    def test_reports_are_scalars_on_the_device(self) -> None:
        """Tensors without dimensions: reading one is what synchronises."""
        optimizer, (x, y) = self.build(), self.data()
        for k in (1, 2, 3):
            report = optimizer.step(x, y)
            assert report.step == k, f"step number {k} reports {report.step}"
            for field in fields(StepReport):
                value = getattr(report, field.name)
                if field.name in ("step", "batch_size", "refreshed", "undone", "notices") or value is True:
                    continue
                if value is None:
                    assert field.name not in _REQUIRED, f"{field.name} is missing from the report"
                    continue
                assert isinstance(value, Tensor), f"{field.name} is a {type(value).__name__}, not a tensor"
                assert value.shape == (), f"{field.name} has shape {tuple(value.shape)}, not ()"
                assert not value.requires_grad, f"{field.name} keeps the graph of the step alive: detach it"
            assert all(isinstance(notice, str) for notice in report.notices), "notices must be strings"

    def test_the_objective_falls(self) -> None:
        """On a small net, on the whole data."""
        optimizer, (x, y) = self.build(), self.data()
        values = [float(optimizer.step(x, y).objective) for _ in range(self.steps)]
        assert values[-1] < values[0], f"{self.steps} steps take the objective from {values[0]:.4g} to {values[-1]:.4g}"

    def test_weight_decay_is_minimised_too(self) -> None:
        """Parameters end smaller under a heavy eta than without any."""
        norms = []
        for eta in (0.0, 5.0):
            model, (x, y) = _net(), self.data()
            optimizer = self.start(model, weight_decay=eta)
            for _ in range(self.steps):
                optimizer.step(x, y)
            norms.append(float(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).norm()))
        assert norms[1] < norms[0], (
            f"||theta|| ends at {norms[1]:.4g} with eta = 5 and at {norms[0]:.4g} without: the step must take the "
            "gradient of the objective, eta theta included"
        )

    def test_deterministic(self) -> None:
        """The same seed gives the same path, whatever the global generator does, which is left alone."""
        ends = []
        for global_seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                seed_generators(global_seed)
                before = torch.get_rng_state()
                ends.append(_walk(self.build(), *self.data(), 5))
                assert torch.equal(before, torch.get_rng_state()), "a step draws from the global generator: use `seed`"
        assert ends[0] == ends[1], "two runs with one seed take different paths"

    @pytest.mark.parametrize("stop", [1, 4, 7])
    def test_resumes_bit_for_bit(self, stop: int) -> None:
        """Through a file that loads with weights only, into a fresh optimizer of a fresh model."""
        x, y = self.data()
        first_model, second_model = _net(), _net(seed=5)
        first = self.start(first_model)
        _walk(first, x, y, stop)
        second = self.start(second_model, seed=77)
        second_model.load_state_dict(reload(first_model.state_dict()))
        second.load_state_dict(reload(first.state_dict()))
        ends = [_walk(optimizer, x, y, 8) for optimizer in (first, second)]
        assert ends[0] == ends[1], (
            f"a run resumed after step {stop} takes another path: the state must hold everything, counters, "
            "buffers and generators"
        )
        assert second.step(x, y).step == stop + 9, "a resumed run counts its steps from 1 again"

    def test_frozen_parameters_stay(self) -> None:
        """A layer without gradients is left alone."""
        model, (x, y) = _net(), self.data()
        frozen = next(model.children())
        frozen.requires_grad_(False)
        before = [p.clone() for p in frozen.parameters()]
        _walk(self.start(model), x, y, 3)
        for old, new in zip(before, frozen.parameters(), strict=True):
            assert torch.equal(old, new), "a frozen parameter was changed"

    def test_other_batches(self) -> None:
        """Mini-batches of any size, one case too."""
        optimizer, (x, y) = self.build(), self.data()
        for n in (40, 1, 7, 40):
            report = optimizer.step(x[:n], y[:n])
            assert report.batch_size == n, f"a mini-batch of {n} cases is reported as {report.batch_size}"
            assert bool(torch.isfinite(report.loss)), f"a mini-batch of {n} cases makes the loss {float(report.loss)}"

    @pytest.mark.parametrize("device", devices())
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_dtype_and_device_are_kept(self, dtype: torch.dtype, device: str) -> None:
        """Parameters stay what and where they are, finite."""
        model = _net().to(device, dtype)
        _walk(self.start(model), *self.data(dtype=dtype, device=device), 3)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype, f"{name} became {parameter.dtype}"
            assert parameter.device.type == device, f"{name} moved to {parameter.device}"
            assert bool(torch.isfinite(parameter).all()), f"{name} is not finite after three steps"


_STANDARD = {**SLOT_DEFAULTS, "trust": "undo", "likelihood": "gaussian"}
"""What an optimizer gets in the slots that its manifest says it uses."""


def _net(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # modules draw their first values from the global generator
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _walk(optimizer: Optimizer, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """The objective before each of some steps."""
    return [float(optimizer.step(x, y).objective) for _ in range(steps)]
