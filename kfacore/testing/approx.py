r"""The conformance suite of approximations of the Fisher.

Everything is compared with the dense matrix F-hat that the author writes down from the definition. A failure of that
comparison is looked into: if the matrix agrees with a known mistake (gamma split without pi, no damping, statistics of
an earlier mini-batch, a transposed vec), the message says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from kfacore.errors import NumericalError
from kfacore.host import seed_generators
from kfacore.optim.kfac import KFAC
from kfacore.roles.approx import Approximation
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment
from kfacore.roles.samples import Samples
from kfacore.schema.slots import PiRule
from kfacore.testing.approx_mistakes import PI_RULES, likely_cause
from kfacore.testing.base import ComponentSuite, devices, differs, reload, same
from kfacore.testing.cases import ApproxCase, chain_case, feed

__all__ = ["ApproxSuite"]

_CASES: dict[str, dict[str, Any]] = {
    "narrowing": {"sizes": (4, 3, 2)},
    "widening": {"sizes": (2, 3, 4)},
    "bottleneck without bias": {"sizes": (3, 1, 4, 2), "bias": False},
    "one layer, several passes": {"sizes": (3, 2), "passes": 3},
    "several rows a case": {"sizes": (3, 2, 2), "positions": 3, "cases": 10},
}


class ApproxSuite(ComponentSuite):
    """Tests of an approximation. Set `name` and define `fisher`.

    Attributes:
        tolerance: Largest relative difference from the dense matrices in double precision.
        gammas: Strengths of damping tried.
    """

    slot = "approx"
    tolerance: ClassVar[float] = 1e-10
    gammas: ClassVar[tuple[float, ...]] = (0.05, 0.7)

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        """The damped approximation F-hat, (P, P), from its definition, in double precision.

        Args:
            case: Statistics; `ApproxCase.input_factor`, `ApproxCase.output_factor` and `ApproxCase.damped` give
                second moments, `ApproxCase.per_case` the gradients of each case.
            gamma: Strength of damping.
            pi: How gamma is split, see `kfacore.curvature.linalg.pi_of`.
        """
        # Not an abstract method: pytest would meet a TypeError in every test, not a sentence in those that compare.
        raise NotImplementedError(f"{type(self).__name__} must define fisher(case, gamma, pi=...), the dense F-hat")

    def inverse(self, case: ApproxCase, gamma: float = 0.3, *, pi: PiRule = "layer", **where: Any) -> Inverse:
        """The implementation's inverse of a case."""
        approx: Approximation = self.build()
        strength = torch.tensor(gamma, dtype=torch.float64, device=where.get("device", "cpu"))
        return approx.factorise(case.moments(approx, **where)).damped(strength, pi=pi)

    # --- against the dense matrix --------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", _CASES)
    @pytest.mark.parametrize("pi", PI_RULES)
    def test_multiply_is_the_dense_matrix(self, shape: str, pi: PiRule) -> None:
        """F-hat v, entry by entry."""
        case = chain_case(**_CASES[shape])
        for gamma in self.gammas:
            wanted = self.fisher(case, gamma, pi=pi)
            found = self.inverse(case, gamma, pi=pi).dense(inverse=False)
            self._compare("multiply", found, wanted, case, gamma, pi)

    @pytest.mark.parametrize("shape", _CASES)
    @pytest.mark.parametrize("pi", PI_RULES)
    def test_solve_is_the_dense_inverse(self, shape: str, pi: PiRule) -> None:
        """F-hat^-1 v, entry by entry."""
        case = chain_case(**_CASES[shape])
        for gamma in self.gammas:
            wanted = torch.linalg.inv(self.fisher(case, gamma, pi=pi))
            found = self.inverse(case, gamma, pi=pi).dense()
            self._compare("solve", found, wanted, case, gamma, pi)

    def test_solve_and_multiply_undo_each_other(self) -> None:
        """Also where both are wrong in the same way."""
        case = chain_case((4, 3, 2))
        inverse, v = self.inverse(case), case.blocks()
        for first, second in ((inverse.solve, inverse.multiply), (inverse.multiply, inverse.solve)):
            for layer, a, b in zip(case.layers, second(first(v)), v, strict=True):
                error = differs(a, b)
                assert error < 1e3 * self.tolerance, (
                    f"{layer.name}: solve and multiply are not inverse of each other (off by {error:.1e} relative); "
                    "one of them leaves out damping or a cross term that the other has"
                )

    def test_symmetric(self) -> None:
        """u^T F^-1 v = v^T F^-1 u."""
        for shape in _CASES.values():
            for inverse in (True, False):
                matrix = self.inverse(chain_case(**shape)).dense(inverse=inverse)
                error = differs(matrix.T, matrix)
                assert error < self.tolerance, (
                    f"the matrix of {'solve' if inverse else 'multiply'} is not symmetric (off by {error:.1e} "
                    "relative): look for a missing or misplaced transpose"
                )

    def test_positive_definite(self) -> None:
        """Every update is a descent direction."""
        for shape in _CASES.values():
            matrix = self.inverse(chain_case(**shape), 0.1).dense()
            smallest = float(torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min())
            assert smallest > 0, f"F-hat^-1 has the eigenvalue {smallest:.2e}; a Fisher with damping has none below 0"

    def test_large_gamma_is_plain_gradient_descent(self) -> None:
        """F-hat^-1 -> I / gamma^2: the damping of a block is gamma^2 in all."""
        case, gamma = chain_case((4, 3, 2)), 1e5
        for pi in PI_RULES:
            matrix = self.inverse(case, gamma, pi=pi).dense() * gamma**2
            error = differs(matrix, torch.eye(case.size, dtype=matrix.dtype))
            assert error < 1e-2, (
                f"with gamma = {gamma:g}, F-hat^-1 is not I / gamma^2 (off by {error:.1e} relative); damping must add "
                "gamma^2 to a block in all: pi gamma to one factor and gamma / pi to the other"
            )

    def test_linear(self) -> None:
        """solve(2 u - 3 v) = 2 solve(u) - 3 solve(v)."""
        case = chain_case((4, 3, 2))
        inverse, u, v = self.inverse(case), case.blocks(1), case.blocks(2)
        mixed = inverse.solve([2 * a - 3 * b for a, b in zip(u, v, strict=True)])
        for w, a, b in zip(mixed, inverse.solve(u), inverse.solve(v), strict=True):
            assert differs(w, 2 * a - 3 * b) < 1e3 * self.tolerance, "solve is not linear in the blocks"

    # --- values that stay what they are --------------------------------------------------------------------------

    def test_later_statistics_do_not_show_through(self) -> None:
        """An inverse is of the moments at the time it was made."""
        case = chain_case((4, 3, 2), batches=3)
        approx: Approximation = self.build()
        moments = case.moments(approx, batches=1)
        gamma, v = torch.tensor(0.3, dtype=torch.float64), case.blocks()
        inverse = approx.factorise(moments).damped(gamma)
        before = inverse.solve(v), inverse.multiply(v)
        for samples in case.batches[1:]:
            feed(moments, samples)
        after = inverse.solve(v), inverse.multiply(v)
        assert same(before[0], after[0]), "solve changed when the moments were updated: copy what it keeps of them"
        assert same(before[1], after[1]), "multiply changed when the moments were updated: copy what it keeps of them"
        fresh = approx.factorise(moments).damped(gamma).solve(v)
        assert not same(before[0], fresh), "a new factorisation ignores the moments' last updates: a stale cache?"

    def test_taking_an_inverse_up_does_not_tie_it_to_the_moments(self) -> None:
        """`Moment.refreshed` may take over coordinates; the inverse that brought them stays what it is."""
        case = chain_case((4, 3, 2), batches=4)
        approx: Approximation = self.build()
        moments = case.moments(approx, batches=1)
        other, gamma, v = case.moments(approx), torch.tensor(0.3, dtype=torch.float64), case.blocks()
        kept: list[tuple[Inverse, list[Tensor], list[Tensor]]] = []
        for samples in (*case.batches[1:], None):
            inverse = approx.factorise(moments).damped(gamma)
            kept.append((inverse, inverse.solve(v), inverse.multiply(v)))
            moments.refreshed(inverse)
            if samples is None:
                moments.load_state_dict(other.state_dict())
            else:
                feed(moments, samples)
        for number, (inverse, solved, multiplied) in enumerate(kept, 1):
            assert same(inverse.solve(v), solved), (
                f"inverse {number} solves differently since it was taken up and the moments went on: `refreshed` must "
                "copy what `accumulate` writes to"
            )
            assert same(inverse.multiply(v), multiplied), f"inverse {number} multiplies differently since then"

    def test_candidates_do_not_disturb_each_other(self) -> None:
        """Several gammas from one factorisation, in any order."""
        case = chain_case((4, 3, 2))
        approx: Approximation = self.build()
        factorisation = approx.factorise(case.moments(approx))
        strengths = [torch.tensor(g, dtype=torch.float64) for g in (0.1, 0.5, 2.0)]
        v = case.blocks()
        made = [factorisation.damped(g) for g in strengths]
        for g, inverse in zip(strengths, made, strict=True):
            alone = approx.factorise(case.moments(approx)).damped(g)
            assert same(inverse.solve(v), alone.solve(v)), (
                f"the inverse at gamma = {float(g):g} depends on which others were made: they share something mutable"
            )
        assert not same(made[0].solve(v), made[2].solve(v)), "gamma makes no difference"

    def test_arguments_are_left_alone(self) -> None:
        """Neither blocks nor gamma nor moments are written to."""
        case = chain_case((4, 3, 2))
        approx: Approximation = self.build()
        moments, v, gamma = case.moments(approx), case.blocks(), torch.tensor(0.3, dtype=torch.float64)
        kept = {key: [x.clone() for x in values] for key, values in moments.state_dict()["values"].items()}
        inverse = approx.factorise(moments).damped(gamma)
        first, second = inverse.solve(v), inverse.solve(v)
        inverse.multiply(v)
        assert same(v, case.blocks()), "solve or multiply wrote into the blocks it was given"
        assert float(gamma) == 0.3, "damped changed gamma in place"
        assert same(first, second), "two calls of solve give different results"
        for key, values in moments.state_dict()["values"].items():
            assert same(values, kept[key]), f"the moment {key} was changed by factorising; only updates may change it"

    def test_deterministic(self) -> None:
        """The same statistics give the same inverse, bit for bit."""
        case = chain_case((4, 3, 2))
        v = case.blocks()
        assert same(self.inverse(case).solve(v), self.inverse(case).solve(v)), "two builds give different inverses"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_state_round_trip(self, dtype: torch.dtype) -> None:
        """Through a file that loads with weights only, bit for bit, and into a fresh instance."""
        case = chain_case((4, 3, 2))
        inverse, v = self.inverse(case, dtype=dtype), case.blocks(dtype=dtype)
        other: Approximation = self.build()
        restored = other.load_inverse(reload(inverse.state_dict()), case.layers)
        assert same(inverse.solve(v), restored.solve(v)), "a restored inverse solves differently: is its state whole?"
        assert same(inverse.multiply(v), restored.multiply(v)), "a restored inverse multiplies differently"
        assert same(inverse.solve(v), other.load_inverse(restored.state_dict(), case.layers).solve(v)), (
            "the state of a restored inverse is not the state it was restored from"
        )

    # --- parts of a mini-batch, blocks that saw nothing, other neighbours -------------------------------------------

    def test_parts_of_a_mini_batch_are_the_mini_batch(self) -> None:
        """`Moments.add` of micro-batches and one `Moments.commit`."""
        case, gamma = chain_case((4, 3, 2), batches=1, passes=2), torch.tensor(0.3, dtype=torch.float64)
        approx: Approximation = self.build()
        whole, parts = case.moments(approx), case.moments(approx, batches=0)
        (samples,) = case.batches
        for rows in (slice(0, 7), slice(7, 8), slice(8, None)):
            parts.add([replace(s, inputs=s.inputs[rows], gradients=s.gradients[:, rows]) for s in samples])
        parts.commit(0.999)
        wanted = approx.factorise(whole).damped(gamma).solve(case.blocks())
        found = approx.factorise(parts).damped(gamma).solve(case.blocks())
        for layer, a, b in zip(case.layers, found, wanted, strict=True):
            assert differs(a, b) < 1e3 * self.tolerance, (
                f"{layer.name}: a mini-batch in three parts is not the mini-batch; `accumulate` must write to the "
                "values that it is given and use beta and alpha as they are, and `tallies` must tell the sums' divisors"
            )

    def test_a_block_that_saw_nothing_keeps_its_average(self) -> None:
        """Its samples are None; with None for all, nothing changes."""
        case, gamma = chain_case((4, 3, 2), batches=2), torch.tensor(0.3, dtype=torch.float64)
        approx: Approximation = self.build()
        moments = case.moments(approx, batches=1)
        v = case.blocks()
        before = approx.factorise(moments).damped(gamma).solve(v)
        nothing: Samples = [None for _ in case.layers]
        moments.update(nothing, 0.5)
        after = approx.factorise(moments).damped(gamma).solve(v)
        for a, b in zip(before, after, strict=True):
            assert differs(a, b) < 1e3 * self.tolerance, (
                "statistics of a mini-batch in which no block was used changed it"
            )
        feed(moments, [case.batches[1][0], None])
        inverse = approx.factorise(moments).damped(gamma)
        for layer, a, b in zip(case.layers, inverse.multiply(inverse.solve(v)), v, strict=True):
            assert differs(a, b) < 1e3 * self.tolerance, f"{layer.name}: wrong once a block saw nothing in a mini-batch"

    def test_any_pairs_will_do(self) -> None:
        """The network says which blocks follow each other: a forest, of which a chain is one."""
        case, gamma = chain_case((3, 3, 2, 2), batches=1), torch.tensor(0.3, dtype=torch.float64)
        approx: Approximation = self.build()
        for pairs in ([], [(1, 0), (1, 2)], [(0, 2)]):
            inverse = approx.factorise(case.moments(approx, pairs=pairs)).damped(gamma)
            matrix, product = inverse.dense(), inverse.dense(inverse=False)
            error = differs(matrix @ product, torch.eye(case.size, dtype=matrix.dtype))
            assert error < 1e3 * self.tolerance, (
                f"with the pairs {pairs} solve and multiply are not inverse of each other (off by {error:.1e} relative)"
            )
            smallest = float(torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min())
            assert smallest > 0, f"with the pairs {pairs} F-hat^-1 has the eigenvalue {smallest:.2e}"

    # --- dtype, device, degenerate statistics ----------------------------------------------------------------------

    @pytest.mark.parametrize("device", devices())
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_dtype_and_device_are_kept(self, dtype: torch.dtype, device: str) -> None:
        """Blocks in, blocks out, whatever dtype gamma has."""
        case = chain_case((4, 3, 2))
        inverse, v = self.inverse(case, dtype=dtype, device=device), case.blocks(dtype=dtype, device=device)
        for what, blocks in (("solve", inverse.solve(v)), ("multiply", inverse.multiply(v))):
            for layer, block in zip(case.layers, blocks, strict=True):
                assert tuple(block.shape) == layer.shape, (
                    f"{what} returns shape {tuple(block.shape)} for {layer.name}, whose block is {layer.shape}"
                )
                assert block.dtype == dtype, f"{what} returns {block.dtype} for {layer.name}, the blocks are {dtype}"
                assert block.device.type == device, f"{what} returns {layer.name} on {block.device}, not on {device}"
        wanted = self.inverse(case).solve(case.blocks())
        limit = 1e-3 if dtype == torch.float32 else 1e-9
        for a, b in zip(inverse.solve(v), wanted, strict=True):
            assert differs(a, b) < limit, f"in {dtype} on {device} the result is another one"

    def test_zero_gradient(self) -> None:
        """F-hat^-1 0 = 0, exactly."""
        case = chain_case((4, 3, 2))
        blocks = self.inverse(case).solve([torch.zeros_like(v) for v in case.blocks()])
        assert all(not bool(block.any()) for block in blocks), "the zero gradient has a preconditioned gradient"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(
        "kind",
        [
            {"dead": True},
            {"cases": 2, "batches": 1},
            {"cases": 1, "batches": 1},
            {"cases": 1, "batches": 1, "dead": True},
        ],
        ids=["dead units", "rank-deficient", "batch of one", "batch of one with dead units"],
    )
    def test_degenerate_statistics(self, kind: dict[str, Any], dtype: torch.dtype) -> None:
        """Singular factors with damping are no problem: finite, and a descent direction."""
        case = chain_case((5, 4, 3), **kind)
        v = case.blocks(dtype=dtype)
        for gamma in (1e-2, 0.5):
            solved = self.inverse(case, gamma, dtype=dtype).solve(v)
            for layer, block in zip(case.layers, solved, strict=True):
                assert bool(torch.isfinite(block).all()), f"{layer.name}: not finite at gamma = {gamma:g}"
            slope = sum(float((a * b).sum()) for a, b in zip(v, solved, strict=True))
            assert slope > 0, f"v^T F-hat^-1 v = {slope:.2e} at gamma = {gamma:g}: no descent direction"

    def test_statistics_that_are_not_finite_are_named(self) -> None:
        """NumericalError with the layer's name, not a result."""
        case = chain_case((4, 3, 2), batches=1)
        case.batches[0][1].inputs[0, 0] = torch.nan
        try:
            self.inverse(case)
        except NumericalError as error:
            message = str(error)
        else:
            pytest.fail(
                "statistics with a NaN gave an inverse; check the result and raise NumericalError for the layer"
            )
        names = [layer.name for layer in case.layers]
        assert any(name in message for name in names), f"the message names no layer of {', '.join(names)}: {message}"

    def test_declares_its_moments(self) -> None:
        """Moment classes and a known structure."""
        approx: Approximation = self.build()
        assert approx.moments, "an approximation without moments sees no statistics"
        wrong = [kind for kind in approx.moments if not (isinstance(kind, type) and issubclass(kind, Moment))]
        assert not wrong, f"moments must be subclasses of kfacore.curvature.moments.Moment, found {wrong}"
        assert approx.structure in ("any", "chain"), f"structure is 'any' or 'chain', found {approx.structure!r}"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_trains_a_small_net(self, dtype: torch.dtype) -> None:
        """In a whole optimizer: the objective falls, and a run resumed from a file is the run that never stopped."""
        (first, x, y), (second, _, _) = (self._training(dtype) for _ in range(2))
        losses = [float(first.step(x, y).objective) for _ in range(8)]
        assert losses[-1] < losses[0], f"eight steps take the objective from {losses[0]:.4g} to {losses[-1]:.4g}"
        second.model.load_state_dict(reload(first.model.state_dict()))
        second.load_state_dict(reload(first.state_dict()))
        ends = [[float(optimizer.step(x, y).objective) for _ in range(8)] for optimizer in (first, second)]
        assert ends[0] == ends[1], (
            "a resumed run takes another path: something is missing from the inverse's state_dict or from the values "
            "of a moment, or a tensor's memory is laid out in another order than when it is loaded (make it contiguous)"
        )

    def _training(self, dtype: torch.dtype) -> tuple[KFAC, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            seed_generators(0)
            model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
        x = torch.randn(50, 4, generator=generator).to(dtype)
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
        return KFAC(model, likelihood="gaussian", approx=self.build(refresh_every=3)), x, y

    # --- looking into a difference ---------------------------------------------------------------------------------

    def _compare(self, what: str, found: Tensor, wanted: Tensor, case: ApproxCase, gamma: float, pi: PiRule) -> None:
        error = differs(found, wanted)
        if error >= self.tolerance:
            why = likely_cause(self.fisher, what, found, wanted, case, gamma, pi)
            pytest.fail(
                f"{what} differs from the dense matrix by {error:.1e} relative at gamma = {gamma:g}, pi = {pi!r}; {why}"
            )
