"""Who makes which factor: within 15% of an even split on nets that people train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kfacore.parallel.division import owners

LIMIT = 1.15


def mnist() -> list[int]:
    """The paper's autoencoder, 784-1000-500-250-30 and back: inputs with a bias, outputs."""
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    return [*(d + 1 for d in sizes[:-1]), *sizes[1:]]


def gpt(layers: int = 12, width: int = 768) -> list[int]:
    """Query, key, value and output, up and down of each layer."""
    each = [width + 1] * 5 + [4 * width + 1] + [width] * 5 + [4 * width]
    return each * layers


def resnet() -> list[int]:
    """ResNet-50: bottlenecks of 1 x 1, 3 x 3 and 1 x 1 convolutions without bias, and the classifier."""
    return [d for pair in _resnet() for d in pair]


def _resnet() -> Iterator[tuple[int, int]]:
    yield 3 * 49, 64
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield channels, width
            yield 9 * width, width
            yield width, 4 * width
            if block == 0:
                yield channels, 4 * width
            channels = 4 * width
    yield 2049, 1000


@pytest.mark.parametrize("dims", [mnist(), gpt(), resnet()], ids=["mnist", "gpt", "resnet"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_busiest_has_little_more_than_its_share(dims: list[int], ranks: int) -> None:
    costs = [float(d) ** 3 for d in dims]
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners(costs, ranks), strict=True):
        loads[owner] += cost
    assert max(loads) <= LIMIT * sum(costs) / ranks
