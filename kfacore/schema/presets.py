"""Presets: named values that lie above the problem's suggestions and below files, flags and ``--set``.

Slots that the chosen optimizer does not use, and keys that the chosen component does not have, are left out of a preset
without a word, so one preset serves every optimizer and approximation. Component defaults are the values of the
authors' program, so ``paper`` has nothing to add to them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DEFAULT_PRESET", "PRESETS"]

DEFAULT_PRESET = "default"
"""The preset of a run that names none."""

PRESETS: dict[str, dict[str, Any]] = {
    # The best this project knows; docs/notes/2026-11-preset-default.md has the measurements. lambda_0 = 150 costs the
    # published runs their first hundred steps (method, section 9): a share of the first batch's curvature is near 0.003
    # on the paper's problems, the best of 0.1 to 0.0003, and follows the scale of others.
    # gamma = sqrt(lambda + eta) trains as well as a comparison of three, and needs one inverse where that needs three.
    # One pi for the whole net takes a tenth to a third off the error on CURVES for the same cases, on each of 4 seeds.
    # Early on the inverse ages fast, so it is refreshed whenever the steps have grown by two fifths; with a fifth the
    # refreshes are half of the first ten seconds on MNIST.
    # The quadratic model has an eighth of the mini-batch, as the statistics do: less time than the paper's quarter for
    # the same error. But small mini-batches need it whole: on CURVES, with 250 cases throughout, the error after 400
    # steps is 1.3 if it has all of them, and 2.1 with half.
    # A tolerance of 0.02 leaves the tridiagonal update where it is (cosine 0.9995) and costs hardly more than the
    # diagonal one. Factors to the power of 0.85 listen less to the noise of a mini-batch in directions of little
    # curvature: on CURVES that nearly halves the error for the same cases, on MNIST and FACES it takes a twentieth off.
    # Mini-batches from passes over the data in place of independent ones are worth 0.12 of the error late on MNIST; a
    # first mini-batch of 500 cases has the smaller error for the same cases on CURVES. Runs are short, so averages over
    # ten steps are the better ones; over a hundred they trail behind.
    "default": {
        "estimator": {"min_cases": 250},
        "approx": {"refresh_growth": 0.4, "refresh_share": 0.33, "tolerance": 0.02, "power": 0.85},
        "damping": {
            "kind": "levenberg-marquardt",
            "lambda0": None,
            "confirmed": True,
            "gamma_rule": "tied",
            "pi": "net",
            "units": "inputs",
        },
        "momentum": {
            "kind": "quadratic-model",
            "tau2": 0.125,
            "min_cases": 250,
            "slope": "model",
            "mu_min": 0.0,
            "mu_max": 1.0,
        },
        "trust": {"kind": "undo"},
        "batch": {"start": 500, "sampling": "epochs"},
        "averaging": {"start": 20, "decay": 0.9},
    },
    # Martens & Grosse (2015) to the letter of the authors' program (method, sections 2 to 5). Everything is stated,
    # so that a problem's suggestions cannot change it.
    "paper": {
        "estimator": {"kind": "monte-carlo", "tau1": 0.125, "min_cases": 1, "decay": 0.95},
        "approx": {"refresh_every": 20, "refresh_growth": None, "refresh_share": None, "tolerance": 0.0, "power": 1.0},
        "damping": {
            "kind": "levenberg-marquardt",
            "lambda0": 150.0,
            "rate": 0.95,
            "confirmed": False,
            "gamma_rule": "compared",
            "pi": "layer",
            "units": "parameters",
        },
        "momentum": {
            "kind": "quadratic-model",
            "tau2": 1.0,
            "min_cases": 1,
            "slope": "batch",
            "iterations": 1,
            "mu_min": None,
            "mu_max": None,
        },
        "trust": {"kind": "none"},
        "weight_decay": 1e-5,
        "batch": {"schedule": "exponential", "start": 1000, "target_step": 500, "sampling": "independent"},
        "averaging": {"start": 200, "decay": 0.99},
    },
    # Heskes (2000): the exact Fisher of the outputs, a fixed gamma added to both factors without pi, and no
    # re-scaling of the step by the quadratic model.
    "heskes": {
        "estimator": {"kind": "exact"},
        "damping": {"kind": "fixed", "gamma": 0.1, "pi": None},
        "momentum": {"kind": "fixed", "lr": 1.0, "mu": 0.0},
    },
}
