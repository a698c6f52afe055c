"""The authors' program replayed on a device in double precision: what tests/optim/test_golden.py does on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from optim.test_golden import ReplayedBernoulli, as_blocks, close, flat, parameters_of, set_parameters
from waits import DEVICES

from kfacore import KFAC
from kfacore.lab.models import autoencoder

DATA = Path(__file__).parents[1] / "data"


def on_host(value: torch.Tensor | None) -> float:
    assert value is not None
    return float(value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_every_step_on_a_device(device: str, approx: str) -> None:
    """Parameters after each step, objective, alpha, mu, rho, lambda and gamma, to 1e-8; a few steps on a CPU."""
    common, trace = np.load(DATA / "golden_common.npz"), np.load(DATA / f"golden_{approx}.npz")
    model = autoencoder([int(size) for size in common["layer_sizes"]]).double()
    set_parameters(model, trace["params_init"])
    walked = parameters_of(model)
    model.to(device)
    likelihood = ReplayedBernoulli()
    optimizer = KFAC(
        model,
        likelihood=likelihood,
        approx=approx,
        preset="paper",
        weight_decay=float(common["eta"]),
        estimator={"kind": "monte-carlo", "tau1": 0.25},
        damping={"kind": "levenberg-marquardt", "lambda0": 3.0},
        momentum={"kind": "quadratic-model", "tau2": 1.0},
    )
    data, draws = (torch.from_numpy(common[name]).to(device) for name in ("data", "draws"))
    batches = torch.from_numpy(common["batches"].astype(np.int64)).to(device)
    taken = drawn = 0
    sizes = common["batch_sizes"].tolist()
    for k, m in enumerate(sizes if device != "cpu" else sizes[:6], start=1):
        n = -(-m // 4)
        x = data[batches[taken : taken + m]]
        likelihood.draws = draws[drawn : drawn + n]
        taken, drawn = taken + m, drawn + n
        report = optimizer.step(x, x)
        walked = walked + flat(as_blocks(model, trace["step"][k - 1]))
        close(k, "parameters after", parameters_of(copy.deepcopy(model).cpu()), walked)
        for name, value, key in (
            ("objective", report.objective, "obj_pre"),
            ("lambda used", report.lam, "lambda_used"),
            ("gamma", report.gamma, "gamma"),
            ("alpha", report.alpha, "alpha"),
        ):
            close(k, name, on_host(value), trace[key][k - 1])
        if k > 1:
            close(k, "mu", on_host(report.mu), trace["mu"][k - 1])
        if report.rho is not None:
            close(k, "rho", on_host(report.rho), trace["rho"][k - 1])
