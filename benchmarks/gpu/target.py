"""Seconds and steps to a training error of an autoencoder: K-FAC against Adam and Nesterov's momentum, on the device.

The error is that of the running average of the parameters on the whole training set, read every ten steps; reading it
is not counted. On MNIST if its files are there, else on the curves that this project draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.part import Part, wait
from benchmarks.nets import build_chain
from kfacore import KFAC
from kfacore.errors import KfacError
from kfacore.lab.training.averaging import IterateAverage
from kfacore.registry import get_registry

__all__ = ["measure"]

_TARGETS = (20.0, 15.0, 10.0)
"""Squared errors of a reconstruction, summed over pixels; the studies' target is the last."""

_ETA = 1e-5


class _Run:
    """One training.

    Attributes:
        seconds: Spent in steps.
        reached: Seconds and steps to each target.
        best: Lowest error read.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self._images = model, images
        self._average = IterateAverage(model, start=20, decay=0.99)
        self.seconds, self.steps, self.best = 0.0, 0, math.inf
        self.reached: dict[float, tuple[float, int]] = {}

    def go(self, step: Callable[[Tensor], None], batch: int, seconds: float, every: int) -> None:
        """Train until the last target or the time is reached."""
        order = torch.Generator(self._images.device).manual_seed(0)
        end = time.monotonic() + seconds
        count = len(self._images)
        while time.monotonic() < end and _TARGETS[-1] not in self.reached:
            wait(self._images.device)
            start = time.perf_counter()
            for _ in range(every):
                chosen = torch.randint(count, (batch,), generator=order, device=self._images.device)
                step(self._images[chosen])
                self.steps += 1
                self._average.update(self.model, self.steps)
            wait(self._images.device)
            self.seconds += time.perf_counter() - start
            self._read()

    def _read(self) -> None:
        model = self._average.model
        if model is None:
            return
        with torch.no_grad():
            parts = [(torch.sigmoid(model(x)) - x).square().sum() for x in self._images.split(10_000)]
        error = float(torch.stack(parts).sum()) / len(self._images)
        self.best = min(self.best, error)
        for target in _TARGETS:
            if error <= target:
                self.reached.setdefault(target, (self.seconds, self.steps))


Build = Callable[[torch.Generator], nn.Module]


def _images(part: Part) -> tuple[str, Build, Tensor]:
    """What is trained on, what builds the net, and the training images."""
    if part.small:
        images = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)).to(part.device)
        return "noise", lambda _: build_chain((20, 12, 6, 12, 20), part.device), images
    if part.mnist is not None:
        try:
            problem = get_registry().build("problem", {"kind": "mnist", "data_dir": str(part.mnist)})
            return "MNIST", problem.build_model, problem.load().train.inputs.to(part.device)
        except KfacError as error:
            part.note("target", f"MNIST could not be read: {error}")
    problem = get_registry().build("problem", "curves")
    return "curves", problem.build_model, problem.load().train.inputs.to(part.device)


def _torch_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)
        loss.backward()
        optimizer.step()

    return step


def _contenders() -> dict[str, tuple[int, Callable[[nn.Module], Callable[[Tensor], None]]]]:
    """Batch size and step of each; learning rates are those that the studies found best."""

    def kfac(approx: str, **options: Any) -> Callable[[nn.Module], Callable[[Tensor], None]]:
        def start(model: nn.Module) -> Callable[[Tensor], None]:
            optimizer = KFAC(model, likelihood="bernoulli", approx={"kind": approx, **options}, weight_decay=_ETA)
            return lambda x: optimizer.step(x, x) and None  # type: ignore[func-returns-value]

        return start

    def nesterov(model: nn.Module) -> Callable[[Tensor], None]:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.99, nesterov=True, weight_decay=_ETA, fused=True
        )
        return _torch_step(model, optimizer)

    def adam(model: nn.Module) -> Callable[[Tensor], None]:
        return _torch_step(model, torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=_ETA, fused=True))

    return {
        "K-FAC blockdiag": (4000, kfac("blockdiag")),
        "K-FAC tridiag": (4000, kfac("tridiag")),
        "K-FAC blockdiag, background": (4000, kfac("blockdiag", refresh="background")),
        "Adam": (500, adam),
        "Nesterov": (500, nesterov),
    }


def measure(part: Part) -> None:
    """One row a contender; each has an equal share of the time that is left."""
    name, build, images = _images(part)
    table = f"target: {name}, {len(images)} images, {part.device.type}"
    contenders = _contenders()
    for done, (contender, (batch, start)) in enumerate(contenders.items()):
        seconds = 0.1 if part.small else (part.left - 2.0) / (len(contenders) - done)
        every = 10 if contender.startswith("K-FAC") else 100
        measured = partial(_one, part, table, build, images, contender, batch, start, seconds, every)
        part.attempt(table, contender, measured)


def _one(
    part: Part,
    table: str,
    build: Build,
    images: Tensor,
    name: str,
    batch: int,
    start: Callable[[nn.Module], Callable[[Tensor], None]],
    seconds: float,
    every: int,
) -> None:
    batch, every = (32, 2) if part.small else (batch, every)
    model = build(torch.Generator().manual_seed(0)).to(part.device)
    run = _Run(model, images)
    run.go(start(model), batch, seconds, every)
    row: dict[str, Any] = {"optimizer": name, "batch": batch}
    for target in _TARGETS:
        found = run.reached.get(target)
        row |= {f"s to {target:g}": found and found[0], f"steps to {target:g}": found and found[1]}
    part.row(table, **row, best=run.best if math.isfinite(run.best) else None, steps=run.steps, seconds=run.seconds)
