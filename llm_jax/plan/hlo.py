"""A compiled program as XLA prints it: computations, instructions, loops and how often they turn.

Only what the time and memory model reads is kept. The text may be of this package's step or of another trainer's.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1,
    "f4e2m1fn": 0.5, "f8e8m0fnu": 1,
}  # fmt: skip

SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of the program. `space`: the memory it lies in (TPU: 0 is HBM, 1 on the core, 5 the host's)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * ITEM_BYTES.get(self.dtype, 0))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of the result; several of a tuple, flattened.
      operands: names of instructions of the same computation.
      rest: everything behind the operands, as printed.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the model, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @functools.cached_property
    def cycles(self) -> int:
        """What the TPU compiler estimates; 0 where it says nothing."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation behind `key=`."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    @property
    def index(self) -> int:
        """Of a get-tuple-element."""
        found = re.search(r"\bindex=(\d+)", self.rest)
        return int(found[1]) if found else 0

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        if found := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"[\w.-]+", found[1])
        return [name for key in ("true_computation", "false_computation") if (name := self.called(key))]


Computation = dict[str, Instruction]  # by name, in the order in which they are printed (the schedule's)


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations; `entry` names the first to run."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def trips(self, loop: Instruction) -> int:
        """How often a `while` turns; 1 where the text does not tell.

        It is said outright (GPU), or stands in the condition: a counter from zero compared with a constant.
        """
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        condition = self.computations.get(loop.called("condition") or "", {})
        limits = constants(condition)
        for one in condition.values():
            if one.opcode == "compare" and (given := [limits[name] for name in one.operands if name in limits]):
                counters = [condition[name].index for name in one.operands if name in condition and name not in limits]
                step = self.step(loop, counters[0]) if counters else 1
                return max(-(-(given[0] + ("direction=LE" in one.rest)) // step), 1)
        return max(limits.values(), default=1)

    def step(self, loop: Instruction, counter: int) -> int:
        """By how much a loop's counter grows: more than one where the compiler has unrolled the body."""
        body = self.computations.get(loop.called("body") or "", {})
        root = next((one for one in body.values() if one.root), None)
        if root is None or counter >= len(root.operands):
            return 1
        grown, known = body.get(root.operands[counter]), constants(body)
        while grown is not None and grown.opcode in ("copy", "bitcast") and grown.operands:
            grown = body.get(grown.operands[0])
        added = [known[name] for name in grown.operands if name in known] if grown and grown.opcode == "add" else []
        return max(added[0], 1) if added else 1

    def every(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, str, int]]:
        """(instruction, its computation, how often it runs a step), loops and branches entered, fusions not."""
        name = name or self.entry
        for one in self.computations.get(name, {}).values():
            yield one, name, times
            if one.opcode == "while":
                yield from self.every(one.called("body"), times * self.trips(one))
            elif one.opcode == "conditional":
                for branch in one.branches:
                    yield from self.every(branch, times)
            elif one.opcode == "call":
                yield from self.every(one.called("to_apply"), times)

    def fused(self, one: Instruction) -> Computation:
        """What a fusion, or work handed to another unit (TPU: SparseCore), computes; empty for other instructions."""
        name = one.called("calls")
        if name is None and (found := re.search(r"called_computations=\{%?([\w.-]+)", one.rest)):
            name = found[1]
        return self.computations.get(name or "", {})


def constants(computation: Computation) -> dict[str, int]:
    """Whole numbers that a computation names."""
    return {one.name: int(one.rest) for one in computation.values() if one.opcode == "constant"
            and one.shapes[0].dtype in ("s32", "u32", "s64") and one.rest.lstrip("-").isdigit()}  # fmt: skip


def parse(text: str) -> Program:
    """Read a module. Raises ValueError where the text is none."""
    if not text.lstrip().startswith("HloModule"):
        raise ValueError("it does not begin with HloModule")
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in logical_lines(text):
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif one := instruction(line):
            current[one.name] = one
    partitions = re.search(r"num_partitions=(\d+)", text)
    if not entry:
        raise ValueError("it has no ENTRY computation")
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def logical_lines(text: str) -> Iterator[str]:
    """Lines, with what the printer broke over several (a kernel's metadata) put together again."""
    pending = ""
    starts = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = |(?:ENTRY )?%?[\w.-]+ \(.*\{$|\}$|HloModule|\s*$")
    for line in text.splitlines():
        if starts.match(line):
            if pending:
                yield pending
            pending = line
        else:
            pending += line
    yield pending


def instruction(line: str) -> Instruction | None:
    """One line of a computation, or None where the line is something else."""
    found = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not found:
        return None
    end = result_end(line, found.end())
    opened = line.find("(", end)
    closed = closing(line, opened)
    inside = line[opened + 1 : closed]
    opcode, rest = line[end:opened].strip(), line[closed + 1 :]
    if opcode == "constant":
        rest = inside if inside.lstrip("-").isdigit() else rest
    elif opcode == "parameter":
        rest = inside + rest
    shapes = tuple(map(shape, SHAPE.finditer(line, found.end(), end)))
    operands = tuple(re.findall(r"%([\w.-]+)", inside)) or bare_operands(opcode, inside)
    return Instruction(found[2], shapes, opcode, operands, rest, root=bool(found[1]))


def bare_operands(opcode: str, inside: str) -> tuple[str, ...]:
    """Operands printed without their % sign."""
    if opcode in ("constant", "parameter", "iota"):
        return ()
    return tuple(word for word in re.findall(r"[A-Za-z_][\w.-]*", inside) if not SHAPE.match(word + "[]"))


def shape(found: re.Match) -> Shape:
    space = re.search(r"S\((\d+)\)", found[3] or "")
    return Shape(found[1], tuple(int(n) for n in found[2].split(",") if n), int(space[1]) if space else 0)


def result_end(line: str, start: int) -> int:
    """Where the result's type ends: behind the tuple's bracket, or before the first blank."""
    return closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)


def closing(line: str, opened: int) -> int:
    """The bracket that closes the one at `opened`."""
    depth = 0
    for place in re.compile(r"[()]").finditer(line, opened):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.start()
    return len(line)
