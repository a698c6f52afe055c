r"""What a refresh costs by method, on the sides of the GPT and of the MNIST net, and how exact each is.

Wanted is X^-p of damped factors X: p = 1 (an inverse) or p = 1/2 (the guest's tempering). The factors have eigenvalues
1, 1/2, 1/3, ... that are damped by a thousandth of their mean; a warm start is from 0.95 X + 0.05 Y, a refresh ago.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.part import Part, median_ms
from kfacore.curvature.linalg import factor_spd, try_eigh
from kfacore.curvature.roots import inverse_roots, ratios
from kfacore.parallel.cores import share

__all__ = ["measure", "newton_schulz", "rotated"]

_TABLE = "refresh: milliseconds a factor"
_SIZES = {"500": (500, 4), "768": (768, 8), "3072": (3072, 2), "1001": (1001, 4)}


def _factor(size: int, seed: int, device: torch.device) -> Tensor:
    """A damped factor, (d, d)."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator).to(device))
    values = 1.0 / torch.arange(1.0, size + 1.0, device=device)
    return (Q * (values + 1e-3 * values.mean())) @ Q.mT


def _later(X: Tensor, seed: int) -> Tensor:
    """The factor one refresh later."""
    return 0.95 * X + 0.05 * _factor(len(X), seed, X.device)


def _error(found: Tensor, X: Tensor, power: float) -> float:
    """||found - X^-power|| / ||X^-power|| in double precision."""
    values, vectors = torch.linalg.eigh(X.double().cpu())
    wanted = (vectors * values.pow(-power)) @ vectors.mT
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


def newton_schulz(X: Tensor, start: Tensor, tolerance: float = 1e-3, most: int = 60) -> tuple[Tensor, int]:
    """X^-1 in matrix products alone, from an inverse that is nearly right: Z <- Z (2 I - X Z).

    Args:
        X: Symmetric positive definite.
        start: Its approximate inverse; where ||I - X start|| >= 1 for the spectral norm, 1 / trace X is begun with.
        tolerance: Of ||I - X Z|| over sqrt(d), looked at every third product so that nobody waits for each.
        most: Products.

    Returns:
        The inverse and the number of iterations.
    """
    identity = torch.eye(len(X), dtype=X.dtype, device=X.device)
    residual = identity - X @ start
    near = torch.linalg.matrix_norm(residual, 1) < 1.0  # at least the spectral radius
    Z = torch.where(near, start, identity / X.diagonal().sum())
    for done in range(1, most + 1):
        residual = identity - X @ Z
        Z = Z + Z @ residual
        if done % 3 == 0 and float(residual.norm()) <= tolerance * len(X) ** 0.5:
            return Z, done
    return Z, most


def rotated(X: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate eigenvalues and eigenvectors from those of a refresh ago: one step of orthogonal iteration."""
    Q, _ = torch.linalg.qr(X @ Q)
    return (Q * (X @ Q)).sum(0), Q


def _power(values: Tensor, vectors: Tensor, power: float) -> Tensor:
    return (vectors * values.clamp_min(1e-12).pow(-power)) @ vectors.mT


def _in_double(X: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(X.double())
    return values.to(X.dtype), vectors.to(X.dtype)


def _methods(before: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, tuple[float, Callable[[], list[Tensor]]]]:
    """Each method with the power that it makes, and what it does to all factors of one size."""
    zero = torch.zeros((), device=now[0].device)
    names = [("factor", "A")] * len(now)
    stacked = torch.stack(list(now))
    inverses = [torch.cholesky_inverse(torch.linalg.cholesky(X)) for X in before]
    bases = [torch.linalg.eigh(X)[1] for X in before]
    host = torch.device("cpu")

    def on_threads() -> list[Tensor]:
        """The device is free meanwhile; the way there and back is counted."""
        copies = [X.to(host) for X in now]
        jobs = [partial(try_eigh, X, X.dtype) for X in copies]
        found = share(jobs, [5.0 * len(X) ** 3 for X in copies], host)
        return [_power(*(x.to(zero.device) for x in (values, vectors)), 0.5) for values, vectors, _ in found]

    def batched() -> list[Tensor]:
        values, vectors = torch.linalg.eigh(stacked)
        return [_power(v, q, 0.5) for v, q in zip(values, vectors, strict=True)]

    def batched_cholesky() -> list[Tensor]:
        return list(torch.cholesky_inverse(torch.linalg.cholesky_ex(stacked)[0]).unbind())

    def in_products() -> list[Tensor]:
        """With the one wait for what the damping is of each."""
        shifts = [1e-3 * X.diagonal().mean() for X in now]  # some more than what was added: as good a lower bound
        found = ratios([X - c * torch.eye(len(X), device=X.device) for X, c in zip(now, shifts, strict=True)], shifts)
        suited = [(X, c, ratio) for X, c, ratio in zip(now, shifts, found, strict=True) if ratio is not None]
        return [inverse_roots(X[None], c[None], ratio)[0][0] for X, c, ratio in suited]

    return {
        "Cholesky, checked (kfacore)": (
            1.0,
            lambda: [spd.inverse for spd in factor_spd(now, [zero] * len(now), names, keep_lower=False)[0]],
        ),
        "Cholesky, one batch": (1.0, batched_cholesky),
        "Newton-Schulz from the last inverse": (
            1.0,
            lambda: [newton_schulz(X, Z)[0] for X, Z in zip(now, inverses, strict=True)],
        ),
        "QR from the last basis": (
            0.5,
            lambda: [_power(*rotated(X, Q), 0.5) for X, Q in zip(now, bases, strict=True)],
        ),
        "square roots in products (kfacore)": (0.5, in_products),
        "eigh on the device": (0.5, lambda: [_power(*torch.linalg.eigh(X), 0.5) for X in now]),
        "eigh on the device, one batch": (0.5, batched),
        "eigh on the device, double precision": (0.5, lambda: [_power(*_in_double(X), 0.5) for X in now]),
        "eigh on CPU threads": (0.5, on_threads),
    }


def measure(part: Part) -> None:
    """One row a size and method."""
    sizes = {"24": (24, 5), "40": (40, 2)} if part.small else _SIZES
    for name, (size, count) in sizes.items():
        before = [_factor(size, seed, part.device) for seed in range(count)]
        now = [_later(X, 100 + seed) for seed, X in enumerate(before)]
        for method, (power, job) in _methods(before, now).items():
            part.attempt(
                _TABLE, f"{method}, {name}", partial(_row, part, f"{count} of {name}", method, power, job, now)
            )


def _row(
    part: Part, sides: str, method: str, power: float, job: Callable[[], list[Tensor]], now: Sequence[Tensor]
) -> None:
    start = time.monotonic()
    found = job()
    once = time.monotonic() - start
    times = 5 if once < 0.5 else 1
    ms = median_ms(job, part.device, times=times, warmup=min(1, times - 1)) / len(now)
    part.row(
        _TABLE,
        sides=sides,
        method=method,
        makes=f"X^-{power:g}",
        **{"ms a factor": ms, "error": _error(found[0], now[0], power)},
    )
