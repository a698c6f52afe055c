"""A guest with shared weights, every approximation, KFAC itself to compare with, and combinations that loops have."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from guests import EXACT, backward, data, guest, mlp, run
from test_guest import own_solution
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from kfacore import KFAC, Preconditioned
from kfacore.registry import get_registry


def ekfac() -> Any:
    """The approximation of an example distribution, as an instance, the way one that is not installed is given."""
    folder = str(Path(__file__).parents[2] / "plugins" / "examples" / "kfac-ekfac")
    sys.path.insert(0, folder)
    try:
        from kfac_ekfac import EkfacConfig
        from kfac_ekfac.ekfac import Ekfac
    finally:
        sys.path.remove(folder)
    return Ekfac(EkfacConfig(refresh_every=2, basis_every=4))


class Shared(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.twice, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.twice(x)))


class Tied(nn.Module):
    """An embedding of three signs whose weight is the head's too; z has positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding, self.inner, self.head = nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        signs = (x * 1.5).round().clamp(-1, 1).long() + 1
        return self.head(torch.tanh(self.inner(self.embedding(signs))).mean(1))


def shared() -> nn.Module:
    return Shared().double()


def tied() -> nn.Module:
    model = Tied().double()
    model.head.weight = model.embedding.weight
    return model


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def near(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    return all(float((p - q).abs().max()) < tolerance * (1 + float(q.abs().max())) for p, q in zip(a, b, strict=True))


# --- against KFAC ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "approx",
    [{"kind": "blockdiag", "power": 1.0}, {"kind": "blockdiag", "power": 0.5}, {"kind": "tridiag", "power": 1.0}],
)
def test_a_step_of_rate_one_is_the_direction_of_kfac_itself(approx: Any) -> None:
    x, y = data()
    model, gamma = mlp(), 0.1
    start = parameters(model)
    kfac = KFAC(
        copy.deepcopy(model), likelihood="categorical", approx=approx, estimator=EXACT, weight_decay=0.0,
        damping={"kind": "fixed", "lambda0": gamma**2}, momentum="none", trust="none",
    )  # fmt: skip
    kfac.step(x, y)
    opt = guest(model, approx=kfac.approx, estimator=EXACT, scale="none", gamma=gamma, pi=kfac.damping.config.pi)
    backward(opt, model, x, y)
    opt.step()
    assert kfac.preconditioner is not None
    assert float(kfac.damping.gamma) == pytest.approx(gamma, rel=1e-15)
    names = {name: p.grad for name, p in model.named_parameters()}
    own = {p: names[name] for name, p in kfac.linearizer.model.named_parameters()}
    layers = kfac.linearizer.layers
    g = [torch.cat([v.reshape(len(v), -1) for v in block.view(lambda p: own[p])], 1) for block in layers]
    solved = kfac.preconditioner.solve(g)
    wanted = [part for block, matrix in zip(layers, solved, strict=True) for part in block.split(matrix)]
    assert near([a - p for a, p in zip(start, parameters(model), strict=True)], wanted, 1e-10)


@pytest.mark.parametrize("build", [shared, tied])
@pytest.mark.parametrize("approx", [{"kind": "blockdiag", "power": 1.0}, {"kind": "blockdiag", "power": 0.5}, "exact"])
def test_shared_weights(build: Any, approx: Any) -> None:
    model = build()
    x, y = data()
    wanted = own_solution(copy.deepcopy(model), x, y, approx, 0.1)
    start = parameters(model)
    opt = guest(model, approx=approx, estimator=EXACT, scale="none", rest="diagonal", gamma=0.1)
    backward(opt, model, x, y)
    opt.step()
    assert near([a - p for a, p in zip(start, parameters(model), strict=True)], wanted, 1e-10)


@pytest.mark.parametrize("build", [shared, tied])
def test_micro_batches_with_shared_weights(build: Any) -> None:
    found = []
    for sizes in ((12,), (5, 7), (1, 4, 2, 3, 2)):
        model = build()
        found.append(run(guest(model, estimator=EXACT, scale="none", gamma=0.1), model, 3, sizes=sizes))
    assert near(found[1], found[0], 1e-12)
    assert near(found[2], found[0], 1e-12)


# --- approximations and estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["monte-carlo", "empirical", "exact"])
@pytest.mark.parametrize("approx", [*(c.name for c in get_registry().components("approx")), "ekfac"])
def test_every_approximation_and_estimator_trains(approx: str, estimator: str) -> None:
    model = mlp(dtype=torch.float32)
    opt = guest(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.02),
        approx=ekfac() if approx == "ekfac" else approx,
        estimator=estimator,
        every=4,
    )
    losses = []
    for _ in range(12):
        x, y = data(40, dtype=torch.float32)
        opt.zero_grad()
        with opt.watch():
            z = model(x)
            opt.observe(z, y)
        loss = nn.functional.cross_entropy(z, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert opt.curvature is not None
    assert opt.curvature.preconditioner.inverse is not None


def test_an_approximation_of_others_is_its_own_preconditioner() -> None:
    model = mlp()
    x, y = data()
    wanted = own_solution(copy.deepcopy(model), x, y, ekfac(), 0.1)
    start = parameters(model)
    opt = guest(model, approx=ekfac(), estimator=EXACT, scale="none", gamma=0.1)
    backward(opt, model, x, y)
    opt.step()
    assert near([a - p for a, p in zip(start, parameters(model), strict=True)], wanted, 1e-10)


def test_an_estimator_of_others_is_asked() -> None:
    registry = get_registry()
    asked = []

    class Counting(type(registry.build("estimator", EXACT))):  # type: ignore[misc]  # a class of the registry's
        def output_vectors(self, *given: Any) -> Tensor:
            asked.append(len(given[0]))
            return super().output_vectors(*given)

    model = mlp()
    opt = guest(model, estimator=Counting(registry.build("estimator", EXACT).config), gamma=0.1, scale="none")
    plain = mlp()
    same = guest(plain, estimator=EXACT, gamma=0.1, scale="none")
    assert near(run(opt, model, 2), run(same, plain, 2), 1e-15)
    assert asked == [12, 12]


def test_a_refresh_in_the_background_is_taken_up_later() -> None:
    found = []
    for refresh in ("inline", "background"):
        model = mlp()
        approx = {"kind": "blockdiag", "refresh": refresh, "refresh_delay": 2}
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        opt = guest(model, base, approx=approx, estimator=EXACT, every=4)
        changed, last = [], None
        for step in range(12):
            x, y = data(seed=step)
            opt.zero_grad()
            backward(opt, model, x, y)
            opt.step()
            assert opt.curvature is not None
            if opt.curvature.preconditioner.inverse is not last:
                changed.append(step + 1)
            last = opt.curvature.preconditioner.inverse
        found.append(changed)
    assert found == [[1, 2, 3, 4, 8, 12], [1, 2, 3, 6, 10]]


# --- combinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "nesterov"])
def test_groups_with_rates_and_decays_of_their_own(kind: str) -> None:
    """Weights and biases of one block lie in groups of their own, as many people have it."""
    make = {
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
        "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
        "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    }[kind]

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        own = list(model.parameters())
        weights, biases = [p for p in own if p.dim() > 1], [p for p in own if p.dim() == 1]
        return [{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0, "lr": 0.05}]

    model = mlp()
    opt = guest(model, make(groups(model)), estimator=EXACT)
    for step in range(3):
        twin, base = copy.deepcopy((model, opt.base))
        start = parameters(model)
        opt.zero_grad()
        backward(opt, model, *data(seed=step))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        base.step()
        opt.step()
        kept = [p * (1 - 0.01 * 0.3) if kind == "adamw" and p.dim() > 1 else p for p in start]
        source = []
        for p, old in zip(model.parameters(), start, strict=True):
            state, decay = opt.state[p], 0.3 if p.dim() > 1 and kind != "adamw" else 0.0
            assert p.grad is not None
            g = p.grad + decay * old
            g = state.get("exp_avg", g)
            source.append(g + 0.9 * state["momentum_buffer"] if kind == "nesterov" else g)
        assert opt.curvature is not None
        pairs = list(zip(source[::2], source[1::2], strict=True))
        solved = opt.curvature.preconditioner.solve([torch.cat([w, b[:, None]], 1) for w, b in pairs])
        moves = [[b - a for a, b in zip(kept, parameters(m), strict=True)] for m in (twin, model)]
        own, taken = ([torch.cat([w, b[:, None]], 1) for w, b in zip(m[::2], m[1::2], strict=True)] for m in moves)
        for s, delta, d in zip(own, taken, solved, strict=True):
            assert torch.allclose(delta, -s.norm() * d / d.norm(), atol=1e-12)


@pytest.mark.parametrize("scale", ["graft", "kl"])
def test_a_rate_that_is_a_tensor(scale: str) -> None:
    found = []
    for rate in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
        found.append(run(guest(model, base, estimator=EXACT, scale=scale), model, 4))
    assert near(found[0], found[1], 1e-12)


@pytest.mark.parametrize("scale", ["graft", "kl", "none"])
def test_a_block_without_a_solution_is_the_bases(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = mlp(), mlp()
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), scale=scale)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for m, o in ((model, opt), (plain, None)):
        if o is not None:
            backward(o, m, *data())
        else:
            nn.functional.cross_entropy(m(data()[0]), data()[1]).backward()
    prepare = opt._refresh

    def refresh() -> None:
        prepare()
        inverse = opt._inverse
        solve = inverse.solve_into

        def broken(blocks: Any, out: Any) -> None:
            solve(blocks, out)
            out[1].fill_(torch.nan)

        monkeypatch.setattr(inverse, "solve_into", broken)

    monkeypatch.setattr(opt, "_refresh", refresh)
    with pytest.warns(UserWarning, match="2: .* made NaN or infinity of a finite gradient in step 1"):
        opt.step()
    base.step()
    assert torch.allclose(model[2].weight, plain[2].weight, atol=1e-15) or scale == "kl"
    assert torch.isfinite(model[2].weight).all()
    assert not torch.allclose(model[0].weight, plain[0].weight)


def test_clipping_comes_before_the_step() -> None:
    """A clipped gradient is a shorter one: so is F-hat^-1 of it; a grafted direction stays what it is."""
    for scale in ("none", "graft"):
        moves = []
        for limit in (None, 0.05):
            model = mlp()
            opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1), estimator=EXACT, gamma=0.1, scale=scale)
            start = parameters(model)
            backward(opt, model, *data())
            norm = 1.0
            if limit is not None:
                norm = limit / float(nn.utils.clip_grad_norm_(model.parameters(), limit))
                assert norm < 1
            opt.step()
            moves.append([(b - a) / norm for a, b in zip(start, parameters(model), strict=True)])
        assert near(moves[1], moves[0], 1e-5)  # torch divides by the norm plus 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_accumulation_and_clipping(dtype: torch.dtype) -> None:
    model = mlp(dtype=torch.float32)
    opt = guest(model, torch.optim.AdamW(model.parameters(), lr=0.01), every=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype == torch.float16)
    losses = []
    for _ in range(16):
        x, y = data(dtype=torch.float32)
        opt.zero_grad()
        total = 0.0
        for part, target in zip(x.split([5, 7]), y.split([5, 7]), strict=True):
            with opt.watch(), torch.autocast("cpu", dtype):
                z = model(part)
                opt.observe(z)
                loss = nn.functional.cross_entropy(z, target, reduction="sum") / 12
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        losses.append(total)
    assert losses[-1] < 0.8 * losses[0]
    assert opt.steps == 16


def test_stochastic_averages_with_a_norm_of_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    opt = guest(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    average, rates = AveragedModel(model), SWALR(opt, swa_lr=0.02, anneal_epochs=3)
    seen, losses = [], []

    def loss_of(net: nn.Module) -> float:
        x, y = data(60, dtype=torch.float32)
        return nn.functional.cross_entropy(net(x), y).item()

    for step in range(12):
        opt.zero_grad()
        backward(opt, model, *data(60, dtype=torch.float32))
        opt.step()
        losses.append(loss_of(model))
        if step >= 4:
            average.update_parameters(model)
            rates.step()
            seen.append(parameters(model))
    update_bn([data(60, seed=k, dtype=torch.float32)[0] for k in range(3)], average)
    means = [torch.stack(own).mean(0) for own in zip(*seen, strict=True)]
    assert near(parameters(average.module), means, 1e-5)
    assert loss_of(average.eval()) < losses[0]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.02)


def test_a_guest_beside_a_plain_optimizer() -> None:
    """Weights of linear layers are the guest's, all others another optimizer's, as with Muon; one backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    linear = [p for m in (model[0], model[3]) for p in m.parameters()]
    opt = guest(model, torch.optim.SGD(linear, lr=0.05, momentum=0.9))
    other = torch.optim.AdamW(model[1].parameters(), lr=0.01)
    twin, alone = copy.deepcopy((model[1], other))
    for step in range(4):
        opt.zero_grad()
        other.zero_grad()
        backward(opt, model, *data(seed=step))
        for p, q in zip(model[1].parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        opt.step()
        assert all(torch.equal(p, q) for p, q in zip(model[1].parameters(), twin.parameters(), strict=True))
        other.step()
        alone.step()
    assert "1.weight: not this optimizer's" in opt.explain()


def test_guests_of_two_models_train_in_turns() -> None:
    """As the two nets of a GAN do: each watches its own passes, whatever the other's are."""
    found = []
    for together in (False, True):
        models = [mlp(0), mlp(1)]
        opts: list[Preconditioned] = [guest(m, torch.optim.Adam(m.parameters(), lr=0.01)) for m in models]
        if together:
            for step in range(4):
                for opt, model in zip(opts, models, strict=True):
                    opt.zero_grad()
                    backward(opt, model, *data(seed=step + 1))
                    opt.step()
        else:
            for opt, model in zip(opts, models, strict=True):
                run(opt, model, 4)
        found.append([p for model in models for p in parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
