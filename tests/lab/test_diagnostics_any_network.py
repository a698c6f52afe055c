"""Diagnostics of any network, against Jacobians that autograd takes of a plain copy from the same generators."""

from __future__ import annotations

import copy

import pytest
import torch
from dense import Float, randn, relative, unvec
from torch import nn

from kfacore.lab.diagnostics.dense import stack, unshared
from kfacore.lab.diagnostics.exact import ExactModel
from kfacore.lab.diagnostics.inspection import inspect_subject
from kfacore.lab.diagnostics.natural import natural_gradient
from kfacore.lab.diagnostics.quality import inverses, measure_update
from kfacore.lab.diagnostics.subject import Subject
from kfacore.network.jvp import tangents_of
from kfacore.optim.loss import Loss
from kfacore.registry import get_registry

SEED = 7


class Sequences(nn.Module):
    """Tokens, positions as a raw parameter, a norm, attention, and the embedding again as head: z (n, t, v)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(5, 4), nn.Parameter(torch.zeros(3, 4))
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions
        y = self.norm(x)
        return self.head(x + self.attention(y, y, y, need_weights=False)[0])


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


def dropout():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3))


def batch_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def twice():
    inner = nn.Linear(4, 4)
    return nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(4, 3))


def images():
    return randn(6, 1, 5, 5, seed=1), torch.arange(6) % 3


def rows():
    return randn(6, 4, seed=1), torch.arange(6) % 3


def tokens():
    return torch.arange(18).reshape(6, 3) % 5, torch.arange(18).reshape(6, 3).flip(0) % 5


NETS = {
    "convolutions": (convolutions, images),
    "sequences": (Sequences, tokens),
    "dropout": (dropout, rows),
    "batch norm": (batch_norm, rows),
    "used twice": (twice, rows),
}


class Truth:
    """The same mini-batch by autograd of a plain copy."""

    def __init__(self, name, **options):
        build, data = NETS[name]
        torch.manual_seed(1)
        self.model, (self.x, self.y) = build().double(), data()
        with torch.no_grad():
            for index, p in enumerate(self.model.parameters()):
                p.add_(0.3 * randn(*p.shape, seed=20 + index))
        self.likelihood = get_registry().build("likelihood", {"kind": "categorical", **options.pop("likelihood", {})})
        self.eta, self.valid = options.get("weight_decay", 0.0), options.get("valid")
        torch.manual_seed(SEED)
        self.exact = ExactModel(self.model, self.likelihood, self.x, self.y, **options)
        self.names = [name for name, _ in self.model.named_parameters()]

    def z(self, moved=None):
        twin = copy.deepcopy(self.model)
        with torch.no_grad():
            for key, step in (moved or {}).items():
                twin.get_parameter(key).add_(step)
        torch.manual_seed(SEED)
        return twin(self.x).reshape(-1, self.exact.outputs().shape[-1]), twin

    def keep(self):
        count = self.z()[0].shape[0]
        return torch.ones(count, dtype=torch.bool) if self.valid is None else self.valid.reshape(-1)

    def total(self):
        if Loss(self.likelihood).per == "position":
            return int(self.keep().sum())
        return len(self.x) if self.valid is None else int(self.valid.reshape(len(self.x), -1).any(1).sum())

    def objective(self, moved=None):
        z, twin = self.z(moved)
        penalty = sum(p.square().sum() for p in twin.parameters())
        loss = self.likelihood.nll(z, self.y.reshape(-1))[self.keep()].sum() / self.total()
        return loss + 0.5 * self.eta * penalty, twin

    def jacobian(self):  # (n R, o, P)
        z, twin = self.z()
        parameters = list(twin.parameters())
        grads = [torch.autograd.grad(e, parameters, retain_graph=True, allow_unused=True) for e in z.reshape(-1)]
        flat = [torch.cat([torch.zeros_like(p).view(-1) if g is None else g.reshape(-1) for p, g in
                           zip(parameters, each, strict=True)]) for each in grads]  # fmt: skip
        return torch.stack(flat).view(*z.shape, -1)

    def fisher(self):
        J, keep = self.jacobian(), self.keep()
        z = self.z()[0].detach()
        B = torch.stack([self.likelihood.fisher_product(z, J[..., i]) for i in range(J.shape[-1])], dim=-1)
        return torch.einsum("rop,roq->pq", J[keep], B[keep]) / self.total()

    def flat(self, blocks):
        """Blocks as the parameters lie in the plain copy."""
        by_id = {p: key for key, p in self.exact.model.named_parameters()}
        found = tangents_of(self.exact.rules, by_id, blocks)
        return torch.cat([found[key].reshape(-1) for key in self.names]), found


def direction(exact, seed=3):
    return [randn(*layer.shape, seed=seed + i) for i, layer in enumerate(exact.layers)]


@pytest.mark.parametrize("name", NETS)
def test_the_exact_model_is_that_of_autograd(name):
    truth = Truth(name, lam=0.3, weight_decay=0.1)
    exact = truth.exact
    value, twin = truth.objective()
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(value, list(twin.parameters()))])
    assert exact.objective == pytest.approx(float(value.detach()), rel=1e-12)
    assert relative(truth.flat(exact.gradient())[0], g) < 1e-11

    F, v = truth.fisher(), direction(exact)
    flat, moved = truth.flat(v)
    assert relative(truth.flat(exact.fisher(v))[0], F @ flat) < 1e-11
    assert relative(truth.flat(exact.curvature(v))[0], F @ flat + 0.4 * flat) < 1e-11
    assert exact.quadratic_form(v) == pytest.approx(float(flat @ (F @ flat + 0.4 * flat)), rel=1e-11)
    assert exact.objective_at(v) == pytest.approx(float(truth.objective(moved)[0].detach()), rel=1e-12)
    assert relative(truth.flat(exact.fisher(v))[0], F @ flat) < 1e-11  # still where it was


@pytest.mark.parametrize("per", ["example", "position"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_and_masks(per, masked):
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 1]]).bool() if masked else None
    truth = Truth("sequences", valid=valid, likelihood={"per": per})
    F, v = truth.fisher(), direction(truth.exact)
    assert truth.exact.objective == pytest.approx(float(truth.objective()[0].detach()), rel=1e-12)
    assert relative(truth.flat(truth.exact.fisher(v))[0], F @ truth.flat(v)[0]) < 1e-11


@pytest.mark.parametrize("name", NETS)
def test_the_natural_gradient_and_the_quality_of_an_update_from_the_dense_matrix(name):
    exact = Truth(name, lam=0.02, weight_decay=1e-3).exact
    F = exact.fisher_matrix(0, len(exact.layers))
    B = F + exact.damping * torch.eye(len(F), dtype=Float)
    g = stack(exact.gradient())
    natural = natural_gradient(exact, tolerance=1e-11)
    wanted = torch.linalg.solve(B, g)
    assert natural.converged
    assert relative(stack(natural.blocks), wanted) < 1e-8

    samples = exact.monte_carlo_samples(torch.Generator().manual_seed(0), 3)
    for kind in ("blockdiag", "tridiag"):
        approx = get_registry().build("approx", kind)
        [(gamma, inverse)] = inverses(approx, exact.layers, samples, [0.2], pairs=exact.pairs)
        found = measure_update(exact, exact.gradient(), natural, inverse, kind, gamma)
        update = -stack(inverse.solve(exact.gradient()))
        alpha = -float(g @ update) / float(update @ B @ update)
        best = 0.5 * float(g @ wanted)
        assert found.alpha == pytest.approx(alpha, rel=1e-8)
        assert found.rescaled == pytest.approx(-0.5 * alpha * float(g @ update) / best, rel=1e-8)
        assert 0 < found.rescaled <= 1


@pytest.mark.parametrize("name", ["convolutions", "dropout", "used twice", "sequences"])
def test_statistics_of_the_exact_expectation_have_the_trace_of_the_exact_fisher(name):
    exact = Truth(name).exact
    F, samples = exact.fisher_matrix(0, len(exact.layers)), exact.exact_samples()
    blocks = torch.split(F.diagonal(), [layer.size for layer in exact.layers])
    for layer, s, diagonal in zip(exact.layers, samples, blocks, strict=True):
        if layer.kind == "full":  # the gradient of every example by the parameters
            wanted = s.gradients.square().sum() / s.divisor
        elif layer.kind == "kron" and s.positions is not None and s.inputs.is_floating_point():
            shape = s.cases, s.positions, layer.groups
            x, g = s.inputs.reshape(*shape, -1), s.gradients.reshape(len(s.gradients), *shape, -1)
            wanted = torch.einsum("nrci,knrco->kncoi", x, g).square().sum() / s.divisor
        else:
            continue
        assert float(wanted) == pytest.approx(float(diagonal.sum()), rel=1e-10), layer.name


def test_vectors_of_all_kinds_of_blocks():
    exact = Truth("convolutions").exact
    v = randn(exact.parameters)
    assert [layer.groups for layer in exact.layers] == [1, 2, 1]
    assert torch.equal(stack(unvec(v, exact.layers)), v)


def test_which_blocks_have_an_f_tilde():
    exact = Truth("convolutions").exact
    found = unshared(exact.layers, exact.monte_carlo_samples(torch.Generator().manual_seed(0)))
    first, second, third = (layer.name for layer in exact.layers)
    assert "groups" in found[second]
    assert found[third].startswith("it has 6 rows and " + first + " has 54")
    exact = Truth("sequences").exact
    found = unshared(exact.layers, exact.monte_carlo_samples(torch.Generator().manual_seed(0)))
    assert {kind for layer in exact.layers if layer.name in found for kind in [layer.kind]} == {
        "tied", "diagonal", "full",
    }  # fmt: skip


def subject(name, gamma=0.2, **options):
    return Subject("a net", "test", 0, Truth(name, lam=0.02, weight_decay=1e-5, **options).exact, gamma, "layer", 0)


@pytest.mark.parametrize("name", NETS)
def test_a_whole_inspection(name):
    approximations = {kind: get_registry().build("approx", kind) for kind in ("blockdiag", "tridiag")}
    found = inspect_subject(subject(name), get_registry(), approximations, gammas=[0.02, 0.2, 2.0])
    assert found.failed == {}
    assert found.natural.converged
    assert {row.approx for row in found.quality} == set(approximations)
    assert all(0 < row.rescaled <= 1 + 1e-9 for row in found.quality)
    assert found.verdict().endswith(".")
    assert "invariance" in found.skipped
    assert found.dense is not None
    assert found.statistics.startswith("drawn" if name == "batch norm" else "exact")
    assert found.as_dict()["verdict"] == found.verdict()


def test_a_stretch_of_blocks_without_f_tilde_is_compared_with_the_models_curvature():
    approximations = {"blockdiag": get_registry().build("approx", "blockdiag")}
    found = inspect_subject(
        subject("convolutions"), get_registry(), approximations, gammas=[0.2], parts=("dense",), layers=(1, 3)
    )
    report, exact = found.dense, found.subject.exact
    assert list(report.errors) == ["blockdiag^-1 / B^-1"]
    assert "2: its curvature is one of 2 groups" in report.refused["F-tilde"]
    B = exact.fisher_matrix(0, 3) + exact.damping * torch.eye(exact.parameters, dtype=Float)
    difference = report.inverses["blockdiag"] - torch.linalg.inv(B)
    assert report.errors["blockdiag^-1 / B^-1"].frobenius == pytest.approx(
        float(difference.norm() / torch.linalg.inv(B).norm()), rel=1e-8
    )
    assert report.as_dict()["errors"]["blockdiag^-1 / B^-1"]["frobenius"] > 0


def test_f_tilde_of_a_stretch_inside_a_larger_net():
    """Two blocks of one resolution share their rows, so that there is an F-tilde; its diagonal blocks are A (x) G."""
    build, _ = NETS["sequences"]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = randn(5, 3, 3, seed=1), torch.arange(15).reshape(5, 3) % 2
    exact = ExactModel(net, get_registry().build("likelihood", "categorical"), x, y, lam=0.02)
    approximations = {kind: get_registry().build("approx", kind) for kind in ("blockdiag", "tridiag")}
    found = inspect_subject(Subject("a net", "test", 0, exact, 0.2, "layer", 0), get_registry(), approximations,
                            gammas=[0.2], parts=("dense",))  # fmt: skip
    assert build is Sequences
    report = found.dense
    assert report.sizes == [16, 20, 10]
    assert report.cumulants is None
    assert "several rows" in report.refused["cumulants"]
    for name in approximations:
        assert report.errors[f"{name} / F-tilde"].diagonal < 1e-10
    assert relative(report.F, exact.fisher_matrix(0, 3)) < 1e-12
