"""What the processes of a test world do with `kfacore.lab.training`, as functions of a module that they can find."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from small_runs import small_config

from kfacore.errors import KfacError
from kfacore.lab.training.loop import train
from kfacore.registry import get_registry


def trained(rank: int, folder: Path, name: str, more: list[str], options: dict[str, Any]) -> Any:
    """Train, and say how it ended."""
    said: list[str] = []
    try:
        result = train(
            small_config(folder, *more),
            registry=get_registry(),
            listeners=[lambda event: said.append(event["event"])],
            **(options or {"out": folder / name}),
        )
    except KfacError as error:
        return type(error).__name__, str(error), error.exit_code, said
    return result.step, dict(result.measures), said


def stopped(rank: int, folder: Path, name: str, more: list[str]) -> Any:
    """The last process alone receives SIGTERM in its eighth step."""
    from kfacore.optim.kfac import KFAC

    step = KFAC.step

    def signalled(self: KFAC, *args: Any, **more: Any) -> Any:
        if self.steps == 7 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **more)

    KFAC.step = signalled  # type: ignore[method-assign]
    try:
        return trained(rank, folder, name, more, {})
    finally:
        KFAC.step = step  # type: ignore[method-assign]
