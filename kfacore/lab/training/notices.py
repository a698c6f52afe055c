"""Notices of an optimizer, counted and logged by layer without flooding the terminal."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

__all__ = ["NoticeLog"]

logger = logging.getLogger("kfacore.lab.training")


class NoticeLog:
    """Logs the first notice of each layer, then the 10th, the 100th and so on; counts all of them.

    Attributes:
        counts: Notices so far, by layer.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def take(self, step: int, notices: Iterable[str]) -> None:
        """Count and perhaps log.

        Args:
            step: The step they belong to.
            notices: ``"layer: what happened"``.
        """
        for notice in notices:
            layer = notice.partition(": ")[0]
            self.counts[layer] += 1
            count = self.counts[layer]
            if count == 1:
                logger.warning("step %d: %s", step, notice)
            elif str(count).strip("0") == "1":  # 10, 100, ...
                logger.warning("step %d: %s (%d notices of this layer so far)", step, notice, count)
