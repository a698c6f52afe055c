"""kfacore: second-order optimization for PyTorch with Kronecker-factored curvature.

The names below are the stable public surface. They are loaded on first use, so that importing `kfacore` (and the
manifests of plug-ins) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfacore.errors import (
        ConfigError,
        DataError,
        KfacError,
        NumericalError,
        PluginError,
        ResourceError,
        UnsupportedModelError,
    )
    from kfacore.optimizer import KFAC
    from kfacore.options import KFACConfig
    from kfacore.preconditioner import Preconditioner
    from kfacore.roles.optimizer import StepReport

__version__ = "0.1.0"

__all__ = [
    "KFAC",
    "ConfigError",
    "DataError",
    "KFACConfig",
    "KfacError",
    "NumericalError",
    "PluginError",
    "Preconditioner",
    "ResourceError",
    "StepReport",
    "UnsupportedModelError",
]

_HOMES = {
    "KFAC": "kfacore.optimizer",
    "KFACConfig": "kfacore.options",
    "Preconditioner": "kfacore.preconditioner",
    "StepReport": "kfacore.roles.optimizer",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'kfacore' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "kfacore.errors")), name)
