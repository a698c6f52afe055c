"""Which runs of a study are under way on one machine at the same time: their wall times are not comparable.

Imports no torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from kfacore.lab.studies.claims import birth, here_tag
from kfacore.lab.studies.state import state_folder

__all__ = ["Presence"]


class Presence:
    """While active, this process counts as one that executes a run on this machine.

    Whoever comes marks itself and everybody who is there as sharing; the mark stays with the run. Of two that come at
    once, at least one sees the other, since both write before they look.

    Args:
        study: The study folder.
        run: The run's hash.
    """

    def __init__(self, study: Path, run: str) -> None:
        self._study = study
        self._run = run
        self._folder = study / "machines" / here_tag()

    @property
    def shared(self) -> bool:
        """Whether the run has ever shared a machine with another run of the study."""
        return (state_folder(self._study, self._run) / "shared").exists()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        (self._folder / self._run).write_text(json.dumps([pid, birth(pid)]), encoding="utf-8")
        others = [file.name for file in self._folder.iterdir() if file.name != self._run and _lives(file)]
        if others:
            for run in (self._run, *others):
                (state_folder(self._study, run) / "shared").touch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self._folder / self._run).unlink(missing_ok=True)


def _lives(file: Path) -> bool:
    """Whether the process that wrote the file is still there."""
    try:
        pid, born = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # gone, or just being written by one who will look after us
        return False
    return bool(born) and birth(int(pid)) == born
