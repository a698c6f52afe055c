"""The optimizer's own rooms on any net: linearizer, loss, curvature, inverse, asked for one number after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from any_network import by_name, linearizer
from layer_rows import exact_vectors
from torch import Tensor, nn

from kfacore.curvature.diagonal import SquareMoment
from kfacore.curvature.full import FullMoment
from kfacore.curvature.moments import InputFactor, OutputFactor
from kfacore.curvature.preconditioner import Preconditioner
from kfacore.curvature.tied import TiedMoment
from kfacore.network import BlockVector
from kfacore.optim.loss import Loss
from kfacore.registry import get_registry
from kfacore.roles import Block
from kfacore.roles.moment import Moments
from kfacore.roles.samples import Samples

KINDS = {"kron": (InputFactor, OutputFactor), "full": (FullMoment,), "diagonal": (SquareMoment,), "tied": (TiedMoment,)}


class Rooms:
    """One mini-batch of a model.

    Args:
        model: In double precision.
        inputs: The mini-batch.
        targets: Its targets.
        likelihood: As `Loss.of` takes it.
        valid: Positions that count.
        options: Of the linearizer.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Tensor,
        likelihood: Any,
        valid: Tensor | None = None,
        **options: Any,
    ) -> None:
        self.linearizer = linearizer(model, **options)
        self.batch = self.linearizer(inputs)
        self.outputs = self.batch.outputs()
        self.z = torch.cat(self.outputs)
        self.loss = Loss.of(likelihood)
        self.bound = self.loss.bind(self.outputs, targets, valid)
        self.infos: list[Block] = [layer.info for layer in self.linearizer.layers]

    def gradient(self) -> BlockVector:
        vector = BlockVector.zeros(self.linearizer.layers)
        return self.batch.gradient(self.bound.residuals(self.outputs), vector, retain=True)

    def by_name(self, vector: BlockVector) -> dict[str, Tensor]:
        return by_name(self.linearizer, vector)

    def direction(self, tensors: Mapping[str, Tensor]) -> BlockVector:
        """A direction given by parameters."""
        vector = BlockVector.zeros(self.linearizer.layers)
        for layer, block in zip(self.linearizer.layers, vector.blocks, strict=True):
            views = layer.view(lambda parameter: tensors[self.linearizer.names[parameter]])
            for part, view in zip(layer.split(block), views, strict=True):
                part.copy_(view)
        return vector

    def samples(self, vectors: Tensor) -> Samples:
        return self.batch.backpropagate(vectors, valid=self.bound.valid, total=self.bound.total())

    def exact(self) -> Samples:
        """One pass for every case, position and term of F_R: the expectation whatever the net does."""
        return self.samples(exact_vectors(self.loss.likelihood, self.z, self.bound.valid))

    def drawn(self, targets: Tensor) -> Samples:
        """Residuals of targets in one pass; a pass a case where gradients are squared that a pass sums over cases."""
        bound = self.loss.bind(self.outputs, targets, self.bound.valid)
        whole = torch.cat(bound.residuals(self.outputs)) * bound.total()
        if all(info.kind != "diagonal" for info in self.infos):
            return self.samples(whole[None])
        passes = torch.zeros(len(whole), *whole.shape, dtype=whole.dtype)
        for i, row in enumerate(whole):
            passes[i, i] = row
        return self.samples(passes)

    def factors(self, samples: Samples) -> dict[str, list[Tensor]]:
        """The averages of every block: A and G, F, the diagonal, or the four of a tied block."""
        found = {}
        for info, sample in zip(self.infos, samples, strict=True):
            moments = Moments(KINDS[info.kind], [info], self.z)
            moments.update([sample], 0.95)
            found[info.name] = [value for kind in KINDS[info.kind] for value in moments[kind]]
        return found

    def preconditioned(
        self, samples: Samples, vector: BlockVector, gamma: float, approx: Any, pairs: Any = None
    ) -> BlockVector:
        """F-hat^-1 v."""
        part = get_registry().build("approx", approx)
        found = Preconditioner(part, self.infos, self.z, 0.95, pairs)
        found.update(samples)
        ((_, inverse),), notices = found.refresh([torch.tensor(gamma, dtype=torch.float64)], pi="layer")
        assert not notices
        return BlockVector.zeros(self.linearizer.layers).copy_blocks(inverse.solve(vector.blocks))


def whole(factor: Tensor) -> Tensor:
    """(groups, d, d) of a factor that may have one group, or be its diagonal."""
    matrix = torch.diag_embed(factor) if factor.dim() == 1 else factor
    return matrix if matrix.dim() == 3 else matrix.unsqueeze(0)


def products(factors: Sequence[Tensor]) -> list[Tensor]:
    """G (x) A of every group: only the product is determined."""
    A, G = (whole(factor) for factor in factors)
    return [torch.kron(g, a) for a, g in zip(A, G, strict=True)]
