"""Whatever stands in for a mini-batch: a step is taken, or refused in our words with the parameters untouched."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from fuzzing import examples, refused_or
from hypothesis import strategies as st
from torch import Tensor, nn

from kfacore import KFAC
from kfacore.errors import ConfigError, DataError, NumericalError

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8, torch.int8,
    torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64, torch.float8_e4m3fn,
]  # fmt: skip
VALUES = [0, 1, 2, 3, -1, -100, 255, 2**40, 0.5, -0.0, 1e-40, 1e30, -1e38, float("nan"), float("inf"), float("-inf")]


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if kind == "cnn":
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    if kind == "tokens":
        return nn.Sequential(nn.Embedding(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    return nn.Sequential(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Dropout(0.1))


def inputs_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "tokens":
        return torch.randint(4, (8, 2), generator=generator)
    return torch.randn(8, 1, 2, 3, generator=generator) if kind == "cnn" else torch.randn(8, 4, generator=generator)


def targets_of(kind: str, likelihood: str) -> Tensor:
    labels = torch.arange(16).reshape(8, 2) % 3 if kind == "tokens" else torch.arange(8) % 3
    if likelihood == "categorical":
        return labels
    return nn.functional.one_hot(labels, 3).float()


@st.composite
def spoiled(draw: st.DrawFn, tensor: Tensor) -> Any:
    """A tensor that is as it should be, or is not: in values, dtype, shape, layout, device or type."""
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.sampled_from(["value", "all", "dtype", "shape", "rows", "layout", "view", "grad"])):
            case "value" if tensor.numel():
                tensor = tensor.clone()
                value = draw(st.sampled_from(VALUES))
                place = draw(st.integers(0, tensor.numel() - 1))
                tensor.reshape(-1)[place] = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
            case "all":
                value = torch.tensor(draw(st.sampled_from(VALUES)), dtype=torch.float64)
                tensor = value.to(tensor.dtype).expand(tensor.shape).clone()  # torch adds no unsigned integers
            case "dtype":
                dtype = draw(st.sampled_from(DTYPES))  # torch warns once of an imaginary part that is lost
                tensor = (tensor.real if tensor.is_complex() and not dtype.is_complex else tensor).to(dtype)
            case "shape":
                change = draw(st.sampled_from(["column", "row", "flat", "scalar", "transposed", "wide", "narrow"]))
                tensor = reshaped(tensor, change)
            case "rows":
                count = draw(st.sampled_from([0, 1, 2, 7, 16]))
                tensor = torch.cat([tensor] * 2)[:count] if tensor.dim() else tensor
            case "view":
                tensor = tensor[:1].expand_as(tensor) if tensor.dim() and len(tensor) else tensor.contiguous()
            case "grad" if tensor.is_floating_point():
                tensor = tensor.detach().clone().requires_grad_()
    return form(tensor, draw(st.sampled_from(["tensor"] * 6 + [*FORMS])))


def reshaped(tensor: Tensor, change: str) -> Tensor:
    match change:
        case "column":
            return tensor.unsqueeze(-1)
        case "row":
            return tensor.unsqueeze(0)
        case "flat":
            return tensor.reshape(-1)
        case "scalar":
            return tensor.reshape(-1)[0] if tensor.numel() else tensor
        case "transposed":
            return tensor.transpose(0, -1) if tensor.dim() else tensor
        case "wide":
            return torch.cat([tensor, tensor], -1) if tensor.dim() else tensor
    return tensor[..., :1]


FORMS = ("meta", "sparse", "nested", "quantised", "list", "tuple", "dict", "numbers", "none", "text", "numpy", "pair")


def form(tensor: Tensor, kind: str) -> Any:
    """The tensor as something else."""
    simple = tensor.detach()
    match kind:
        case "meta":
            return simple.to("meta")
        case "sparse" if simple.dtype in (torch.float32, torch.int64):
            return simple.to_sparse()
        case "nested" if simple.dim() > 1 and simple.dtype == torch.float32:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch calls them a prototype
                return torch.nested.nested_tensor(list(simple))
        case "quantised" if simple.dtype == torch.float32 and bool(simple.isfinite().all()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch is about to give them up
                return torch.quantize_per_tensor(simple, 0.1, 0, torch.quint8)
        case "list":
            return [simple]
        case "tuple":
            return ()
        case "dict":
            return {"x": simple}
        case "numbers":
            return [1.0, 2.0]
        case "none":
            return None
        case "text":
            return "data"
        case "numpy" if simple.dtype in (torch.float32, torch.int64):
            return simple.numpy()
        case "pair":
            return (simple, simple)
    return tensor


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Of parameters that have a shape yet; a refused mini-batch may have given it to others."""
    named = model.named_parameters()
    return {name: each.detach().clone() for name, each in named if not nn.parameter.is_lazy(each)}


@examples(st.sampled_from(["mlp", "cnn", "tokens", "lazy"]), st.sampled_from(LIKELIHOODS), st.integers(0, 2), st.data())
def test_a_step_is_taken_or_refused_in_our_words(kind: str, likelihood: str, before: int, data: st.DataObject) -> None:
    model, x, y = net(kind), inputs_of(kind), targets_of(kind, likelihood)
    optimizer = KFAC(model, likelihood=likelihood)
    for _ in range(before):
        optimizer.step(x, y)
    parameters = whole(model)
    batch = data.draw(spoiled(x), "inputs"), data.draw(spoiled(y), "targets")
    _, refusal = refused_or(lambda: optimizer.step(*batch))
    if refusal is None:
        assert all(bool(each.isfinite().all()) for each in model.parameters())
    else:
        assert isinstance(refusal, ConfigError | DataError | NumericalError), repr(refusal)
        after = whole(model)
        assert all(torch.equal(value, after[name]) for name, value in parameters.items())
    shaped = kind != "lazy" or before > 0  # else the mini-batch may have given the net another width
    if shaped and not isinstance(refusal, NumericalError):  # of what overflowed, the statistics remember
        assert bool(torch.isfinite(optimizer.step(x, y).loss))
