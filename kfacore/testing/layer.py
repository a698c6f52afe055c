"""The conformance suite of layer types."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from kfacore.host import seed_generators
from kfacore.nest import map_nest, slice_cases, tensors_of
from kfacore.roles.layer import Use
from kfacore.testing.base import ComponentSuite, devices, differs
from kfacore.testing.layer_run import NAME, Run, parameters_of

__all__ = ["LayerSuite"]

Float = torch.float64
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LayerSuite(ComponentSuite):
    """Tests of a layer type. Set `name` and `shape`, and define `module`.

    Attributes:
        shape: Of one case's input. Modules that take something else define `arguments`.
        cases: Cases of a mini-batch.
        mixes_cases: Whether outputs of a case depend on other cases, as in batch norm; cases are then not run alone.
        training: Mode in which the module is run; False where draws would be others for a case alone.
        tolerance: Relative error that counts as none, in double precision.
    """

    slot = "layer"
    shape: ClassVar[tuple[int, ...]] = ()
    cases: ClassVar[int] = 4
    mixes_cases: ClassVar[bool] = False
    training: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-10

    @abstractmethod
    def module(self) -> nn.Module:
        """A module that the layer type reads; small, its parameters of any values."""

    def arguments(self, n: int, generator: torch.Generator) -> Arguments:
        """Positional and named arguments of a call with n cases, floating-point ones in double precision."""
        return (torch.randn(n, *self.shape, generator=generator, dtype=Float),), {}

    def case(self, arguments: Arguments, i: int) -> Arguments:
        """The arguments of the i-th case alone."""
        args, kwargs = slice_cases(arguments, i, i + 1)
        return args, kwargs

    def results(self, output: Any) -> list[Tensor]:
        """The tensors of an output that gradients come from, cases first."""
        return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]

    # --- what it reads ---------------------------------------------------------------------------------------------

    def test_matches_its_module(self) -> None:
        """And no module whose forward is somebody else's."""
        layer, module = self.build(), self._module()
        assert layer.matches(module) is True, f"matches says no to {type(module).__name__}"
        assert not layer.matches(nn.Identity()), "matches says yes to nn.Identity"

        own: Any = type(module).forward

        def doubled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return map_nest(lambda t: 2 * t, own(self, *args, **kwargs))

        module.__class__ = type(type(module).__name__, (type(module),), {"forward": doubled})
        assert not layer.matches(module), "matches says yes to a subclass whose forward computes something else"

    def test_blocks_name_their_parameters(self) -> None:
        """Names are unique, parameters exist, and no entry belongs to two blocks."""
        module = self._module()
        blocks = self.build().blocks(NAME, module)
        assert blocks, "no block although every parameter is trained"
        names = [block.name for block in blocks]
        assert len(set(names)) == len(names), f"two blocks of one name: {', '.join(names)}"
        seen = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        for block in blocks:
            right = block.name == NAME or block.name.startswith(f"{NAME}.")
            assert right, f"block '{block.name}' of a module '{NAME}' must be called that, or that with '.part'"
            for local, rows in parameters_of(block):
                assert local in seen, f"block '{block.name}' names '{local}', which is no parameter of the module"
                seen[local][rows] += 1
        twice = [name for name, count in seen.items() if bool((count > 1).any())]
        assert not twice, f"two blocks share entries of {', '.join(twice)}"
        (root,) = [b.name for b in self.build().blocks("", module)][:1]
        assert not root.startswith("."), f"a module without a name has the block '{root}'"

    def test_views_are_aligned_and_share_memory(self) -> None:
        """A step through `view` and `split` lands in the parameters, entry for entry."""
        layer, module = self.build(), self._module()
        for block in layer.blocks(NAME, module):
            tensors = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
            matrix = self._random(block.shape, 3)
            views, parts = layer.view(block, module, tensors), layer.split(block, module, matrix)
            shapes = [[tuple(t.shape) for t in each] for each in (views, parts)]
            assert shapes[0] == shapes[1], f"{block.name}: view has shapes {shapes[0]}, split {shapes[1]}"
            for view, part in zip(views, parts, strict=True):
                view.add_(part)
            named = {local for local, _ in parameters_of(block)}
            touched = {name for name, t in tensors.items() if bool(t.any())}
            assert touched == named, (
                f"{block.name}: adding to its views changed {sorted(touched) or 'no parameter'}, params names "
                f"{sorted(named)}: views must share memory with the tensors"
            )
            for part in parts:
                part.zero_()
            rest = int(matrix.count_nonzero())
            moved = sum(int(t.count_nonzero()) for t in tensors.values())
            assert moved + rest == block.size, f"{block.name}: parts of split must share memory with the matrix"

    # --- rows and gradients ----------------------------------------------------------------------------------------

    def test_shapes_of_rows_gradients_and_counts(self) -> None:
        """(n, R, [groups,] d): as `kfacore.roles.LayerSamples` wants them."""
        run = self._run()
        for block in run.blocks:
            groups = (block.groups,) if block.groups > 1 else ()
            for use, g in zip(run.of(block), run.gradients(block), strict=True):
                G = run.layer.gradients(block, run.module, use, g)
                if block.kind == "full":
                    wanted: tuple[int, ...] = (self.cases, *groups, block.d_in)
                    assert tuple(G.shape) == wanted, f"{block.name}: gradients must be {wanted}, found {tuple(G.shape)}"
                    continue
                wanted = (self.cases, G.shape[1], *groups, block.d_out)
                assert tuple(G.shape) == wanted, f"{block.name}: gradients must be {wanted}, found {tuple(G.shape)}"
                X = run.layer.rows(block, run.module, use)
                rows = (*wanted[:-1], block.d_in) if X.is_floating_point() else wanted[:2]
                assert tuple(X.shape) == rows, f"{block.name}: rows must be {rows}, found {tuple(X.shape)}"
                counts = run.layer.counts(block, run.module, use)
                if counts is not None:
                    right = tuple(counts.shape) == wanted[:2] and counts.dtype == torch.bool
                    assert right, f"{block.name}: counts must be bool {wanted[:2]}, found {counts.dtype} {counts.shape}"

    def test_uses_keep_no_graph_of_their_inputs(self) -> None:
        """Inputs and extras are detached, outputs are not."""
        for use in self._run().uses:
            loose = [use.inputs, *use.extras.values()]
            assert not any(t.requires_grad for t in loose), f"use '{use.part}': inputs and extras must be detached"
            assert use.output.requires_grad, f"use '{use.part}': its output is cut off from the graph"

    @pytest.mark.parametrize("n", [1, None], ids=["one case", "several"])
    def test_rows_times_gradients_are_the_gradient(self, n: int | None) -> None:
        """The sum over uses and rows of g abar^T against autograd by the parameters."""
        if n == 1 and self.mixes_cases:
            n = 2
        run = self._run(n=n)
        run.compare(self.tolerance, run.sums(), self._wanted(run.module, run))

    def test_rows_of_a_case_give_the_gradient_of_that_case(self) -> None:
        """Against the module run on each case alone."""
        if self.mixes_cases:
            return
        run, arguments = self._run(), self._arguments()
        sums = {block.name: run.per_case(block) for block in run.blocks}
        for i in range(self.cases):
            args, kwargs = self.case(arguments, i)
            alone = Run(run.layer, run.module, self.results(run.module(*args, **kwargs)), [], [])
            alone.vectors = [v[i : i + 1] for v in run.vectors]
            wanted = self._wanted(run.module, alone)
            cases = {name: each[i] for name, each in sums.items()}
            run.compare(self.tolerance, cases, wanted, f"of case {i} alone")

    def test_a_use_can_be_cut_to_its_first_cases(self) -> None:
        """Rows, gradients and counts of the first cases are the first of all."""
        run = self._run()
        for block in run.blocks:
            for use, g in zip(run.of(block), run.gradients(block), strict=True):
                cut = use.first(2)
                pairs: list[Any] = [(run.layer.gradients(block, run.module, u, h) for u, h in ((cut, g[:2]), (use, g)))]
                pairs.append(run.layer.rows(block, run.module, u) for u in (cut, use))
                pairs.append(run.layer.counts(block, run.module, u) for u in (cut, use))
                for found, whole in pairs:
                    if found is None or whole is None:
                        assert found is whole, f"{block.name}: counts depend on the other cases of a use"
                        continue
                    right = found.shape == whole[:2].shape and differs(found, whole[:2]) < self.tolerance
                    assert right, f"{block.name}: rows of a case depend on the other cases of its use"

    @pytest.mark.parametrize("device", devices())
    @pytest.mark.parametrize("dtype", [torch.float32, Float], ids=str)
    def test_dtype_and_device_are_kept(self, dtype: torch.dtype, device: str) -> None:
        """As those of the module."""
        run = self._run(dtype=dtype, device=device)
        for block in run.blocks:
            for use, g in zip(run.of(block), run.gradients(block), strict=True):
                found = [run.layer.gradients(block, run.module, use, g)]
                if block.kind == "kron":
                    X = run.layer.rows(block, run.module, use)
                    found += [X] if X.is_floating_point() else []
                for t in found:
                    here = (t.dtype, t.device.type) == (dtype, device)
                    assert here, f"{block.name}: {t.dtype} on {t.device} for a module in {dtype} on {device}"

    # --- frozen parameters -----------------------------------------------------------------------------------------

    def test_frozen_parameters_belong_to_no_block(self) -> None:
        """Each in turn; what is left is read as before."""
        for frozen in dict(self._module().named_parameters()):
            module = self._module()
            module.get_parameter(frozen).requires_grad_(False)
            run = self._run(module=module)
            for block in run.blocks:
                named = [local for local, _ in parameters_of(block)]
                assert frozen not in named, f"block '{block.name}' names '{frozen}', which is frozen"
            strays = [use.part for use in run.uses if not any(use in run.of(block) for block in run.blocks)]
            whole = set(strays) <= {""} and not run.blocks
            assert whole or not strays, f"with '{frozen}' frozen there are uses of {strays}, which are no blocks"
            run.compare(self.tolerance, run.sums(), self._wanted(module, run), f"{frozen} frozen")
        for p in module.parameters():
            p.requires_grad_(False)
        assert not self.build().blocks(NAME, module), "there are blocks although every parameter is frozen"

    # --- a forward of its own --------------------------------------------------------------------------------------

    def test_own_forward_equals_the_modules(self) -> None:
        """Values, structure, gradients by parameters and inputs, draws and buffers."""
        for training in (True, False):
            found = [self._called(training, own=own) for own in (False, True)]
            for what, a, b in zip(("outputs", "gradients", "buffers"), *found, strict=True):
                assert len(a) == len(b), f"the layer type's forward has {len(b)} {what}, the module's {len(a)}"
                for wanted, got in zip(a, b, strict=True):
                    assert wanted.shape == got.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
                    error = differs(got, wanted)
                    assert error < self.tolerance, (
                        f"the layer type's forward differs from the module's in its {what} by {error:.1e} relative "
                        f"({'training' if training else 'eval'} mode)"
                    )

    def test_own_forward_has_forward_mode_and_reads_parameters_by_name(self) -> None:
        """v^T (J d) through `torch.func.functional_call` against (J^T v)^T d at other parameters."""
        run = self._run()
        own = run.layer.forward(run.module, lambda use: None)
        if own is None:
            return
        args, kwargs = self._arguments()
        there = {name: p.detach() + 0.1 for name, p in run.module.named_parameters()}
        tangents = {name: self._random(tuple(p.shape), 7 + i) for i, (name, p) in enumerate(there.items())}
        other = copy.deepcopy(run.module)
        other.load_state_dict({**other.state_dict(), **there})
        with self._seeded():
            at = Run(run.layer, other, self.results(other(*args, **kwargs)), run.vectors, [])
        wanted = sum(float((g * tangents[name]).sum()) for name, g in self._wanted(other, at).items())
        vars(run.module)["forward"] = own  # as the network installs it
        try:

            def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
                return self.results(functional_call(run.module, parameters, args, kwargs))

            with (
                self._seeded(),
                warnings.catch_warnings(),
            ):  # torch compiles its rules of forward mode with a deprecated function
                warnings.simplefilter("ignore", DeprecationWarning)
                pair: Any = jvp(outputs, (there,), (tangents,))
            found = sum(float((v * t).sum()) for v, t in zip(run.vectors, pair[1], strict=True))
        finally:
            del vars(run.module)["forward"]
        error = abs(found - wanted) / max(abs(wanted), 1e-30)
        assert error < 1e-8, f"J v through the layer type's forward is off by {error:.1e} relative"

    def test_uses_are_told_while_others_stand_in_for_parameters(self) -> None:
        """Under `torch.func.functional_call` the module's parameters are plain tensors."""
        layer, module, uses = self.build(), self._module(), list[Use]()
        args, kwargs = self._arguments()
        there = {name: (p.detach() + 0.1).requires_grad_() for name, p in module.named_parameters()}
        own = layer.forward(module, uses.append)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            uses.extend(layer.uses(module, args, kwargs, output))

        if own is None:
            module.register_forward_hook(hook, with_kwargs=True)
        else:
            vars(module)["forward"] = own
        results = self.results(functional_call(module, there, args, kwargs))
        vectors = [self._random(tuple(z.shape), 11 + i) for i, z in enumerate(results)]
        run = Run(layer, module, results, vectors, uses)
        gradients = torch.autograd.grad(
            run.value(), list(there.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        wanted = dict(zip(there, gradients, strict=True))
        run.compare(self.tolerance, run.sums(), wanted, "at other parameters")

    # --- manners ---------------------------------------------------------------------------------------------------

    def test_the_module_is_left_as_it_was(self) -> None:
        """Hooks, attributes, parameters, buffers and torch's generator."""
        layer, module, twin = self.build(), self._module(), self._module()
        args, kwargs = self._arguments()
        state = torch.get_rng_state()
        layer.matches(module)
        layer.blocks(NAME, module)
        layer.forward(module, lambda use: None)
        assert torch.equal(state, torch.get_rng_state()), "matches, blocks or forward drew from torch's generator"
        with self._seeded():
            run = self._run(module=module)
            for block in run.blocks:
                run.per_case(block)
        with self._seeded():
            twin(*args, **kwargs)
        for name, wanted in twin.state_dict().items():
            error = differs(module.state_dict()[name], wanted)
            assert error < self.tolerance, f"'{name}' of the module is not what a call of its own leaves"
        for mine, theirs in zip(module.modules(), twin.modules(), strict=True):
            kept = {key: value for key, value in vars(theirs).items() if key.endswith("_hooks")}
            left = {key: value for key, value in vars(mine).items() if key.endswith("_hooks")}
            assert kept == left, "a hook stays on the module"
            assert vars(mine).keys() == vars(theirs).keys(), "the module has another attribute than before"

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _module(self, dtype: torch.dtype = Float, device: str = "cpu") -> nn.Module:
        """The author's module with random parameters: scales of 1 and biases of 0 would hide errors."""
        with self._seeded():
            module = self.module().train(self.training).to(device, dtype)
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.3 * torch.randn(p.shape).to(p))
        return module

    def _arguments(self, n: int | None = None) -> Arguments:
        return self.arguments(self.cases if n is None else n, torch.Generator().manual_seed(1))

    def _run(
        self,
        *,
        n: int | None = None,
        module: nn.Module | None = None,
        dtype: torch.dtype = Float,
        device: str = "cpu",
    ) -> Run:
        """A call whose uses are told."""
        layer, module = self.build(), module or self._module(dtype, device)
        args, kwargs = map_nest(
            lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), self._arguments(n)
        )  # fmt: skip
        uses: list[Use] = []
        own = layer.forward(module, uses.append)
        output = (own or module)(*args, **kwargs)
        if own is None:
            uses += layer.uses(module, args, kwargs, output)
        results = self.results(output)
        vectors = [self._random(tuple(z.shape), 11 + i).to(z) for i, z in enumerate(results)]
        return Run(layer, module, results, vectors, uses)

    def _called(self, training: bool, *, own: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Outputs, gradients and buffers of a call by the module's own forward or by the layer type's."""
        module = self._module().train(training)
        leaves: list[Tensor] = list(module.parameters())

        def leaf(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            leaves.append(t.requires_grad_())
            return t

        args, kwargs = map_nest(leaf, self._arguments())
        forward = self.build().forward(module, lambda use: None) if own else None
        with self._seeded():
            output = (forward or module)(*args, **kwargs)
        results = self.results(output)
        value = torch.stack([(self._random(tuple(z.shape), 5) * z).sum() for z in results]).sum()
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return [t.detach() for t in tensors_of(output)], list(gradients), list(module.buffers())

    def _wanted(self, module: nn.Module, run: Run) -> dict[str, Tensor]:
        """The gradient by every parameter, from autograd."""
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            return {}
        grads = torch.autograd.grad(
            run.value(), list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(named, grads, strict=True))

    @staticmethod
    def _random(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=Float)

    @staticmethod
    @contextmanager
    def _seeded() -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            seed_generators(0)
            yield
