"""Joining the processes of a run that is trained on several hosts."""

from __future__ import annotations

import os
import sys
import threading

import jax

from seal_jax.data.preparation import first_line
from seal_jax.errors import CRASHED, UsageError

WAIT_SECONDS = 300  # for the other processes of a run to start


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of a run, if there are any, within ``WAIT_SECONDS``.

    The ``coordinator`` is ``HOST:PORT`` of process 0, or "auto" where the cluster says how many
    processes there are and which this is. With None nothing is joined.

    Raises:
      UsageError: arguments that do not fit, or processes that cannot be joined.
    """
    if not coordinator:
        if processes is not None or process is not None:
            raise UsageError("--processes and --process need --coordinator=HOST:PORT")
        return
    where = f"--coordinator={coordinator}"
    if coordinator == "auto":
        others = "the cluster of this machine (is it in one? else give HOST:PORT, N and I)"
        # JAX then asks the environment: Cloud TPU's metadata, Slurm, and others.
        arguments: tuple[str | None, int | None, int | None] = (None, None, None)
    else:
        if processes is None or process is None:
            raise UsageError("--coordinator=HOST:PORT needs --processes=N and --process=I")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(f"{where} must be HOST:PORT, with a port in 1..65535")
        if not 0 <= process < processes:
            raise UsageError(
                f"--process={process} must lie in 0..{processes - 1} (--processes={processes})"
            )
        others = f"the other {processes - 1} processes" if process == 0 else "process 0"
        arguments = (coordinator, processes, process)

    def give_up() -> None:
        print(
            f"error: {where}: waited {WAIT_SECONDS} s for {others} in vain; start all, with one "
            "HOST:PORT",
            file=sys.stderr,
            flush=True,
        )
        # Not `sys.exit`: this is the timer's thread, and the main one is stuck inside JAX. Not bad input: what
        # starts this command again must do so, for machines that come late or come back.
        os._exit(CRASHED)

    # Not by JAX's time limit, which ends the process with a stack trace of C++. It is set to twice as long,
    # so that the timer is first.
    timer = threading.Timer(WAIT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(*arguments, initialization_timeout=2 * WAIT_SECONDS)
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"{where}: {others} cannot be joined: {first_line(error)[:200]}"
        ) from error
    finally:
        timer.cancel()
