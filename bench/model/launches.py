"""The modelled time of one launch: compiled, disassembled, followed, and run on one SM."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bench.codegen import compile
from bench.codegen.compile import TARGETS, Launch

from . import machine, sass, warp
from .machine import GPU, Cost
from .operations import Cache
from .sass import Instruction
from .simulate import REGION, SM, Result
from .warp import Step

SAMPLES = 5  # programs of the first SM that are followed
ENOUGH = 3e5  # instructions of an SM that are simulated; the rest is extrapolated
HIDDEN = ("imad", "fp32", "control")  # parts of "fma", and nothing


@dataclasses.dataclass
class Timed:
    """A launch of a kernel, or one of PyTorch's operations; times in seconds.

    ``busy``: by resource, were that all there is and the programs spread evenly over the SMs.
    """

    kernel: str
    seconds: float  # without the gap before it
    busy: dict[str, float]
    programs: int = 0
    resident: int = 0  # programs that an SM holds at once
    warps: int = 0
    registers: int = 0
    shared: int = 0
    spills: int = 0  # spill instructions that a warp executes
    instructions: int = 0  # that a warp executes
    issue: float = 0.0  # share of the issue slots used
    waits: str = ""  # what warps wait for, by share
    loop: str = ""  # the main loop: turns, instructions per turn by pipe
    unknown: str = ""  # where the figures mean nothing: branches or instructions not followed

    @property
    def binding(self) -> str:
        """The busiest resource, or "waiting" where it explains less than half of the time."""
        resource = max(self.busy, key=lambda name: self.busy[name])
        return resource if self.busy[resource] >= self.seconds / 2 else "waiting"


class Built(NamedTuple):
    """A launch with its code and the values of its parameters."""

    program: sass.Program
    parameters: list[tuple[str, Any]]  # Triton's type and a number
    tensors: dict[int, Tensor]  # by the upper bits of the addresses that they are given
    registers: int
    shared: int
    warps: int
    digest: str  # of code, parameters and grid


def build(launch: Launch, arch: str) -> Built:
    """Compiles a launch as Triton's JIT would; tensors get addresses far from each other."""
    source, options = compile.specialized(launch, arch)
    bind = create_function_from_signature(
        launch.kernel.signature, launch.kernel.params, make_backend(TARGETS[arch])
    )
    bound = bind(*launch.args, **{**launch.kwargs, "debug": False})[0]
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    tensors: dict[int, Tensor] = {}
    numbers: dict[int, int] = {}  # by storage
    parameters: list[tuple[str, Any]] = []
    for name, kind in source.signature.items():
        if kind == "constexpr":
            continue
        value = bound[name]
        if kind[0] == "*":
            region = numbers.setdefault(value.untyped_storage()._cdata, len(numbers) + 1)
            tensors.setdefault(region, value)
            value = (region << REGION) + value.storage_offset() * value.element_size()
        parameters.append((kind, value))
    cubin = compiled.asm["cubin"]
    digest = hashlib.sha256(cubin + repr((parameters, launch.grid, arch)).encode()).hexdigest()
    return Built(
        disassemble(cubin), parameters, tensors, compile.resources(cubin)[0],
        compiled.metadata.shared, options["num_warps"], digest,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def disassemble(cubin: bytes) -> sass.Program:
    return sass.parse(compile.tool("nvdisasm", cubin, "-c", "-hex"))


class Followed(NamedTuple):
    """Sampled programs of a launch."""

    traces: list[list[Step]]
    instructions: int  # of the first one
    loop: str
    costs: list[Cost]
    requested: dict[tuple[int, bool], float]  # bytes per program, by tensor and whether stored
    unknown: str


def follow(b: Built, programs: int, gpu: GPU) -> Followed:
    constants = warp.constants(b.parameters, gpu.first_parameter)
    traces, requested, unknown = [], Counter[tuple[int, bool]](), set()
    for pid in sampled(programs, gpu.num_sms):
        trace = warp.follow(b.program, constants, pid, b.warps)
        traces.append(trace.steps)
        unknown |= trace.unknown | ({"a branch"} if trace.guesses else set())
        for _, active, access in trace.steps:
            if active and access is not None and access.first >> REGION > 0:
                key = access.first >> REGION, access.store
                requested[key] += access.sectors * warp.SECTOR * b.warps
    costs = [machine.cost(b.program.code, trace, b.warps, gpu) for trace in traces]
    each = {key: count / len(traces) for key, count in requested.items()}
    return Followed(
        traces, len(traces[0]), main_loop(b.program.code, traces[0]), costs, each,
        ", ".join(sorted(unknown)),
    )  # fmt: skip


# Launches that are equal in code, parameters and grid are followed once. Traces are large, and not
# kept: another state of the L2 needs them again.
_followed: dict[str, Followed] = {}
_simulated: dict[tuple, tuple[float, str, float]] = {}


def sampled(programs: int, num_sms: int) -> list[int]:
    """Programs of the first SM, evenly spaced; the first and the last, where each has an SM."""
    if programs <= num_sms:
        return sorted({0, programs - 1})
    own = range(0, programs, num_sms)
    step = max(1.0, len(own) / SAMPLES)
    return sorted({own[int(i * step)] for i in range(min(SAMPLES, len(own)))})


def time(launch: Launch, cache: Cache, gpu: GPU) -> Timed:
    """The modelled time of a launch, given what the L2 holds."""
    b = build(launch, gpu.arch)
    programs = math.prod(launch.grid)
    found = _followed.get(b.digest)
    if found is None:
        found = follow(b, programs, gpu)
        _followed[b.digest] = found._replace(traces=[])
    places = machine.resident(b.registers, b.shared, b.warps, gpu)
    moved = {
        region: (cache.writes if store else cache.reads)(b.tensors[region])
        for region, store in sorted(found.requested)
        if region in b.tensors
    }
    misses = {
        region: round(min(1.0, moved[region] / programs / max(1.0, count)), 2)
        for (region, _), count in found.requested.items()
        if region in moved
    }
    pipes = {pipe for c in found.costs for pipe in c.cycles} - set(HIDDEN)
    share = programs / gpu.num_sms / gpu.clock / len(found.costs)
    busy = {pipe: sum(c.cycles[pipe] for c in found.costs) * share for pipe in sorted(pipes)}
    loaded = sum(c.loaded + c.stored for c in found.costs) / len(found.costs)
    busy["L2"] = programs * loaded / gpu.l2_rate
    busy["DRAM"] = sum(moved.values()) / gpu.bandwidth
    key = b.digest, gpu, tuple(sorted(misses.items()))
    if key not in _simulated:
        traces = found.traces or follow(b, programs, gpu).traces
        _simulated[key] = simulated(b, traces, places, programs, misses, gpu)
    cycles, waits, issue = _simulated[key]
    return Timed(
        launch.name.removesuffix("_kernel"), cycles / gpu.clock, busy, programs, places, b.warps,
        b.registers, b.shared, found.costs[0].spills, found.instructions, issue, waits, found.loop,
        found.unknown,
    )  # fmt: skip


def simulated(
    b: Built,
    traces: Sequence[Sequence[Step]],
    places: int,
    programs: int,
    misses: Mapping[int, float],
    gpu: GPU,
) -> tuple[float, str, float]:
    """Cycles of the fullest SM, what its warps wait for, and the share of issue slots used."""
    sm = SM(b.program.code, b.warps, places, min(gpu.num_sms, programs), misses, gpu)
    if programs <= gpu.num_sms:  # they may do different work
        result = max((sm.run([trace]) for trace in traces), key=lambda result: result.cycles)
        return described(result, result.cycles)
    own = -(-programs // gpu.num_sms)
    instructions = sum(map(len, traces)) / len(traces) * b.warps
    count = min(own, max(2 * places, int(ENOUGH / instructions)))
    chosen = [traces[int(i * len(traces) / count)] for i in range(count)]
    result = sm.run(chosen)
    cycles = result.cycles
    if count < own:
        fewer = sm.run(chosen[: count - places])
        cycles += (own - count) * (result.cycles - fewer.cycles) / places
    return described(result, cycles)


def described(result: Result, cycles: float) -> tuple[float, str, float]:
    """``cycles``, what the warps of a simulated SM wait for, and its share of issue slots used."""
    waited = sum(result.waits.values()) or 1
    top = sorted(result.waits.items(), key=lambda cause: -cause[1])[:4]
    waits = (f"{name} {x / waited:.0%}" for name, x in top)
    return cycles, ", ".join(waits), result.issued / machine.SCHEDULERS / result.cycles


def main_loop(code: Sequence[Instruction], trace: Sequence[Step]) -> str:
    """The loop that holds most of a warp's instructions, inner loops left out."""
    order = [step.at for step in trace]
    turns = Counter(
        (after, here)
        for here, after in itertools.pairwise(order)
        if after <= here and code[here].base == "BRA"
    )
    found = []
    for (start, end), count in turns.items():
        inner = [
            (a, z) for a, z in turns if (a, z) != (start, end) and start <= a and z <= end
        ]  # fmt: skip
        own = [
            i for i in order if start <= i <= end and not any(a <= i <= z for a, z in inner)
        ]  # fmt: skip
        entries = sum(
            after == start and not start <= here <= end for here, after in itertools.pairwise(order)
        )
        found.append((len(own), count + max(1, entries), own))
    if not found:
        return ""
    size, rounds, own = max(found)
    pipes = Counter(machine.pipe_of(code[i]) for i in own)
    parts = " ".join(f"{pipe} {count / rounds:.0f}" for pipe, count in pipes.most_common())
    return f"{rounds} turns of {size / rounds:.0f} ({size / len(trace):.0%} of all): {parts}"
