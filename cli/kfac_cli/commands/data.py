"""The commands `kfac data list` and `kfac data fetch`: the data files of the problems."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kfac_cli.answers import heading, print_json, table, warn_of_plugins
from kfacore.errors import ConfigError
from kfacore.lab.data.fetch import mirrors_from
from kfacore.lab.data.places import cache_folder, search_folders
from kfacore.lab.data.status import DataStatus, FetchesData, ReportsData
from kfacore.plugin import Component
from kfacore.registry import get_registry

__all__ = ["register"]

_WORDS = {
    "verified": "there, checksum right",
    "unverified": "there, no checksum to compare with",
    "corrupt": "there, but unusable",
    "missing": "missing",
    "generated": "generated on first use",
}

DataDir = Annotated[
    str | None,
    typer.Option("--data-dir", metavar="DIR", help="Folder of the data files; by default KFAC_DATA, then the cache."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _fetchable(incomplete: str) -> list[str]:
    """Completion of PROBLEM."""
    names = [part.name for part in get_registry().components("problem") if issubclass(part.config, FetchesData)]
    return [name for name in names if name.startswith(incomplete)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    data = typer.Typer(name="data", rich_markup_mode=None, no_args_is_help=True, help="List or fetch data files.")
    app.add_typer(data)

    @data.command("list")
    def list_data(data_dir: DataDir = None, json: Json = False) -> None:
        """Say of each problem what its data are, whether they are there and right, and how to get them."""
        folders = search_folders(data_dir)
        registry = get_registry()
        found = {component.name: _status(component, data_dir) for component in registry.components("problem")}
        if json:
            print_json([_as_json(name, status) for name, status in found.items()])
            return
        for name, status in found.items():
            typer.echo(heading(name))
            typer.echo(table(_rows(status)))
        typer.echo(f"folders searched: {', '.join(str(folder) for folder in folders)}")
        warn_of_plugins(registry)

    @data.command("fetch")
    def fetch_data(
        problem: Annotated[
            str,
            typer.Argument(metavar="PROBLEM", help="A problem with data to download.", autocompletion=_fetchable),
        ],
        data_dir: DataDir = None,
        mirror: Annotated[
            str | None,
            typer.Option("--mirror", metavar="URL", help="Server to use instead of the usual ones; or KFAC_MIRROR."),
        ] = None,
        json: Json = False,
    ) -> None:
        """Download a problem's data files and verify them; files that are there already and right are kept."""
        component = get_registry().find("problem", problem)
        config = component.config.model_validate({})
        if not isinstance(config, FetchesData):
            names = ", ".join(_fetchable(""))
            raise ConfigError(
                f"the problem '{problem}' has nothing to fetch (kfac data list says where its data come from); "
                f"problems that have: {names}"
            )
        paths = config.fetch_data(cache_folder(data_dir), mirrors_from(mirror, ()) if mirror else (), _Progress())
        if json:
            print_json({"problem": problem, "files": [str(path) for path in paths]})
            return
        for path in paths:
            typer.echo(str(path))


class _Progress:
    """Progress on stderr: a line that counts on terminals, one line a file elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._percent = -1

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """Take the bytes so far of a file."""
        if not self._live:
            if done == 0:
                print(f"fetching {name} ({_size(total)})", file=sys.stderr, flush=True)
            return
        percent = 100 * done // total if total else 0
        if done == 0 or percent != self._percent or done == total:
            self._percent = percent
            end = "\n" if done and done == total else ""
            shown = f"{percent:3d}%" if total else _size(done)
            print(f"\rfetching {name} ({_size(total)})  {shown}", end=end, file=sys.stderr, flush=True)


def _status(component: Component, data_dir: str | None) -> DataStatus | str:
    """The status, or why there is none. One problem of a plug-in must not hide the others."""
    try:
        config = component.config.model_validate({"data_dir": data_dir})
        return config.data_status() if isinstance(config, ReportsData) else "says nothing about its data"
    except Exception as error:
        return f"cannot say: {type(error).__name__}: {error}"


def _rows(status: DataStatus | str) -> list[tuple[str, str]]:
    if isinstance(status, str):
        return [("state", status)]
    size = f" ({_size(status.size)})" if status.size is not None else ""
    rows = [("what", status.what), ("state", _WORDS[status.state] + size)]
    rows += [("file", str(path)) for path in status.where]
    return [*rows, ("advice", status.advice)] if status.advice else rows


def _as_json(name: str, status: DataStatus | str) -> dict[str, Any]:
    if isinstance(status, str):
        return {"problem": name, "state": "unknown", "advice": status}
    return {
        "problem": name,
        "what": status.what,
        "state": status.state,
        "files": [str(Path(path)) for path in status.where],
        "bytes": status.size,
        "advice": status.advice,
    }


def _size(count: int | None) -> str:
    if count is None:
        return "size unknown"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
