"""Claims: at most one process executes a run, on any number of machines that share the study folder. Imports no torch.

The claims of a run are the files ``claim-1``, ``claim-2``, ... of one folder; the highest number holds. A file is made
by linking a finished one to its name, which fails if the name exists, on network file systems too: of several
processes that want the next number, one gets it. Numbers are never used again, so a claim cannot be taken away by
someone who looked before it was made. The holder touches its file (the heartbeat); a claim is stale when its process
is gone, which is seen at once on the same machine, and after `STALE_SECONDS` without a heartbeat on another one.
No clocks are compared: the one who waits measures by its own clock how long the heartbeat has stood still.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

__all__ = ["BEAT_SECONDS", "STALE_SECONDS", "Claim", "ClaimWatch", "Holder", "birth", "here", "here_tag", "read_holder"]

BEAT_SECONDS = 5.0
"""Seconds between two heartbeats."""

STALE_SECONDS = 60.0
"""Seconds after which a claim without a heartbeat counts as abandoned."""

_NAME = re.compile(r"claim-(\d+)")


@dataclass(frozen=True)
class Holder:
    """What a claim says.

    Attributes:
        number: Number of the claim.
        place: Where the process runs: host, boot and process-id namespace.
        pid: Its process id there.
        birth: When the process was started, so that a reused process id is not mistaken for it; empty if unknown.
        released: Whether the process has given the run back.
        beat: Time of the last heartbeat, in the file system's clock.
    """

    number: int
    place: str
    pid: int
    birth: str
    released: bool
    beat: float

    @property
    def local(self) -> bool:
        """Whether the process is, or was, on this machine."""
        return self.place == here()

    @property
    def gone(self) -> bool:
        """Whether the claim is known to be free: given back, or its process on this machine has ended."""
        return self.released or (self.local and birth(self.pid) != self.birth)


class Claim:
    """The right to execute one run, kept alive by a thread. Made by `Claim.take`.

    Args:
        folder: Folder of the run's claims.
        number: Number of the claim.
        on_lost: Called from the heartbeat's thread when somebody else has taken over.
    """

    def __init__(self, folder: Path, number: int, on_lost: Callable[[], None] | None = None) -> None:
        self.folder = folder
        self.number = number
        self._on_lost = on_lost
        self._stop = threading.Event()
        self._beat_at = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls, folder: Path, *, stale: Callable[[Holder], bool] | None = None, on_lost: Callable[[], None] | None = None
    ) -> Self | None:
        """Claim a run, unless somebody alive holds it.

        Args:
            folder: Folder of the run's claims; made if it is missing.
            stale: Whether a claim that is not known to be free may be taken over; none by default.
            on_lost: Called when somebody else takes over.

        Returns:
            The claim, or None.
        """
        folder.mkdir(parents=True, exist_ok=True)
        holder = read_holder(folder)
        if holder is not None and not holder.gone and not (stale is not None and stale(holder)):
            return None
        number = 1 if holder is None else holder.number + 1
        if not _create(folder, number):
            return None
        with contextlib.suppress(OSError):  # tidy, and no harm if it stays
            _file(folder, number - 1).unlink()
        return cls(folder, number, on_lost)

    @property
    def file(self) -> Path:
        """The claim's file."""
        return _file(self.folder, self.number)

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken over; asks the disk only after a gap in the heartbeats."""
        if time.monotonic() - self._beat_at < 3 * BEAT_SECONDS:
            return False
        return self._superseded()

    def release(self) -> None:
        """Give the run back."""
        self._stop.set()
        self._thread.join()
        if not self._superseded():
            _replace(self.file, _content(released=True))

    def _superseded(self) -> bool:
        newest = _newest(self.folder)
        return newest is not None and newest > self.number

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if self._superseded():
                if self._on_lost is not None:
                    self._on_lost()
                return
            with contextlib.suppress(OSError):  # a disk that is away for a moment; the next beat tries again
                os.utime(self.file)
                self._beat_at = time.monotonic()


class ClaimWatch:
    """Tells when the claims of other machines are stale, by watching their heartbeats with this process's clock.

    Args:
        stale_seconds: How long a heartbeat may stand still.
        clock: Seconds, monotonic.
    """

    def __init__(self, stale_seconds: float = STALE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = stale_seconds
        self._clock = clock
        self._seen: dict[str, tuple[int, float, float]] = {}

    def stale(self, run: str, holder: Holder) -> bool:
        """Whether the holder of a run has shown no sign of life for too long.

        Args:
            run: Name of the run.
            holder: Its claim as just read.
        """
        if holder.gone:
            return True
        now = self._clock()
        known = self._seen.get(run)
        if known is None or known[:2] != (holder.number, holder.beat):
            self._seen[run] = (holder.number, holder.beat, now)
            return False
        if holder.local and holder.birth:  # its process lives: a slow disk must not cost it the run
            return False
        return now - known[2] > self._limit


def read_holder(folder: Path) -> Holder | None:
    """The highest claim of a run, or None if there was never one.

    Args:
        folder: Folder of the run's claims.
    """
    while True:
        number = _newest(folder)
        if number is None:
            return None
        try:
            with open(_file(folder, number), encoding="utf-8") as file:
                beat = os.fstat(file.fileno()).st_mtime  # of the open file: network file systems cache other answers
                content: Any = json.load(file)
        except FileNotFoundError:  # a higher one has come in the meantime
            continue
        except ValueError:  # being written, where links do not exist, or damaged: somebody's, until it is stale
            return Holder(number, "", 0, "", False, beat)
        return Holder(
            number, str(content["place"]), int(content["pid"]), str(content["birth"]), bool(content["released"]), beat
        )


def _file(folder: Path, number: int) -> Path:
    return folder / f"claim-{number}"


def _newest(folder: Path) -> int | None:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return None
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=None)


def _content(*, released: bool) -> str:
    pid = os.getpid()
    return json.dumps({"place": here(), "pid": pid, "birth": birth(pid), "released": released})


def _create(folder: Path, number: int) -> bool:
    """Make a claim's file with its content in one step; False if somebody else was first."""
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    temporary.write_text(_content(released=False), encoding="utf-8")
    try:
        os.link(temporary, _file(folder, number))
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the name first, the content a moment later
        try:
            with open(_file(folder, number), "x", encoding="utf-8") as file:
                file.write(_content(released=False))
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return _newest(folder) == number


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


@cache
def here() -> str:
    """This machine, so that process ids of two places are never compared: host, boot and process-id namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


@cache
def here_tag() -> str:
    """`here` as part of a file's name: 12 hexadecimal digits."""
    return hashlib.sha256(here().encode()).hexdigest()[:12]


def birth(pid: int) -> str:
    """When a process of this machine was started, in ticks since boot; empty if it does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        return _alive(pid)
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _alive(pid: int) -> str:
    """Where there is no /proc: only whether the process lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "alive"
    return "alive"
