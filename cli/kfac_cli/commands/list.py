"""The command `kfac list`: the components that can be named, with one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_cli.answers import heading, print_json, table, warn_of_plugins
from kfacore.plugin import SLOTS
from kfacore.registry import get_registry

__all__ = ["register"]


def _slots(incomplete: str) -> list[str]:
    """Completion of SLOT."""
    return [slot for slot in SLOTS if slot.startswith(incomplete)]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("list")
    def list_components(
        slot: Annotated[
            str | None, typer.Argument(metavar="SLOT", help=f"One of {', '.join(SLOTS)}.", autocompletion=_slots)
        ] = None,
        json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    ) -> None:
        """List the components that are installed, by slot."""
        registry = get_registry()
        slots = [slot] if slot is not None else list(SLOTS)
        found = {name: registry.components(name) for name in slots}
        if json:
            print_json(
                [
                    {
                        "slot": component.slot,
                        "name": component.name,
                        "summary": component.summary,
                        "plugin": registry.origin(component).name,
                        "distribution": registry.origin(component).distribution,
                    }
                    for components in found.values()
                    for component in components
                ]
            )
            return
        for name, components in found.items():
            typer.echo(heading(name))
            rows = []
            for component in components:
                origin = registry.origin(component)
                suffix = "" if origin.name == "builtin" else f" [{origin.distribution} {origin.version}]"
                rows.append((component.name, component.summary + suffix))
            typer.echo(table(rows) if rows else "  (none)")
        warn_of_plugins(registry)
