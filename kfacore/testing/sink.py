"""The conformance suite of metrics sinks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from kfacore.roles.sink import Sink
from kfacore.testing.base import ComponentSuite

__all__ = ["SinkSuite"]


class SinkSuite(ComponentSuite):
    """Tests of a sink. Set `name` and define `events`.

    Attributes:
        keys: What of each event must come back; a sink that keeps numbers only names fewer.
    """

    slot = "sink"
    keys: ClassVar[tuple[str, ...]] = ("event", "step", "loss")

    @abstractmethod
    def events(self, run: Path) -> list[dict[str, Any]]:
        """Read back from the run folder what the sink wrote, in order."""

    def opened(self, run: Path, step: int = 0) -> Sink:
        """A fresh sink, open in a run folder."""
        sink: Sink = self.build()
        sink.open(run, step=step)
        return sink

    def write(self, run: Path, steps: Iterable[int], *, loss: float = 1.0, resumed: int = 0) -> None:
        """One life of a run: step events with numbers, then closed."""
        sink = self.opened(run, resumed)
        for step in steps:
            sink.write(_event(step, loss))
        sink.close()

    def read(self, run: Path) -> list[dict[str, Any]]:
        """What came back, reduced to `keys`."""
        return [{key: event[key] for key in self.keys if key in event} for event in self.events(run)]

    def wanted(self, steps: Iterable[int], loss: float = 1.0) -> list[dict[str, Any]]:
        """What should come back."""
        return [{key: value for key, value in _event(step, loss).items() if key in self.keys} for step in steps]

    def test_events_come_back_in_order(self, tmp_path: Path) -> None:
        """All of them, once each."""
        self.write(tmp_path, range(1, 6))
        found = self.read(tmp_path)
        assert found == self.wanted(range(1, 6)), f"five events went in, {found} came back"

    def test_flush_makes_them_readable(self, tmp_path: Path) -> None:
        """A checkpoint must not be ahead of the events: they are there before the sink is closed."""
        sink = self.opened(tmp_path)
        for step in (1, 2, 3):
            sink.write(_event(step))
        sink.flush()
        found = self.read(tmp_path)
        sink.close()
        assert found == self.wanted((1, 2, 3)), f"after flush only {len(found)} of 3 events can be read"

    def test_resuming_forgets_what_came_after_the_checkpoint(self, tmp_path: Path) -> None:
        """Events after `step` of an earlier life are gone, those up to it are kept, none is there twice."""
        self.write(tmp_path, range(1, 6), loss=1.0)
        self.write(tmp_path, (4, 5, 6), loss=2.0, resumed=3)
        found = self.read(tmp_path)
        wanted = self.wanted((1, 2, 3)) + self.wanted((4, 5, 6), 2.0)
        assert found == wanted, (
            f"five steps were written, then the run went on from step 3 and wrote steps 4 to 6; found {found}: open "
            "must forget the events after its `step` and keep the others"
        )

    def test_resuming_from_the_start_forgets_everything(self, tmp_path: Path) -> None:
        """`step=0` is a new run."""
        self.write(tmp_path, (1, 2), loss=1.0)
        self.write(tmp_path, (1,), loss=2.0)
        assert self.read(tmp_path) == self.wanted((1,), 2.0), "open(step=0) keeps events of an earlier life"

    def test_resuming_without_new_events_keeps_the_old_ones(self, tmp_path: Path) -> None:
        """A run that had nothing left to do."""
        self.write(tmp_path, (1, 2))
        self.write(tmp_path, (), resumed=2)
        assert self.read(tmp_path) == self.wanted((1, 2)), "opening and closing again loses events"

    def test_any_event_is_taken(self, tmp_path: Path) -> None:
        """NaN, infinities, missing values, lists and texts in any language: nothing stops a run."""
        odd: dict[str, Any] = {"rho": math.nan, "gamma": math.inf, "lam": -math.inf, "mu": None}
        sink = self.opened(tmp_path)
        sink.write({"event": "start", "step": 0, "problem": "näh 曲線\n", "resumed": False})
        sink.write({**_event(1), **odd})
        sink.write({"event": "done", "step": 1, "plots": ["a.png"], "notices": {"layer: jitter": 2}})
        sink.flush()
        sink.close()
        steps = [event for event in self.events(tmp_path) if event.get("loss") is not None]
        assert len(steps) == 1, f"one event with a loss went in among odd ones, {len(steps)} came back"

    def test_events_are_left_alone(self, tmp_path: Path) -> None:
        """Other sinks and listeners get the same object."""
        event = {**_event(1), "rho": math.inf, "plots": ["a.png"]}
        before = {**event, "plots": ["a.png"]}
        sink = self.opened(tmp_path)
        sink.write(event)
        sink.close()
        assert event == before, f"write changed the event from {before} to {event}"

    def test_closing_is_always_possible(self, tmp_path: Path) -> None:
        """Twice, and without having been opened: the loop closes after errors too."""
        sink: Sink = self.build()
        sink.close()
        sink = self.opened(tmp_path)
        sink.write(_event(1))
        sink.close()
        sink.close()
        assert self.read(tmp_path) == self.wanted((1,)), "closing twice loses events"

    def test_two_runs_do_not_mix(self, tmp_path: Path) -> None:
        """Several runs of one process, at the same time."""
        folders = [tmp_path / name for name in ("one", "other")]
        for folder in folders:
            folder.mkdir()
        sinks = [self.opened(folder) for folder in folders]
        for step in (1, 2):
            for sink, loss in zip(sinks, (1.0, 2.0), strict=True):
                sink.write(_event(step, loss))
        for sink in sinks:
            sink.close()
        for folder, loss in zip(folders, (1.0, 2.0), strict=True):
            assert self.read(folder) == self.wanted((1, 2), loss), f"the events of {folder.name} are not its own"


def _event(step: int, loss: float = 1.0) -> Mapping[str, Any]:
    return {"event": "step", "step": step, "batch_size": 10, "loss": loss + step / 8, "seconds": step / 4}
