"""Entry point of the `kfac` command: collects the commands and turns every error into a line and an exit code.

Exit codes: 0 done, 1 unexpected or environment, 2 usage, configuration, data or plug-in, 3 numerical failure,
130 Ctrl-C. A command that knows better (4, 143) raises `typer.Exit` itself.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from importlib import import_module
from typing import Annotated, NoReturn

import typer

import kfacore
from kfac_cli.answers import several
from kfac_cli.usage import UsageError, explain_usage
from kfacore.errors import KfacError

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: tuple[str, ...] = (
    "kfac_cli.commands.train",
    "kfac_cli.commands.report",
    "kfac_cli.commands.inspect",
    "kfac_cli.commands.study",
    "kfac_cli.commands.data",
    "kfac_cli.commands.list",
    "kfac_cli.commands.show",
    "kfac_cli.commands.plugins",
    "kfac_cli.commands.doctor",
    "kfac_cli.commands.schema",
    "kfac_cli.commands.new",
)
"""Command modules in the order of the help. Each is torch-free at import and has ``register(app)``."""

TRACEBACK_VARIABLE = "KFAC_TRACEBACK"
"""Environment variable: if set, every error also shows its traceback."""

# Plain help (no rich panels): it starts faster, and its text survives pipes and narrow terminals. As wide as the
# terminal is: without a width the parser's library stops at 80 columns.
app = typer.Typer(
    name="kfac",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"max_content_width": sys.maxsize},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kfac {kfacore.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Second-order optimization for PyTorch with Kronecker-factored curvature."""


for _module in COMMANDS:
    import_module(_module).register(app)


def _quiet() -> bool:
    """Whether another process of the same run tells why it ended."""
    if not several():
        return False
    from kfacore.lab.training.processes import told_first

    return not told_first()


def _say(message: str) -> None:
    """One error on stderr, even if its message has characters that the terminal's encoding lacks."""
    if _quiet():
        return
    try:
        print(f"error: {message}", file=sys.stderr, flush=True)
    except UnicodeEncodeError:
        print(f"error: {message}".encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Point stdout at nothing, so that the interpreter's flush at exit does not fail on the broken pipe again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


_WRONG_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""What the system says of names that no disk could serve: the command is wrong, not the machine."""


def _environment_failure(error: OSError) -> str | None:
    """The message for a machine that refused, or None if the error is not of that sort."""
    advice = {
        errno.ENOSPC: "free some space or choose another folder",
        errno.EDQUOT: "free some space or choose another folder",
        errno.EROFS: "choose a folder on a disk that can be written",
        errno.EACCES: "check the permissions or choose another folder",
        errno.EPERM: "check the permissions or choose another folder",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ELOOP: "a link leads back to itself; name the file or folder itself",
        errno.ENOTDIR: "part of the path is a file; choose another folder",
    }.get(error.errno or 0)
    if advice is None:
        return None
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}: {advice}"


def _unexpected(error: BaseException) -> str:
    """Keep the traceback of a defect where it can be sent from, and say where in one line."""
    notes = getattr(error, "__notes__", [])
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    reason = [line for line in lines if line not in notes][-1]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return (
            f"out of memory ({reason}): take smaller mini-batches, a smaller approx.max_dim, or more processes with "
            "approx.memory=owner; the run goes on from its last checkpoint"
        )
    if os.environ.get(TRACEBACK_VARIABLE):
        return f"unexpected {reason}"
    for note in notes:
        if note.startswith("traceback in "):  # a run keeps it in its folder
            return f"unexpected {reason} (a defect of kfac or of a plug-in; {note})"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kfac-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return f"unexpected {reason} (set {TRACEBACK_VARIABLE}=1 to see the traceback)"
    return f"unexpected {reason} (a defect of kfac or of a plug-in; traceback in {file.name})"


def _fail(error: BaseException, message: str, code: int) -> NoReturn:
    """Leave with one line, and with the traceback above it where it was asked for."""
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    _say(message)
    sys.exit(code)


def main() -> None:
    """Run the command and leave with its exit code."""
    try:
        try:
            # Not standalone: what the parser refuses is said here, like all other errors.
            code = app(prog_name="kfac", standalone_mode=False)
        finally:
            sys.stdout.flush()  # a full disk or a closed pipe shows here rather than at exit, where nobody answers
        sys.exit(code or 0)
    except UsageError as error:
        explained = explain_usage(error)
        if explained is not None:
            _fail(error, str(explained), explained.exit_code)
        typer.echo(str(error), err=True)  # the help, for a call without arguments
        sys.exit(2)
    except KfacError as error:
        _fail(error, str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _fail(error, _environment_failure(error) or _unexpected(error), 2 if error.errno in _WRONG_NAMES else 1)
    except Exception as error:
        _fail(error, _unexpected(error), 1)
