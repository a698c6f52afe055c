"""Components that fail while they run are named, with the block and the step, whoever brought them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import dense
import pytest
import torch
from test_contract import data, make, net
from torch import Tensor, nn

from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfac_plugins.momentum.quadratic_model import QuadraticModelMomentum
from kfacore import KFAC, NumericalError, PluginError, Preconditioned, host
from kfacore.registry import get_registry
from kfacore.roles.inverse import Inverse

LATER = {"kind": "blockdiag", "refresh_every": 5, "refresh_growth": None}


class Turning(Inverse):
    """An inverse that goes wrong after some uses."""

    notices = ()

    def __init__(self, made: Any, how: Callable[[list[Tensor]], Any], uses: list[int]) -> None:
        self.made, self.how, self.uses, self.layers = made, how, uses, made.layers

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        self.uses[0] -= 1
        found = self.made.solve(blocks)
        return self.how(found) if self.uses[0] < 0 else found  # type: ignore[no-any-return]

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        return self.made.multiply(blocks)  # type: ignore[no-any-return]

    def _like(self) -> Tensor:
        return self.made._like()  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        return self.made.state_dict()  # type: ignore[no-any-return]


def failing(how: Callable[[list[Tensor]], Any], uses: int) -> BlockDiagonal:
    left = [uses]

    class Mine(BlockDiagonal):
        def factorise(self, moments: Any) -> Any:
            made = super().factorise(moments)

            class Made:
                def damped(self, gamma: Tensor, *, pi: Any = "layer") -> Turning:
                    return Turning(made.damped(gamma, pi=pi), how, left)

            return Made()

    return Mine(get_registry().build("approx", LATER).config)


def broken(_: Any) -> Any:
    raise ZeroDivisionError("by nothing")


HOW: dict[str, tuple[Callable[[list[Tensor]], Any], type[Exception], str]] = {
    "exception": (broken, PluginError, r"approx 'blockdiag' \(.*Mine\): solve failed on the blocks 0, 2: ZeroDivision"),
    "shape": (
        lambda v: [v[0], v[1].T],
        PluginError,
        r"Mine\): solve failed .*: solve returned .* for the block 2, which",
    ),
    "side": (lambda v: [v[0], v[1][:, :1]], PluginError, r"Mine\): solve failed .* \(3, 1\) for the block 2, which"),
    "number": (
        lambda v: v[:1],
        PluginError,
        r"Mine\): solve failed on the blocks 0, 2: .*returned 1 tensors for 2 blocks",
    ),
    "NaN": (lambda v: [v[0], v[1] * torch.nan], NumericalError, r"^2: approx 'blockdiag' \(.*Mine\) made NaN or inf"),
}


@pytest.mark.parametrize("momentum", ["quadratic-model", "fixed"])
@pytest.mark.parametrize("uses", [0, 5])
@pytest.mark.parametrize("name", HOW)
def test_a_solve_that_fails_at_first_or_later_is_named(name: str, uses: int, momentum: str) -> None:
    """In the first refresh, and in an ordinary step in between; the parameters are then what they were."""
    how, kind, message = HOW[name]
    if uses == 0 and name in ("shape", "side", "number"):
        message = r"Mine\): solve returned"
    optimizer = make(approx=failing(how, uses), trust="none", momentum=momentum)
    good = 0 if uses == 0 else 4  # one use looks at the first inverse
    for k in range(good):
        optimizer.step(*data(k))
    before = dense.theta(optimizer.model)
    with pytest.raises(kind, match=message):
        optimizer.step(*data(good))
    assert torch.equal(dense.theta(optimizer.model), before)


def test_a_step_that_trust_undoes_says_who_made_it() -> None:
    optimizer = make(approx=failing(lambda v: [v[0], v[1] * torch.nan], 5), trust="undo")
    notices: list[str] = []
    for k in range(6):
        notices += optimizer.step(*data(k)).notices
    assert any(notice.startswith("2: approx 'blockdiag' (") and "made NaN" in notice for notice in notices)
    assert bool(torch.isfinite(dense.theta(optimizer.model)).all())


def test_other_components_that_raise_are_named() -> None:
    class Rule(QuadraticModelMomentum):
        def coefficients(self, M: Tensor, b: Tensor) -> Tensor:
            raise KeyError("alpha")

    momentum = Rule(get_registry().build("momentum", "quadratic-model").config)
    optimizer = make(momentum=momentum)
    with pytest.raises(
        PluginError, match=r"momentum 'quadratic-model' \(.*Rule\) failed \(coefficients, step 1\): Key"
    ):
        optimizer.step(*data())


def test_the_model_s_own_errors_stay_what_they_are() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("mine")  # not what torch or Python raise for inputs that do not fit

    with pytest.raises(ZeroDivisionError, match="mine"):
        KFAC(Broken(), likelihood="categorical").step(*data())


def guest_of(scale: str, approx: Any, **options: Any) -> tuple[Preconditioned, Callable[[int], None]]:
    """A guest around AdamW, and a step of it on a mini-batch."""
    model = net()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    opt = Preconditioned(model, base, likelihood="categorical", scale=scale, approx=approx, every=4, **options)

    def step(k: int) -> None:
        x, y = data(k)
        opt.zero_grad()
        with opt.watch():
            z = model(x)
            opt.observe(z)
        nn.functional.cross_entropy(z, y).backward()
        opt.step()

    return opt, step


SCALES = ["graft", "kl", "none"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["exception", "shape", "side", "number"])
def test_a_guest_names_them_too(name: str, scale: str) -> None:
    """The step of the base is whole or not begun, and the next one can be taken."""
    how, kind, message = HOW[name]
    opt, step = guest_of(scale, failing(how, 6))
    for k in range(5):
        step(k)
    model, base = copy.deepcopy((opt.network.model, opt.base))
    with pytest.raises(kind, match=message):
        step(5)
    if scale == "graft":
        x, y = data(5)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        base.step()
    assert torch.equal(dense.theta(opt.network.model), dense.theta(model))
    assert opt.steps == (6 if scale == "graft" else 5)
    assert opt.network.recording is None


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_guest_names_what_is_not_finite_once_a_block_and_goes_on(scale: str, value: float) -> None:
    opt, step = guest_of(scale, failing(lambda v: [v[0] + value, v[1] + value], 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(5):
            step(k)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(5, 10):
            step(k)
    said = [str(w.message) for w in caught]
    assert len(said) == 2
    for block, text in zip(("0", "2"), said, strict=True):
        assert text.startswith(f"Preconditioned: {block}: approx 'blockdiag' (")
        assert "Mine) made NaN or infinity of a finite gradient in step 6; the base optimizer's own step" in text
        assert text.removeprefix("Preconditioned: ") in opt.explain()
    assert bool(torch.isfinite(dense.theta(opt.network.model)).all())


def test_a_guest_on_a_device_names_it_when_it_waits_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_free", lambda value: False)
    _, step = guest_of("graft", failing(lambda v: [v[0], v[1] * torch.nan], 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(7):  # statistics are due in steps 1, 2, 3, 4 and 8
            step(k)
    with pytest.warns(UserWarning, match="2: approx 'blockdiag' .*Mine. made NaN"):
        step(7)


def test_a_gradient_that_is_not_finite_is_nobodys_fault_but_the_users() -> None:
    opt, step = guest_of("graft", "blockdiag")
    for k in range(4):
        step(k)
    for p in opt.network.model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def test_other_components_of_a_guest_that_raise_are_named() -> None:
    """In `observe`, where the estimator, the likelihood, the moments and layer types of others run."""
    registry = get_registry()

    class Vectors(type(registry.build("estimator", "monte-carlo"))):  # type: ignore[misc]  # a class of the registry's
        def output_vectors(self, *_: Any) -> Tensor:
            raise KeyError("v")

    class Drawn(type(registry.build("likelihood", "categorical"))):  # type: ignore[misc]  # likewise
        def sample(self, *_: Any) -> Tensor:
            raise KeyError("y")

    _, step = guest_of("graft", "blockdiag", estimator=Vectors(registry.build("estimator", "monte-carlo").config))
    with pytest.raises(PluginError, match=r"estimator 'monte-carlo' \(.*Vectors\) failed \(output_vectors, observe, s"):
        step(0)
    opt, step = guest_of("graft", "blockdiag")
    assert opt.loss is not None
    opt.loss.likelihood = Drawn(opt.loss.likelihood.config)
    with pytest.raises(PluginError, match=r"likelihood 'categorical' \(.*Drawn\) failed \(sample, observe, step 1"):
        step(0)
