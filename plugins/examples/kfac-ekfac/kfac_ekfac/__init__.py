"""EKFAC as a plug-in for kfacore: config and manifest.

kfacore imports this module for every command, so it must not import torch; the mathematics is in `kfac_ekfac.ekfac`,
which is imported only when an EKFAC is built.
"""

from __future__ import annotations

from typing import Annotated, Literal

from kfacore.plugin import ApproxConfig, Component, hookimpl
from pydantic import Field

__all__ = ["KFAC_API", "EkfacConfig", "kfac_components"]

KFAC_API = 1
"""The plug-in API that this was written for; kfacore refuses by name what it cannot serve."""


class EkfacConfig(ApproxConfig):
    """Options of EKFAC."""

    kind: Literal["ekfac"] = "ekfac"
    """Name of the implementation."""

    refresh_every: Annotated[int, Field(ge=1)] = 1
    """Steps between two inverses with the newest second moments; cheap while the eigenbasis stays, so every step."""

    basis_every: Annotated[int, Field(ge=1)] = 20
    """Steps between two eigenbases, at the next refresh; the first three refreshes always take a new one."""


@hookimpl
def kfac_components() -> list[Component]:
    """The manifests of this distribution: one approximation."""
    return [
        Component(
            "approx",
            "ekfac",
            EkfacConfig,
            "kfac_ekfac.ekfac:Ekfac",
            "Eigenbasis of the Kronecker factors, second moments re-estimated in it (George et al. 2018).",
        )
    ]
