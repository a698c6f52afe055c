"""Any network against itself: the plain model, run from the same generators and buffers, is the truth."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import dense
import numpy as np
import torch
from torch import Tensor, nn

from kfacore.nest import map_nest
from kfacore.network import BlockVector, Linearization, Linearizer, read_output
from kfacore.registry import get_registry

STEP = 1e-6


def linearizer(model: nn.Module, *given: Any, **options: Any) -> Linearizer:
    """With every registered layer type, as the optimizer makes it."""
    return Linearizer(model, *given, layers=get_registry().layers(), **options)


def seed(value: int = 0) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)  # the global generator is what models may draw from


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


def scattered(model: nn.Module) -> nn.Module:
    """In double precision, every parameter random."""
    generator = torch.Generator().manual_seed(5)
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def direction(found: Linearizer) -> tuple[BlockVector, dict[str, Tensor]]:
    """A random direction, as blocks and by names of parameters."""
    vector = BlockVector.zeros(found.layers)
    for index, block in enumerate(vector.blocks):
        block.copy_(dense.randn(*block.shape, seed=50 + index))
    return vector, by_name(found, vector)


def by_name(found: Linearizer, vector: BlockVector) -> dict[str, Tensor]:
    """What a vector holds for every parameter; zero where no block has an entry."""
    tensors = {name: torch.zeros_like(p, requires_grad=False) for name, p in found.named.items()}
    for block, matrix in zip(found.layers, vector.blocks, strict=True):
        views = block.view(lambda p: tensors[found.names[p]])
        for view, part in zip(views, block.split(matrix), strict=True):
            view.add_(part)
    return tensors


def plain(model: nn.Module, inputs: Any, moved: Mapping[str, Tensor] | None = None, by: float = 0.0) -> Tensor:
    """Outputs of a copy from the seeds on, its parameters moved along a direction."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, step in (moved or {}).items():
            twin.get_parameter(name).add_(step, alpha=by)
    seed()
    with torch.no_grad():
        return read_output(twin(map_nest(torch.clone, inputs))).detach()


def check(
    build: Callable[[], nn.Module], inputs: Any, kept: int | None = None, tolerance: float = 1e-6, **options: Any
) -> tuple[Linearizer, Linearization]:
    """Loss, gradient, J v, generators, buffers and `again` of one step are those of the plain model."""
    model = build()
    truth = copy.deepcopy(model)
    seed()
    z = read_output(truth(map_nest(torch.clone, inputs)))
    after = generators()
    v = dense.randn(*z.shape, seed=3)
    wanted = dict(
        zip(
            [name for name, p in truth.named_parameters() if p.requires_grad],
            torch.autograd.grad(z, [p for p in truth.parameters() if p.requires_grad], v, allow_unused=True),
            strict=True,
        )
    )
    before = copy.deepcopy(model)
    seed()
    found = linearizer(model, **options)
    batch = found(inputs, kept)
    assert generators() == after, "the user's generators must end where one forward pass leaves them"
    for (name, buffer), other in zip(model.named_buffers(), truth.buffers(), strict=True):
        assert torch.equal(buffer, other), f"{name} must move once"
    assert dense.relative(torch.cat(batch.outputs()), z.detach()) < 1e-12

    vectors = torch.split(v, [len(part) for part in batch.outputs()])
    grad = by_name(found, batch.gradient(vectors, BlockVector.zeros(found.layers), retain=True))
    for name, g in wanted.items():
        g = torch.zeros_like(grad[name]) if g is None else g
        assert float((grad[name] - g).abs().max()) < 1e-10 * (1 + float(g.abs().max())), name

    vector, tensors = direction(found)
    differences = (plain(before, inputs, tensors, STEP) - plain(before, inputs, tensors, -STEP)) / (2 * STEP)
    J = batch.jvp([vector.blocks, vector.blocks])
    assert dense.relative(J[0], differences) < tolerance
    assert torch.equal(J[0], J[1])
    left, right = (v * J[0]).sum(), sum((grad[name] * step).sum() for name, step in tensors.items())
    assert abs(float(left - right)) < 1e-9 * float(v.norm() * J[0].norm())
    n = batch.model_cases(max(1, batch.cases // 2))
    assert dense.relative(batch.jvp([vector.blocks], n), J[:1, :n]) < 1e-10

    moved = generators()
    with torch.no_grad():
        for name, step in tensors.items():
            model.get_parameter(name).add_(step, alpha=0.1)
    buffers = [buffer.clone() for buffer in model.buffers()]
    again = batch.again()
    assert generators() == moved
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert dense.relative(again, plain(before, inputs, tensors, 0.1)) < 1e-12
    return found, batch
