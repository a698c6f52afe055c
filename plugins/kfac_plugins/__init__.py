"""The built-in plug-ins, one mathematical object a file, registered through the same hook as anybody else's.

Every slot's folder lists its manifests in ``COMPONENTS``; nothing here or there imports torch.
"""

from __future__ import annotations

from kfac_plugins.approx import COMPONENTS as APPROX
from kfac_plugins.damping import COMPONENTS as DAMPING
from kfac_plugins.estimators import COMPONENTS as ESTIMATORS
from kfac_plugins.executors import COMPONENTS as EXECUTORS
from kfac_plugins.layers import COMPONENTS as LAYERS
from kfac_plugins.likelihoods import COMPONENTS as LIKELIHOODS
from kfac_plugins.momentum import COMPONENTS as MOMENTUM
from kfac_plugins.optimizers import COMPONENTS as OPTIMIZERS
from kfac_plugins.problems import COMPONENTS as PROBLEMS
from kfac_plugins.sinks import COMPONENTS as SINKS
from kfac_plugins.trust import COMPONENTS as TRUST
from kfacore.plugin import API_VERSION, Component, hookimpl

__all__ = ["KFAC_API", "kfac_components"]

KFAC_API = API_VERSION


@hookimpl
def kfac_components() -> list[Component]:
    """The manifests of everything built in, slot by slot."""
    run = [*PROBLEMS, *LIKELIHOODS, *OPTIMIZERS, *ESTIMATORS, *APPROX, *DAMPING, *MOMENTUM, *TRUST, *SINKS]
    return [*run, *LAYERS, *EXECUTORS]
