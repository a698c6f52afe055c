"""A step over micro-batches is the step over their union, in the memory of one."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import dense
import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC, DataError
from kfacore.optim.joint import Joint

CUTS = {"two": [0, 15, 30], "five": [0, 1, 9, 10, 22, 30], "one": [0, 30]}
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "whole": {"estimator": {"kind": "exact", "tau1": 1.0}, "momentum": {"kind": "quadratic-model", "tau2": 1.0}},
    "iterations": {"momentum": {"kind": "quadratic-model", "iterations": 3}},
    "tridiag": {"approx": "tridiag", "weight_decay": 1e-3},
    "diagonal": {"approx": "diagonal", "momentum": "none"},
    "empirical": {"estimator": "empirical", "trust": "undo"},
    "compared": {
        "damping": {"kind": "levenberg-marquardt", "gamma_rule": "compared", "lambda0": 0.5, "gamma_every": 3}
    },
}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def conv() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv1d(1, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))
    return nn.Sequential(nn.Unflatten(1, (1, 4)), body).double()


def batch(k: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def parts(cuts: list[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(each[a:b] for each in tensors) for a, b in pairwise(cuts)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [mlp, conv])
def test_a_step_over_micro_batches_is_the_step_over_their_union(kind: str, make: Any) -> None:
    whole = KFAC(make(), likelihood="categorical", **KINDS[kind])
    pieces = KFAC(make(), likelihood="categorical", **KINDS[kind])
    for k, cuts in enumerate(list(CUTS.values()) * 2):
        a, b = whole.step(*batch(k)), pieces.step(parts(cuts, *batch(k)))
        assert a.batch_size == b.batch_size == 30
        for key in ("loss", "objective", "error", "model_value", "rho", "lam", "gamma"):
            one, other = getattr(a, key), getattr(b, key)
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(
                    one, other, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
                )
        torch.testing.assert_close(dense.theta(whole.model), dense.theta(pieces.model), rtol=1e-10, atol=1e-11)


class Positions(nn.Module):
    """A position's outputs, and a second head a case."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(self.a(x))
        return {"words": self.b(y), "number": self.c(y.mean(1))}


def sequences(k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(12, 6, 4, generator=g, dtype=torch.float64)
    valid = torch.rand(12, 6, generator=g) > 0.3
    valid[:, 0] = True
    return x, x[..., :3].argmax(-1), x[:, 0, :2].clone(), valid


def test_masks_count_over_the_union() -> None:
    """The mean is over all valid positions, not a mean of means."""
    optimizers = [KFAC(Positions().double(), likelihood="categorical", output="words") for _ in range(2)]
    for k in range(4):
        x, y, _, valid = sequences(k)
        optimizers[0].step(x, y, valid)
        optimizers[1].step(parts([0, 2, 7, 12], x, y, valid))
    a, b = (dense.theta(opt.model) for opt in optimizers)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_several_heads() -> None:
    optimizers = [
        KFAC(Positions().double(), likelihood=Joint({"words": "categorical", "number": "gaussian"})) for _ in range(2)
    ]
    for k in range(3):
        x, y, z, _ = sequences(k)
        optimizers[0].step(x, {"words": y, "number": z})
        pieces = [(a, {"words": b, "number": c}) for a, b, c in parts([0, 5, 12], x, y, z)]
        optimizers[1].step(pieces)
    a, b = (dense.theta(opt.model) for opt in optimizers)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_draws_are_replayed_and_batch_statistics_are_those_of_each_micro_batch() -> None:
    """So large a lambda foresees half of the linear change, and that is what comes: the function is the same twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    damping = {"kind": "levenberg-marquardt", "lambda0": 1e6, "lambda_every": 1}
    optimizer = KFAC(model, likelihood="categorical", estimator="exact", damping=damping)
    before = int(model[1].num_batches_tracked)
    report = optimizer.step(parts([0, 12, 30], *batch(0)))
    assert report.rho is not None
    assert float(report.rho) == pytest.approx(2.0, abs=1e-3)
    assert int(model[1].num_batches_tracked) == before + 2


def test_one_graph_is_in_memory_at_a_time() -> None:
    """What the forward passes keep for their backward passes is counted: of no more than one micro-batch."""
    alive = [0, 0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = Counter(len(x))
            return x.clone()

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            return t.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g

    class Counter:
        def __init__(self, size: int) -> None:
            self.size = size
            alive[0] += size
            alive[1] = max(alive)

        def __del__(self) -> None:
            alive[0] -= self.size

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.inner(Counted.apply(x))  # type: ignore[no-untyped-call]
            return Counted.apply(z)  # type: ignore[no-untyped-call,no-any-return]

    optimizer = KFAC(Watched(), likelihood="categorical", momentum="none")
    x, y = batch(0)
    pieces = parts([0, 6, 12, 18, 24, 30], x, y)
    optimizer.step(pieces)
    gc.collect()
    alive[:] = [0, 0]
    optimizer.step(pieces)
    assert alive[1] <= 2 * 6 + 6, "two uses a pass, of one micro-batch, and the pass that follows"


def test_micro_batches_that_do_not_fit() -> None:
    optimizer = KFAC(Positions(), likelihood="categorical", output="words")
    x, y = torch.randn(4, 6, 4), torch.zeros(4, 6, dtype=torch.long)
    with pytest.raises(DataError, match="micro-batch 1 has no valid, others have one"):
        optimizer.step([(x, y, torch.ones(4, 6)), (x, y)])
    with pytest.raises(
        DataError, match=r"targets: micro-batch 0 has \(6,\) an example, micro-batch 1 \(5,\); pad them"
    ):
        optimizer.step([(x, y), (x[:, :5], y[:, :5])])
    with pytest.raises(DataError, match="targets of micro-batch 1: a tensor"):
        optimizer.step([(x, y), (x, 3)])


def test_a_step_that_fails_half_way_leaves_no_statistics_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    straight, interrupted = (KFAC(mlp(), likelihood="categorical") for _ in range(2))
    pieces = [parts([0, 10, 20, 30], *batch(k)) for k in range(3)]
    for optimizer in (straight, interrupted):
        optimizer.step(pieces[0])
    preconditioner = interrupted.preconditioner
    assert preconditioner is not None
    added = []

    def fail_later(samples: Any, own: Any = preconditioner.add) -> None:
        if added:
            raise KeyboardInterrupt
        added.append(1)
        own(samples)

    monkeypatch.setattr(preconditioner, "add", fail_later)
    with pytest.raises(KeyboardInterrupt):
        interrupted.step(pieces[1])
    monkeypatch.undo()
    interrupted.generator.set_state(straight.generator.get_state())
    for optimizer in (straight, interrupted):
        optimizer.step(pieces[2])
    assert torch.equal(dense.theta(straight.model), dense.theta(interrupted.model))
