"""Truths about the factors of a net from Jacobians of every case and every module, without unfolding anything."""

from __future__ import annotations

from typing import Any

import torch
from layer_rows import exact_vectors
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfacore.roles import Likelihood

FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Their units are in the first dimension behind the case; those of all others are in the last."""
Uses = list[tuple[Tensor, Tensor]]


def read(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (*FIRST, nn.Linear, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def uses_of(model: nn.Module, inputs: Any) -> tuple[Tensor, dict[str, Uses]]:
    """z, and for every module its inputs and what was added to its outputs: zeros whose gradient is g."""
    found: dict[str, Uses] = {name: [] for name in read(model)}

    def hook(name: str) -> Any:
        def run(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)
            found[name].append((args[0].detach(), zero))
            return output + zero

        return run

    handles = [module.register_forward_hook(hook(name)) for name, module in read(model).items()]
    z = model(inputs)
    for handle in handles:
        handle.remove()
    return z, found


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """(groups, R, d_in) of one case (1, ...): derivatives of a unit's outputs by its own weights and its bias."""
    named = {name: parameter.detach() for name, parameter in module.named_parameters()}
    J = jacrev(lambda p: functional_call(module, p, (x,))[0])(named)
    s = functional_call(module, named, (x,))[0]
    groups = getattr(module, "groups", 1)
    by_weight = J["weight"].movedim(s.dim() - 1, 0) if not isinstance(module, FIRST) else J["weight"]
    by_weight = by_weight.reshape(len(by_weight), -1, *named["weight"].shape)  # (units, R, *weight)
    units, R = by_weight.shape[:2]
    each = units // groups
    rows = []
    for group in range(groups):
        unit = group * each
        one = by_weight[unit]  # (R, *weight), zero but for the unit's own weights
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            inputs = module.in_channels // groups
            row = one[:, group * inputs : (group + 1) * inputs, 0].flatten(1)
        elif isinstance(module, nn.Embedding):
            row = one[:, :, unit]
        else:
            row = one[:, unit].flatten(1)
        rows.append(torch.cat([row, torch.ones(R, 1, dtype=row.dtype)], 1) if "bias" in named else row)
    return torch.stack(rows)


def outputs_of(module: nn.Module, g: Tensor) -> Tensor:
    """(groups, R, d_out) of one case's g."""
    groups = getattr(module, "groups", 1)
    g = g.flatten(1).T if isinstance(module, FIRST) else g.reshape(-1, g.shape[-1])
    return g.unflatten(1, (groups, -1)).transpose(0, 1)


def truths(model: nn.Module, inputs: Any, likelihood: Likelihood, S: float) -> dict[str, Any]:
    """Factors (A, G) of every module with a weight that this file reads, and F of every other parameter.

    F of a norm is that of its parameters together, under the module's name.
    """
    z, uses = uses_of(model, inputs)
    n = len(z)
    modules = read(model)
    A: dict[str, Any] = {}
    for name, module in modules.items():
        rows = [rows_of(module, x[i : i + 1]) for x, _ in uses[name] for i in range(n)]
        every = torch.cat(rows, 1)
        A[name] = every.mT @ every / every.shape[1]
    G: dict[str, Any] = dict.fromkeys(modules, 0.0)
    others: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in modules:
            others.setdefault(owner or name, []).append(parameter)
    F: dict[str, Any] = dict.fromkeys(others, 0.0)
    zeros = [zero for name in modules for _, zero in uses[name]]
    loose = [parameter for group in others.values() for parameter in group]
    for v in exact_vectors(likelihood, z, None):
        found = torch.autograd.grad(
            z, [*zeros, *loose], v, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        arrived = iter(found)
        for name, module in modules.items():
            for _ in uses[name]:
                g = next(arrived)
                each = [outputs_of(module, g[i]) for i in range(n)]
                G[name] = G[name] + sum(part.mT @ part for part in each) / S
        for name, group in others.items():
            vector = torch.cat([next(arrived).flatten() for _ in group])
            F[name] = F[name] + torch.outer(vector, vector) / S
    return {**{name: (A[name], G[name]) for name in modules}, **F}
