"""A process that imports torch once and forks a fresh process for every run of a study.

It computes nothing itself, so no thread pool and no device exists when it forks. Orders come as lines of JSON on
stdin, answers go to stdout:

    {"run": HASH}        fork a process that executes the run        -> {"run": HASH, "pid": PID}
    {"signal": NUMBER}   send a signal to every process
                         a process has ended                         -> {"run": HASH, "code": CODE}
                         everything is imported                      -> {"ready": true}

At the end of stdin (whoever started it is gone, even by SIGKILL) it leaves; its children see that they are orphans and
stop after their step, saved.

Why not the forkserver of `multiprocessing`: it is one for the whole program, with the environment that was there when
it was first used, and the threads of a study are part of that environment; it ends with the program and not with the
study; it shares the terminal's session, so that Ctrl-C reaches every run; it imports the runner's own main module into
each; and what goes wrong while it preloads is swallowed. Here each of these is a line.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from kfacore.errors import KfacError
from kfacore.lab.studies.state import state_folder
from kfacore.schema.table import RUN_SLOTS

__all__ = ["main", "serve"]

_TICK = 0.05
"""Seconds between two looks at the children."""


def main() -> int:
    """Run the program: ``python -m kfacore.lab.studies.zygote STUDY``."""
    study = Path(sys.argv[1])
    _preload(others=_names_optimizers(study))
    serve(study, sys.stdin.fileno(), sys.stdout.fileno())
    return 0


def _names_optimizers(study: Path) -> bool:
    """Whether a variant is trained by something else than K-FAC, or nobody knows."""
    try:
        content = json.loads((study / "study.json").read_text(encoding="utf-8"))
        tables = [content["base"], *(variant["overrides"] for variant in content["variants"])]
        chosen = [table["optimizer"] for table in tables if "optimizer" in table]
        return any((each.get("kind", "kfac") if isinstance(each, dict) else each) != "kfac" for each in chosen)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return True


def _preload(*, others: bool) -> None:
    """Import what every run needs, so that no run waits for it; nothing here starts a thread.

    Args:
        others: Also what torch imports when the first optimizer of its own is made, which takes seconds.
    """
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager  # noqa: F401  # for the pictures at the end of a run

    if others:
        import torch._dynamo

    import torch.fx.experimental.symbolic_shapes  # noqa: F401  # for `torch.autograd.grad`, when it is first called

    import kfacore.lab.config.resolve
    import kfacore.lab.training.loop  # noqa: F401
    from kfacore.network.jvp import load_forward_mode
    from kfacore.registry import get_registry
    from kfacore.registry.discovery import OWN_DISTRIBUTION

    load_forward_mode()
    registry = get_registry()
    for slot in RUN_SLOTS:
        for component in registry.components(slot):
            # Only what is known to be light; a run imports the rest itself, and says what is wrong with it.
            if registry.origin(component).distribution == OWN_DISTRIBUTION:
                with contextlib.suppress(KfacError):
                    registry.load(component)
    gc.collect()
    gc.freeze()  # so that a collection in a child does not copy the pages of all these objects


def serve(study: Path, orders: int, answers: int) -> None:
    """Take orders until their end.

    Args:
        study: The study folder.
        orders: File descriptor to read from.
        answers: File descriptor to write to.
    """
    # Ctrl-C in a terminal reaches everybody there; who takes orders from us decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: dict[int, str] = {}
    _answer(answers, {"ready": True})
    buffer = b""
    while True:
        _reap(children, answers)
        ready, _, _ = select.select([orders], [], [], _TICK if children else None)
        if not ready:
            continue
        chunk = os.read(orders, 65536)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "run" in order:
                pid = _fork(study, order["run"], orders, answers)
                children[pid] = order["run"]
                _answer(answers, {"run": order["run"], "pid": pid})
            else:
                for pid in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, order["signal"])


def _reap(children: dict[int, str], answers: int) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            _answer(answers, {"run": children.pop(pid), "code": code})


def _answer(answers: int, content: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more; the end of the orders is near
        os.write(answers, json.dumps(content).encode() + b"\n")


def _fork(study: Path, run: str, orders: int, answers: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    _child(study, run, parent, orders, answers)


def _child(study: Path, run: str, parent: int, orders: int, answers: int) -> NoReturn:
    """A fresh process: its own output, its own signals, and never back into the server."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        folder = state_folder(study, run)
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        for descriptor in {orders, answers} - {0, 1, 2}:
            os.close(descriptor)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
        from kfacore.lab.studies.worker import execute

        code = execute(study, run, parent=parent)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
