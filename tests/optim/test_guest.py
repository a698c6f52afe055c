"""`Preconditioned` against K-FAC's own preconditioner, micro-batches against their union, what stays untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from guests import EXACT, backward, data, guest, mlp, run
from torch import Tensor, nn

from kfacore import KFAC, Preconditioned, Preconditioner
from kfacore.network import BlockVector, Linearizer
from kfacore.optim.loss import Loss
from kfacore.registry import get_registry

APPROXIMATIONS: list[Any] = [
    "blockdiag",
    {"kind": "blockdiag", "power": 1.0},
    {"kind": "tridiag", "power": 1.0},
    {"kind": "tridiag", "power": 0.5},
    "exact",
    "diagonal",
]


def conv() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 3)
    ).double()


def own_solution(model: nn.Module, x: Tensor, y: Tensor, approx: Any, gamma: float) -> list[Tensor]:
    """F-hat^-1 grad of KFAC's own Preconditioner, from its own linearization of the whole mini-batch."""
    registry = get_registry()
    built = registry.build("approx", approx)
    linearizer = Linearizer(model, layers=registry.layers())
    batch = linearizer(x)
    bound = Loss.of("categorical").bind(batch.outputs(), y)
    estimator = registry.build("estimator", EXACT)
    generator = torch.Generator().manual_seed(0)
    vectors = bound.statistics(batch.statistics_outputs(), estimator, generator)
    samples = batch.backpropagate(vectors, total=bound.total())
    grad = batch.gradient(bound.residuals(batch.outputs()), BlockVector.zeros(linearizer.layers), retain=True)
    layers = linearizer.layers
    pre = Preconditioner(built, [layer.info for layer in layers], x, 0.95, linearizer.following)
    pre.update(samples)
    pre.use(pre.refresh([torch.tensor(gamma, dtype=torch.float64)], pi="layer")[0][0][1])
    solved = pre.solve(grad.blocks)
    found = {id(p): torch.zeros_like(p) for p in model.parameters()}
    for layer, matrix in zip(layers, solved, strict=True):
        for view, part in zip(layer.view(lambda p: found[id(p)]), layer.split(matrix), strict=True):
            view.copy_(part)
    return [found[id(p)] for p in model.parameters()]


@pytest.mark.parametrize("build", [mlp, conv])
@pytest.mark.parametrize("approx", APPROXIMATIONS, ids=str)
def test_a_plain_step_is_that_of_kfacs_own_preconditioner(build: Any, approx: Any) -> None:
    model = build()
    x, y = data()
    table = {"power": 0.5, "kind": approx} if approx == "blockdiag" else approx
    wanted = own_solution(copy.deepcopy(model), x, y, table, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    opt = guest(model, approx=approx, estimator=EXACT, scale="none", rest="diagonal", gamma=0.1)
    backward(opt, model, x, y)
    opt.step()
    for p, old, d in zip(model.parameters(), before, wanted, strict=True):
        assert float((old - p.detach() - d).abs().max()) < 1e-10 * (1 + float(d.abs().max()))


@pytest.mark.parametrize("build", [mlp, conv])
@pytest.mark.parametrize("options", [{"gamma": 0.1}, {}], ids=["gamma", "damping"])
@pytest.mark.parametrize("scale", ["none", "kl", "graft"])
def test_micro_batches_come_to_their_union(build: Any, options: Any, scale: str) -> None:
    found = []
    for sizes in ((12,), (5, 7), (1, 4, 2, 3, 2)):
        model = build()
        base = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
        opt = guest(model, base, estimator=EXACT, scale=scale, rest="diagonal", **options)
        found.append(run(opt, model, 4, sizes=sizes))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert float((a - b).abs().max()) < 1e-12 * (1 + float(a.abs().max()))


def test_nothing_of_the_users_is_touched() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8)
        return nn.Sequential(nn.Linear(5, 8), norm, nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 3))

    x, y = data(dtype=torch.float32)
    plain, model = build(), build()
    opt = guest(model, rest="diagonal")
    before = {name: (type(m), len(m._forward_hooks), dict(m.__dict__)) for name, m in model.named_modules()}
    torch.manual_seed(7)
    nn.functional.cross_entropy(plain(x), y).backward()
    random = torch.get_rng_state()
    torch.manual_seed(7)
    with opt.watch():
        z = model(x)
        opt.observe(z)
    assert all(p.grad is None for p in model.parameters())
    nn.functional.cross_entropy(z, y).backward()
    assert torch.equal(torch.get_rng_state(), random)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
        assert p.requires_grad
    for b, c in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(b, c)
    assert all(m.training for m in model.modules())
    opt.step()
    for name, m in model.named_modules():
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
        assert set(m.__dict__) == set(before[name][2])


@pytest.mark.parametrize("scale", ["graft", "kl", "none"])
def test_gradients_are_the_users_own_after_a_step(scale: str) -> None:
    model = mlp()
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.01), scale=scale)
    backward(opt, model, *data())
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    opt.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)


def test_an_idle_watch_has_no_hooks() -> None:
    model = mlp()
    opt = guest(model, torch.optim.Adam(model.parameters(), lr=0.01), every=5)
    due = []
    for step in range(11):
        x, y = data(seed=step)
        opt.zero_grad()
        with opt.watch():
            hooked = sum(len(m._forward_hooks) for m in model.modules())
            z = model(x)
            opt.observe(z)
        due.append(hooked > 0)
        assert sum(len(m._forward_hooks) for m in model.modules()) == 0
        nn.functional.cross_entropy(z, y).backward()
        opt.step()
    assert [k + 1 for k, flag in enumerate(due) if flag] == [1, 2, 3, 5, 10]


def test_a_share_of_refreshes_is_measured_against_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfacore.curvature.preconditioner._CHEAP", 0.0)
    made = []
    for share in (0.9, 1e-9):
        model = mlp()
        opt = guest(model, every=2, approx={"kind": "blockdiag", "refresh_share": share})
        inverses: list[Any] = []  # kept, so that no two share an id
        for step in range(40):
            x, y = data(500, seed=step)
            opt.zero_grad()
            backward(opt, model, x, y)
            opt.step()
            assert opt.curvature is not None
            inverses.append(opt.curvature.preconditioner.inverse)
        made.append(len({id(inverse) for inverse in inverses}))
    assert made[0] > made[1]


def test_sides_that_cost_far_more_than_the_net_are_diagonal_as_in_kfac() -> None:
    model = nn.Sequential(nn.Linear(4, 1500), nn.ReLU(), nn.Linear(1500, 3))
    opt = Preconditioned(model, torch.optim.SGD(model.parameters(), lr=0.1), likelihood="categorical")
    host = KFAC(model, likelihood="categorical")
    sides, own = (
        [side for block in layers for side in (block.info.input_side, block.info.output_side)]
        for layers in (opt.network.layers, host.linearizer.layers)
    )
    assert sides == own
    assert len(set(sides)) == 2
