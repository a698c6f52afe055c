"""Steps that raise the objective are undone: the rule, and what the optimizer makes of it."""

from __future__ import annotations

import math
from copy import deepcopy

import dense
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.trust import UndoConfig
from kfac_plugins.trust.undo import Undo
from kfacore import KFAC, DataError, host
from kfacore.roles.optimizer import StepReport

Float = torch.float64


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=Float)


def test_what_raises_the_objective_goes() -> None:
    rule = Undo()
    assert bool(rule.accepts(scalar(2.0), scalar(-1e-9)))
    assert bool(rule.accepts(scalar(2.0), scalar(1e-6)))  # rounding of float32 losses
    assert not bool(rule.accepts(scalar(2.0), scalar(1e-5)))


def test_a_bold_step_keeps_a_quarter_of_its_promise() -> None:
    rule = Undo()
    for unit in (1e-6, 1.0, 1e6):
        for change, predicted, kept in ((-0.1, -2.0, False), (-0.5, -2.0, True), (-0.01, -0.4, True)):
            assert bool(rule.believes(scalar(unit), scalar(unit * change), scalar(unit * predicted))) is kept
    assert bool(rule.believes(scalar(-1.0), scalar(-0.1), scalar(-0.4)))  # densities may have a negative h
    assert not bool(rule.believes(scalar(1.0), scalar(-0.1), scalar(-math.inf)))


def test_a_step_that_breaks_its_promise_is_undone() -> None:
    """h falls on its own mini-batch, by less than a quarter of what the model promised of a bold step."""

    class Sceptic(Undo):
        def believes(self, before: Tensor, change: Tensor, predicted: Tensor) -> Tensor:
            seen.append((float(before), float(change), float(predicted)))
            return super().believes(before, change, 1e3 * predicted)

    seen: list[tuple[float, float, float]] = []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = dense.randn(30, 4), dense.randn(30, 2)
    before = [p.clone() for p in model.parameters()]
    report = KFAC(model, likelihood="gaussian", trust=Sceptic(UndoConfig(attempts=1))).step(x, y)
    assert not bool(report.accepted)
    assert report.undone == len(seen) == 1
    assert all(change < 0 and predicted < 0 for _, change, predicted in seen)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_steps_are_asked_about_while_they_are_new() -> None:
    rule = Undo(UndoConfig(settling=4))
    assert [rule.asks(k) for k in (1, 4, 5, 30)] == [True, True, False, False]
    rule.judged(28, False)
    assert [rule.asks(k) for k in (29, 32, 33)] == [True, True, False]
    rule.judged(40, True)
    assert not rule.asks(41)


def test_doubt_is_relative_to_the_last_ten() -> None:
    rule = Undo()
    assert not rule.doubts(1e9)  # nothing is known yet
    assert rule.doubts(math.nan)
    for _ in range(20):
        rule.saw(4.0)
    rule.saw(math.inf)  # not remembered
    assert not rule.doubts(5.9)
    assert rule.doubts(6.1)
    assert rule.disowns(6.1, 5.0)
    assert not rule.disowns(6.1, 5.5)


def steep() -> tuple[KFAC, Tensor, Tensor]:
    """A net on which a first lambda of nearly nothing sends the first step far away."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = 5.0 * dense.randn(40, 4, seed=2)
    damping = {"kind": "levenberg-marquardt", "lambda0": 1e-12, "gamma_rule": "tied"}
    return KFAC(model, likelihood="categorical", damping=damping), x, x[:, :3].argmax(1)


def test_the_first_lambda_is_tried() -> None:
    optimizer, x, y = steep()
    before = float(optimizer.step(x, y).objective)
    assert bool(optimizer.step(x, y).objective < before)
    optimizer, x, y = steep()
    report = optimizer.step(x, y)
    raised = float(optimizer.damping.lam) / 1e-12
    assert report.undone > 0
    assert bool(report.accepted)
    assert raised == pytest.approx(10.0**report.undone, rel=1e-9)


def along(length: float, kept: float = 1.0) -> tuple[KFAC, StepReport, Tensor, float]:
    """A linear net after a step to the minimum and one `length` times too long: h is a parabola along both."""
    optimizer = KFAC(
        nn.Linear(4, 3).double(),
        likelihood="gaussian",
        damping={"kind": "levenberg-marquardt", "lambda0": 1e-9},
        weight_decay=0.0,
    )
    with torch.no_grad():
        for parameter in optimizer.model.parameters():
            parameter.copy_(dense.randn(*parameter.shape, seed=3))
    optimizer.step(dense.randn(60, 4, seed=1), dense.randn(60, 3, seed=2))
    lam, coefficients = float(optimizer.damping.lam), optimizer.momentum.coefficients
    optimizer.momentum.coefficients = lambda M, b: length * coefficients(M, b)  # type: ignore[method-assign]
    report = optimizer.step(dense.randn(60, 4, seed=4), dense.randn(60, 3, seed=5))
    return optimizer, report, dense.theta(optimizer.model), float(optimizer.damping.lam) / lam


def test_a_step_that_is_too_long_is_shortened_to_the_minimum() -> None:
    _, right, theta, _ = along(1.0)
    optimizer, report, shortened, raised = along(4.0)
    assert torch.allclose(shortened, theta, rtol=0.0, atol=1e-7)  # lambda is not nothing
    assert bool(report.accepted)
    assert (report.undone, raised) == (0, pytest.approx(4.0, rel=1e-6))
    assert torch.allclose(torch.stack([report.alpha, report.mu]), torch.stack([right.alpha, right.mu]), rtol=1e-6)
    assert optimizer.trust.asks(12), "the next ten are asked about"


def test_a_step_that_is_much_too_long_is_undone() -> None:
    """A parabola through a point far away says little about what is here."""
    optimizer, report, _, raised = along(20.0)
    assert (report.undone, bool(report.accepted), raised) == (1, False, pytest.approx(10.0))
    assert not bool(optimizer._directions.delta.flat.any())  # type: ignore[union-attr]


def test_an_undone_step_leaves_the_parameters_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, x, y = steep()
    for _ in range(3):
        optimizer.step(x, y)
    monkeypatch.setattr(Undo, "accepts", lambda self, before, change: torch.zeros((), dtype=torch.bool))
    before, lam = dense.theta(optimizer.model), float(optimizer.damping.lam)
    report = optimizer.step(x, y)
    assert not bool(report.accepted)
    assert torch.equal(before, dense.theta(optimizer.model))
    assert optimizer._directions.delta is not None
    assert not bool(optimizer._directions.delta.flat.any())
    assert float(optimizer.damping.lam) == pytest.approx(10.0 * lam, rel=1e-9)


@pytest.mark.parametrize("reads", [True, False])
def test_host_and_device_undo_alike(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """Where the host would wait in an ordinary step, the device puts the parameters back by itself."""
    optimizer, x, y = steep()
    optimizer.trust = Undo(UndoConfig(settling=1))
    optimizer.step(x, y)
    monkeypatch.setattr(host, "is_free", lambda value: reads)
    model = optimizer._iteration._model
    monkeypatch.setattr(optimizer._iteration, "_model", lambda *given: tuple(part * math.nan for part in model(*given)))
    before = dense.theta(optimizer.model)
    report = optimizer.step(x, y)
    assert not bool(report.accepted)
    assert torch.equal(before, dense.theta(optimizer.model))
    assert optimizer._directions.delta is not None
    assert not bool(optimizer._directions.delta.flat.any())


def test_a_step_that_harmed_is_undone_by_the_next_mini_batch() -> None:
    optimizer, x, y = steep()
    for _ in range(6):
        optimizer.step(x, y)
    good = dense.theta(optimizer.model)
    optimizer.step(x, y)
    with torch.no_grad():  # as if that step had gone wrong where its own mini-batch did not see it
        for parameter in optimizer.model.parameters():
            parameter.mul_(-3.0)
    before = [view.clone() for view in optimizer._iteration.keeper._copies]
    report = optimizer.step(x, y)
    assert any("step 7 was undone" in notice for notice in report.notices)
    assert torch.equal(torch.cat([view.flatten() for view in before]).sort().values, good.flatten().sort().values)
    assert float(report.objective) < 1.0


def test_not_a_number_in_the_data_never_reaches_the_parameters() -> None:
    optimizer, x, y = steep()
    for k in range(1, 30):
        wrong = x.clone()
        if k == 23:
            wrong[3, 2] = math.nan
            with pytest.raises(DataError, match="mini-batch of step 23"):
                optimizer.step(wrong, y)
            break
        optimizer.step(wrong, y)
    assert all(bool(parameter.isfinite().all()) for parameter in optimizer.model.parameters())


def test_a_resumed_run_asks_and_doubts_as_before() -> None:
    runs = []
    for stop in (None, 1, 7):
        optimizer, x, y = steep()
        for k in range(1, 16):
            if k == stop:
                saved, model = optimizer.state_dict(), optimizer.model.state_dict()
                optimizer, x, y = steep()
                optimizer.model.load_state_dict(model)
                optimizer.load_state_dict(saved)
            n = 20 + k
            optimizer.step(x[:n], y[:n])
        runs.append(dense.theta(optimizer.model))
    assert all(torch.equal(runs[0], other) for other in runs[1:])


def test_a_step_that_promises_most_of_the_objective_is_asked_about() -> None:
    rule = Undo(UndoConfig(bold=0.5))
    assert not rule.wonders(2.0, -0.9)
    assert rule.wonders(2.0, -1.1)
    assert rule.wonders(2.0, math.nan)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = dense.randn(40, 4), dense.randn(40, 3, seed=1)
    for bold, asked in ((1e-12, [True] * 4), (1e12, [True, False, False, False])):
        optimizer = KFAC(deepcopy(model), likelihood="gaussian", trust={"kind": "undo", "settling": 1, "bold": bold})
        assert [optimizer.step(x, y).rho is not None for _ in range(4)] == asked


def noisy(step: int) -> tuple[Tensor, Tensor]:
    """Mini-batches of eight, half of their labels at random: what they ask for is mostly their own noise."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=generator, dtype=Float)
    wild = torch.randint(0, 3, (8,), generator=generator)
    return x, torch.where(torch.rand(8, generator=generator) < 0.5, wild, x[:, :3].argmax(1))


def trained(steps: int, **options: object) -> tuple[Tensor, list[StepReport]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).to(Float)
    optimizer = KFAC(model, likelihood="categorical", **options)
    reports = [optimizer.step(*noisy(k)) for k in range(steps)]
    return dense.theta(model).clone(), reports


def test_on_a_device_trust_decides_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in steps in which nothing else is read: there a run would fall apart otherwise."""
    wanted, reports = trained(60)
    assert sum(not report.accepted or report.undone > 0 or bool(report.notices) for report in reports[15:]) > 0
    monkeypatch.setattr(host, "is_free", lambda value: False)
    found, _ = trained(60)
    assert dense.relative(found, wanted) < 1e-6
    alone, _ = trained(60, trust={"kind": "undo", "every_step": False})
    assert dense.relative(alone, wanted) > 1e-2, "the device alone decides otherwise"
