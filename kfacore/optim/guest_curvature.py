"""A guest's curvature: micro-batches added up, averaged in once a step, and an inverse damped by each block's scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfacore.curvature.forest import forest
from kfacore.curvature.owned import Owned, preconditioner
from kfacore.curvature.preconditioner import add_up
from kfacore.curvature.scales import MeanScales, gammas
from kfacore.errors import NumericalError
from kfacore.optim.guards import as_parameters
from kfacore.optim.guest_capture import GuestNetwork
from kfacore.optim.guest_options import GuestOptions
from kfacore.optim.sharded import sharing_parameters
from kfacore.parallel.ranks import ALONE, Ranks
from kfacore.parallel.shards import plain_like
from kfacore.roles.approx import Approximation
from kfacore.roles.block import Block
from kfacore.roles.moment import Moments
from kfacore.roles.samples import LayerSamples

__all__ = ["GuestCurvature"]

_OPERATIONS = 6
"""Operations of the gradient, a row and a parameter: two forward and four backward."""


class GuestCurvature:
    """Statistics of a network's blocks and the inverse made of them.

    Args:
        network: The network, once its blocks are in order.
        approx: The approximation.
        decay: Largest weight of the past in the averages.
        options: Of the guest.
        say: Told what must not pass in silence, and the block that it is about.
        ranks: The processes whose statistics are added up.

    Attributes:
        preconditioner: Averages and inverse.
        scales: Each block's mean scale, see `kfacore.curvature.scales`.
        added: Micro-batches since the last step.
        waited: Whether the last `refresh` averaged something in, which waits for the device.
    """

    def __init__(
        self,
        network: GuestNetwork,
        approx: Approximation,
        decay: float,
        options: GuestOptions,
        say: Callable[[str, str], None],
        ranks: Ranks = ALONE,
    ) -> None:
        infos = [block.info for block in network.layers]
        pairs = forest(network.following, [1.0 / abs(j - i) for i, j in network.following])
        self._like = plain_like(network.layers[0].parameters[0])
        bound = sharing_parameters(network.layers) if network.sharded else None
        self.preconditioner = preconditioner(approx, infos, self._like, decay, pairs, ranks, bound)
        self.scales = Moments((MeanScales,), infos, self._like)
        self.added = 0
        self.waited = False
        self._options, self._say, self._ranks = options, say, ranks
        self._work = self._adding = 0.0

    @property
    def groups(self) -> list[list[int]]:
        """Which blocks each process owns."""
        assert isinstance(self.preconditioner, Owned)
        return self.preconditioner.groups

    def add(self, samples: Sequence[LayerSamples | None]) -> None:
        """Take in a micro-batch, unless it holds NaN or infinity."""
        numbers = [torch.zeros((), device=self._like.device)]
        numbers += [x.sum() for s in samples if s is not None for x in (s.gradients, s.inputs) if x.is_floating_point()]
        if not bool(torch.isfinite(torch.stack([x.float() for x in numbers])).all()):
            self._say(
                "statistics of a mini-batch were left out: its outputs or gradients hold NaN or infinity (the loss is "
                "not finite, or float16 overflowed)",
                "",
            )
            return
        self.preconditioner.add(samples)
        self.scales.add(samples)
        self._adding += sum(_work(block, s) for block, s in zip(self.preconditioner.layers, samples, strict=True))
        self.added += 1

    def refresh(self, step: int, *, added: bool) -> None:
        """Average in what was added, and take up a new inverse when it is time.

        Args:
            step: Number of the step.
            added: Whether anything was, by any process.
        """
        pre = self.preconditioner
        self.waited = added
        if added:
            pre.commit()
            add_up(self.scales, self._ranks)
            self.scales.commit(pre.decay)
            self.added = 0
            (work,) = self._ranks.count("work", [self._adding])
            self._work, self._adding = work / self._ranks.size, 0.0
        pre.spent(self._work)  # other steps are taken to be as large as those that were watched
        if pre.moments.updates == 0:
            return
        try:
            found, notices = pre.candidates(step, [self._gamma()] if pre.due(step) else [], pi=self._options.pi)
        except NumericalError as error:
            block, _, _ = str(error).partition(": ")
            self._say(f"{error} (the base optimizer steps alone until the next statistics)", block)
            return
        for _, inverse in found:
            pre.use(inverse)
        for notice in notices:
            self._say(str(notice), notice.layer)

    def _gamma(self) -> Tensor:
        """One number a block, or one for all."""
        found = gammas(self.scales[MeanScales], self._options.damping)
        return found if self._options.gamma is None else torch.full_like(found[0], self._options.gamma)

    def state_dict(self) -> dict[str, Any]:
        """Averages, inverse, a refresh under way."""
        return {
            "preconditioner": self.preconditioner.state_dict(),
            "scales": self.scales.state_dict(),
            "work": self._work,
        }

    def load_state_dict(self, state: Mapping[str, Any], saved: torch.dtype) -> None:
        """Take up a state of the same blocks.

        Args:
            state: What `state_dict` gave.
            saved: Dtype of the parameters when it was saved.
        """
        like: Tensor = self._like
        self.preconditioner.load_state_dict(as_parameters(state["preconditioner"], saved, like))
        self.scales.load_state_dict(as_parameters(state["scales"], saved, like))
        self._work = float(state["work"])


def _work(block: Block, s: LayerSamples | None) -> float:
    """Operations of a step for a block, from its rows; token numbers are looked up."""
    if s is None:
        return 0.0
    rows = s.gradients.shape[1] if s.inputs.is_floating_point() else 0
    return float(_OPERATIONS * math.prod(block.shape)) * (rows if s.head is None else s.head.gradients.shape[1])
