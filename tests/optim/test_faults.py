"""Components that fail while they run are named, with the block and the step, whoever brought them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dense
import pytest
import torch
from test_contract import data, make, net
from torch import Tensor, nn

from kfac_plugins.approx.blockdiag import BlockDiagonal
from kfac_plugins.momentum.quadratic_model import QuadraticModelMomentum
from kfacore import KFAC, NumericalError, PluginError, Preconditioned
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
    "shape": (lambda v: [v[0], v[1].T], PluginError, r"Mine\): solve failed on the blocks 0, 2: RuntimeError.*size"),
    "number": (lambda v: v[:1], PluginError, r"Mine\): solve failed on the blocks 0, 2: RuntimeError"),
    "NaN": (lambda v: [v[0], v[1] * torch.nan], NumericalError, r"^2: approx 'blockdiag' \(.*Mine\) made NaN or inf"),
}


@pytest.mark.parametrize("momentum", ["quadratic-model", "fixed"])
@pytest.mark.parametrize("uses", [0, 5])
@pytest.mark.parametrize("name", HOW)
def test_a_solve_that_fails_at_first_or_later_is_named(name: str, uses: int, momentum: str) -> None:
    """In the first refresh, and in an ordinary step in between; the parameters are then what they were."""
    how, kind, message = HOW[name]
    if uses == 0 and name in ("shape", "number"):
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


def test_a_guest_names_them_too() -> None:
    model = net()
    approx = failing(broken, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    guest = Preconditioned(model, base, likelihood="categorical", approx=approx)

    def steps(count: int) -> None:
        for k in range(count):
            x, y = data(k)
            with guest.watch():
                z = model(x)
                guest.observe(z)
                loss = nn.functional.cross_entropy(z, y)
            loss.backward()
            guest.step()
            guest.zero_grad()

    with pytest.raises(PluginError, match=r"approx 'blockdiag' \(.*\).*ZeroDivisionError: by nothing"):
        steps(6)
