"""TensorBoard event files, written without TensorFlow."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from seal_jax.training.rows import Row, mean


class TensorBoard:
    """One event file, written record by record.

    Not tensorboard's ``EventFileWriter``: that imports TensorFlow wherever it is installed, and
    writes from a thread of its own.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter((folder / name).open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, row: Row) -> None:
        """Write the scalars of one row: of several seeds the mean, and each seed's own."""
        values = []
        for name, value in row.items():
            if name == "step":
                continue
            values.append(Summary.Value(tag=name, simple_value=mean(value)))
            if isinstance(value, list) and len(value) > 1:
                values += [
                    Summary.Value(tag=f"{name}/seed{seed}", simple_value=number)
                    for seed, number in enumerate(value)
                ]
        self._write(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def flush(self) -> None:
        """Bring what was written to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
