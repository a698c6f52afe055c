"""Architectures as users write them, nothing set: steps lower the loss, gradients are autograd's, blocks cover all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from any_network import by_name, seed
from torch import nn
from zoo_images import IMAGES
from zoo_sequences import SEQUENCES

from kfacore import KFAC
from kfacore.network import BlockVector, read_output

pytestmark = [  # of torch itself
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
]
ZOO = {**IMAGES, **SEQUENCES}
COUPLED = [name for index, name in enumerate(ZOO) if index % 2 == 0]


def build(name: str) -> tuple[nn.Module, Any, Any, Any]:
    seed()
    return ZOO[name]()


def names_in(params: tuple[str, ...]) -> list[str]:
    return [param.partition("[")[0] for param in params]


@pytest.mark.parametrize(("name", "approx"), [*((n, "blockdiag") for n in ZOO), *((n, "tridiag") for n in COUPLED)])
def test_steps_lower_the_loss_and_every_parameter_has_its_block(name: str, approx: str) -> None:
    model, x, y, likelihood = build(name)
    optimizer = KFAC(model, likelihood=likelihood, approx=approx)
    losses = [float(optimizer.step(x, y).loss) for _ in range(5)]
    assert losses[-1] < losses[0]
    blocks = [layer.info for layer in optimizer.linearizer.layers]
    listed = [param for block in blocks for param in block.params]
    assert len(set(listed)) == len(listed)
    whole = {name for name, parameter in optimizer.model.named_parameters() if parameter.requires_grad}
    assert {param for block in blocks for param in names_in(block.params)} == whole
    assert sum(block.size for block in blocks) == sum(optimizer.linearizer.named[n].numel() for n in whole)


@pytest.mark.parametrize("name", ZOO)
def test_the_gradient_is_autograds(name: str) -> None:
    model, x, _, likelihood = build(name)
    linearizer = KFAC(model, likelihood=likelihood).linearizer
    linearizer(x)  # the first look; lazy modules get their shapes
    model = linearizer.model
    buffers = [buffer.clone() for buffer in model.buffers()]
    seed(1)
    batch = linearizer(x)
    v = [torch.randn(z.shape, generator=torch.Generator().manual_seed(1)) for z in batch.outputs()]
    found = by_name(linearizer, batch.gradient(v, BlockVector.zeros(linearizer.layers)))
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    seed(1)
    z = read_output(model(x), linearizer.output)
    z.backward(torch.cat(v))
    wanted = {
        name: parameter.grad.to_dense() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    scale = max(float(g.abs().max()) for g in wanted.values())
    for parameter, g in found.items():
        assert float((g - wanted.get(parameter, torch.zeros_like(g))).abs().max()) < 2e-5 * scale, parameter
