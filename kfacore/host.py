"""What host and device are good at: where a number is read for nothing, what is fast, how exact products are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

__all__ = ["full_precision", "is_free", "products_are_fast", "seed_generators"]


def is_free(value: Tensor) -> bool:
    """Whether reading a number costs no wait: on a device everything before it has to be waited for."""
    return value.device.type == "cpu"


def products_are_fast(device: torch.device) -> bool:
    """Whether some twenty products of matrices take less time than an eigenproblem.

    On a CPU they take five times as long; on a GPU a tenth for factors of 500 and half for 3,072 (H100, float32).
    """
    return device.type != "cpu"


def seed_generators(seed: int) -> None:
    """Seed torch's global generators, as `torch.manual_seed` does.

    Without a device that is the CPU's alone, for `torch.manual_seed` loads torch's compiler, which takes seconds, and
    keeps the stack of its caller for every kind of device that is not there.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


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
