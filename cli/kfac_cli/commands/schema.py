"""The command `kfac schema`: JSON Schema of configuration files and study files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kfac_cli.answers import print_json
from kfacore.errors import ConfigError, nearest
from kfacore.lab.config.schema import run_config_schema
from kfacore.registry import get_registry

if TYPE_CHECKING:
    from kfacore.registry import Registry

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("schema")
    def schema(
        what: Annotated[
            str, typer.Argument(metavar="run|study", help="run (kfac train -c FILE) or study (kfac study run FILE).")
        ] = "run",
    ) -> None:
        """Print the JSON Schema of configuration files or of study files, for editors."""
        if what not in _SCHEMAS:
            raise ConfigError(f"there is no schema of '{what}', {nearest(what, _SCHEMAS)}")
        print_json(_SCHEMAS[what](get_registry()))


def _study_schema(registry: Registry) -> dict[str, Any]:
    from kfacore.lab.studies.config import study_schema

    return study_schema(registry)


_SCHEMAS: dict[str, Callable[[Registry], dict[str, Any]]] = {"run": run_config_schema, "study": _study_schema}
