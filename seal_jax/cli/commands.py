"""What each command does; imports happen inside, so that each loads only what it needs."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from seal_jax.cli import main
from seal_jax.errors import UsageError

WAIT_SECONDS = 300  # for the other processes of a run to start


def train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train one experiment."""
    root = _folder(options.workdir)
    _start(options)
    return _train(options.config, overrides, root)


def sweep(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train every variant of a config in turn, then compare."""
    from seal_jax.cli import configs

    root = _folder(options.workdir)
    if ":" in options.config:
        raise UsageError(f"--config={options.config} must be a file; sweep trains all its variants")
    variants = configs.variants(options.config)
    if not variants:
        raise UsageError(f"--config={options.config} declares no VARIANTS; use train")
    for variant in variants:  # every error before any training
        configs.load(f"{options.config}:{variant}", overrides)
    _start(options)
    for variant in variants:
        code = _train(f"{options.config}:{variant}", overrides, root / variant)
        if code:
            return code
    if _is_main_process():
        _compare([root / variant for variant in variants], root)
    return main.OK


def compare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the table of several runs and draw their curves."""
    del overrides
    _compare([Path(name) for name in options.workdirs], Path(options.output or "."))
    return main.OK


def prepare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Prepare a data set."""
    del overrides
    from seal_jax import data

    where = data.prepare(options.dataset, data_dir=options.data_dir, manual_dir=options.manual_dir)
    print(f"{options.dataset} is prepared in {where}")
    return main.OK


def evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Evaluate the networks of a run."""
    del overrides
    from seal_jax.evaluators import command

    _cache_programs()
    print(command.run(options))
    return main.OK


def datasets(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """List the data sets of the papers."""
    del overrides
    from seal_jax.cli import datasets_table

    print(datasets_table.as_text(options.data_dir))
    return main.OK


def methods(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """List the systems of the papers."""
    del options, overrides
    from seal_jax import methods
    from seal_jax.core.tables import aligned

    header = ("system", "method.name and options", "configs/", "source")
    rows = [
        (system.name, f"{system.method} {system.options}".strip(), system.config, system.source)
        for system in methods.VARIANTS.values()
    ]
    print("\n".join(aligned([header, *rows])))
    print("\nAll of them train in seconds as variants of configs/digits.py.")
    print("What the methods do, one file each in seal_jax/methods/:")
    width = max(map(len, methods.NAMES))
    for name in methods.NAMES:
        print(f"  {name:{width}}  {methods.summary(name)}")
    return main.OK


def slim(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Export the slim network of a KELS run."""
    del overrides
    from seal_jax.training import slim

    if not options.output:
        raise UsageError("--output= is empty; name a folder")
    print(slim.export(Path(options.run), Path(options.output)))
    return main.OK


def preflight(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Compile a config's train program for a TPU and print its cost."""
    from seal_jax.preflight import command

    return command.run(options.config, overrides, options.topology, options.json)


def reproduce(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run an experiment of a paper again."""
    del overrides
    from seal_jax.reproduce import command

    return command.run(options)


def _start(options: argparse.Namespace) -> None:
    """Join the other processes, if there are any, before JAX starts its devices."""
    where = f"--coordinator={options.coordinator}"
    if options.coordinator == "auto":
        _join(where, "the cluster of this machine (is it in one? else give HOST:PORT, N and I)")
    elif options.coordinator:
        if options.processes is None or options.process is None:
            raise UsageError("--coordinator=HOST:PORT needs --processes=N and --process=I")
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(f"{where} must be HOST:PORT, with a port in 1..65535")
        if not 0 <= options.process < options.processes:
            raise UsageError(
                f"--process={options.process} must lie in 0..{options.processes - 1} (--processes="
                f"{options.processes})"
            )
        others = f"the other {options.processes - 1} processes"
        whom = others if options.process == 0 else "process 0"
        _join(where, whom, (options.coordinator, options.processes, options.process))
    elif options.processes is not None or options.process is not None:
        raise UsageError("--processes and --process need --coordinator=HOST:PORT")
    _cache_programs()


def _join(
    where: str, whom: str, processes: tuple[str | None, int | None, int | None] = (None, None, None)
) -> None:
    """Join the other processes of a run, within ``WAIT_SECONDS``."""
    import jax

    from seal_jax.data.preparation import first_line

    def give_up() -> None:
        text = f"{where}: waited {WAIT_SECONDS} s for {whom} in vain; start all, with one HOST:PORT"
        os._exit(main.fail(text, main.USAGE))

    # Not by jax's own time limit: that ends the process with a stack trace of C++.
    timer = threading.Timer(WAIT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(*processes, initialization_timeout=2 * WAIT_SECONDS)
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"{where}: {whom} cannot be joined: {first_line(error)[:200]}") from error
    finally:
        timer.cancel()


def _cache_programs() -> None:
    """Keep compiled programs on disk: what is taken up again should not compile again."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "seal_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _folder(workdir: str) -> Path:
    if "://" in workdir:
        raise UsageError(
            f"--workdir={workdir} is no folder of the file system; mount the bucket and give its folder"
        )
    return Path(workdir)


def _is_main_process() -> bool:
    import jax

    return jax.process_index() == 0


def _train(config: str, overrides: Sequence[str], workdir: Path) -> int:
    import jax

    from seal_jax import reports
    from seal_jax.cli import configs
    from seal_jax.training import experiment, loop
    from seal_jax.training import workdir as workdirs

    settings = configs.load(config, overrides)
    dataset = experiment.load_data(settings.data)
    try:
        outcome = loop.train(settings, workdir, dataset)
    except OSError as error:  # a full disk, or a folder that went away
        if isinstance(error, BrokenPipeError):
            raise
        code = main.fail(str(error), main.UNWRITABLE)
        if jax.process_count() > 1:
            # The others wait for this process in the step, and a normal exit would wait for them.
            sys.stdout.flush()
            os._exit(code)
        return code
    if _is_main_process() and (workdir / workdirs.METRICS).stat().st_size:
        reports.draw_run(workdir)
    if not outcome.finished:
        print(f"stopped at step {outcome.step}; the same command goes on from there", flush=True)
        return main.STOPPED
    return main.OK


def _compare(workdirs: list[Path], output: Path) -> None:
    from seal_jax import reports

    comparison = reports.write_report(workdirs, output)
    print(comparison.as_text())
    print(f"report: {output / 'report.html'}, with generations.csv, curves.png and more beside it")
