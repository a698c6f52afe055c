r"""Curvature of a whole net: what the approximation serves, and built-in curvature for the rest, as one.

An approximation serves the blocks that it says it serves (`Approximation.serves`: by default one Kronecker product of
two whole factors). Every other block gets what fits its kind: Kronecker products with groups or diagonal sides
(`kron`), dense small blocks (`full`), diagonals (`diagonal`), weights used as embedding and head (`tied`). The Fisher
is block-diagonal between the parts. Where the approximation serves every block, everything here is its own: no part
stands between it and its caller.

With ``pi = "net"`` gamma is split by the geometric mean of pi over all Kronecker products of the net, whoever serves
them, if the approximation tells its own (`Factorisation.log_pi`); if not, it takes the mean over its own, and the
built-in parts the mean over theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kfacore.curvature.diagonal import Entries
from kfacore.curvature.faults import component, examine, named
from kfacore.curvature.full import Full
from kfacore.curvature.kron import Kron
from kfacore.curvature.tied import Tied
from kfacore.errors import ConfigError
from kfacore.roles.approx import Approximation, Factorisation
from kfacore.roles.block import Block
from kfacore.roles.inverse import Inverse
from kfacore.roles.moment import Moment, Moments, Tally
from kfacore.roles.samples import Samples
from kfacore.schema.slots import PiRule

__all__ = ["Joined", "Part", "mean_pi"]


class Curvature(Protocol):
    """What makes inverses of some blocks: an `Approximation`, or one of the built-in kinds."""

    @property
    def damps_each(self) -> bool:
        """Whether gamma may be a vector with one entry a block."""

    @property
    def moments(self) -> Sequence[type[Moment]]:
        """The running averages that it needs."""

    def factorise(self, moments: Moments) -> Factorisation:
        """Prepare inverses from the moments as they are now."""

    def load_inverse(self, state: Mapping[str, Any], layers: Sequence[Block]) -> Inverse:
        """Restore an inverse from its state."""


class Part(NamedTuple):
    """Blocks and who serves them.

    Attributes:
        curvature: Who serves them.
        indices: Which blocks, in order.
        layers: These blocks.
    """

    curvature: Curvature
    indices: list[int]
    layers: list[Block]

    def of(self, items: Sequence[Any]) -> list[Any]:
        """The items of these blocks."""
        return [items[i] for i in self.indices]


class JoinedMoments(Moments):
    """The moments of all parts, as if they were one.

    Args:
        parts: Who serves which blocks.
        layers: All blocks.
        like: A tensor with the dtype and device of the averages.
        pairs: Pairs of blocks that are coupled; only those whose two blocks are served together count.
    """

    def __init__(
        self, parts: Sequence[Part], layers: Sequence[Block], like: Tensor, pairs: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__((), layers, like, pairs)
        self._parts = list(parts)
        self.each = []
        for part in parts:
            local = {block: i for i, block in enumerate(part.indices)}
            own = [(local[i], local[j]) for i, j in pairs if i in local and j in local]
            self.each.append(Moments(part.curvature.moments, part.layers, like, own))

    def __getitem__(self, kind: type[Moment]) -> list[Tensor]:
        """The averages of one kind, part by part; blocks that have none of it are left out."""
        return [value for moments in self.each if kind in moments.kinds for value in moments[kind]]

    def frozen(self) -> JoinedMoments:
        """A copy that later updates do not change."""
        twin = super().frozen()
        assert isinstance(twin, JoinedMoments)
        twin.each = [moments.frozen() for moments in self.each]
        return twin

    def sum_on(self, device: torch.device) -> None:
        """All parts."""
        for moments in self.each:
            moments.sum_on(device)

    def restart(self) -> bool:
        """All parts."""
        found = [moments.restart() for moments in self.each]  # of all, not up to the first
        return any(found)

    def forget(self) -> None:
        """All parts."""
        for moments in self.each:
            moments.forget()

    def add(self, samples: Samples) -> None:
        """Each part gets what its own blocks saw."""
        for part, moments in zip(self._parts, self.each, strict=True):
            moments.add(part.of(samples))

    def commit(self, decay: float) -> None:
        """All parts."""
        for moments in self.each:
            moments.commit(decay)
        self.updates = max((moments.updates for moments in self.each), default=0)

    def tallies(self, samples: Samples) -> list[Tally]:
        """Those of all parts."""
        return [
            tally
            for part, moments in zip(self._parts, self.each, strict=True)
            for tally in moments.tallies(part.of(samples))
        ]

    def update_share(self, samples: Samples, decay: float, tallies: Sequence[Tally]) -> None:
        """Each part gets what its own blocks saw."""
        start = 0
        for part, moments in zip(self._parts, self.each, strict=True):
            count = len(moments.tallies([None for _ in part.layers]))
            moments.update_share(part.of(samples), decay, tallies[start : start + count])
            start += count
        self.updates += 1

    @property
    def averages(self) -> list[tuple[Tensor, bool]]:
        """Those of all parts."""
        return [found for moments in self.each for found in moments.averages]

    @property
    def turns(self) -> bool:
        """Those of any part."""
        return any(moments.turns for moments in self.each)

    @property
    def pending_symmetric(self) -> list[bool]:
        """Those of all parts."""
        return [found for moments in self.each for found in moments.pending_symmetric]

    def pending(self) -> list[Tensor]:
        """Those of all parts."""
        return [tensor for moments in self.each for tensor in moments.pending()]

    def load_pending(self, tensors: Sequence[Tensor]) -> None:
        """To all parts."""
        start = 0
        for moments in self.each:
            count = moments.pending_count
            moments.load_pending(tensors[start : start + count])
            start += count

    def refreshed(self, inverse: Inverse) -> None:
        """To each part its own part of the inverse."""
        if isinstance(inverse, JoinedInverse):
            for moments, own in zip(self.each, inverse.each, strict=True):
                moments.refreshed(own)

    def state_dict(self) -> dict[str, Any]:
        """Those of all parts."""
        return {"updates": self.updates, "parts": [moments.state_dict() for moments in self.each]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To all parts.

        Raises:
            ConfigError: The state is of other blocks, or of another approximation.
        """
        found = len(state.get("parts", ()))
        if found != len(self.each):
            raise ConfigError(
                f"the saved statistics are of {found or 1} kinds of blocks, this model has {len(self.each)}: "
                f"{', '.join(part.layers[0].name for part in self._parts)} are served apart"
            )
        self.updates = state["updates"]
        for moments, saved in zip(self.each, state["parts"], strict=True):
            moments.load_state_dict(saved)


class JoinedInverse(Inverse):
    """F-hat, block-diagonal between the parts.

    Args:
        layers: All blocks.
        parts: Who serves which blocks.
        each: The inverse of each part.
    """

    def __init__(self, layers: Sequence[Block], parts: Sequence[Part], each: Sequence[Inverse]) -> None:
        self.layers, self._parts, self.each = layers, list(parts), list(each)
        self.notices = tuple(notice for inverse in each for notice in inverse.notices)

    def solve(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Part by part."""
        return self._gather([own.solve(part.of(blocks)) for part, own in zip(self._parts, self.each, strict=True)])

    def solve_into(self, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Part by part, each into its own blocks."""
        for part, own in zip(self._parts, self.each, strict=True):
            own.solve_into(part.of(blocks), part.of(out))

    def multiply(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Part by part."""
        return self._gather([own.multiply(part.of(blocks)) for part, own in zip(self._parts, self.each, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """That of each part."""
        return {"parts": [inverse.state_dict() for inverse in self.each]}

    def _like(self) -> Tensor:
        return self.each[0]._like()

    def _gather(self, found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What the parts returned, in the blocks' order."""
        by_block = {
            i: tensor
            for part, tensors in zip(self._parts, found, strict=True)
            for i, tensor in zip(part.indices, tensors, strict=True)
        }
        return [by_block[i] for i in range(len(self.layers))]


class JoinedFactorisation(Factorisation):
    """The factorisations of all parts."""

    def __init__(self, joined: Joined, each: Sequence[Factorisation]) -> None:
        self._joined, self._each = joined, list(each)

    def log_pi(self) -> tuple[Tensor, Tensor] | None:
        """Of all parts that tell theirs."""
        return _added([factorisation.log_pi() for factorisation in self._each])

    def damped(self, gamma: Tensor, *, pi: PiRule | Tensor = "layer") -> JoinedInverse:
        """All parts at one gamma, ``pi = "net"`` over all of them together as far as they tell theirs."""
        rules: list[Any] = [pi] * len(self._each)
        if pi == "net" or isinstance(pi, Tensor):
            logs = [factorisation.log_pi() for factorisation in self._each]
            known = _added(logs)
            shared = pi if known is None or isinstance(pi, Tensor) else mean_pi(*known)
            rules = ["net" if told is None else shared for told in logs]
        parts = zip(self._each, rules, self._joined.parts, strict=True)
        each = [f.damped(_gamma_of(gamma, part), pi=rule) for f, rule, part in parts]
        return JoinedInverse(self._joined.layers, self._joined.parts, each)


def _added(logs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """Sums of logarithms and numbers of blocks of those that tell theirs; None if nobody does."""
    known = [found for found in logs if found is not None]
    if not known:
        return None
    total, count = (sum(terms[1:], terms[0]) for terms in zip(*known, strict=True))
    return total, count


def mean_pi(total: Tensor, count: Tensor) -> Tensor:
    """The geometric mean of pi, from the sum of logarithms over blocks and their number."""
    return (total.double() / count.clamp_min(1)).exp()


def _gamma_of(gamma: Tensor, part: Part) -> Tensor:
    """Gamma of a part's blocks: a scalar; of one for each block theirs, or their geometric mean for who takes one."""
    if gamma.dim() == 0:
        return gamma
    own = gamma[part.indices]
    return own if part.curvature.damps_each else own.log().mean().exp()


class Joined:
    """The curvature of a net: an approximation, with built-in curvature beside it for the blocks that it leaves.

    Args:
        approx: The approximation.
        layers: All blocks, in execution order.
        pairs: Pairs (i, j) of blocks that follow each other, for approximations that couple them; each block and the
            next, where both are served by the approximation, if left out.

    Attributes:
        approx: As given.
        parts: Who serves which blocks, the approximation first if it serves any.
        alone: Whether the approximation serves all blocks.

    Raises:
        UnsupportedModelError: The approximation refuses its blocks.
    """

    def __init__(
        self, approx: Approximation, layers: Sequence[Block], pairs: Sequence[tuple[int, int]] | None = None
    ) -> None:
        self.layers = list(layers)
        self.pairs = list(pairwise(range(len(self.layers)))) if pairs is None else list(pairs)
        self.approx = approx
        power = float(getattr(approx.config, "power", 1.0))
        builtin: dict[str, Curvature] = {
            "kron": Kron(power),
            "full": Full(power),
            "diagonal": Entries(power),
            "tied": Tied(power),
        }
        own = {i for i, block in enumerate(self.layers) if self._served(block)}
        served: list[tuple[Curvature, list[int]]] = [(approx, sorted(own))]
        for kind, curvature in builtin.items():
            served.append((curvature, [i for i, b in enumerate(self.layers) if i not in own and b.kind == kind]))
        self.parts = [Part(c, indices, [self.layers[i] for i in indices]) for c, indices in served if indices]
        self._own = [self.layers[i] for i in sorted(own)]
        self.alone = len(own) == len(self.layers)
        self._indices = own
        if own:
            approx.check_layers(self._own)

    @property
    def coupled(self) -> list[tuple[int, int]]:
        """The pairs whose two blocks the approximation serves: an approximation of pairs couples these."""
        return [(i, j) for i, j in self.pairs if i in self._indices and j in self._indices]

    def server(self, index: int) -> str:
        """Who serves a block: the approximation by name, or ``"built-in"``."""
        return str(self.approx.config.kind) if index in self._indices else "built-in"

    @property
    def makers(self) -> list[str]:
        """Who serves each block, with where it is written and who brought it."""
        own = component(self.approx)
        return [own if i in self._indices else "built-in curvature" for i in range(len(self.layers))]

    def _served(self, block: Block) -> bool:
        """By the approximation: it says so, and its moments can be made of such samples."""
        return self.approx.serves(block) and all(kind.serves(block) for kind in self.approx.moments)

    def start(self, like: Tensor) -> Moments:
        """Moments of all parts, all zero.

        Args:
            like: A tensor with the parameters' dtype and device.
        """
        if self.alone:
            return Moments(self.approx.moments, self.layers, like, self.pairs)
        return JoinedMoments(self.parts, self.layers, like, self.pairs)

    def factorise(self, moments: Moments) -> Factorisation:
        """What does not depend on gamma.

        Raises:
            NumericalError: Something failed; names the block.
            PluginError: The approximation raised what is no error of kfacore; names it.
        """
        if not isinstance(moments, JoinedMoments):
            with named(self.approx, self._own, "factorise"):
                return self.approx.factorise(moments)
        with named(self.approx, self._own, "factorise"):
            each = [part.curvature.factorise(own) for part, own in zip(self.parts, moments.each, strict=True)]
        return JoinedFactorisation(self, each)

    def damped(self, factorisation: Factorisation, gamma: Tensor, pi: PiRule | Tensor) -> Inverse:
        """The inverse at one gamma, or at one for each block; with a scalar for pi where `log_pi` tells something.

        Raises:
            NumericalError: Something failed; names the block.
            PluginError: The approximation raised what is no error of kfacore; names it.
        """
        with named(self.approx, self._own, "damped"):
            own = _gamma_of(gamma, self.parts[0]) if self.alone else gamma
            return factorisation.damped(own, pi=pi)  # type: ignore[arg-type]  # a scalar where it is understood

    def try_out(self, inverse: Inverse, like: Tensor) -> None:
        """Solve for ones and look at what comes: a wrong shape would only be noticed much later.

        Raises:
            PluginError: The approximation raised something, or returned what is no block; names both.
            NumericalError: A block is not finite; names it.
        """
        ones = [like.new_ones(layer.shape) for layer in self.layers]
        with named(self.approx, self._own, "solve"):
            solved = inverse.solve(ones)
        self.examine(solved, ones)

    def solve_into(self, inverse: Inverse, blocks: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """F-hat^-1 v written over ``out``.

        Raises:
            PluginError: The approximation raised what is no error of kfacore; names it.
        """
        with named(self.approx, self._own, "solve"):
            inverse.solve_into(blocks, out)

    def examine(self, solved: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
        """Check a solution block by block; waits for the device.

        Args:
            solved: F-hat^-1 of the gradient.
            gradient: What was solved for.

        Raises:
            PluginError: Another number of tensors, another shape or dtype; names component and block.
            NumericalError: A block is not finite although its gradient is; likewise.
        """
        examine(self.makers, self.layers, solved, gradient)

    def load_inverse(self, state: Mapping[str, Any]) -> Inverse:
        """Restore an inverse from its state, bit for bit."""
        if self.alone:
            return self.approx.load_inverse(state, self.layers)
        each = [
            part.curvature.load_inverse(saved, part.layers)
            for part, saved in zip(self.parts, state["parts"], strict=True)
        ]
        return JoinedInverse(self.layers, self.parts, each)
