"""How often a ``while`` loop runs, where its text settles it."""

from __future__ import annotations

import re

from seal_jax.preflight.hlo import Computation, Instruction, Module

# A loop-carried integer as `carried element + offset`; the element is None for a constant.
Affine = tuple[int | None, int]
_TRANSPARENT = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")
_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Return how often ``loop`` runs its body, or ``None`` where the text leaves it open.

    The compiler's own ``known_trip_count`` wins. The TPU compiler writes none, so a counter is
    looked for: compared with a constant in the condition, moved by a constant in the body and set
    to a constant before the loop. Whatever departs from that is unknown.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations.get(next(iter(loop.called("condition")), ""))
    body = module.computations.get(next(iter(loop.called("body")), ""))
    if condition is None or body is None:
        return None
    test = condition.instructions[condition.root]
    direction = re.search(r"direction=(\w+)", test.attributes)
    if test.opcode != "compare" or direction is None or direction[1] not in _SWAPPED:
        return None
    left, right = (_affine(condition, name) for name in test.operands)
    if left is None or right is None:
        return None
    compare = direction[1]
    if left[0] is None:
        left, right, compare = right, left, _SWAPPED[compare]
    if left[0] is None or left[1]:
        return None
    element = left[0]
    start = _before(caller, loop, element)
    after = _affine(body, _element(body, body.root, element))
    bound: int | None = right[1]
    if right[0] is not None:
        # The bound is carried too: a constant only if the body hands it on untouched.
        untouched = _affine(body, _element(body, body.root, right[0])) == (right[0], 0)
        bound = _before(caller, loop, right[0]) if untouched and not right[1] else None
    if start is None or bound is None or after is None or after[0] != element or not after[1]:
        return None
    step = after[1]
    if compare == "NE":
        compare = "LT" if step > 0 else "GT"
        if (bound - start) % step:
            return None
    if (step > 0) != (compare in ("LT", "LE")):
        return None
    stop = bound + (step // abs(step) if compare in ("LE", "GE") else 0)
    return len(range(start, stop, step))


def _before(caller: Computation, loop: Instruction, element: int) -> int | None:
    value = _affine(caller, _element(caller, loop.operands[0], element))
    return value[1] if value is not None and value[0] is None else None


def _element(computation: Computation, name: str | None, index: int) -> str | None:
    """Return the name of element ``index`` of the tuple ``name``."""
    made = computation.instructions.get(name or "")
    if made is None or made.opcode != "tuple" or index >= len(made.operands):
        return None
    return made.operands[index]


def _affine(computation: Computation, name: str | None) -> Affine | None:
    made = computation.instructions.get(name or "")
    if made is None:
        return None
    if made.opcode == "constant":
        return (None, int(made.argument)) if re.fullmatch(r"-?\d+", made.argument) else None
    if made.opcode == "get-tuple-element":
        source = computation.instructions.get(made.operands[0])
        index = re.search(r"\bindex=(\d+)", made.attributes)
        if source is None or source.opcode != "parameter" or index is None:
            return None
        return int(index[1]), 0
    if made.opcode in _TRANSPARENT and made.operands:
        return _affine(computation, made.operands[0])
    if made.opcode in ("add", "subtract"):
        left, right = (_affine(computation, operand) for operand in made.operands)
        if left is None or right is None:
            return None
        if made.opcode == "subtract":
            return (left[0], left[1] - right[1]) if right[0] is None else None
        if left[0] is not None and right[0] is not None:
            return None
        return (left[0] if right[0] is None else right[0]), left[1] + right[1]
    return None
