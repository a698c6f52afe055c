from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from kfacore.lab.training.signals import Interrupted, StopSignals, Terminated, resume_command


@pytest.mark.parametrize(("number", "kind", "code"), [("SIGINT", Interrupted, 130), ("SIGTERM", Terminated, 143)])
def test_the_first_signal_only_asks(number, kind, code):
    before = signal.getsignal(signal.Signals[number])
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(signal.Signals[number])
        assert stop.received == signal.Signals[number]
    assert signal.getsignal(signal.Signals[number]) is before
    error = stop.exception(Path("runs/a b"), 7)
    assert type(error) is kind
    assert error.exit_code == code
    assert "after step 7" in str(error)
    assert str(error).splitlines()[1:] == ["kfac train --resume 'runs/a b'"]


def test_the_second_ctrl_c_stops_at_once():
    with StopSignals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_second_sigterm_stops_at_once():
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143


def test_other_threads_leave_the_handlers_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_resume_command_is_quoted():
    assert resume_command(Path("runs/x")) == "kfac train --resume runs/x"
