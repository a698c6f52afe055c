"""kfacore: second-order optimization for PyTorch with Kronecker-factored curvature.

The names below are the stable public surface. They are loaded on first use, so that importing `kfacore` (and the
manifests of plug-ins) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfacore.curvature.preconditioner import Preconditioner
    from kfacore.errors import (
        ConfigError,
        DataError,
        KfacError,
        NumericalError,
        PluginError,
        ResourceError,
        UnsupportedModelError,
    )
    from kfacore.optim.guest import Preconditioned
    from kfacore.optim.joint import Joint
    from kfacore.optim.kfac import KFAC
    from kfacore.optim.options import KFACConfig
    from kfacore.roles.optimizer import StepReport

__version__ = "0.2.0"

__all__ = [
    "KFAC",
    "ConfigError",
    "DataError",
    "Joint",
    "KFACConfig",
    "KfacError",
    "NumericalError",
    "PluginError",
    "Preconditioned",
    "Preconditioner",
    "ResourceError",
    "StepReport",
    "UnsupportedModelError",
]

_HOMES = {
    "KFAC": "kfacore.optim.kfac",
    "Joint": "kfacore.optim.joint",
    "KFACConfig": "kfacore.optim.options",
    "Preconditioned": "kfacore.optim.guest",
    "Preconditioner": "kfacore.curvature.preconditioner",
    "StepReport": "kfacore.roles.optimizer",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'kfacore' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "kfacore.errors")), name)
