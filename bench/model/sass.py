"""SASS as ``nvdisasm`` prints it: instructions with their operands and scheduling control.

The control word of an instruction (Volta and later) is in bits 105 to 125 of its 128: stall cycles,
the barriers that its result and its operands release, and the barriers that it waits for.
"""

import re
from typing import NamedTuple

LABEL = re.compile(r"^(?:\.L_x_\d+|[\w$.]+):")
CODE = re.compile(
    r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?)(U?P[0-9T]+)\s+)?([A-Z0-9_][A-Za-z0-9_.]*)\s*(.*?)\s*;"
    r"\s*/\* 0x([0-9a-f]{16}) \*/"
)
HIGH = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
BETWEEN = re.compile(r",\s*(?![^\[(]*[\])])")  # commas outside brackets
NO_BARRIER = 7


class Instruction(NamedTuple):
    address: int
    guard: str | None  # the predicate that it is executed under: "P0", "UP1"
    negated: bool
    op: str  # with modifiers
    operands: tuple[str, ...]
    stall: int  # cycles before the warp's next instruction
    write_barrier: int  # released by the result; NO_BARRIER: none
    read_barrier: int  # released once the operands are read
    waits: tuple[int, ...]  # barriers that it waits for

    @property
    def base(self) -> str:
        return self.op.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.op.split(".")[1:]


class Program(NamedTuple):
    """The code of a kernel: instructions in order, and by label the index of the one behind it."""

    code: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(text: str) -> Program:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if label := LABEL.match(line):
            labels[label[0].rstrip(":")] = len(code)
        elif found := CODE.match(line):
            high = HIGH.search(next(lines))
            assert high is not None, line
            control = int(high[1], 16) >> 41
            operands = BETWEEN.split(found[5]) if found[5] else []
            code.append(
                Instruction(
                    int(found[1], 16), found[3], bool(found[2]), found[4],
                    tuple([o.replace(".reuse", "").strip() for o in operands]),
                    control & 15, control >> 5 & 7, control >> 8 & 7,
                    tuple([i for i in range(6) if control >> 11 >> i & 1]),
                )
            )  # fmt: skip
    return Program(tuple(code), labels)
