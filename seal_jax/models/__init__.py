"""Flax networks and, next to each, the declared order of its parameters."""

from seal_jax.models.cifar_resnet import cifar_resnet
from seal_jax.models.registry import Model, create, from_module, names
from seal_jax.models.resnet import ResNet

__all__ = ["Model", "ResNet", "cifar_resnet", "create", "from_module", "names"]
