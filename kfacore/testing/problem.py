"""The conformance suite of problems: data, model and configuration fit together and are the same every time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from kfacore.errors import ConfigError, DataError
from kfacore.host import seed_generators
from kfacore.lab.config.resolve import resolve
from kfacore.lab.training.setup import check_data
from kfacore.network import Linearizer
from kfacore.registry import get_registry
from kfacore.roles.problem import Problem, ProblemData
from kfacore.schema.slots import ProblemConfig
from kfacore.testing.base import ComponentSuite

__all__ = ["ProblemSuite"]

_CASES = 16


class ProblemSuite(ComponentSuite):
    """Tests of a problem. Set `name`; define `data` if it reads files.

    Attributes:
        reads_files: Whether `load` needs files that may be missing.
        sizes_from_data: Whether the model's sizes come from the data, so that it cannot be built without them.
        linearizable: Whether K-FAC must take the model (false for problems made for other optimizers).
    """

    slot = "problem"
    reads_files: ClassVar[bool] = False
    sizes_from_data: ClassVar[bool] = False
    linearizable: ClassVar[bool] = True

    def data(self, folder: Path) -> dict[str, Any]:
        """Write small data files into an empty folder and return the options that lead to them."""
        return {}

    @pytest.fixture(autouse=True)
    def places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No data of this machine are seen, and nothing is kept."""
        for variable, name in (("KFAC_DATA", "data"), ("XDG_CACHE_HOME", "cache"), ("SCIKIT_LEARN_DATA", "sklearn")):
            (tmp_path / name).mkdir()
            monkeypatch.setenv(variable, str(tmp_path / name))
        (tmp_path / "files").mkdir()

    def prepared(self, tmp_path: Path) -> Problem:
        """A fresh problem whose data are there."""
        folder = tmp_path / "files"
        options = {} if any(folder.iterdir()) else self.data(folder)
        self._found = {**getattr(self, "_found", {}), **options}
        problem: Problem = self.build(**self._found)
        return problem

    def model(self, problem: Problem, seed: int = 0) -> nn.Module:
        """Its model."""
        return problem.build_model(torch.Generator().manual_seed(seed))

    def test_data_are_whole(self, tmp_path: Path) -> None:
        """On the CPU in float32, as many targets as inputs, finite, as the suggested likelihood wants them."""
        problem = self.prepared(tmp_path)
        data = problem.load()
        assert isinstance(data, ProblemData), f"load must return a ProblemData, found {type(data).__name__}"
        for name, split in (("train", data.train), ("test", data.test)):
            if split is None:
                continue
            kind = split.inputs.dtype
            assert kind in (torch.float32, torch.int64), f"{name} inputs are {kind}, not float32 (or int64 tokens)"
            assert split.inputs.device.type == "cpu", f"{name} inputs are on {split.inputs.device}, not on the CPU"
            assert split.targets.device.type == "cpu", f"{name} targets are on {split.targets.device}, not on the CPU"
            if split.targets.is_floating_point():
                assert split.targets.dtype == torch.float32, f"{name} targets are {split.targets.dtype}, not float32"
        model = self.model(problem)
        z = model(data.train.inputs[:_CASES])
        assert z.dim() >= 2, f"the model must return (cases, outputs) or (cases, ..., outputs), found {tuple(z.shape)}"
        assert z.shape[0] == min(_CASES, len(data.train)), f"the model returns {z.shape[0]} rows"
        assert bool(torch.isfinite(z).all()), "the initial model's outputs are not finite"
        config = self._resolved()
        check_data(model, get_registry().build("likelihood", config.likelihood), data)

    def test_task_and_targets_belong_together(self, tmp_path: Path) -> None:
        """An autoencoder's targets are its inputs, the same object; a classifier's are integers."""
        problem = self.prepared(tmp_path)
        data = problem.load()
        tasks = ("autoencoder", "classifier", "regression")
        assert problem.task in tasks, f"task is {problem.task!r}, not one of {', '.join(tasks)}"
        for split in (data.train, data.test):
            if split is None:
                continue
            if problem.task == "autoencoder":
                assert split.targets is split.inputs, "an autoencoder's targets must be the same tensor as its inputs"
            if problem.task == "classifier":
                assert not split.targets.is_floating_point(), f"classes must be integers, found {split.targets.dtype}"

    def test_data_are_the_same_every_time(self, tmp_path: Path) -> None:
        """Bit for bit, with a checksum that says so and words for where they come from."""
        first, second = (self.prepared(tmp_path).load() for _ in range(2))
        assert torch.equal(first.train.inputs, second.train.inputs), "loading twice gives other training inputs"
        assert torch.equal(first.train.targets, second.train.targets), "loading twice gives other training targets"
        assert first.checksum == second.checksum, "the same data have another checksum"
        assert re.fullmatch(r"[0-9a-f]{64}", first.checksum), f"checksum is no SHA-256 in hex: {first.checksum!r}"
        assert first.source.strip(), "source must say in words where the data come from"

    def test_the_model_depends_on_the_generator_alone(self, tmp_path: Path) -> None:
        """Float32 on the CPU; the same seed the same parameters, whatever the global generator's state is."""
        problem = self.prepared(tmp_path)
        models = []
        for number, seed in enumerate((0, 0, 1)):
            with torch.random.fork_rng(devices=[]):
                seed_generators(100 + number)
                models.append(self.model(problem, seed))
        states = [[p.detach() for p in model.parameters()] for model in models]
        assert states[0], "the model has no parameters"
        for parameter in states[0]:
            assert parameter.dtype == torch.float32, f"a parameter is {parameter.dtype}, not float32"
            assert parameter.device.type == "cpu", f"a parameter is on {parameter.device}, not on the CPU"
        assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True)), (
            "two models from one seed differ: draw every number from the generator"
        )
        assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True)), (
            "another seed gives the same parameters"
        )

    def test_the_model_needs_no_data(self, tmp_path: Path) -> None:
        """`--dry-run` and the tests of machines without the files; nothing is written either."""
        if self.sizes_from_data:
            with pytest.raises((ConfigError, DataError)):
                self.model(self.build())
            return
        self.model(self.build())
        kept = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert not kept, f"building the model wrote {kept[0].name}"

    def test_kfac_takes_the_model(self, tmp_path: Path) -> None:
        """Some layers of the model can be preconditioned, and J v can be taken."""
        problem = self.prepared(tmp_path)
        model, inputs = self.model(problem), problem.load().train.inputs[:4]
        if self.linearizable:
            found = Linearizer(model, layers=get_registry().layers())(inputs).layers
            assert any(block.users for block in found), "the model has no layers to precondition"

    def test_pictures(self, tmp_path: Path) -> None:
        """Where there is an image shape, a case fills it, and its picture has intensities in [0, 1]."""
        problem = self.prepared(tmp_path)
        inputs = problem.load().train.inputs[:_CASES]
        if problem.image_shape is None:
            assert torch.equal(problem.picture(inputs), inputs), "without images there is nothing to map"
            return
        height, width = problem.image_shape
        found = inputs[0].numel()
        assert found == height * width, f"image_shape is {height} x {width}, a case has {found} numbers"
        picture = problem.picture(inputs)
        assert picture.shape == inputs.shape, f"picture returns shape {tuple(picture.shape)} for {tuple(inputs.shape)}"
        low, high = float(picture.min()), float(picture.max())
        assert low >= -1e-6, f"picture returns {low:.3g}, below 0"
        assert high <= 1 + 1e-6, f"picture returns {high:.3g}, above 1"

    def test_missing_data_are_explained(self, tmp_path: Path) -> None:
        """DataError that says how to get them, at once and not as a traceback."""
        if not self.reads_files:
            self.build().load()  # needs nothing
            return
        with pytest.raises((DataError, ConfigError)) as caught:
            self.build(data_dir=str(tmp_path / "files")).load()
        message = str(caught.value)
        assert re.search(r"--data-dir|kfac data|--set|problem\.", message), (
            f"the message does not say what to do (name --data-dir, kfac data fetch or the key to set): {message}"
        )

    def test_suggested_configuration(self) -> None:
        """What the problem suggests is a valid configuration."""
        config = self._resolved()
        assert config.problem.kind == self.name, "the resolved problem is another one"

    def _resolved(self) -> Any:
        suggested = self.component.config
        assert issubclass(suggested, ProblemConfig), f"{suggested.__name__} does not derive from ProblemConfig"
        assert "likelihood" in suggested.run_defaults, (
            f"{suggested.__name__}.run_defaults must suggest a likelihood, for example "
            "{'likelihood': {'kind': 'bernoulli'}}"
        )
        options = {**self.options, **getattr(self, "_found", {})}
        return resolve(get_registry(), flags={"problem": {"kind": self.name, **options}})
