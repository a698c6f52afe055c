"""What the card is and what it can do at most: rates of copies and products, and how fast kernels are launched."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.part import Part, median_ms

__all__ = ["measure"]


def measure(part: Part) -> None:
    """One table of what it is, one of its rates."""
    if part.cuda:
        found = torch.cuda.get_device_properties(part.device)
        described = {"card": found.name, "memory GB": found.total_memory / 1e9, "CUDA": torch.version.cuda}
    else:
        described = {"card": "cpu", "memory GB": None, "CUDA": None}
    part.row("machine", **described, torch=torch.__version__, threads=torch.get_num_threads())
    size, entries = (64, 10**4) if part.small else (8192, 2**30)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        part.attempt("rates", f"product, {dtype}", partial(_product, part, dtype, size))
    if part.cuda:
        part.attempt("rates", "product, tf32", partial(_tf32, part, size))
    part.attempt("rates", "copy", partial(_copy, part, entries))
    part.attempt("rates", "launches", partial(_launches, part, 10 if part.small else 1000))


def _row(part: Part, what: str, rate: float, unit: str) -> None:
    part.row("rates", what=what, rate=rate, unit=unit)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _product(part: Part, dtype: torch.dtype, size: int, name: str = "") -> None:
    a, b = (torch.randn(size, size, device=part.device).to(dtype) for _ in range(2))
    ms = median_ms(lambda: a @ b, part.device, times=3 if dtype == torch.float64 else 10)
    _row(part, f"product of {size}, {name or _name(dtype)}", 2.0 * size**3 / ms / 1e9, "TFLOP/s")


def _tf32(part: Part, size: int) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _product(part, torch.float32, size, "tf32")
    finally:
        torch.set_float32_matmul_precision(before)


def _copy(part: Part, entries: int) -> None:
    a = torch.rand(entries, device=part.device)
    b = torch.empty_like(a)
    ms = median_ms(lambda: b.copy_(a), part.device, times=10)
    _row(part, "copy, bytes read and written", 2.0 * a.nbytes / ms / 1e6, "GB/s")


def _launches(part: Part, count: int) -> None:
    """Additions to one number, one after another: the most launches that Python gets off."""
    x = torch.zeros((), device=part.device)

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    _row(part, "small operations, one after another", count / median_ms(many, part.device, times=5) / 1e3, "million/s")
