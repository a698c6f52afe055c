r"""Invariance to affine reparameterisations of activities and pre-activations (paper, section 10).

For invertible Omega_0 .. Omega_{L-1} (on abar, homogeneous 1 included) and Phi_1 .. Phi_L, the transformed net

    abar'_0 = Omega_0 abar_0,   s'_i = W'_i abar'_{i-1},   abar'_i = Omega_i [phi_i(Phi_i s'_i); 1],   z = Phi_L s'_L

computes the same function as the original one if W_i = Phi_i W'_i Omega_{i-1}. Without damping, both approximations
take the same path through function space in both nets (Theorem 1, Corollary 2). Corollary 3: in the net whose
activities are centred and white and whose gradients are white, the block-diagonal update is plain gradient descent.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfacore.errors import UnsupportedModelError
from kfacore.optim.kfac import KFAC
from kfacore.roles.samples import LayerSamples

__all__ = [
    "Agreement",
    "FunctionPath",
    "Transform",
    "TransformedChain",
    "agreement",
    "function_path",
    "logistic_twin",
    "random_transform",
    "whitening",
]


@dataclass(frozen=True)
class Transform:
    """Omega_{i-1} and Phi_i of each layer i.

    Attributes:
        omega: One a layer, (d_in, d_in), acting on the layer's input abar.
        phi: One a layer, (d_out, d_out), acting on what the layer puts out.
    """

    omega: tuple[Tensor, ...]
    phi: tuple[Tensor, ...]


class TransformedChain(nn.Module):
    """The transformed net: its layers take the homogeneous abar as it comes, so they are linear without bias.

    Args:
        model: A chain: `nn.Sequential` of `nn.Linear` and modules without parameters; copied.
        transform: Omega and Phi of each linear layer.

    Raises:
        UnsupportedModelError: The model is no such chain, or a matrix does not fit or has no inverse.
    """

    def __init__(self, model: nn.Module, transform: Transform) -> None:
        super().__init__()
        before, stages = _chain(model)
        count = len(stages)
        if len(transform.omega) != count or len(transform.phi) != count:
            raise UnsupportedModelError(
                f"the model has {count} layers, the transform {len(transform.omega)} Omega and {len(transform.phi)} Phi"
            )
        self.before = copy.deepcopy(before)
        self.homogeneous = [linear.bias is not None for linear, _ in stages]
        self.linears, self.units = nn.ModuleList(), nn.ModuleList()
        for i, (linear, units) in enumerate(stages):
            W = _block(linear)
            omega, phi = transform.omega[i].to(W), transform.phi[i].to(W)
            _check(f"Omega_{i}", omega, W.shape[1])
            _check(f"Phi_{i + 1}", phi, W.shape[0])
            transformed = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype, device=W.device)
            with torch.no_grad():
                transformed.weight.copy_(torch.linalg.solve(phi, torch.linalg.solve(omega, W, left=False)))
            self.linears.append(transformed)
            self.units.append(copy.deepcopy(units))
            self.register_buffer(f"omega{i}", omega)
            self.register_buffer(f"phi{i}", phi)

    def forward(self, x: Tensor) -> Tensor:
        """z, (n, o)."""
        a: Tensor = self.before(x)
        for i, (linear, units) in enumerate(zip(self.linears, self.units, strict=True)):
            if self.homogeneous[i]:
                a = torch.cat([a, a.new_ones(a.shape[0], 1)], dim=1)
            a = units(linear(a @ self._omega(i).T) @ self._phi(i).T)
        return a

    def _omega(self, i: int) -> Tensor:
        return self.get_buffer(f"omega{i}")

    def _phi(self, i: int) -> Tensor:
        return self.get_buffer(f"phi{i}")


def random_transform(model: nn.Module, generator: torch.Generator, spread: float = 0.7) -> Transform:
    """Dense random invertible matrices: orthogonal times a diagonal times orthogonal.

    Args:
        model: A chain, as for `TransformedChain`.
        generator: A CPU generator.
        spread: Singular values lie in exp(-spread) .. exp(spread); 0 gives rotations.
    """

    def matrix(d: int) -> Tensor:
        left, right = (
            torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0] for _ in range(2)
        )
        scale = torch.exp(spread * (2.0 * torch.rand(d, generator=generator, dtype=torch.float64) - 1.0))
        result: Tensor = (left * scale) @ right
        return result

    shapes = [_block(linear).shape for linear, _ in _chain(model)[1]]
    return Transform(tuple(matrix(d_in) for _, d_in in shapes), tuple(matrix(d_out) for d_out, _ in shapes))


def whitening(samples: Sequence[LayerSamples]) -> Transform:
    """The transform of Corollary 3: activities centred and white, gradients white.

    With mu and C the mean and covariance of the activities and G = E[g g^T],

        Omega = [[C^-1/2, -C^-1/2 mu], [0, 1]]        Phi = G^-1/2

    so that in the transformed net E[abar' abar'^T] = I and E[g' g'^T] = I.

    Args:
        samples: What the layers saw at the parameters in question. A layer whose inputs are not homogeneous (without
            bias) is whitened without centring.

    Raises:
        UnsupportedModelError: A factor is singular.
    """
    omegas, phis = [], []
    for index, sample in enumerate(samples):
        n = sample.cases
        a = sample.inputs
        if bool((a[:, -1] == 1.0).all()) and a.shape[1] > 1:
            mu = a[:, :-1].mean(0)
            centred = a[:, :-1] - mu
            root = _inverse_root(centred.T @ centred / n, f"activities of layer {index + 1}")
            omega = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
            omega[:-1, :-1] = root
            omega[:-1, -1] = -root @ mu
        else:
            omega = _inverse_root(a.T @ a / n, f"activities of layer {index + 1}")
        g = sample.gradients.flatten(0, 1)
        omegas.append(omega)
        phis.append(_inverse_root(g.T @ g / n, f"gradients of layer {index + 1}"))
    return Transform(tuple(omegas), tuple(phis))


def logistic_twin(model: nn.Module) -> nn.Sequential:
    """The net with logistic units that computes the same function as one with tanh units.

    tanh(s) = 2 sigmoid(2 s) - 1, so Phi = 2 I for hidden layers and Omega maps [a; 1] to [2 a - 1; 1]: both disappear
    into the weights and biases of a plain net (Corollary 2).

    Raises:
        UnsupportedModelError: Some unit is not tanh, or a layer above one has no bias.
    """
    before, stages = _chain(model)
    modules: list[nn.Module] = [copy.deepcopy(before)]
    for i, (linear, units) in enumerate(stages):
        last = i == len(stages) - 1
        if [type(unit) for unit in units] != ([] if last else [nn.Tanh]) or linear.bias is None:
            raise UnsupportedModelError(
                "a logistic twin needs a chain of nn.Linear with bias and nn.Tanh between them, ending with nn.Linear"
            )
        twin = copy.deepcopy(linear)
        with torch.no_grad():
            W, b = linear.weight.detach(), linear.bias.detach()
            if i > 0:
                W, b = 2.0 * W, b - W.sum(1)
            scale = 1.0 if last else 2.0
            twin.weight.copy_(scale * W)
            twin.bias.copy_(scale * b)
        modules.append(twin)
        if not last:
            modules.append(nn.Sigmoid())
    return nn.Sequential(*modules)


@dataclass(frozen=True)
class FunctionPath:
    """The way of a net through function space.

    Attributes:
        outputs: z on the cases before the first step and after each step, (n, o).
        notices: Factors that needed jitter, without repetition. Such a step is damped even where no damping was asked
            for, and Theorem 1 does not hold for it.
    """

    outputs: tuple[Tensor, ...]
    notices: tuple[str, ...]


def function_path(model: nn.Module, inputs: Any, targets: Tensor, steps: int, **options: Any) -> FunctionPath:
    """Outputs on the cases before and after each of some steps of `kfacore.KFAC` on these same cases.

    Args:
        model: The model; a copy is trained.
        inputs: The cases.
        targets: Their targets.
        steps: Number of steps.
        **options: Options of `KFAC`, whose preset is "paper" if none is given: nothing truncated. Without damping:
            ``damping={"kind": "fixed", "lambda0": 0.0}, weight_decay=0.0``.
    """
    model = copy.deepcopy(model)
    optimizer = KFAC(model, **{"preset": "paper", **options})
    outputs: list[Tensor] = []
    notices: dict[str, None] = {}
    for step in range(steps + 1):
        with torch.no_grad():
            outputs.append(model(inputs).clone())
        if step < steps:
            notices.update(dict.fromkeys(optimizer.step(inputs, targets).notices))
    return FunctionPath(tuple(outputs), tuple(notices))


@dataclass(frozen=True)
class Agreement:
    """How far two nets stay together in function space.

    Attributes:
        start: ||z' - z|| / ||z|| before the first step: rounding of the transform.
        steps: After each step, ||z' - z|| / ||z - z_0||: their distance as a share of the way travelled.
    """

    start: float
    steps: tuple[float, ...]

    @property
    def first(self) -> float:
        """After one step."""
        return self.steps[0]

    @property
    def worst(self) -> float:
        """The largest share along the path."""
        return max(self.steps)


def agreement(path: FunctionPath, other: FunctionPath) -> Agreement:
    """Compare two paths made by `function_path` on the same cases.

    Args:
        path: The original net's.
        other: The transformed net's, equally long.
    """
    first = path.outputs[0]
    moved = [max(float((z - first).norm()), torch.finfo(torch.float64).tiny) for z in path.outputs[1:]]
    apart = [float((b - a).norm()) for a, b in zip(path.outputs, other.outputs, strict=True)]
    return Agreement(
        apart[0] / float(first.norm()), tuple(gap / way for gap, way in zip(apart[1:], moved, strict=True))
    )


def _chain(model: nn.Module) -> tuple[nn.Sequential, list[tuple[nn.Linear, nn.Sequential]]]:
    """What comes before the first linear layer, and each linear layer with what follows it."""
    if not isinstance(model, nn.Sequential):
        raise UnsupportedModelError(
            f"{type(model).__name__}: a reparameterised copy can be built of nn.Sequential only; wrap the layers in one"
        )
    before: list[nn.Module] = []
    stages: list[tuple[nn.Linear, list[nn.Module]]] = []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            stages.append((module, []))
        elif any(True for _ in module.parameters()):
            raise UnsupportedModelError(
                f"{name}: {type(module).__name__} has parameters; a reparameterised copy can be built of nn.Linear and "
                "modules without parameters only"
            )
        else:
            (stages[-1][1] if stages else before).append(module)
    if not stages:
        raise UnsupportedModelError("the model has no nn.Linear, so there is nothing to reparameterise")
    return nn.Sequential(*before), [(linear, nn.Sequential(*units)) for linear, units in stages]


def _block(linear: nn.Linear) -> Tensor:
    """[W b]."""
    W = linear.weight.detach()
    return W if linear.bias is None else torch.cat([W, linear.bias.detach().unsqueeze(1)], dim=1)


def _check(name: str, matrix: Tensor, size: int) -> None:
    if matrix.shape != (size, size):
        raise UnsupportedModelError(f"{name} has shape {tuple(matrix.shape)}, the layer needs ({size}, {size})")
    if not float(torch.linalg.cond(matrix)) < 1e12:
        raise UnsupportedModelError(f"{name} has no inverse in double precision; give an invertible matrix")


def _inverse_root(matrix: Tensor, what: str) -> Tensor:
    """The symmetric X^-1/2."""
    values, vectors = torch.linalg.eigh(matrix)
    if not float(values[0]) > 1e-12 * float(values[-1]):
        raise UnsupportedModelError(
            f"{what} cannot be whitened: their second moment is singular; use more examples, inputs without constant "
            "entries, and Bernoulli or Gaussian outputs"
        )
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root
