"""Layer types: configs and manifests. Imports no torch.

The network takes every one of them; the first whose `matches` says yes reads a module.
"""

from __future__ import annotations

from typing import Literal

from kfacore.plugin import Component, LayerConfig

__all__ = [
    "COMPONENTS",
    "AttentionConfig",
    "BilinearConfig",
    "ConvolutionConfig",
    "EmbeddingBagConfig",
    "EmbeddingConfig",
    "HfConv1dConfig",
    "LinearConfig",
    "NormConfig",
    "RecurrentConfig",
    "TransposedConfig",
]


class AttentionConfig(LayerConfig):
    """Options of multi-head attention."""

    kind: Literal["attention"] = "attention"
    """Name of the implementation."""


class BilinearConfig(LayerConfig):
    """Options of bilinear layers."""

    kind: Literal["bilinear"] = "bilinear"
    """Name of the implementation."""


class ConvolutionConfig(LayerConfig):
    """Options of convolutions."""

    kind: Literal["convolution"] = "convolution"
    """Name of the implementation."""


class EmbeddingConfig(LayerConfig):
    """Options of embeddings."""

    kind: Literal["embedding"] = "embedding"
    """Name of the implementation."""


class EmbeddingBagConfig(LayerConfig):
    """Options of sums of embeddings."""

    kind: Literal["embedding_bag"] = "embedding_bag"
    """Name of the implementation."""


class HfConv1dConfig(LayerConfig):
    """Options of transformers' ``Conv1D``."""

    kind: Literal["hf_conv1d"] = "hf_conv1d"
    """Name of the implementation."""


class LinearConfig(LayerConfig):
    """Options of linear layers."""

    kind: Literal["linear"] = "linear"
    """Name of the implementation."""


class NormConfig(LayerConfig):
    """Options of norms."""

    kind: Literal["norm"] = "norm"
    """Name of the implementation."""


class RecurrentConfig(LayerConfig):
    """Options of recurrent nets and cells."""

    kind: Literal["recurrent"] = "recurrent"
    """Name of the implementation."""


class TransposedConfig(LayerConfig):
    """Options of transposed convolutions."""

    kind: Literal["transposed"] = "transposed"
    """Name of the implementation."""


COMPONENTS: tuple[Component, ...] = (
    Component(
        "layer",
        "linear",
        LinearConfig,
        "kfac_plugins.layers.linear:LinearLayer",
        "torch.nn.Linear over any positions: one Kronecker block, its rows are the inputs.",
    ),
    Component(
        "layer",
        "hf_conv1d",
        HfConv1dConfig,
        "kfac_plugins.layers.hf_conv1d:HfConv1d",
        "The Conv1D of transformers, a linear layer with its weight turned.",
    ),
    Component(
        "layer",
        "bilinear",
        BilinearConfig,
        "kfac_plugins.layers.bilinear:Bilinear",
        "torch.nn.Bilinear: rows are the products of two inputs.",
    ),
    Component(
        "layer",
        "convolution",
        ConvolutionConfig,
        "kfac_plugins.layers.convolution:Convolution",
        "Convolutions over 1 to 3 dimensions: rows are patches, groups are blocks.",
    ),
    Component(
        "layer",
        "transposed",
        TransposedConfig,
        "kfac_plugins.layers.transposed:Transposed",
        "Transposed convolutions over 1 to 3 dimensions.",
    ),
    Component(
        "layer",
        "embedding",
        EmbeddingConfig,
        "kfac_plugins.layers.embedding:Embedding",
        "torch.nn.Embedding: rows are token numbers, the input side is diagonal.",
    ),
    Component(
        "layer",
        "embedding_bag",
        EmbeddingBagConfig,
        "kfac_plugins.layers.embedding_bag:EmbeddingBag",
        "torch.nn.EmbeddingBag: sums, means and maxima of embeddings, with offsets and weights.",
    ),
    Component(
        "layer",
        "norm",
        NormConfig,
        "kfac_plugins.layers.norm:Norm",
        "Layer, RMS, group, instance and batch norms: scale and shift as a dense block, or one a channel.",
    ),
    Component(
        "layer",
        "attention",
        AttentionConfig,
        "kfac_plugins.layers.attention:Attention",
        "torch.nn.MultiheadAttention: blocks q, k, v and out_proj.",
    ),
    Component(
        "layer",
        "recurrent",
        RecurrentConfig,
        "kfac_plugins.layers.recurrent:Recurrent",
        "LSTM, GRU, RNN and their cells: a block for inputs and one for states of every layer and direction.",
    ),
)
"""Manifests of this slot."""
