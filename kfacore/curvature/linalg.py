r"""Factorisations that are checked: finite, or tried again in double precision, then with more jitter.

On real data factors are singular (pixels that are always zero) and single-precision routines fail or return NaN
without an error (method, section 9). Nothing here returns a result that was not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from kfacore.curvature.spd import Spd, shifted
from kfacore.errors import NumericalError
from kfacore.parallel.cores import share
from kfacore.parallel.division import Wire
from kfacore.parallel.triangles import folded, unfolded
from kfacore.roles.inverse import Notice
from kfacore.schema.slots import PiRule

__all__ = [
    "EIGENPROBLEM",
    "balanced",
    "cholesky_batch",
    "eigh_again",
    "eigh_batch",
    "eigh_psd",
    "factor_again",
    "factor_spd",
    "gammas_of",
    "in_batches",
    "log_pi_of",
    "pi_of",
    "together",
    "try_eigh",
]

_T = TypeVar("_T")

EIGENPROBLEM = 5
"""Cost of an eigenproblem in those of a Cholesky factor and inverse, as measured; only when and where something is done
depends on it."""

_SMALL, _MANY = 64, 4
"""What is worth a batch: on one core 12 factors of 16 take 0.11 ms together and 1.15 ms alone, of 64 0.64 and 1.86, of
128 4.9 and 5.5; above that the arithmetic is all, and a factor a core is better. Last bits may differ from those of a
matrix alone, by where in memory it lies; from run to run they do not."""

_JACOBI = 512
"""Rows up to which CUDA solves single-precision eigenproblems in rotations: see `_solver`."""

_OVERFLOWED = (
    "has NaN or infinite entries; the forward or backward pass overflowed. Check the data and the initialisation, or "
    "start with a larger damping"
)

_JITTERS = (0.0, 1e-7, 1e-5, 1e-3, 1e-1)


def pi_of(A: Sequence[Tensor], G: Sequence[Tensor], rule: PiRule | Tensor = "layer") -> list[Tensor]:
    """pi of each layer, which splits gamma into pi gamma for A and gamma / pi for G.

    - ``"layer"``: pi_i = sqrt((tr A_i / dim A_i) / (tr G_i / dim G_i)), the trace norms (paper, section 6.3);
    - ``"net"``: the geometric mean of all pi_i, for every layer. Like pi_i it follows the scale of the objective;
    - None: 1;
    - a scalar: that one, for every layer (a mean over more layers than these).

    Where one of the two traces is zero (a dead layer) there is nothing to balance: pi_i is 1, and left out of the mean.

    Returns:
        One scalar a layer, in the dtype of its G.
    """
    if rule is None:
        return [g.new_ones(()) for g in G]
    if isinstance(rule, Tensor):
        return [rule.to(g.dtype) for g in G]
    pi, alive = _pi_of_layers(A, G)
    if rule == "net":
        pi = (pi.log().sum() / alive.sum().clamp_min(1)).exp().expand_as(pi)
    return list(pi.unbind())


def gammas_of(gamma: Tensor, blocks: int) -> list[Tensor]:
    """Gamma of each block: that of all, or its own from a vector (blocks,)."""
    return list(gamma.expand(blocks).unbind())


def log_pi_of(A: Sequence[Tensor], G: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Sum of log pi_i over the layers that are alive, and their number; None if there is no layer."""
    if not A:
        return None
    pi, alive = _pi_of_layers(A, G)
    return pi.log().sum(), alive.sum()


def _pi_of_layers(A: Sequence[Tensor], G: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """pi_i, 1 for a dead layer, and which layers are alive."""
    return balanced(
        torch.stack([(a.diagonal().mean() / g.diagonal().mean()).sqrt() for a, g in zip(A, G, strict=True)])
    )


def balanced(pi: Tensor) -> tuple[Tensor, Tensor]:
    """pi with 1 where there is nothing to balance, and where there is something."""
    alive = torch.isfinite(pi) & (pi > 0)
    return torch.where(alive, pi, torch.ones_like(pi)), alive


_Factored = tuple[Spd, Tensor | None, Tensor]
"""A damped factor, its L if it is here, and whether both are right."""


def factor_spd(
    bases: Sequence[Tensor], shifts: Sequence[Tensor], names: Sequence[tuple[str, str]], *, keep_lower: bool = True
) -> tuple[list[Spd], list[Tensor | None], list[Notice]]:
    """Inverses and Cholesky factors of many damped factors, with one wait for the device in all.

    Args:
        bases: Symmetric positive semi-definite X.
        shifts: What to add to each diagonal, scalars.
        names: (layer, factor) of each, for notices.
        keep_lower: Whether the caller wants L; otherwise its memory becomes the inverse's, and none is returned.

    Returns:
        The damped factors, L of each (L L^T = X + shift I) if wanted, None where another process has it, and a notice
        for each that needed double precision or jitter.

    Raises:
        NumericalError: Some factor is not finite or could not be factorised with any jitter; names the layer.
    """
    here: dict[int, Tensor] = {}

    def one(i: int) -> _Factored:
        result, L, info = _cholesky(bases[i], shifts[i].to(bases[i].dtype), keep_lower)
        here[i] = L
        return result, L, (info == 0) & torch.isfinite(result.inverse.diagonal().sum())

    def several(batch: list[int]) -> list[_Factored]:
        found = _cholesky_batch([bases[i] for i in batch], [shifts[i] for i in batch])
        here.update((i, L) for i, (_, L, _) in zip(batch, found, strict=True))
        return list(found)

    def arrived(i: int, inverse: Tensor, fine: Tensor) -> _Factored:
        return Spd(bases[i], shifts[i].to(bases[i].dtype), inverse), here.get(i), fine

    done = in_batches(one, several, bases, 1, (lambda found: (found[0].inverse, found[2]), arrived))
    results, lower = [result for result, _, _ in done], [L for _, L, _ in done] if keep_lower else []
    good = torch.stack([check for _, _, check in done]).tolist()
    notices: list[Notice] = []
    for i, fine in enumerate(good):
        if not fine:
            results[i], L, notice = factor_again(bases[i], shifts[i], *names[i])
            notices.append(notice)
            if keep_lower:
                lower[i] = L
    return results, lower, notices


def together(bases: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices that are factorised as one batch, the others alone, in order of their first."""
    by_size: dict[int, list[int]] = {}
    for i, base in enumerate(bases):
        by_size.setdefault(base.shape[0], []).append(i)
    many = {d for d, same in by_size.items() if d <= _SMALL and len(same) >= _MANY}
    found = [by_size[d] if d in many else [i] for d, same in by_size.items() for i in (same[:1] if d in many else same)]
    return sorted(found)


def in_batches(
    one: Callable[[int], _T],
    several: Callable[[list[int]], list[_T]],
    bases: Sequence[Tensor],
    cost: float,
    way: tuple[Callable[[_T], tuple[Tensor, Tensor]], Callable[[int, Tensor, Tensor], _T]],
) -> list[_T]:
    """What comes of each matrix, those that belong `together` at once; shared out over the cores, and over processes.

    Args:
        one: Does it for the matrix of an index.
        several: Does it for many.
        bases: The matrices.
        cost: Operations of one over d^3.
        way: To another process: a symmetric matrix and flags of a result, and the result of an index made of them.
    """
    batches = together(bases)
    jobs: list[Callable[[], list[_T]]] = [
        partial(several, batch) if len(batch) > 1 else lambda i=batch[0]: [one(i)]  # type: ignore[misc]
        for batch in batches
    ]
    costs = [len(batch) * cost * bases[batch[0]].shape[0] ** 3 for batch in batches]

    def pack(results: list[_T]) -> tuple[list[Tensor], None]:
        parts = [way[0](result) for result in results]
        X, flags = torch.stack([x for x, _ in parts]), torch.stack([flag for _, flag in parts])
        return [folded(X), flags.to(X.dtype)], None

    def unpack(k: int, tensors: list[Tensor], _: None) -> list[_T]:
        matrices, flags = unfolded(tensors[0], bases[batches[k][0]].shape[0]), tensors[1].bool()
        parts = zip(batches[k], matrices.unbind(), flags.unbind(), strict=True)
        return [way[1](i, X, flag) for i, X, flag in parts]

    found = share(jobs, costs, bases[0].device, Wire(pack, unpack))
    by_index = {i: x for batch, xs in zip(batches, found, strict=True) for i, x in zip(batch, xs, strict=True)}
    return [by_index[i] for i in range(len(bases))]


def _cholesky_batch(bases: Sequence[Tensor], shifts: Sequence[Tensor]) -> list[tuple[Spd, Tensor, Tensor]]:
    """Small matrices of one size: each with its inverse, L, and whether both are right."""
    adds = torch.stack([shift.to(bases[0].dtype) for shift in shifts])
    damped = torch.stack(list(bases))
    damped.diagonal(dim1=1, dim2=2).add_(adds.unsqueeze(1))
    L, inverse, fine = cholesky_batch(damped)
    # Exactly symmetric, and in rows, as a checkpoint restores it.
    rows = (inverse if inverse.is_contiguous() else inverse.mT.contiguous()).unbind()
    parts = zip(bases, adds.unbind(), rows, L.unbind(), fine.unbind(), strict=True)
    return [(Spd(base, shift, inv), lower, good) for base, shift, inv, lower, good in parts]


def cholesky_batch(damped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L and inverse of each of many matrices (b, d, d), and which of them are right, (b,); nothing waits."""
    L, info = torch.linalg.cholesky_ex(damped)
    good = info == 0
    # A zero on one diagonal would be an exception for all.
    usable = torch.where(good[:, None, None], L, torch.eye(L.shape[1], dtype=L.dtype, device=L.device))
    inverse = torch.cholesky_inverse(usable)
    return L, inverse, good & torch.isfinite(inverse.diagonal(dim1=1, dim2=2).sum(1))


def _cholesky(base: Tensor, shift: Tensor, keep_lower: bool = True) -> tuple[Spd, Tensor, Tensor]:
    damped = shifted(base, shift)
    # In place, column by column as LAPACK wants it: touching fresh memory costs as much as a third of the arithmetic.
    L, info = damped.mT, torch.empty((), dtype=torch.int32, device=base.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    try:
        inverse = torch.cholesky_inverse(L) if keep_lower else torch.cholesky_inverse(L, out=L).mT
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but missing from the stubs
        inverse, info = torch.full_like(L, torch.nan), torch.ones_like(info)  # L has a zero on its diagonal
    return Spd(base, shift, inverse), L, info


def factor_again(base: Tensor, shift: Tensor, layer: str, factor: str) -> tuple[Spd, Tensor, Notice]:
    """In double precision, then with growing jitter relative to the mean diagonal."""
    if not bool(torch.isfinite(base).all()) or not bool(torch.isfinite(shift)):
        raise NumericalError(f"{layer}: factor {factor} {_OVERFLOWED}")
    double = base.double()
    scale = double.diagonal().mean().clamp_min(torch.finfo(base.dtype).tiny)
    for jitter in _JITTERS:
        total = shift.double() + jitter * scale
        result, L, info = _cholesky(double, total)
        inverse = result.inverse.to(base.dtype).contiguous()  # may overflow; in rows, as a checkpoint restores it
        if int(info) == 0 and bool(torch.isfinite(inverse).all()):
            how = "double precision" + (f" and jitter {jitter:g} of its mean diagonal" if jitter else "")
            notice = Notice(layer, f"factor {factor} could not be factorised in {_short(base)}; used {how}")
            return Spd(base, total.to(base.dtype), inverse), L.to(base.dtype), notice
    raise NumericalError(
        f"{layer}: factor {factor} could not be factorised even with jitter {_JITTERS[-1]:g} of its mean diagonal; "
        "raise the damping (damping.lambda0, or gamma_min)"
    )


def eigh_psd(M: Tensor, layer: str, factor: str, above: float = -math.inf) -> tuple[Tensor, Tensor, list[Notice]]:
    """Eigenvalues (ascending) and eigenvectors of a symmetric positive semi-definite matrix, checked.

    Args:
        M: (d, d), symmetric up to rounding; only its lower half is factorised.
        layer: Name of the layer, for notices.
        factor: Name of the matrix, for notices.
        above: Leave out eigenvalues that are not larger; how many are is learned in the one wait of the check.

    Raises:
        NumericalError: M is not finite, or the eigenproblem failed in double precision too; names the layer.
    """
    values, vectors, larger = try_eigh(M, M.dtype, above)
    count, notices = int(larger), list[Notice]()
    if count < 0:
        values, vectors, notice = eigh_again(M, layer, factor)
        notices = [notice]
        count = int((values > above).sum())
    first = M.shape[0] - count
    return values[first:], vectors[:, first:], notices


def try_eigh(M: Tensor, dtype: torch.dtype, above: float = -math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors computed in a dtype, checked without a wait.

    Returns:
        Values (ascending), vectors, and how many of the values are larger than `above`; -1 if the result is wrong.
    """
    dtype = _solver(M.device, dtype, M.shape[0])
    try:
        values, vectors = torch.linalg.eigh(M.to(dtype))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but missing from the stubs
        return M.diagonal(), M, torch.full((), -1, device=M.device)
    trace = M.diagonal().sum(dtype=torch.float64)
    probe = torch.arange(1.0, M.shape[0] + 1.0, dtype=M.dtype, device=M.device).cos_()
    image = M @ probe
    # A failed run may return NaN, or numbers that are finite and wrong: the trace must be kept, and
    # V diag(values) V^T must act on a vector as M does. A comparison with NaN is false.
    slack = 100 * torch.finfo(M.dtype).eps * M.shape[0] ** 0.5 * values.abs().amax()
    again = vectors @ (values * (vectors.T @ probe.to(dtype)))
    kept = (values.sum(dtype=torch.float64) - trace).abs() <= slack
    fine = kept & ((again - image).norm() <= slack * probe.norm()) & torch.isfinite(vectors).all()
    return values.to(M.dtype), vectors.to(M.dtype), torch.where(fine, (values > above).sum(), -1)


def _solver(device: torch.device, dtype: torch.dtype, size: int) -> torch.dtype:
    """Which precision an eigenproblem is solved in; no more than is asked for, but where that would be wrong and slow.

    For float32 and 32 to 512 rows torch has CUDA turn pairs of rows (Jacobi): of a factor of 500 the eigenvectors were
    orthogonal to 6e-3 and the residual 600 roundings, in twice the time of double precision (torch 2.11, H100).
    """
    jacobi = device.type == "cuda" and dtype == torch.float32 and size <= _JACOBI
    return torch.float64 if jacobi else dtype


def eigh_batch(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`try_eigh` of many matrices (b, d, d): values (b, d), vectors (b, d, d), and which are right, (b,)."""
    dtype = _solver(M.device, M.dtype, M.shape[1])
    try:
        values, vectors = (found.to(M.dtype) for found in torch.linalg.eigh(M.to(dtype)))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # one failed: each is tried again alone
        return M.diagonal(dim1=1, dim2=2), M, torch.zeros(len(M), dtype=torch.bool, device=M.device)
    trace = M.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    probe = torch.arange(1.0, M.shape[1] + 1.0, dtype=M.dtype, device=M.device).cos_()
    slack = 100 * torch.finfo(M.dtype).eps * M.shape[1] ** 0.5 * values.abs().amax(1)
    again = (vectors @ (values * (vectors.mT @ probe)).unsqueeze(2)).squeeze(2)
    kept = (values.sum(1, dtype=torch.float64) - trace).abs() <= slack
    fine = kept & ((again - M @ probe).norm(dim=1) <= slack * probe.norm())
    return values, vectors, fine & torch.isfinite(vectors).all(2).all(1)


def eigh_again(M: Tensor, layer: str, factor: str) -> tuple[Tensor, Tensor, Notice]:
    """In double precision, what `try_eigh` could not do in M's own.

    Raises:
        NumericalError: It fails there too; names the layer.
    """
    if not bool(torch.isfinite(M).all()):
        raise NumericalError(f"{layer}: the eigenproblem of {factor} {_OVERFLOWED}")
    if M.dtype != torch.float64:
        values, vectors, count = try_eigh(M, torch.float64)
        if int(count) >= 0:
            notice = Notice(layer, f"eigenproblem of {factor} failed in {_short(M)}; used double precision")
            return values, vectors, notice
    raise NumericalError(
        f"{layer}: the eigenproblem of {factor} failed in double precision; "
        "raise the damping, or use approx = 'blockdiag' with approx.power = 1, which needs no eigenvectors"
    )


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
