"""What the runs of a model say: losses at the end, and steps and seconds to AdamW's last loss on held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.graft import Curve
from benchmarks.real.race import Record, final

__all__ = ["curve", "rows"]


def curve(record: Record) -> Curve:
    """Loss on held-out data against steps and seconds."""
    steps, seconds, _, losses = (list(column) for column in zip(*record["curve"], strict=True))
    return Curve(steps, seconds, [float("nan") if loss is None else loss for loss in losses])


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a run of one model, in the order given; shares are those of AdamW's run with the same seed."""
    base = {record["seed"]: record for record in records if record["method"] == "adamw" and not record["error"]}
    return [_row(record, base.get(record["seed"])) for record in records]


def _row(record: Record, base: Record | None) -> dict[str, Any]:
    last = record["curve"][-1]
    at = None if base is None else curve(record).reached(final(base))
    return {
        "": record["method"],
        "seed": record["seed"],
        "batch": record["batch"],
        "rate": record["rate"],
        "steps": record["steps"],
        "undone": record["undone"],
        "training loss": last[2],
        "held-out loss": last[3],
        "steps to AdamW's": None if at is None else at[0],
        "share of its steps": None if at is None or base is None else at[0] / base["steps"],
        "share of its seconds": None if at is None or base is None else at[1] / base["curve"][-1][1],
        "error": record["error"],
    }
