"""An optimised program as XLA prints it, as computations of instructions.

Only what an account of its costs needs is read: shapes, operands, names, loops. Left out on purpose: layouts, but for
the memory that an array lies in, and whatever a backend says of an instruction but its estimated cycles.
"""

import dataclasses
import functools
import math
import re

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b(pred|bf16|[subfc]\d+)(?:e\dm\d\w*)?\[([\d,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%(\S+) = (.*)$")
_NAMES = re.compile(r"%([^\s,(){}=]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%\S+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """What an instruction makes, or one element of a tuple of it.

    memory: 0 is the device's large memory (HBM); others are smaller and faster.
    """

    kind: str
    shape: tuple[int, ...]
    memory: int

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.kind)
        return math.prod(self.shape) * _BYTES.get(self.kind, int(bits.group()) // 8 if bits else 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. What it says after its operands is `attributes`."""

    name: str
    operation: str
    arrays: tuple[Array, ...]
    is_tuple: bool
    operands: tuple[str, ...]
    argument: str  # what stands between the parentheses
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def cycles(self) -> int:
        """That the compiler estimates; 0 where it does not say."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @functools.cached_property
    def place(self) -> str:
        """Where in the Python program it is from: names of scopes and transformations, joined by slashes."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, but for a loop's."""
        return tuple(name for found in _CALLED.findall(self.attributes) for name in _NAMES.findall(found))

    def attribute(self, name: str) -> str:
        """The value of one that is a computation's name or a number; "" without it."""
        found = re.search(rf"\b{name}=%?([^\s,]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(found for found in self.instructions.values() if found.is_root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In their order."""
        found = [item for item in self.instructions.values() if item.operation == "parameter"]
        return sorted(found, key=lambda item: int(item.argument))

    def uses(self, name: str) -> list[Instruction]:
        return [found for found in self.instructions.values() if name in found.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, Computation]
    entry: str

    def rounds(self, loop: Instruction, caller: Computation) -> int | None:
        """How often a loop's body runs, where that stands in the program: it counts in equal steps to a constant."""
        condition = self.computations[loop.attribute("condition")]
        body = self.computations[loop.attribute("body")]
        test = condition.root
        if test.operation != "compare" or test.attribute("direction") != "LT":
            return None
        counter, end = (condition.instructions[name] for name in test.operands)
        if counter.operation != "get-tuple-element":
            return None
        index = int(counter.attribute("index"))
        state = caller.instructions[loop.operands[0]]
        start = _number(caller, state.operands[index]) if state.operation == "tuple" else None
        step = _step(body, index)
        last = _number(condition, end.name)
        if start is None or step is None or last is None:
            return None
        return max(0, -(-(last - start) // step))


def _number(where: Computation, name: str) -> int | None:
    """A constant's, or that of a copy of one."""
    item = _copied(where, name)
    is_number = item.operation == "constant" and re.fullmatch(r"-?\d+", item.argument)
    return int(item.argument) if is_number else None


def _copied(where: Computation, name: str) -> Instruction:
    """What copies were made of, if it is one."""
    item = where.instructions[name]
    while item.operation in ("copy", "bitcast"):
        item = where.instructions[item.operands[0]]
    return item


def _step(body: Computation, index: int) -> int | None:
    """What the body adds to an element of its state; None if it is not that simple."""
    if body.root.operation != "tuple":
        return None
    added = _copied(body, body.root.operands[index])
    if added.operation != "add":
        return None
    numbers = [_number(body, name) for name in added.operands]
    return next((number for number in numbers if number is not None and number > 0), None)


def parse(text: str) -> Program:
    computations: dict[str, Computation] = {}
    found: dict[str, Instruction] = {}
    entry = name = ""
    for line in text.splitlines():
        if not name:
            head = _HEAD.match(line)
            if head:
                name, found = head[2], {}
                entry = name if head[1] else entry
        elif line == "}":
            computations[name], name = Computation(name, found), ""
        elif item := _INSTRUCTION.match(line):
            found[item[2]] = _instruction(item[2], item[3], bool(item[1]))
    return Program(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    is_tuple = rest.startswith("(")
    made, rest = _bracketed(rest) if is_tuple else rest.split(" ", 1)
    operation, _, rest = rest.strip().partition("(")
    argument, attributes = _bracketed("(" + rest)
    argument = argument[1:-1]
    operands = tuple(_NAMES.findall(argument))
    arrays = tuple(
        Array(kind, tuple(int(size) for size in shape.split(",") if size), _memory(layout))
        for kind, shape, layout in _SHAPE.findall(made)
    )
    return Instruction(name, operation, arrays, is_tuple, operands, argument, attributes, is_root)


def _memory(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _bracketed(text: str) -> tuple[str, str]:
    """What begins with a parenthesis, up to the one that closes it; and what follows."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    raise ValueError(f"no end of {text[:80]!r}")
