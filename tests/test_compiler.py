"""Making and stepping an optimizer, and seeding, load no compiler, unless somebody has loaded it."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch.utils._python_dispatch import TorchDispatchMode

from kfacore.compiler import uncompiled, uncompiled_mode

SCRIPT = """
import sys
import torch
from torch import nn
from kfacore import KFAC
from kfacore.host import seed_generators

seed_generators(3)
model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
optimizer = KFAC(model, likelihood="categorical")
x, y = torch.randn(8, 4), torch.arange(8) % 2
optimizer.step(x, y)
optimizer.load_state_dict(optimizer.state_dict())
optimizer.step(x, y)
print("torch._dynamo" in sys.modules, len(optimizer.param_groups))
"""


def test_an_optimizer_and_a_seed_load_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout.split() == ["False", "1"], done.stderr


def bare() -> str:
    return "bare"


@functools.wraps(bare)
def wrapped() -> str:
    return "wrapped"


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loaded", [True, False])
def test_the_wrapper_is_left_out_only_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    if loaded:
        monkeypatch.setitem(sys.modules, "torch._dynamo", sys)
    else:
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    torchs = torch.optim.Optimizer.add_param_group
    inner = getattr(torchs, "__wrapped__", torchs)
    assert uncompiled(torchs) is (torchs if loaded else inner)
    assert uncompiled(bare) is bare
    assert uncompiled(wrapped) is wrapped, "what others have put on stays"
    mode = uncompiled_mode(Mode())
    assert isinstance(mode, Mode)
    assert (type(mode) is Mode) == loaded
    own = Mode.__torch_dispatch__
    wanted = own if loaded else getattr(own, "__wrapped__", own)
    assert type(mode).__torch_dispatch__ is wanted
