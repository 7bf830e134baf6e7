"""Files of reports: written beside and moved into place, so that none is seen half-written."""

from __future__ import annotations

import os
from pathlib import Path

from seal_jax.errors import UsageError


def write(path: Path, content: str | bytes) -> None:
    """Write a whole file.

    Raises:
      UsageError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
