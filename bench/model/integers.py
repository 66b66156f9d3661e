"""What the integer instructions do, for one warp. Everything else makes its result unknown.

Semantics are those of the SASS that Triton's kernels are made of on Ampere and Hopper, as far as
public descriptions and the code itself show them; ``tests/bench/test_model.py`` holds addresses and
trip counts that follow from them against Python.
"""

from collections.abc import Callable

import numpy as np

from .registers import LOW, M32, PREDICATE, SHIFT, ZERO, Mask, Registers, Value, number
from .sass import Instruction

Operation = Callable[[Registers, Instruction, Mask], None]
OPERATIONS: dict[str, Operation] = {}


def executes(*names: str) -> Callable[[Operation], Operation]:
    """Registers an instruction; with a U before its name, it works on uniform registers."""

    def register(operation: Operation) -> Operation:
        OPERATIONS.update({prefix + name: operation for name in names for prefix in ("", "U")})
        return operation

    return register


def _signed(value: np.ndarray) -> np.ndarray:
    """64-bit integers in the order of signed 32-bit ones."""
    return (value << SHIFT).astype(np.int64)


def _bit(value: np.ndarray, index: int) -> np.ndarray:
    return (value >> np.uint64(index)) & np.uint64(1)


def _predicates_first(x: Instruction) -> tuple[str, list[str], list[str]]:
    """(target, predicates written, sources) of an instruction."""
    sources, written = list(x.operands[1:]), []
    while sources and sources[0][0] != "!" and PREDICATE.fullmatch(sources[0]):
        written.append(sources.pop(0))
    return x.operands[0], written, sources


# --- moves ----------------------------------------------------------------------------------------


@executes("MOV")
def _mov(r, x, mask):
    r.put(x.operands[0], r.value(x.operands[1]), mask)


@executes("R2UR")
def _r2ur(r, x, mask):
    value = r.value(x.operands[-1])
    target = x.operands[0] if x.operands[0][0] == "U" else x.operands[1]
    r.put(target, None if value is None else value[:1], None)


@executes("S2R", "S2UR")
def _s2r(r, x, mask):
    r.put(x.operands[0], r.special.get(x.operands[1]), mask)


@executes("CS2R")
def _cs2r(r, x, mask):
    put = r.put if "32" in x.modifiers else r.put_pair
    put(x.operands[0], r.special.get(x.operands[1]), mask)


@executes("LDC")
def _ldc(r, x, mask):
    wide = "64" in x.modifiers
    (r.put_pair if wide else r.put)(x.operands[0], r.value(x.operands[1], wide), mask)


@executes("HFMA2")
def _hfma2(r, x, mask):
    """−0·0 plus two constants in half precision is how the assembler writes some integers."""
    value = None
    if [o.lstrip("-") for o in x.operands[1:3]] == ["RZ", "RZ"]:
        high, low = (int(np.float16(float(o)).view(np.uint16)) for o in x.operands[3:5])
        value = number(high << 16 | low)
    r.put(x.operands[0], value, mask)


@executes("SEL")
def _sel(r, x, mask):
    a, b, p = r.value(x.operands[1]), r.value(x.operands[2]), r.predicate(x.operands[3])
    if p is not None and p.all():
        found = a
    elif p is not None and not p.any():
        found = b
    else:
        found = None if a is None or b is None or p is None else np.where(p, a, b)
    r.put(x.operands[0], found, mask)


@executes("P2R")
def _p2r(r, x, mask):
    total: Value = ZERO
    for i in range(7):
        if int(x.operands[-1], 16) >> i & 1:
            p = r.predicates.get(f"P{i}")
            if p is None or total is None:
                total = None
            else:
                total = total | p.astype(np.uint64) << np.uint64(i)
    r.put(x.operands[0], total, mask)


@executes("R2P")
def _r2p(r, x, mask):
    value = r.value(x.operands[1])
    for i in range(7):
        if int(x.operands[2], 16) >> i & 1:
            r.put_predicate(f"P{i}", None if value is None else _bit(value, i) > 0, mask)


@executes("VOTE", "VOTEU")
def _vote(r, x, mask):
    p = r.predicate(x.operands[-1])
    value = None if p is None else np.array([p.any() if "ANY" in x.modifiers else p.all()])
    for name in x.operands[:-1]:
        if PREDICATE.fullmatch(name):
            r.put_predicate(name, value, None)
        else:
            r.put(name, None, None)


@executes("PRMT")
def _prmt(r, x, mask):
    """Four bytes of two registers; a selector's bit 3 repeats the sign of its byte."""
    a, selectors, b = (r.value(o) for o in x.operands[1:4])
    if a is None or b is None or selectors is None:
        r.put(x.operands[0], None, mask)
        return
    total, both = ZERO, a | b << SHIFT
    for i in range(4):
        selector = (selectors >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((selector & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        chosen = np.where(selector & np.uint64(8), sign, byte)
        total = total | chosen << np.uint64(8 * i)
    r.put(x.operands[0], total, mask)


# --- sums and products ----------------------------------------------------------------------------


@executes("IADD3")
def _iadd3(r, x, mask):
    target, carried, sources = _predicates_first(x)
    if x.modifiers == ["64"]:
        values = [r.value(o, True) for o in sources[:3]]
        known = all(value is not None for value in values)
        r.put_pair(target, sum(values, ZERO) if known else None, mask)
        return
    total, carry = r.sum(sources[:3]), r.carries(sources[3:])
    total = None if total is None or carry is None else total + carry
    r.put(target, total, mask)
    for i, name in enumerate(carried):
        r.put_predicate(name, None if total is None else total >> SHIFT > np.uint64(i), mask)


@executes("VIADD", "IADD")
def _viadd(r, x, mask):
    r.put(x.operands[0], r.sum(x.operands[1:3]), mask)


@executes("IMAD")
def _imad(r, x, mask):
    """a·b + c; of WIDE 64 bits, of HI the upper half. ~R of IMAD.X is R complemented."""
    target, carried, (left, right, *rest) = _predicates_first(x)
    wide, high = "WIDE" in x.modifiers, "HI" in x.modifiers
    a, b, c = r.value(left), r.value(right), r.value(rest[0], wide or high)
    if a is None and right in ("RZ", "URZ"):
        a = ZERO
    if b is None and left in ("RZ", "URZ"):
        b = ZERO
    carry = r.carries(rest[1:])
    if a is None or b is None or c is None or carry is None:
        (r.put_pair if wide else r.put)(target, None, mask)
        for name in carried:
            r.put_predicate(name, None, mask)
        return
    if not (wide or high):
        r.put(target, (a * b & LOW) + c + carry, mask)
        return
    product = a * b
    if "U32" not in x.modifiers:
        product = product - (_bit(a, 31) * b << SHIFT) - (_bit(b, 31) * a << SHIFT)
    total = product + c
    if high:
        r.put(target, total >> SHIFT, mask)
    else:
        r.put_pair(target, total + carry, mask)
    for name in carried:
        r.put_predicate(name, total < c, mask)


@executes("LEA")
def _lea(r, x, mask):
    """(a << shift) + b; of HI the upper half of a 64-bit a."""
    target, carried, sources = _predicates_first(x)
    predicates = []
    while PREDICATE.fullmatch(sources[-1]):
        predicates.append(sources.pop())
    carry, shift = r.carries(predicates), np.uint64(int(sources.pop(), 16))
    a, b = r.value(sources[0]), r.value(sources[1])
    if "HI" in x.modifiers:
        upper = None if a is None else _bit(a, 31) * LOW
        if "SX32" not in x.modifiers:
            upper = r.value(sources[2])
        known = a is not None and upper is not None
        a = ((a | upper << SHIFT) << shift) >> SHIFT if known else None
    elif a is not None:
        a = a << shift & LOW
    total = None if a is None or b is None or carry is None else a + b + carry
    r.put(target, total, mask)
    for name in carried:
        r.put_predicate(name, None if total is None else total > LOW, mask)


@executes("IABS")
def _iabs(r, x, mask):
    a = r.value(x.operands[1])
    if a is not None:
        a = np.where(_bit(a, 31), (np.uint64(0) - a) & LOW, a)
    r.put(x.operands[0], a, mask)


def _smaller(a, b, p, modifiers):
    """The smaller of two where p, else the larger; unknown if any of them is."""
    if a is None or b is None or p is None:
        return None
    left, right = (a, b) if "U32" in modifiers else (_signed(a), _signed(b))
    return np.where((left < right) == p, a, b)


@executes("VIMNMX", "IMNMX")
def _vimnmx(r, x, mask):
    a, b, p = r.value(x.operands[1]), r.value(x.operands[2]), r.predicate(x.operands[3])
    r.put(x.operands[0], _smaller(a, b, p, x.modifiers), mask)


@executes("VIADDMNMX")
def _viaddmnmx(r, x, mask):
    total = r.sum(x.operands[1:3])
    total = None if total is None else total & LOW
    limit, p = r.value(x.operands[3]), r.predicate(x.operands[4])
    r.put(x.operands[0], _smaller(total, limit, p, x.modifiers), mask)


# --- bits -----------------------------------------------------------------------------------------


@executes("SHF")
def _shf(r, x, mask):
    """A funnel shift of (high, low)."""
    target, low, amount, high = x.operands[:4]
    s, a, c = r.value(amount), r.value(low), r.value(high)
    wide = any(m in ("U64", "S64") for m in x.modifiers)
    if s is None:
        r.put(target, None, mask)
        return
    s = np.minimum(s, np.uint64(63)) if wide else s & np.uint64(31)
    upper = "HI" in x.modifiers
    found: Value = None
    if x.modifiers[0] == "L":
        if a is not None and not upper:
            found = a << s
        elif a is not None and c is not None:
            found = ((a | c << SHIFT) << s) >> SHIFT
    elif upper and c is not None:
        signed = any(m[0] == "S" for m in x.modifiers)
        number_of = (_signed(c) >> np.int64(32)) >> s.astype(np.int64)
        found = number_of.astype(np.uint64) if signed else c >> s
    elif a is not None and c is not None and not upper:
        found = (a | c << SHIFT) >> s
    r.put(target, found, mask)


@executes("SGXT")
def _sgxt(r, x, mask):
    a, bits = r.value(x.operands[1]), r.value(x.operands[2])
    found = None
    if a is not None and bits is not None:
        n = bits[0]
        found = a & ((np.uint64(1) << n) - np.uint64(1))
        if "U32" not in x.modifiers:
            sign = (found >> (n - np.uint64(1))) & np.uint64(1)
            found = found | sign * ((LOW >> n) << n)
    r.put(x.operands[0], found, mask)


@executes("LOP3")
def _lop3(r, x, mask):
    """A function of three bits, by its table; what the table ignores may be unknown."""
    operands = list(x.operands)
    written = operands.pop(0) if PREDICATE.fullmatch(operands[0]) else None
    target, *sources, table = operands[:5]
    values, lut = [r.value(o) for o in sources], int(table, 16)
    bits = 4, 2, 1
    used = [any((lut >> j ^ lut >> (j ^ bit)) & 1 for j in range(8)) for bit in bits]
    total: Value = ZERO
    if any(value is None for value, needed in zip(values, used, strict=True) if needed):
        total = None
    else:
        for i in (i for i in range(8) if lut >> i & 1):
            term = number(M32)
            for bit, value, needed in zip(bits, values, used, strict=True):
                if needed:
                    term = term & (value if i & bit else value ^ LOW)
            total = total | term
    r.put(target, total, mask)
    if written:
        r.put_predicate(written, None if total is None else total != 0, mask)


@executes("PLOP3")
def _plop3(r, x, mask):
    inputs = [r.predicate(o) for o in x.operands[2:5]]
    for name, table in zip(x.operands[:2], x.operands[5:7], strict=False):
        value = None
        if all(p is not None for p in inputs):
            index = sum(p.astype(int) * bit for p, bit in zip(inputs, (4, 2, 1), strict=True))
            value = np.array([bool(int(table, 16) >> i & 1) for i in range(8)])[index]
        r.put_predicate(name, value, mask)


# --- comparisons ----------------------------------------------------------------------------------

COMPARISONS = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
    "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip
STRICT = {"LT": np.less, "LE": np.less, "GT": np.greater, "GE": np.greater}


@executes("ISETP")
def _isetp(r, x, mask):
    """Compares, of EX the upper halves after the lower; then joins with a predicate."""
    out, other, left, right, before, *lower = x.operands
    a, b, joined = r.value(left), r.value(right), r.predicate(before)
    extended = "EX" in x.modifiers
    low = r.predicate(lower[0]) if extended else None
    found: Value = None
    if a is not None and b is not None and not (extended and low is None):
        if "U32" not in x.modifiers:
            a, b = _signed(a), _signed(b)
        name = x.modifiers[0]
        if not extended:
            found = COMPARISONS[name](a, b)
        elif name in STRICT:
            found = STRICT[name](a, b) | ((a == b) & low)
        else:
            found = a != b if name == "NE" else a == b
            found = found | low if name == "NE" else found & low
    how = next(m for m in x.modifiers if m in ("AND", "OR", "XOR"))
    r.put_predicate(out, _joined(found, joined, how), mask)
    r.put_predicate(other, _joined(None if found is None else ~found, joined, how), mask)


def _joined(a: Value, b: Value, how: str) -> Value:
    if how == "AND":
        for each in (b, a):
            if each is not None and not each.any():
                return each
    if a is None or b is None:
        return None
    return a & b if how == "AND" else a | b if how == "OR" else a ^ b


# --- conversions, which integer division is made of -----------------------------------------------


@executes("I2F", "I2FP")
def _i2f(r, x, mask):
    value = r.value(x.operands[1], "U64" in x.modifiers)
    if value is not None and {"S32", "F64", "F16"} & set(x.modifiers):
        value = None
    if value is not None:
        exact = value.astype(np.float64)
        single = exact.astype(np.float32)
        if "RP" in x.modifiers:
            above = np.nextafter(single, np.float32(np.inf))
            single = np.where(single.astype(np.float64) < exact, above, single)
        value = single.astype(np.float32).view(np.uint32).astype(np.uint64)
    r.put(x.operands[0], value, mask)


@executes("MUFU")
def _mufu(r, x, mask):
    value = r.value(x.operands[1]) if x.modifiers[0] == "RCP" else None
    if value is not None:
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / value.astype(np.uint32).view(np.float32)
        value = inverse.view(np.uint32).astype(np.uint64)
    r.put(x.operands[0], value, mask)


@executes("F2I")
def _f2i(r, x, mask):
    value, wide = r.value(x.operands[1]), "U64" in x.modifiers
    if value is not None:
        single = value.astype(np.uint32).view(np.float32).astype(np.float64)
        whole = np.trunc(np.nan_to_num(single, posinf=0, neginf=0))
        limit = (1 << (64 if wide else 32)) - 1
        value = np.array([min(max(int(n), 0), limit) for n in whole], np.uint64)
    (r.put_pair if wide else r.put)(x.operands[0], value, mask)
