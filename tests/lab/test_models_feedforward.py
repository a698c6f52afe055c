"""Feed-forward nets and the sparse initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfacore.errors import ConfigError
from kfacore.lab.models import autoencoder, mlp, sparse_init


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def kinds(model: nn.Sequential) -> list[str]:
    return [type(module).__name__ for module in model]


def test_autoencoder_has_a_linear_code_and_ends_with_z() -> None:
    model = autoencoder((8, 5, 2, 5, 8))
    assert kinds(model) == ["Linear", "Sigmoid", "Linear", "Linear", "Sigmoid", "Linear"]
    assert [(layer.in_features, layer.out_features) for layer in layers(model)] == [(8, 5), (5, 2), (2, 5), (5, 8)]


def test_mlp_units() -> None:
    assert kinds(mlp((4, 3, 2))) == ["Linear", "Tanh", "Linear"]
    assert kinds(mlp((4, 3, 3, 2), "relu", linear=(2,))) == ["Linear", "ReLU", "Linear", "Linear"]
    assert kinds(mlp((4, 2))) == ["Linear"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp((4,)), "at least an input and an output"),
        (lambda: mlp((4, 0, 2)), "1 or more"),
        (lambda: mlp((4, 3, 2), "logistics"), "did you mean 'logistic'"),
        (lambda: mlp((4, 3, 2), linear=(2,)), "numbered 1 to 1"),
        (lambda: autoencoder((4, 3, 3, 4)), "odd number"),
        (lambda: autoencoder((4, 2, 5)), "last equal to the first"),
    ],
)
def test_wrong_sizes_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()


def test_each_unit_gets_at_most_15_standard_normal_weights() -> None:
    model = mlp((400, 300, 200), "logistic")
    sparse_init(model, generator())
    for layer in layers(model):
        counts = (layer.weight != 0).sum(1)
        assert counts.max() == 15
        # drawn with replacement: with d inputs, 15 draws hit d (1 - (1 - 1/d)^15) positions on average
        d = layer.in_features
        expected = d * (1 - (1 - 1 / d) ** 15)
        assert abs(float(counts.float().mean()) - expected) < 0.1
        values = layer.weight.detach()[layer.weight != 0]
        assert abs(float(values.mean())) < 5.0 / len(values) ** 0.5
        assert abs(float(values.var()) - 1.0) < 5.0 * (2.0 / len(values)) ** 0.5
        assert not layer.bias.any()


def test_every_position_is_reached_and_the_last_draw_stays() -> None:
    model = nn.Linear(3, 500)
    sparse_init(model, generator(1))
    draws = generator(1)
    positions = torch.randint(3, (500, 15), generator=draws)
    values = torch.randn((500, 15), generator=draws, dtype=torch.float64)
    expected = torch.zeros(500, 3, dtype=torch.float64)
    for unit in range(500):
        for position, value in zip(positions[unit].tolist(), values[unit].tolist(), strict=True):
            expected[unit, position] = value
    assert torch.equal(model.weight, expected.float())


def test_tanh_units_are_scaled_and_shifted() -> None:
    tanh, plain = mlp((40, 30, 20, 10), "tanh"), mlp((40, 30, 20, 10), "logistic")
    sparse_init(tanh, generator(2))
    sparse_init(plain, generator(2))
    for layer, reference, scale, bias in zip(
        layers(tanh), layers(plain), (0.5, 0.25, 1.0), (0.5, 0.5, 0.0), strict=True
    ):
        assert torch.equal(layer.weight, scale * reference.weight)
        assert torch.equal(layer.bias, torch.full_like(layer.bias, bias))


def test_initialisation_depends_on_the_seed_alone() -> None:
    models = [mlp((9, 8, 7)) for _ in range(3)]
    models[1] = models[1].double()
    for model, seed in zip(models, (3, 3, 4), strict=True):
        sparse_init(model, generator(seed))
    first, double, other = (layers(model)[0].weight for model in models)
    assert torch.equal(first, double.float())
    assert not torch.equal(first, other)


def test_layers_without_bias_and_other_connections() -> None:
    model = nn.Sequential(nn.Linear(50, 40, bias=False), nn.Tanh(), nn.Linear(40, 3))
    sparse_init(model, generator(), connections=4)
    assert int((layers(model)[0].weight != 0).sum(1).max()) == 4
    assert layers(model)[0].weight.requires_grad
