"""Nets as a cost model sees them: parameters, tokens or examples a step, and the sides of the Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.nets import NETS
from kfacore.parallel.cores import owners

__all__ = ["NETS_BY_NAME", "Net", "Product", "chain"]


@dataclass(frozen=True)
class Product:
    """A block that is a Kronecker product.

    Attributes:
        d_in: Side of A, the bias's column included.
        d_out: Side of G.
        rows: Rows an example or token: positions of a convolution, else 1.
    """

    d_in: int
    d_out: int
    rows: float = 1.0

    @property
    def size(self) -> int:
        """Parameters."""
        return self.d_in * self.d_out

    @property
    def sides(self) -> tuple[int, int]:
        """Those of A and G."""
        return self.d_in, self.d_out


@dataclass(frozen=True)
class Net:
    """A net.

    Attributes:
        name: For tables.
        blocks: Its Kronecker products.
        others: Parameters that are none's.
        batch: Examples, or tokens, of a whole mini-batch.
    """

    name: str
    blocks: tuple[Product, ...]
    others: int
    batch: int

    @property
    def size(self) -> int:
        """P, all parameters."""
        return self.others + sum(block.size for block in self.blocks)

    @property
    def sides(self) -> list[int]:
        """Of all factors."""
        return [side for block in self.blocks for side in block.sides]

    @property
    def order(self) -> list[int]:
        """The sides as an optimizer divides them: all A, then all G."""
        return [block.d_in for block in self.blocks] + [block.d_out for block in self.blocks]

    def owned(self, costs: Sequence[float], ranks: int) -> list[list[int]]:
        """The sides in `order` that each of so many ranks owns, by their costs."""
        who = owners(costs, ranks)
        return [[d for d, owner in zip(self.order, who, strict=True) if owner == rank] for rank in range(ranks)]

    @property
    def products(self) -> float:
        """Multiplications and additions of a forward pass, an example."""
        return 2.0 * (self.others + sum(block.size * block.rows for block in self.blocks))


def chain(name: str, widths: Sequence[int], batch: int) -> Net:
    """Fully connected layers with biases."""
    return Net(name, tuple(Product(a + 1, b) for a, b in pairwise(widths)), 0, batch)


def _gpt(name: str, layers: int, width: int, tokens: int, context: int, batch: int) -> Net:
    """Bias-free: q, k, v and out of width x width, up and down of four times the width; the head is the embedding's."""
    block = [Product(width, width)] * 4 + [Product(width, 4 * width), Product(4 * width, width)]
    return Net(name, tuple(block * layers), (tokens + context + 2 * layers + 1) * width, batch)


def _residual() -> Net:
    """The convolutions of ResNet-50 on 224 x 224 (He et al. 2016); rows are positions of an image."""
    found = [Product(3 * 49, 64, 112.0**2)]
    before, side = 64, 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for i in range(depth):
            after = 4 * width
            inner = side if i or stage == 0 else side // 2
            found += [Product(before, width, side**2), Product(9 * width, width, inner**2)]
            found += [Product(width, after, inner**2)]
            found += [] if i else [Product(before, after, inner**2)]
            before, side = after, inner
    return Net("ResNet-50", (*found, Product(2049, 1000)), 53_120, 1024)


NETS_BY_NAME: dict[str, Net] = {
    "mnist": chain("mnist net", NETS["mnist"], 4000),
    "gpt": _gpt("GPT 124M", 12, 768, 50304, 512, 2**14),
    "gpt-1.3b": _gpt("GPT 1.3B", 24, 2048, 50304, 2048, 2**20),
    "resnet": _residual(),
}
"""What can be asked for."""
