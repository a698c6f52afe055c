"""The cost model of ranks: operations are those that other benchmarks count, bytes and shares what they must be."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.limit import kfac_operations, sgd_operations
from benchmarks.nets import NETS
from benchmarks.ranks.command import ASSUMED, COUNTS, main, tables
from benchmarks.ranks.model import VARIANTS, Schedule, busiest, cost, triangles
from benchmarks.ranks.shapes import NETS_BY_NAME
from benchmarks.report import Report

UNIT = replace(ASSUMED, rate=1.0, products=1.0, factorisations=1.0)
NEVER = 10**12


def test_sizes_are_those_of_the_nets() -> None:
    assert NETS_BY_NAME["resnet"].size == 25_557_032
    assert NETS_BY_NAME["resnet"].products == pytest.approx(2 * 4.09e9, rel=0.01)  # its 4.1 billion multiplications
    assert NETS_BY_NAME["gpt-1.3b"].size == pytest.approx(1.3e9, rel=0.02)
    assert NETS_BY_NAME["mnist"].size == sum(
        (a + 1) * b for a, b in zip(NETS["mnist"], NETS["mnist"][1:], strict=False)
    )


def test_operations_are_those_of_the_limit() -> None:
    net, widths = NETS_BY_NAME["mnist"], NETS["mnist"]
    found = cost(net, UNIT, 1, "all", Schedule(every=20, share=0.125, work=11.0))
    first = (widths[0] + 1) * widths[1]
    assert found.gradient == pytest.approx(sgd_operations(widths, net.batch) + 2 * net.batch * first)

    def counted(refresh_every: int) -> float:
        periods = {"lambda_every": NEVER, "refresh_every": refresh_every}
        return kfac_operations(widths, net.batch, "blockdiag", tau1=0.0, tau2=0.0, tempered=True, **periods)

    assert found.solve == pytest.approx(counted(NEVER) - sgd_operations(widths, net.batch), rel=1e-6)
    assert found.refresh == pytest.approx(counted(20) - counted(NEVER), rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_rank_sends_nothing(variant: str) -> None:
    found = cost(NETS_BY_NAME["gpt"], ASSUMED, 1, variant)
    assert found.ordinary == found.due == found.exposed == found.moments == found.inverses == found.directions == 0.0
    assert found == replace(cost(NETS_BY_NAME["gpt"], ASSUMED, 1, "all"))


@pytest.mark.parametrize("name", ["mnist", "gpt", "resnet"])
def test_owners_share_nearly_evenly_while_there_are_factors_enough(name: str) -> None:
    net = NETS_BY_NAME[name]
    costs = [float(d) ** 3 for d in net.sides]
    for ranks in (2, 3, 4):
        share, found = busiest(costs, ranks)
        assert share <= max(1.15 / ranks, max(costs) / sum(costs))
        assert set(found) == set(range(ranks))


def test_what_is_sent() -> None:
    """An ordinary step of `every` hands over the gradient, a refresh at most two triangles of each factor more."""
    net = NETS_BY_NAME["gpt-1.3b"]
    for ranks in COUNTS[1:]:
        every, owner = (cost(net, ASSUMED, ranks, variant) for variant in ("every", "owner"))
        assert every.ordinary == 4 * net.size
        assert every.due <= 2 * 4 * triangles(net)
        assert owner.ordinary <= 2 * 4 * net.size
        assert owner.due == 4 * triangles(net)


def test_what_is_divided_shrinks() -> None:
    net = NETS_BY_NAME["gpt-1.3b"]
    before = alone = cost(net, ASSUMED, 1, "owner")
    for ranks in COUNTS[1:7]:
        found = {variant: cost(net, ASSUMED, ranks, variant) for variant in VARIANTS}
        assert found["all"].refresh == alone.refresh
        assert found["every"].refresh == found["owner"].refresh < before.refresh
        assert found["owner"].solve < found["every"].solve == found["all"].solve
        assert found["owner"].memory < found["every"].memory
        assert all(each.slowest > each.step > each.plain for each in found.values())
        before = found["owner"]


def test_tables_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("ranks")
    tables(report, NETS_BY_NAME["mnist"], ASSUMED, Schedule(), [1, 2, 4])
    assert [row["ranks"] for row in report.tables[0]["rows"]] == [1, 2, 4]
    assert main(["--net", "gpt", "--plot", str(tmp_path / "ranks.png"), "--json", str(tmp_path / "ranks.json")]) == 0
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    assert "GPT 124M" in capsys.readouterr().out
