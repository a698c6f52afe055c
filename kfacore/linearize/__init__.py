"""The only room that knows torch autograd and layer types: models become layers, mini-batches linear maps."""

from kfacore.linearize.blocks import BlockVector
from kfacore.linearize.linearization import Linearization, Linearizer
from kfacore.linearize.rules import Layer, LayerRule, find_layers

__all__ = ["BlockVector", "Layer", "LayerRule", "Linearization", "Linearizer", "find_layers"]
