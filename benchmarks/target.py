"""Seconds, steps and cases to a training error: the ready study of that name, run and reported.

Runs that are there already are not repeated. Unlike the other benchmarks this one takes as long as training takes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

__all__ = ["main"]

_STUDIES = Path(__file__).parent.parent / "studies"


def main(arguments: list[str]) -> int:
    """Run the study with the installed command and print where its report is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks target", description=__doc__)
    parser.add_argument("--net", choices=["curves", "mnist"], default="curves")
    parser.add_argument("--seconds", type=float, help="training seconds of each run; the study's if left out")
    parser.add_argument("--seeds", type=int, help="number of seeds; the study's if left out")
    parser.add_argument("--out", type=Path, help="the study folder; by default studies-out/NAME")
    options = parser.parse_args(arguments)
    study = str(_STUDIES / f"targets-{options.net}.toml")
    command = [sys.executable, "-m", "kfac_cli", "study"]
    folder = [] if options.out is None else ["--out", str(options.out)]
    changes = {"budget.seconds": options.seconds, "seeds": options.seeds}
    sets = [part for key, value in changes.items() if value is not None for part in ("--set", f"{key}={value}")]
    ended = subprocess.run([*command, "run", study, *folder, *sets], check=False).returncode
    if ended:
        return ended
    return subprocess.run([*command, "report", study, *folder], check=False).returncode
