"""Diagnostics in double precision: how far an approximation is from the exact Fisher and the exact natural gradient.

* `kfacore.lab.diagnostics.exact`: the exact quadratic model around the parameters, matrix-free.
* `kfacore.lab.diagnostics.natural`: the natural gradient by conjugate gradients.
* `kfacore.lab.diagnostics.quality`: what an approximation's update buys, over a range of gamma.
* `kfacore.lab.diagnostics.dense`: F, F-tilde and approximations as matrices, for small nets.
* `kfacore.lab.diagnostics.cumulants`: the error of F-tilde as cumulants (equations 3 and 4).
* `kfacore.lab.diagnostics.invariance`: reparameterised nets (Theorem 1, Corollaries 2 and 3).

Importing this package imports no torch; the names below are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kfacore.lazy import lazy_names

if TYPE_CHECKING:
    from kfacore.lab.diagnostics.cumulants import CumulantReport, cumulant_report
    from kfacore.lab.diagnostics.dense import Difference, FactorPairs, block_average, compare, exact_fisher
    from kfacore.lab.diagnostics.exact import ExactModel
    from kfacore.lab.diagnostics.invariance import (
        Agreement,
        FunctionPath,
        Transform,
        TransformedChain,
        agreement,
        function_path,
        logistic_twin,
        random_transform,
        whitening,
    )
    from kfacore.lab.diagnostics.natural import NaturalGradient, natural_gradient
    from kfacore.lab.diagnostics.quality import UpdateQuality, gamma_grid, inverses, measure_update

__all__ = [
    "Agreement",
    "CumulantReport",
    "Difference",
    "ExactModel",
    "FactorPairs",
    "FunctionPath",
    "NaturalGradient",
    "Transform",
    "TransformedChain",
    "UpdateQuality",
    "agreement",
    "block_average",
    "compare",
    "cumulant_report",
    "exact_fisher",
    "function_path",
    "gamma_grid",
    "inverses",
    "logistic_twin",
    "measure_update",
    "natural_gradient",
    "random_transform",
    "whitening",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "cumulants": (
            "CumulantReport",
            "cumulant_report",
        ),
        "dense": (
            "Difference",
            "FactorPairs",
            "block_average",
            "compare",
            "exact_fisher",
        ),
        "exact": ("ExactModel",),
        "invariance": (
            "Agreement",
            "FunctionPath",
            "Transform",
            "TransformedChain",
            "agreement",
            "function_path",
            "logistic_twin",
            "random_transform",
            "whitening",
        ),
        "natural": (
            "NaturalGradient",
            "natural_gradient",
        ),
        "quality": (
            "UpdateQuality",
            "gamma_grid",
            "inverses",
            "measure_update",
        ),
    },
)
