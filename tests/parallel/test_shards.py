"""Sharded parameters (FSDP2): a guest's steps are those of one process with whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_ranks import farthest
from world_shards import refused, saved, sharded, went_on
from worlds import world

VARIANTS: list[dict[str, Any]] = [{}, {"scale": "kl", "base": "sgd"}]
MORE: list[dict[str, Any]] = [
    {"scale": "none", "rest": "diagonal"},
    {"attends": True, "base": "sgd"},
    {"approx": {"kind": "tridiag", "refresh": "background"}},
]


def agree(sizes: tuple[int, ...], variants: list[dict[str, Any]]) -> None:
    found = world(len(sizes), sharded, sizes, variants).results
    alone = sharded(None, sizes, variants)
    for i, options in enumerate(variants):
        assert found[0][i]["blocks"] == alone[i]["blocks"]
        assert not found[0][i]["said"], options
        for other in found[1:]:
            assert farthest(found[0][i]["parameters"], other[i]["parameters"]) == 0.0, options
        assert farthest(found[0][i]["parameters"], alone[i]["parameters"]) < 1e-12, options


def test_shards_make_the_steps_of_one_process() -> None:
    agree((30, 30), VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(30, 30), (20, 20, 20)])
def test_shards_make_the_steps_of_one_process_in_every_variant(sizes: tuple[int, ...]) -> None:
    agree(sizes, [*VARIANTS, *MORE])


def test_a_distributed_checkpoint_goes_on(tmp_path: Path) -> None:
    wanted = world(2, saved, (30, 30), tmp_path / "two").results[0]
    for each in world(2, went_on, (30, 30), tmp_path / "two").results:
        assert farthest(each, wanted) == 0.0


def test_other_ways_to_spread_parameters_are_refused_by_name() -> None:
    for square, columns, mixed, kfac, exact, group in world(2, refused).results:
        assert square.startswith("UnsupportedModelError: weight: it is spread by")
        assert "mesh of 2 dimension(s); tensor parallelism, pipeline parallelism and hybrid sharding" in square
        assert "only rows may be spread, Shard(0)" in columns
        assert mixed.startswith("UnsupportedModelError: bias: it is whole on every process while other parameters")
        assert kfac.startswith("UnsupportedModelError: KFAC takes no parameters that are sharded")
        assert "Preconditioned does" in kfac
        assert exact.startswith("ConfigError: approx = 'exact' needs the statistics of all blocks in one place")
        assert group.startswith("ConfigError: process_group: the parameters are sharded over other processes")
