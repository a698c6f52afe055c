"""Dense references, written from the definitions and from autodiff alone: nothing here calls the code under test.

Parameter vectors: layer by layer, the columns of each block [W b] stacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from kfacore.plugin import PiRule
from kfacore.roles import LayerSamples
from kfacore.roles.block import Block

Float = torch.float64


def net(sizes: Sequence[int], *, hidden: type[nn.Module] = nn.Tanh, bias: bool = True, seed: int = 0) -> nn.Sequential:
    """A chain of linear layers in double precision, every weight and bias random."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for index, (a, b) in enumerate(pairwise(sizes)):
        if index:
            modules.append(hidden())
        modules.append(nn.Linear(a, b, bias=bias))
    model = nn.Sequential(*modules).to(Float)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=Float) * 0.6)
    return model


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=Float)


def linears(model: nn.Module) -> list[nn.Linear]:
    """Linear layers in order of registration (= execution, for the nets of these tests)."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]


def infos(model: nn.Module) -> list[Block]:
    names = {id(m): name for name, m in model.named_modules()}
    found = []
    for m in linears(model):
        bias = m.bias is not None and m.bias.requires_grad
        params = tuple(f"{names[id(m)]}.{key}" for key in ("weight", "bias")[: 1 + bias])
        found.append(Block(names[id(m)], m.in_features + bias, m.out_features, bias, params=params))
    return found


def vec(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([block.T.reshape(-1) for block in blocks])


def unvec(vector: Tensor, layers: Sequence[Block]) -> list[Tensor]:
    blocks, start = [], 0
    for layer in layers:
        columns = vector[start : start + layer.size].reshape(*layer.shape[:-2], layer.d_in, layer.d_out)
        blocks.append(columns.mT)
        start += layer.size
    assert start == len(vector)
    return blocks


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Derivative of each case's outputs by the parameters, (n, o, P), by reverse mode."""
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    found = torch.func.jacrev(outputs)(trainable)
    columns = []
    for m in linears(model):
        block = found[names[id(m.weight)]]
        if m.bias is not None and m.bias.requires_grad:
            block = torch.cat([block, found[names[id(m.bias)]].unsqueeze(-1)], dim=-1)
        columns.append(block.transpose(-1, -2).flatten(2))
    return torch.cat(columns, dim=2)


def theta(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    blocks = []
    for m in linears(model):
        parts = [m.weight.detach()]
        if m.bias is not None and m.bias.requires_grad:
            parts.append(m.bias.detach()[:, None])
        blocks.append(torch.cat(parts, dim=1))
    return vec(blocks)


def metric(likelihood: str, z: Tensor) -> Tensor:
    """F_R of each case, (n, o, o), from the textbook formula."""
    n, o = z.shape
    if likelihood == "gaussian":
        return torch.eye(o, dtype=z.dtype).expand(n, o, o)
    if likelihood == "bernoulli":
        p = 1 / (1 + torch.exp(-z))
        return torch.diag_embed(p * (1 - p))
    p = torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def fisher(model: nn.Module, likelihood: str, x: Tensor) -> Tensor:
    """The exact Fisher, mean over cases of J^T F_R J, (P, P)."""
    J = jacobian(model, x)
    with torch.no_grad():
        F_R = metric(likelihood, model(x))
    return torch.einsum("nop,noq,nqr->pr", J, F_R, J) / len(x)


def case_samples(model: nn.Module, x: Tensor, vectors: Tensor) -> list[LayerSamples]:
    """Abar and g of each layer by hooks and plain backward passes, for vectors (k, n, o)."""
    layers = linears(model)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = module.bias is not None and module.bias.requires_grad
        inputs.append(torch.cat([args[0], torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else args[0])
        outputs.append(torch.zeros_like(output, requires_grad=True))
        return output + outputs[-1]  # a leaf of our own: in-place units may overwrite the sum

    handles = [layer.register_forward_hook(keep) for layer in layers]
    z = model(x)
    for handle in handles:
        handle.remove()
    passes = [torch.autograd.grad(z, outputs, v, retain_graph=True) for v in vectors]
    return [LayerSamples(a.detach(), torch.stack([g[i] for g in passes]).detach()) for i, a in enumerate(inputs)]


@dataclass
class Kronecker:
    """F-tilde's factors of every pair of layers: block (i, j) is A[i][j] (x) G[i][j]."""

    A: list[list[Tensor]]
    G: list[list[Tensor]]

    @classmethod
    def of(cls, samples: Sequence[LayerSamples]) -> Kronecker:
        """Means over cases, one case and pass at a time."""

        def mean(xs: Tensor, ys: Tensor) -> Tensor:
            return torch.stack([torch.outer(a, b) for a, b in zip(xs, ys, strict=True)]).sum(0) / samples[0].cases

        A = [[mean(s.inputs, t.inputs) for t in samples] for s in samples]
        G = [[mean(s.gradients.flatten(0, 1), t.gradients.flatten(0, 1)) for t in samples] for s in samples]
        return cls(A, G)

    def damped(self, gamma: float, *, pi: PiRule = "layer") -> Kronecker:
        """Only the diagonal factors are damped."""
        A, G = [list(row) for row in self.A], [list(row) for row in self.G]
        pairs = [(A[i][i], G[i][i]) for i in range(len(A))]
        splits = [float(((torch.trace(a) / len(a)) / (torch.trace(g) / len(g))) ** 0.5) for a, g in pairs]
        if pi != "layer":
            splits = [1.0 if pi is None else math.prod(splits) ** (1 / len(splits))] * len(splits)
        for i, ((a, g), split) in enumerate(zip(pairs, splits, strict=True)):
            A[i][i] = a + split * gamma * torch.eye(len(a), dtype=a.dtype)
            G[i][i] = g + gamma / split * torch.eye(len(g), dtype=g.dtype)
        return Kronecker(A, G)

    def blocks(self) -> list[list[Tensor]]:
        """Each block as a matrix."""
        count = range(len(self.A))
        return [[torch.kron(self.A[i][j], self.G[i][j]) for j in count] for i in count]

    def matrix(self) -> Tensor:
        """The whole of F-tilde."""
        return torch.cat([torch.cat(row, dim=1) for row in self.blocks()])


def block_diagonal(factors: Kronecker) -> Tensor:
    """F-breve: F-tilde's diagonal blocks."""
    return torch.block_diag(*[row[i] for i, row in enumerate(factors.blocks())])


def tridiagonal_inverse(factors: Kronecker, *, reverse: bool = False) -> Tensor:
    """F-hat^-1 = Xi^T Lambda Xi with the edges i+1 -> i, or reversed.

    Given its neighbour, a block has mean Psi times the neighbour and covariance Sigma.
    """
    blocks = factors.blocks()
    L = len(blocks)
    order = list(range(L))
    pairs = [(i + 1, i) for i in order[:-1]] if reverse else [(i, i + 1) for i in order[:-1]]  # (child, parent)
    root = 0 if reverse else L - 1
    sizes = [len(blocks[i][i]) for i in order]
    offsets = [sum(sizes[:i]) for i in range(L + 1)]
    Xi = torch.eye(offsets[-1], dtype=Float)
    Lambda = torch.zeros_like(Xi)

    def span(i: int) -> slice:
        return slice(offsets[i], offsets[i + 1])

    Lambda[span(root), span(root)] = torch.linalg.inv(blocks[root][root])
    for child, parent in pairs:
        Psi = blocks[child][parent] @ torch.linalg.inv(blocks[parent][parent])
        Sigma = blocks[child][child] - Psi @ blocks[parent][parent] @ Psi.T
        Xi[span(child), span(parent)] = -Psi
        Lambda[span(child), span(child)] = torch.linalg.inv(Sigma)
    return Xi.T @ Lambda @ Xi
