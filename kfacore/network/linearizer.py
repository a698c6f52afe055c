"""From a model to its mini-batches: blocks, checks of the first mini-batch, forward passes, choice of path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfacore.errors import ConfigError, DataError, UnsupportedModelError, nearest
from kfacore.nest import cases_of, map_nest, slice_cases, tensors_of
from kfacore.network.blocks import ModelBlock, check_parameters, with_diagonals
from kfacore.network.capture import Chunk, capture, tells
from kfacore.network.checks import StrictChecks, require_outputs
from kfacore.network.draws import Draws
from kfacore.network.facts import Facts, Way, common_cases
from kfacore.network.finding import strict_blocks, unwrapped, whole_model
from kfacore.network.linearization import Before, Linearization, Path
from kfacore.network.misfit import MISFITS, misfit, require_sizes
from kfacore.network.outputs import Output
from kfacore.network.pairs import following
from kfacore.network.state import ModelState
from kfacore.network.study import Study
from kfacore.network.watched import Watched, materialise
from kfacore.roles.layer import Layer

__all__ = ["Linearizer"]

_TRIES = 3
"""Mini-batches that are looked at as long as their outputs are not finite."""


class Linearizer:
    """Turns mini-batches into linearizations of one model.

    Attributes:
        model: The model.
        layers: Its blocks; in execution order once the first mini-batch has been seen, and as that showed them. Empty
            before it if parameters are not initialised yet.
        names: Qualified names of the trainable parameters.
        named: The trainable parameters by qualified name.
        draws: The generators that it may draw from.
        output: Where z is in what it returns.
        facts: What its last look at a mini-batch showed; None before the first.
        notes: What was found out about its blocks, one line each.
        paths: How the last mini-batch served each block; None before the first.
        plain: Whether the fast path served all of the last mini-batch.
        following: Pairs of blocks that follow each other and could be coupled; None before the first mini-batch, and
            where all blocks are a chain.
        agree: What several processes make of what each found out about the model; all of them then look together.

    Args:
        model: Any module. A compiled one runs uncompiled here: torch supports neither hooks on its layers nor
            forward-mode through it. Wrappers for data parallelism are taken off.
        structure: With ``unsupported = "error"`` ``"chain"`` if the model must be a chain of layers, else ``"any"``.
        layers: The layer types, as the registry has them; the first that matches a module reads it.
        max_dim: A side of a Kronecker product that is wider is diagonal.
        unsupported: ``"serve"`` takes any model; ``"error"`` refuses all but Linear layers called once on one row a
            case, that draw nothing and do not mix cases.
        output: Where z is in what the model returns: a name, or a function.
        reduce: Names of blocks whose rows of a case are one: where a position's output is pooled over positions.
        tangents: Whether J v will be asked for; then it is found out how it can be taken.

    Raises:
        UnsupportedModelError: Some module cannot be preconditioned; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: str = "any",
        *,
        layers: Sequence[Layer] = (),
        max_dim: int = 8192,
        unsupported: Literal["serve", "error"] = "serve",
        output: Output = None,
        reduce: Sequence[str] = (),
        tangents: bool = True,
    ) -> None:
        self.model: nn.Module = unwrapped(model)
        self.structure = structure
        self.output = output
        self.facts: Facts | None = None
        self.notes: list[str] = []
        self.reduced: frozenset[int] = frozenset()
        self.ordered = False
        self.paths: list[Path] | None = None
        self.plain = False
        self.following: list[tuple[int, int]] | None = None
        self._types, self._max_dim, self._reduce, self._tangents = tuple(layers), max_dim, tuple(reduce), tangents
        self._strict = StrictChecks(self.model) if unsupported == "error" else None
        self._modes: tuple[bool, ...] | None = None
        self._several = False
        self._tries = 0
        self.agree: Callable[[Facts], Facts] | None = None
        self._pooled: set[str] = set()
        self._axes: dict[str, int | None] = {}
        self.layers: list[ModelBlock] = []
        self._lazy = any(is_lazy(each) for each in (*self.model.parameters(), *self.model.buffers()))
        self._watch()
        if not self._lazy:
            self._find()

    # --- what others ask --------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once, in order of registration."""
        return list(self.named.values())

    @property
    def cut(self) -> bool:
        """Whether mini-batches may be cut by cases."""
        return self.facts is None or self.facts.cut

    @property
    def mixes(self) -> bool:
        """Whether the outputs of a case depend on other cases."""
        return self.facts is not None and self.facts.mixes

    @property
    def way(self) -> Way:
        """How J v is taken."""
        return "forward" if self.facts is None else self.facts.way

    @property
    def reason(self) -> str:
        """Why J v is not taken in forward mode."""
        return "" if self.facts is None else self.facts.reason

    def cases(self, inputs: Any, targets: Tensor | None = None) -> int:
        """Number of cases: the first dimension that all tensors share, or that of the targets.

        Raises:
            DataError: There are no cases, or nothing tells how many.
        """
        require_sizes("inputs", inputs)
        require_sizes("targets", targets)
        told = isinstance(targets, Tensor) and targets.dim() > 0 and len(targets) > 0
        empty = isinstance(inputs, list | tuple | dict) and not inputs
        if self._strict is None and told and not empty and common_cases(inputs) is None:
            return len(targets)  # type: ignore[arg-type]  # a tensor
        return cases_of(inputs)

    def own_inputs(self, inputs: Any) -> Any:
        """The inputs, or copies of them for a model that writes into what it is given."""
        return map_nest(torch.clone, inputs) if self.facts is not None and self.facts.overwrites else inputs

    def changed(self) -> list[str]:
        """Parameters that were frozen, unfrozen, reshaped or replaced since the blocks were found, one line each."""
        return self._kept.changed()

    def moved(self) -> None:
        """Take up that the parameters are on another device or in another dtype.

        Raises:
            UnsupportedModelError: In one that cannot be served, or not all in the same.
        """
        check_parameters(self.layers)
        self.draws = Draws(self.model, self.layers[0].parameters[0].device)
        self._modes = None

    def set_order(self, names: Sequence[str], *, final: bool = True) -> None:
        """Take up the order of a saved state; blocks that it has as `diagonal` ones become so.

        Args:
            names: Of the blocks.
            final: Whether it is the order of execution; that of a state from before the first step is not, and the
                first mini-batch tells it.

        Raises:
            UnsupportedModelError: The model does not have exactly these blocks.
        """
        wanted = set(names)
        broken = {
            index: "so in the saved state"
            for index, block in enumerate(self.layers)
            if block.info.name not in wanted and {self.names[each] for each in block.parameters} <= wanted
        }
        layers = with_diagonals(self.layers, broken, self.names) if broken else self.layers
        known = {layer.info.name: layer for layer in layers}
        if set(known) != wanted:
            raise UnsupportedModelError(
                f"the saved optimizer state has layers {', '.join(names)}; this model has {', '.join(known)}"
            )
        self.layers = [known[name] for name in names]
        self.ordered = final

    # --- a mini-batch -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        inputs: Any,
        statistics_cases: int | None = None,
        low: torch.dtype | None = None,
        pulled_cases: int = 0,
        *,
        look: bool = False,
    ) -> Linearization:
        """Run the forward pass.

        Args:
            inputs: What the model takes: any nest; where all its tensors have the case as first dimension, and nothing
                else could belong to cases, the mini-batch can be cut.
            statistics_cases: How many of the first cases the estimator will use; all if left out.
            low: Run forward and backward passes under autocast to this dtype.
            pulled_cases: How many of the first cases `Linearization.pull_back` will be asked for.
            look: Find out about the model anew, whether that is due or not (`unsure`).

        Raises:
            UnsupportedModelError: The model cannot be linearised, or its parameters were changed; the message names
                what it is.
            DataError: There are no cases, or the inputs do not fit the model.
        """
        if any(tensor.dim() and tensor.shape[0] == 0 for tensor in tensors_of(inputs)) and common_cases(inputs) == 0:
            raise DataError("inputs: the mini-batch has no examples")
        if look:
            self._modes = None
        try:
            if self._lazy:
                materialise(self.model, inputs)
                self._lazy = False
                self._watch()
                self._find()
            self._kept.require()
            if self._strict is not None:
                return self._note(self._strict_call(self._strict, inputs, statistics_cases, low, pulled_cases))
            return self._note(self._serve(inputs, statistics_cases, low, pulled_cases))
        except MISFITS as error:
            refusal = misfit(self.model, inputs, error)
            if refusal is None:
                raise
            raise refusal from error

    def _serve(self, inputs: Any, kept: int | None, low: torch.dtype | None, pulled: int) -> Linearization:
        """Look at the model if that is due, and run it; once more if it has begun to draw."""
        self._look(inputs)
        least = not self.facts.draws  # type: ignore[union-attr]  # looked at above
        before = self.draws.state(least=least)
        batch = self._linearize(inputs, kept, low, pulled, before)
        if least and self.draws.moved(before):  # the model has begun to draw
            self.draws.restore(before)
            self._modes = None
            self._look(inputs)
            batch = self._linearize(inputs, kept, low, pulled, self.draws.state())
        return batch

    def _note(self, batch: Linearization) -> Linearization:
        """Keep how it was served, for whoever asks."""
        self.paths, self.plain = batch.paths, batch.plain
        return batch

    def _linearize(
        self, inputs: Any, kept: int | None, low: torch.dtype | None, pulled: int, before: dict[object, Any]
    ) -> Linearization:
        assert self.facts is not None
        facts = self.facts
        start = Before(before if facts.draws else None, ModelState(self.model) if facts.keeps else None)
        m = common_cases(inputs)
        if facts.cut and m is not None:
            n = m if kept is None else kept
            chunks = self.forward_chunks(inputs, sorted({0, n, max(n, pulled), m}), low)
        else:
            chunks = self.forward_chunks(inputs, (), low)
            n = chunks[0].z.shape[0] if kept is None else min(kept, chunks[0].z.shape[0])
        self._order(chunks)
        return Linearization(self, inputs, chunks, n, start, low)

    def forward_chunks(self, inputs: Any, bounds: Sequence[int], low: torch.dtype | None) -> list[Chunk]:
        """Forward passes of consecutive cases.

        Args:
            inputs: The mini-batch's inputs.
            bounds: Where they are cut, 0 and the number of cases included; empty for one pass.
            low: Autocast dtype.
        """
        cuts = [slice_cases(inputs, a, b) for a, b in pairwise(bounds)] if bounds else [inputs]
        chunks = [self._forward(part, low) for part in cuts]
        for chunk in chunks if self._axes else ():
            for layer, calls in zip(self.layers, chunk.calls, strict=True):
                for call in calls:
                    call.axis = self._axes.get(layer.info.name, 0)
        return chunks

    def _forward(self, inputs: Any, low: torch.dtype | None, output: Output = None) -> Chunk:
        return capture(
            lambda: self.model(self.own_inputs(inputs)),
            self.model,
            self.layers,
            like=self.layers[0].parameters[0],
            low=low,
            output=output or self.output,
        )

    def unsure(self, inputs: Any) -> bool:
        """Whether the next mini-batch would be looked at."""
        if self._strict is not None:
            return False
        m = common_cases(inputs)
        return self._due(tuple(module.training for module in self.model.modules()), m is None or m > 1)

    def _due(self, modes: tuple[bool, ...], several: bool) -> bool:
        known = self.facts is not None and modes == self._modes and (self._several or not several)
        return not known or bool(self._tries)

    def _look(self, inputs: Any) -> None:
        """Find out what kind of model this is: at first, and when some module was switched between train and eval."""
        modes = tuple(module.training for module in self.model.modules())
        m = common_cases(inputs)
        several = m is None or m > 1
        if not self._due(modes, several):
            return
        study = Study(self.model, self.layers, self.names, self.draws, self.output, inputs, self._tangents)
        facts = study.facts()
        if self.agree is not None:
            facts = self.agree(facts)
        first = self.facts is None
        self.facts, self._modes, self._several = facts, modes, several
        self._axes = {self.layers[index].info.name: axis for index, axis in facts.axes}
        self._tries = 0 if facts.settled else (self._tries or _TRIES) - 1
        if first or not self.ordered:
            self._take(facts)

    def _take(self, facts: Facts) -> None:
        """Blocks whose rows do not account for the gradient become `diagonal`; those that are pooled are reduced."""
        if self.ordered:
            pooled = set(facts.pooled)
        else:
            why = "its weights are used outside its own forward pass, so that its rows do not account for its gradient"
            names = [layer.info.name for layer in self.layers]
            pooled_names = {names[index] for index in facts.pooled}
            if facts.outside:
                self.notes += [f"{names[index]}: {why}" for index in sorted(facts.outside)]
                self.layers = with_diagonals(self.layers, dict.fromkeys(facts.outside, why), self.names)
            pooled = {index for index, layer in enumerate(self.layers) if layer.info.name in pooled_names}
        self._pooled = {self.layers[index].info.name for index in pooled}
        self._reduce_blocks()

    def _reduce_blocks(self) -> None:
        chosen = {*self._reduce, *self._pooled}
        self.reduced = frozenset(
            index for index, layer in enumerate(self.layers) if layer.info.name in chosen and layer.info.kind == "kron"
        )

    def _order(self, chunks: Sequence[Chunk]) -> None:
        """Blocks by first execution on the first mini-batch, the others after them; for a chain, what it must be."""
        if self.ordered:
            return
        called = chunks[0].order
        order = [*called, *(index for index in range(len(self.layers)) if index not in called)]
        self.layers = [self.layers[index] for index in order]
        for chunk in chunks:
            chunk.calls = [chunk.calls[index] for index in order]
        self.ordered = True
        self._reduce_blocks()
        self.following = following(self.layers, chunks[0], self.reduced)

    # --- the model's parameters -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Names, and what would show that the model was changed."""
        self._kept = Watched(self.model)
        self.named, self.names = self._kept.named, self._kept.names

    def _find(self) -> None:
        """The blocks, in order of registration."""
        if self._strict is not None:
            self.layers = strict_blocks(self.model)
        else:
            self.layers = whole_model(self.model, self._types, self._max_dim)
        self.tells = any(tells(user) for layer in self.layers for user in layer.users)
        self.draws = Draws(self.model, self.layers[0].parameters[0].device)
        self._reduce_blocks()
        known = {layer.info.name for layer in self.layers}
        unknown = [name for name in self._reduce if name not in known]
        if unknown:
            raise ConfigError(f"reduce names {', '.join(unknown)}, which is no block; {nearest(unknown[0], known)}")

    # --- unsupported = "error" --------------------------------------------------------------------------------------

    def _strict_call(
        self, strict: StrictChecks, inputs: Any, kept: int | None, low: torch.dtype | None, pulled: int
    ) -> Linearization:
        m = cases_of(inputs)
        n = m if kept is None else kept
        bounds = sorted({0, n, max(n, pulled), m})
        chunks = [self._strict_forward(strict, slice_cases(inputs, a, b), low) for a, b in pairwise(bounds)]
        if strict.due(m):
            first = chunks[0] if low is None else self._strict_forward(strict, slice_cases(inputs, 0, n), None)
            strict.check(inputs, first, self.layers, m, chain=self.structure == "chain")
        return Linearization(self, inputs, chunks, n, low=low)

    def _strict_forward(self, strict: StrictChecks, inputs: Any, low: torch.dtype | None) -> Chunk:
        cases = cases_of(inputs)
        with strict.rows_only(self.layers):
            chunk = self._forward(inputs, low, lambda found: require_outputs(found, cases))
        strict.check_calls(self.layers, chunk, ordered=self.ordered)
        if not self.ordered:
            self.layers = [self.layers[index] for index in chunk.order]
            chunk.calls = [chunk.calls[index] for index in chunk.order]
            self.ordered = True
        return chunk
