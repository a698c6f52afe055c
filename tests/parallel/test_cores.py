"""Factors side by side: the results of a loop, whatever the number of threads, and the thread settings as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from patience import PATIENCE

from kfacore.curvature.linalg import factor_spd
from kfacore.curvature.tempering import temper
from kfacore.parallel.cores import owners, share
from kfacore.parallel.pace import Pace

CPU = torch.device("cpu")
LARGE = 1e9
"""A cost that is worth a thread."""


@pytest.fixture
def threads() -> Iterator[None]:
    """Four torch threads for the test, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def _seen(count: int, costs: list[float]) -> list[tuple[int, str, int]]:
    """What each of the jobs saw: itself, its thread, that thread's torch threads; the jobs wait for each other."""
    together = threading.Barrier(count, timeout=PATIENCE)

    def job(i: int) -> tuple[int, str, int]:
        together.wait()
        return i, threading.current_thread().name, torch.get_num_threads()

    return share([partial(job, i) for i in range(count)], costs, CPU)


@pytest.mark.usefixtures("threads")
def test_as_many_at_once_as_there_are_threads_each_on_one() -> None:
    seen = _seen(4, [LARGE] * 4)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert sorted(name for _, name, _ in seen) == ["MainThread", *["kfac-factor"] * 3]
    assert {count for _, _, count in seen} == {1}
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("threads")
def test_threads_are_shared_out_when_there_are_fewer_jobs() -> None:
    assert {count for _, _, count in _seen(2, [LARGE] * 2)} == {2}


@pytest.mark.usefixtures("threads")
def test_a_job_that_outweighs_the_others_gets_all_threads() -> None:
    def job(i: int) -> tuple[str, int]:
        return threading.current_thread().name, torch.get_num_threads()

    assert share([partial(job, i) for i in range(3)], [LARGE, 1.0, 1.0], CPU) == [("MainThread", 4)] * 3


@pytest.mark.usefixtures("threads")
def test_small_work_starts_no_threads() -> None:
    def job(i: int) -> str:
        return threading.current_thread().name

    assert share([partial(job, i) for i in range(3)], [1.0] * 3, CPU) == ["MainThread"] * 3


@pytest.mark.usefixtures("threads")
def test_one_thread_is_enough_for_a_gpu() -> None:
    def job(i: int) -> tuple[str, int]:
        return threading.current_thread().name, torch.get_num_threads()

    assert share([partial(job, i) for i in range(2)], [LARGE] * 2, torch.device("cuda")) == [("MainThread", 4)] * 2


def test_nothing_to_do() -> None:
    assert share([], [], CPU) == []


@pytest.mark.usefixtures("threads")
def test_the_earliest_failure_is_raised_when_all_have_ended() -> None:
    ended: list[int] = []

    def job(i: int) -> None:
        ended.append(i)
        if i in (1, 3):
            raise ValueError(f"job {i}")

    with pytest.raises(ValueError, match="job 1"):
        share([partial(job, i) for i in range(8)], [LARGE] * 8, CPU)
    assert sorted(ended) == list(range(8))
    assert torch.get_num_threads() == 4
    assert threading.active_count() == 1 or not any(t.name == "kfac-factor" for t in threading.enumerate())


@pytest.mark.usefixtures("threads")
def test_an_interrupt_begins_nothing_new() -> None:
    begun: list[int] = []

    def job(i: int) -> None:
        begun.append(i)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        release.wait(0.05)

    release = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        share([partial(job, i) for i in range(100_000)], [LARGE] * 100_000, CPU)
    assert len(begun) < 100_000
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("threads")
def test_jobs_run_without_gradients_and_count_towards_the_callers_pace() -> None:
    weight = torch.ones((), requires_grad=True)

    def job(i: int) -> bool:
        return (weight * 2).requires_grad

    with Pace() as pace:
        assert share([partial(job, i) for i in range(8)], [LARGE] * 8, CPU) == [False] * 8
    assert pace.done == 8 * LARGE
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("threads")
def test_factors_have_the_same_bits_on_any_number_of_threads_that_share_them_out() -> None:
    """Each factor is made on one thread then, so the number is no part of the result."""
    generator = torch.Generator().manual_seed(3)
    roots = [torch.randn(160, 160, generator=generator) for _ in range(8)]
    bases, shift = [root @ root.T for root in roots], torch.tensor(0.5)
    shifts, names = [shift] * 8, [(str(i), "A") for i in range(8)]

    def made() -> list[torch.Tensor]:
        return [f.inverse for f in temper(bases, shifts, names, 0.8)[0] + factor_spd(bases, shifts, names)[0]]

    wanted = made()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(made(), wanted, strict=True))


def test_owners_are_spread_largest_first() -> None:
    assert owners([1.0, 8.0, 4.0, 4.0, 2.0], 2) == [1, 0, 1, 1, 0]
    assert owners([3.0, 3.0, 3.0], 3) == [0, 1, 2]
    assert owners([3.0, 3.0], 5) == [0, 1]
    assert owners([1.0, 2.0], 1) == [0, 0]
    assert owners([], 4) == []


def test_no_owner_has_more_than_the_mean_and_one_job() -> None:
    generator = torch.Generator().manual_seed(0)
    for ranks in (2, 3, 7):
        costs = (torch.rand(40, generator=generator) ** 3).tolist()
        found = owners(costs, ranks)
        loads = [sum(c for c, rank in zip(costs, found, strict=True) if rank == r) for r in range(ranks)]
        assert max(loads) <= sum(costs) / ranks + max(costs)
        assert found == owners(costs, ranks)
