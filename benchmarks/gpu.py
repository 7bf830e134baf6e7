"""Training of residual networks through the compiled program, and the same training in PyTorch, on one GPU.

    python -m benchmarks.gpu [--networks=resnet18,resnet50,wrn28-10] [--batches=32,256] [--side=32]
                             [--seeds=8] [--minutes=60] [--autotune] [--deterministic]

It needs PyTorch with CUDA, and runs on a CPU too, with networks that are small enough. Both train the same
network, of which the number of parameters and the logits are asserted to agree, in bfloat16 with float32
weights, by SGD with momentum and weight decay, on random crops and flips of images in device memory.

- "torch, eager": channels-last, autocast, fused SGD.
- "torch, compile": the same with ``torch.compile(mode="reduce-overhead")``, which captures the forward and
  the backward pass as CUDA graphs; ``--autotune``: "max-autotune".
- "torch, graph": forward and backward pass compiled, and the whole step with its optimizer as one CUDA
  graph. GPUs only.
- "seal_jax": the trainer's program of one seed, or of several by "vmap" and by "map" (see
  ``run.seed_batching``); ``--deterministic`` adds rows with ``run.deterministic``.

Images a second are those of all seeds together. "ratio" is that over the fastest of PyTorch from the
fastest rounds, "median" the median of the rounds' ratios; PyTorch trains several seeds one after the other,
so that its images a second do not depend on their number. MFU is the share of the device's published peak
(bfloat16, dense) that forward and backward pass make of it, by the same count of operations for both.

A candidate that fails, for lack of memory for example, has a row that says so. After ``--minutes`` no other
is begun. Every table is printed, and written to ``--json``, when it is complete.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from seal_jax import data, models
from seal_jax.core import settings as settings_lib
from seal_jax.core.settings import Settings
from seal_jax.errors import UsageError
from seal_jax.losses import mean_cross_entropy
from seal_jax.training import experiment as experiments

CLASSES, PADDING = 10, 4
RATE, MOMENTUM, DECAY, SMOOTHING = 0.01, 0.9, 5e-4, 0.1
IMAGES_PER_CALL = 4096  # of one seed, on a GPU

# Dense bfloat16 TFLOP/s by NVIDIA's data sheets (which print twice as much, with sparsity), of the first name that is
# a part of the device's.
PEAKS = {
    "A100": 312,
    "A10": 125,
    "L4": 121,
    "L40S": 362,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
}
# Of torch.compile, with CUDA graphs and without, not autotuned and autotuned.
MODES = (("reduce-overhead", "default"), ("max-autotune", "max-autotune-no-cudagraphs"))


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def peak(kind: str) -> float | None:
    """Return the peak of a kind of device in flops a second, None if it is not known.

    >>> peak("NVIDIA H100 80GB HBM3"), peak("NVIDIA H100 PCIe"), peak("NVIDIA A10G")
    (989000000000000.0, 756000000000000.0, None)
    """
    names = (name for name in PEAKS if re.search(rf"\b{name}\b", kind))
    return next((PEAKS[name] * 1e12 for name in names), None)


def flops(model: models.Model, variables: Any, batch: int) -> float:
    """Return the operations of a forward and backward pass, as XLA counts them before it changes the program."""
    # Convolutions as such: as matrix products they would have more operations.
    module = model.module.clone(convolution="native")

    def loss(params: Any, images: Any, labels: Any) -> Any:
        inputs = {**variables, "params": params}
        logits, changed = module.apply(inputs, images, train=True, mutable=["batch_stats"])
        return mean_cross_entropy(logits, labels), changed

    shapes = (
        variables["params"],
        jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*shapes)
    return (lowered.cost_analysis() or {}).get("flops", math.nan)


def settings(
    network: str, batch: int, steps: int, seeds: int, batching: str, deterministic: bool
) -> Settings:
    stem = "cifar" if network in ("resnet18", "resnet34", "resnet50", "resnet101") else None
    return Settings(
        data=settings_lib.Data(
            name="synthetic",
            validation_fraction=0.0,
            crop_padding=PADDING,
            flip=True,
            normalisation="cifar10",
        ),
        model=settings_lib.Model(name=network, stem=stem),
        method={"name": "normal"},
        optimizer=settings_lib.Optimizer(
            learning_rate=RATE,
            schedule="constant",
            momentum=MOMENTUM,
            weight_decay=DECAY,
            label_smoothing=SMOOTHING,
        ),
        train=settings_lib.Train(batch_size=batch, seeds=seeds, dtype="bfloat16"),
        run=settings_lib.Run(
            steps_per_call=steps, seed_batching=batching, deterministic=deterministic
        ),
    )


class TorchTraining:
    """The same training in PyTorch.

    ``how`` is "eager"; or "compile", which captures CUDA graphs of its own; or "graph": compiled without, and
    the whole step captured.
    """

    def __init__(
        self, network: Any, dataset: data.Dataset, batch: int, steps: int, how: str, autotune: bool
    ):
        import torch

        # Shapes stay the same, so the fastest algorithms are worth looking for.
        torch.backends.cudnn.benchmark = True
        self.torch, self.batch, self.steps = torch, batch, steps
        self.device = torch.device("cuda" if on_gpu() else "cpu")
        self.network = network.train().to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            network.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY, fused=on_gpu()
        )
        # Padded once: a crop is then an index.
        around = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
        self.images = torch.tensor(np.pad(dataset.train.images, around), device=self.device)
        self.labels = torch.tensor(dataset.train.labels.astype(np.int64), device=self.device)
        mean, std = data.statistics("cifar10")
        self.mean, self.std = (torch.tensor(part, device=self.device) for part in (mean, std))
        self.side = dataset.image_shape[0]
        self.loss = self._loss
        self.own_graphs = how == "compile" and on_gpu()
        if self.own_graphs:
            # The graphs would copy them to a place of their own at every step.
            for constant in (self.images, self.labels, self.mean, self.std):
                torch._dynamo.mark_static_address(constant)
        if how != "eager":
            modes = MODES[autotune]
            self.loss = torch.compile(self._loss, mode=modes[0 if self.own_graphs else 1])
        self.advance = self._captured() if how == "graph" else self._step

    def train(self) -> float:
        """Train for the steps of a call; wait for them, and return the last loss."""
        draws = self._draws(self.steps)
        for step in range(self.steps):
            loss = self.advance(*(part[step] for part in draws))
        return float(loss)

    def _draws(self, steps: int) -> list[Any]:
        """Draw rows, offsets and flips for these steps, as our program does ahead of its steps."""
        torch, shape = self.torch, (steps, self.batch)
        order = torch.randperm(len(self.images), device=self.device)[: steps * self.batch]
        offsets = torch.randint(2 * PADDING + 1, (*shape, 2), device=self.device)
        flips = torch.rand(shape, device=self.device) < 0.5
        return [order.reshape(shape), offsets, flips]

    def pixels(self, rows: Any, offsets: Any, flips: Any) -> Any:
        """Return the images of these rows, cropped, flipped and normalised, channels-last."""
        torch = self.torch
        pixel = torch.arange(self.side, device=self.device)
        down = offsets[:, :1] + pixel
        right = offsets[:, 1:] + torch.where(flips[:, None], self.side - 1 - pixel, pixel)
        images = self.images[rows[:, None, None], down[:, :, None], right[:, None, :]]
        # [b, c, h, w] in the memory order of [b, h, w, c].
        return ((images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def _loss(self, rows: Any, offsets: Any, flips: Any) -> Any:
        torch = self.torch
        images = self.pixels(rows, offsets, flips)
        # Without the cache of casts, which a captured graph must not use; each weight is cast once anyway.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.network(images)
        labels = self.labels[rows]
        return torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)

    def _step(self, rows: Any, offsets: Any, flips: Any) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        if self.own_graphs:  # which reuse their memory from here on
            self.torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss(rows, offsets, flips)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _captured(self) -> Callable[..., Any]:
        """Return the step as one CUDA graph, which reads its input at fixed places."""
        cuda = self.torch.cuda
        inputs = [part[0].clone() for part in self._draws(1)]
        # Compiles, and makes the momentum, before the capture; on a stream of its own, as PyTorch asks for.
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(3):
                self._step(*inputs)
        cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            loss = self._step(*inputs)

        def replay(*values: Any) -> Any:
            for place, value in zip(inputs, values, strict=True):
                place.copy_(value)
            graph.replay()
            return loss

        return replay


def candidates(
    model: models.Model, variables: Any, batch: int, steps: int, options: argparse.Namespace
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Return seeds and constructor of each training, by the name of its row."""
    # An epoch is two calls.
    dataset = common.synthetic(2 * steps * batch, options.side, CLASSES)

    def of_torch(how: str) -> TorchTraining:
        from benchmarks import torch_networks

        copied = torch_networks.copy(model, variables)
        return TorchTraining(copied, dataset, batch, steps, how, options.autotune)

    ways = ("eager", "compile", "graph") if on_gpu() else ("eager", "compile")
    found: dict[str, Any] = {f"torch, {how}": (1, functools.partial(of_torch, how)) for how in ways}
    for deterministic in (False, True)[: 1 + options.deterministic]:
        for batching in ("", "vmap", "map"):
            seeds = options.seeds if batching else 1
            config = settings(model.name, batch, steps, seeds, batching or "auto", deterministic)
            name = ", ".join(
                ["seal_jax"]
                + ([f"{seeds} seeds by {batching}"] if batching else [])
                + (["deterministic"] if deterministic else [])
            )
            found[name] = (seeds, functools.partial(common.Training, config, dataset))
    return found


def create(network: str, side: int) -> tuple[models.Model, Any]:
    """Return a network that computes in float32 and its variables, after comparing it with its copy."""
    from benchmarks import torch_networks

    model = experiments.create_model(
        settings(network, 1, 1, 1, "auto", False).model,
        (side, side, 3),
        CLASSES,
        dtype="float32",
        on_cpu=not on_gpu(),
    )
    if not isinstance(model.module, models.ResNet | models.WideResNet):
        raise UsageError(f"--networks: {network} is no residual network; take resnet18 or wrn28-10")
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    images = np.random.default_rng(0).normal(size=(8, side, side, 3)).astype(np.float32)
    torch_networks.check_equal(model, variables, images)
    return model, variables


def compare(
    model: models.Model,
    variables: Any,
    batch: int,
    steps: int,
    options: argparse.Namespace,
    deadline: float,
) -> common.Report:
    import torch

    makers = candidates(model, variables, batch, steps, options)
    trainings, notes = {}, {}
    for name, (_, make) in makers.items():
        if time.monotonic() > deadline:
            notes[name] = "not begun: --minutes are over"
            continue
        # Whatever happens to one must not cost the figures of the others.
        try:
            training = make()
            # The second call, because that of the first may still choose algorithms and capture graphs.
            for _ in range(2):
                jax.block_until_ready(training.train())
            trainings[name] = training
        except Exception as error:
            notes[name] = f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:100]}"
    functions = {name: training.train for name, training in trainings.items()}
    try:
        times = common.interleave(functions, options.rounds, warm_up=False)
    except Exception as error:
        times, notes = {}, dict.fromkeys(makers, f"failed together: {str(error)[:100]}")
    of_torch = [name for name in times if name.startswith("torch")]
    best = min(of_torch, key=lambda name: min(times[name]), default=None)
    operations, most = flops(model, variables, batch), peak(jax.devices()[0].device_kind)
    rows = []
    for name, (seeds, _) in makers.items():
        row: dict[str, Any] = dict.fromkeys(("by", "images/s", "ms/step", "MFU %"))
        row |= dict.fromkeys(("ratio", "median"))
        row |= {"by": name, "aim": "-", "note": notes.get(name, "-")}
        if name.startswith("seal_jax") and "deterministic" not in name:
            row["aim"] = ">= 3" if seeds >= 8 and batch == 32 else "> 1"
        if name in times:
            second = min(times[name]) / steps  # of a step of all its seeds
            row["images/s"], row["ms/step"] = seeds * batch / second, 1e3 * second
            row["MFU %"] = 100 * seeds * operations / second / most if most else "-"
            if best:
                row["ratio"], row["median"] = (seeds * r for r in common.ratio(times, best, name))
        rows.append(row)
    title = (
        f"{model.name}, batch {batch}, {options.side}x{options.side}, {options.rounds} rounds of {steps} "
        f"steps, {operations / batch / 1e9:.4g} Gflops an image, PyTorch {torch.__version__}"
    )
    return common.Report(title, rows)


def reports(options: argparse.Namespace) -> Iterator[common.Report]:
    import torch

    deadline = time.monotonic() + 60 * options.minutes
    for network in options.networks:
        model, variables = create(network, options.side)
        for batch in options.batches:
            if time.monotonic() > deadline:
                print(f"{network}, batch {batch}: not begun, --minutes are over", flush=True)
                continue
            steps = max(1, IMAGES_PER_CALL // batch) if on_gpu() else 2
            yield compare(model, variables, batch, steps, options, deadline)
            # What the programs of one table hold must not be missing for the next.
            torch.compiler.reset()
            jax.clear_caches()
            gc.collect()
            if on_gpu():
                torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    # Options of this benchmark, then those that all have. --help is the latter's, so the docstring names these.
    extra = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    extra.add_argument("--networks")
    extra.add_argument("--batches")
    extra.add_argument("--side", type=int)
    extra.add_argument("--seeds", type=int)
    extra.add_argument("--minutes", type=float, default=60.0)
    extra.add_argument("--autotune", action="store_true")
    extra.add_argument("--deterministic", action="store_true")
    mine, others = extra.parse_known_args(argv)
    shared = common.arguments(__doc__, rounds=10, argv=others)
    options = argparse.Namespace(**vars(mine), **vars(shared))
    networks, batches, side, seeds = "resnet18,resnet50,wrn28-10", "32,256", 32, 8
    if options.quick:
        networks, batches, side, seeds = "wrn10-1", "4", 8, 2
    options.networks = (options.networks or networks).split(",")
    options.batches = [int(batch) for batch in (options.batches or batches).split(",")]
    options.side, options.seeds = options.side or side, options.seeds or seeds
    # JAX would take three quarters of the memory for itself when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import torch
    except ImportError:
        raise SystemExit("benchmarks.gpu compares with PyTorch: pip install torch") from None
    if on_gpu() != torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks.gpu: JAX computes on {jax.default_backend()} and PyTorch has "
            f"{'a' if torch.cuda.is_available() else 'no'} GPU; install both for one, or set JAX_PLATFORMS=cpu and "
            "CUDA_VISIBLE_DEVICES="
        )
    common.publish("gpu", reports(options), options.json)


if __name__ == "__main__":
    main()
