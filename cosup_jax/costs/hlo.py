"""HLO text as `compiled.as_text()` prints it: instructions, what they call, how often loops run."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_TYPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


class Array(NamedTuple):
    """The type of one array."""

    dtype: str
    sizes: tuple[int, ...]
    layout: tuple[int, ...]  # dimensions, the fastest first
    on_core: bool  # in the core's own memory, not in the device's

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Bytes, without padding."""
        return self.count * BYTES.get(self.dtype, 0)


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    arrays: tuple[Array, ...]  # of the result, tuples flattened
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # of a constant its value, of a parameter its number
    is_root: bool

    @property
    def bytes(self) -> float:
        """Of the result, in the device's memory."""
        return sum(array.bytes for array in self.arrays if not array.on_core)

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        return re.findall(r"%([\w.\-]+)", " ".join(_CALLED.findall(self.attributes)))

    @property
    def number(self) -> int:
        """The value of a whole constant, or the number of a parameter."""
        return int(re.match(r"-?\d+", self.attributes)[0])

    def numbers(self, pattern: str) -> list[int]:
        """Whole numbers in the first group of `pattern` in the attributes; none if not found."""
        found = re.search(pattern, self.attributes)
        return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


class Module:
    """Instructions by name, computations as lists of them in the order of their schedule."""

    def __init__(self, text: str):
        """Parses `text`; raises ValueError if it holds no entry computation."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._by_name: dict[str, Instruction] = {}
        partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.devices = int(partitions[1]) if partitions else 1
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[2], found[3], bool(found[1]))
                self._by_name[instruction.name] = instruction
                current.append(instruction)
        if not self.entry:
            raise ValueError("no HLO: the text has no ENTRY computation")

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Those whose results it takes."""
        return [self._by_name[name] for name in instruction.operands]

    def root(self, computation: str) -> Instruction:
        """The one whose result is the computation's."""
        return next(one for one in self.computations[computation] if one.is_root)

    def parameter(self, computation: str, number: int) -> Instruction:
        """Its argument of that number."""
        return next(
            one
            for one in self.computations[computation]
            if one.opcode == "parameter" and one.number == number
        )

    def inside(self, computation: str) -> Iterator[Instruction]:
        """All instructions of a computation and of those that it calls."""
        for instruction in self.computations[computation]:
            yield instruction
            for called in instruction.called:
                yield from self.inside(called)

    def trips(self, loop: Instruction) -> tuple[int, bool]:
        """How often a `while` runs, and whether that is exact.

        Where the compiler did not note it, by the constant that the condition compares the counter
        with. Where that depends on data, at most: the tiles of the most finely cut array in it.
        """
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1]), True
        condition, body = (
            re.search(rf"{part}=%([\w.\-]+)", loop.attributes)[1] for part in ("condition", "body")
        )
        limit = self._limit(self.root(condition))
        if limit is None:
            return self._most_tiles(body), False
        place, end = limit
        return max(-(-(end - self._start(loop, place)) // self._step(body, place)), 0), True

    def _limit(self, test: Instruction) -> tuple[int, int] | None:
        """(i, n) of a condition `carry[i] < n` with a constant n; None for any other."""
        operands = self.operands(test)
        if test.opcode == "fusion":
            given = operands
            test = self.root(test.called[0])
            operands = [
                given[one.number] if one.opcode == "parameter" else one
                for one in self.operands(test)
            ]
        if test.opcode != "compare":
            return None
        direction = re.search(r"direction=(\w+)", test.attributes)[1]
        counter, end = operands if direction in ("LT", "LE", "NE") else reversed(operands)
        if counter.opcode != "get-tuple-element" or end.opcode != "constant":
            return None
        (place,) = counter.numbers(r"index=(\d+)")
        return place, end.number + (direction in ("LE", "GE"))

    def _start(self, loop: Instruction, place: int) -> int:
        """The counter's first value, taken for 0 unless it is a constant."""
        (carry,) = self.operands(loop)
        first = self.operands(carry)[place] if carry.opcode == "tuple" else carry
        while first.opcode in ("copy", "bitcast"):
            (first,) = self.operands(first)
        return first.number if first.opcode == "constant" else 0

    def _step(self, body: str, place: int) -> int:
        """What the body adds to the counter, taken for 1 unless it is a constant."""
        carry = self.root(body)
        after = self.operands(carry)[place] if carry.opcode == "tuple" else carry
        while after.opcode in ("copy", "bitcast"):
            (after,) = self.operands(after)
        terms = self.operands(after)
        if after.opcode == "fusion":
            after = self.root(after.called[0])
            terms = self.operands(after)
        steps = [term.number for term in terms if term.opcode == "constant"]
        return steps[0] if after.opcode == "add" and steps else 1

    def _most_tiles(self, body: str) -> int:
        most = 1
        for one in self.inside(body):
            if one.opcode not in ("dynamic-slice", "dynamic-update-slice"):
                continue
            operands = self.operands(one)
            whole, part = operands[0].arrays[0], one.arrays[0]
            part = operands[1].arrays[0] if one.opcode == "dynamic-update-slice" else part
            if part.count > 1:
                cut = [w // p for w, p in zip(whole.sizes, part.sizes, strict=True) if p]
                most = max(most, *cut)
        return most


def _parse(name: str, rest: str, is_root: bool) -> Instruction:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inner, attributes = rest[:end], rest[end + 1 :]
    if opcode in ("constant", "parameter"):
        return Instruction(name, _arrays(kind), opcode, (), inner, is_root)
    operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    return Instruction(name, _arrays(kind), opcode, operands, attributes, is_root)


def _closing(text: str) -> int:
    """Where the parenthesis that opens at the start closes."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text) - 1


def _arrays(kind: str) -> tuple[Array, ...]:
    found = []
    for dtype, sizes, layout in _TYPE.findall(kind):
        order, _, tiling = layout.partition(":")
        whole = lambda text: tuple(map(int, re.findall(r"\d+", text)))
        on_core = bool(re.search(r"S\([1-9]", tiling))
        found.append(Array(dtype, whole(sizes), whole(order), on_core))
    return tuple(found)
