"""The command `kfac plugins`: what is installed, what is broken and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kfac_cli.answers import heading, print_json
from kfacore.registry import DISABLE_VARIABLE, get_registry

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        "plugins", help=f"Show the plug-ins that are installed. {DISABLE_VARIABLE}=NAME,... switches some off."
    )
    def plugins(json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False) -> None:
        found = get_registry().plugins()
        if json:
            print_json([asdict(plugin) for plugin in found])
            return
        if not found:
            typer.echo("no plug-in is installed, not even the built-in one: install kfacore (pip install kfacore)")
        for plugin in found:
            source = f"{plugin.distribution} {plugin.version}" if plugin.distribution else "not installed"
            typer.echo(f"{heading(plugin.name)}  {plugin.state}  ({source})")
            if plugin.file:
                typer.echo(f"  file: {plugin.file}")
            if plugin.reason:
                typer.echo(f"  reason: {plugin.reason}")
            if plugin.components:
                typer.echo(f"  offers: {', '.join(plugin.components)}")
