"""Make this checkout importable on a machine where nothing of it is installed and nothing can be fetched.

Run as a script before anything of the project is imported, so it uses the standard library alone. Into the folder that
it is given it unpacks the wheels of packages that cannot be imported, and writes what an installation would: the record
of the distribution ``kfacore`` with its entry points, by which the plug-ins are found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import util
from pathlib import Path

__all__ = ["NEEDED", "command", "main", "missing", "write_record"]

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "bench-wheels"

NEEDED = ("pluggy", "pydantic", "pytest")
"""What kfacore imports, and its tests; torch and NumPy are expected to be there."""

_PARTS = {
    "pluggy": ("pluggy",),
    "pydantic": ("pydantic", "pydantic_core", "typing_inspection", "annotated_types", "typing_extensions"),
    "pytest": ("pytest", "iniconfig", "packaging", "pygments"),
}
"""Wheels that each of them is made of."""


def command(version: str) -> str:
    """The command that fetches the wheels for a version of Python, to be run where there is a network."""
    platforms = " ".join(f"--platform {name}_x86_64" for name in ("manylinux2014", "manylinux_2_28"))
    return (
        f"python -m pip download -c constraints.txt --python-version {version} --implementation cp "
        f"--only-binary=:all: {platforms} -d {WHEELS.name} {' '.join(NEEDED)}"
    )


_TRY = """
import sys
sys.path[:0] = sys.argv[1:2] if sys.argv[1] else []
for name in sys.argv[2:]:
    try:
        __import__(name)
    except BaseException:
        print(name)
"""


def missing(packages: Sequence[str] = NEEDED, path: Path | None = None) -> list[str]:
    """Packages that cannot be imported, tried in another process: one that is broken must not break this one.

    Args:
        packages: Their names.
        path: A folder to look into first.
    """
    arguments = [sys.executable, "-c", _TRY, "" if path is None else str(path), *packages]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.split() if done.returncode == 0 else list(packages)


def _unpack(packages: list[str], site: Path) -> str | None:
    """Put wheels into a folder; what is wrong, or None."""
    wanted = [name for package in packages for name in _PARTS[package]]
    found = {name: sorted(WHEELS.glob(f"{name}-*.whl")) for name in wanted}
    without = [name for name, files in found.items() if len(files) != 1]
    if without:
        return f"{', '.join(without)}: not exactly one wheel of it in {WHEELS}"
    files = [str(file) for files in found.values() for file in files]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*pip, "--target", str(site), *files], capture_output=True, text=True)
    if done.returncode:
        return f"pip did not take the wheels: {done.stderr.strip()}"
    broken = missing(packages, site)
    return f"{', '.join(broken)}: unpacked, and cannot be imported" if broken else None


def write_record(site: Path) -> None:
    """What an installation would leave of the distribution: its name, its version and its entry points."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(header, encoding="utf-8")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Fill the folder, or say what to do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path, nargs="?", help="an empty folder, to be put on the path")
    parser.add_argument("--command", metavar="VERSION", help="print how the wheels are fetched for a version of Python")
    options = parser.parse_args(arguments)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    if options.site is None:
        print(command(options.command or own))
        return 0
    absent = [package for package in ("torch", "numpy") if util.find_spec(package) is None]
    if absent:
        print(f"{sys.executable} cannot import {' and '.join(absent)}: set PYTHON to one that can", file=sys.stderr)
        return 2
    packages = missing()
    wrong = _unpack(packages, options.site) if packages else None
    if wrong is not None:
        print(
            f"{sys.executable} cannot import {', '.join(packages)}, and the wheels do not help ({wrong}).\n"
            f"Where there is a network, in this folder:\n\n    {command(own)}\n\nand bring {WHEELS.name}/ along.",
            file=sys.stderr,
        )
        return 2
    write_record(options.site)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
