"""The conformance suite of rules of trust."""

from __future__ import annotations

import math

import torch

from kfacore.roles.trust import Trust
from kfacore.testing.base import ComponentSuite, reload

__all__ = ["TrustSuite"]


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


class TrustSuite(ComponentSuite):
    """Tests of a rule of trust. Set `name`."""

    slot = "trust"

    def test_a_step_down_is_kept(self) -> None:
        """Whatever the scale of the objective."""
        rule: Trust = self.build()
        for scale in (1e-6, 1.0, 1e6):
            kept = rule.accepts(_scalar(scale), _scalar(-0.1 * scale))
            assert bool(kept), f"a step that takes h from {scale:g} to {0.9 * scale:g} is undone"

    def test_the_verdict_is_a_scalar_on_the_device(self) -> None:
        """Bool, (): the caller decides whether to wait for it."""
        kept = self.build().accepts(_scalar(1.0), _scalar(0.5))
        assert isinstance(kept, torch.Tensor), f"accepts must return a tensor, found a {type(kept).__name__}"
        assert kept.dtype == torch.bool, f"accepts must return a bool tensor, found {kept.dtype}"
        assert kept.shape == (), f"accepts must return a scalar tensor, found shape {tuple(kept.shape)}"

    def test_a_rule_that_undoes_undoes_what_is_not_finite(self) -> None:
        """NaN is no change to keep, and neither is infinity."""
        rule: Trust = self.build()
        if bool(rule.accepts(_scalar(1.0), _scalar(1e3))):
            return  # it takes every step
        for change in (math.nan, math.inf):
            assert not bool(rule.accepts(_scalar(1.0), _scalar(change))), f"a change of h by {change} is kept"

    def test_attempts_are_counted(self) -> None:
        """One at least in every step."""
        rule: Trust = self.build()
        for step in (1, 2, 50):
            assert rule.attempts(step) >= 1, f"step {step} may not be tried at all"

    def test_lambda_is_raised_by_what_undoes(self) -> None:
        """The factors are above 1: with the same lambda the same step would come again."""
        rule: Trust = self.build()
        assert rule.early > 1, f"early must be above 1, found {rule.early}"
        assert rule.late > 1, f"late must be above 1, found {rule.late}"

    def test_looking_back_needs_a_better_place(self) -> None:
        """A step is not disowned where the mini-batch is no better off without it."""
        rule: Trust = self.build()
        for objective in (1.0, 1.1, 0.9, 1.0):
            rule.saw(objective)
        assert not rule.disowns(2.0, 2.0), "a step without effect on a new mini-batch is undone"
        assert not rule.disowns(2.0, math.nan), "a step is undone for a place that is not finite"
        if not rule.looks_back:
            assert not rule.doubts(1e9), "a rule that does not look back has doubts"

    def test_state_round_trip(self) -> None:
        """Through a file: a restored rule asks and doubts like the one that was saved."""
        rule: Trust = self.build()
        for step, objective in enumerate((1.0, 1.2, 0.8, 0.9, 1.1), start=1):
            rule.saw(objective)
            rule.judged(step, step != 4)
        other: Trust = self.build()
        other.load_state_dict(reload(rule.state_dict()))
        assert [rule.asks(k) for k in range(1, 60)] == [other.asks(k) for k in range(1, 60)], "it asks at other steps"
        for objective in (0.5, 1.4, 1.6, 50.0):
            assert rule.doubts(objective) == other.doubts(objective), f"it doubts h = {objective} differently"
