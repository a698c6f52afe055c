"""The preconditioner: when it refreshes, and what it does when a factorisation fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.approx import BlockDiagonalConfig
from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfac_plugins.approx.tridiag import BlockTridiagonal
from kfacore import KFAC
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.errors import ConfigError, NumericalError
from kfacore.plugin import PiRule
from kfacore.roles import Approximation, LayerSamples

Float = torch.float64
SIZES = (4, 5, 3)


def samples(seed: int = 0, sizes: Sequence[int] = SIZES) -> list[LayerSamples]:
    model = dense.net(sizes)
    return dense.case_samples(model, dense.randn(20, sizes[0], seed=seed), dense.randn(1, 20, sizes[-1], seed=seed))


def make(approx: Approximation | None = None, decay: float = 0.95) -> Preconditioner:
    layers = dense.infos(dense.net(SIZES))
    return Preconditioner(approx or BlockDiagonal(), layers, torch.zeros((), dtype=Float), decay)


def gamma(value: float) -> Tensor:
    return torch.tensor(value, dtype=Float)


def test_first_three_steps_and_every_t3_refresh() -> None:
    preconditioner = make(BlockDiagonal(BlockDiagonalConfig(refresh_every=10)))
    preconditioner.update(samples())
    assert preconditioner.due(7)  # nothing to reuse yet
    ((_, inverse),), _ = preconditioner.refresh([gamma(0.1)], pi="layer")
    preconditioner.use(inverse)
    assert [k for k in range(1, 41) if preconditioner.due(k)] == [1, 2, 3, 10, 20, 30, 40]


def test_early_refreshes_come_when_the_step_number_has_grown() -> None:
    """s + max(1, floor(g s)) until that is T_3; the same whatever was asked before."""
    preconditioner = make(BlockDiagonal(BlockDiagonalConfig(refresh_every=10, refresh_growth=0.25)))
    preconditioner.update(samples())
    ((_, inverse),), _ = preconditioner.refresh([gamma(0.1)], pi="layer")
    preconditioner.use(inverse)
    wanted = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 33, 41, 51, 61]
    assert [k for k in range(1, 65) if preconditioner.due(k)] == wanted
    assert preconditioner.due(61)
    assert not preconditioner.due(13)
    assert preconditioner.due(12)


def test_a_share_holds_for_refreshes_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is half of a refresh here: with a third there is one in every four, the second after the first four."""
    monkeypatch.setattr("kfacore.curvature.preconditioner._CHEAP", 0.0)
    preconditioner = make(
        BlockDiagonal(BlockDiagonalConfig(refresh_growth=100.0, refresh_every=1, refresh_share=1 / 3))
    )
    preconditioner.update(samples())
    made = []
    for step in range(1, 14):
        if preconditioner.due(step):
            made.append(step)
            ((_, inverse),), _ = preconditioner.refresh([gamma(0.1)], pi="layer")
            preconditioner.use(inverse)
        cost = preconditioner._background.operations
        assert cost is not None
        preconditioner.spent(0.5001 * cost)
    assert made == [1, 5, 9, 13]


def test_solve_uses_the_inverse_in_use_and_none_other() -> None:
    preconditioner = make()
    preconditioner.update(samples())
    blocks = [dense.randn(*layer.shape) for layer in preconditioner.layers]
    with pytest.raises(ConfigError, match="no inverse yet"):
        preconditioner.solve(blocks)
    made, notices = preconditioner.refresh([gamma(0.1), gamma(1.0)], pi="layer")
    assert [float(g) for g, _ in made] == [0.1, 1.0]
    assert notices == []
    with pytest.raises(ConfigError, match="no inverse yet"):
        preconditioner.solve(blocks)
    preconditioner.use(made[1][1])
    wanted = made[1][1].solve(blocks)
    preconditioner.update(samples(seed=1))  # statistics move, the inverse does not
    assert all(torch.equal(a, b) for a, b in zip(preconditioner.solve(blocks), wanted, strict=True))


@pytest.mark.parametrize("approx", [BlockDiagonal, BlockTridiagonal])
def test_state_round_trip(approx: type[Approximation]) -> None:
    first, second = make(approx()), make(approx())
    first.update(samples())
    ((_, inverse),), _ = first.refresh([gamma(0.1)], pi="layer")
    first.use(inverse)
    first.update(samples(seed=1))
    second.load_state_dict(first.state_dict())
    blocks = [dense.randn(*layer.shape) for layer in first.layers]
    assert all(torch.equal(a, b) for a, b in zip(first.solve(blocks), second.solve(blocks), strict=True))
    for p in (first, second):
        p.update(samples(seed=2))
    ((_, a),), _ = first.refresh([gamma(0.2)], pi="layer")
    ((_, b),), _ = second.refresh([gamma(0.2)], pi="layer")
    assert all(torch.equal(x, y) for x, y in zip(a.solve(blocks), b.solve(blocks), strict=True))


def test_state_before_the_first_refresh() -> None:
    first, second = make(), make()
    first.update(samples())
    second.load_state_dict(first.state_dict())
    assert second.inverse is None
    assert second.moments.updates == 1


class Fragile(BlockDiagonal):
    """Fails for the gammas in `bad`."""

    bad: tuple[float, ...] = ()

    def factorise(self, moments: Any) -> Any:
        real, bad = super().factorise(moments), self.bad

        class Factorisation:
            def damped(self, gamma: Tensor, *, pi: PiRule = "layer") -> Any:
                if float(gamma) in bad:
                    raise NumericalError("deep.layer: factor A could not be factorised")
                return real.damped(gamma, pi=pi)

        return Factorisation()


def test_a_candidate_that_fails_is_left_out_and_reported() -> None:
    approx = Fragile()
    approx.bad = (0.1,)
    preconditioner = make(approx)
    preconditioner.update(samples())
    made, notices = preconditioner.refresh([gamma(0.1), gamma(0.2), gamma(0.3)], pi="layer")
    assert [float(g) for g, _ in made] == [0.2, 0.3]
    (notice,) = notices
    assert notice.layer == "deep.layer"
    assert str(notice) == "deep.layer: factor A could not be factorised (the other candidates were used)"


def test_without_any_inverse_a_failure_is_an_error() -> None:
    approx = Fragile()
    approx.bad = (0.1, 0.2)
    preconditioner = make(approx)
    preconditioner.update(samples())
    with pytest.raises(NumericalError, match=r"^deep\.layer: factor A could not be factorised$"):
        preconditioner.refresh([gamma(0.1), gamma(0.2)], pi="layer")


def test_the_last_good_inverse_is_kept_and_each_failure_counted() -> None:
    approx = Fragile()
    preconditioner = make(approx)
    preconditioner.update(samples())
    ((_, inverse),), _ = preconditioner.refresh([gamma(0.1)], pi="layer")
    preconditioner.use(inverse)
    approx.bad = (0.1, 0.2, 0.3)
    for _ in range(3):
        made, (notice,) = preconditioner.refresh([gamma(0.1), gamma(0.2), gamma(0.3)], pi="layer")
        assert made == []
        assert "the previous inverse was kept" in str(notice)
    assert preconditioner.inverse is inverse


def step_of(optimizer: KFAC, seed: int = 0, n: int = 40) -> Any:
    return optimizer.step(dense.randn(n, SIZES[0], seed=seed), dense.randn(n, SIZES[-1], seed=seed + 50))


def test_in_a_step_the_previous_inverse_keeps_its_gamma() -> None:
    """Three candidates that all fail must not move gamma."""
    approx = Fragile()
    optimizer = KFAC(
        dense.net(SIZES),
        likelihood="gaussian",
        approx=approx,
        damping={"kind": "levenberg-marquardt", "lambda0": 0.1, "gamma_every": 2, "lambda_every": 100},
    )
    step_of(optimizer)
    before = float(optimizer.damping.gamma)
    assert optimizer.preconditioner is not None
    inverse = optimizer.preconditioner.inverse
    approx.bad = tuple(float(g) for g in optimizer.damping.candidates(2))
    report = step_of(optimizer, 1)
    assert float(optimizer.damping.gamma) == before == float(report.gamma)
    assert not report.refreshed
    assert optimizer.preconditioner.inverse is inverse
    assert report.notices == ("deep.layer: factor A could not be factorised (the previous inverse was kept)",)
    approx.bad = ()
    assert step_of(optimizer, 2).refreshed


@pytest.mark.parametrize("between", [nn.Tanh(), nn.PReLU()], ids=["one kind of blocks", "two"])
def test_averages_that_overflowed_start_anew(between: nn.Module) -> None:
    """Finite inputs whose squares are not: the mini-batch after takes the place of what no decay would mend."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), between, nn.Linear(4, 2)).double()
    optimizer = KFAC(net, likelihood="categorical")
    x, y = dense.randn(40, 3), torch.arange(40) % 2
    for _ in range(4):
        optimizer.step(x, y)
    made = optimizer.preconditioner
    assert made is not None
    huge = x.clone()
    huge[7] = 1e200
    reports = [optimizer.step(huge, y)]
    assert not all(bool(value.isfinite().all()) for value, _ in made.moments.averages)
    reports += [optimizer.step(x, y) for _ in range(12)]
    said = [report for report in reports if report.notices]
    assert "previous inverse was kept" in said[0].notices[0]
    assert len(said) == 1
    assert reports[reports.index(said[0]) + 1].refreshed
    assert all(bool(value.isfinite().all()) for value, _ in made.moments.averages)
    assert float(reports[-1].loss) < float(reports[0].loss)


def test_a_step_reports_eigenproblems_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense.net((4, 5, 4, 3)).float()
    optimizer = KFAC(model, likelihood="gaussian", approx={"kind": "tridiag", "power": 1.0})
    x, y = dense.randn(40, 4).float(), dense.randn(40, 3).float()
    assert optimizer.step(x, y).notices == ()
    real, broken = torch.linalg.eigh, {torch.float32}

    def eigh(M: Tensor) -> Any:
        if M.dtype in broken:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(M)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    report = optimizer.step(x, y)
    assert report.refreshed
    assert report.notices == tuple(
        f"{name}: eigenproblem of {side}x failed in float32; used double precision" for side in "AG" for name in "02"
    )
    broken.add(torch.float64)
    report = optimizer.step(x, y)
    assert not report.refreshed
    (notice,) = report.notices
    assert notice.startswith("0: the eigenproblem of Ax failed in double precision")
    assert notice.endswith("(the previous inverse was kept)")
    assert bool(torch.isfinite(report.objective))
    assert optimizer.preconditioner is not None


def fail_cholesky(monkeypatch: pytest.MonkeyPatch, broken: set[torch.dtype], up_to: float = torch.inf) -> None:
    real = torch.linalg.cholesky_ex

    def cholesky_ex(M: Tensor, *, out: tuple[Tensor, Tensor]) -> Any:
        fails = M.dtype in broken and float(M.diagonal().min()) <= up_to  # before it is written over
        L, info = real(M, out=out)
        if fails:
            info.fill_(1)
        return L, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)


def test_choleskys_that_fail_are_tried_in_double_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    approx = {"kind": "blockdiag", "power": 1.0}
    optimizer = KFAC(dense.net(SIZES).float(), likelihood="gaussian", approx=approx)
    x, y = dense.randn(40, 4).float(), dense.randn(40, 3).float()
    broken = {torch.float32}
    fail_cholesky(monkeypatch, broken)
    report = optimizer.step(x, y)
    assert report.notices == tuple(
        f"{name}: factor {side} could not be factorised in float32; used double precision"
        for side in "AG"
        for name in "02"
    )
    broken.add(torch.float64)
    report = optimizer.step(x, y)
    (notice,) = report.notices
    assert notice.startswith("0: factor A could not be factorised even with jitter")
    assert notice.endswith("(the previous inverse was kept)")
    assert not report.refreshed


def test_choleskys_that_never_work_name_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = KFAC(dense.net(SIZES), likelihood="gaussian", approx={"kind": "blockdiag", "power": 1.0})
    fail_cholesky(monkeypatch, {Float})
    with pytest.raises(NumericalError, match=r"^0: factor A could not be factorised even with jitter"):
        step_of(optimizer)


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_inputs_that_are_always_zero_in_single_precision(approx: str) -> None:
    """Like the border pixels of MNIST: 500 dead inputs, fewer cases than inputs, small damping."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 30), nn.Sigmoid(), nn.Linear(30, 600))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    x = torch.zeros(64, 600)
    x[:, 250:350] = torch.rand(64, 100, generator=generator)
    optimizer = KFAC(
        model, likelihood="bernoulli", approx=approx, damping={"kind": "levenberg-marquardt", "lambda0": 1e-3}
    )
    losses = []
    for _ in range(6):
        report = optimizer.step(x, x)
        losses.append(float(report.objective))
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert losses[-1] < losses[0]
