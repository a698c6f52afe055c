"""A refresh in the background: taken up at a fixed step, the same bits whatever the timing, resumable at any moment."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from patience import PATIENCE
from torch import Tensor, nn

from kfacore import KFAC, ConfigError, NumericalError
from kfacore.lab.models import autoencoder, sparse_init
from kfacore.parallel.background import BackgroundRefresh, Made
from kfacore.roles.approx import Factorisation
from kfacore.roles.inverse import Inverse, Notice

STEPS = 34
CPU = torch.device("cpu")


def batches() -> Tensor:
    return (torch.rand(STEPS, 64, 12, generator=torch.Generator().manual_seed(1)) > 0.5).float()


def build(approx: str, **options: Any) -> tuple[nn.Module, KFAC]:
    net = autoencoder((12, 9, 4, 9, 12))
    sparse_init(net, torch.Generator().manual_seed(0), connections=5)
    table = {
        "kind": approx,
        "refresh": "background",
        "refresh_every": 10,
        "refresh_growth": None,
        "refresh_delay": 4,
        **options,
    }
    damping = {"kind": "levenberg-marquardt", "lambda0": 1.0, "gamma_rule": "compared", "gamma_every": 10}
    return net, KFAC(net, likelihood="bernoulli", approx=table, damping=damping)


def parameters(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_inverse_is_taken_up_delay_steps_later(approx: str) -> None:
    _, optimizer = build(approx)
    reports = [optimizer.step(x, x) for x in batches()]
    assert [report.step for report in reports if report.refreshed] == [1, 2, 3, 14, 24, 34]


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_inverse_comes_from_the_moments_of_the_step_that_began_it(approx: str) -> None:
    _, optimizer = build(approx)
    expected: Inverse | None = None
    for k, x in enumerate(batches()[:14], start=1):
        optimizer.step(x, x)
        assert optimizer.preconditioner is not None
        if k == 10:
            moments = optimizer.preconditioner.moments.frozen()
        if k == 14:
            expected = optimizer.approx.factorise(moments).damped(optimizer.damping.gamma, pi="net")
    assert expected is not None
    found = optimizer.preconditioner.in_use
    blocks = [torch.ones(layer.shape) for layer in found.layers]
    for got, want in zip(found.solve(blocks), expected.solve(blocks), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=[2, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch threads of which the worker has one, or two that factorise side by side however small the factors are."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr("kfacore.parallel.cores._WORTH_A_THREAD", 0.0)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
def test_results_do_not_depend_on_timing(approx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    run = BackgroundRefresh._work
    for pause in (0.0, 0.05):

        def slow(self: Any, job: Any, ready: Any, pause: float = pause) -> Made:
            time.sleep(pause)
            return run(self, job, ready)

        monkeypatch.setattr(BackgroundRefresh, "_work", slow)
        net, optimizer = build(approx)
        for x in batches():
            optimizer.step(x, x)
        ends.append(parameters(net))
    assert torch.equal(*ends)


@pytest.mark.parametrize("approx", ["blockdiag", "tridiag"])
@pytest.mark.parametrize("cut", [9, 10, 12, 14])  # before, at the start of, during and at the end of a refresh
def test_resumes_bit_for_bit(approx: str, cut: int) -> None:
    x = batches()
    whole, optimizer = build(approx)
    for batch in x:
        optimizer.step(batch, batch)

    first, optimizer = build(approx)
    for batch in x[:cut]:
        optimizer.step(batch, batch)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second, optimizer = build(approx)
    second.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for batch in x[cut:]:
        optimizer.step(batch, batch)
    assert torch.equal(parameters(whole), parameters(second))


def test_work_is_done_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    run = BackgroundRefresh._work

    def watch(self: Any, job: Any, ready: Any) -> Made:
        threads.append(threading.current_thread().name)
        return run(self, job, ready)

    monkeypatch.setattr(BackgroundRefresh, "_work", watch)
    _, optimizer = build("blockdiag")
    for x in batches()[:14]:
        optimizer.step(x, x)
    assert len(threads) == 1
    assert threads[0].startswith("kfac-refresh")


def test_failure_in_the_background_keeps_the_inverse_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = build("blockdiag")
    x = batches()
    for batch in x[:9]:
        optimizer.step(batch, batch)
    assert optimizer.preconditioner is not None
    kept = optimizer.preconditioner.in_use

    def fail(*_args: Any, **_options: Any) -> Factorisation:
        raise NumericalError("2: factor A could not be factorised")

    monkeypatch.setattr(optimizer.approx, "factorise", fail)
    reports = [optimizer.step(batch, batch) for batch in x[9:14]]
    assert [len(report.notices) for report in reports] == [0, 0, 0, 0, 1]
    assert "previous inverse was kept" in reports[-1].notices[0]
    assert not reports[-1].refreshed
    assert optimizer.preconditioner.in_use is kept


def test_what_ends_a_refresh_is_raised_once_and_does_not_keep_the_state_from_being_saved() -> None:
    def crash() -> Made:
        raise RuntimeError("out of memory")

    background = BackgroundRefresh(CPU)
    threads = torch.get_num_threads()
    for _ in range(2):
        background.start(crash, due=4, steps=3)
        assert background.state_dict() is None
        with pytest.raises(RuntimeError, match="out of memory"):
            background.collect(lambda state: state)
        assert background.due is None
    background.start(lambda: Made([]), due=9, steps=3)
    assert background.collect(lambda state: state).pairs == []
    seen: list[int] = []
    late = Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen == [threads], "threads that begin later have all of torch's threads again"


def test_a_sooner_refresh_takes_up_the_one_under_way() -> None:
    net = autoencoder((12, 9, 4, 9, 12))
    sparse_init(net, torch.Generator().manual_seed(0), connections=5)
    optimizer = KFAC(
        net,
        likelihood="bernoulli",
        approx={
            "kind": "blockdiag",
            "refresh": "background",
            "refresh_every": 10,
            "refresh_growth": None,
            "refresh_delay": 6,
        },
        damping={"kind": "levenberg-marquardt", "lambda0": 1.0, "gamma_rule": "compared", "gamma_every": 4},
    )
    reports = [optimizer.step(x, x) for x in batches()[:20]]
    # Wanted at 4, 8, 10, 12, 16, 20: each is taken up when the next is wanted, or 6 steps later.
    assert [report.step for report in reports if report.refreshed] == [1, 2, 3, 8, 10, 12, 16, 20]


def test_delay_must_be_shorter_than_the_period() -> None:
    with pytest.raises(ConfigError, match=r"refresh_delay 10 must be less than refresh_every 10"):
        build("blockdiag", refresh_delay=10)


def test_nothing_under_way() -> None:
    background = BackgroundRefresh(CPU)
    assert background.due is None
    assert background.state_dict() is None
    with pytest.raises(NumericalError, match="no refresh under way"):
        background.collect(lambda state: state)


def test_what_was_made_survives_its_state() -> None:
    made = Made([], [Notice("2", "factor A needed jitter")], "4: factor G failed")
    again = Made.from_state(made.state_dict(), lambda state: state)
    assert (list(again.pairs), list(again.notices), again.failure) == ([], list(made.notices), made.failure)


def test_a_process_may_end_while_a_refresh_rests() -> None:
    """The worker notices that no step will come, instead of keeping the process alive for ever."""
    script = """
        import torch
        from kfacore import KFAC
        from kfacore.lab.models import autoencoder, sparse_init
        net = autoencoder((12, 9, 4, 9, 12))
        sparse_init(net, torch.Generator().manual_seed(0), connections=5)
        approx = {"kind": "tridiag", "refresh": "background", "refresh_every": 10, "refresh_delay": 9}
        optimizer = KFAC(net, likelihood="bernoulli", approx=approx, preset="paper")
        x = torch.ones(8, 12)
        for _ in range(11):
            optimizer.step(x, x)
        print("left")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "left"), done.stderr
