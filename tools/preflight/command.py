"""The command: compile the real programs of a config for TPU chips that this machine does not have.

python -m tools.preflight --config=configs/digits.py:seal --topology=v5e:2x4 --price=1.20
"""

from __future__ import annotations

import argparse
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
from seal_jax.errors import OK, USAGE, UsageError, check_choice
from tools.preflight.report import number
from tools.preflight.topology import parse

# Exit code where the program does not fit into the chips' memory.
TOO_LARGE = 3


PROGRAMS = ("train", "evaluate", "hessian", "few_shot")
# Those that are evaluators, and have their options.
EVALUATORS = ("hessian", "few_shot")
# Otherwise the compiler unrolls the sorts that draw the order of an epoch, which takes 9 s longer for 50,000 images.
COMPILER_OPTIONS = {"xla_tpu_roll_intra_lane_for_bitonic_sort": "true"}


class Case(NamedTuple):
    """One compilation: a program of these settings, with the options of its evaluator, for a topology."""

    program: str
    settings: Settings
    options: Any
    topology: str
    price: float | None


class Answer(NamedTuple):
    """What the compiler's process sends: ``kind`` is "report", "too large" or "error"; ``record`` of a report."""

    kind: str
    text: str
    record: dict[str, Any]


def run(arguments: Sequence[str]) -> int:
    """Run the command with these arguments; return the exit code."""
    return main.exit_code(lambda: _run(arguments))


def parser(program: str | None = None) -> main.Parser:
    """Return the parser of the options, with those of the evaluator that the program belongs to."""
    parser = main.Parser(
        prog="python -m tools.preflight",
        description="Compile a config's program with the real TPU compiler, on any machine; "
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
        "--program",
        default="train",
        metavar="|".join(PROGRAMS),
        help="train: the steps of the training (default); evaluate: the scoring of its test images; hessian: a "
        "product with the Hessian; few_shot: episodes with Linear+Affines; the last two take the options of evaluate",
    )
    parser.add_argument(
        "--topology",
        default="v5e:2x4",
        metavar="KIND:SHAPE",
        help="chips (default: %(default)s); several, separated by commas, give a table",
    )
    parser.add_argument(
        "--seeds",
        metavar="N,N",
        help="in place of train.seeds; several give a table",
    )
    parser.add_argument(
        "--price",
        metavar="DOLLARS",
        help="of a chip-hour, for the cost of the whole run; or one for each topology, separated by commas",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the report there too, of a table a list"
    )
    if program in EVALUATORS:
        from seal_jax import evaluators
        from seal_jax.evaluators import options as options_lib

        options_lib.add_arguments(
            evaluators.load(program).options, parser.add_argument_group(program)
        )
    return parser


def _run(arguments: Sequence[str]) -> int:
    """Print the report of one case, or the table of several."""
    # In two passes: the options depend on --program.
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--program", nargs="?")
    program = before.parse_known_args(list(arguments))[0].program
    parsed, overrides = main.parse(parser(program), arguments)
    check_choice("--program", parsed.program, PROGRAMS)
    if parsed.program in EVALUATORS and parsed.seeds:
        raise UsageError(
            f"--seeds={parsed.seeds}: --program={parsed.program} is the work on one network; leave it out"
        )
    output = parsed.json
    topologies = parsed.topology.split(",")
    for topology in topologies:
        parse(topology)
    prices = _prices(parsed.price, len(topologies))
    if output and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UsageError(f"--json={output} must be a file in a folder that exists")
    cases = [
        Case(parsed.program, settings, _options(parsed), topology, price)
        for topology, price in zip(topologies, prices, strict=True)
        for settings in _with_seeds(parsed.config, overrides, parsed.seeds)
    ]
    if len(cases) == 1:
        answers = [_compile(cases[0], parsed.config)]
        # Of several cases one that cannot be compiled does not hide the others.
        if answers[0].kind == "error":
            raise UsageError(answers[0].text)
        print(answers[0].text)
    else:
        answers = _compile_all(cases, parsed.config)
        print(table(cases, answers))
    if output:
        records = [
            {"topology": case.topology, "seeds": case.settings.train.seeds} | answer.record
            for case, answer in zip(cases, answers, strict=True)
        ]
        files.write(
            Path(output), json.dumps(records[0] if len(records) == 1 else records, indent=2) + "\n"
        )
    if any(answer.record.get("fits") is False for answer in answers):
        return TOO_LARGE
    return USAGE if any(answer.kind == "error" for answer in answers) else OK


def _options(parsed: argparse.Namespace) -> Any:
    if parsed.program not in EVALUATORS:
        return None
    from seal_jax import evaluators
    from seal_jax.evaluators import options as options_lib

    return options_lib.read(evaluators.load(parsed.program).options, parsed)


def _with_seeds(config: str, overrides: Sequence[str], text: str | None) -> list[Settings]:
    """Return the settings of the config, once for each number of seeds asked for."""
    if text is None:
        return [configs.load(config, overrides)]
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise UsageError(f"--seeds={text} must be numbers above 0, such as 8,16,32")
    return [configs.load(config, [*overrides, f"--config.train.seeds={n}"]) for n in counts]


def _compile_all(cases: Sequence[Case], config: str) -> list[Answer]:
    """Compile one case after the other, with progress on stderr."""
    from seal_jax.training.progress import Progress

    answers = []
    # `enabled`: to find out whether this is the first process would start JAX's backend. A line for each.
    with Progress(len(cases), unit="program", enabled=True, every=0.0) as progress:
        for case in cases:
            answers.append(_compile(case, config))
            progress.update(len(answers))
    return answers


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


def _compile(case: Case, config: str) -> Answer:
    """Return the compiler's answer, from a process of its own."""
    # In another process: the compiler may crash, which ends its process without an exception. Spawned, since
    # JAX's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(case, sender))
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
            f"--topology={case.topology}; another batch size per chip, or another topology, may compile",
            {"error": "the TPU compiler died"},
        )
    child.join()
    return answer


def table(cases: Sequence[Case], answers: Sequence[Answer]) -> str:
    """Return a line for each case."""
    header = [
        "topology",
        "seeds",
        "a chip",
        "batching",
        "fits",
        "memory",
        "ms a step",
        "images/s",
        "MFU",
        "hours",
        "dollars",
        "a seed",
        "most of it",
    ]

    def cell(value: float | None, times: float = 1, unit: str = "") -> str:
        return "" if value is None else f"{number(value * times)}{unit}"

    rows, notes = [], []
    for case, (kind, text, record) in zip(cases, answers, strict=True):
        seeds = case.settings.train.seeds
        row = [case.topology, str(seeds)]
        if kind != "report":
            row += ["", "", "no" if kind == "too large" else "?"]
            rows.append([*row, *[""] * (len(header) - len(row))])
            notes.append(f"{case.topology}, {seeds} seed(s): {text}")
            continue
        memory, seconds = record["memory"], record["seconds"]
        share = memory["needed"] / record["hbm"] if memory and record["hbm"] else None
        per_chip = record.get("seeds_per_chip", 0)
        rows.append(
            [
                *row,
                str(per_chip or ""),
                record["seed_batching"] if per_chip > 1 else "",
                {True: "yes", False: "no", None: "?"}[record["fits"]],
                cell(share, 100, " %"),
                cell(seconds, 1e3 / record["steps"]),
                cell(record["images_per_second"]),
                cell(record["mfu"], 100, " %"),
                cell(record["hours"]),
                cell(record["dollars"]),
                cell(record["dollars"], 1 / record["networks"]),
                record["dominant"] or "",
            ]
        )
    return "\n".join([*aligned([header, *rows], right=[1, 2, *range(5, 12)]), *notes])


def _child(case: Case, sender: Any) -> None:
    from tools.preflight.topology import prepare_environment

    # What the user can fix is sent as text. Any other exception ends this process, which prints its traceback.
    try:
        # Before JAX starts its backends.
        prepare_environment(case.topology)
        sender.send(_report(case))
    except UsageError as error:
        sender.send(Answer("error", str(error), {"error": str(error)}))


def _report(case: Case) -> Answer:
    import jax

    from seal_jax import methods
    from seal_jax.core import mesh as meshes
    from seal_jax.training import experiment as experiments
    from tools.preflight import programs
    from tools.preflight.report import analyse
    from tools.preflight.topology import devices_for

    # A program for chips that are not here can be written to JAX's cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    settings = methods.complete(case.settings)
    shape = programs.data_shape(settings)
    mesh = meshes.make(settings, devices_for(case.topology))
    experiment = experiments.build(settings, shape, mesh)
    program = programs.PROGRAMS[case.program](experiment, case.options, case.price)
    try:
        compiled = program.lowered.compile(compiler_options=COMPILER_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = f"does not fit: {str(error).splitlines()[0]}"
        return Answer("too large", text, {"fits": False})
    report = dataclasses.replace(analyse(compiled, steps=program.steps), run=program.run)
    record = {"program": case.program, "networks": program.run.networks}
    if case.program not in EVALUATORS:
        record["seeds_per_chip"] = settings.train.seeds // mesh.shape[meshes.SEED]
        record["seed_batching"] = experiment.seed_batching
    text = f"{experiment.summary()}\n{program.notes}\n\n{report.as_text()}"
    return Answer("report", text, report.as_dict() | record)
