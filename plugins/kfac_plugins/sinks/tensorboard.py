"""The events of a run as TensorBoard's event files, through `torch.utils.tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from kfac_plugins.sinks import TensorboardConfig
from kfacore.errors import ResourceError
from kfacore.lab.training.files import disk_errors
from kfacore.roles import Sink
from kfacore.schema.slots import SlotConfig

__all__ = ["Tensorboard"]


class Tensorboard(Sink):
    """Writes every number of the step and eval events as a scalar under its own name, against the step.

    The names are those of ``metrics.jsonl``: ``loss``, ``lam``, ``train_error``, ``averaged_test_error``, ... Training
    seconds are the scalar ``seconds``. A number that is missing in an event is left out.
    """

    Config: ClassVar[type[SlotConfig]] = TensorboardConfig
    config: TensorboardConfig

    def __init__(self, config: SlotConfig | None = None) -> None:
        super().__init__(config)
        self._writer: Any = None
        self._path = Path()

    def open(self, run: Path, *, step: int) -> None:
        """Start an event file that takes back what earlier ones hold after the step.

        Raises:
            ResourceError: The package tensorboard is not installed, or the disk refused.
        """
        try:
            summary_writer = import_module("torch.utils.tensorboard").SummaryWriter
        except ModuleNotFoundError as error:
            raise ResourceError(
                f"the sink tensorboard needs the package '{error.name}', which is not installed; install it with: "
                "pip install 'kfacore[tensorboard]'"
            ) from error
        self._path = run / self.config.folder
        with disk_errors(self._path):
            # TensorBoard itself drops what the files of an earlier life hold from this step on.
            self._writer = summary_writer(str(self._path), purge_step=step + 1, flush_secs=self.config.flush_seconds)

    def write(self, event: Mapping[str, Any]) -> None:
        """Add the event's numbers.

        Raises:
            ResourceError: The disk refused.
        """
        if self._writer is None:
            raise ValueError("write to a sink that is not open")
        if event["event"] not in ("step", "eval"):
            return
        with disk_errors(self._path):
            for name, value in event.items():
                if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                if name == "seconds" and event["event"] == "eval":  # the step of the same number has it already
                    continue
                self._writer.add_scalar(name, value, global_step=event["step"])

    def flush(self) -> None:
        """Write everything to the disk."""
        if self._writer is not None:
            with disk_errors(self._path):
                self._writer.flush()

    def close(self) -> None:
        """Write everything and close the file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with disk_errors(self._path):
                writer.close()
