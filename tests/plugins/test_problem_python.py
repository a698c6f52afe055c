"""Problems from a user's own function: the suite, what it may return, and where its errors are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kfac_plugins.problems.python import Python
from kfac_plugins.problems.python_config import PythonConfig
from kfacore.errors import ConfigError, DataError, KfacError
from kfacore.lab.config.resolve import resolve
from kfacore.registry import get_registry
from kfacore.testing import ProblemSuite

HEAD = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from kfacore.roles import Problem, ProblemData, Split

def net(o=2):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, o))

def data(n=12):
    x = torch.randn(n, 3)
    return x, (x.sum(1) > 0).long()
"""


def config_of(folder: Path, body: str, **options: object) -> PythonConfig:
    (folder / "mine.py").write_text(f"{HEAD}\n{body}\n", encoding="utf-8")
    return PythonConfig.model_validate({"target": "mine.py:f", "folder": str(folder), **options})


class TestFunctionSuite(ProblemSuite):
    name = "python"
    reads_files = True
    sizes_from_data = True

    def data(self, folder: Path) -> dict[str, Any]:
        return {"target": "mine.py:f", "folder": str(config_of(folder, "def f():\n    return net(), data()").folder)}


ANSWERS = {
    "return net(), data()": ("categorical", "classifier", 12, 0),
    "return net(), (data(), data(5)), 'categorical'": ("categorical", "classifier", 12, 5),
    "return {'model': net, 'train': data(), 'test': data(5)}": ("categorical", "classifier", 12, 5),
    "x, y = data()\n    return net(), TensorDataset(x, y)": ("categorical", "classifier", 12, 0),
    "x, y = data()\n    return net(1), (x.numpy().astype('f8'), x.numpy()[:, :1])": ("gaussian", "regression", 12, 0),
    "x, y = data()\n    return net(1), (x, (y == 1)[:, None]), nn.BCEWithLogitsLoss()": (
        "bernoulli", "regression", 12, 0,
    ),
    "x, y = data()\n    return net(1), (x, y[:, None].float())": ("bernoulli", "regression", 12, 0),
    "x, y = data()\n    return net(3), x, {'kind': 'gaussian', 'variance': 2.0}": ("gaussian", "autoencoder", 12, 0),
    "x, y = data()\n    return net(), Split(x, y)": ("categorical", "classifier", 12, 0),
    "x, y = data()\n    return net(), ProblemData(Split(x, y), None, 'c', 's')": ("categorical", "classifier", 12, 0),
    """class D(Dataset):
        def __len__(self): return 7
        def __getitem__(self, i): return np.full(3, i, np.float32), i % 2
    return net(), D()""": ("categorical", "classifier", 7, 0),
    """class P(Problem):
        task = 'classifier'
        def __init__(self): pass
        def load(self): return ProblemData(Split(*data()), None, 'c', 's')
        def build_model(self, generator):
            model = net()
            for p in model.parameters(): p.data.normal_(generator=generator)
            return model
    return P()""": ("categorical", "classifier", 12, 0),
}  # fmt: skip


@pytest.mark.parametrize("body", ANSWERS)
def test_what_a_function_may_return(tmp_path: Path, body: str) -> None:
    config = config_of(tmp_path, f"def f():\n    {body}")
    kind, task, train, test = ANSWERS[body]
    assert config.suggestions().values["likelihood"]["kind"] == kind
    problem = Python(config)
    loaded = problem.load()
    assert problem.task == task
    assert (len(loaded.train), 0 if loaded.test is None else len(loaded.test)) == (train, test)
    assert loaded.train.inputs.dtype == torch.float32
    models = [problem.build_model(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


WRONG = {
    "def g():\n    pass": (ConfigError, r"mine\.py has no function 'f'"),
    "f = 3": (ConfigError, "'f' of .* is a int, not a function"),
    "def f(a):\n    pass": (
        ConfigError, "problem.arguments do not fit the function: missing a required argument: 'a'",
    ),
    "def f():\n    return None": (ConfigError, "returns a NoneType; needed is a table"),
    "def f():\n    return {'modle': 1}": (ConfigError, "the key 'modle', did you mean 'model'"),
    "def f():\n    return {'model': net()}": (ConfigError, "needed are 'model' and either 'data' or 'train'"),
    "def f():\n    return 3, data()": (ConfigError, "the model is a int"),
    "def f():\n    return net(), 'data'": (DataError, "the data is a str; needed are"),
    "def f():\n    return net(), (data(), 'x')": (DataError, "the data is a str; needed are"),
    "def f():\n    x, y = data()\n    return net(), (x, 1000 * y)": (
        ConfigError, "no class numbers, and no likelihood",
    ),
    "def f():\n    return net(), data(), nn.NLLLoss()": (ConfigError, "likelihood: nn.NLLLoss is not taken"),
    "def f():\n    return g()\ndef g():\n    return torch.eye(2) @ torch.eye(3)": (
        ConfigError, r"mine\.py:f: .*mine\.py, line 18, in g: RuntimeError: mat1 and mat2",
    ),
    "def f(:\n    pass": (ConfigError, r"mine\.py, line 15: SyntaxError"),
    "import nowhere\ndef f():\n    pass": (ConfigError, r"mine\.py, line 15: ModuleNotFoundError: .*'nowhere'"),
    "raise SystemExit\ndef f():\n    pass": (ConfigError, r"line 15: it ends the program"),
    "from kfacore.errors import DataError\ndef f():\n    raise DataError('no file')": (
        DataError, r"mine\.py, line 17, in f: no file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", WRONG)
def test_errors_have_the_users_line(tmp_path: Path, body: str) -> None:
    kind, message = WRONG[body]
    with pytest.raises(kind, match=message) as caught:
        Python(config_of(tmp_path, body)).load()
    assert isinstance(caught.value, KfacError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "needs a function that returns it: kfac train module:function"),
        ("mine", "names no function; write module:function"),
        ("none.py:f", r"there is no file .*none\.py"),
        ("no_such_module:f", "there is no module 'no_such_module' in"),
        ("random:f", r"Python has another module of the name 'random'.*write random\.py:function"),
    ],
)
def test_targets_that_name_nothing(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "random.py").write_text("")
    with pytest.raises(ConfigError, match=message):
        Python(PythonConfig.model_validate({"target": target, "folder": str(tmp_path)})).load()
    with pytest.raises(ConfigError, match=r"problem\.folder .* is not a folder"):
        Python(PythonConfig.model_validate({"target": "a:b", "folder": str(tmp_path / "none")})).load()


def test_a_word_is_enough_and_arguments_reach_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of(tmp_path, "def f(o=2, likelihood=None):\n    return net(o), data(), likelihood")
    monkeypatch.chdir(tmp_path)
    config = resolve(get_registry(), flags={"problem": "mine.py:f"}, sets=["problem.arguments.o=5"])
    assert config.likelihood.kind == "categorical"
    assert isinstance(config.problem, PythonConfig)
    assert (config.problem.target, config.problem.folder) == (f"{tmp_path / 'mine.py'}:f", str(tmp_path))
    monkeypatch.chdir("/")
    model = Python(config.problem).build_model(torch.Generator())
    assert sum(p.numel() for p in model.parameters()) == 16 + 25


def test_the_global_generators_stay_as_they_were(tmp_path: Path) -> None:
    problem = Python(config_of(tmp_path, "def f():\n    np.random.rand(3)\n    return net(), data()"))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    problem.load()
    problem.build_model(torch.Generator())
    assert torch.equal(torch.rand(1), expected)
