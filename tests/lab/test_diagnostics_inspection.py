"""Inspecting whole problems and runs: what is measured, what is skipped, and where it comes from."""

from __future__ import annotations

import re

import pytest
import torch
from dense import Float, net, randn
from small_runs import run, small_config
from torch import nn

from kfacore.errors import ConfigError, DataError, NumericalError, UnsupportedModelError
from kfacore.lab.diagnostics import inspection
from kfacore.lab.diagnostics.exact import ExactModel
from kfacore.lab.diagnostics.inspection import inspect_subject, stretch
from kfacore.lab.diagnostics.matrices import dense_report
from kfacore.lab.diagnostics.natural import natural_gradient
from kfacore.lab.diagnostics.quality import UpdateQuality, measure_update
from kfacore.lab.diagnostics.subject import Subject, subject_at_start, subject_of_run, training_cases
from kfacore.lab.diagnostics.verdict import verdict
from kfacore.lab.training.checkpoint import load_checkpoint
from kfacore.lab.training.resume import resume_config
from kfacore.optim.guest_state import own_state
from kfacore.registry import get_registry
from kfacore.roles.block import Block

NAMES = ("blockdiag", "tridiag")


def approximations(*names):
    return {name: get_registry().build("approx", name) for name in names or NAMES}


def subject(likelihood="bernoulli", sizes=(5, 4, 3, 4), cases=60, model=None, gamma=0.1):
    x, y = randn(cases, sizes[0], seed=1), torch.sigmoid(randn(cases, sizes[-1], seed=2))
    if likelihood == "categorical":
        y = torch.arange(cases) % sizes[-1]
    exact = ExactModel(
        model or net(sizes), get_registry().build("likelihood", likelihood), x, y, weight_decay=1e-5, lam=0.01
    )
    return Subject("a net", "test", 0, exact, gamma, "layer", 0)


def test_everything_is_measured_on_a_small_net():
    said = []
    found = inspect_subject(subject(), get_registry(), approximations(), say=said.append)
    assert found.skipped == {}
    assert found.statistics.startswith("exact")
    assert found.natural.converged
    assert {row.approx for row in found.quality} == set(NAMES)
    assert len(found.quality) == 2 * 13
    assert [row.approx for row in found.at_gamma()] == list(NAMES)
    for row in found.quality:
        assert row.unscaled <= row.rescaled <= 1.0 + 1e-9
        assert -1.0 <= row.cosine <= 1.0 + 1e-9
    assert found.dense is not None
    assert found.dense.sizes == [24, 15, 16]
    assert found.dense.cumulants is not None
    assert found.dense.cumulants.mismatch < 1e-10
    for report in found.invariance:
        assert report.notices == ()
        assert report.undamped.worst < 1e-7
        assert report.damped.first > 1e-3
    assert any("natural gradient" in line for line in said)
    assert found.as_dict()["natural_gradient"]["converged"] is True


def test_the_tridiagonal_inverse_is_nearer_than_the_block_diagonal_one():
    found = inspect_subject(subject(), get_registry(), approximations(), parts=("quality", "dense"))
    assert found.invariance == []
    errors = found.dense.errors
    for name in NAMES:
        assert errors[f"{name} / F-tilde"].diagonal < 1e-10
    assert errors["tridiag^-1 / F-tilde^-1"].frobenius < errors["blockdiag^-1 / F-tilde^-1"].frobenius
    assert (
        errors["tridiag^-1 / F-tilde^-1, undamped"].frobenius < errors["blockdiag^-1 / F-tilde^-1, undamped"].frobenius
    )
    assert errors["blockdiag / F-tilde"].off_diagonal == pytest.approx(1.0)
    assert errors["tridiag / F-tilde"].off_diagonal < 0.9


def test_singular_factors_are_reported_rather_than_inverted():
    found = inspect_subject(subject("categorical"), get_registry(), approximations("blockdiag"), gammas=[0.1])
    reason = found.dense.refused["undamped inverses"]
    assert "has no inverse" in reason
    assert "blockdiag^-1 / F-tilde^-1, undamped" not in found.dense.errors
    [report] = found.invariance
    assert report.notices  # so that nobody takes the undamped distance for a failure of Theorem 1


def test_one_approximation_that_cannot_step_without_damping_does_not_stop_the_others():
    blockdiag = get_registry().build("approx", "blockdiag")

    class Picky(type(blockdiag)):
        def factorise(self, moments):
            made = super().factorise(moments)

            class Made:
                def damped(self, gamma, *, pi="layer"):
                    if float(gamma) == 0.0:
                        raise NumericalError("0: not without damping")
                    return made.damped(gamma, pi=pi)

            return Made()

    both = {"picky": Picky(blockdiag.config), "blockdiag": blockdiag}
    found = inspect_subject(subject(), get_registry(), both, gammas=[0.1])
    assert [report.approx for report in found.invariance] == ["blockdiag"]
    assert "not without damping" in found.skipped["invariance of picky"]
    assert "not without damping" in found.dense.refused["picky^-1 / F-tilde^-1, undamped"]


def test_dear_approximations_are_measured_at_three_gammas(monkeypatch):
    monkeypatch.setattr(inspection, "_DEAR", -1.0)
    found = inspect_subject(subject(), get_registry(), approximations("blockdiag"), parts=("quality",))
    assert [row.gamma for row in found.quality] == pytest.approx([0.01, 0.1, 1.0])
    assert "CPU time" in found.skipped["other gammas of blockdiag"]


def test_what_does_not_apply_is_left_out_with_its_reason():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, dtype=Float), nn.Linear(4, 4, dtype=Float)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    found = inspect_subject(subject(sizes=(4, 4), model=Custom()), get_registry(), approximations("blockdiag"))
    assert "nn.Sequential" in found.skipped["invariance"]

    class Refuses(type(get_registry().build("approx", "blockdiag"))):
        def factorise(self, moments):
            raise UnsupportedModelError("0: not this net")

    both = {**approximations("blockdiag"), "picky": Refuses()}
    found = inspect_subject(subject(), get_registry(), both, gammas=[0.1])
    assert found.skipped == {"picky": "0: not this net"}
    assert {row.approx for row in found.quality} == {"blockdiag"}
    with pytest.raises(ConfigError, match="picky: 0: not this net"):
        inspect_subject(subject(), get_registry(), {"picky": Refuses()}, gammas=[0.1])


def test_which_layers_get_dense_matrices():
    def info(size):
        return Block("x", size, 1, bias=False)

    assert stretch([info(5140), info(420), info(420), info(420), info(210)]) == (2, 5)
    assert stretch([info(100), info(100)], limit=200) == (1, 2)
    assert stretch([info(100), info(101)], limit=200) is None
    assert stretch([info(10), info(20), info(500), info(30), info(40)], limit=100) == (4, 5)
    with pytest.raises(ConfigError, match="layers 1 to 3"):
        inspect_subject(subject(), get_registry(), approximations(), layers=(2, 4))
    found = inspect_subject(subject(), get_registry(), approximations(), layers=(2, 3), gammas=[0.1], parts=("dense",))
    assert found.dense.first == 2
    assert found.dense.sizes == [15, 16]


def test_dense_errors_of_a_part_are_those_of_its_own_matrices():
    exact = subject().exact
    samples = exact.exact_samples()[1:]
    report = dense_report(exact.layers[1:], samples, approximations(), 0.1, first=2)
    error = report.F - report.F_tilde
    assert report.errors["F-tilde / F"].frobenius == pytest.approx(float(error.norm() / report.F.norm()))
    torch.testing.assert_close(report.F_tilde_inverse @ report.F_tilde_damped, torch.eye(31, dtype=Float))
    difference = report.inverses["tridiag"] - report.F_tilde_inverse
    wanted = float(difference.norm() / report.F_tilde_inverse.norm())
    assert report.errors["tridiag^-1 / F-tilde^-1"].frobenius == pytest.approx(wanted)


def test_a_problem_at_its_initialisation(tmp_path):
    config = small_config(tmp_path)
    found = subject_at_start(config, get_registry(), cases=40)
    assert found.exact.cases == 40
    assert found.step == 0
    # The default's lambda is a share of the curvature, as in a run's first step; a given one is what it is.
    assert config.damping.lambda0 is None
    assert 0.0 < found.exact.lam < 1.0
    assert found.gamma == pytest.approx((found.exact.lam + config.weight_decay) ** 0.5)
    damping = config.damping.model_copy(update={"lambda0": 0.3})
    given = subject_at_start(config.model_copy(update={"damping": damping}), get_registry(), cases=40)
    assert given.exact.lam == 0.3
    again = subject_at_start(config, get_registry(), cases=40, lam=0.5, gamma=0.2)
    assert (again.exact.lam, again.gamma) == (0.5, 0.2)
    assert torch.equal(again.exact.inputs, found.exact.inputs)
    with pytest.raises(ConfigError, match="--gamma"):
        subject_at_start(config, get_registry(), cases=40, gamma=0.0)


def test_a_run_is_inspected_where_it_stopped(tmp_path):
    result = run(tmp_path, "a")
    folder = tmp_path / "a"
    config = resume_config(get_registry(), folder)
    found = subject_of_run(folder, config, get_registry(), cases=1000)
    checkpoint = load_checkpoint(folder / "checkpoint.pt")
    assert found.step == result.step == 20
    assert found.name == "a at step 20"
    assert found.exact.cases == 60  # there are no more
    assert found.gamma == float(own_state(checkpoint.optimizer)["damping"]["gamma"])
    assert found.exact.lam == float(own_state(checkpoint.optimizer)["damping"]["lam"])
    weights = found.exact.theta()[0][:, :-1]
    torch.testing.assert_close(weights, next(iter(checkpoint.model.values())).double())
    start = subject_at_start(config, get_registry(), cases=1000)
    assert found.exact.objective < start.exact.objective


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path, "a")
    config = small_config(tmp_path, "problem.sizes=[7, 3, 7]")
    with pytest.raises(DataError, match="do not fit the model"):
        subject_of_run(tmp_path / "a", config, get_registry(), cases=10)


def test_the_choice_of_cases():
    x = torch.arange(20.0)[:, None]
    inputs, targets = training_cases(x, x, 7, seed=3)
    assert targets is inputs
    assert len(set(inputs[:, 0].tolist())) == 7
    y = torch.arange(20)
    inputs, targets = training_cases(x, y, 7, seed=3)
    assert torch.equal(inputs[:, 0].long(), targets)
    assert not torch.equal(training_cases(x, y, 7, seed=4)[1], targets)
    assert training_cases(x, y, 20, seed=3)[0] is x


# Approximations that fail, and the answer ---------------------------------------------------------------------------


def failing(how):
    blockdiag = get_registry().build("approx", "blockdiag")

    class Inverting:
        notices = ()

        def __init__(self, made):
            self.made = made

        def solve(self, blocks):
            return how(self.made.solve(blocks))

    class Failing(type(blockdiag)):
        def factorise(self, moments):
            made = super().factorise(moments)

            class Made:
                def damped(self, gamma, *, pi="layer"):
                    return Inverting(made.damped(gamma, pi=pi))

            return Made()

    return Failing(blockdiag.config)


def raises(_):
    raise ZeroDivisionError("by nothing")


FAILURES = {
    "exception": (raises, r"approx 'blockdiag' \(.*Failing\): solve failed on the blocks .*ZeroDivisionError"),
    "shape": (lambda v: [v[0].T, *v[1:]], r"Failing\): solve returned \(6, 4\).* for the block 0"),
    "number": (lambda v: v[1:], r"Failing\): solve returned 2 tensors for 3 blocks"),
    "NaN": (lambda v: [*v[:2], v[2] * torch.nan], r"^4: approx 'blockdiag' .* made NaN or infinity"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_approximation_that_fails_is_named_and_the_rest_is_measured(name):
    how, message = FAILURES[name]
    both = {"mine": failing(how), **approximations("blockdiag")}
    found = inspect_subject(subject(), get_registry(), both, gammas=[0.1])
    assert list(found.failed) == ["mine"]
    assert re.search(message, found.failed["mine"])
    assert {row.approx for row in found.quality} == {"blockdiag"}
    assert [report.approx for report in found.invariance] == ["blockdiag"]
    assert "mine" not in found.dense.matrices
    assert found.as_dict()["failed"] == found.failed
    assert found.verdict().startswith("blockdiag was measured alone")
    with pytest.raises(ConfigError, match="no approximation could be measured: mine"):
        inspect_subject(subject(), get_registry(), {"mine": failing(how)}, gammas=[0.1])


def test_what_is_not_finite_for_the_gradient_alone_is_named_too():
    class Overflowing:
        notices = ()

        def solve(self, blocks):
            return [blocks[0], blocks[1] * torch.inf, blocks[2]]

    exact = subject().exact
    with pytest.raises(NumericalError, match=r"^2: approx 'mine' made NaN or infinity"):
        measure_update(exact, exact.gradient(), natural_gradient(exact), Overflowing(), "mine", 0.1)


def test_a_failure_of_an_installed_component_says_which_distribution_and_version(monkeypatch):
    from kfac_plugins.approx.blockdiag import BlockDiagonal

    monkeypatch.setattr(BlockDiagonal, "factorise", lambda self, moments: raises(moments))
    found = inspect_subject(subject(), get_registry(), approximations(), gammas=[0.1], parts=("quality",))
    assert {row.approx for row in found.quality} == {"tridiag"}
    from importlib.metadata import version

    assert f"kfac_plugins.approx.blockdiag.BlockDiagonal, kfacore {version('kfacore')})" in found.failed["blockdiag"]


def row(approx, rescaled, gamma=0.1):
    return UpdateQuality(approx, gamma, 0.5, rescaled, 0.1, 1.0, None, None)


def test_the_answer_in_one_sentence():
    rows = [row("blockdiag", 0.2), row("blockdiag", 0.3, 1.0), row("tridiag", 0.6), row("tridiag", 0.5, 1.0)]
    assert verdict(rows, 0.1) == (
        "tridiag is best here: it buys 60.0% of the best possible decrease (gamma 0.1, the model's own), "
        "2.00 times what blockdiag buys (30.0%, gamma 1)."
    )
    rows = [row("a", 0.3), row("b", 0.299), row("c", 0.1)]
    assert verdict(rows, 0.1).startswith("a, b are equally good here: 30.0%")
    assert "3.00 times what c buys" in verdict(rows, 0.1)
    assert verdict([row("a", 0.3), row("b", 0.298)], 0.1).endswith("(gamma 0.1, the model's own).")
    assert verdict([row("a", 0.3), row("b", 0.0)], 0.1).endswith("; b, the next, buys nothing.")
    assert verdict([row("a", 0.3)], 0.1).startswith("a was measured alone")
