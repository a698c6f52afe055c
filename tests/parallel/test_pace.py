"""Work beside training: counted, held back until the steps have granted it, released when somebody waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from patience import PATIENCE, until

from kfacore.parallel.pace import Pace, current_pace


def worked(operations: float) -> None:
    """What a thread does after each piece of work."""
    pace = current_pace()
    if pace is not None:
        pace.work(operations)


def test_work_is_counted_only_while_a_pace_is_set() -> None:
    worked(1.0)
    with Pace() as pace:
        worked(2.0)
        worked(3.0)
    worked(4.0)
    assert pace.done == 5.0


def test_each_thread_has_its_own() -> None:
    with Pace() as pace, ThreadPoolExecutor(1) as other:
        other.submit(worked, 7.0).result()
        worked(1.0)
    assert pace.done == 1.0


def _spread(steps: int, pieces: int) -> tuple[Pace, list[int], list[threading.Event], threading.Thread]:
    """A thread that works in equal pieces; an event says that a piece is done, before it may rest."""
    pace, seen = Pace(steps, float(pieces)), list[int]()
    events = [threading.Event() for _ in range(pieces)]

    def run() -> None:
        with pace:
            for i, event in enumerate(events):
                seen.append(i)
                event.set()
                worked(1.0)

    thread = threading.Thread(target=run)
    thread.start()
    return pace, seen, events, thread


def test_each_step_grants_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 pieces over 4 steps: a piece begins only when all before it are granted, and 3 are with every step."""
    monkeypatch.setattr("kfacore.parallel.pace._PATIENCE", PATIENCE)
    pace, seen, events, thread = _spread(4, 12)
    for step in range(4):
        assert events[3 * step].wait(PATIENCE)  # the first of the next share is done before it is granted
        assert len(seen) <= 3 * step + 1
        pace.grant()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert seen == list(range(12))


def test_release_holds_nothing_back() -> None:
    pace, seen, events, thread = _spread(4, 12)
    assert events[0].wait(PATIENCE)
    pace.release()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(seen) == 12


def test_all_threads_that_share_a_pace_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfacore.parallel.pace._LOOK", 10 * PATIENCE)  # so that none looks by itself
    pace, counted = Pace(4, 2.0), threading.Barrier(3, timeout=PATIENCE)

    def run() -> None:
        with pace:
            counted.wait()
            worked(1.0)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    counted.wait()
    until(lambda: pace.done >= 2.0)
    pace.release()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)


def test_a_thread_that_nobody_asks_goes_on_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer may be thrown away between two steps; its thread must not rest for ever."""
    monkeypatch.setattr("kfacore.parallel.pace._PATIENCE", 0.0)
    _, seen, _, thread = _spread(4, 3)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(seen) == 3


def test_nothing_is_held_back_without_a_total() -> None:
    with Pace(5, None) as pace:
        worked(1e9)
    assert pace.done == 1e9
    with Pace(5, 0.0) as pace:
        worked(1.0)
    assert pace.done == 1.0
