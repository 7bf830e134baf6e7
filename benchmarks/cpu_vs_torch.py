"""The trainer's step on CPU against the same step in PyTorch, from the same weights.

    python -m benchmarks.cpu_vs_torch

Needs PyTorch. Each network trains with SGD, momentum 0.9 and weight decay on batches of 32 images, which are cropped,
flipped and normalised:

- ours: ``Experiment.train``, as the trainer runs it: shuffle, augmentation and all steps in one compiled loop.
- torch: a loop in Python over ``channels_last`` images and kernels, on as many threads as there are cores.

Both start from the same weights, with which they must give the same logits. "ratio" is the time of a step over
PyTorch's, from the fastest rounds, "median" that of the rounds: below 1 ours is faster. "temp. MiB" is what the
compiled program needs besides its arguments and results.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import common, methods
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.paths import named_leaves

BATCH, PADDING = 32, 4


class Torch:
    """Torch's training of a residual network, from the leaves of ours by path."""

    def __init__(self, module: Any, weights: Any, optimizer: settings_lib.Optimizer):
        self.module = module
        self.tensors = {
            name: _tensor(leaf)
            for tree in (weights.params, weights.batch_stats)
            for name, leaf in named_leaves(tree)
        }
        params = [self.tensors[name].requires_grad_() for name, _ in named_leaves(weights.params)]
        # optax's sgd, with the decay added to the gradient.
        self.optimizer = torch.optim.SGD(
            params,
            lr=optimizer.learning_rate,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        )
        self.smoothing = optimizer.label_smoothing

    def conv(self, x: torch.Tensor, path: str, stride: int = 1) -> torch.Tensor:
        kernel = self.tensors[f"{path}/kernel"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(self, x: torch.Tensor, path: str) -> torch.Tensor:
        leaves = [self.tensors[f"{path}/{leaf}"] for leaf in ("mean", "var", "scale", "bias")]
        return F.batch_norm(x, *leaves, training=True)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x, "conv1")
        wide = not hasattr(self.module, "stage_sizes")
        x = x if wide else self.norm(x, "bn1").relu()
        for block in (name for name in self.module.structure.blocks if "/" in name):
            stride = 2 if block.endswith("block0") and not block.startswith("layer1") else 1
            x = (self.wide_block if wide else self.basic_block)(x, block, stride)
        x = self.norm(x, "bn").relu() if wide else x
        return x.mean((2, 3)) @ self.tensors["fc/kernel"] + self.tensors["fc/bias"]

    def basic_block(self, x: torch.Tensor, block: str, stride: int) -> torch.Tensor:
        y = self.norm(self.conv(x, f"{block}/conv1", stride), f"{block}/bn1").relu()
        y = self.norm(self.conv(y, f"{block}/conv2"), f"{block}/bn2")
        if f"{block}/downsample_conv/kernel" in self.tensors:
            x = self.conv(x, f"{block}/downsample_conv", stride)
            x = self.norm(x, f"{block}/downsample_bn")
        elif stride != 1:  # shortcut A
            x = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return (x + y).relu()

    def wide_block(self, x: torch.Tensor, block: str, stride: int) -> torch.Tensor:
        y = self.norm(x, f"{block}/bn1").relu()
        if f"{block}/downsample_conv/kernel" in self.tensors:
            x = self.conv(y, f"{block}/downsample_conv", stride)
        y = self.norm(self.conv(y, f"{block}/conv1", stride), f"{block}/bn2").relu()
        return x + self.conv(y, f"{block}/conv2")

    def train(self, images: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
        """Train on batches of uint8 ``[n, C, H, W]``, of which each image is cropped and flipped at random."""
        side = images.shape[-1]
        mean, std = images.float().mean((0, 2, 3)), images.float().std((0, 2, 3))
        for _ in range(steps):
            rows = torch.randint(len(images), (BATCH,))
            batch = F.pad(images[rows], (PADDING,) * 4)
            places = torch.randint(2 * PADDING + 1, (BATCH, 2)).tolist()
            batch = torch.stack(
                [
                    image[:, row : row + side, column : column + side]
                    for image, (row, column) in zip(batch, places, strict=True)
                ]
            )
            batch = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch.flip(3), batch)
            batch = (batch - mean[:, None, None]) / std[:, None, None]
            batch = batch.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(self.logits(batch), labels[rows], label_smoothing=self.smoothing)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def _tensor(leaf: jax.Array) -> torch.Tensor:
    """Return a copy of a leaf of one seed; a kernel of a convolution as torch has it, ``channels_last``."""
    tensor = torch.from_numpy(np.array(leaf[0]))
    if tensor.ndim == 4:
        tensor = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    return tensor


def settings(network: str) -> Settings:
    return Settings(
        data=settings_lib.Data(
            name="synthetic", validation_fraction=0.0, crop_padding=PADDING, flip=True
        ),
        model=settings_lib.Model(name=network, stem="cifar" if network == "resnet18" else None),
        method={"name": "normal"},
        train=settings_lib.Train(batch_size=BATCH),
    )


def compare(network: str, side: int, steps: int, rounds: int) -> dict[str, Any]:
    dataset = methods.synthetic(steps * BATCH, side)
    config = settings(network)
    experiment = common.build(config, dataset)
    train = common.on_device(experiment, dataset.train)
    state = common.initial_state(experiment, train)
    theirs = Torch(experiment.model.module, state.weights, config.optimizer)
    check(experiment, state, theirs, side)
    compiled = experiment.train.lower(state, train).compile()
    images = torch.from_numpy(dataset.train.images.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(dataset.train.labels.astype(np.int64))

    def ours():
        nonlocal state
        state, losses = compiled(state, train)
        return losses

    times = common.interleave(
        {"ours": ours, "torch": lambda: theirs.train(images, labels, steps)}, rounds
    )
    fastest, median = common.ratio(times, "ours", "torch")
    return {
        "network": network,
        "images": f"{side}x{side}",
        "ours ms/step": 1e3 * min(times["ours"]) / steps,
        "torch ms/step": 1e3 * min(times["torch"]) / steps,
        "ratio": fastest,
        "median": median,
        "temp. MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def check(experiment: Any, state: Any, theirs: Torch, side: int) -> None:
    """Assert that both give the same logits in training mode."""
    images = np.random.default_rng(0).normal(size=(BATCH, side, side, 3)).astype(np.float32)
    weights = jax.tree.map(lambda leaf: leaf[0], state.weights)
    variables = {"params": weights.params, "batch_stats": weights.batch_stats}
    apply = functools.partial(experiment.model.module.apply, train=True, mutable=["batch_stats"])
    expected, _ = jax.jit(apply)(variables, images)
    with torch.no_grad():
        found = theirs.logits(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3 * scale)


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(__doc__, rounds=7, argv=argv)
    torch.set_num_threads(common.machine()["cpus"] or os.cpu_count())
    # Network, side of the images and steps of a round.
    cases: list[tuple[str, int, int]] = [
        ("resnet8", 8, 40),
        ("resnet20", 32, 4),
        ("resnet18", 32, 2),
        ("wrn16-2", 32, 2),
    ]
    if options.quick:
        cases = [("resnet8", 8, 2), ("wrn10-1", 8, 2)]
    rows = [compare(*case, options.rounds) for case in cases]
    title = f"training steps, batch {BATCH}, {options.rounds} rounds"
    common.publish("cpu_vs_torch", [common.Report(title, rows)], options.json)


if __name__ == "__main__":
    main()
