"""The command `kfac doctor`: whether this machine is ready, in one page to send along with a question."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Annotated, Any

import typer

from kfac_cli.answers import heading, print_json, table
from kfacore.registry import Registry, get_registry

__all__ = ["register"]

_PACKAGES = (
    "kfacore",
    "torch",
    "numpy",
    "pluggy",
    "pydantic",
    "typer",
    "rich",
    "matplotlib",
    "safetensors",
    "scikit-learn",
    "tensorboard",
)


def _versions() -> dict[str, str | None]:
    """Versions of the packages that matter; None for those that are not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _torch_facts() -> dict[str, Any]:
    """Devices, threads and LAPACK as torch sees them; ``error`` if torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch is missing
        return {"error": f"torch cannot be imported: {error}"}
    devices = [f"cpu ({platform.processor() or platform.machine()})"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.1f} GiB)")
    if torch.backends.mps.is_available():
        devices.append("mps")
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return {"devices": devices, "threads": torch.get_num_threads(), "lapack": "mkl" if mkl else "other"}


def _cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _data(registry: Registry) -> list[dict[str, Any]]:
    """State of the data of each problem that knows its files."""
    from kfacore.lab.data.status import ReportsData

    found = []
    for component in registry.components("problem"):
        config = component.config.model_validate({})
        if not isinstance(config, ReportsData):
            continue
        try:
            status = config.data_status()
        except Exception as error:  # a plug-in's fault must not hide the rest of the page
            found.append({"problem": component.name, "state": "unknown", "where": [], "advice": f"{error}"})
            continue
        where = [str(path) for path in status.where]
        found.append({"problem": component.name, "state": status.state, "where": where, "advice": status.advice})
    return found


def _problems(registry: Registry, torch_facts: dict[str, Any]) -> list[str]:
    """What keeps kfac or a plug-in from working; data that is not there yet is not among it."""
    problems = [torch_facts["error"]] if "error" in torch_facts else []
    problems += [f"{plugin}: {plugin.reason}" for plugin in registry.plugins() if plugin.state == "broken"]
    if not registry.components("optimizer"):
        problems.append("no optimizer is installed: reinstall kfacore (pip install kfacore)")
    return problems


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("doctor")
    def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
        """Check versions, devices, threads, data and plug-ins; exit code 1 if something cannot work."""
        registry = get_registry()
        facts = _torch_facts()
        answer = {
            "platform": platform.platform(),
            "executable": sys.executable,
            "versions": _versions(),
            "cores": _cores(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "KFAC_DATA": os.environ.get("KFAC_DATA"),
            **facts,
            "data": _data(registry),
            "plugins": [f"{plugin.name}: {plugin.state}" for plugin in registry.plugins()],
            "problems": _problems(registry, facts),
        }
        if json:
            print_json(answer)
        else:
            _print(answer)
        if answer["problems"]:
            raise typer.Exit(1)


def _print(answer: dict[str, Any]) -> None:
    """The page for people."""
    typer.echo(heading("versions"))
    versions = [(name, version or "not installed") for name, version in answer["versions"].items()]
    typer.echo(table([*versions, ("platform", answer["platform"]), ("executable", answer["executable"])]))
    typer.echo(heading("machine"))
    names = ("devices", "cores", "threads", "lapack", "OMP_NUM_THREADS", "KFAC_DATA")
    rows = [(name, answer.get(name)) for name in names if name in answer]
    typer.echo(
        table(
            [
                (name, ", ".join(value) if isinstance(value, list) else "not set" if value is None else str(value))
                for name, value in rows
            ]
        )
    )
    typer.echo(heading("data"))
    data = [
        (item["problem"], item["state"], ", ".join(item["where"]) or item["advice"] or "-") for item in answer["data"]
    ]
    typer.echo(table(data) if data else "  (no problem has data of its own)")
    typer.echo(heading("plug-ins"))
    typer.echo("\n".join(f"  {plugin}" for plugin in answer["plugins"]) or "  (none)")
    typer.echo(heading("problems"))
    typer.echo("\n".join(f"  {problem}" for problem in answer["problems"]) or "  none found")
