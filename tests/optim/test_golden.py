"""Every step of the authors' own program, replayed: same start, mini-batches and random draws, 1e-8 relative.

The fixtures in ``tests/data`` hold the traces' numbers rounded to 40 bits (4e-13 relative). ``golden_common.npz`` has
what both traces share; parameters after a step are the start plus the sum of the steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.likelihoods.bernoulli import Bernoulli
from kfacore import KFAC
from kfacore.curvature.moments import InputCross, InputFactor, OutputCross, OutputFactor
from kfacore.lab.models import autoencoder
from kfacore.optim.quadratic import model_value

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-8
STEPS = 60
KINDS = {"A": InputFactor, "G": OutputFactor, "Ax": InputCross, "Gx": OutputCross}


class ReplayedBernoulli(Bernoulli):
    """Targets from recorded uniform draws, as the program made them: 1 where mean >= u."""

    draws: Tensor

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        assert z.shape == self.draws.shape
        return (self.mean(z) >= self.draws).to(z.dtype)


class RecordingKFAC(KFAC):
    """Keeps what a step report does not show: gradient, proposals, and the model of every candidate."""

    record: dict[str, Any]

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._inverses, self._planes = self._directions.inverses, self._directions.planes
        self._directions.inverses = self.inverses  # type: ignore[method-assign]  # a spy
        self._directions.planes = self.planes  # type: ignore[method-assign]  # likewise

    def inverses(self, *args: Any, **options: Any) -> Any:
        result = self._inverses(*args, **options)
        self.record["gammas"] = [float(gamma) for gamma, _ in result[0]]
        return result

    def planes(self, local: Any, proposals: Any, *, moving: bool) -> tuple[Tensor, Tensor]:
        M, b = self._planes(local, proposals, moving=moving)
        self.record["grad"] = local.grad.flat.clone()
        self.record["proposals"] = [proposal.flat.clone() for proposal in proposals]
        self.record["values"] = model_value(M, b, self.momentum.coefficients(M, b)).tolist()
        return M, b


def as_blocks(model: nn.Module, vector: np.ndarray) -> list[np.ndarray]:
    """The (d_out, d_in + 1) blocks of a vector of the program: W column by column, then b, layer by layer."""
    blocks, start = [], 0
    for layer in linear_layers(model):
        rows, columns = layer.out_features, layer.in_features + 1
        blocks.append(vector[start : start + rows * columns].reshape(columns, rows).T)
        start += rows * columns
    assert start == len(vector)
    return blocks


def flat(blocks: list[np.ndarray]) -> np.ndarray:
    """Our own flat order: each block row by row."""
    return np.concatenate([block.reshape(-1) for block in blocks])


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def parameters_of(model: nn.Module) -> np.ndarray:
    layers = linear_layers(model)
    return flat([torch.cat([m.weight, m.bias[:, None]], 1).detach().numpy() for m in layers])


def set_parameters(model: nn.Module, vector: np.ndarray) -> None:
    with torch.no_grad():
        for layer, block in zip(linear_layers(model), as_blocks(model, vector), strict=True):
            layer.weight.copy_(torch.from_numpy(block[:, :-1].copy()))
            layer.bias.copy_(torch.from_numpy(block[:, -1].copy()))


def close(step: int, name: str, found: Any, wanted: Any) -> None:
    """Largest difference relative to the largest entry."""
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape, f"step {step}, {name}: shape {found.shape}, the trace has {wanted.shape}"
    assert np.isfinite(found).all(), f"step {step}, {name}: not finite"
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error <= TOLERANCE, f"step {step}, {name}: {error:.2e} relative to the trace"


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_every_step_of_the_authors_program(approx: str) -> None:
    common, trace = np.load(DATA / "golden_common.npz"), np.load(DATA / f"golden_{approx}.npz")
    arrays = {name: trace[name] for name in trace.files}
    model = autoencoder([int(size) for size in common["layer_sizes"]]).double()
    set_parameters(model, arrays["params_init"])
    start = parameters_of(model)
    likelihood = ReplayedBernoulli()
    optimizer = RecordingKFAC(
        model,
        likelihood=likelihood,
        approx=approx,
        preset="paper",
        weight_decay=float(common["eta"]),
        estimator={"kind": "monte-carlo", "tau1": 0.25},
        damping={"kind": "levenberg-marquardt", "lambda0": 3.0},
        momentum={"kind": "quadratic-model", "tau2": 1.0},
    )
    data, batches = torch.from_numpy(common["data"]), common["batches"].astype(np.int64)
    draws, walked = torch.from_numpy(common["draws"]), np.zeros_like(start)
    statistics_seen = 0
    taken = drawn = 0
    for k, m in enumerate(common["batch_sizes"].tolist(), start=1):
        n = -(-m // 4)
        x = data[torch.from_numpy(batches[taken : taken + m])]
        likelihood.draws = draws[drawn : drawn + n]
        taken, drawn = taken + m, drawn + n
        optimizer.record = {}
        report = optimizer.step(x, x)
        record = optimizer.record

        step = flat(as_blocks(model, arrays["step"][k - 1]))
        walked += step
        close(k, "parameters after", parameters_of(model), start + walked)
        assert optimizer._directions.delta is not None
        close(k, "step", optimizer._directions.delta.flat, step)
        close(k, "gradient", record["grad"], flat(as_blocks(model, arrays["grad"][k - 1])))
        used = record["gammas"].index(float(report.gamma)) if report.gamma is not None else -1
        close(k, "Delta", record["proposals"][used], -flat(as_blocks(model, arrays["prec_grad"][k - 1])))
        expected = ~np.isnan(arrays["gammas"][k - 1])
        close(k, "candidates of gamma", record["gammas"], arrays["gammas"][k - 1][expected])
        close(k, "model values", record["values"], arrays["model_values"][k - 1][expected])
        scalars = {
            "gamma": (report.gamma, "gamma"),
            "lambda used": (report.lam, "lambda_used"),
            "lambda after": (optimizer.damping.lam, "lambda_after"),
            "objective": (report.objective, "obj_pre"),
            "error": (report.error, "err_pre"),
            "alpha": (report.alpha, "alpha"),
        }
        for name, (value, key) in scalars.items():
            assert value is not None
            close(k, name, float(value), arrays[key][k - 1])
        assert report.mu is not None
        if k == 1:
            assert float(report.mu) == 0.0
        else:
            close(k, "mu", float(report.mu), arrays["mu"][k - 1])
        assert (report.rho is not None) == (k % 5 == 0) == (not np.isnan(arrays["rho"][k - 1]))
        if report.rho is not None:
            close(k, "rho", float(report.rho), arrays["rho"][k - 1])
        assert report.refreshed == (k <= 3 or k % 20 == 0)
        statistics_seen += compare_statistics(k, optimizer, arrays)
    assert k == STEPS
    assert taken == len(batches)
    assert drawn == len(draws)
    assert statistics_seen == 6 * (12 if approx == "blockdiag" else 22)


def compare_statistics(k: int, optimizer: KFAC, arrays: dict[str, np.ndarray]) -> int:
    """All running averages the trace has of this step; returns how many."""
    preconditioner = optimizer.preconditioner
    assert preconditioner is not None
    count = 0
    for prefix, kind in KINDS.items():
        for i in range(1, 7):
            key = f"{prefix}{i}_{k}"
            if key in arrays:
                close(k, key, preconditioner.moments[kind][i - 1], arrays[key])
                count += 1
    return count
