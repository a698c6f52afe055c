"""Curvature that lives at its owners: the numbers of curvature that lives everywhere, in a part of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ranks import alike, farthest
from world_runs import STEPS, divided, guests, kept, kfac, net, networks
from worlds import world

from kfacore import KFAC
from kfacore.curvature.joined import Joined
from kfacore.curvature.owned import shares
from kfacore.curvature.places import averages, by_name, from_names
from kfacore.errors import ConfigError
from kfacore.registry import get_registry
from kfacore.roles.block import Block


def owner(kind: str = "blockdiag", **options: Any) -> dict[str, Any]:
    return {"kind": kind, "memory": "owner", **options}


VARIANTS: list[dict[str, Any]] = [
    {"approx": owner()},
    {"approx": owner("tridiag"), "damping": {"pi": "net"}},
    {"approx": owner(refresh="background", refresh_every=4, refresh_delay=2)},
]
MORE: list[dict[str, Any]] = [
    {"approx": owner("diagonal"), "masked": True},
    {"approx": owner(power=0.5), "damping": {"pi": "net"}},
    {"approx": owner(), "momentum": {"kind": "quadratic-model", "tau2": 0.5, "slope": "model", "iterations": 3}},
]


def agree(sizes: tuple[int, ...], variants: list[dict[str, Any]]) -> None:
    for options, here, alone in alike(sizes, variants):
        assert farthest(here["parameters"], alone["parameters"]) < 1e-12, options


def test_owners_compute_what_one_process_does() -> None:
    agree((60, 40), VARIANTS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(60, 40), (20, 30, 10, 40)])  # four processes: one has no block
def test_owners_compute_what_one_process_does_in_every_variant(sizes: tuple[int, ...]) -> None:
    agree(sizes, [*VARIANTS, *MORE])


def test_owners_hold_a_part_of_what_one_process_holds() -> None:
    options = VARIANTS[0]
    first, second = world(2, kept, (60, 40), options).results
    alone, _ = kept(None, (60, 40), options)
    assert first[1] == second[1] == [[1], [0, 2]]
    assert first[0] + second[0] == alone
    assert max(first[0], second[0]) < 0.65 * alone


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_owners() -> None:
    options = VARIANTS[0]
    first, _ = world(2, divided, (60, 40), options, []).results
    alone = divided(None, (60, 40), options, [])
    half = kfac(None, (60, 40), options, STEPS // 2)["state"]
    mine = world(2, several_halves, (60, 40), options).results[0]
    for ranks, sizes in ((2, (60, 40)), (3, (60, 20, 20))):
        for each in world(ranks, divided, sizes, options, [half, mine]).results:
            for run in each:
                assert farthest(run["parameters"], alone[0]["parameters"]) < 1e-12
            assert ranks > 2 or farthest(each[1]["parameters"], first[0]["parameters"]) == 0.0
    everywhere = kfac(None, (60, 40), {"approx": "blockdiag"}, STEPS // 2, STEPS // 2, mine)
    assert farthest(everywhere["parameters"], alone[0]["parameters"]) < 1e-12


def several_halves(rank: int, sizes: tuple[int, ...], options: dict[str, Any]) -> Any:
    return kfac(rank, sizes, options, STEPS // 2)["state"]


@pytest.mark.slow
def test_any_network() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [("sequences", {"approx": owner("tridiag")})]
    first, second = world(2, networks, (50, 30), cases).results
    alone = networks(None, (50, 30), cases)
    assert farthest(first[0], second[0]) == 0.0
    assert farthest(first[0], alone[0]) < 1e-11


def test_a_guest() -> None:
    variants: list[dict[str, Any]] = [{"approx": owner(power=0.5)}, {"approx": owner(), "scale": "kl"}]
    found = world(2, guests, (60, 60), variants)
    alone = guests(None, (60, 60), variants)
    everywhere = world(2, guests, (60, 60), [{}]).results[0]
    for i, one in enumerate(alone):
        here, there = (result[i]["parameters"] for result in found.results)
        assert farthest(here, there) == 0.0
        assert farthest(here, one["parameters"]) < 1e-11
        if i == 0:
            assert farthest(here, everywhere[0]["parameters"]) < 1e-14


def block(name: str, d_in: int, d_out: int) -> Block:
    return Block(name, d_in, d_out, bias=True)


def test_coupled_blocks_have_one_owner_and_averages_keep_their_names() -> None:
    registry = get_registry()
    sides = [(9, 4), (5, 4), (3, 8), (9, 8), (6, 6)]
    layers = [block(f"b{i}", *each) for i, each in enumerate(sides)]
    chain = Joined(registry.build("approx", owner("tridiag")), layers, [(0, 1), (2, 3)])
    assert shares(chain, 2) == [[2, 3], [0, 1, 4]]
    assert shares(chain, 4)[3] == []
    assert shares(Joined(registry.build("approx", owner()), layers, [(0, 1), (2, 3)]), 2) == [[1, 3], [0, 2, 4]]
    moments = chain.start(torch.empty(0, dtype=torch.float64))
    state = moments.state_dict()
    named = by_name(chain, range(5), state)
    assert len(named) == len(list(averages(chain))) == 2 * 5 + 2 * 2
    assert "InputCross 2 3 0" in named
    again = from_names(chain, range(5), named, 3)
    assert again["values"] == state["values"]
    assert again["updates"] == 3


def test_approximations_of_all_blocks_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="approx = 'exact' needs the statistics of all blocks in one place"):
        KFAC(net(), likelihood="categorical", approx=owner("exact"))
