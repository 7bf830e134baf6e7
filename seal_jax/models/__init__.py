"""Flax networks and, next to each, the declared order of its parameters."""

from seal_jax.models.densenet import DenseNet as DenseNet
from seal_jax.models.mlp import MLP as MLP
from seal_jax.models.mobilenet import MobileNet as MobileNet
from seal_jax.models.model import Model as Model
from seal_jax.models.model import create as create
from seal_jax.models.model import entries as entries
from seal_jax.models.model import from_module as from_module
from seal_jax.models.model import names as names
from seal_jax.models.network import Network as Network
from seal_jax.models.network import batch_statistics as batch_statistics
from seal_jax.models.resnet import ResNet as ResNet
from seal_jax.models.resnet import cifar_resnet as cifar_resnet
from seal_jax.models.scnn import SimpleCNN as SimpleCNN
from seal_jax.models.vgg import VGG as VGG
from seal_jax.models.vit import ViT as ViT
from seal_jax.models.wide_resnet import WideResNet as WideResNet
