"""Targets drawn for a mini-batch that several processes share: the same ones, however many processes there are.

Every process draws the random numbers of all cases and uses those of its own. All generators then stand at the same
place, and the numbers that a case gets depend on its place in the whole mini-batch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfacore.parallel.ranks import Ranks
from kfacore.parallel.whole import Whole
from kfacore.roles.estimator import Estimator
from kfacore.roles.likelihood import Likelihood

__all__ = ["Share", "drawn_part"]


@dataclass(frozen=True)
class Share:
    """One process's part of the first cases of a mini-batch.

    Attributes:
        whole: The mini-batch.
        cases: How many of its first cases are meant.
        ranks: The processes.
    """

    whole: Whole
    cases: int
    ranks: Ranks

    def rows(self, positions: int) -> tuple[Tensor, int]:
        """Places of one's own rows among those of all, and how many those are.

        Parts whose cases have other numbers of positions are laid out by the largest of them.

        Args:
            positions: Rows a case here.
        """
        places = self.whole.places[: self.whole.first(self.cases)]
        most = self.ranks.most("positions of an example", positions)
        own = places.unsqueeze(1) * most + torch.arange(positions)
        return own.reshape(-1), self.cases * most


class _Likelihood:
    """A likelihood that draws for all cases and hands out those of one part.

    Args:
        likelihood: The likelihood.
        own: Places of the part's rows.
        whole: Number of all rows.
        generator: Source of the draws, at the same place in all processes.
    """

    def __init__(self, likelihood: Likelihood, own: Tensor, whole: int, generator: torch.Generator) -> None:
        self._likelihood, self._own, self._whole, self._generator = likelihood, own, whole, generator

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The targets of the part."""
        return self._likelihood.sample_part(z, self._own.to(z.device), self._whole, self._generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._likelihood, name)


def drawn_part(
    estimator: Estimator,
    rows: Tensor,  # (N, o)
    targets: Tensor,
    likelihood: Likelihood,
    generator: torch.Generator,
    part: Share,
    positions: int,
) -> Tensor:  # (k, N, o)
    """What an estimator sends back for one part.

    Args:
        estimator: The estimator. What it draws other than by `Likelihood.sample` is of this part alone.
        rows: z of the part's rows.
        targets: Theirs.
        likelihood: The likelihood.
        generator: At the same place in all processes, before and after.
        part: Which part.
        positions: Rows a case.
    """
    own, whole = part.rows(positions)
    proxy: Any = _Likelihood(likelihood, own, whole, generator)
    apart = torch.Generator(generator.device)
    apart.set_state(generator.get_state())
    return estimator.output_vectors(rows, targets, proxy, apart)
