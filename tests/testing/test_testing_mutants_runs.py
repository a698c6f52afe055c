"""Planted errors in optimizers, sinks and problems: each fails its suite with a message that points at the cause."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.approx.diagonal import Diagonal
from kfac_plugins.approx.exact import Exact
from kfac_plugins.optimizers import SgdConfig
from kfac_plugins.optimizers.torch_optimizers import Sgd
from kfac_plugins.problems import NpzConfig
from kfac_plugins.problems.npz import Npz
from kfac_plugins.sinks.jsonl import Jsonl
from kfacore.errors import UnsupportedModelError
from kfacore.registry import get_registry
from kfacore.roles import ProblemData, Split
from kfacore.testing import OptimizerSuite, ProblemSuite, SinkSuite

Approx = type[Diagonal] | type[Exact]


def failing(call: Callable[..., None], message: str, **arguments: Any) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        call(**arguments)


# --- optimizers -------------------------------------------------------------------------------------------------------


def changed(report: Any, **values: Any) -> Any:
    return type(report)(**{**report.__dict__, **values})


class LossAfterwards(Sgd):
    def step(self, inputs: Any, targets: Tensor) -> Any:
        report = super().step(inputs, targets)
        return changed(report, loss=self.likelihood.nll(self.model(inputs), targets).mean().detach())


class NoPenalty(Sgd):
    def step(self, inputs: Any, targets: Tensor) -> Any:
        report = super().step(inputs, targets)
        return changed(report, objective=report.loss)


class FromZero(Sgd):
    def step(self, inputs: Any, targets: Tensor) -> Any:
        report = super().step(inputs, targets)
        return changed(report, step=report.step - 1)


class KeepsGraph(Sgd):
    def step(self, inputs: Any, targets: Tensor) -> Any:
        loss = self.likelihood.nll(self.model(inputs), targets).mean()
        return changed(super().step(inputs, targets), loss=loss)


class PlainNumbers(Sgd):
    def step(self, inputs: Any, targets: Tensor) -> Any:
        return changed(super().step(inputs, targets), alpha=0.1)


class Undecayed(Sgd):
    """Reports the penalty and does not minimise it."""

    def measure(self, inputs: Any, targets: Tensor) -> Any:
        measured = super().measure(inputs, targets)
        with torch.no_grad():
            torch._foreach_add_(measured.gradients, self.parameters, alpha=-self.weight_decay)
        return measured


class Noisy(Sgd):
    def measure(self, inputs: Any, targets: Tensor) -> Any:
        measured = super().measure(inputs, targets)
        for gradient in measured.gradients:
            gradient.add_(torch.randn(gradient.shape, dtype=gradient.dtype), alpha=1e-3)
        return measured


class Amnesiac(Sgd):
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


class Restarting(Sgd):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "steps": 0})


class Thawing(Sgd):
    def step(self, inputs: Any, targets: Tensor) -> Any:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.999)
        return super().step(inputs, targets)


class Uphill(Sgd):
    def measure(self, inputs: Any, targets: Tensor) -> Any:
        measured = super().measure(inputs, targets)
        torch._foreach_neg_(measured.gradients)
        return measured


class Casting(Sgd):
    def step(self, inputs: Any, targets: Tensor) -> Any:
        self.model.double()
        return super().step(inputs.double(), targets.double())


OPTIMIZERS: dict[type[Sgd], tuple[str, dict[str, Any], str]] = {
    LossAfterwards: ("test_first_report", {}, r"loss of the first step is .*, before the step it was"),
    NoPenalty: ("test_first_report", {}, r"objective of the first step .*the objective with eta/2 \|\|theta\|\|\^2"),
    FromZero: ("test_first_report", {}, r"the first step is number 1, the report says 0"),
    KeepsGraph: ("test_reports_are_scalars_on_the_device", {}, r"loss keeps the graph of the step alive: detach it"),
    PlainNumbers: ("test_reports_are_scalars_on_the_device", {}, r"alpha is a float, not a tensor"),
    Undecayed: (
        "test_weight_decay_is_minimised_too",
        {},
        r"must take the gradient of the objective, eta theta included",
    ),
    Noisy: ("test_deterministic", {}, r"draws from the global generator: use `seed`"),
    Amnesiac: ("test_resumes_bit_for_bit", {"stop": 4}, r"resumed after step 4 takes another path: .*buffers"),
    Restarting: ("test_resumes_bit_for_bit", {"stop": 4}, r"a resumed run counts its steps from 1 again"),
    Thawing: ("test_frozen_parameters_stay", {}, r"a frozen parameter was changed"),
    Uphill: ("test_the_objective_falls", {}, r"30 steps take the objective from"),
    Casting: (
        "test_dtype_and_device_are_kept",
        {"dtype": torch.float32, "device": "cpu"},
        r"0\.weight became torch\.float64",
    ),
}


class SgdSuite(OptimizerSuite):
    name = "sgd"
    optimizer: ClassVar[type[Sgd]] = Sgd

    def start(self, model: nn.Module, *, weight_decay: float = 1e-3, seed: int = 0, **options: Any) -> Any:
        likelihood = get_registry().build("likelihood", self.likelihood)
        return self.optimizer.for_run(
            SgdConfig(), model=model, likelihood=likelihood, parts={}, weight_decay=weight_decay, seed=seed
        )


@pytest.mark.parametrize("mutant", OPTIMIZERS, ids=lambda mutant: mutant.__name__)
def test_planted_errors_of_optimizers(mutant: type[Sgd]) -> None:
    test, arguments, message = OPTIMIZERS[mutant]
    failing(getattr(type("Suite", (SgdSuite,), {"optimizer": mutant})(), test), message, **arguments)
    getattr(SgdSuite(), test)(**arguments)


# --- sinks ------------------------------------------------------------------------------------------------------------


class Appending(Jsonl):
    def open(self, run: Path, *, step: int) -> None:
        super().open(run, step=10**9)


class Truncating(Jsonl):
    def open(self, run: Path, *, step: int) -> None:
        super().open(run, step=0)


class Buffering(Jsonl):
    """Keeps events to itself until it is closed."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.kept: list[Mapping[str, Any]] = []

    def write(self, event: Mapping[str, Any]) -> None:
        self.kept.append(event)

    def close(self) -> None:
        for event in self.kept:
            super().write(event)
        self.kept = []
        super().close()


class Reversing(Buffering):
    def close(self) -> None:
        self.kept.reverse()
        super().close()


class Editing(Jsonl):
    def write(self, event: Mapping[str, Any]) -> None:
        if isinstance(event, dict):
            event["seen"] = True
        super().write(event)


class Dropping(Jsonl):
    def write(self, event: Mapping[str, Any]) -> None:
        if all(value == value and value is not None for value in event.values()):
            super().write(event)


class Global(Jsonl):
    shared: ClassVar[list[Jsonl]] = []

    def open(self, run: Path, *, step: int) -> None:
        super().open(run, step=step)
        self.shared.append(self)

    def write(self, event: Mapping[str, Any]) -> None:
        Jsonl.write(self.shared[-1], event)


class Losing(Jsonl):
    def close(self) -> None:
        if self._file is None and self._path.name:
            (self._path).write_text("")
        super().close()


SINKS: dict[type[Jsonl], tuple[str, str]] = {
    Reversing: ("test_events_come_back_in_order", r"five events went in, .* came back"),
    Buffering: ("test_flush_makes_them_readable", r"after flush only 0 of 3 events can be read"),
    Appending: ("test_resuming_forgets_what_came_after_the_checkpoint", r"must forget the events after its `step`"),
    Truncating: ("test_resuming_without_new_events_keeps_the_old_ones", r"opening and closing again loses events"),
    Editing: ("test_events_are_left_alone", r"write changed the event from .* to .*'seen': True"),
    Dropping: ("test_any_event_is_taken", r"one event with a loss went in among odd ones, 0 came back"),
    Global: ("test_two_runs_do_not_mix", r"the events of one are not its own"),
    Losing: ("test_closing_is_always_possible", r"closing twice loses events"),
}


class JsonlSuite(SinkSuite):
    name = "jsonl"
    sink: ClassVar[type[Jsonl]] = Jsonl

    def build(self, **options: Any) -> Any:
        return self.sink()

    def events(self, run: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mutant", SINKS, ids=lambda mutant: mutant.__name__)
def test_planted_errors_of_sinks(mutant: type[Jsonl], tmp_path: Path) -> None:
    test, message = SINKS[mutant]
    for name in ("wrong", "right"):
        (tmp_path / name).mkdir()
    failing(getattr(type("Suite", (JsonlSuite,), {"sink": mutant})(), test), message, tmp_path=tmp_path / "wrong")
    getattr(JsonlSuite(), test)(tmp_path=tmp_path / "right")


# --- problems ---------------------------------------------------------------------------------------------------------


def with_train(data: ProblemData, **values: Any) -> ProblemData:
    split = Split(**{"inputs": data.train.inputs, "targets": data.train.targets, **values})
    return ProblemData(split, None, data.checksum, data.source)


class DoubleData(Npz):
    def load(self) -> ProblemData:
        data = super().load()
        return with_train(data, inputs=data.train.inputs.double())


class CopiedTargets(Npz):
    def load(self) -> ProblemData:
        data = super().load()
        return with_train(data, targets=data.train.inputs.clone())


class Shuffled(Npz):
    def load(self) -> ProblemData:
        data = super().load()
        x = data.train.inputs[torch.randperm(len(data.train))]
        return with_train(data, inputs=x, targets=x)


class Stamped(Npz):
    count: ClassVar[list[int]] = []

    def load(self) -> ProblemData:
        data = super().load()
        self.count.append(0)
        return ProblemData(data.train, data.test, f"{len(self.count):064d}", data.source)


class GlobalModel(Npz):
    def build_model(self, generator: torch.Generator) -> nn.Module:
        model = super().build_model(generator)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        return model


class SameModel(Npz):
    def build_model(self, generator: torch.Generator) -> nn.Module:
        return super().build_model(torch.Generator().manual_seed(0))


class HalfModel(Npz):
    def build_model(self, generator: torch.Generator) -> nn.Module:
        return super().build_model(generator).double()


class HiddenNoise(nn.Module):
    """Draws from a generator that nobody can find."""

    def forward(self, x: Tensor) -> Tensor:
        return x * HIDDEN.random()


HIDDEN = random.Random(1)


class Noisy(Npz):
    def build_model(self, generator: torch.Generator) -> nn.Module:
        return nn.Sequential(HiddenNoise(), *super().build_model(generator).children())


class TooBright(Npz):
    def picture(self, values: Tensor) -> Tensor:
        return values * 255


class Widescreen(Npz):
    image_shape = (5, 5)  # type: ignore[assignment]  # a property in Npz


PROBLEMS: dict[type[Npz], tuple[str, str]] = {
    DoubleData: ("test_data_are_whole", r"train inputs are torch\.float64, not float32"),
    CopiedTargets: ("test_task_and_targets_belong_together", r"must be the same tensor as its inputs"),
    Shuffled: ("test_data_are_the_same_every_time", r"loading twice gives other training inputs"),
    Stamped: ("test_data_are_the_same_every_time", r"the same data have another checksum"),
    GlobalModel: ("test_the_model_depends_on_the_generator_alone", r"draw every number from the generator"),
    SameModel: ("test_the_model_depends_on_the_generator_alone", r"another seed gives the same parameters"),
    HalfModel: ("test_the_model_depends_on_the_generator_alone", r"a parameter is torch\.float64, not float32"),
    TooBright: ("test_pictures", r"picture returns 2\d\d, above 1"),
    Widescreen: ("test_pictures", r"image_shape is 5 x 5, a case has 20 numbers"),
}


class NpzSuite(ProblemSuite):
    name = "npz"
    problem: ClassVar[type[Npz]] = Npz

    def build(self, **options: Any) -> Any:
        return self.problem(NpzConfig.model_validate(options))

    def data(self, folder: Path) -> dict[str, Any]:
        x = np.random.default_rng(0).random((30, 4, 5)).astype(np.float32)
        np.savez(folder / "mine.npz", x_train=x[:20], x_test=x[20:])
        return {"file": str(folder / "mine.npz"), "sizes": [6, 3, 6]}


@pytest.mark.parametrize("mutant", PROBLEMS, ids=lambda mutant: mutant.__name__)
def test_planted_errors_of_problems(mutant: type[Npz], tmp_path: Path) -> None:
    test, message = PROBLEMS[mutant]
    for name in ("wrong", "right"):
        (tmp_path / name / "files").mkdir(parents=True)
    failing(getattr(type("Suite", (NpzSuite,), {"problem": mutant})(), test), message, tmp_path=tmp_path / "wrong")
    getattr(NpzSuite(), test)(tmp_path=tmp_path / "right")


def test_a_model_that_kfac_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    suite = type("Suite", (NpzSuite,), {"problem": Noisy})()
    with pytest.raises(UnsupportedModelError, match=r"^0 \(HiddenNoise\) draws random numbers"):
        suite.test_kfac_takes_the_model(tmp_path=tmp_path)
