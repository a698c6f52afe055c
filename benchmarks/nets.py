"""The nets and batches that benchmarks run on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfacore.lab.models import autoencoder, sparse_init
from kfacore.registry import get_registry

__all__ = ["NETS", "build", "build_chain", "images"]

NETS: dict[str, tuple[int, ...]] = {
    "mnist": (784, 1000, 500, 250, 30, 250, 500, 1000, 784),
    "curves": (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784),
}
"""Widths of the paper's autoencoders of 28x28 images."""


def build(net: str, device: torch.device) -> nn.Module:
    """A sparsely initialised autoencoder of the paper."""
    return build_chain(NETS[net], device)


def build_chain(widths: Sequence[int], device: torch.device) -> nn.Module:
    """A sparsely initialised autoencoder of any widths."""
    model = autoencoder(widths)
    sparse_init(model, torch.Generator().manual_seed(0))
    return model.to(device)


def images(device: torch.device) -> Tensor:
    """28x28 images to train on: the generated curves, which need no download."""
    return get_registry().build("problem", "curves").load().train.inputs.to(device)
