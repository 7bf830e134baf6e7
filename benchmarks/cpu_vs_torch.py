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

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import common
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    raise SystemExit("benchmarks.cpu_vs_torch compares with PyTorch: pip install torch") from None

from benchmarks import torch_networks

BATCH, PADDING, CLASSES = 32, 4, 10


class TorchTraining:
    """The training of the copied network."""

    def __init__(self, network: torch_networks.Network, optimizer: settings_lib.Optimizer):
        self.network = network.train().to(memory_format=torch.channels_last)
        # optax's sgd, with the decay added to the gradient.
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            lr=optimizer.learning_rate,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        )
        self.smoothing = optimizer.label_smoothing

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
            loss = F.cross_entropy(
                self.network(batch), labels[rows], label_smoothing=self.smoothing
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


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
    dataset = common.synthetic(steps * BATCH, side, CLASSES)
    config = settings(network)
    experiment = common.build(config, dataset)
    train = common.on_device(experiment, dataset.train)
    state = common.initial_state(experiment, train)
    weights = jax.tree.map(lambda leaf: leaf[0], state.weights)  # of the only seed
    variables = {"params": weights.params, "batch_stats": weights.batch_stats}
    pictures = np.random.default_rng(0).normal(size=(BATCH, side, side, 3)).astype(np.float32)
    torch_networks.check_equal(experiment.model, variables, pictures)
    theirs = TorchTraining(torch_networks.copy(experiment.model, variables), config.optimizer)
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
