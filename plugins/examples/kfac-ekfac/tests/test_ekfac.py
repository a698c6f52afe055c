"""EKFAC by kfacore's conformance suite, and what is special to it: averages that live in a basis that changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kfacore import KFAC
from kfacore.plugin import PiRule
from kfacore.roles import LayerSamples
from kfacore.roles.block import Block
from kfacore.roles.moment import Moments
from kfacore.testing import ApproxCase, ApproxSuite
from torch import Tensor, nn

from kfac_ekfac import EkfacConfig
from kfac_ekfac.ekfac import EigenMoment, Ekfac, EkfacInverse

Float = torch.float64
LAYERS = [Block("first", 4, 3, True), Block("second", 4, 2, True)]
GAMMA = torch.tensor(0.2, dtype=Float)


class TestEkfac(ApproxSuite):
    name = "ekfac"

    def fisher(self, case: ApproxCase, gamma: float, *, pi: PiRule) -> Tensor:
        """As long as no inverse has been taken up there is no basis to average in: K-FAC, damped like K-FAC."""
        return torch.block_diag(*[torch.kron(*case.damped(i, gamma, pi=pi)) for i in range(len(case.layers))])


def samples(seed: int, n: int = 40, passes: int = 1) -> list[LayerSamples]:
    """Gradients that depend on the inputs, so that the Fisher is no Kronecker product."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in LAYERS:
        abar = torch.randn(n, layer.d_in, generator=generator, dtype=Float)
        abar[:, -1] = 1
        mix = torch.randn(layer.d_in, layer.d_out, generator=generator, dtype=Float)
        noise = torch.randn(passes, n, layer.d_out, generator=generator, dtype=Float)
        found.append(LayerSamples(abar, noise * (abar @ mix)))
    return found


def second_moments(batch: list[LayerSamples], U_A: Tensor, U_G: Tensor, i: int) -> Tensor:
    """S of one layer, case by case and pass by pass."""
    s = batch[i]
    S = torch.zeros(s.gradients.shape[-1], s.inputs.shape[-1], dtype=Float)
    for pass_gradients in s.gradients:
        for g, abar in zip(pass_gradients, s.inputs, strict=True):
            S += torch.outer(U_G.T @ g, U_A.T @ abar) ** 2
    return S / s.cases


def fisher_block(batch: list[LayerSamples], i: int) -> Tensor:
    s = batch[i]
    rows = torch.einsum("kno,ni->knio", s.gradients, s.inputs).flatten(2).flatten(0, 1)
    return rows.T @ rows / s.cases


class Run:
    """Moments and inverses as an optimizer drives them."""

    def __init__(self, decay: float = 0.9, **options: Any) -> None:
        self.approx, self.decay = Ekfac(EkfacConfig(**options)), decay
        self.moments = Moments(self.approx.moments, LAYERS, torch.zeros((), dtype=Float))

    def step(self, batch: list[LayerSamples]) -> EkfacInverse:
        self.moments.update(batch, self.decay)
        inverse = self.approx.factorise(self.moments).damped(GAMMA)
        self.moments.refreshed(inverse)
        return inverse


@pytest.mark.parametrize("passes", [1, 3])
def test_second_moments_are_averaged_in_the_basis_in_use(passes: int) -> None:
    run = Run(basis_every=100)
    for seed in range(3):
        before = run.step(samples(seed))
    batch = samples(7, passes=passes)
    after = run.step(batch)  # the fourth: f = 3/4
    for i, (old, new) in enumerate(zip(before.spectra, after.spectra, strict=True)):
        assert torch.equal(old.U_A, new.U_A)
        assert torch.equal(old.U_G, new.U_G)
        wanted = 0.75 * old.S + 0.25 * second_moments(batch, old.U_A, old.U_G, i)
        torch.testing.assert_close(new.S, wanted, rtol=1e-12, atol=0)


def test_rows_of_a_case_are_summed_before_they_are_squared() -> None:
    run = Run(basis_every=100)
    for seed in range(3):
        before = run.step(samples(seed))
    rows = [replace(s, positions=4) for s in samples(7)]
    cases = [replace(s, positions=None, total=10) for s in samples(8)]
    for batch in (rows, cases):
        alone = Moments(run.approx.moments, LAYERS, torch.zeros((), dtype=Float))
        alone.refreshed(before)
        alone.update(batch, 0.0)
        for i, (basis, s) in enumerate(zip(before.spectra, batch, strict=True)):
            g, abar = s.gradients[0] @ basis.U_G, s.inputs @ basis.U_A
            if s.positions is None:  # rows of no case: what the two factors say
                wanted = torch.outer(g.square().sum(0), abar.square().mean(0)) / 10
            else:
                M = torch.einsum("nro,nri->noi", g.reshape(10, 4, -1), abar.reshape(10, 4, -1))
                wanted = M.square().mean(0)
            torch.testing.assert_close(alone[EigenMoment][i], wanted, rtol=1e-12, atol=1e-13)


def test_its_eigenvalues_are_those_of_the_averaged_factors() -> None:
    run = Run(basis_every=100)
    for seed in range(6):
        inverse = run.step(samples(seed))
    for i, s in enumerate(inverse.spectra):
        A, G = (run.moments.state_dict()["values"][name][i] for name in ("InputFactor", "OutputFactor"))
        torch.testing.assert_close(s.a, (s.U_A.T @ A @ s.U_A).diagonal(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s.g, (s.U_G.T @ G @ s.U_G).diagonal(), rtol=1e-12, atol=1e-12)


def test_the_dense_matrix_has_factored_damping_in_the_eigenbasis() -> None:
    run = Run(basis_every=100)
    for seed in range(6):
        inverse = run.step(samples(seed))
    blocks = []
    for s in inverse.spectra:
        pi = (s.a.mean() / s.g.mean()).sqrt()
        D = s.S + (pi * GAMMA * s.g)[:, None] + GAMMA / pi * s.a + GAMMA**2
        U = torch.kron(s.U_A, s.U_G)
        blocks.append(U @ torch.diag(D.T.reshape(-1)) @ U.T)
    wanted = torch.block_diag(*blocks)
    torch.testing.assert_close(inverse.dense(inverse=False), wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(inverse.dense(), torch.linalg.inv(wanted), rtol=1e-9, atol=1e-12)


def test_a_new_basis_takes_the_diagonal_of_the_old_matrix_along() -> None:
    run = Run(basis_every=2)
    for seed in range(4):
        run.step(samples(seed))
    count = len(LAYERS)
    run.moments.update(samples(4), run.decay)
    old = [value.clone() for value in run.moments[EigenMoment]]
    new = run.approx.factorise(run.moments).damped(GAMMA)
    assert new.made == 5
    for i, s in enumerate(new.spectra):
        U_old = torch.kron(old[3 * count + i], old[4 * count + i])
        U_new = torch.kron(s.U_A, s.U_G)
        assert not torch.allclose(U_old.abs(), U_new.abs(), atol=1e-3)  # it did turn
        matrix = U_old @ torch.diag(old[i].T.reshape(-1)) @ U_old.T
        wanted = (U_new.T @ matrix @ U_new).diagonal()
        torch.testing.assert_close(s.S.T.reshape(-1), wanted, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(s.S.sum(), old[i].sum(), rtol=1e-12, atol=0)  # the trace is kept


def test_a_basis_lasts_as_long_as_it_should() -> None:
    run = Run(basis_every=4)
    assert [run.step(samples(seed)).made for seed in range(12)] == [1, 2, 3, 3, 3, 3, 7, 7, 7, 7, 11, 11]


def test_it_is_never_farther_from_the_fisher_block_than_kfac() -> None:
    run = Run(decay=0.0)  # the last mini-batch alone
    batch = samples(3)
    run.step(batch)  # the basis
    run.moments.update(batch, 0.0)  # the second moments in it
    values, count = run.moments[EigenMoment], len(LAYERS)
    for i, s in enumerate(batch):
        F = fisher_block(batch, i)
        A, G = s.inputs.T @ s.inputs / s.cases, s.gradients[0].T @ s.gradients[0] / s.cases
        U = torch.kron(values[3 * count + i], values[4 * count + i])
        ekfac = U @ torch.diag(values[i].T.reshape(-1)) @ U.T
        assert float((F - ekfac).norm()) < 0.95 * float((F - torch.kron(A, G)).norm())
        torch.testing.assert_close((U.T @ F @ U).diagonal(), values[i].T.reshape(-1), rtol=1e-11, atol=1e-13)


def test_inverses_stay_what_they_are() -> None:
    run = Run(basis_every=3)
    kept = []
    for seed in range(9):
        inverse = run.step(samples(seed))
        kept.append((inverse, inverse.dense(), inverse.dense(inverse=False)))
    other = Run()
    other.step(samples(50))
    run.moments.load_state_dict(other.moments.state_dict())
    for inverse, solve, multiply in kept:
        assert torch.equal(inverse.dense(), solve)
        assert torch.equal(inverse.dense(inverse=False), multiply)


def test_an_inverse_of_an_older_basis_can_be_taken_up_again() -> None:
    run = Run(basis_every=1)
    first = run.step(samples(0))
    run.step(samples(1))
    run.moments.refreshed(first)
    values, count = run.moments[EigenMoment], len(LAYERS)
    assert int(values[-1]) == first.made == 1
    assert torch.equal(values[3 * count], first.spectra[0].U_A)
    assert torch.equal(values[0], first.spectra[0].S)


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("stop", [2, 5, 9])  # before, at and after changes of the basis
def test_a_resumed_run_is_the_run_that_never_stopped(stop: int) -> None:
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(1), dtype=Float)
    y = x[:, :3].square().argmax(1)
    approx = {"kind": "ekfac", "basis_every": 4, "refresh_every": 2}
    model = net()
    optimizer = KFAC(model, likelihood="categorical", approx=approx)
    for _ in range(stop):
        optimizer.step(x, y)
    twin = net()
    twin.load_state_dict(model.state_dict())
    again = KFAC(twin, likelihood="categorical", approx=approx)
    again.load_state_dict(optimizer.state_dict())
    ends = [[float(o.step(x, y).loss) for _ in range(12)] for o in (optimizer, again)]
    assert ends[0] == ends[1]
    assert ends[0][-1] < 0.8 * ends[0][0]
