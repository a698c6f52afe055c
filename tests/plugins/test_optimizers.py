from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from kfac_plugins.approx import BlockDiagonalConfig
from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfac_plugins.estimators import MonteCarloConfig
from kfac_plugins.estimators.monte_carlo import MonteCarlo
from kfac_plugins.likelihoods.categorical import Categorical
from kfac_plugins.likelihoods.gaussian import Gaussian
from kfac_plugins.optimizers import (
    COMPONENTS,
    AdamConfig,
    AdamWConfig,
    GuestConfig,
    MuonConfig,
    NesterovConfig,
    SgdConfig,
)
from kfac_plugins.optimizers.guest import Guest
from kfac_plugins.optimizers.muon import MuonAndAdamW, orthogonalised
from kfac_plugins.optimizers.nesterov import Nesterov, momentum_coefficient
from kfac_plugins.optimizers.torch_optimizers import Adam, AdamW, Muon, Sgd, split_matrices
from kfacore import Preconditioned
from kfacore.errors import ConfigError

ETA = 0.1


def scalar_model(theta):
    """z = theta x for one x = 1, y = 0, so that h = (1 + eta)/2 theta^2 under the Gaussian likelihood."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(theta)
    return model, torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    return model, x, torch.randint(0, 3, (12,))


def make(kind, model, likelihood):
    classes = {
        "nesterov": (Nesterov, NesterovConfig()),
        "sgd": (Sgd, SgdConfig()),
        "adam": (Adam, AdamConfig()),
        "adamw": (AdamW, AdamWConfig(decay=0.3)),
        "muon": (Muon, MuonConfig()),
    }
    optimizer, config = classes[kind]
    return optimizer.for_run(config, model=model, likelihood=likelihood, parts={}, weight_decay=ETA, seed=0)


def test_momentum_schedule():
    assert [momentum_coefficient(t, 0.999) for t in (1, 249)] == [0.5, 0.5]
    for t, expected in ((250, 1 - 1 / 4), (500, 1 - 1 / 6), (750, 1 - 1 / 8), (2500, 1 - 1 / 22)):
        assert momentum_coefficient(t, 0.999) == pytest.approx(expected, rel=1e-14)
    assert momentum_coefficient(100_000, 0.99) == 0.99
    assert momentum_coefficient(1, 0.0) == 0.0


def test_nesterov_follows_the_two_equations():
    model, x, y = scalar_model(2.0)
    lr, mu_max = 0.3, 0.6
    optimizer = Nesterov(model, Gaussian(), NesterovConfig(lr=lr, mu_max=mu_max), ETA)
    theta, v = 2.0, 0.0
    for t in range(1, 600):
        mu = min(1 - 2 ** (-1 - math.log2(t // 250 + 1)), mu_max)
        ahead = theta + mu * v
        v = mu * v - lr * (1 + ETA) * ahead
        theta = theta + v
        report = optimizer.step(x, y)
        assert model.weight.item() == pytest.approx(theta, rel=1e-10, abs=1e-300)
        assert report.mu.item() == mu
        assert report.alpha.item() == lr
        assert report.loss.item() == pytest.approx(0.5 * ahead**2, rel=1e-9, abs=1e-300)
        assert report.objective.item() == pytest.approx(0.5 * (1 + ETA) * ahead**2, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_torch_optimizers_take_torchs_steps_on_the_whole_objective(kind):
    model, x, y = net()
    twin = copy.deepcopy(model)
    optimizer = make(kind, model, Categorical())
    reference = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.001),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.001, weight_decay=0.3),
    }[kind](twin.parameters())
    for step in range(1, 6):
        reference.zero_grad()
        loss = nn.functional.cross_entropy(twin(x), y)
        objective = loss + 0.5 * ETA * sum(p.square().sum() for p in twin.parameters())
        objective.backward()
        reference.step()
        report = optimizer.step(x, y)
        assert report.step == step
        assert report.batch_size == 12
        torch.testing.assert_close(report.loss, loss.detach())
        torch.testing.assert_close(report.objective, objective.detach())
        assert 0.0 <= report.error.item() <= 1.0
        for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["nesterov", "sgd", "adam", "muon"])
def test_state_goes_on_bit_for_bit(kind, tmp_path):
    model, x, y = net()
    optimizer = make(kind, model, Categorical())
    for _ in range(3):
        optimizer.step(x, y)
    torch.save(optimizer.state_dict(), tmp_path / "s.pt")
    twin = copy.deepcopy(model)
    other = make(kind, twin, Categorical())
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    for _ in range(3):
        one, two = optimizer.step(x, y), other.step(x, y)
        assert one.step == two.step
        assert torch.equal(one.objective, two.objective)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_state_of_another_model_is_refused():
    state = make("nesterov", net()[0], Categorical()).state_dict()
    with pytest.raises(ValueError, match="other shapes"):
        make("nesterov", scalar_model(1.0)[0], Gaussian()).load_state_dict(state)


def test_frozen_parameters_stay():
    model, x, y = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    make("nesterov", model, Categorical()).step(x, y)
    assert torch.equal(model[0].weight, before)


def test_nesterov_needs_momentum_in_torch():
    with pytest.raises(ConfigError, match=r"optimizer\.nesterov needs optimizer\.momentum"):
        Sgd(net()[0], Categorical(), SgdConfig(momentum=0.0, nesterov=True))


def test_only_kfac_and_the_guest_use_the_slots_of_curvature():
    uses = {component.name: component.uses for component in COMPONENTS}
    assert uses.pop("kfac") == {"estimator", "approx", "damping", "momentum", "trust"}
    assert uses.pop("guest") == {"estimator", "approx"}
    assert set(uses) == {"nesterov", "sgd", "adam", "adamw", "muon"}
    assert not any(uses.values())


# --- Muon ------------------------------------------------------------------------------------------------------------


def test_muon_takes_torchs_step_up_to_its_precision():
    """Torch orthogonalises in bfloat16: the same momentum, scale and decay, and directions that agree to its digits."""
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    own, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    one = MuonAndAdamW([own], [], lr=0.1, momentum=0.9, weight_decay=0.2)
    two = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for k in range(4):
        own.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(k + 1))
        theirs.grad = own.grad.clone()
        one.step()
        two.step()
    assert torch.linalg.norm(own - theirs) < 0.02 * torch.linalg.norm(theirs - weight)


def test_the_rest_of_muon_is_adamw():
    vector = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own, theirs = nn.Parameter(vector.clone()), nn.Parameter(vector.clone())
    matrix = nn.Parameter(torch.eye(2))
    one = MuonAndAdamW([matrix], [own], lr=0.1, weight_decay=0.2)
    two = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2)
    for k in range(5):
        own.grad = torch.randn(7, generator=torch.Generator().manual_seed(k + 1), dtype=torch.float64)
        theirs.grad = own.grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-14)
    assert torch.equal(matrix, torch.eye(2))  # it had no gradient


def test_a_kernel_is_a_matrix_of_its_outputs():
    kernel = nn.Parameter(torch.zeros(4, 3, 2, 2))
    kernel.grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    MuonAndAdamW([kernel], [], lr=1.0, momentum=0.0).step()
    wanted = orthogonalised(kernel.grad.flatten(1)) * -0.2 * 12**0.5
    torch.testing.assert_close(kernel.detach().flatten(1), wanted)


def test_embeddings_and_heads_tied_to_them_are_no_matrices():
    table, inner, head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, inner, head)
    matrices, rest = split_matrices(model, list(model.parameters()))
    assert [id(p) for p in matrices] == [id(inner.weight)]
    assert [id(p) for p in rest] == [id(table.weight), id(inner.bias)]
    with pytest.raises(ConfigError, match="take adamw"):
        split_matrices(table, list(table.parameters()))


# --- the guest -------------------------------------------------------------------------------------------------------


def guest(model, **options):
    parts = {"approx": BlockDiagonal(BlockDiagonalConfig()), "estimator": MonteCarlo(MonteCarloConfig(tau1=1.0))}
    config = GuestConfig(**options)
    return Guest.for_run(config, model=model, likelihood=Categorical(), parts=parts, weight_decay=ETA, seed=3)


def test_the_guest_takes_the_steps_of_a_loop_with_preconditioned():
    model, x, y = net()
    twin = copy.deepcopy(model)
    optimizer = guest(model, lr=0.02, decay=0.1, every=2)
    other = Preconditioned(
        twin,
        torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1),
        likelihood="categorical",
        approx=BlockDiagonalConfig(),
        estimator=MonteCarloConfig(tau1=1.0),
        every=2,
        seed=3,
    )
    for step in range(1, 8):
        refreshed = other.due
        other.zero_grad()
        with other.watch():
            z = twin(x)
        other.observe(z, y)
        loss = nn.functional.cross_entropy(z, y)
        objective = loss + 0.5 * ETA * sum(p.square().sum() for p in twin.parameters())
        objective.backward()
        other.step()
        report = optimizer.step(x, y)
        assert (report.step, report.refreshed) == (step, refreshed)
        torch.testing.assert_close(report.objective, objective.detach())
        for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_sgd_has_no_decoupled_decay():
    with pytest.raises(ConfigError, match=r"optimizer\.decay is decoupled"):
        guest(net()[0], base="sgd", decay=0.1)
    assert guest(net()[0], base="sgd").momentum() == 0.9
