"""``kfac`` on a rank to which something happens: for torchrun, the fault's name before the command's arguments."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from kfacore.optim.kfac import KFAC

STEP = 8
"""The step in which it happens, to the last rank alone."""


def happens(fault: str, inputs: Any) -> None:
    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    elif fault == "full":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    elif fault == "nan":
        inputs[0] = torch.nan


def main() -> None:
    fault = sys.argv.pop(1)
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    step = KFAC._step

    def faulty(self: KFAC, inputs: Any, *rest: Any) -> Any:
        if last and self.steps + 1 == STEP:
            happens(fault, inputs)
        return step(self, inputs, *rest)

    KFAC._step = faulty  # type: ignore[method-assign]
    from kfac_cli.main import main as command

    sys.exit(command())


if __name__ == "__main__":
    main()
