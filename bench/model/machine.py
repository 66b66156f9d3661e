"""The assumed GPU, and what a warp's trace costs on each pipe: throughput, were the rest free.

None of the figures was measured by this project. Rates are those of NVIDIA's data sheets and of
published microbenchmarks; the L2's is the one at which a plain Triton GEMM reaches its published
rate (see ``anchors``).
"""

import functools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .sass import Instruction
from .warp import WAVEFRONT, Step


class GPU(NamedTuple):
    """Rates of a whole GPU in units per second, those of an SM per cycle, sizes in bytes."""

    arch: str
    first_parameter: int  # of a kernel, in the constant bank
    num_sms: int
    clock: float
    bandwidth: float  # of memory
    l2_rate: float
    l2_kept: float  # of tensors that one launch leaves in the L2 for the next
    library: float  # FLOP/s of a large GEMM of the vendor's library, half precision
    tensor: int  # multiply-adds of one of an SM's four tensor cores, half precision
    mma_sync: float  # share of that rate, reached by mma.sync
    shared: int  # of an SM, of which each program takes 1 KiB more than it asks for


H200 = GPU("sm_90", 0x210, 132, 1.755e9, 4.3e12, 7.0e12, 30e6, 790e12, 512, 0.62, 233_472)
GPUS = {
    "H200": H200,
    "H100": H200._replace(bandwidth=3.0e12),
    "A100": GPU("sm_80", 0x160, 108, 1.41e9, 1.8e12, 4.5e12, 20e6, 260e12, 256, 0.95, 167_936),
}

# Of one SM
SCHEDULERS = 4
REGISTERS = 65_536
MAX_WARPS, MAX_PROGRAMS = 64, 32
L2_PORT = 64.0  # bytes per cycle from the L2
START = 700  # cycles from the end of a program to the first instruction of the next
LATENCY = {
    "MUFU": 20, "F2F": 20, "I2F": 20, "F2I": 20, "SHFL": 23, "LDS": 23, "LDSM": 27, "STS": 12,
    "STSM": 12, "S2R": 22, "S2UR": 26, "CS2R": 12, "LDC": 30, "ULDC": 12, "BAR": 20, "FENCE": 16,
    "MEMBAR": 16, "HGMMA": 18, "R2UR": 10, "local": 40,
}  # fmt: skip
OTHER_LATENCY, L2_LATENCY, DRAM_LATENCY = 14, 270, 330

FLOAT = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "FADD2", "FFMA2"}
MIO = {
    "LDS", "STS", "LDSM", "STSM", "SHFL", "LDG", "STG", "LDGSTS", "LDL", "STL", "S2R", "LDC", "RED",
}  # fmt: skip
CONTROL = {
    "BRA", "EXIT", "NOP", "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "MEMBAR", "FENCE", "CALL",
    "RET", "BSSY", "BSYNC", "WARPSYNC", "ERRBAR", "YIELD",
}  # fmt: skip
# Cycles for which an instruction of a warp keeps its scheduler's pipe.
CYCLES = {
    "fp32": 1, "imad": 2, "alu": 2, "xu": 8, "uniform": 1, "mio": 2, "control": 0, "fp64": 16,
}  # fmt: skip


def pipe_of(x: Instruction) -> str:
    base = x.base
    if base in ("HGMMA", "HMMA"):
        return "tensor"
    if base in FLOAT:
        return "fp32"
    if base == "IMAD":
        return "imad"
    if base in ("MUFU", "F2F", "I2F", "F2I"):
        return "xu"
    if base in MIO:
        return "mio"
    if base in CONTROL:
        return "control"
    if base[0] == "U" or base in ("R2UR", "S2UR", "VOTEU"):
        return "uniform"
    return "fp64" if base[0] == "D" else "alu"


class Product(NamedTuple):
    """A tensor instruction of one warp."""

    flop: float
    cycles: float  # of its tensor core
    shared_bytes: int  # read from shared memory by a warpgroup


@functools.cache
def product(x: Instruction, gpu: GPU) -> Product:
    if x.base == "HMMA":
        k = re.search(r"168(\d+)", x.op)
        assert k is not None, x.op
        macs = 16 * 8 * int(k[1])
        return Product(2 * macs, macs / gpu.tensor / gpu.mma_sync, 0)
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", x.op)
    assert shape is not None, x.op
    m, n, k_ = map(int, shape.groups())
    rows = n + (m if "gdesc" in x.operands[1] else 0)  # the others come from registers
    return Product(2 * m * n * k_ / 4, m * n * k_ / 4 / gpu.tensor, 2 * k_ * rows)


class Cost(NamedTuple):
    """What one program asks for."""

    cycles: dict[str, float]  # of an SM, by pipe, were nothing else in the way
    flop: float
    loaded: int  # bytes from the L2, in sectors
    stored: int
    spills: int  # spill instructions of a warp


def cost(code: Sequence[Instruction], trace: Sequence[Step], warps: int, gpu: GPU) -> Cost:
    """Cycles of an SM: schedulers and their pipes share the warps, shared memory serves all."""
    cycles: dict[str, float] = defaultdict(float)
    flop, loaded, stored, spills = 0.0, 0, 0, 0
    share = warps / SCHEDULERS
    for index, active, access in trace:
        x = code[index]
        cycles["issue"] += share
        pipe = pipe_of(x)
        if not active or pipe == "control":
            continue
        if pipe == "tensor":
            made = product(x, gpu)
            cycles["tensor"] += made.cycles * share
            cycles["shared"] += made.shared_bytes / WAVEFRONT * share
            flop += made.flop * warps
        else:
            cycles[pipe] += CYCLES[pipe] * share
        if x.base == "SHFL":
            cycles["shared"] += warps
        if access is None:
            continue
        if access.space == "local":  # the L1 holds it
            spills += 1
            cycles["shared"] += max(1, access.bytes // WAVEFRONT) * warps
            continue
        cycles["shared"] += access.wavefronts * warps
        if access.store:
            stored += access.sectors * 32 * warps
        else:
            loaded += access.sectors * 32 * warps
    # FP32 has both halves of a pipe, of which IMAD takes one.
    cycles["fma"] = max(cycles["imad"], cycles["fp32"] + cycles["imad"] / 2)
    return Cost(cycles, flop, loaded, stored, spills)


def resident(registers: int, shared: int, warps: int, gpu: GPU) -> int:
    """Programs that an SM holds at once."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (per_warp * warps)
    by_shared = gpu.shared // (-(-(shared + 1024) // 128) * 128)
    return max(1, min(by_registers, by_shared, MAX_WARPS // warps, MAX_PROGRAMS))
