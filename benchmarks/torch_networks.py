"""The residual networks of ``seal_jax.models`` as plain PyTorch modules, with the weights copied over.

Submodules have the names of ours, which are torchvision's but for the downsample branch, so that a weight's
place follows from its path.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from seal_jax import models


class ResidualBlock(nn.Module):
    """See ``seal_jax.models.resnet.ResidualBlock``."""

    def __init__(self, kind: str, fan: int, width: int, stride: int, shortcut: str):
        super().__init__()
        sizes, out = ((3, 3), width) if kind == "basic" else ((1, 3, 1), 4 * width)
        channels = fan
        for number, size in enumerate(sizes, 1):
            last = out if number == len(sizes) else width
            step = stride if number == sizes.index(3) + 1 else 1
            conv = nn.Conv2d(channels, last, size, step, size // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(last))
            channels = last
        self.depth, self.stride, self.extra = len(sizes), stride, out - fan
        self.changes, self.shortcut = stride != 1 or fan != out, shortcut
        if self.changes and shortcut == "B":
            self.downsample_conv = nn.Conv2d(fan, out, 1, stride, bias=False)
            self.downsample_bn = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = y.relu() if number > 1 else y
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
        if self.changes and self.shortcut == "A":
            # Subsampled, the missing channels zero.
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0,) * 5 + (self.extra,))
        elif self.changes:
            x = self.downsample_bn(self.downsample_conv(x))
        return (x + y).relu()


class WideBlock(nn.Module):
    """See ``seal_jax.models.wide_resnet.WideBlock``, without dropout."""

    def __init__(self, fan: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(fan), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(fan, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.changes = stride != 1 or fan != width
        if self.changes:
            self.downsample_conv = nn.Conv2d(fan, width, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(x).relu()
        # Both branches take the activated input where the shape changes.
        x = self.downsample_conv(y) if self.changes else x
        return x + self.conv2(self.bn2(self.conv1(y)).relu())


class Network(nn.Module):
    """A residual network with a 3x3 stem that keeps the image's size, for 32x32 images."""

    def __init__(self, module: models.ResNet | models.WideResNet, channels: int):
        super().__init__()
        wide = isinstance(module, models.WideResNet)
        fan = module.stem_width if wide else module.width
        sizes = ((module.depth - 4) // 6,) * 3 if wide else module.stage_sizes
        self.conv1 = nn.Conv2d(channels, fan, 3, 1, 1, bias=False)
        if not wide:
            self.bn1 = nn.BatchNorm2d(fan)
        expansion = 4 if not wide and module.block == "bottleneck" else 1
        for stage, size in enumerate(sizes):
            blocks, width = [], module.width * 2**stage
            for number in range(size):
                stride = 2 if stage and not number else 1
                blocks.append(
                    WideBlock(fan, width, stride)
                    if wide
                    else ResidualBlock(module.block, fan, width, stride, module.shortcut)
                )
                fan = width * expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        if wide:
            self.bn = nn.BatchNorm2d(fan)
        self.wide, self.stages = wide, len(sizes)
        self.fc = nn.Linear(fan, module.num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = x if self.wide else self.bn1(x).relu()
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        x = self.bn(x).relu() if self.wide else x
        return self.fc(x.mean((2, 3)))


def copy(model: models.Model, variables: Any) -> Network:
    """Return the same network with the same weights, in inference mode.

    Args:
      model: a ResNet with the stem of small images, or a wide one.
      variables: its "params" and "batch_stats".
    """
    network = Network(model.module, model.image_shape[-1])
    # Flax's paths and layouts to PyTorch's: [h, w, in, out] becomes [out, in, h, w], [in, out] becomes [out, in].
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        *parents, last = [str(entry.key) for entry in path][1:]
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        name = ".".join([*parents, names.get(last, last)]).replace("block", "")
        state[name] = torch.tensor(np.transpose(np.asarray(leaf), axes).copy())
    # Flax counts no batches; everything else must have found its place.
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unexpected or not all(name.endswith("num_batches_tracked") for name in missing):
        raise AssertionError(f"the copy is another network: {missing}, {unexpected}")
    return network.eval()


def check_equal(model: models.Model, variables: Any, images: np.ndarray) -> None:
    """Raise an ``AssertionError`` unless both networks have the same logits, in training mode too.

    Args:
      model: the network, computing in float32.
      variables: its "params" and "batch_stats".
      images: normalised, float32 ``[b, h, w, c]``.
    """
    network = copy(model, variables)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    if count != sum(leaf.numel() for leaf in network.parameters()):
        raise AssertionError("the copy has another number of parameters")
    pixels = torch.tensor(np.transpose(images, (0, 3, 1, 2)).copy())

    @jax.jit
    def both(variables: Any, images: Any) -> Any:
        trained, _ = model.module.apply(variables, images, train=True, mutable=["batch_stats"])
        return model.module.apply(variables, images, train=False), trained

    # Without it GPUs round the factors of float32 products to fewer bits.
    with jax.default_matmul_precision("highest"):
        ours = jax.device_get(both(variables, images))
    for logits, train in zip(ours, (False, True), strict=True):
        with torch.no_grad():
            wanted = network.train(train)(pixels).numpy()
        # Of the largest: BatchNorm of few values magnifies rounding.
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())
