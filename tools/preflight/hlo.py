"""Parser of optimised HLO text into computations and instructions, and the trip counts of its loops."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

# The text is not a stable format: what follows reads only what the reports need, and tests hold excerpts of it.
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
_HEAD = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ROW = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})$')
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(r"\b(\w+)=(?:%([\w.\-]+)|\{(%[^}]*)\})")
# Of types whose name has no number of bits. A bool takes a byte.
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      name: name, without the percent sign.
      shape: text of the shape of its result, in parentheses for a tuple.
      opcode: such as ``"fusion"``.
      argument: the text between the parentheses after the opcode.
      attributes: the text after them.
      op_name: the scope path that JAX gave it, or ``""``.
      source: ``"file:line"``, or ``""``.
      cycles: the compiler's estimate, or ``None``.
    """

    name: str
    shape: str
    opcode: str
    argument: str
    attributes: str
    op_name: str
    source: str
    cycles: int | None

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands."""
        return tuple(re.findall(r"%([\w.\-]+)", self.argument))

    def called(self, *roles: str) -> tuple[str, ...]:
        """Return the computations named by the attributes ``roles``, in the order of the text."""
        # The metadata is cut off: a path in it may look like an attribute.
        return tuple(
            name
            for role, single, several in _CALLS.findall(self.attributes.partition("metadata=")[0])
            if role in roles
            for name in ([single] if single else re.findall(r"%([\w.\-]+)", several))
        )


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text; ``root`` names the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name; ``entry`` names the one that runs."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Read the text of ``jax.stages.Compiled.as_text()``."""
    tables: dict[str, dict[int, str]] = {}
    computations: dict[str, Computation] = {}
    entry = root = name = ""
    table: dict[int, str] | None = None
    body: dict[str, Instruction] | None = None  # None outside of a computation
    for line in text.splitlines():
        if body is None:
            # Before the computations are tables of numbered rows to which the metadata refers.
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = tables.setdefault(line, {})
            elif table is not None and (row := _ROW.match(line)):
                table[int(row[1])] = row[2] if row[2] is not None else row[3]
            elif header := _HEADER.match(line):
                name, body, root, table = header["name"], {}, "", None
                entry = name if header["entry"] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, body, root)
            body = None
        elif head := _HEAD.match(line):
            instruction = _instruction(head["name"], line[head.end() :], tables)
            body[instruction.name] = instruction
            root = instruction.name if head["root"] else root
    return Module(computations, entry)


class Array(NamedTuple):
    """An array of a shape's text: ``bytes`` without the padding of its tiles; ``in_hbm`` False in on-chip memory."""

    dims: tuple[int, ...]
    bytes: int
    in_hbm: bool


def arrays(shape: str) -> list[Array]:
    """Return every array in a shape's text.

    >>> arrays("(f32[16]{0:T(128)S(1)}, /*index=1*/bf16[2,3])")
    [Array(dims=(16,), bytes=64, in_hbm=False), Array(dims=(2, 3), bytes=12, in_hbm=True)]
    """
    found = []
    for kind, sizes, layout in _ARRAY.findall(shape):
        dims = tuple(int(size) for size in sizes.split(",") if size)
        # The first number in the type's name: 32 of f32, 16 of bf16, 8 of f8e4m3.
        digits = re.search(r"\d+", kind)
        bits = _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0
        # S(n) in a layout is the memory space; HBM is 0, which is not written.
        found.append(Array(dims, -(-math.prod(dims) * bits // 8), "S(" not in layout))
    return found


def array_bytes(shape: str) -> list[int]:
    """Return the bytes of every array in a shape's text, without the padding of its tiles.

    >>> array_bytes("(f32[16]{0:T(128)}, /*index=1*/bf16[2,3], pred[])")
    [64, 12, 1]
    """
    return [array.bytes for array in arrays(shape)]


def _instruction(name: str, rest: str, tables: dict[str, dict[int, str]]) -> Instruction:
    # "SHAPE OPCODE(ARGUMENT), ATTRIBUTES". Parentheses are matched and not searched for: shapes of tuples,
    # layouts and quoted paths contain them too.
    cut = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, cut)
    if opcode is None:
        raise ValueError(f"no opcode in the HLO line of {name!r}")
    end = _closing(rest, opcode.end() - 1)
    attributes = rest[end + 1 :]
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', attributes)
    cycles = re.search(r'"estimated_cycles":"?(\d+)', attributes)
    return Instruction(
        name=name,
        shape=rest[:cut],
        opcode=opcode[1],
        argument=rest[opcode.end() : end],
        attributes=attributes,
        op_name=op_name[1] if op_name else "",
        source=_source(attributes, tables),
        cycles=int(cycles[1]) if cycles else None,
    )


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at ``start``."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        char = text[index]
        if char == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (char == "(") - (char == ")")
            if not depth:
                return index
    raise ValueError(f"unbalanced parentheses in the HLO text {text[:60]!r}")


def _source(attributes: str, tables: dict[str, dict[int, str]]) -> str:
    """Return the innermost frame outside installed packages, else the innermost one."""
    # The metadata has file and line, or the number of a row of the table `StackFrames`.
    direct = re.search(r'source_file="([^"]*)"(?: source_line=(\d+))?', attributes)
    if direct:
        return f"{direct[1]}:{direct[2] or 0}"
    frame = re.search(r"stack_frame_id=(\d+)", attributes)
    number, innermost = int(frame[1]) if frame else 0, ""
    while number and (row := tables.get("StackFrames", {}).get(number)):
        fields = _fields(row)
        location = _fields(tables["FileLocations"][fields["file_location_id"]])
        file = tables["FileNames"][location["file_name_id"]]
        place = f"{file}:{location['line']}"
        if "site-packages" not in file:
            return place
        innermost = innermost or place
        # The text numbers a parent one higher than the frame's own row; a root's parent is 1.
        number = fields.get("parent_frame_id", 1) - 1
    return innermost


def _fields(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}


# An integer as `element of what the loop carries + offset`; the element is None for a constant.
_Affine = tuple[int | None, int]
_TRANSPARENT = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")
_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Return how often a ``while`` loop runs its body, or ``None`` where the text leaves it open.

    The compiler's ``known_trip_count`` is used where there is one. The TPU compiler writes none: then the
    loop must have a counter that is compared with a constant in the condition, moved by a constant in the
    body and set to a constant before the loop. All other loops are unknown.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (
        module.computations.get(next(iter(loop.called(role)), "")) for role in ("condition", "body")
    )
    if condition is None or body is None:
        return None
    test = condition.instructions[condition.root]
    direction = re.search(r"direction=(\w+)", test.attributes)
    if test.opcode != "compare" or direction is None or direction[1] not in _SWAPPED:
        return None
    counter, bound = (_affine(condition, name) for name in test.operands)
    compare = direction[1]
    if counter is not None and counter[0] is None:  # the constant is on the left
        counter, bound, compare = bound, counter, _SWAPPED[compare]
    # A counter with an offset, as in `i + 1 < n`, counts as unknown.
    if counter is None or bound is None or counter[0] is None or counter[1]:
        return None

    def initially(element: int) -> int | None:
        value = _affine(caller, _element(caller, loop.operands[0], element))
        return value[1] if value is not None and value[0] is None else None

    def after_body(element: int) -> _Affine | None:
        return _affine(body, _element(body, body.root, element))

    start, stop, moved = initially(counter[0]), bound[1], after_body(counter[0])
    if bound[0] is not None:
        # The bound is carried too: a constant only if the body leaves it unchanged.
        unchanged = after_body(bound[0]) == (bound[0], 0)
        value = initially(bound[0]) if unchanged and not bound[1] else None
        if value is None:
            return None
        stop = value
    if start is None or moved is None or moved[0] != counter[0] or not moved[1]:
        return None
    step = moved[1]
    # `i != n` ends only if the steps reach n exactly.
    if compare == "NE":
        compare = "LT" if step > 0 else "GT"
        if (stop - start) % step:
            return None
    # A counter that moves away from its bound: no loop, or one without an end.
    if (step > 0) != (compare in ("LT", "LE")):
        return None
    if compare in ("LE", "GE"):
        stop += step // abs(step)
    return len(range(start, stop, step))


def _element(computation: Computation, name: str | None, index: int) -> str | None:
    """Return the name of element ``index`` of the tuple ``name``."""
    instruction = computation.instructions.get(name or "")
    if instruction is None or instruction.opcode != "tuple" or index >= len(instruction.operands):
        return None
    return instruction.operands[index]


def _affine(computation: Computation, name: str | None) -> _Affine | None:
    """Trace an integer back to a constant or to an element of the loop's carry, plus an offset."""
    instruction = computation.instructions.get(name or "")
    if instruction is None:
        return None
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        text = instruction.argument
        return (None, int(text)) if re.fullmatch(r"-?\d+", text) else None
    if opcode == "get-tuple-element":
        source = computation.instructions.get(operands[0])
        index = re.search(r"\bindex=(\d+)", instruction.attributes)
        if source is None or source.opcode != "parameter" or index is None:
            return None
        return int(index[1]), 0
    if opcode in _TRANSPARENT and operands:
        return _affine(computation, operands[0])
    # At most one side may be an element of the carry: a sum of two is no counter.
    if opcode in ("add", "subtract"):
        left, right = (_affine(computation, operand) for operand in operands)
        if left is None or right is None:
            return None
        if opcode == "subtract":
            return (left[0], left[1] - right[1]) if right[0] is None else None
        if left[0] is None or right[0] is None:
            return (left[0] if right[0] is None else right[0]), left[1] + right[1]
    return None
