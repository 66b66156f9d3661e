"""The integer state of one warp: registers and predicates of 32 lanes, constants, the stack.

A value is an array of 1 or 32 unsigned 64-bit numbers, or None where it is not known: it came from
memory or from floating point. No branch of the package's kernels depends on such a value.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
LOW = np.uint64(M32)
SHIFT = np.uint64(32)
LANES = np.arange(32, dtype=np.uint64)
STACK_POINTER = 0x28  # its place in the constant bank
ZERO_REGISTERS = {"RZ", "URZ"}
TRUE_PREDICATES = {"PT", "UPT"}
PREDICATE = re.compile(r"!?U?P(\d|T)")
REGISTER = re.compile(r"U?R(\d+|Z)")

Value = np.ndarray | None
Mask = np.ndarray | None  # lanes that an instruction is executed in; None: all


def number(value: int) -> np.ndarray:
    return np.array([value & M64], np.uint64)


ZERO, FALSE, TRUE = number(0), np.zeros(1, bool), np.ones(1, bool)


class Operand(NamedTuple):
    """A source operand; exactly one of the first three is given where it can be followed."""

    register: str | None = None
    constant: int | None = None  # an address in the constant bank
    literal: int | None = None
    sign: str = ""  # "-" or "~"


@functools.cache
def operand(text: str) -> Operand:
    sign = text[0] if text[0] in "-~" and not re.match(r"-(0x|\d|INF)", text) else ""
    text = text[len(sign) :]
    if REGISTER.fullmatch(text):
        return Operand(register=text, sign=sign)
    if found := re.fullmatch(r"c\[0x[0-9a-f]+\]\[0x([0-9a-f]+)\]", text):
        return Operand(constant=int(found[1], 16), sign=sign)
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return Operand(literal=int(text, 0), sign=sign)
    return Operand()


@functools.cache
def following(name: str) -> str:
    """The register after this one."""
    kind, index = re.fullmatch(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
    return f"{kind}{int(index) + 1}"


class Registers:
    """``constants``: bytes of the constant bank, by address; ``special``: special registers."""

    def __init__(self, constants: dict[int, int], special: dict[str, np.ndarray]) -> None:
        self.constants = {**dict.fromkeys(range(STACK_POINTER, STACK_POINTER + 4), 0), **constants}
        self.special = special
        self.values: dict[str, Value] = {}
        self.predicates: dict[str, Value] = {}
        self.stack: dict[int, Value] = {}

    # --- sources

    def predicate(self, name: str) -> Value:
        negated, name = name[0] == "!", name.lstrip("!")
        value = TRUE if name in TRUE_PREDICATES else self.predicates.get(name, FALSE)
        return ~value if negated and value is not None else value

    def register(self, name: str) -> Value:
        return ZERO if name in ZERO_REGISTERS else self.values.get(name, ZERO)

    def pair(self, name: str) -> Value:
        """64 bits of a register and the next one."""
        if name in ZERO_REGISTERS:
            return ZERO
        low, high = self.register(name), self.register(following(name))
        return None if low is None or high is None else low | high << SHIFT

    def value(self, text: str, wide: bool = False) -> Value:
        """32 or 64 bits of a source operand, negated or complemented where it says so."""
        source = operand(text)
        found: Value = None
        if source.register is not None:
            found = self.pair(source.register) if wide else self.register(source.register)
        elif source.constant is not None:
            found = self.constant(source.constant, 8 if wide else 4)
        elif source.literal is not None:
            found = number(source.literal & (M64 if wide else M32))
        if found is None or not source.sign:
            return found
        mask = np.uint64(M64 if wide else M32)
        return (np.uint64(0) - found) & mask if source.sign == "-" else found ^ mask

    def constant(self, address: int, size: int) -> Value:
        raw = [self.constants.get(address + i) for i in range(size)]
        return None if None in raw else number(int.from_bytes(bytes(raw), "little"))  # type: ignore[arg-type]

    def sum(self, texts: Sequence[str]) -> Value:
        """Of 32-bit operands, with the carry in the upper half: −x is ~x + 1."""
        total = ZERO
        for text in texts:
            negative = operand(text).sign == "-"
            value = self.value("~" + text[1:] if negative else text)
            if value is None:
                return None
            total = total + value + np.uint64(negative)
        return total

    def carries(self, texts: Sequence[str]) -> Value:
        """How many of these predicates are true."""
        total = ZERO
        for text in texts:
            value = self.predicate(text)
            if value is None:
                return None
            total = total + value.astype(np.uint64)
        return total

    def address(self, text: str) -> Value:
        """The addresses in the last brackets of an operand, of all lanes."""
        inner = text[text.rindex("[") + 1 : text.rindex("]")]
        total = ZERO
        for term in inner.replace("+-", "+ -").split("+"):
            term = term.strip()
            wide = term.endswith(".64")
            value = self.value(re.sub(r"\.(64|U32|X4)$", "", term), wide)
            if value is None:
                return None
            if not wide and term.startswith("-0x"):
                value = value | np.uint64(M64 - M32)
            total = total + value
        if "desc" not in text:
            total = total & LOW
        return np.broadcast_to(total, 32)

    # --- results

    def put(self, name: str, value: Value, mask: Mask) -> None:
        if name in ZERO_REGISTERS:
            return
        if value is not None:
            value = value & LOW
        self.values[name] = _merged(value, self.values.get(name, ZERO), mask)

    def put_pair(self, name: str, value: Value, mask: Mask) -> None:
        if name in ZERO_REGISTERS:
            return
        self.put(name, value, mask)
        self.put(following(name), None if value is None else value >> SHIFT, mask)

    def put_predicate(self, name: str, value: Value, mask: Mask) -> None:
        if name not in TRUE_PREDICATES:
            self.predicates[name] = _merged(value, self.predicates.get(name, FALSE), mask)

    def forget(self, name: str, count: int) -> None:
        """From here on, the values of ``count`` registers are not known."""
        for _ in range(count):
            self.values[name] = None
            name = following(name)


def _merged(value: Value, old: Value, mask: Mask) -> Value:
    if value is None or mask is None or mask.all():
        return value
    return None if old is None else np.where(mask, value, old)
