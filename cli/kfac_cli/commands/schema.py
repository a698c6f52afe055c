"""The command `kfac schema`: JSON Schema of configuration files."""

from __future__ import annotations

import typer

from kfac_cli.answers import print_json
from kfacore.config.schema import run_config_schema
from kfacore.registry import get_registry

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("schema")
    def schema() -> None:
        """Print the JSON Schema of configuration files (kfac train -c FILE), for editors."""
        print_json(run_config_schema(get_registry()))
