"""Several processes: the same bits on all of them, and what one process with the whole mini-batch computes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from world_runs import STEPS, contract, dies, failures, guests, hangs, kfac, networks, resumed, several
from worlds import world

from kfacore.errors import ConfigError
from kfacore.optim.guest_state import own_state
from kfacore.parallel.ranks import ALONE, checksum, find_ranks

FACTORS = sum(d * (d + 1) // 2 for d in (7, 8, 9, 7, 8, 4))
PARAMETERS = 7 * 8 + 9 * 7 + 8 * 4

ESTIMATORS = ({"kind": "monte-carlo", "tau1": 0.5}, {"kind": "exact", "tau1": 0.25}, {"kind": "empirical", "tau1": 1.0})
TAU2 = (1.0, 0.5, 0.25)
EXACT: list[dict[str, Any]] = [
    {"approx": approx, "estimator": estimator, "momentum": {"kind": "quadratic-model", "tau2": tau2}}
    for approx, (estimator, tau2) in product(("blockdiag", "tridiag"), zip(ESTIMATORS, TAU2, strict=True))
]
MORE: list[dict[str, Any]] = [
    {"masked": True},
    {"unit": 1000.0},
    {"wrap": True, "approx": {"kind": "tridiag", "power": 0.5}},
    {"approx": {"kind": "blockdiag", "refresh": "background", "refresh_every": 4, "refresh_delay": 2}},
    {"momentum": {"kind": "quadratic-model", "tau2": 0.5, "slope": "model", "iterations": 3}},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def farthest(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


Result = dict[str, Any]


def alike(sizes: tuple[int, ...], variants: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Result, Result]]:
    """Each variant with what several processes computed, the same bits on all, and what one process alone does."""
    found = world(len(sizes), several, sizes, variants)
    alone = several(None, sizes, variants)
    for i, options in enumerate(variants):
        here = [result[i] for result in found.results]
        for other in here[1:]:
            assert farthest(here[0]["parameters"], other["parameters"]) == 0.0, options
            assert here[0]["reports"] == other["reports"], options
    return list(zip(variants, found.results[0], alone, strict=True))


@pytest.mark.parametrize(
    ("sizes", "variants"),
    [
        ((150, 90), [*EXACT[1::3], *MORE, {**EXACT[0], "dtype": torch.float32}]),
        ((40, 100, 100), [EXACT[0], EXACT[5]]),
        pytest.param((150, 90), [EXACT[2], EXACT[3], {**EXACT[3], "dtype": torch.float32}], marks=pytest.mark.slow),
        pytest.param((40, 100, 100), [EXACT[4], *MORE], marks=pytest.mark.slow),
    ],
    ids=["2", "3", "more on 2", "more on 3"],
)
def test_processes_agree_to_the_bit_and_with_one_process_to_rounding(
    sizes: tuple[int, ...], variants: list[dict[str, Any]]
) -> None:
    for options, here, alone in alike(sizes, variants):
        slack = 1e-5 if "dtype" in options else 1e-12
        assert farthest(here["parameters"], alone["parameters"]) < slack, options
        for mine, one in zip(here["reports"], alone["reports"], strict=True):
            assert mine == pytest.approx(one, rel=1e-4 if "dtype" in options else 1e-9), options


def test_lists_of_micro_batches_are_one_batch() -> None:
    variants: list[dict[str, Any]] = [
        {"lists": True, "approx": "tridiag"},
        {"lists": True, "masked": True, "approx": {"kind": "blockdiag", "memory": "owner"}},
    ]
    first, second = world(2, several, (60, 40), variants).results
    whole = several(None, (60, 40), [{**options, "lists": False} for options in variants])
    for i, options in enumerate(variants):
        assert farthest(first[i]["parameters"], second[i]["parameters"]) == 0.0, options
        assert farthest(first[i]["parameters"], whole[i]["parameters"]) < 1e-12, options


def test_any_network() -> None:
    sizes = (50, 30)
    exact = {"kind": "exact", "tau1": 1.0}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("sequences", {"approx": "blockdiag"}),
        ("sequences", {"approx": "tridiag", "estimator": exact}),
        ("images", {"approx": "blockdiag"}),
    ]
    first, second = world(2, networks, sizes, cases).results
    alone = networks(None, sizes, cases[:2])
    for i in range(len(cases)):
        assert farthest(first[i], second[i]) == 0.0, cases[i]
    for i, one in enumerate(alone):
        assert farthest(first[i], one) < 1e-11, cases[i]


def test_a_saved_state_goes_on_with_as_many_processes_to_the_bit_and_with_others_to_rounding() -> None:
    options, sizes = EXACT[3], (150, 90)
    whole = world(2, kfac, sizes, options)
    half = world(2, kfac, sizes, options, STEPS // 2)
    again = world(2, resumed, sizes, [half.results[0]["state"]], options)
    straight = whole.results[0]["parameters"]
    assert farthest(again.results[0][0]["parameters"], again.results[1][0]["parameters"]) == 0.0
    assert farthest(again.results[0][0]["parameters"], straight) < 1e-12
    three = world(3, resumed, (40, 100, 100), [half.results[0]["state"]], options)
    # The order of the whole mini-batch is that of the parts, so the same cases have other places: estimates differ.
    assert farthest(three.results[0][0]["parameters"], three.results[2][0]["parameters"]) == 0.0
    assert own_state(three.results[0][0]["state"][1])["steps"] == STEPS


def test_bytes_that_are_sent() -> None:
    found = world(2, several, (60, 60), [{"approx": "blockdiag", "damping": {"kind": "fixed"}}])
    sent, reports = found.results[0][0]["sent"], found.results[0][0]["reports"]
    refreshes = sum(report[3] for report in reports)
    assert sent["gradient"] == 8 * PARAMETERS * STEPS
    others = sum(sent[what] for what in sent if what not in ("statistics", "inverses", "gradient", "exchanges"))
    assert others < 8 * 40 * STEPS  # a few numbers a step
    saved = not reports[-1][3]  # a state adds them up once more, unless the last step has
    assert sent["statistics"] == 8 * FACTORS * (refreshes + saved)
    inverses = sum(result[0]["sent"]["inverses"] for result in found.results)
    assert inverses <= 8 * (FACTORS + 2 * 6) * refreshes  # and two flags a factor: whether it went well


def test_a_guest_adds_up_statistics_and_draws_what_one_process_would() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"approx": "tridiag", "rest": "diagonal"},
        {"estimator": "exact", "approx": {"kind": "blockdiag", "power": 1.0}, "scale": "kl"},
        {"approx": {"kind": "tridiag", "refresh": "background"}},
    ]
    found = world(2, guests, (60, 60), variants)
    alone = guests(None, (60, 60), variants)
    for i, options in enumerate(variants):
        first, second = (result[i]["parameters"] for result in found.results)
        assert farthest(first, second) == 0.0, options
        assert farthest(first, alone[i]["parameters"]) < 1e-11, options


def test_gradients_that_are_left_behind_rates_and_a_model_that_moves() -> None:
    sizes = (60, 40)
    first, second = world(2, contract, sizes).results
    alone = contract(None, sizes)
    assert len(alone["gradients"]) == 6 * 6
    for what in ("parameters", "gradients"):
        assert farthest(first[what], second[what]) == 0.0
        assert farthest(first[what], alone[what]) < 1e-5


def test_a_problem_on_one_process_is_told_on_all() -> None:
    first, second = world(2, failures).results
    assert second["nan"].startswith("DataError: inputs: 1 of 10 examples")
    assert first["nan"].startswith("DataError: rank 1: inputs: 1 of 10 examples")
    assert first["model"] == second["model"]
    assert "the parameter 0.weight" in first["model"]
    assert second["memory"].startswith("OutOfMemoryError")
    assert first["memory"].startswith("RankError: rank 1 failed in its forward pass: OutOfMemoryError: CUDA out of")
    for told in (first["place"], second["place"]):
        assert "rank 0 at 'state_dict', rank 1 at 'step 2'" in told
    assert "rank 0 at 'step 1, micro-batches', rank 1 at 'step 1'" in first["lists"]
    assert "rank 0 at 'step 1', rank 1 at 'step 1 with lr = 0.5'" in first["rate"]
    assert "rank 0 at 'step 1', rank 1 at 'step 1, weight decay 0.1'" in first["decay"]
    assert first["nothing"] == second["nothing"]
    assert "no position of the mini-batch counts" in first["nothing"]


def test_the_others_are_told_of_a_process_that_hangs() -> None:
    found = world(2, hangs)
    assert str(found.results[0]).startswith("RankError: rank 0 has no answer"), found.errors


def test_the_others_are_told_of_a_process_that_died() -> None:
    found = world(2, dies, fails=True)
    assert str(found.results[0]).startswith("RankError: rank 0 has no answer"), found.errors
    assert found.codes[1] == -9


def test_one_process_alone_sends_nothing() -> None:
    assert find_ranks() is ALONE
    assert find_ranks(False) is ALONE
    assert ALONE.whole("step 1", lambda: 5)[0].cases == 5
    assert ALONE.least("positions", 7) == 7
    assert not ALONE.sent
    with pytest.raises(ConfigError, match="not initialised"):
        find_ranks("a group")


def test_a_checksum_tells_bits_apart() -> None:
    x = torch.arange(11.0)
    y = x.clone()
    assert checksum([x]) == checksum([y])
    y[7] = torch.nextafter(y[7], torch.tensor(9.0))
    assert checksum([x]) != checksum([y])
