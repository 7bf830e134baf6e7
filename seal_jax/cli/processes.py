"""Joining the processes of a run that is trained on several hosts."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import warnings
from typing import Any

import jax
from jax._src import distributed

from seal_jax.data.preparation import first_line
from seal_jax.errors import CRASHED, UsageError

WAIT_SECONDS = 300  # for the other processes of a run to start
# A silent host is asked after so many seconds, then again each so many, and is gone after so many questions.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
GRACE_SECONDS = 3  # for another thread, or for a process at its end


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of a run, if there are any, within ``WAIT_SECONDS``.

    From then on this process ends, with one line and ``CRASHED``, when another one is gone.

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
    # Not public in JAX, which tells neither the address nor what its processes can write down for each other.
    _watch(distributed.global_state)


def _watch(state: Any) -> None:
    """End this process when another one is gone: killed, crashed, or with its whole host.

    Each process holds a connection to process 0. The system closes those of a process that ends, and asks a host
    that is silent whether it is there; neither waits for what Python is doing, as messages from a thread would.
    """
    peers: list[socket.socket] = []
    ending, first = threading.Event(), threading.Lock()
    # Called before JAX's own, in which processes wait for each other: then all of them are about to end.
    atexit.register(ending.set)

    def follow(connection: socket.socket) -> None:
        peers.append(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        process = lost = b""
        with contextlib.suppress(OSError):  # a connection that is reset
            connection.sendall(b"%d\n" % state.process_id)
            lines = connection.makefile("rb")
            process = lost = lines.readline().strip()
            lost = lines.readline().strip() or process
        if not process.isdigit():
            return  # a stranger
        first.acquire()  # for ever: one line is enough
        # Process 0 tells the others, which would otherwise name it.
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall(lost + b"\n")
        if ending.is_set():
            time.sleep(GRACE_SECONDS)
        print(
            f"error: process {lost.decode()} of {state.num_processes} is gone; start all again: "
            "the run resumes from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(CRASHED)  # not `sys.exit`, as above

    def follow_in_thread(connection: socket.socket) -> None:
        threading.Thread(target=follow, args=[connection], daemon=True).start()

    def accept(server: socket.socket) -> None:
        while True:
            follow_in_thread(server.accept()[0])

    key = "seal_jax/watch"
    if state.process_id == 0:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        state.client.key_value_set(key, str(server.getsockname()[1]))
        threading.Thread(target=accept, args=[server], daemon=True).start()
    else:
        host = state.coordinator_address.rpartition(":")[0].strip("[]")
        port = state.client.blocking_key_value_get(key, 1000 * WAIT_SECONDS)
        try:
            connection = socket.create_connection((host, int(port)), timeout=10)
        except OSError as error:
            warnings.warn(
                f"process 0 is not reached at {host}:{port} ({error}); when a process is gone, "
                "the others end late",
                stacklevel=1,
            )
            return
        connection.settimeout(None)
        follow_in_thread(connection)
    sys.excepthook = _crash
    # JAX aborts as soon as process 0 is gone. An abort now calls sleep(SIGABRT), 6 s, in which the line above comes.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)


def _crash(*error: Any) -> None:
    """Print an uncaught exception, and end without waiting for the other processes, which wait for this one."""
    # A collective with a process that is gone may raise: then the line about that is all there is to say.
    time.sleep(GRACE_SECONDS)
    sys.__excepthook__(*error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(CRASHED)
