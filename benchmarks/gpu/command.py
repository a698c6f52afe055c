"""Runs the parts, each in a process with a time limit of its own, prints their tables and writes JSON.

The whole ends within eight minutes: a part has no more time than is left of them, and none begins with next to none.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import multiprocessing
import multiprocessing.process
import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Report

__all__ = ["PARTS", "main"]

ROOT = Path(__file__).resolve().parents[2]
WHOLE = 470.0
"""Seconds of all parts together; starting and writing takes the rest of the eight minutes."""

_PATIENCE = 300.0
"""Limit of each small part, which takes seconds: it is a test, on a machine that may be busy."""

_LEAST = 8.0
"""A part with fewer seconds left is not begun."""

_GRACE = 6.0
"""Seconds before its limit at which a part is told to be done."""


@dataclass(frozen=True)
class _Kind:
    """A part.

    Attributes:
        function: Module and function.
        limit: Seconds after which it is killed.
        summary: One line.
    """

    function: str
    limit: float
    summary: str


PARTS: dict[str, _Kind] = {
    "machine": _Kind("machine:measure", 25, "the card, its rates of copies and products, launches a second"),
    "tests": _Kind("suite:measure", 110, "tests marked cuda"),
    "mnist": _Kind("steps:on_mnist", 60, "step times and memory, the paper's MNIST net"),
    "gpt": _Kind("steps:on_gpt", 85, "step times and memory, a GPT of 124 million parameters"),
    "resnet": _Kind("steps:on_residual", 50, "step times and memory, a net of ResNet-50's shape"),
    "launches": _Kind("launches:measure", 45, "kernels and waits of each kind of step"),
    "refresh": _Kind("refresh:measure", 50, "a refresh by method, with its error"),
    "target": _Kind("target:measure", 45, "seconds to training errors of an autoencoder"),
}


def main(arguments: list[str]) -> int:
    """Run parts; the exit code is 1 if one failed or a test did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="repeatable; all if left out")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU: a test of the script itself")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="folder of MNIST's files, for the targets")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "bench-out"))
    options = parser.parse_args(arguments)
    if options.list:
        for name, kind in PARTS.items():
            print(f"{name:10} {kind.limit:4.0f} s  {kind.summary}")
        return 0
    folder = None if options.mnist is None else options.mnist.resolve()
    return _Session(options.out.resolve(), options.small, folder).run(options.part or list(PARTS))


class _Session:
    """One call of the script."""

    def __init__(self, out: Path, small: bool, mnist: Path | None) -> None:
        self._out, self._small, self._mnist = out, small, mnist
        self._end = time.monotonic() + (WHOLE if not small else len(PARTS) * _PATIENCE)
        self._context = multiprocessing.get_context("forkserver")
        # What every part imports is imported once; nothing of it touches the device.
        self._context.set_forkserver_preload(["torch", "kfacore", "benchmarks.gpu.contenders"])
        self._outcomes: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.log").write_text("", encoding="utf-8")
        self._report = _Tables(out / "gpu.txt")

    def run(self, names: Sequence[str]) -> int:
        """Run parts in their order."""
        with tempfile.TemporaryDirectory() as scratch:
            for name in names:
                self._one(name, Path(scratch) / f"{name}.jsonl")
                self._save()
        self._report.table("parts", self._outcomes)
        self._save()
        print(f"{self._out / 'gpu.json'} has the numbers, gpu.txt the tables, gpu.log what was printed meanwhile")
        return int(any(outcome["outcome"] != "done" for outcome in self._outcomes))

    def _one(self, name: str, file: Path) -> None:
        kind, left = PARTS[name], self._end - time.monotonic()
        if left < _LEAST:
            self._outcomes.append({"part": name, "seconds": 0.0, "outcome": "left out, no time"})
            return
        limit = min(kind.limit if not self._small else _PATIENCE, left)
        file.touch()
        start = time.monotonic()
        where = None if self._mnist is None else str(self._mnist)
        given = (kind.function, self._small, limit, str(file), where, str(self._out / "gpu.log"))
        process = self._context.Process(target=_run, args=given, name=name)
        process.start()
        try:
            process.join(limit)
        finally:
            outcome = self._end_of(process, limit)
        self._outcomes.append({"part": name, "seconds": time.monotonic() - start, "outcome": outcome})
        self._report.read(file)

    @staticmethod
    def _end_of(process: multiprocessing.process.BaseProcess, limit: float) -> str:
        """How it ended; what still runs is killed, with whatever it has started."""
        if not process.is_alive():
            return "done" if process.exitcode == 0 else f"failed, exit code {process.exitcode}"
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        return f"killed after {limit:.0f} s"

    def _save(self) -> None:
        found = {**self._report.as_json(), "parts": self._outcomes}
        (self._out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


class _Tables(Report):
    """Tables on the screen and in a file."""

    def __init__(self, file: Path) -> None:
        super().__init__("gpu")
        self._file = file
        file.write_text("", encoding="utf-8")

    def table(self, title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> None:
        """Print one table and what there is to be said about it."""
        text = io.StringIO()
        with redirect_stdout(text):
            super().table(title, rows)
            for note in notes:
                print(f"  ! {note}")
            if notes:
                print()
        self.tables[-1]["notes"] = list(notes)
        print(text.getvalue(), end="", flush=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())

    def read(self, file: Path) -> None:
        """Print the tables that a part has left."""
        tables: dict[str, list[Mapping[str, Any]]] = {}
        notes: dict[str, list[str]] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            tables.setdefault(found["table"], [])
            if "row" in found:
                tables[found["table"]].append(found["row"])
            else:
                notes.setdefault(found["table"], []).append(found["note"])
        for name, rows in tables.items():
            self.table(name, rows, notes.get(name, []))


def _run(function: str, small: bool, seconds: float, file: str, mnist: str | None, log: str) -> None:
    """One part, in a process of its own."""
    start = time.monotonic()
    os.setpgrp()  # so that what it starts can be ended with it
    signal.alarm(math.ceil(seconds) + 2)  # also if nobody is left to end it
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from benchmarks.gpu.part import Part

    module, _, name = function.partition(":")
    device = torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")
    until = start + seconds - min(_GRACE, 0.2 * seconds)
    part = Part(device, small or device.type == "cpu", until, Path(file), None if mnist is None else Path(mnist))
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.{module}"), name)(part)
    except Exception as error:
        part.note(module, f"ended by {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        raise
