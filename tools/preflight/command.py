"""The command: compile a config's real train program for TPU chips that this machine does not have.

python -m tools.preflight --config=configs/digits.py:seal --topology=v5e:2x4 --price=1.20
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seal_jax.cli import configs, main
from seal_jax.core import files
from seal_jax.core.settings import Settings
from seal_jax.core.tables import aligned
from seal_jax.data.catalogue import RECORDS
from seal_jax.errors import OK, USAGE, UsageError
from tools.preflight.report import number
from tools.preflight.topology import parse

# (train, test, image shape, classes) of the data sets of the papers: a program depends on the shapes of its
# data alone, so it is compiled without the data.
KNOWN = {
    name: (int(info.train), int(info.test or 0), info.image_shape, info.classes)
    for info in RECORDS
    if info.image_shape
    for name in info.names
}


# Exit code where the program does not fit into the chips' memory.
TOO_LARGE = 3


class Answer(NamedTuple):
    """What the compiler's process sends: ``kind`` is "report", "too large" or "error"; ``record`` of a report."""

    kind: str
    text: str
    record: dict[str, Any]


def run(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; return the exit code."""
    return main.exit_code(lambda: _run(arguments))


def parser() -> main.Parser:
    """Return the parser of the options."""
    parser = main.Parser(
        prog="python -m tools.preflight",
        description="Compile a config's train program with the real TPU compiler, on any machine; "
        "print memory, time, roofline and cost of the whole run. Exit code 0: it fits into the chips' memory, "
        f"{TOO_LARGE}: it does not, 2: bad input, or no compilation.",
        epilog=main.OVERRIDES,
        allow_abbrev=False,
    )
    parser.set_defaults(command="preflight")
    parser.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="a file of configs/"
    )
    parser.add_argument(
        "--topology",
        default="v5e:2x4",
        metavar="KIND:SHAPE",
        help="chips (default: %(default)s); several, separated by commas, give a table",
    )
    parser.add_argument(
        "--price",
        metavar="DOLLARS",
        help="of a chip-hour, for the cost of the whole run; or one for each topology, separated by commas",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the report there too, of several topologies a list"
    )
    return parser


def _run(arguments: Sequence[str]) -> int:
    """Print the report of a config's train program."""
    options, overrides = main.parse(parser(), arguments)
    config, output = options.config, options.json
    settings = configs.load(config, overrides)
    topologies = options.topology.split(",")
    for topology in topologies:
        parse(topology)
    prices = _prices(options.price, len(topologies))
    if output and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UsageError(f"--json={output} must be a file in a folder that exists")
    answers = []
    for topology, price in zip(topologies, prices, strict=True):
        answer = _compile(settings, config, topology, price)
        # Of several topologies one that cannot be compiled does not hide the others.
        if answer.kind == "error" and len(topologies) == 1:
            raise UsageError(answer.text)
        answers.append(answer)
    if len(answers) == 1:
        print(answers[0].text)
    else:
        print(table(topologies, answers))
    if output:
        records = [
            {"topology": name} | answer.record
            for name, answer in zip(topologies, answers, strict=True)
        ]
        files.write(
            Path(output), json.dumps(records[0] if len(records) == 1 else records, indent=2) + "\n"
        )
    if any(answer.record.get("fits") is False for answer in answers):
        return TOO_LARGE
    return USAGE if any(answer.kind == "error" for answer in answers) else OK


def _prices(text: str | None, count: int) -> list[float | None]:
    if text is None:
        return [None] * count
    try:
        prices = [float(part) for part in text.split(",")]
    except ValueError:
        prices = []
    if len(prices) == 1:
        prices *= count
    if len(prices) != count or not all(0 < price < float("inf") for price in prices):
        raise UsageError(
            f"--price={text} must be dollars per chip-hour, such as 1.20: one number above 0, or one for "
            f"each of {count} topologies"
        )
    return list(prices)


def _compile(settings: Settings, config: str, topology: str, price: float | None) -> Answer:
    """Return the compiler's answer, from a process of its own."""
    # In another process: the compiler may crash, which ends its process without an exception. Spawned, since
    # JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(settings, topology, price, sender))
    child.start()
    # With this end open here, `recv` would wait for ever after a crash instead of raising EOFError.
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0  # negative: the signal that ended it
        if code >= 0:  # an exception, which the child has printed
            raise RuntimeError(f"preflight of {config} failed, see above") from None
        return Answer(
            "error",
            f"the TPU compiler died ({signal.Signals(-code).name}) on {config} for "
            f"--topology={topology}; another batch size per chip, or another topology, may compile",
            {"error": "the TPU compiler died"},
        )
    child.join()
    return answer


def table(topologies: Sequence[str], answers: Sequence[Answer]) -> str:
    """Return a line for each topology."""
    header = [
        "topology",
        "fits",
        "memory",
        "ms a step",
        "images/s",
        "MFU",
        "hours",
        "dollars",
        "most of it",
    ]

    def cell(value: float | None, times: float = 1, unit: str = "") -> str:
        return "" if value is None else f"{number(value * times)}{unit}"

    rows, notes = [], []
    for topology, (kind, text, record) in zip(topologies, answers, strict=True):
        if kind != "report":
            rows.append([topology, "no" if kind == "too large" else "?", *[""] * (len(header) - 2)])
            notes.append(f"{topology}: {text}")
            continue
        memory, seconds = record["memory"], record["seconds"]
        share = memory["needed"] / record["hbm"] if memory and record["hbm"] else None
        rows.append(
            [
                topology,
                {True: "yes", False: "no", None: "?"}[record["fits"]],
                cell(share, 100, " %"),
                cell(seconds, 1e3 / record["steps"]),
                cell(record["images_per_second"]),
                cell(record["mfu"], 100, " %"),
                cell(record["hours"]),
                cell(record["dollars"]),
                record["dominant"] or "",
            ]
        )
    return "\n".join([*aligned([header, *rows], right=range(2, 8)), *notes])


def _child(settings: Settings, topology: str, price: float | None, sender: Any) -> None:
    from tools.preflight.topology import prepare_environment

    # What the user can fix is sent as text. Any other exception ends this process, which prints its traceback.
    try:
        # Before JAX starts its backends.
        prepare_environment(topology)
        sender.send(_report(settings, topology, price))
    except UsageError as error:
        sender.send(Answer("error", str(error), {"error": str(error)}))


def _report(settings: Settings, topology: str, price: float | None) -> Answer:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from seal_jax import methods
    from seal_jax.core import mesh as meshes
    from seal_jax.data import class_counts
    from seal_jax.training import experiment as experiments
    from seal_jax.training.batches import row_bytes
    from tools.preflight.report import Run, analyse
    from tools.preflight.topology import devices_for

    # A program for chips that are not here can be written to JAX's cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
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
    lowered = experiment.train.lower(state, train)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = f"does not fit: {str(error).splitlines()[0]}"
        return Answer("too large", text, {"fits": False})
    report = dataclasses.replace(
        analyse(compiled, steps=experiment.steps_per_call),
        run=Run(
            experiment.total_steps,
            settings.train.seeds * settings.train.batch_size,
            experiment.mesh.size,
            price,
        ),
    )
    # Not arguments of the train program, so the compiler does not count them.
    beside = (shape.validation + shape.test) * row_bytes(image_shape) / 2**20
    summary = (
        f"{experiment.summary()}\nnot counted below: validation and test images, {beside:,.1f} MiB "
        "on every device"
    )
    return Answer("report", f"{summary}\n\n{report.as_text()}", report.as_dict())
