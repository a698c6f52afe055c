"""The only room that knows torch autograd and layer types: models become layers, mini-batches linear maps."""

from kfacore.network.linearization import Linearization, Linearizer
from kfacore.network.rules import Layer, LayerRule, find_layers
from kfacore.network.vectors import BlockVector

__all__ = ["BlockVector", "Layer", "LayerRule", "Linearization", "Linearizer", "find_layers"]
