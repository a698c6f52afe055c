"""The diagonal of the Fisher: exact by autodiff, damped by gamma^2, and an optimizer's choice like any other."""

from __future__ import annotations

import dense
import pytest
import torch
from torch import Tensor

from kfac_plugins.approx.diagonal import Diagonal, DiagonalMoment
from kfacore import KFAC
from kfacore.errors import NumericalError
from kfacore.roles import LayerSamples
from kfacore.roles.moment import Moments

SIZES = (4, 3, 2)


def averages(samples: list[list[LayerSamples]], model: torch.nn.Module, decay: float = 0.95) -> Moments:
    moments = Moments(Diagonal.moments, dense.infos(model), dense.randn(1))
    for batch in samples:
        moments.update(batch, decay)
    return moments


def roots(likelihood: str, z: Tensor) -> Tensor:
    """Vectors (o, n, o) whose outer products sum to the metric."""
    values, vectors = torch.linalg.eigh(dense.metric(likelihood, z))
    return (vectors * values.clamp_min(0).sqrt()[:, None, :]).permute(2, 0, 1)


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "gaussian"])
def test_it_is_the_diagonal_of_the_fisher_from_autodiff(likelihood: str) -> None:
    model, x = dense.net(SIZES), dense.randn(6, 4)
    samples = dense.case_samples(model, x, roots(likelihood, model(x).detach()))
    found = dense.vec(averages([samples], model)[DiagonalMoment])
    wanted = dense.fisher(model, likelihood, x).diagonal()
    assert dense.relative(found, wanted) < 1e-12
    gamma = torch.tensor(0.3, dtype=dense.Float)
    inverse = Diagonal().factorise(averages([samples], model)).damped(gamma)
    assert dense.relative(inverse.dense(), torch.diag(1 / (wanted + 0.09))) < 1e-12


def test_running_average() -> None:
    model = dense.net(SIZES)
    batches = [dense.case_samples(model, dense.randn(5, 4, seed=s), dense.randn(1, 5, 2, seed=s)) for s in range(3)]
    alone = [dense.vec(averages([batch], model)[DiagonalMoment]) for batch in batches]
    wanted = 0.5 * (0.5 * alone[0] + 0.5 * alone[1]) + 0.5 * alone[2]
    assert dense.relative(dense.vec(averages(batches, model, decay=0.5)[DiagonalMoment]), wanted) < 1e-14


def test_pi_has_nothing_to_split() -> None:
    model, x = dense.net(SIZES), dense.randn(6, 4)
    factorisation = Diagonal().factorise(averages([dense.case_samples(model, x, dense.randn(1, 6, 2))], model))
    gamma = torch.tensor(0.3, dtype=dense.Float)
    assert torch.equal(factorisation.damped(gamma, pi="layer").dense(), factorisation.damped(gamma, pi=None).dense())


def test_a_dead_weight_without_damping_is_named() -> None:
    model = dense.net(SIZES)
    x = dense.randn(6, 4)
    x[:, 1] = 0
    factorisation = Diagonal().factorise(averages([dense.case_samples(model, x, dense.randn(1, 6, 2))], model))
    with pytest.raises(NumericalError, match=r"^0: the diagonal of the Fisher is 0 somewhere and gamma = 0 .*raise"):
        factorisation.damped(torch.tensor(0.0, dtype=dense.Float))


def test_it_trains_and_resumes_bit_for_bit() -> None:
    model, x = dense.net((6, 5, 3)), dense.randn(60, 6)
    y = x[:, :3].argmax(1)
    optimizer = KFAC(model, likelihood="categorical", approx={"kind": "diagonal", "refresh_every": 3})
    losses = [float(optimizer.step(x, y).loss) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
    twin = dense.net((6, 5, 3))
    twin.load_state_dict(model.state_dict())
    again = KFAC(twin, likelihood="categorical", approx={"kind": "diagonal", "refresh_every": 3})
    again.load_state_dict(optimizer.state_dict())
    assert [float(optimizer.step(x, y).loss) for _ in range(4)] == [float(again.step(x, y).loss) for _ in range(4)]
