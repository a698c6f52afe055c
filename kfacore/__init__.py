"""kfacore: second-order optimization for PyTorch with Kronecker-factored curvature.

The names below are the stable public surface. They are loaded on first use, so that importing `kfacore` (and the
manifests of plug-ins) does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfacore.lazy import lazy_names

if TYPE_CHECKING:
    from kfacore.curvature.preconditioner import Preconditioner
    from kfacore.errors import (
        ConfigError,
        DataError,
        KfacError,
        NumericalError,
        PluginError,
        RankError,
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
    "RankError",
    "ResourceError",
    "StepReport",
    "UnsupportedModelError",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "curvature.preconditioner": ("Preconditioner",),
        "errors": (
            "ConfigError",
            "DataError",
            "KfacError",
            "NumericalError",
            "PluginError",
            "RankError",
            "ResourceError",
            "UnsupportedModelError",
        ),
        "optim.guest": ("Preconditioned",),
        "optim.joint": ("Joint",),
        "optim.kfac": ("KFAC",),
        "optim.options": ("KFACConfig",),
        "roles.optimizer": ("StepReport",),
    },
)
