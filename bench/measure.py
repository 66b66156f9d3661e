"""Timers and the run: providers that give the right answer are timed in turns, group by group.

A group is one workload in one mode with the providers of one launch mode. Whatever a provider
does, the run goes on: one that raises or disagrees with the definition becomes a row that says so.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from . import floors, problems
from .floors import Ceilings
from .problems import Problem
from .providers import GRAPH, Closure, Provider
from .workloads import Workload

OK = "ok"
OUT_OF_TIME = "not run: the time budget was used up"
FLUSH_BYTES = 256 * 2**20
FLUSHES_AHEAD = 4
Row = dict[str, Any]


class Timer(Protocol):
    def __call__(self, closure: Closure, *, launches_count: bool) -> float:
        """Milliseconds of one call, with or without the host's part in it.

        What the closure has to do before is called, but not timed.
        """


def prepare(closure: Closure) -> None:
    getattr(closure, "before", lambda: None)()


class WallTimer:
    """The host's clock; on a CPU the host does everything."""

    def __call__(self, closure: Closure, *, launches_count: bool) -> float:
        prepare(closure)
        start = time.perf_counter()
        closure()
        return 1e3 * (time.perf_counter() - start)


class CudaTimer:
    """CUDA events around one call, after writing a buffer larger than the L2 cache.

    Where launches count, the card is idle when the clock starts: the figure is what a caller waits.
    Where they do not, the card is still busy writing the buffer while the host launches.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, closure: Closure, *, launches_count: bool) -> float:
        prepare(closure)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(1 if launches_count else FLUSHES_AHEAD):
            self.buffer.zero_()
        if launches_count:
            torch.cuda.synchronize()
        start.record()
        closure()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


@dataclass(frozen=True)
class Effort:
    """Rounds of a group: at least ``rounds_min``, then until ``seconds`` or ``rounds_max``."""

    warm_up: int
    rounds_min: int
    rounds_max: int
    seconds: float


@dataclass
class Budget:
    seconds: float
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.start)


@dataclass(frozen=True)
class Bench:
    """Where, in which dtype, with which clock and for how long groups are measured.

    ``ceilings``: of the machine, measured in the same run; None leaves out shares of the floor.
    """

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    effort: Effort
    budget: Budget
    ceilings: Ceilings | None = None

    def run(
        self,
        workloads: Sequence[Workload],
        sweeps: Sequence[Sequence[Provider]],
        add: Callable[[list[Row]], None],
        modes: Sequence[str] = (problems.FORWARD, problems.STEP),
    ) -> None:
        """Gives ``add`` the rows of each group as soon as they are measured."""
        groups = [(w, m, p) for p in sweeps for m in modes for w in workloads]
        for workload, mode, providers in progress(groups):
            add(self.measure(workload, mode, providers))

    def measure(self, workload: Workload, mode: str, providers: Sequence[Provider]) -> list[Row]:
        rows = [self._row(workload, mode, p) for p in providers]
        if any(p.compiles for p in providers):
            torch.compiler.reset()
        ready: list[tuple[Row, Provider, Closure]] = []
        problem: Problem | None = None
        for row, provider in zip(rows, providers, strict=True):
            if self.budget.left <= 0:
                row["status"] = OUT_OF_TIME
                continue
            try:
                if problem is None:
                    problem = problems.draw(workload, mode, self.dtype, self.device)
                closure = self._ready(provider, problem.in_format(provider.channels_last), row)
            except Exception as error:
                row["status"] = f"failed: {describe(error)}"
                continue
            if closure is not None:
                ready.append((row, provider, closure))
        self.time_in_turns(ready)
        for row, *_ in ready:
            self._describe(row, workload)
        compare(rows, providers)
        return rows

    def _ready(self, provider: Provider, problem: Problem, row: Row) -> Closure | None:
        """The provider's closure, warmed up and right; None, and a row that says so, if wrong.

        The check comes after the warm-up: what is recorded or compiled late is checked too.
        """
        closure = provider.setup(problem)
        for _ in range(self.effort.warm_up):
            closure()
        problem.show(problem.fresh)
        errors = problem.errors(closure())
        problem.show(problem.features)
        row.update(zip(("error", "error_gradient"), errors, strict=False))
        # Eager's own sums over millions of positions lose digits; that does not make it wrong.
        allowed = problems.TOLERANCE[self.dtype] * (2 if provider.baseline else 1)
        if not all(error <= allowed for error in errors):
            figures = " and ".join(f"{error:.1e}" for error in errors)
            row["status"] = f"disagrees: relative RMS {figures}, allowed {allowed:.0e}"
            return None
        if provider.launch != GRAPH:
            row["peak_bytes"] = peak_bytes(closure, self.device)
            row["launches"] = launches(closure, self.device)
            row["cpu_us"] = host_microseconds(closure, self.device)
        saved = getattr(closure, "saved_bytes", None)
        row["saved_bytes"] = saved() if saved and not provider.compiles else None
        return closure

    def time_in_turns(self, ready: Sequence[tuple[Row, Any, Closure]]) -> None:
        """Rounds over all closures, each round beginning with the next one: all drift alike."""
        times: list[list[float]] = [[] for _ in ready]
        group = Budget(self.effort.seconds, self.budget.clock)
        for turn in range(self.effort.rounds_max if ready else 0):
            if turn >= self.effort.rounds_min and min(group.left, self.budget.left) <= 0:
                break
            for place in range(len(ready)):
                index = (turn + place) % len(ready)
                row, provider, closure = ready[index]
                if row["status"] != OK:
                    continue
                try:
                    ms = self.timer(closure, launches_count=provider.launch != GRAPH)
                    times[index].append(ms)
                except Exception as error:
                    row["status"] = f"failed: {describe(error)}"
        for (row, _, _), taken in zip(ready, times, strict=True):
            if row["status"] == OK:
                quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
                middle, low, high = torch.tensor(taken, dtype=torch.float64).quantile(quantiles)
                row.update(median_ms=middle.item(), p20_ms=low.item(), p80_ms=high.item())
                row["repetitions"] = len(taken)

    def _describe(self, row: Row, workload: Workload) -> None:
        """Rates of a timed row, and its share of the floor."""
        if row["status"] != OK:
            return
        batch, size = workload.batch(self.device), self.dtype.itemsize
        seconds = 1e-3 * row["median_ms"]
        cache = self.ceilings.cache if self.ceilings else Ceilings.cache
        moved = floors.compulsory_bytes(workload, batch, row["mode"], size, cache)
        flop = floors.useful_flop(workload, batch, row["mode"])
        row.update(gb_s=moved / seconds / 1e9, tflop_s=flop / seconds / 1e12)
        if self.ceilings:
            floor = floors.floor(workload, batch, row["mode"], size, self.ceilings)
            row.update(
                floor_ms=1e3 * floor.seconds,
                bound=floor.bound,
                share_of_floor=floor.seconds / seconds,
            )

    def _row(self, workload: Workload, mode: str, provider: Provider) -> Row:
        return {
            "workload": workload.name,
            "n": workload.batch(self.device),
            "c": workload.c,
            "positions": "x".join(map(str, workload.positions)),
            "c_m": workload.c_m,
            "c_n": workload.c_n,
            "heads": workload.heads,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "mode": mode,
            "layout": provider.layout,
            "launch": provider.launch,
            "provider": provider.name,
            "baseline": provider.baseline,
            "status": OK,
        }


def compare(rows: list[Row], providers: Sequence[Any]) -> None:
    """Ratios to others of the group, which has one launch mode.

    To the fastest baseline, to the baseline in the row's own memory format, and to the fastest
    compiled baseline.
    """
    timed = [(r, p) for r, p in zip(rows, providers, strict=True) if r["status"] == OK]
    for row, provider in timed:
        references = {
            "ratio_to_eager": [r for r, p in timed if p.baseline],
            "ratio_same_format": [
                r for r, p in timed if p.baseline and p.channels_last == provider.channels_last
            ],
            "ratio_to_compiled": [r for r, p in timed if p.compiled_baseline],
        }
        for name, others in references.items():
            if others:
                row[name] = min(other["median_ms"] for other in others) / row["median_ms"]


def peak_bytes(closure: Closure, device: torch.device) -> int | None:
    """Most device memory in use during a call beyond what was before; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    prepare(closure)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    closure()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(closure: Closure, device: torch.device) -> int | None:
    """Kernels, copies and fills that a call starts on the device; None where nothing can tell."""
    if device.type == "cpu":
        return None
    from torch.profiler import DeviceType, ProfilerActivity, profile

    prepare(closure)
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            closure()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in seen.events())
    except RuntimeError:  # the driver's profiling interface is not to be had everywhere
        return None


def host_microseconds(closure: Closure, device: torch.device, calls: int = 20) -> float | None:
    """Median time until a call returns, the device's work aside; None on a CPU."""
    if device.type == "cpu":
        return None
    times = []
    for _ in range(calls):
        prepare(closure)
        torch.cuda.synchronize()
        start = time.perf_counter()
        closure()
        times.append(1e6 * (time.perf_counter() - start))
    return sorted(times)[calls // 2]


def progress(items: Sequence[Any]) -> Iterable[Any]:
    """A progress bar where tqdm is installed and stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit="group", disable=None)


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
