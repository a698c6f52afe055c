"""The benchmarks' own arithmetic: counted operations are those that a step dispatches, and every benchmark starts."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import graft, guest, launches, loops, pairs, tolerance
from benchmarks.__main__ import BENCHMARKS
from benchmarks.__main__ import main as command
from benchmarks.contenders import kfac
from benchmarks.interleave import Timing
from benchmarks.limit import kfac_operations, sgd_operations
from benchmarks.nets import build_chain
from benchmarks.report import Report
from benchmarks.residual import NETS as RESIDUAL
from benchmarks.residual import ResidualMLP
from kfacore import host
from kfacore.lab.diagnostics import ExactModel
from kfacore.registry import get_registry

ROOT = Path(__file__).parents[1]
WIDTHS = (12, 9, 4, 9, 12)
CASES = 64
NEVER = 10**12
CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Adds up the operations of dispatched matrix products, in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def images(cases: int = CASES) -> torch.Tensor:
    return (torch.rand(cases, WIDTHS[0], generator=torch.Generator().manual_seed(0)) > 0.5).float()


def test_operations_of_sgd_are_those_dispatched() -> None:
    model, x = build_chain(WIDTHS, CPU), images()
    with Products() as counter:
        nn.functional.binary_cross_entropy_with_logits(model(x), x).backward()
    # P counts biases as columns of the weights; they are added, not multiplied.
    weights = [a * b for a, b in pairwise(WIDTHS)]
    assert counter.operations == 6 * CASES * sum(weights) - 2 * CASES * weights[0]
    assert sgd_operations(WIDTHS, CASES) == pytest.approx(counter.operations, rel=0.2)


def test_operations_of_a_block_diagonal_step_are_those_dispatched() -> None:
    """An ordinary step, up to the biases' columns in products with plain weights."""
    optimizer, x = kfac(build_chain(WIDTHS, CPU), {"kind": "blockdiag"}), images()
    for _ in range(3):
        optimizer.step(x, x)
    with Products() as counter:
        optimizer.step(x, x)
    expected = kfac_operations(WIDTHS, CASES, "blockdiag", lambda_every=NEVER, refresh_every=NEVER)
    assert counter.operations == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", ["blockdiag", "tridiag"])
def test_operations_of_a_solve_are_those_dispatched(kind: str) -> None:
    """Without truncation, and with more cases in the statistics than a layer has units."""
    approx = {"kind": kind, **({"tolerance": 0.0} if kind == "tridiag" else {})}
    optimizer, x = kfac(build_chain(WIDTHS, CPU), approx), images(16 * max(WIDTHS))
    optimizer.step(x, x)
    assert optimizer.preconditioner is not None
    blocks = [torch.rand(layer.shape) for layer in optimizer.preconditioner.layers]
    with Products() as counter:
        optimizer.preconditioner.solve(blocks)
    expected = kfac_operations(WIDTHS, 0, kind, lambda_every=NEVER, refresh_every=NEVER)
    assert counter.operations == pytest.approx(expected, rel=1e-6)


def test_refreshes_and_adaptations_cost_their_share() -> None:
    def each(**periods: int) -> float:
        return kfac_operations(WIDTHS, CASES, "tridiag", **{"lambda_every": NEVER, "refresh_every": NEVER, **periods})

    assert each(lambda_every=5) - each() == pytest.approx((each(lambda_every=1) - each()) / 5, rel=1e-6)
    assert each(refresh_every=20) - each() == pytest.approx((each(refresh_every=1) - each()) / 20, rel=1e-6)
    assert each() > kfac_operations(WIDTHS, CASES, "blockdiag", lambda_every=NEVER, refresh_every=NEVER)


def test_timings_are_of_all_turns() -> None:
    timing = Timing()
    timing.seconds = [1.0, 1.0, 1.0, 5.0]
    assert (timing.mean, timing.median, timing.slowest) == (2.0, 1.0, 5.0)


def test_a_report_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("name", seed=3)
    report.table("title", [{"": "a", "x": 1234.5, "y": None}, {"": "long name", "x": 0.12345, "y": 12}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "title"
    assert lines[2].split() == ["a", "1234", "-"]
    assert lines[3].split() == ["long", "name", "0.123", "12"]
    assert len({len(line) for line in lines[1:4]}) == 1
    report.save(tmp_path / "r.json")
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["tables"][0]["rows"][1] == {"": "long name", "x": 0.12345, "y": 12}
    assert saved["settings"]["seed"] == 3


def test_every_benchmark_is_listed_and_has_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert command() == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(BENCHMARKS)
    for name, (run, _) in BENCHMARKS.items():
        with pytest.raises(SystemExit) as left:
            run(["--help"])
        assert left.value.code == 0
        assert f"benchmarks {name}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", "stepp"])
    assert command() == 2


def test_an_ordinary_step_is_within_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 operations a layer, 70 for the tridiagonal form, three numbers read; on a net as deep as the limits are for.

    Some ten of them keep the parameters and confirm the step before.
    """
    monkeypatch.setattr(host, "is_free", lambda value: False)
    monkeypatch.setitem(launches.NETS, "narrow", tuple(max(4, width // 10) for width in launches.NETS["mnist"]))
    report = Report("launches")
    launches.measure(report, "narrow", CPU)
    rows = {row[""]: row for row in report.tables[0]["rows"]}
    for name, limit in (("blockdiag", 50), ("tridiag", 70), ("tridiag, tolerance 0", 70)):
        assert rows[f"{name}, ordinary"]["a layer"] <= limit
        assert rows[f"{name}, ordinary"]["waits"] == 3, "the objective, whether it is finite, the model's promise"


def test_equal_blocks_share_the_operations_of_a_refresh() -> None:
    """Blocks of one shape are factorised as one batch."""
    report = Report("launches")
    times = launches.measure_transformers(report, (2, 8), CPU)
    assert times["blockdiag, refresh alone"] < 0.75 * times["model, forward and backward"]
    assert times["blockdiag, ordinary"] <= 1.05 * times["model, forward and backward"]


def test_a_peak_is_the_process_own() -> None:
    """A child must not begin with the peak of a parent that has run other benchmarks before."""
    large = bytearray(b"x") * 2**29
    code = "from benchmarks.memory import _peak; print(_peak())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    assert 2**24 < int(done.stdout) < len(large)


def test_kept_correlations_are_a_share() -> None:
    optimizer, x = kfac(build_chain(WIDTHS, CPU), {"kind": "tridiag", "tolerance": 0.1}), images()
    optimizer.step(x, x)
    assert optimizer.preconditioner is not None
    for side in "AG":
        assert 0.0 <= tolerance._kept(optimizer.preconditioner.in_use, side) < 1.0


def test_information_of_pairs_is_that_of_gaussian_variables() -> None:
    """Half the logarithm of det(D_i) det(D_j) / det of both, D the damped Kronecker products."""
    torch.manual_seed(0)
    x = torch.randn(30, 3, dtype=torch.float64)
    likelihood = get_registry().build("likelihood", "categorical")
    exact = ExactModel(ResidualMLP(3, width=2, stages=1, outputs=3), likelihood, x, torch.arange(30) % 3)
    samples, gamma = exact.exact_samples(), 0.05
    found = pairs.informations(exact.layers, samples, [(0, 1), (1, 2), (0, 2)], gamma)
    shared = list(zip(exact.layers[:3], samples[:3], strict=True))
    A = [s.inputs.T @ s.inputs / 30 for _, s in shared if s is not None]
    G = [torch.einsum("kni,knj->ij", s.gradients, s.gradients) / 30 for _, s in shared if s is not None]
    logs = [0.5 * ((a.trace() / len(a)) / (g.trace() / len(g))).log() for a, g in zip(A, G, strict=True)]
    pi = torch.stack(logs).mean().exp()
    for (i, j), value in zip([(0, 1), (1, 2), (0, 2)], found, strict=True):
        own = [
            torch.kron(
                A[k] + pi * gamma * torch.eye(len(A[k]), dtype=torch.float64),
                G[k] + gamma / pi * torch.eye(len(G[k]), dtype=torch.float64),
            )
            for k in (i, j)
        ]
        first, second = samples[i], samples[j]
        assert first is not None
        assert second is not None
        Ax = first.inputs.T @ second.inputs / 30
        Gx = torch.einsum("kni,knj->ij", first.gradients, second.gradients) / 30
        cross = torch.kron(Ax, Gx)
        both = torch.cat([torch.cat([own[0], cross], 1), torch.cat([cross.T, own[1]], 1)])
        wanted = 0.5 * (own[0].logdet() + own[1].logdet() - both.logdet())
        assert value == pytest.approx(float(wanted), rel=1e-9)


def test_forests_of_pairs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs.measure(RESIDUAL["residual mlp"](None), [1, 2], 60, seed=0)
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4
    by_name = {row["forest"]: row for row in rows[4:]}
    assert by_name["most, any pair"]["information"] >= by_name["most information"]["information"]
    assert by_name["most information"]["information"] >= by_name["execution order"]["information"]
    assert by_name["execution order"]["information"] >= by_name["least information"]["information"] > 0
    assert all(0.5 < row["at best"] < 3 for row in rows)
    for build in RESIDUAL.values():
        task = build(None)
        x, y = task.data(torch.Generator().manual_seed(0))
        assert task.build()(x[:2]).shape[0] == 2
        assert len(x) == len(y)


def test_a_guests_ordinary_step_waits_for_nothing() -> None:
    """Beyond the base's own: fewer than six operations a block, half of them products, and no wait."""
    report = Report("guest")
    for scale in ("graft", "kl", "none"):
        found = guest.count(report, loops.gpt(None, batch=2, context=16, width=16), options={"scale": scale})
        blocks = 1 + 1 + 3 * 6 + 1
        assert found["ordinary"][1] == found["base"][1]
        assert found["ordinary"][0] - found["base"][0] < 6 * blocks
        assert found["statistics and refresh"][0] > found["ordinary"][0]


def test_a_guest_is_timed_against_its_base() -> None:
    report = Report("guest")
    guest.measure(report, loops.cnn(None, batch=4, width=2), every=2, periods=1, options={})
    names = [row[""] for row in report.tables[0]["rows"]]
    assert names == ["base", "ordinary", "every 2"]
    assert report.tables[0]["rows"][0]["mean / base"] == 1


def test_the_first_evaluation_that_is_low_enough_counts() -> None:
    curve = graft.Curve([5, 10, 15], [1.0, 2.0, 3.0], [0.9, 0.4, 0.5])
    assert curve.reached(0.5) == (10, 2.0)
    assert curve.reached(0.3) is None


def test_guest_and_base_train_on_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--steps", "4", "--batch", "2", "--seeds", "1"]
    file = str(tmp_path / "graft.json")
    assert graft.main([*common, "--net", "gpt", "--option", "every=2", "--json", file]) == 0
    row = json.loads((tmp_path / "graft.json").read_text())["tables"][0]["rows"][0]
    assert len(row["base's curve"]) == len(row["guest's curve"]) == 4
    assert row["base's curve"] != row["guest's curve"]
    assert "graft: gpt, means" in capsys.readouterr().out
    loop = loops.cnn(None, batch=4, width=2).with_steps(3)
    rates = [graft.train(loop, 0, rate, None).losses[-1] for rate in loop.rates]
    assert graft.tune(Report("graft"), loop) == loop.rates[rates.index(min(rates))]


def test_loops_take_files(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "images.npz",
        **{f"x_{part}": np.arange(8 * 3 * 16, dtype=np.uint8).reshape(8, 3, 4, 4) for part in ("train", "test")},
        **{f"y_{part}": np.arange(8) % 3 for part in ("train", "test")},
    )
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    for loop in (
        loops.cnn(tmp_path / "images.npz", batch=4),
        loops.gpt(tmp_path / "text.txt", batch=2, context=8, width=16),
    ):
        x, y = loop.batch(torch.Generator().manual_seed(0))
        assert loop.build(0)(x).shape[:-1] == y.shape
        assert loop.held_loss(loop.build(0)) > 0
