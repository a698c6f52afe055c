"""The folder of a run: what it holds, who may write it, and how it is read back.

::

    config.json         the resolved configuration
    manifest.json       versions, device, threads, seed, data checksum: what the numbers depend on
    metrics.jsonl       the events, one JSON object a line (written by the ``jsonl`` sink)
    checkpoint.pt       everything needed to go on
    checkpoint-best.pt  the parameters with the smallest training loss of all evaluations
    plots/              pictures drawn at the end
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfacore.errors import ConfigError, DataError
from kfacore.lab.training.files import disk_errors, read_events, require_folder, write_json

__all__ = ["RunFolder", "default_folder"]


def default_folder(problem: str, method: str, root: Path = Path("runs")) -> Path:
    """``runs/<problem>-<method>-<time>``, with a number behind it if that exists already.

    Args:
        problem: Name of the problem.
        method: Name of the approximation, or of an optimizer without one.
        root: Where the runs are.
    """
    name = f"{problem}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, number = root / name, 1
    while candidate.exists():
        number += 1
        candidate = root / f"{name}-{number}"
    return candidate


class RunFolder:
    """One run on disk. Every file but the event stream is replaced as a whole or not at all.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def manifest_file(self) -> Path:
        """What the numbers depend on."""
        return self.path / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        """The events."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_file(self) -> Path:
        """The last checkpoint."""
        return self.path / "checkpoint.pt"

    @property
    def best_file(self) -> Path:
        """The parameters with the smallest training loss so far; missing while no evaluation was below the first."""
        return self.path / "checkpoint-best.pt"

    @property
    def plots(self) -> Path:
        """Folder of the pictures."""
        return self.path / "plots"

    def check_free(self) -> None:
        """Make sure that no other run is here, before anything expensive is done.

        Raises:
            ConfigError: There is a run, or the path is a file.
        """
        require_folder(self.path, "name a folder with --out that does not exist yet")
        if any(file.exists() for file in (self.config_file, self.checkpoint_file, self.metrics_file)):
            raise ConfigError(
                f"--out {self.path} holds another run; choose another folder, or continue that run with "
                f"--resume {self.path}"
            )

    def create(self, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Claim the folder and write `config.json` and `manifest.json`.

        Raises:
            ConfigError: Another run is here.
            ResourceError: The disk refused.
        """
        self.check_free()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.check_free()  # again, now that nobody else can claim it
        self.write_manifest(manifest)
        self.write_config(config)

    def lock(self) -> None:
        """Keep other processes from training here at the same time; released when this process ends, even if killed.

        Raises:
            ConfigError: Another process trains here.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        with disk_errors(self.path):
            handle = os.open(self.path, os.O_RDONLY)  # the folder itself, so that no lock file is left behind
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ConfigError(
                f"{self.path} is being trained by another process; wait for it or stop it first"
            ) from None
        except OSError:  # a network file system without locks
            os.close(handle)
            return
        self._lock = handle

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            DataError: There is no run, or the file is damaged.
        """
        return self._read_json(self.config_file)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest. Raises like `read_config`."""
        return self._read_json(self.manifest_file)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace the configuration (a resumed run with other steps)."""
        with disk_errors(self.config_file):
            write_json(self.config_file, config)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest."""
        with disk_errors(self.manifest_file):
            write_json(self.manifest_file, manifest)

    def events(self) -> list[dict[str, Any]]:
        """All complete events; a torn last line is left out.

        Raises:
            DataError: A line before the last one is damaged.
        """
        try:
            return [event for _, event in read_events(self.metrics_file)]
        except (ValueError, OSError) as error:
            raise DataError(
                f"{self.metrics_file} is damaged: {error}; delete the lines from there on to use the rest"
            ) from error

    def _read_json(self, file: Path) -> dict[str, Any]:
        if not self.path.is_dir():
            raise DataError(f"{self.path} is not a run folder: there is no such folder")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{self.path} is not a run folder: it has no {file.name}") from None
        except (ValueError, OSError) as error:
            raise DataError(f"{file} cannot be read: {error}; restore it from a copy or start a new run") from error
        if not isinstance(content, dict):
            raise DataError(f"{file} holds no table; restore it from a copy or start a new run")
        return content
