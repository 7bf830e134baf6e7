"""Flax networks and, next to each, the declared order of its parameters."""

from seal_jax.models.mlp import MLP
from seal_jax.models.mobilenet import MobileNet
from seal_jax.models.model import Model, create, from_module, names
from seal_jax.models.network import Network, batch_statistics
from seal_jax.models.resnet import ResNet, cifar_resnet
from seal_jax.models.scnn import SimpleCNN
from seal_jax.models.vgg import VGG
from seal_jax.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "VGG",
    "MobileNet",
    "Model",
    "Network",
    "ResNet",
    "SimpleCNN",
    "WideResNet",
    "batch_statistics",
    "cifar_resnet",
    "create",
    "from_module",
    "names",
]
