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
from kfacore.parallel.cores import torch_threads

__all__ = ["Launches", "main", "measure"]

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
        kinds = {4: "ordinary", 5: "adapts lambda", 20: "refreshes"}
        for step in range(1, 21):
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
            if step == 4:
                ordinary[name] = launches.operations
    report.table(f"launches: {net} net, {layers} layers, {device}", rows)
    return ordinary


def main(arguments: list[str]) -> int:
    """Print operations a layer and waits of each kind of step, and JSON with ``--json FILE``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__)
    parser.add_argument("--net", choices=sorted(NETS), default="mnist")
    parser.add_argument("--detail", action="store_true", help="also list the operations of an ordinary step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    report = Report("launches")
    ordinary = measure(report, options.net, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for name, operations in ordinary.items() if options.detail else ():
        rows = [{"operation": operation, "count": count} for operation, count in operations.most_common()]
        report.table(f"{name}, ordinary step", rows)
    report.save(options.json)
    return 0
