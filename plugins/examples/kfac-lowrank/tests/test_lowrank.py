"""The layer type passes kfacore's suite, and what it shows of a small net is right."""

from __future__ import annotations

import torch
from kfacore.roles import Use
from kfacore.testing import LayerSuite
from torch import nn

from kfac_lowrank.layer import LowRankLayer
from kfac_lowrank.module import LowRank


class TestLowRank(LayerSuite):
    name = "lowrank"
    shape = (3, 5)  # three positions a case

    def module(self) -> nn.Module:
        return LowRank(5, 4, rank=2)


def test_blocks_are_the_two_maps() -> None:
    down, up = LowRankLayer().blocks("net.0", LowRank(5, 4, rank=2))
    assert (down.name, down.params, down.shape) == ("net.0.down", ("net.0.down",), (2, 5))
    assert (up.name, up.params, up.shape) == ("net.0.up", ("net.0.up", "net.0.bias"), (4, 3))


def test_rows_of_up_are_what_came_down() -> None:
    module, uses = LowRank(5, 4, rank=2).double(), list[Use]()
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    LowRankLayer().forward(module, uses.append)(x)
    _, up = LowRankLayer().blocks("", module)
    rows = LowRankLayer().rows(up, module, uses[1])
    codes = (x @ module.down.T).detach()
    assert torch.equal(rows[:, 0], torch.cat([codes, torch.ones(6, 1, dtype=x.dtype)], 1))
