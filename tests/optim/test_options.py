"""Options of `KFAC`: wrong ones are named with the nearest right one, right ones reach the network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_runs import small_config
from torch import Tensor, nn

from kfacore import KFAC, Preconditioned
from kfacore.errors import ConfigError, UnsupportedModelError
from kfacore.lab.config.resolve import resolve
from kfacore.lab.training.setup import build_parts
from kfacore.optim.options import KFACConfig
from kfacore.registry import get_registry
from kfacore.schema.table import PART_SLOTS


class Positions(nn.Module):
    """Outputs under a name, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"aux": x, "scores": self.b(torch.tanh(self.a(x)).sum(1))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unsupported": "serv"}, "unsupported must be 'serve' or 'error', found 'serv'; did you mean 'serve'"),
        ({"unsupported": 1}, "unsupported must be 'serve' or 'error', found 1$"),
        ({"output": 3}, "output must be a name or a function"),
        ({"reduce": "a"}, r"reduce must be a list of names of blocks, found 'a'; for one block write \['name'\]"),
        ({"reduce": ["aa"]}, "reduce names aa, which is no block; did you mean 'a'"),
        ({"approx": "blokdiag"}, "did you mean 'blockdiag'"),
        ({"approx": {"kind": "blockdiag", "max_dm": 3}}, "did you mean 'max_dim'"),
        ({"trust": "udo"}, "did you mean 'undo'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KFAC(Positions(), likelihood="categorical", **options)


@pytest.mark.parametrize("way", ["options", "config"])
def test_options_reach_the_network_and_copies(way: str) -> None:
    options: dict[str, Any] = {"likelihood": "categorical", "output": "scores", "reduce": ["a"]}
    model = Positions()
    opt = KFAC(model, **options) if way == "options" else KFAC(model, KFACConfig(**options))
    x, y = torch.randn(8, 5, 3), torch.randint(0, 2, (8,))
    opt.step(x, y)
    row = next(row for row in opt.explain() if row.block == "a")
    assert "pooled" in row.why
    _, twin = copy.deepcopy((model, opt))
    assert twin.linearizer.output == "scores"
    twin.step(x, y)
    strict = KFAC(nn.Sequential(nn.Linear(3, 2)), likelihood="categorical", unsupported="error")
    with pytest.raises(UnsupportedModelError):
        copy.deepcopy(strict).step(x, y)


def test_slots_that_nobody_names_are_the_same_in_python_and_in_the_command() -> None:
    run = resolve(get_registry())
    model = nn.Sequential(nn.Linear(3, 2))
    opt = KFAC(model, likelihood="categorical")
    assert {slot: getattr(opt, slot).config for slot in PART_SLOTS} == {slot: getattr(run, slot) for slot in PART_SLOTS}
    guest = Preconditioned(model, torch.optim.SGD(model.parameters(), lr=0.1), likelihood="categorical")
    assert guest.approx.config.kind == run.approx.kind
    assert guest.estimator.config.kind == run.estimator.kind


def test_run_configurations_have_them(tmp_path: Any) -> None:
    config = small_config(
        tmp_path, "optimizer.unsupported=error", 'optimizer.reduce=["2"]', "optimizer.output=logits", "approx.max_dim=8"
    )
    opt = build_parts(config.model_copy(update={"optimizer": config.optimizer}), get_registry()).optimizer
    assert isinstance(opt, KFAC)
    assert opt.linearizer.output == "logits"
    with pytest.raises(ConfigError, match="reduce names 77"):
        build_parts(small_config(tmp_path, 'optimizer.reduce=["77"]'), get_registry())
    config = small_config(tmp_path, "approx.max_dim=8")
    opt = build_parts(config, get_registry()).optimizer
    assert isinstance(opt, KFAC)
    assert next(iter(opt.explain())).input_side == "diagonal"
    with pytest.raises(ConfigError, match="serve"):
        small_config(tmp_path, "optimizer.unsupported=serv")
