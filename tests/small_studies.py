"""A study of tiny runs, and a process that has imported torch and forks the study's processes; shared by tests.

As a program (``python small_studies.py``) it is that process: every line on stdin is an order to fork a runner, in a
session of its own, and every answer on stdout is its process id or its exit code. The process that forks the runs is
forked too, in place of a new interpreter, so that a test may start a study a dozen times without waiting for torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from patience import PATIENCE
from small_runs import write_data

VARIANTS = """
[axes]
approx = ["tridiag", "blockdiag"]
damping.lambda0 = [0.1, 1.0]
"""


def write_study(
    folder: Path, *, steps: int = 12, seeds: int = 3, body: str = VARIANTS, top: str = "", pictures: bool = False
) -> Path:
    """A study file on the small problem; 12 runs as it stands."""
    if not (folder / "data.npz").exists():
        write_data(folder)
    file = folder / "tiny.toml"
    file.write_text(
        f"""seeds = {seeds}
budget.steps = {steps}
{top}
[base]
problem = {{ kind = "npz", file = {json.dumps(str(folder / "data.npz"))}, sizes = [8, 3, 8], code_layer = 2 }}
likelihood = "bernoulli"
batch = {{ start = 20, target_step = 15 }}
averaging.start = 4
eval = {{ every = 4, early = false }}
checkpoint.every = 3
pictures = {str(pictures).lower()}
{body}
""",
        encoding="utf-8",
    )
    return file


class Nest:
    """The process that forks runners, seen from the test."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answers: list[dict[str, Any]] = []
        self.buffer = b""
        self.wait_for("ready", PATIENCE)

    def start(self, file: Path, out: Path, **options: Any) -> int:
        """Start a runner and return its process id."""
        assert self.process.stdin is not None
        order = {"file": str(file), "out": str(out), "options": options}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.wait_for("pid", PATIENCE)["pid"])

    def wait_for(self, key: str, seconds: float) -> dict[str, Any]:
        """The next answer of a kind."""
        while (answer := self._take(key)) is None:
            assert self._read(seconds), f"no '{key}' within {seconds} seconds"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)
        self.process.stdout.close()

    def _take(self, key: str) -> dict[str, Any] | None:
        for answer in self.answers:
            if key in answer:
                self.answers.remove(answer)
                return answer
        return None

    def _read(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return False
        chunk = os.read(self.process.stdout.fileno(), 65536)
        assert chunk, "the nest has died"
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        self.answers += map(json.loads, lines)
        return True


class ForkedZygote:
    """What `subprocess.Popen` is to the local executor, forked from this process."""

    def __init__(self, command: list[str], **options: Any) -> None:
        from kfacore.lab.studies.zygote import serve

        assert command[1:3] == ["-m", "kfacore.lab.studies.zygote"]
        orders, to_zygote = os.pipe()
        from_zygote, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.close(to_zygote)
                os.close(from_zygote)
                serve(Path(command[3]), orders, answers)
                code = 0
            finally:
                os._exit(code)
        os.close(orders)
        os.close(answers)
        self.stdin = os.fdopen(to_zygote, "wb")
        self.stdout = os.fdopen(from_zygote, "rb")

    def wait(self, timeout: float | None = None) -> int:
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _runner(order: dict[str, Any]) -> int:
    from kfacore.lab.studies.config import read_study
    from kfacore.lab.studies.runner import run_study
    from kfacore.registry import get_registry

    config = read_study(order["file"], sets=["executor.workers=2", "executor.start=fork"])
    result = run_study(get_registry(), config, Path(order["out"]), **order["options"])
    return 0 if result.complete else 4


def _nest() -> None:
    import kfac_plugins.executors.local as local
    import kfacore.lab.studies.zygote as zygote

    zygote._preload(others=True)
    local.subprocess = type("Forking", (), {"Popen": ForkedZygote, "PIPE": -1, "TimeoutExpired": TimeoutError})
    runners: set[int] = set()
    say = sys.stdout.buffer

    def answer(content: dict[str, Any]) -> None:
        say.write(json.dumps(content).encode() + b"\n")
        say.flush()

    answer({"ready": True})
    buffer = b""
    while True:
        for pid in list(runners):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                runners.discard(pid)
                answer({"code": os.waitstatus_to_exitcode(status), "runner": pid})
        if not select.select([0], [], [], 0.02)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    os.setsid()
                    with contextlib.suppress(OSError):
                        os.close(0)
                    os.dup2(2, 1)
                    code = _runner(json.loads(line))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            runners.add(pid)
            answer({"pid": pid})


if __name__ == "__main__":
    _nest()
