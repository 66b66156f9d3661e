"""Follows one warp of a program: which instructions it executes, and what each access moves.

Loops run as often as on a GPU and every address is known, so that bytes and 32-byte sectors of
global memory, and the wavefronts of shared memory (its bank conflicts), are counted.
"""

import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .integers import OPERATIONS
from .registers import LANES, PREDICATE, REGISTER, Mask, Registers, Value, following, number
from .sass import Instruction, Program

SECTOR, WAVEFRONT = 32, 128  # bytes
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
MEMORY = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "RED"}
BRANCHES = {"BRA", "CALL", "RET", "BRX", "JMP"}
NO_RESULT = {
    "BAR", "DEPBAR", "LDGDEPBAR", "NOP", "MEMBAR", "FENCE", "WARPGROUP", "WARPSYNC", "BSSY",
    "BSYNC", "HGMMA", "STG", "STS", "STSM", "LDGSTS", "ERRBAR", "CCTL", "YIELD", "ACQBULK",
    "ELECT", "RED", "PREEXIT", "WARPGROUPSET",
}  # fmt: skip
LONGEST = 3_000_000  # instructions of a warp


class Access(NamedTuple):
    """What a memory instruction of a warp moves."""

    space: str  # "global", "shared", "local", or "copy" from global to shared memory
    store: bool
    bytes: int  # of all active lanes
    sectors: int  # of global memory
    wavefronts: int  # of shared memory
    first: int  # the address of the first lane; -1 where it is not known


class Step(NamedTuple):
    """An executed instruction."""

    at: int  # index of the instruction
    active: bool  # in any lane
    access: Access | None


class Trace(NamedTuple):
    """``guesses``: branches that depend on a value that is not known, taken as not taken."""

    steps: list[Step]
    guesses: int
    unknown: set[str]  # instructions that this module does not know


def follow(program: Program, constants: dict[int, int], pid: int, warps: int) -> Trace:
    """The first warp of program ``pid``.

    Raises:
        RuntimeError: it executes more than ``LONGEST`` instructions.
    """
    return _Warp(program, constants, pid, warps).run()


class _Warp:
    def __init__(self, program: Program, constants: dict[int, int], pid: int, warps: int) -> None:
        special = {
            "SR_TID.X": LANES, "SR_LANEID": LANES, "SR_CTAID.X": number(pid),
            "SR_NTID.X": number(32 * warps), "SRZ": number(0),
        }  # fmt: skip
        zero = ("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId")
        self.r = Registers(constants, {**special, **dict.fromkeys(zero, number(0))})
        self.code, self.labels = program
        self.by_address = {x.address: i for i, x in enumerate(self.code)}
        self.guesses, self.unknown = 0, set[str]()

    def run(self) -> Trace:
        steps: list[Step] = []
        index = 0
        while len(steps) < LONGEST:
            x = self.code[index]
            mask = self.mask(x)
            active = mask is None or bool(mask.any())
            access = None
            if x.base in BRANCHES:
                known = x.guard is None or self.r.predicate(x.guard) is not None
                self.guesses += not known
                steps.append(Step(index, active, None))
                index = self.target(x) if active and known else index + 1
                continue
            if active and x.base != "EXIT":
                access = self.execute(x, mask)
            steps.append(Step(index, active, access))
            if active and x.base == "EXIT":
                return Trace(steps, self.guesses, self.unknown)
            index += 1
        raise RuntimeError(f"a warp executes more than {LONGEST} instructions")

    def mask(self, x: Instruction) -> Mask:
        """Lanes that take part; None for all, and where that is not known."""
        if x.guard is None:
            return None
        value = self.r.predicate(x.guard)
        return ~value if x.negated and value is not None else value

    def target(self, x: Instruction) -> int:
        if x.base == "RET":
            value = self.r.register(x.operands[0])
            assert value is not None, "the place to return to is not known"
            return self.by_address[int(value[0])]
        label = re.search(r"`\((.*?)\)", x.operands[-1])
        assert label is not None, x
        return self.labels[label[1]]

    def execute(self, x: Instruction, mask: Mask) -> Access | None:
        if x.base in MEMORY:
            access = _access(self.r, x, mask)
            _load(self.r, x, mask)
            return access
        operation = OPERATIONS.get(x.base)
        if operation is not None:
            operation(self.r, x, mask)
        elif x.base not in NO_RESULT:
            self._unknown(x)
        return None

    def _unknown(self, x: Instruction) -> None:
        """The result of floating point, or of an instruction that is not known."""
        floating = x.base[0] in "FHMD" or x.base == "SHFL"
        if not floating:
            self.unknown.add(x.op)
        for name in x.operands[:2]:
            if PREDICATE.fullmatch(name) and name[0] != "!":
                self.r.put_predicate(name, None, None)
        target = next((o for o in x.operands if REGISTER.fullmatch(o) and o[-1] != "Z"), None)
        if target:
            wide = "F64" in x.modifiers[:1] or x.base[0] == "D"
            self.r.forget(target, 4 if x.base == "HMMA" else 2 if wide else 1)


# --- memory ---------------------------------------------------------------------------------------


def _access(r: Registers, x: Instruction, mask: Mask) -> Access:
    size = next((BYTES[m] for m in reversed(x.modifiers) if m in BYTES), 4)
    lanes = np.ones(32, bool) if mask is None else np.broadcast_to(mask, 32)
    places = [o for o in x.operands if "[" in o]
    moved = size * int(lanes.sum())
    if x.base in ("LDSM", "STSM"):
        rows, count = r.address(places[0]), _matrices(x)
        eights = [None if rows is None else rows[8 * i : 8 * i + 8] for i in range(count)]
        waves = sum(_conflicts(eight, 16) for eight in eights)
        return Access("shared", x.base == "STSM", 128 * count, 0, waves, _first(rows))
    if x.base in ("LDS", "STS"):
        where = r.address(places[0])
        waves = _wavefronts(where, lanes, size)
        return Access("shared", x.base == "STS", moved, 0, waves, _first(where))
    if x.base in ("LDL", "STL"):
        return Access("local", x.base == "STL", moved, moved // SECTOR, 0, 0)
    where = r.address(places[-1])
    if x.base != "LDGSTS":
        store = x.base != "LDG"
        return Access("global", store, moved, _sectors(where, lanes, size), 0, _first(where))
    keep = r.predicate(x.operands[-1]) if PREDICATE.fullmatch(x.operands[-1]) else None
    loads = lanes if keep is None else lanes & keep  # the others get zeros
    waves = _wavefronts(r.address(places[0]), lanes, size)
    moved = size * int(loads.sum())
    return Access("copy", False, moved, _sectors(where, loads, size), waves, _first(where))


def _load(r: Registers, x: Instruction, mask: Mask) -> None:
    """What is loaded is not known, but from the stack, where counters of loops may be."""
    count = {"64": 2, "128": 4}.get(x.modifiers[-1] if x.modifiers else "", 1)
    if x.base in ("STL", "LDL"):
        place, name = x.operands if x.base == "STL" else x.operands[::-1]
        where = r.address(place)
        assert where is not None, x
        for i in range(count):
            slot = int(where[0]) + 4 * i
            if x.base == "STL":
                r.stack[slot] = r.register(name)
            else:
                r.put(name, r.stack.get(slot), mask)
            name = name if name == "RZ" else following(name)
    elif x.base in ("LDG", "LDS", "LDSM"):
        target = next((o for o in x.operands if re.fullmatch(r"R\d+", o)), None)
        if target:
            r.forget(target, _matrices(x) if x.base == "LDSM" else count)


def _matrices(x: Instruction) -> int:
    """8×8 matrices that LDSM or STSM moves."""
    return {"4": 4, "2": 2}.get(x.modifiers[-1], 1)


def _first(where: Value) -> int:
    return -1 if where is None else int(where.ravel()[0])


def _sectors(where: Value, lanes: np.ndarray, size: int) -> int:
    if where is None or not lanes.any():
        return -(-int(lanes.sum()) * size // SECTOR)
    spots = where[lanes]
    ends = spots + np.uint64(size - 1)
    return len(np.unique(np.concatenate([spots, ends]) // np.uint64(SECTOR)))


def _wavefronts(where: Value, lanes: np.ndarray, size: int) -> int:
    """128 bytes are served together, at most; of wide accesses, a part of the lanes at a time."""
    together = 32 if size <= 4 else WAVEFRONT // size
    total = 0
    for i in range(0, 32, together):
        on = lanes[i : i + together]
        if on.any():
            total += _conflicts(None if where is None else where[i : i + together][on], size)
    return total


def _conflicts(where: Value, size: int) -> int:
    """The most words of one bank among those of these addresses."""
    if where is None:
        return 1
    words = [where // np.uint64(4) + np.uint64(k) for k in range(max(1, size // 4))]
    banks = np.unique(np.concatenate(words)) % np.uint64(32)
    return int(np.bincount(banks.astype(int)).max())


# --- parameters -----------------------------------------------------------------------------------


def constants(parameters: Sequence[tuple[str, int | float]], base: int) -> dict[int, int]:
    """Bytes of a kernel's parameters, ``(Triton's type, value)`` in order, by address."""
    found: dict[int, int] = {}
    offset = base
    for kind, value in parameters:
        raw = _raw(kind, value)
        offset = -(-offset // len(raw)) * len(raw)
        found.update({offset + i: byte for i, byte in enumerate(raw)})
        offset += len(raw)
    return found


def _raw(kind: str, value: int | float) -> bytes:
    if kind in ("fp64", "fp32"):
        return struct.pack("<d" if kind == "fp64" else "<f", value)
    size = 8 if kind[0] == "*" else int(kind[1:]) // 8
    return (int(value) & (1 << 64) - 1).to_bytes(8, "little")[:size]
