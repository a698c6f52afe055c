"""Products in full precision for a while: what is compared up to rounding must not be rounded to ten bits first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision() -> Iterator[None]:
    """No TensorFloat-32 in here, neither in convolutions, where torch allows it by default, nor in products.

    Its products are off by up to a thousandth, as much as rows that do not account for a gradient may be; a GPU's
    convolutions would then be told from what they are by luck. Settings that torch refuses to tell, since a program set
    them in two ways, are left alone. Can decorate a function.
    """
    convolutions: bool | None = None
    products: str | None = None
    with suppress(RuntimeError):
        convolutions = torch.backends.cudnn.allow_tf32
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    try:
        if convolutions:
            torch.backends.cudnn.allow_tf32 = False
        if products not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if convolutions:
            torch.backends.cudnn.allow_tf32 = True
        if products is not None and products != "highest":
            torch.set_float32_matmul_precision(products)
