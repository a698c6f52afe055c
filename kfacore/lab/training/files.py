"""Files that are never half-written, and disk errors that a person can act on. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kfacore.errors import ConfigError, KfacError, ResourceError

__all__ = ["atomic_write", "disk_errors", "plain", "read_events", "require_folder", "tracebacks", "write_json"]

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "choose a folder that can be written with --out",
    errno.EACCES: "choose a folder that can be written with --out",
    errno.EPERM: "choose a folder that can be written with --out",
}


def require_folder(folder: Path, advice: str) -> None:
    """See that a folder is there or can be made, before anything expensive is done.

    Raises:
        ConfigError: It, or what it would be in, is a file or a link to nothing; the message ends with `advice`.
    """
    for part in (folder, *folder.parents):
        if part.is_dir():
            return
        if os.path.lexists(part):
            what = "a link to nothing" if part.is_symlink() else "a file"
            raise ConfigError(f"{part} is {what}; {advice}")


@contextlib.contextmanager
def disk_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn an `OSError` into a message that says which file, why, and what to do.

    Args:
        path: The file or folder being written.
        remedy: What to do besides the advice for the error's number, for example how to continue.

    Raises:
        ResourceError: In place of the `OSError`.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads our output any more: not a matter of the disk
    except OSError as error:
        advice = "; ".join(part for part in (_ADVICE.get(error.errno or 0, "check the disk"), remedy) if part)
        raise ResourceError(f"cannot write {path}: {error.strerror or error}; {advice}") from error


TRACEBACK = "traceback in "
"""How the note begins that `tracebacks` adds to an exception; the file's path follows."""


@contextlib.contextmanager
def tracebacks(folder: Path) -> Iterator[None]:
    """Keep the traceback of a defect in a run folder, ``traceback.txt``, and say so in a note of the exception.

    Errors with a message of their own, a refusing disk among them, pass without one.

    Args:
        folder: The run folder.
    """
    try:
        yield
    except (KfacError, OSError):
        raise
    except Exception as error:
        file = folder / "traceback.txt"
        with contextlib.suppress(OSError):
            file.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            error.add_note(f"{TRACEBACK}{file}")
        raise


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name, make it durable, and rename it.

    A reader, or a machine that loses power, sees the old file or the new one, never a part.

    Args:
        path: The file.
        write: Writes the content to an open binary file.

    Raises:
        OSError: The disk refused; the old file is untouched and the temporary one gone.
    """
    # Not the process id: two machines, or two containers, may share the folder and not their numbers.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where folders can be opened (not on every system)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def plain(value: Any) -> Any:
    """A value as strict JSON has it: NaN and infinities become null, paths strings, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a mapping or a list as indented JSON, atomically. Raises like `atomic_write`."""
    text = json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def read_events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The events of a metrics file.

    A last line without its newline was being written when the process died; it is left out.

    Args:
        path: ``metrics.jsonl``; a missing file holds no events.

    Yields:
        The offset of the byte after the event, and the event.

    Raises:
        ValueError: A complete line is not a JSON object; the message has its number.
    """
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                event = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON") from error
            if not isinstance(event, dict) or not isinstance(event.get("step"), int):
                raise ValueError(f"line {number} is not an event")
            yield end, event
