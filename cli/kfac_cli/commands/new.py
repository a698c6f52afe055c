"""The command `kfac new`: what an author of a plug-in starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kfac_cli.answers import print_json
from kfacore.lab.scaffold.kinds import KINDS
from kfacore.registry import get_registry

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    new = typer.Typer(
        name="new", rich_markup_mode=None, no_args_is_help=True, help="Start something new, for example a plug-in."
    )
    app.add_typer(new)

    @new.callback()
    def _group() -> None:
        """Keeps `plugin` a command of its own while it is the only one."""

    @new.command("plugin")
    def new_plugin(
        name: Annotated[str, typer.Argument(metavar="NAME", help="The component's name, for example my-approx.")],
        slot: Annotated[
            str,
            typer.Option(
                metavar="SLOT",
                help=f"What it is: {', '.join(KINDS)}.",
                autocompletion=lambda incomplete: [slot for slot in KINDS if slot.startswith(incomplete)],
            ),
        ] = "approx",
        into: Annotated[Path, typer.Option(metavar="DIR", help="Where to make the folder kfac-NAME.")] = Path("."),
        json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    ) -> None:
        """Write a complete distribution with a working component: pyproject, module, test, README.

        By default an approximation. It passes the conformance suite as it is; change it and keep it passing.
        """
        from kfacore.lab.scaffold import write_plugin

        made = write_plugin(name, into, get_registry(), slot)
        if json:
            print_json(
                {
                    "name": made.name,
                    "slot": made.slot,
                    "distribution": made.distribution,
                    "module": made.module,
                    "folder": str(made.folder),
                    "files": list(made.files),
                }
            )
            return
        typer.echo(f"wrote {made.folder}")
        for file in made.files:
            typer.echo(f"  {file}")
        typer.echo("next:")
        typer.echo("  pip install hatchling editables")  # what builds it, where it is not isolated
        typer.echo(f"  pip install --no-build-isolation -e {made.folder}")
        typer.echo(f"  pytest {made.folder}")
        typer.echo(f"  {made.command}")
