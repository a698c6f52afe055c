"""Presets: named values that lie above the problem's suggestions and below files, flags and ``--set``.

Slots that the chosen optimizer does not use are left out of a preset without a word, so one preset serves every
optimizer. Component defaults are the values of the authors' program, so ``paper`` has nothing to add to them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DEFAULT_PRESET", "PRESETS"]

DEFAULT_PRESET = "default"
"""The preset of a run that names none."""

PRESETS: dict[str, dict[str, Any]] = {
    # The best this project knows. lambda_0 = 150 costs the published runs their first hundred steps (method,
    # section 9). Of 0.1, 0.03, 0.01, 0.003, 0.001 and 0.0003 the lower the better on curves; 0.003 is best on mnist and
    # the classifier, and on faces it has caught up with 0.1 after 40 steps. A quarter of the mini-batch is enough for
    # the quadratic model, as in the paper's text.
    "default": {
        "damping": {"kind": "levenberg-marquardt", "lambda0": 0.003},
        "momentum": {"kind": "quadratic-model", "tau2": 0.25},
    },
    # Martens & Grosse (2015) to the letter of the authors' program (method, sections 2 to 5). Everything is stated,
    # so that a problem's suggestions cannot change it.
    "paper": {
        "estimator": {"kind": "monte-carlo", "tau1": 0.125, "decay": 0.95},
        "approx": {"refresh_every": 20},
        "damping": {"kind": "levenberg-marquardt", "lambda0": 150.0, "pi": True},
        "momentum": {"kind": "quadratic-model", "tau2": 1.0},
        "weight_decay": 1e-5,
        "batch": {"schedule": "exponential", "start": 1000, "target_step": 500},
        "averaging": {"start": 200, "decay": 0.99},
    },
    # Heskes (2000): the exact Fisher of the outputs, a fixed gamma added to both factors without pi, and no
    # re-scaling of the step by the quadratic model.
    "heskes": {
        "estimator": {"kind": "exact"},
        "damping": {"kind": "fixed", "gamma": 0.1, "pi": False},
        "momentum": {"kind": "fixed", "lr": 1.0, "mu": 0.0},
    },
}
