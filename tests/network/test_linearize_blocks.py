"""A parameter vector stored once: its blocks and parts are views of one flat tensor, whose padding stays zero."""

from __future__ import annotations

import pytest
import torch
from dense import net, randn

from kfacore.network import find_layers
from kfacore.network.vectors import BlockVector

SIZES = (70, 63, 5, 3)  # homogeneous widths 71 (padded to 80), 64 (a multiple of 16 already) and 6 (narrow, unpadded)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layers(request):
    return find_layers(net(SIZES, bias=request.param))


def filled(layers):
    vector = BlockVector.zeros(layers)
    blocks = [randn(*layer.info.shape, seed=index) for index, layer in enumerate(layers)]
    return vector.copy_blocks(blocks), blocks


def test_blocks_take_the_values(layers):
    vector, blocks = filled(layers)
    assert [tuple(block.shape) for block in vector.blocks] == [layer.info.shape for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(vector.blocks, blocks, strict=True))
    assert not BlockVector.zeros(layers).flat.any()


def test_parts_have_the_shapes_of_the_parameters_and_are_views(layers):
    vector, blocks = filled(layers)
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    assert [part.shape for part in vector.parts] == [parameter.shape for parameter in parameters]
    assert torch.equal(vector.parts[0], blocks[0][:, : SIZES[0]])
    if layers[0].info.bias:
        assert torch.equal(vector.parts[1], blocks[0][:, -1])
    vector.flat.mul_(2.0)
    assert torch.equal(vector.parts[0], 2.0 * blocks[0][:, : SIZES[0]])
    vector.parts[-1].zero_()
    assert vector.blocks[-1].count_nonzero() < blocks[-1].numel()


def test_dot_products_of_flat_are_those_of_the_blocks(layers):
    vector, blocks = filled(layers)
    torch.testing.assert_close(vector.flat @ vector.flat, sum(block.square().sum() for block in blocks))
    assert int(vector.flat.count_nonzero()) == sum(block.numel() for block in blocks)


def test_only_wide_rows_are_padded_to_multiples_of_16():
    layers = find_layers(net(SIZES))
    vector = BlockVector.zeros(layers)
    assert [block.stride(0) for block in vector.blocks] == [80, 64, 6]
    assert vector.flat.numel() == 63 * 80 + 5 * 64 + 3 * 6
    assert vector.flat.dtype == torch.float64
    assert all(block.storage_offset() == start for block, start in zip(vector.blocks, (0, 5040, 5360), strict=True))
