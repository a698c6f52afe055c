"""What a GPU would pay for: dispatched torch operations and host synchronisations of a step, counted on any device.

Views and allocations cost no kernel and are not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import APPROXIMATIONS, DEFAULTS, kfac
from benchmarks.nets import NETS, build
from benchmarks.report import Report
from kfacore import KFAC
from kfacore.lab.models.gpt import GPT
from kfacore.parallel.cores import torch_threads

__all__ = ["Launches", "main", "measure", "measure_transformers"]

_FREE = frozenset(
    {
        "view",
        "_unsafe_view",
        "reshape",
        "t",
        "transpose",
        "permute",
        "select",
        "slice",
        "unsqueeze",
        "squeeze",
        "expand",
    }
    | {
        "as_strided",
        "detach",
        "alias",
        "unbind",
        "split",
        "split_with_sizes",
        "diagonal",
        "lift_fresh",
        "expand",
        "empty",
    }
    | {"empty_like", "new_empty", "new_empty_strided", "empty_strided", "is_same_size", "_has_same_storage_numel"}
    | {"_record_function_enter_new", "_record_function_exit", "_make_dual", "_unpack_dual", "_fw_primal"}
)
"""Views, allocations and bookkeeping of autograd."""

_ORDINARY, _ADAPTS, _REFRESH = 4, 5, 20
"""Steps that do nothing more, that adapt lambda, and that refresh besides."""

_EVERY = 5
"""The same in transformers, whose refresh is the first one after the three of the start: later ones are alike."""

_WAITS = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "equal"})


class Launches(TorchDispatchMode):
    """Counts operations by name while active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        name = func.overloadpacket.__name__
        if name in _WAITS:
            self.waits += 1
        elif name not in _FREE:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def measure(report: Report, net: str, device: torch.device) -> dict[str, Counter[str]]:
    """Add one table to the report.

    Returns:
        The operations of an ordinary step by name, for each approximation.
    """
    layers = len(NETS[net]) - 1
    x = torch.rand(64, NETS[net][0], generator=torch.Generator().manual_seed(0)).to(device)
    rows, ordinary = [], {}
    for name in DEFAULTS:
        optimizer = kfac(build(net, device), APPROXIMATIONS[name])
        kinds = {_ORDINARY: "ordinary", _ADAPTS: "adapts lambda", _REFRESH: "refreshes"}
        for step in range(1, _REFRESH + 1):
            # A dispatch mode sees its own thread only, and a refresh on a CPU would use others.
            with torch_threads(1), Launches() as launches:
                optimizer.step(x, x)
            if step in kinds:
                total = sum(launches.operations.values())
                rows.append(
                    {
                        "": f"{name}, {kinds[step]}",
                        "operations": total,
                        "a layer": total / layers,
                        "waits": launches.waits,
                    }
                )
            if step == _ORDINARY:
                ordinary[name] = launches.operations
    report.table(f"launches: {net} net, {layers} layers, {device}", rows)
    return ordinary


def measure_transformers(report: Report, depths: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Add a table of what equal blocks of a transformer add: the model's own passes, and what K-FAC dispatches.

    Args:
        report: Where it goes.
        depths: Numbers of blocks, of two transformers that are alike otherwise.
        device: Where to.

    Returns:
        How many times the operations of the first the second has, by kind of step.
    """
    few, many = ({**_model_alone(depth, device), **_steps_of(depth, device)} for depth in depths)
    report.table(
        f"launches: transformers of {depths[0]} and {depths[1]} equal blocks, {device}",
        [
            {"": name, f"with {depths[0]}": few[name], f"with {depths[1]}": many[name], "times": many[name] / few[name]}
            for name in few
        ],
    )
    return {name: many[name] / few[name] for name in few}


def _transformer(blocks: int, device: torch.device) -> tuple[GPT, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    model = GPT(13, 8, layers=blocks, width=16, heads=2, dropout=0.0, tied=False, generator=generator)
    return model.to(device), torch.randint(13, (4, 8), generator=generator).to(device)


def _model_alone(blocks: int, device: torch.device) -> dict[str, int]:
    model, tokens = _transformer(blocks, device)
    with torch_threads(1), Launches() as launches:
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return {"model, forward and backward": sum(launches.operations.values())}


def _steps_of(blocks: int, device: torch.device) -> dict[str, int]:
    """Operations of an ordinary step of K-FAC, and what a refresh adds to one."""
    found = {}
    for name in ("blockdiag", "tridiag"):
        model, tokens = _transformer(blocks, device)
        approx = {**APPROXIMATIONS[name], "refresh_growth": None, "refresh_share": None, "refresh_every": _EVERY}
        # Large and fixed: no step is looked at, and none goes far.
        damping = {"kind": "fixed", "lambda0": 1.0}
        optimizer = KFAC(model, likelihood="categorical", approx=approx, damping=damping, trust="none")
        counts = []
        for _ in range(_EVERY):
            with torch_threads(1), Launches() as launches:
                optimizer.step(tokens, tokens)
            counts.append(sum(launches.operations.values()))
        found[f"{name}, ordinary"] = counts[_ORDINARY - 1]
        found[f"{name}, refresh alone"] = counts[_EVERY - 1] - counts[_ORDINARY - 1]
    return found


def main(arguments: list[str]) -> int:
    """Print operations a layer and waits of each kind of step, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__)
    parser.add_argument("--net", choices=[*sorted(NETS), "transformer"], default="mnist")
    parser.add_argument("--detail", action="store_true", help="also list the operations of an ordinary step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("launches")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.net == "transformer":
        measure_transformers(report, (1, 12), device)
        report.save(options.json)
        return 0
    ordinary = measure(report, options.net, device)
    for name, operations in ordinary.items() if options.detail else ():
        rows = [{"operation": operation, "count": count} for operation, count in operations.most_common()]
        report.table(f"{name}, ordinary step", rows)
    report.save(options.json)
    return 0
