"""The events of a run as JSON Lines, the file that plots and reports are drawn from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from kfac_plugins.sinks import JsonlConfig
from kfacore.errors import DataError
from kfacore.lab.training.files import disk_errors, plain, read_events
from kfacore.roles import Sink
from kfacore.schema.slots import SlotConfig

__all__ = ["Jsonl"]


class Jsonl(Sink):
    """Appends each event to ``metrics.jsonl`` as one line of strict JSON (NaN and infinities are null).

    A line reaches the operating system with the call that writes it, so a killed process loses none; `flush` also
    waits for the disk.
    """

    Config: ClassVar[type[SlotConfig]] = JsonlConfig
    config: JsonlConfig

    def __init__(self, config: SlotConfig | None = None) -> None:
        super().__init__(config)
        self._file: IO[bytes] | None = None
        self._path = Path()
        self._evaluated: int | None = None  # the step of the last evaluation that an earlier life left

    def open(self, run: Path, *, step: int) -> None:
        """Open the file and cut off what happened after the step that a resumed run continues from.

        The ``"done"`` or ``"diverged"`` of an earlier life goes too: it was not the end. An evaluation of that very
        step stays, although the checkpoint may not know of it (a life killed between the two): it is a function of the
        parameters, so the resumed run's own one is the same, and is not written again.

        Raises:
            DataError: A line before that point is damaged.
            ResourceError: The disk refused.
        """
        self._path = run / "metrics.jsonl"
        keep, self._evaluated = 0, None
        try:
            for end, event in read_events(self._path):
                if event["step"] > step or event.get("event") in ("done", "diverged"):
                    break
                keep = end
                if event.get("event") == "eval":
                    self._evaluated = event["step"]
        except ValueError as error:
            raise DataError(
                f"{self._path} is damaged: {error}; delete the lines from there on to keep the earlier ones"
            ) from error
        with disk_errors(self._path):
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  # open for the life of the run
            self._file.truncate(keep)

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one line, whole or (disk full) not at all.

        Raises:
            ResourceError: The disk refused.
        """
        if self._file is None:
            raise ValueError("write to a sink that is not open")
        if event.get("event") == "eval" and event.get("step") == self._evaluated:
            return
        line = json.dumps(plain(event), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with disk_errors(self._path):
            written = self._file.write(line)
            if written != len(line):  # a full disk takes a part first; the next call says why
                self._file.write(line[written:])

    def flush(self) -> None:
        """Wait until the disk has everything."""
        if self._file is not None:
            with disk_errors(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
