"""How every benchmark answers: aligned columns on the screen, the same numbers as JSON for a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["Report"]


class Report:
    """Tables of one benchmark, printed as they come.

    Args:
        name: The benchmark's name.
        settings: What the numbers hold for.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.name = name
        self.settings = {**settings, "threads": torch.get_num_threads(), "torch": torch.__version__}
        self.tables: list[dict[str, Any]] = []

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print one table; all rows have the same keys, numbers are rounded only on the screen."""
        self.tables.append({"title": title, "rows": [dict(row) for row in rows]})
        print(title)
        if not rows:
            return
        cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            first, *rest = (
                text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
            )
            print("  " + "  ".join([first, *rest]))
        print(flush=True)

    def as_json(self) -> dict[str, Any]:
        """Everything that was printed."""
        return {"benchmark": self.name, "settings": self.settings, "tables": self.tables}

    def save(self, file: Path | None) -> None:
        """Write the numbers, if a file is given."""
        if file is not None:
            file.write_text(json.dumps(self.as_json(), indent=2) + "\n")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
