"""Mini-batches: how large the k-th one is, and which cases it holds.

Batch k depends on the seed, on k and on the schedule alone. Resuming a run therefore needs no sampler state, and two
runs with one seed see the same cases in the same order whatever optimizer they use, which pairs a study's variants.

Sources: Martens & Grosse 2015, section 13 (exponential schedule); method, section 2, step 1. For passes without
replacement: Bottou, "Curiously fast convergence of some stochastic gradient descent algorithms", 2009; Gurbuzbalaban,
Ozdaglar & Parrilo, "Why random reshuffling beats stochastic gradient descent", Mathematical Programming 186, 2021.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kfacore.errors import ConfigError
from kfacore.roles.problem import Split

__all__ = ["BatchSampler", "BatchSchedule", "Sampling", "derive_seed"]


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A seed for one purpose, so that no two consumers of the run's seed draw from the same stream.

    Args:
        seed: The run's seed.
        purpose: What is drawn, for example ``"batch"``.
        index: Number of the draw.

    Returns:
        63 bits of a hash of the three. The low 32 bits, all that torch's CPU generator takes up, are as good as any.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class BatchSchedule:
    """Size of the k-th mini-batch.

    Exponential: m_k = min(floor(m_1 (N/m_1)^((k-1)/(K-1))), N), so m_1 at k = 1 and all N cases from k = K on.
    Constant: m_k = min(m_1, N).

    Attributes:
        kind: Which of the two.
        cases: N, the size of the training set.
        start: m_1.
        target_step: K, the step at which the whole training set is reached.
        hold: Steps that share one size: that of the first of them, until K.

    Raises:
        ConfigError: The training set is empty or a number is below 1.
    """

    kind: Literal["exponential", "constant"]
    cases: int
    start: int
    target_step: int
    hold: int = 1

    def __post_init__(self) -> None:
        for name in ("cases", "start", "target_step", "hold"):
            if getattr(self, name) < 1:
                raise ConfigError(f"batch schedule: {name} must be at least 1, found {getattr(self, name)}")

    def size(self, step: int) -> int:
        """m_k.

        Args:
            step: k, from 1.

        Returns:
            A number of cases in 1..N.
        """
        if self.start >= self.cases:
            return self.cases
        if self.kind == "constant":
            return self.start
        # The last point is exact by definition; computing it would leave the floor at the mercy of rounding.
        if step >= self.target_step:
            return self.cases
        grown = step - 1 - (step - 1) % self.hold
        growth = (self.cases / self.start) ** (grown / (self.target_step - 1))
        return min(int(self.start * growth * (1.0 + 1e-12)), self.cases)


Sampling = Literal["independent", "epochs"]
"""How the cases of one mini-batch depend on those before."""


class BatchSampler:
    """Draws mini-batches without replacement from data that lives on the device.

    Independent: batch k is the first m_k entries of a permutation drawn for (seed, k).
    Epochs: batches are consecutive pieces of one permutation of all cases, and when fewer than m_k are left of it, of a
    new one. Over a pass every case counts once, so most of the gradient's noise cancels over as many steps.

    Args:
        split: The training cases, on the device.
        schedule: Sizes.
        seed: The run's seed.
        sampling: Which of the two.
    """

    def __init__(self, split: Split, schedule: BatchSchedule, seed: int, sampling: Sampling = "independent") -> None:
        self.split = split
        self.schedule = schedule
        self.seed = seed
        self.sampling: Sampling = sampling
        self._generator = torch.Generator()
        self._places: list[tuple[int, int]] = []
        self._drawn: tuple[int, Tensor] | None = None

    def place(self, step: int) -> tuple[int, int]:
        """Number of the permutation that batch k is a piece of, and the position of its first case there.

        Args:
            step: k, from 1.
        """
        if self.sampling == "independent":
            return step, 0
        places, schedule = self._places, self.schedule
        while len(places) < step:
            k = len(places) + 1
            epoch, start = places[-1] if places else (0, 0)
            start += schedule.size(k - 1) if places else 0
            whole = start + schedule.size(k) <= schedule.cases
            places.append((epoch, start) if whole else (epoch + 1, 0))
        return places[step - 1]

    def indices(self, step: int) -> Tensor:
        """The cases of batch k, distinct, in random order.

        Args:
            step: k, from 1.

        Returns:
            (m_k,) integers on the CPU. Sampled independently, a smaller batch of a step is a prefix of a larger one.
        """
        draw, start = self.place(step)
        if self._drawn is None or self._drawn[0] != draw:
            purpose = "batch" if self.sampling == "independent" else "epoch"
            self._generator.manual_seed(derive_seed(self.seed, purpose, draw))
            self._drawn = draw, torch.randperm(len(self.split), generator=self._generator)
        return self._drawn[1][start : start + self.schedule.size(step)]

    def batch(self, step: int, part: tuple[int, int] = (0, 1)) -> Split:
        """Inputs and targets of batch k; an autoencoder's target stays the very same tensor as its input.

        Args:
            step: k, from 1.
            part: (r, W): every W-th case alone, from the r-th on, one process's part of W.
        """
        inputs, targets = self.split.inputs, self.split.targets
        indices = self.indices(step)[part[0] :: part[1]]
        if inputs.device.type == "cuda":
            # Pinned memory is what makes the copy asynchronous; the device never waits for the draw.
            indices = indices.pin_memory()
        indices = indices.to(inputs.device, non_blocking=True)
        chosen = inputs.index_select(0, indices)
        return Split(chosen, chosen if targets is inputs else targets.index_select(0, indices))
