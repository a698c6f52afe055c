"""What is found out about a model is found out in full precision, whatever precision it is trained in."""

from __future__ import annotations

from collections.abc import Iterator

import guests
import pytest
import torch
from any_network import linearizer
from torch import Tensor, nn

from kfacore.host import full_precision, seed_generators


@pytest.fixture
def _low() -> Iterator[None]:
    """As on a GPU: TensorFloat-32 in convolutions, and in products as many loops have it."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


def state() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


class Seen(nn.Linear):
    """A Linear layer that keeps in which precision it ran."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.states: list[tuple[bool, str]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.states.append(state())
        return super().forward(x)


@pytest.mark.usefixtures("_low")
def test_settings_are_put_back() -> None:
    with full_precision():
        assert state() == (False, "highest")
        with full_precision():
            assert state() == (False, "highest")
        assert state() == (False, "highest")
    assert state() == (True, "high")
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert state() == (True, "high")


@pytest.mark.usefixtures("_low")
def test_the_model_is_looked_at_in_full_precision() -> None:
    """Its passes in training are in the precision that was chosen."""
    model = nn.Sequential(Seen(4, 5), nn.Tanh(), nn.Linear(5, 3))
    found = linearizer(model)
    found(torch.randn(6, 4))
    layer = model[0]
    assert (False, "highest") in layer.states
    layer.states.clear()
    found(torch.randn(6, 4))
    assert set(layer.states) == {(True, "high")}
    assert state() == (True, "high")


@pytest.mark.usefixtures("_low")
def test_a_guest_compares_gradients_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfacore.optim import guest_capture

    seen: list[tuple[bool, str]] = []
    inner = guest_capture.explained

    def spy(*args: object) -> object:
        seen.append(state())
        return inner(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(guest_capture, "explained", spy)
    model = guests.mlp()
    guests.run(guests.guest(model), model, 2)
    assert seen
    assert set(seen) == {(False, "highest")}
    assert state() == (True, "high")


def test_settings_that_cannot_be_told_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", refuses)
    with full_precision():
        pass


def test_a_seed_of_the_global_generators_makes_torchs_draws() -> None:
    with torch.random.fork_rng():
        seed_generators(5)
        assert torch.equal(torch.randn(4), torch.randn(4, generator=torch.Generator().manual_seed(5)))
