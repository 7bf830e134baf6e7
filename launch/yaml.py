"""Writes the few kinds of values that manifests consist of as YAML."""

from __future__ import annotations

import json
import re
from typing import Any

# Keys that YAML reads as they are; not "no" and the like, which it takes for something else.
_PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z/][A-Za-z0-9_./-]*", re.I)


def dump(value: Any, indent: int = 0) -> str:
    """Return a mapping as YAML, block style, every string quoted as in JSON, of which YAML is a superset.

    >>> print(dump({"kind": "Job", "spec": {"args": ["a b", "no"], "replicas": 2, "empty": {}}}))
    kind: "Job"
    spec:
      args:
      - "a b"
      - "no"
      replicas: 2
      empty: {}
    """
    space, lines = "  " * indent, []
    for name, entry in value.items():
        key = name if _PLAIN.fullmatch(name) else json.dumps(name)
        if isinstance(entry, dict) and entry:
            lines += [f"{space}{key}:", dump(entry, indent + 1)]
        elif isinstance(entry, list) and entry:
            lines.append(f"{space}{key}:")
            for item in entry:
                # An item's first line follows its dash, the others stand below that line.
                text = (
                    dump(item, indent + 1).lstrip() if isinstance(item, dict) else json.dumps(item)
                )
                lines.append(f"{space}- {text}")
        # Scripts stay readable. A block would lose blanks at the ends of lines.
        elif isinstance(entry, str) and "\n" in entry and not re.search(r"^\s|\s$|[ \t]\n", entry):
            lines.append(f"{space}{key}: |-")
            lines += [f"{space}  {line}" if line else "" for line in entry.split("\n")]
        else:
            lines.append(f"{space}{key}: {json.dumps(entry)}")
    return "\n".join(lines)
