"""The suite of layer types finds planted errors, and its message points at the cause."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_plugins.layers.attention import Attention
from kfac_plugins.layers.linear import LinearLayer
from kfac_plugins.layers.norm import Norm
from kfacore.roles import Block, Layer, Use
from kfacore.testing import LayerSuite
from kfacore.testing.layer import Arguments

Float = torch.float64


class LinearSuite(LayerSuite):
    name = "linear"
    shape = (3, 4)

    def module(self) -> nn.Module:
        return nn.Linear(4, 2)


class NormSuite(LayerSuite):
    name = "norm"
    shape = (3, 4)

    def module(self) -> nn.Module:
        return nn.LayerNorm(4)


class AttentionSuite(LayerSuite):
    name = "attention"

    def module(self) -> nn.Module:
        return nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.2)

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        x = torch.randn(n, 3, 4, generator=generator, dtype=Float)
        return (x, x, x), {}


class TestLinear(LinearSuite):
    """The suites themselves pass; norms and attention do in the tests of the built-in layer types."""


def check(suite: type[LayerSuite], layer: type[Layer] | None, test: str, **arguments: Any) -> None:
    """Run one test of a suite for a layer type, for the registered one if left out."""

    class Checked(suite):  # type: ignore[valid-type, misc]
        def build(self, **options: Any) -> Any:
            return super().build() if layer is None else layer()

    getattr(Checked(), test)(**arguments)


# --- what it reads -------------------------------------------------------------------------------------------------


class MatchesNothing(LinearLayer):
    def matches(self, module: nn.Module) -> bool:
        return False


class MatchesAll(LinearLayer):
    def matches(self, module: nn.Module) -> bool:
        return True


class MatchesSubclasses(LinearLayer):
    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)


class Changing(LinearLayer):
    """Its block, changed."""

    @abstractmethod
    def change(self, block: Block) -> list[Block]:
        """What the mutant makes of it."""

    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        return [each for block in super().blocks(name, module) for each in self.change(block)]


class NoBlocks(Changing):
    def change(self, block: Block) -> list[Block]:
        return []


class TwoOfOneName(Changing):
    def change(self, block: Block) -> list[Block]:
        return [block, block]


class StrangeName(Changing):
    def change(self, block: Block) -> list[Block]:
        return [replace(block, name="linear")]


class StrangeParameter(Changing):
    def change(self, block: Block) -> list[Block]:
        return [replace(block, params=(*block.params, block.name + ".scale"))]


class StrangeSlice(Changing):
    def change(self, block: Block) -> list[Block]:
        return [replace(block, params=("m.weight[0:1][2]",))]


class Shared(Changing):
    def change(self, block: Block) -> list[Block]:
        return [block, replace(block, name=f"{block.name}.again", params=(block.name + ".weight[1:2]",))]


class Dotted(Changing):
    def change(self, block: Block) -> list[Block]:
        return [replace(block, name=f"{block.name}.weight")]


class CopiedView(LinearLayer):
    def view(self, *arguments: Any) -> list[Tensor]:
        return [t.clone() for t in super().view(*arguments)]


class CopiedSplit(LinearLayer):
    def split(self, *arguments: Any) -> list[Tensor]:
        return [t.clone() for t in super().split(*arguments)]


class TurnedSplit(LinearLayer):
    def split(self, *arguments: Any) -> list[Tensor]:
        weight, bias = super().split(*arguments)
        return [weight.T, bias]


class ViewWithoutBias(LinearLayer):
    def view(self, *arguments: Any) -> list[Tensor]:
        return super().view(*arguments)[:1]

    def split(self, *arguments: Any) -> list[Tensor]:
        return super().split(*arguments)[:1]


# --- rows ----------------------------------------------------------------------------------------------------------


class FlatRows(LinearLayer):
    def rows(self, *arguments: Any) -> Tensor:
        return super().rows(*arguments).flatten(0, 1)


class FlatGradients(LinearLayer):
    def gradients(self, *arguments: Any) -> Tensor:
        return super().gradients(*arguments).flatten(0, 1).unsqueeze(0)


class SummedNorm(Norm):
    def gradients(self, *arguments: Any) -> Tensor:
        return super().gradients(*arguments).sum(0)


class NumbersAsCounts(LinearLayer):
    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        return torch.ones(use.inputs.shape[:2])


class Silent(LinearLayer):
    def uses(self, *arguments: Any) -> list[Use]:
        return []


class AttachedInputs(Norm):
    def uses(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> list[Use]:
        return [Use("", args[0].requires_grad_(), output, {})]


class DetachedOutput(LinearLayer):
    def uses(self, *arguments: Any) -> list[Use]:
        return [replace(use, output=use.output.detach()) for use in super().uses(*arguments)]


class NoHomogeneousOne(LinearLayer):
    def rows(self, *arguments: Any) -> Tensor:
        rows = super().rows(*arguments).clone()
        rows[..., -1] = 0.0
        return rows


class OnlyFirstPosition(LinearLayer):
    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        return (torch.arange(use.inputs.shape[1]) == 0).expand(use.inputs.shape[:2])


class Centred(Norm):
    def rows(self, *arguments: Any) -> Tensor:
        return super().rows(*arguments) + 0.1


class OtherCases(LinearLayer):
    """The sum over all cases is right."""

    def rows(self, *arguments: Any) -> Tensor:
        return super().rows(*arguments).roll(1, 0)

    def gradients(self, *arguments: Any) -> Tensor:
        return super().gradients(*arguments).roll(1, 0)


class WholeBatch(LinearLayer):
    """Reads cases off the output, which is not cut."""

    def rows(self, block: Block, module: nn.Module, use: Use) -> Tensor:
        return super().rows(block, module, use) * (len(use.inputs) / len(use.output))


class CountsOfSeveral(LinearLayer):
    def counts(self, block: Block, module: nn.Module, use: Use) -> Tensor | None:
        return None if len(use.inputs) < 3 else torch.ones(use.inputs.shape[:2], dtype=torch.bool)


class Single(LinearLayer):
    def rows(self, *arguments: Any) -> Tensor:
        return super().rows(*arguments).float()


class UncoveredBias(Changing):
    def change(self, block: Block) -> list[Block]:
        return [block]

    def view(self, block: Block, module: nn.Module, tensors: Any) -> list[Tensor]:
        weight, bias = super().view(block, module, tensors)
        return [weight, bias[:1]]

    def split(self, *arguments: Any) -> list[Tensor]:
        weight, bias = super().split(*arguments)
        return [weight, bias[:1]]


# --- frozen parameters, a forward of its own, manners --------------------------------------------------------------


class Freezeless(LinearLayer):
    def blocks(self, name: str, module: nn.Module) -> Sequence[Block]:
        return [Block(name, 5, 2, True, params=(f"{name}.weight", f"{name}.bias"))]


class TellsAll(Attention):
    """Tells also of maps that are no blocks."""

    def tell(self, module: nn.Module, emit: Any) -> Any:
        return replace(super().tell(module, emit), parts=frozenset({"q", "k", "v", "out_proj"}))


class Forward(Attention):
    """A forward of its own, changed."""

    @abstractmethod
    def change(self, own: Any, module: Any) -> Any:
        """What the mutant makes of it."""

    def forward(self, module: nn.Module, emit: Any) -> Any:
        return self.change(super().forward(module, emit), module)


class Larger(Forward):
    def change(self, own: Any, module: Any) -> Any:
        return lambda *arguments: tuple(1.001 * t for t in own(*arguments))


class WithoutWeights(Forward):
    def change(self, own: Any, module: Any) -> Any:
        return lambda *arguments: own(*arguments)[:1]


class CutGradients(Forward):
    def change(self, own: Any, module: Any) -> Any:
        return lambda x, *rest: own(x.detach(), *rest)


class Undropped(Forward):
    def change(self, own: Any, module: Any) -> Any:
        def forward(*arguments: Any) -> Any:
            module.dropout, kept = 0.0, module.dropout
            try:
                return own(*arguments)
            finally:
                module.dropout = kept

        return forward


class Kept(Forward):
    """Takes its parameters once and for all."""

    def change(self, own: Any, module: Any) -> Any:
        first = {name: p.detach().clone() for name, p in module.named_parameters()}
        call = nn.MultiheadAttention.forward

        class Other(nn.Module):
            def forward(self, *arguments: Any) -> Any:
                vars(module).pop("forward", None)
                return torch.func.functional_call(Bare(module), {f"m.{k}": v for k, v in first.items()}, arguments)

        class Bare(nn.Module):
            def __init__(self, m: nn.Module) -> None:
                super().__init__()
                self.m = m

            def forward(self, *arguments: Any) -> Any:
                return call(self.m, *arguments)

        def forward(*arguments: Any) -> Any:
            kept = vars(module).get("forward")
            try:
                return Other()(*arguments)
            finally:
                if kept is not None:
                    vars(module)["forward"] = kept

        return forward


class Hooked(LinearLayer):
    def uses(self, module: nn.Module, *arguments: Any) -> list[Use]:
        module.register_forward_hook(lambda *_: None)
        return super().uses(module, *arguments)


class Marking(LinearLayer):
    def uses(self, module: nn.Module, *arguments: Any) -> list[Use]:
        module.seen = True
        return super().uses(module, *arguments)


class OwnParametersOnly(LinearLayer):
    def uses(self, module: nn.Module, *arguments: Any) -> list[Use]:
        return super().uses(module, *arguments) if isinstance(module.weight, nn.Parameter) else []


class Moving(LinearLayer):
    def uses(self, module: nn.Module, *arguments: Any) -> list[Use]:
        with torch.no_grad():
            module.get_parameter("bias").add_(1.0)
        return super().uses(module, *arguments)


class Drawing(LinearLayer):
    def matches(self, module: nn.Module) -> bool:
        return bool(torch.rand(()) < 2) and super().matches(module)


READS = "test_matches_its_module"
NAMES = "test_blocks_name_their_parameters"
VIEWS = "test_views_are_aligned_and_share_memory"
SHAPES = "test_shapes_of_rows_gradients_and_counts"
GRAPH = "test_uses_keep_no_graph_of_their_inputs"
SUMS = "test_rows_times_gradients_are_the_gradient"
ALONE = "test_rows_of_a_case_give_the_gradient_of_that_case"
CUT = "test_a_use_can_be_cut_to_its_first_cases"
DTYPE = "test_dtype_and_device_are_kept"
FROZEN = "test_frozen_parameters_belong_to_no_block"
FORWARD = "test_own_forward_equals_the_modules"
TANGENT = "test_own_forward_has_forward_mode_and_reads_parameters_by_name"
OTHERS = "test_uses_are_told_while_others_stand_in_for_parameters"
MANNERS = "test_the_module_is_left_as_it_was"

MUTANTS: list[tuple[type[LayerSuite], type[Layer], str, str]] = [
    (LinearSuite, MatchesNothing, READS, "says no to Linear"),
    (LinearSuite, MatchesAll, READS, "says yes to nn.Identity"),
    (LinearSuite, MatchesSubclasses, READS, "computes something else"),
    (LinearSuite, NoBlocks, NAMES, "no block although"),
    (LinearSuite, TwoOfOneName, NAMES, "two blocks of one name"),
    (LinearSuite, StrangeName, NAMES, "must be called that"),
    (LinearSuite, StrangeParameter, NAMES, "names 'scale', which is no parameter"),
    (LinearSuite, StrangeSlice, NAMES, r"neither a parameter's name nor one with \[start:stop\]"),
    (LinearSuite, Shared, NAMES, "two blocks share entries of weight"),
    (LinearSuite, Dotted, NAMES, "a module without a name has the block '.weight'"),
    (LinearSuite, CopiedView, VIEWS, "views must share memory with the tensors"),
    (LinearSuite, CopiedSplit, VIEWS, "parts of split must share memory"),
    (LinearSuite, TurnedSplit, VIEWS, r"view has shapes .*, split \[\(4, 2\)"),
    (LinearSuite, ViewWithoutBias, VIEWS, r"changed \['weight'\], params names \['bias', 'weight'\]"),
    (LinearSuite, FlatRows, SHAPES, "rows must be"),
    (LinearSuite, FlatGradients, SHAPES, "gradients must be"),
    (NormSuite, SummedNorm, SHAPES, "gradients must be"),
    (LinearSuite, NumbersAsCounts, SHAPES, "counts must be bool"),
    (LinearSuite, Silent, SHAPES, "told of no use"),
    (NormSuite, AttachedInputs, GRAPH, "inputs and extras must be detached"),
    (LinearSuite, DetachedOutput, GRAPH, "cut off from the graph"),
    (LinearSuite, NoHomogeneousOne, SUMS, "is not the gradient"),
    (LinearSuite, OnlyFirstPosition, SUMS, "is not the gradient"),
    (NormSuite, Centred, SUMS, "is not the gradient"),
    (LinearSuite, UncoveredBias, SUMS, "entries of 'bias' with a gradient have no view"),
    (LinearSuite, OtherCases, ALONE, "is not the gradient of case 0 alone"),
    (LinearSuite, WholeBatch, CUT, "depend on the other cases"),
    (LinearSuite, CountsOfSeveral, CUT, "counts depend on the other cases"),
    (LinearSuite, Single, DTYPE, "torch.float32 on cpu for a module in torch.float64"),
    (LinearSuite, Freezeless, FROZEN, "'weight', which is frozen"),
    (AttentionSuite, TellsAll, FROZEN, "which are no blocks"),
    (AttentionSuite, Larger, FORWARD, "differs from the module's in its outputs"),
    (AttentionSuite, WithoutWeights, FORWARD, "has 1 outputs, the module's 2"),
    (AttentionSuite, CutGradients, FORWARD, "differs from the module's in its gradients"),
    (AttentionSuite, Undropped, FORWARD, r"differs from the module's in its outputs .* \(training mode\)"),
    (AttentionSuite, Kept, TANGENT, "J v through the layer type's forward is off"),
    (LinearSuite, OwnParametersOnly, OTHERS, "told of no use"),
    (LinearSuite, Hooked, MANNERS, "a hook stays on the module"),
    (LinearSuite, Marking, MANNERS, "another attribute than before"),
    (LinearSuite, Moving, MANNERS, "'bias' of the module is not what a call of its own leaves"),
    (LinearSuite, Drawing, MANNERS, "drew from torch's generator"),
]


def arguments_of(test: str) -> dict[str, Any]:
    if test == SUMS:
        return {"n": None}
    return {"dtype": Float, "device": "cpu"} if test == DTYPE else {}


@pytest.mark.parametrize(("suite", "layer", "test", "message"), MUTANTS, ids=[m[1].__name__ for m in MUTANTS])
def test_planted_errors_are_found(suite: type[LayerSuite], layer: type[Layer], test: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(suite, layer, test, **arguments_of(test))
    check(suite, None, test, **arguments_of(test))


def test_every_test_of_the_suite_has_a_planted_error() -> None:
    own: dict[str, Callable[..., Any]] = {n: f for n, f in vars(LayerSuite).items() if n.startswith("test_")}
    assert {m[2] for m in MUTANTS} == set(own)
