"""The conformance suite of momentum rules."""

from __future__ import annotations

import torch
from torch import Tensor

from kfacore.optim.quadratic import model_value
from kfacore.roles.block import share_of
from kfacore.roles.momentum import Momentum
from kfacore.testing.base import ComponentSuite, differs

__all__ = ["MomentumSuite"]

Float = torch.float64


class MomentumSuite(ComponentSuite):
    """Tests of a momentum rule. Set `name`."""

    slot = "momentum"

    def planes(self, count: int = 8) -> tuple[Tensor, Tensor]:
        """Random regular models, M (c, 2, 2) and b (c, 2), as an optimizer would hand them to this rule."""
        generator = torch.Generator().manual_seed(0)
        roots = torch.randn(count, 2, 3, generator=generator, dtype=Float)
        M, b = roots @ roots.mT, torch.randn(count, 2, generator=generator, dtype=Float)
        if not self.build().uses_previous:
            M[:, 1, :] = M[:, :, 1] = 0.0
            b[:, 1] = 0.0
        return M, b

    def test_one_pair_a_candidate(self) -> None:
        """(c, 2), float64, and each candidate's alone."""
        rule: Momentum = self.build()
        M, b = self.planes()
        found = rule.coefficients(M, b)
        assert tuple(found.shape) == tuple(b.shape), (
            f"coefficients must be {tuple(b.shape)}, found {tuple(found.shape)}"
        )
        assert found.dtype == Float, f"coefficients must be float64, found {found.dtype}"
        for i in range(len(b)):
            alone = rule.coefficients(M[i : i + 1], b[i : i + 1])[0]
            assert torch.equal(alone, found[i]), f"candidate {i} gets other coefficients when it is alone"

    def test_an_unused_direction_gets_nothing(self) -> None:
        """Mu = 0 where there is no previous step, unless the rule knows no model at all."""
        rule: Momentum = self.build()
        M, b = self.planes()
        if rule.uses_previous and not rule.uses_model:  # delta_prev is zero then: any mu is harmless
            self._sees_no_model(rule)
            return
        M[:, 1, :] = M[:, :, 1] = 0.0
        b[:, 1] = 0.0
        assert not bool(rule.coefficients(M, b)[:, 1].any()), "mu is not 0 although delta_prev does not exist"

    def test_steps_go_down_the_model(self) -> None:
        """Where the rule uses the model: its value is never above 0, which staying put would give."""
        rule: Momentum = self.build()
        if not rule.uses_model:
            self._sees_no_model(rule)
            return
        M, b = self.planes()
        worst = float(model_value(M, b, rule.coefficients(M, b)).max())
        assert worst <= 0, f"a step of this rule raises the quadratic model by {worst:.2e}; check the signs of b"

    def test_scale_of_the_proposal_does_not_matter(self) -> None:
        """Where the rule uses the model: alpha Delta is the same for a proposal three times as long."""
        rule: Momentum = self.build()
        if not rule.uses_model:
            self._sees_no_model(rule)
            return
        M, b = self.planes()
        S = torch.diag(torch.tensor([3.0, 1.0], dtype=Float))
        found = rule.coefficients(S @ M @ S, b @ S)
        wanted = rule.coefficients(M, b) @ torch.linalg.inv(S)
        assert differs(found, wanted) < 1e-9, "the step changes with the length of Delta: alpha is not from the model"

    def test_degenerate_planes_stay_finite(self) -> None:
        """Parallel directions, a zero direction, a zero gradient, nothing at all."""
        rule: Momentum = self.build()
        for u, v, g in (
            ([1.0, 2.0], [2.0, 4.0], [1.0, 1.0]),
            ([1.0, 2.0], [0.0, 0.0], [1.0, 1.0]),
            ([0.0, 0.0], [1.0, 2.0], [1.0, 1.0]),
            ([0.0, 0.0], [0.0, 0.0], [1.0, 1.0]),
            ([1.0, 2.0], [1.0, 0.0], [0.0, 0.0]),
        ):
            V = torch.tensor([u, v], dtype=Float)
            found = rule.coefficients((V @ V.T)[None], (V @ torch.tensor(g, dtype=Float))[None])
            assert bool(torch.isfinite(found).all()), f"not finite for Delta = {u}, delta_prev = {v}, gradient {g}"

    def test_arguments_are_left_alone(self) -> None:
        """M and b serve the model value afterwards."""
        M, b = self.planes()
        self.build().coefficients(M, b)
        kept = self.planes()
        assert torch.equal(M, kept[0]), "M was changed in place"
        assert torch.equal(b, kept[1]), "b was changed in place"

    def test_share_of_the_cases(self) -> None:
        """ceil(tau_2 m)."""
        for tau2 in (0.1, 0.25, 1.0):
            rule: Momentum = self.build(tau2=tau2)
            assert rule.cases(21) == share_of(21, tau2), f"tau2 = {tau2}: {rule.cases(21)} of 21 cases"
        rule = self.build(tau2=0.25, min_cases=15)
        assert (rule.cases(21), rule.cases(8)) == (15, 8), "min_cases = 15 of 21 and of 8 cases: not 15 and all"
        assert rule.cases(21, 3) == 10, f"min_cases = 15 of cases with 3 positions each: {rule.cases(21, 3)}, not 10"

    def _sees_no_model(self, rule: Momentum) -> None:
        """A rule that says uses_model = False is given zeros where nothing else needs the model."""
        M, b = self.planes()
        with_model, without = rule.coefficients(M, b), rule.coefficients(0 * M, 0 * b)
        assert torch.equal(with_model, without), "the coefficients change with the model: set uses_model = True"
