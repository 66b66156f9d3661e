"""Times programs on one SM: their warps issue in order, with stalls, barriers and latencies.

Each of four schedulers issues one instruction per cycle, of the warp it issued last or else of the
one that has waited longest. A warp waits as its control words say, for the units it needs, for CTA
barriers, asynchronous copies and warpgroup products. Shared memory, the L2 and DRAM serve requests
in order, at their bandwidths. All warps of a program follow the trace of the first.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from . import machine
from .machine import GPU, LATENCY, OTHER_LATENCY, WAVEFRONT
from .sass import NO_BARRIER, Instruction
from .warp import SECTOR, Access, Step

QUEUED_WGMMA, QUEUED_MMA = 256, 8  # cycles of work that a tensor core takes on ahead
REGION = 36  # bits of an address inside its tensor
FROM_DRAM = 0.3  # share of a tensor's bytes that miss the L2, from which on each load waits for one

Trace = Sequence[Step]


class Result(NamedTuple):
    cycles: float
    waits: dict[str, float]  # cycles of warps, by what they waited for
    issued: int


class _Facts(NamedTuple):
    """What the simulation asks of an instruction, looked up once."""

    pipe: str
    base: str
    stall: int
    write: int
    read: int
    waits: tuple[int, ...]
    latency: int
    cycles: float  # of the tensor core
    shared: float  # cycles of shared memory for a product's operands
    pending: int  # copies or products that a wait leaves in flight; −1: it waits for neither
    commits: bool  # ends a group of products


def _facts(x: Instruction, gpu: GPU) -> _Facts:
    pipe = machine.pipe_of(x)
    made = machine.product(x, gpu) if pipe == "tensor" else machine.Product(0, 0, 0)
    waits_for_group = x.base == "DEPBAR" or (x.base == "WARPGROUP" and "DEPBAR" in x.op)
    pending = -1
    if waits_for_group:
        pending = int(x.operands[1], 16) if len(x.operands) > 1 else 0
    return _Facts(
        pipe, x.base, max(1, x.stall), x.write_barrier, x.read_barrier, x.waits,
        LATENCY.get(x.base, OTHER_LATENCY), made.cycles, made.shared_bytes / WAVEFRONT, pending,
        x.base == "HGMMA" and any("gsb" in o for o in x.operands),
    )  # fmt: skip


class _Warp:
    __slots__ = (
        "arrived", "barriers", "blocked", "causes", "copied", "groups", "i", "place", "products",
        "program", "ready", "scheduler", "trace",
    )  # fmt: skip

    def __init__(self, trace: Trace, program: int, scheduler: int, place: int, t: float) -> None:
        self.trace, self.program, self.scheduler, self.place = trace, program, scheduler, place
        self.i, self.ready, self.blocked, self.arrived = 0, t, False, 0.0
        self.barriers, self.causes = [0.0] * 6, [""] * 6
        self.copied = 0.0  # when the copies issued so far have arrived
        self.groups: list[float] = []  # the same, by group
        self.products = [0.0]  # when groups of products have ended; the last is open


class SM:
    """Runs programs, at most ``resident`` at a time, as one of ``busy`` SMs.

    ``misses``: share of the bytes of each tensor, by the upper bits of its addresses, that are not
    in the L2.
    """

    def __init__(
        self,
        code: Sequence[Instruction],
        warps: int,
        resident: int,
        busy: int,
        misses: Mapping[int, float],
        gpu: GPU,
    ) -> None:
        self.warps, self.resident, self.misses = warps, resident, misses
        per_cycle = 1 / gpu.clock / busy
        self.l2 = min(machine.L2_PORT, gpu.l2_rate * per_cycle)
        self.dram = min(machine.L2_PORT, gpu.bandwidth * per_cycle)
        self.facts = [_facts(x, gpu) for x in code]

    def run(self, programs: Sequence[Trace]) -> Result:
        self.queue = list(reversed(programs))
        pipes = ("heavy", "light", "alu", "xu", "uniform", "mio", "fp64")
        self.free: list[dict[str, float]] = [dict.fromkeys(pipes, 0.0) for _ in range(4)]
        self.tensor_free = [0.0] * 4
        self.owed = [0.0] * 4  # cycles of shared memory that products have not made up for
        self.shared_free = self.l2_free = self.dram_free = 0.0
        self.lists: list[list[_Warp]] = [[] for _ in range(4)]
        self.waits: dict[str, float] = defaultdict(float)
        self.events: list[tuple[float, int]] = []
        self.left: dict[int, int] = {}  # warps of each program that have not ended
        self.at_barrier: dict[int, list[_Warp]] = {}
        for place in range(min(self.resident, len(programs))):
            self._start(place, 0.0)
        ended, issued = self._schedule()
        return Result(max(ended, self.dram_free, self.l2_free), self.waits, issued)

    def _start(self, place: int, t: float) -> None:
        trace, program = self.queue.pop(), len(self.left)
        self.left[program], self.at_barrier[program] = self.warps, []
        for k in range(self.warps):
            self.lists[k % 4].append(_Warp(trace, program, k % 4, place, t))
            heapq.heappush(self.events, (t, k % 4))

    def _schedule(self) -> tuple[float, int]:
        events, busy = self.events, [0.0] * 4
        last: list[_Warp | None] = [None] * 4
        ended, issued = 0.0, 0
        while events:
            t, scheduler = heapq.heappop(events)
            if t < busy[scheduler]:
                if not events or events[0] != (busy[scheduler], scheduler):
                    heapq.heappush(events, (busy[scheduler], scheduler))
                continue
            w, following = self._choose(scheduler, last[scheduler], t)
            if w is None:
                if following < float("inf"):
                    heapq.heappush(events, (following, scheduler))
                continue
            last[scheduler] = w
            if w.ready < t:
                self.waits["not selected"] += t - w.ready
            busy[scheduler] = t + 1
            heapq.heappush(events, (t + 1, scheduler))
            issued += 1
            outcome = self._issue(w, t)
            if outcome == "EXIT":
                self.lists[scheduler].remove(w)
                ended = max(ended, t)
                self.left[w.program] -= 1
                if not self.left[w.program] and self.queue:
                    self._start(w.place, t + machine.START)
            elif outcome == "BAR":
                self._arrive(w, t)
        return ended, issued

    def _choose(self, scheduler: int, last: _Warp | None, t: float) -> tuple[_Warp | None, float]:
        """The warp to issue now, or when one may."""
        chosen, following = None, float("inf")
        for w in self.lists[scheduler]:
            if w.blocked:
                continue
            if w.ready > t:
                following = min(following, w.ready)
                continue
            when = self._pipe_free(w, t)
            if when > t:
                self.waits["pipe"] += when - w.ready
                w.ready = when
                following = min(following, when)
            elif chosen is None or w is last or (chosen is not last and w.ready < chosen.ready):
                chosen = w
        return chosen, following

    def _pipe_free(self, w: _Warp, t: float) -> float:
        index, active, _ = w.trace[w.i]
        f = self.facts[index]
        if not active or f.pipe == "control":
            return t
        free = self.free[w.scheduler]
        if f.pipe == "fp32":
            return min(free["heavy"], free["light"])
        if f.pipe == "imad":
            return free["heavy"]
        if f.pipe == "tensor":
            ahead = QUEUED_WGMMA if f.base == "HGMMA" else QUEUED_MMA
            return self.tensor_free[w.scheduler] - ahead
        return free[f.pipe]

    def _arrive(self, w: _Warp, t: float) -> None:
        """At a barrier of its program, whose last warp releases all."""
        group = self.at_barrier[w.program]
        group.append(w)
        w.blocked, w.arrived = True, t
        if len(group) < self.warps:
            return
        release = t + LATENCY["BAR"]
        for other in group:
            other.blocked = False
            self.waits["barrier"] += release - other.arrived
            other.ready = max(release, other.ready)
            heapq.heappush(self.events, (other.ready, other.scheduler))
        self.at_barrier[w.program] = []

    def _issue(self, w: _Warp, t: float) -> str | None:
        """Occupies the units that an instruction needs; "EXIT" or "BAR" where it is one."""
        index, active, access = w.trace[w.i]
        f = self.facts[index]
        done = operands = t
        outcome = None
        if active and f.base == "EXIT":
            return "EXIT"
        if active:
            done, operands = self._occupy(w, f, access, t)
            outcome = "BAR" if f.base == "BAR" else None
        if f.write != NO_BARRIER and f.base != "LDGDEPBAR" and done > w.barriers[f.write]:
            w.barriers[f.write], w.causes[f.write] = done, f.base
        if f.read != NO_BARRIER and operands > w.barriers[f.read]:
            w.barriers[f.read], w.causes[f.read] = operands, f.base
        w.i += 1
        if w.i >= len(w.trace):
            return "EXIT"
        w.ready = self._ready(w, self.facts[w.trace[w.i][0]], t + f.stall, t)
        return outcome

    def _ready(self, w: _Warp, f: _Facts, ready: float, t: float) -> float:
        """When the next instruction of a warp may be issued, units aside."""
        why = "stall"
        for b in f.waits:
            if w.barriers[b] > ready:
                ready, why = w.barriers[b], w.causes[b]
        if f.pending >= 0:
            copies = f.base == "DEPBAR"
            groups = w.groups if copies else [end for end in w.products if end]
            number = len(groups) - f.pending - 1
            if number >= 0 and groups[number] > ready:
                ready, why = groups[number], "copy" if copies else "HGMMA"
        self.waits[why] += ready - t - 1
        return ready

    def _occupy(self, w: _Warp, f: _Facts, access: Any, t: float) -> tuple[float, float]:
        """When an instruction's result is there, and when its operands have been read."""
        free, pipe = self.free[w.scheduler], f.pipe
        if pipe == "fp32":
            half = "light" if free["light"] <= free["heavy"] else "heavy"
            free[half] = max(free[half], t) + 2
        elif pipe == "imad":
            free["heavy"] = t + 2
        elif pipe in ("alu", "uniform", "xu", "fp64"):
            free[pipe] = t + machine.CYCLES[pipe]
            return t + f.latency, t + f.latency
        elif pipe == "tensor":
            self._product(w, f, t)
        elif pipe == "mio":
            free["mio"] = t + 2
            return self._access(w, f, access, t + 4)
        elif f.base in ("MEMBAR", "FENCE"):
            return t + f.latency, t + f.latency
        elif f.base == "LDGDEPBAR":
            w.groups.append(max(w.copied, w.groups[-1] if w.groups else 0.0))
        return t, t

    def _product(self, w: _Warp, f: _Facts, t: float) -> None:
        k = w.scheduler
        begin = max(self.tensor_free[k], t)
        if f.base != "HGMMA":
            self.tensor_free[k] = begin + f.cycles
            return
        # Operands in shared memory come at what other accesses leave of its bandwidth.
        owed = max(0.0, self.owed[k] - max(0.0, begin - self.tensor_free[k]))
        late = f.shared + owed > f.cycles
        end = begin + (f.shared + owed if late else f.cycles)
        self.owed[k] = 0.0 if late else max(0.0, owed + f.shared - f.cycles)
        self.tensor_free[k] = end
        w.products[-1] = max(w.products[-1], end + f.latency)
        if f.commits:
            w.products.append(0.0)

    def _access(self, w: _Warp, f: _Facts, access: Access | None, t: float) -> tuple[float, float]:
        if access is None:
            if f.base == "SHFL":
                t = self._shared(t, 1)
            return t + f.latency, t + 8
        if access.space == "shared":
            self._shared(t, access.wavefronts)
            return self.shared_free + f.latency - 1, self.shared_free + 8
        if access.space == "local":
            self._shared(t, max(1, access.bytes // WAVEFRONT))
            return self.shared_free + LATENCY["local"], self.shared_free + 8
        return self._memory(w, t, access), self.shared_free + 8

    def _shared(self, t: float, wavefronts: float) -> float:
        """Serves an access in order; returns when it begins."""
        begin = max(self.shared_free, t)
        self.shared_free = begin + wavefronts
        for i in range(4):
            self.owed[i] += wavefronts
        return begin

    def _memory(self, w: _Warp, t: float, access: Access) -> float:
        size = access.sectors * SECTOR
        copy = access.space == "copy"
        self._shared(t, access.wavefronts if copy else max(1, access.bytes // WAVEFRONT))
        begin = max(self.l2_free, t)
        self.l2_free = begin + size / self.l2
        miss = self.misses.get(access.first >> REGION, 0.0)
        self.dram_free = max(self.dram_free, begin) + size * miss / self.dram
        done = self.l2_free + machine.L2_LATENCY
        if miss >= FROM_DRAM:
            arrived = self.dram_free + machine.L2_LATENCY + machine.DRAM_LATENCY
            done = max(done, arrived)
        else:
            done += miss * machine.DRAM_LATENCY
        if copy:
            w.copied = max(w.copied, done)
        return done
