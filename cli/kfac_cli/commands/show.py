"""The command `kfac show`: everything about one component without importing it."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import Annotated

import typer

from kfac_cli.answers import heading, print_json, table
from kfacore.errors import ConfigError
from kfacore.plugin import SLOTS, Component
from kfacore.registry import Registry, get_registry
from kfacore.schema.describe import describe

__all__ = ["register"]


def _names(incomplete: str) -> list[str]:
    """Completion of SLOT/NAME."""
    registry = get_registry()
    names = [f"{slot}/{component.name}" for slot in SLOTS for component in registry.components(slot)]
    return [name for name in names if name.startswith(incomplete)]


def _find(registry: Registry, what: str) -> Component:
    """The component that SLOT/NAME means.

    Raises:
        ConfigError: There is no slash, or no such slot or name.
    """
    slot, slash, name = what.partition("/")
    if slash:
        return registry.find(slot, name)
    homes = [f"{home}/{what}" for home in SLOTS if any(part.name == what for part in registry.components(home))]
    if homes:
        raise ConfigError(f"'{what}' needs its slot: {' or '.join(f'kfac show {home}' for home in homes)}")
    if what in SLOTS:
        raise ConfigError(f"'{what}' is a slot: kfac list {what} has its components, show one as {what}/NAME")
    raise ConfigError(f"'{what}' is not of the form SLOT/NAME, for example approx/tridiag; kfac list has all of them")


def show(
    what: Annotated[
        str, typer.Argument(metavar="SLOT/NAME", help="For example approx/tridiag.", autocompletion=_names)
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show a component: what it is, where it comes from, and the keys of its configuration."""
    registry = get_registry()
    component = _find(registry, what)
    origin = registry.origin(component)
    keys = describe(component.config)
    suggestions = getattr(component.config, "run_defaults", {})
    if json:
        print_json(
            {
                "slot": component.slot,
                "name": component.name,
                "summary": component.summary,
                "plugin": origin.name,
                "distribution": origin.distribution,
                "version": origin.version,
                "file": origin.file,
                "target": component.target,
                "uses": sorted(component.uses),
                "suggests": suggestions,
                "keys": [asdict(key) for key in keys],
            }
        )
        return
    typer.echo(f"{heading(f'{component.slot}/{component.name}')}  {component.summary}")
    facts = [
        ("from", f"{origin.name} ({origin.distribution} {origin.version}, {origin.file})"),
        ("class", component.target),
    ]
    if component.slot == "optimizer":
        facts.append(("uses", ", ".join(sorted(component.uses)) or "no other slots"))
    if suggestions:
        facts.append(("suggests", jsonlib.dumps(suggestions)))
    typer.echo(table(facts))
    if not keys:
        typer.echo("no keys besides kind")
        return
    typer.echo(heading("keys"))
    for key in keys:
        name = key.key if component.slot == "sink" else f"{component.slot}.{key.key}"
        default = "none" if key.default is None else jsonlib.dumps(key.default)
        typer.echo(f"  {name}  ({key.type}, default {default})")
        if key.help:
            typer.echo(f"      {key.help}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("show")(show)
