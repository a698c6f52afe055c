"""bfloat16 forward and backward passes beside float32 algebra; compiled models; torch's autocast around a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfacore import KFAC, ConfigError
from kfacore.lab.models import autoencoder, sparse_init
from kfacore.network import BlockVector, Linearizer

SIZES = (12, 9, 4, 9, 12)


def net() -> nn.Module:
    model = autoencoder(SIZES)
    sparse_init(model, torch.Generator().manual_seed(0), connections=5)
    return model


def batches(count: int = 24) -> Tensor:
    return (torch.rand(count, 64, 12, generator=torch.Generator().manual_seed(1)) > 0.5).float()


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def train(model: nn.Module, steps: int = 24, **options: Any) -> tuple[KFAC, list[float]]:
    optimizer = KFAC(model, likelihood="bernoulli", approx="tridiag", **options)
    return optimizer, [float(optimizer.step(x, x).loss) for x in batches(steps)]


def close(x: Tensor, y: Tensor, tolerance: float) -> bool:
    return float((x - y).norm() / y.norm()) < tolerance


def test_passes_are_low_and_results_are_not() -> None:
    """Within a few units of bfloat16's rounding (2^-8) of the full passes, and in the parameters' dtype."""
    model, x = net(), batches(1)[0]
    linearizer = Linearizer(model)
    linearizer(x, 16)  # the first one checks the model
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    full, low = linearizer(x, 16), linearizer(x, 16, torch.bfloat16)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    v = [torch.ones_like(z) / len(x) for z in full.outputs()]
    directions = [[torch.ones(layer.info.shape) for layer in linearizer.layers]]
    found: list[list[Tensor]] = []
    for batch in (full, low):
        samples = batch.backpropagate(v[0].unsqueeze(0))
        tangents = batch.jvp(directions, 24)  # more than the statistics' cases: both forward passes
        grad = batch.gradient(v, BlockVector.zeros(linearizer.layers))
        found.append([*batch.outputs(), *(s.inputs for s in samples), *(s.gradients for s in samples), tangents])
        found[-1] += grad.blocks
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert close(other, one, 0.05)
    assert not torch.equal(found[0][0], found[1][0])


def test_factors_and_state_keep_the_parameters_dtype() -> None:
    optimizer, _ = train(net(), autocast="bfloat16")
    assert optimizer.preconditioner is not None
    values = optimizer.preconditioner.state_dict()["moments"]["values"]
    assert {value.dtype for tensors in values.values() for value in tensors} == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in optimizer.model.parameters())


def test_training_follows_full_precision() -> None:
    """With strong damping, so that rounding is not amplified: the same progress up to a twentieth."""
    options: dict[str, Any] = {"damping": {"kind": "fixed", "lambda0": 1.0}}
    _, full = train(net(), **options)
    _, low = train(net(), autocast="bfloat16", **options)
    progress = full[0] - full[-1]
    assert full != low
    assert progress > 0.1 * full[0]
    assert abs(low[-1] - full[-1]) < 0.05 * progress


def test_rho_is_measured_in_full_precision() -> None:
    """In a step that adapts lambda both objectives come from full passes."""
    model = net()
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    optimizer, _ = train(model, 4, autocast="bfloat16", trust={"kind": "undo", "settling": 1})
    assert torch.bfloat16 in seen
    seen.clear()
    x = batches(5)[4]
    report = optimizer.step(x, x)
    assert report.rho is not None
    assert set(seen) == {torch.float32}


def test_autocast_around_the_step_means_the_same() -> None:
    inside, outside = net(), net()
    train(inside, autocast="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        train(outside)
    assert torch.equal(parameters(inside), parameters(outside))


def test_float16_is_refused() -> None:
    x = batches(1)[0]
    optimizer = KFAC(net(), likelihood="bernoulli")
    with torch.autocast("cpu", torch.float16), pytest.raises(ConfigError, match=r"bfloat16, found torch\.float16"):
        optimizer.step(x, x)
    with pytest.raises(ConfigError, match="autocast must be 'bfloat16' or left out, found 'float16'"):
        KFAC(net(), likelihood="bernoulli", autocast="float16")


@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
def test_a_compiled_model_trains_like_the_original(how: str) -> None:
    """Whatever was compiled runs uncompiled inside a step; layers keep their names where the whole was compiled."""
    plain, model = net(), net()
    compiled: nn.Module = model
    if how == "whole":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model[0].compile(backend="eager")
    train(plain)
    optimizer, _ = train(compiled)
    assert torch.equal(parameters(plain), parameters(model))
    names = [layer.info.name for layer in optimizer.linearizer.layers]
    assert not any("_orig_mod" in name for name in names)
    x = batches(1)[0]
    assert torch.allclose(compiled(x), plain(x))
