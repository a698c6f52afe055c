"""The conformance suite of damping strategies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kfacore.roles.damping import Damping
from kfacore.testing.base import ComponentSuite, devices, reload

__all__ = ["DampingSuite"]

_ETA = 1e-4
_STEPS = 60


class DampingSuite(ComponentSuite):
    """Tests of a damping strategy. Set `name`."""

    slot = "damping"

    def started(self, device: str = "cpu") -> Damping:
        """A fresh instance at its first values."""
        damping: Damping = self.build()
        damping.start(_ETA, torch.device(device))
        return damping

    def walk(self, damping: Damping, rho: float, first: int = 1, steps: int = _STEPS) -> list[tuple[float, float]]:
        """(lambda, gamma) after each of some steps in which the reduction ratio is always rho."""
        history = []
        for step in range(first, first + steps):
            gammas = damping.candidates(step)
            damping.choose(gammas[0] if step % 2 else gammas[-1])
            if damping.adapts(step):
                damping.adapt(torch.tensor(rho, dtype=torch.float64, device=damping.lam.device))
            history.append((float(damping.lam), float(damping.gamma)))
        return history

    @pytest.mark.parametrize("device", devices())
    def test_starts_with_double_scalars_on_the_device(self, device: str) -> None:
        """Lambda and gamma, (), finite, lambda >= 0 and gamma > 0 where there is weight decay."""
        damping = self.started(device)
        for name, value in (("lam", damping.lam), ("gamma", damping.gamma)):
            assert isinstance(value, Tensor), f"{name} must be a tensor, found {type(value).__name__}"
            assert value.shape == (), f"{name} must be a scalar, found shape {tuple(value.shape)}"
            assert value.dtype == torch.float64, f"{name} must be float64, found {value.dtype}"
            assert value.device.type == device, f"{name} is on {value.device}, the parameters are on {device}"
            assert math.isfinite(float(value)), f"{name} starts at {float(value)}"
        assert float(damping.lam) >= 0, "lambda starts below 0"
        assert float(damping.gamma) > 0, "gamma starts at 0"

    def test_candidates_hold_the_present_gamma(self) -> None:
        """All positive; comparing never forces a change."""
        damping = self.started()
        for step in range(1, _STEPS + 1):
            gammas = [float(g) for g in damping.candidates(step)]
            assert gammas, f"step {step}: no candidate"
            assert all(g > 0 and math.isfinite(g) for g in gammas), f"step {step}: candidates {gammas}"
            assert float(damping.gamma) in gammas, f"step {step}: the present gamma is not among {gammas}"
            if len(gammas) > 1:
                assert type(damping).uses_model, "several candidates are compared by the model: set uses_model = True"

    def test_choice_is_taken_up(self) -> None:
        """The next candidates are around the chosen one."""
        damping = self.started()
        for step in range(1, _STEPS + 1):
            for gamma in damping.candidates(step):
                damping.choose(gamma)
                assert float(damping.gamma) == float(gamma), f"step {step}: choose({float(gamma):g}) had no effect"

    def test_a_better_model_never_raises_lambda(self) -> None:
        """After the same steps: lambda(rho = -inf) >= lambda(1/2) >= lambda(1)."""
        ends = [self.walk(self.started(), rho)[-1][0] for rho in (-math.inf, 0.5, 1.0)]
        assert ends[0] >= ends[1] >= ends[2], f"lambda after rho = -inf, 0.5, 1 is {ends}: the rule is upside down"

    def test_survives_any_ratio(self) -> None:
        """NaN counts as a failure of the model, infinity as what it is; lambda stays finite, double and >= 0."""
        for rho in (math.nan, -math.inf, math.inf, 0.0, -5.0, 1e30):
            damping = self.started()
            for lam, gamma in self.walk(damping, rho):
                assert math.isfinite(lam), f"rho = {rho}: lambda became {lam}"
                assert math.isfinite(gamma), f"rho = {rho}: gamma became {gamma}"
                assert lam >= 0, f"rho = {rho}: lambda became {lam}"
                assert gamma > 0, f"rho = {rho}: gamma became {gamma}"
            assert damping.lam.dtype == torch.float64, f"adapting made lambda {damping.lam.dtype}"
            assert damping.gamma.dtype == torch.float64, f"choosing made gamma {damping.gamma.dtype}"
        failed = self.walk(self.started(), math.nan)[-1][0]
        assert failed >= self.walk(self.started(), 0.5)[-1][0], "a ratio that is not a number lowers lambda"

    def test_adaptation_keeps_double_precision(self) -> None:
        """Not rounded to single precision on the way."""
        first = float(self.started().lam)
        moved = [lam for lam, _ in self.walk(self.started(), 1.0) if lam != first]
        rounded = [lam for lam in moved if float(torch.tensor(lam, dtype=torch.float32)) == lam]
        assert not moved or len(rounded) < len(moved), (
            f"every lambda that was adapted has single precision only, for example {moved[0]!r}: torch.where and "
            "torch.tensor make float32 of plain numbers"
        )

    def test_state_round_trip(self) -> None:
        """Through a file that loads with weights only; the path goes on bit for bit."""
        for rho in (1.0, -math.inf):
            first, second = self.started(), self.started()
            self.walk(first, rho, steps=23)
            second.load_state_dict(reload(first.state_dict()))
            assert self.walk(first, rho, 24) == self.walk(second, rho, 24), "a restored strategy takes another path"

    def test_saved_state_is_a_value(self) -> None:
        """Later steps do not reach it."""
        damping = self.started()
        state = damping.state_dict()
        before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        self.walk(damping, -math.inf)
        for key, value in before.items():
            assert bool(torch.as_tensor(value == state[key]).all()), (
                f"the saved {key} changed when the strategy went on"
            )
