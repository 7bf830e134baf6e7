"""The command: compile a config's real train program for TPU chips that this machine does not have.

python -m tools.preflight --config=configs/digits.py:seal --topology=v5e:2x4
"""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seal_jax.cli import configs, main
from seal_jax.core import files
from seal_jax.core.settings import Settings
from seal_jax.data.catalogue import RECORDS
from seal_jax.errors import UsageError

# (train, test, image shape, classes) of the data sets of the papers: a program depends on the shapes of its
# data alone, so it is compiled without the data.
KNOWN = {
    name: (int(info.train), int(info.test or 0), info.image_shape, info.classes)
    for info in RECORDS
    if info.image_shape
    for name in info.names
}


def run(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; return the exit code."""
    return main.exit_code(lambda: _run(arguments))


def parser() -> main.Parser:
    """Return the parser of the options."""
    parser = main.Parser(
        prog="python -m tools.preflight",
        description="Compile a config's train program with the real TPU compiler, on any machine; "
        "print its cost.",
        epilog=main.OVERRIDES,
        allow_abbrev=False,
    )
    parser.set_defaults(command="preflight")
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a file of configs/"
    )
    parser.add_argument(
        "--topology", default="v5e:2x4", metavar="KIND:SHAPE", help="chips (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    return parser


def _run(arguments: Sequence[str]) -> int:
    """Print the report of a config's train program."""
    options, overrides = main.parse(parser(), arguments)
    config, topology, output = options.config, options.topology, options.json
    settings = configs.load(config, overrides)
    if output and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UsageError(f"--json={output} must be a file in a folder that exists")
    # In another process: the compiler may crash, which ends its process without an exception. Spawned, since
    # JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(settings, topology, sender))
    child.start()
    # With this end open here, `recv` would wait for ever after a crash instead of raising EOFError.
    sender.close()
    try:
        kind, text, record = receiver.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0  # negative: the signal that ended it
        if code >= 0:  # an exception, which the child has printed
            raise RuntimeError(f"preflight of {config} failed, see above") from None
        raise UsageError(
            f"the TPU compiler died ({signal.Signals(-code).name}) on {config} for "
            f"--topology={topology}; another batch size per chip, or another topology, may compile"
        ) from None
    child.join()
    if kind == "error":
        raise UsageError(text)
    print(text)
    if output:
        files.write(Path(output), json.dumps(record, indent=2) + "\n")
    return 0


def _child(settings: Settings, topology: str, sender: Any) -> None:
    from tools.preflight.topology import prepare_environment

    # What the user can fix is sent as text. Any other exception ends this process, which prints its traceback.
    try:
        # Before JAX starts its backends.
        prepare_environment(topology)
        sender.send(("report", *_report(settings, topology)))
    except UsageError as error:
        sender.send(("error", str(error), None))


def _report(settings: Settings, topology: str) -> tuple[str, dict]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from seal_jax import methods
    from seal_jax.core import mesh as meshes
    from seal_jax.data import class_counts
    from seal_jax.training import experiment as experiments
    from seal_jax.training.batches import row_bytes
    from tools.preflight.report import analyse
    from tools.preflight.topology import devices_for

    settings = methods.complete(settings)
    if settings.data.name not in KNOWN:
        raise UsageError(
            f"data.name = {settings.data.name!r} has no known shape for preflight; "
            f"known are {', '.join(KNOWN)}"
        )
    train_size, test_size, image_shape, classes = KNOWN[settings.data.name]
    if settings.data.image_size:
        image_shape = (settings.data.image_size, settings.data.image_size, image_shape[2])
    image_shape = (*image_shape[:2], settings.data.channels or image_shape[2])
    # As the trainer splits and lays out its data, but with shapes alone.
    fields = settings.data
    held_out = round(train_size * fields.validation_fraction)
    train_size -= held_out
    if fields.train_count or fields.imbalance > 1:
        # The known data sets have as many images of each class, or nearly.
        available = np.full(classes, train_size // classes)
        train_size = int(class_counts(available, fields.train_count, fields.imbalance).sum())
    noisy = bool(fields.label_noise or fields.label_file)
    shape = experiments.DataShape(
        train_size, held_out, test_size, image_shape, classes, noisy=noisy
    )
    mesh = meshes.make(settings, devices_for(topology))
    experiment = experiments.build(settings, shape, mesh)
    replicated = NamedSharding(experiment.mesh, meshes.REPLICATED)
    # The training images are on every device, whole.
    train = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        experiment.abstract_data(),
    )
    state = experiment.abstract_state(settings.train.seeds)
    compiled = experiment.train.lower(state, train).compile()
    report = analyse(compiled, steps=experiment.steps_per_call)
    # Not arguments of the train program, so the compiler does not count them.
    beside = (shape.validation + shape.test) * row_bytes(image_shape) / 2**20
    summary = (
        f"{experiment.summary()}\nnot counted below: validation and test images, {beside:,.1f} MiB "
        "on every device"
    )
    return f"{summary}\n\n{report.as_text()}", report.as_dict()
