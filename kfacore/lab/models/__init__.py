"""Models of the problems, by hand in plain PyTorch. Every parameter is drawn from one generator."""

from kfacore.lab.models.feedforward import ACTIVATIONS, autoencoder, mlp, sparse_init
from kfacore.lab.models.gpt import GPT
from kfacore.lab.models.images import IMAGE_MODELS, PlainCNN, SmallResNet, VisionTransformer
from kfacore.lab.models.initial import normal_init

__all__ = [
    "ACTIVATIONS",
    "GPT",
    "IMAGE_MODELS",
    "PlainCNN",
    "SmallResNet",
    "VisionTransformer",
    "autoencoder",
    "mlp",
    "normal_init",
    "sparse_init",
]
