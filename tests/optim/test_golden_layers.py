"""Twenty nets of ``golden_layers.npz`` through the optimizer's own rooms: what the file says to 1e-9."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from golden_nets import NETS, golden, golden_model
from rooms import Rooms, products
from torch import Tensor

from kfacore.registry import get_registry

TOLERANCE = 1e-9
APPROX = {"kind": "blockdiag", "power": 1.0}


@cache
def rooms_of(name: str) -> Rooms:
    case = golden()[name]
    pooled = [key.split("/")[1] for key, kind in case.items() if key.endswith("/kind") and kind == "kron reduce"]
    per = "example" if float(case["S"]) == len(case["x0"]) else "position"
    likelihood = {"kind": case["likelihood"], "per": per}
    return Rooms(golden_model(name), case["x0"], case["y"], likelihood, case.get("mask"), reduce=pooled)


def of(name: str, what: str) -> dict[str, Tensor]:
    return {key.removeprefix(what): value for key, value in golden()[name].items() if key.startswith(what)}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.norm()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
        norm = float(tensor.norm())
        error = float((found[name] - tensor).norm())
        # A bias before a norm of the batch has no gradient but rounding.
        assert error < TOLERANCE * (norm if norm > 1e-9 * scale else scale), name


@pytest.mark.parametrize("name", NETS)
def test_gradient_and_products(name: str) -> None:
    rooms, case = rooms_of(name), golden()[name]
    assert float(rooms.bound.total()) == float(case["S"])
    assert relative(rooms.z, case["z"]) < TOLERANCE
    check(rooms.by_name(rooms.gradient()), of(name, "grad/"))
    Jv = rooms.batch.jvp([rooms.direction(of(name, "direction/")).blocks])[0]
    assert relative(Jv, case["Jv"]) < TOLERANCE


@pytest.mark.parametrize("drawn", [False, True], ids=["exact", "drawn"])
@pytest.mark.parametrize("name", NETS)
def test_factors_and_the_preconditioned_gradient(name: str, drawn: bool) -> None:
    rooms, case, end = rooms_of(name), golden()[name], "_drawn" if drawn else ""
    samples = rooms.drawn(case["y_drawn"]) if drawn else rooms.exact()
    found = rooms.factors(samples)
    assert set(found) == {key.split("/")[1] for key in case if key.endswith("/kind")}
    for block, values in found.items():
        kind, want = case[f"block/{block}/kind"], of(name, f"block/{block}/")
        if kind in ("full", "diagonal"):
            key = {"full": "F", "diagonal": "diag"}[kind]
            assert relative(values[0].squeeze(), want[f"{key}{end}"].squeeze()) < TOLERANCE
            continue
        pairs = [(values[:2], (want["A"], want[f"G{end}"]))]
        if kind == "tied":
            pairs.append((values[2:], (want["A_emb"], want[f"G_emb{end}"])))
        for mine, others in pairs:
            for product, truth in zip(products(mine), products(others), strict=True):
                assert relative(product, truth) < TOLERANCE, block
    solved = rooms.preconditioned(samples, rooms.gradient(), float(case["gamma"]), APPROX)
    check(rooms.by_name(solved), of(name, f"pre{end or '_exact'}/"))


@pytest.mark.parametrize("name", NETS)
def test_the_exact_block_of_the_fisher(name: str) -> None:
    """(1/S) sum of J^T F_R J, column by column with J v of the block's unit vectors."""
    rooms = rooms_of(name)
    for index, info in enumerate(rooms.infos):
        blocks = of(name, f"block/{info.name}/fisher")
        if not blocks:
            continue
        units = torch.eye(info.size, dtype=torch.float64).view(info.size, *info.shape)
        zeros = [torch.zeros(other.shape, dtype=torch.float64) for other in rooms.infos]
        J = rooms.batch.jvp([[*zeros[:index], unit, *zeros[index + 1 :]] for unit in units])
        F = rooms.bound.fisher_gram(rooms.z, J)
        size = info.size // info.groups
        for group in range(info.groups):
            own = slice(group * size, (group + 1) * size)
            i, j = torch.tril_indices(size, size)
            assert relative(F[own, own][i, j], blocks[str(group)]) < TOLERANCE


@pytest.mark.parametrize("name", NETS)
def test_the_exact_estimator_gives_the_same_factors(name: str) -> None:
    """As a step asks for them; drawn signs make what mixes cases right in the mean only."""
    rooms = rooms_of(name)
    if rooms.linearizer.mixes or any(info.kind == "diagonal" for info in rooms.infos):
        return
    generator = torch.Generator().manual_seed(0)
    vectors = rooms.bound.statistics(rooms.z, get_registry().build("estimator", "exact"), generator)
    vectors = vectors * rooms.batch.signs(rooms.z, generator)
    found, wanted = rooms.factors(rooms.samples(vectors)), rooms.factors(rooms.exact())
    for block, values in found.items():
        for value, other in zip(values, wanted[block], strict=True):
            assert relative(value, other) < TOLERANCE, block
