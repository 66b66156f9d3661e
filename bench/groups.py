"""Groups of providers, measured in a worker: whatever one of them does costs its own row only.

The worker announces each provider before its setup. Where the process then crashes or hangs, or
CUDA becomes unusable in it, that provider's row says so and the others are measured again, in a new
process. Launches are counted at the end, in a process of their own: a profiler slows what follows.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import ceilings, measure, networks, warm
from .floors import Ceilings
from .isolation import SILENCE, Worker, in_parallel
from .measure import (
    CONTEXT_LOST,
    OK,
    OUT_OF_TIME,
    Bench,
    Budget,
    Effort,
    Row,
    Timer,
    on_gpu,
    progress,
)
from .networks import Network, Variant
from .problems import FORWARD, STEP
from .providers import GRAPH, Closure, Provider
from .workloads import Workload

ATTEMPTS = 3  # of a group, each without the provider that ended the one before
SETUP_SHARE = 0.8  # of the silence that kills a worker, after which a setup is interrupted
AT_ONCE = max(1, min(8, (os.cpu_count() or 2) // 2))  # processes that compile
WARMING_SHARE = 0.2  # of a stage's seconds at most
MARGIN = 3.0  # seconds that a group has to end in after its budget, before it is killed


@dataclasses.dataclass(frozen=True)
class Where:
    """What all groups of a run share. Everything in it is picklable."""

    device: torch.device
    dtype: torch.dtype
    make_timer: Callable[[], Timer]
    effort: Effort
    silence: float = SILENCE  # seconds without a result after which a worker is killed


class Using(NamedTuple):
    """The provider that is set up next, by its place in the group; None while timing."""

    place: int | None


@dataclasses.dataclass
class Spent:
    """Seconds by what they went into; ``imports`` includes starting processes."""

    imports: float = 0.0
    compilation: float = 0.0  # setups and first calls
    checking: float = 0.0  # inputs, the definition in float64, warm-up, memory
    timing: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Spent(*(a + b for a, b in pairs))


# --- in the worker --------------------------------------------------------------------------------


class Watch:
    """Announces setups, ends those that take too long, and adds up the seconds in them and in the
    timer."""

    def __init__(self, send: Callable[[Any], None], where: Where, budget: Budget) -> None:
        self.send, self.where, self.budget = send, where, budget
        self.start = time.perf_counter()
        self.spent = Spent()
        self.using: int | None = None
        self.heard = self.start

    def watched(self, provider: Provider, index: int) -> Provider:
        """The provider, whose setup includes the first call."""

        def setup(problem):
            with self.setting_up(index):
                closure = provider.setup(problem)
                closure()
            return closure

        return dataclasses.replace(provider, setup=setup)

    @contextlib.contextmanager
    def setting_up(self, index: int) -> Iterator[None]:
        """A setup and its first call: announced, ended if it takes too long, and its time added."""
        self._announce(index)
        start = time.perf_counter()
        try:
            with _alarm(min(SETUP_SHARE * self.where.silence, self.budget.left)):
                yield
                if on_gpu(self.where.device):
                    torch.cuda.synchronize()
        finally:
            self.spent.compilation += time.perf_counter() - start

    def timer(self) -> Timer:
        timer = _timer(self.where.make_timer)

        def watched(closure: Closure, **options) -> float:
            start = time.perf_counter()
            if self.using is not None or start - self.heard > 1:
                self._announce(None)
            try:
                return timer(closure, **options)
            finally:
                self.spent.timing += time.perf_counter() - start

        return watched

    def end(self) -> None:
        """Sends what was spent.

        Raises:
            RuntimeError: no other job can run in this process.
        """
        s = self.spent
        s.checking = time.perf_counter() - self.start - s.compilation - s.timing
        self.send(s)
        if not measure.usable(self.where.device):
            raise RuntimeError("CUDA became unusable in this process")

    def _announce(self, index: int | None) -> None:
        self.using, self.heard = index, time.perf_counter()
        self.send(Using(index))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after a number of seconds, if it runs Python then.

    It is gentler than what the parent does: the other providers stay as they are.
    """

    def late(number, frame):
        raise TimeoutError(f"setup and first call took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def _timer(make: Callable[[], Timer]) -> Timer:
    return make()  # with one buffer for the whole process


@dataclasses.dataclass(frozen=True)
class Job:
    """Something that a worker measures within a number of seconds."""

    where: Where
    ceilings: Ceilings | None
    seconds: float

    def __call__(self, send: Callable[[Any], None]) -> None:
        budget = Budget(self.seconds)
        watch = Watch(send, self.where, budget)
        bench = Bench(
            device=self.where.device, dtype=self.where.dtype, timer=watch.timer(),
            effort=self.where.effort, budget=budget, ceilings=self.ceilings,
        )  # fmt: skip
        try:
            self.measure(bench, watch)
        finally:
            gc.collect()
        watch.end()

    def measure(self, bench: Bench, watch: Watch) -> None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Group(Job):
    workload: Workload
    mode: str
    providers: Sequence[Provider]

    def measure(self, bench, watch):
        watched = [watch.watched(p, i) for i, p in enumerate(self.providers)]
        watch.send(bench.measure(self.workload, self.mode, watched))


Timed = tuple[Row, Workload, str, Provider]


@dataclasses.dataclass(frozen=True)
class LaunchCount(Job):
    """The numbers of launches of timed rows, in their order; None where they cannot be counted."""

    timed: Sequence[Timed]

    def measure(self, bench, watch):
        bench.count_launches(self.timed)
        watch.send([row.get("launches") for row, *_ in self.timed])


@dataclasses.dataclass(frozen=True)
class Warming(Job):
    """Calls that compile da_triton's kernels and their launchers, in the cache of all processes."""

    workloads: Sequence[Workload]

    def measure(self, bench, watch):
        for work in self.workloads:
            for channels_last in (False, True):
                if bench.budget.left > 0:
                    warm.step(work, channels_last, bench.dtype, bench.device)
                    watch.send(work.name)


@dataclasses.dataclass(frozen=True)
class NetworkGroup(Job):
    network: Network
    mode: str
    variants: Sequence[Variant]

    def measure(self, bench, watch):
        watch.send(
            networks.measure(bench, self.network, self.mode, self.variants, watch.setting_up)
        )


@dataclasses.dataclass(frozen=True)
class CeilingsJob(Job):
    copy_bytes: int | None
    matrix_size: int | None

    def measure(self, bench, watch):
        sizes = self.copy_bytes, self.matrix_size
        watch.send(ceilings.measure(bench.timer, bench.device, bench.dtype, *sizes))


# --- in the parent --------------------------------------------------------------------------------


class Sweeper:
    """Measures within a budget, in a worker; ``run`` takes what ``Bench.run`` takes."""

    def __init__(
        self, worker: Worker, where: Where, budget: Budget, ceilings: Ceilings | None = None
    ) -> None:
        self.worker, self.where, self.budget = worker, where, budget
        self.ceilings = ceilings
        self.spent = Spent()

    def run(
        self,
        workloads: Sequence[Workload],
        sweeps: Sequence[Sequence[Provider]],
        add: Callable[[list[Row]], None],
        modes: Sequence[str] = (FORWARD, STEP),
    ) -> None:
        # Both modes of a workload, before the next: a run that ends early has whole workloads.
        groups = [
            (w, m, p, place) for place, p in enumerate(sweeps) for w in workloads for m in modes
        ]
        timed: list[Timed] = []
        for workload, mode, providers, place in progress(groups):
            rows = self.group(workload, mode, providers)
            for row in rows:
                row["group"] = str(place)
            add(rows)
            timed += [
                (row, workload, mode, provider)
                for row, provider in zip(rows, providers, strict=True)
                if row["status"] == OK and provider.launch != GRAPH
            ]
        if on_gpu(self.where.device):
            self._count_launches(timed)
            add([])

    def _count_launches(self, timed: Sequence[Timed]) -> None:
        """Completes rows in place, one workload after the other, while there is time."""
        worker, self.worker = self.worker, Worker(self.worker.log)
        try:
            for _, part in itertools.groupby(timed, key=lambda one: one[1:3]):
                if self.budget.left > 0:
                    items = list(part)
                    job = LaunchCount(self.where, None, 0.0, items)
                    found, _, _ = self._measured(job)
                    for (row, *_), count in zip(items, found, strict=False):
                        row["launches"] = count
        finally:
            self.worker.close()
            self.worker = worker

    def group(self, workload: Workload, mode: str, providers: Sequence[Provider]) -> list[Row]:
        """The rows of a group, one for each provider."""
        rows: dict[int, Row] = {}
        left = list(range(len(providers)))
        job = Group(self.where, self.ceilings, 0.0, workload, mode, providers)
        status = OUT_OF_TIME
        for _ in range(ATTEMPTS):
            if self.budget.left <= 0:
                status = OUT_OF_TIME
                break
            chosen = [providers[i] for i in left]
            found, failure, using = self._measured(dataclasses.replace(job, providers=chosen))
            if found:
                rows.update(zip(left, found, strict=True))
                if not any(row["status"] == CONTEXT_LOST for row in found):
                    break
                left = [i for i in left if rows[i]["status"] in (OK, CONTEXT_LOST)]
            elif using is not None:
                culprit = left.pop(using)
                rows[culprit] = self._row(job, culprit, failure)
                status = f"not measured: {failure}"
            else:  # it died while all were timed
                rows.update((i, self._row(job, i, failure)) for i in left)
                break
            if not left:
                break
        for i in range(len(providers)):
            rows.setdefault(i, self._row(job, i, status))
        return [rows[i] for i in range(len(providers))]

    def network(self, network: Network, mode: str, variants: Sequence[Variant]) -> list[Row]:
        job = NetworkGroup(self.where, self.ceilings, 0.0, network, mode, variants)
        found, failure, _ = self._measured(job) if self.budget.left > 0 else ([], OUT_OF_TIME, None)
        row = functools.partial(networks.row, self._bench(), network, mode)
        return found or [row(v) | {"status": failure} for v in variants]

    def measure_ceilings(self, copy_bytes: int | None, size: int | None) -> dict[str, Any]:
        """Measures the ceilings that later groups are compared with; the facts to be recorded."""
        job = CeilingsJob(self.where, None, 0.0, copy_bytes, size)
        found, failure, _ = self._measured(job)
        self.ceilings, facts = found or (None, {"ceilings": failure})
        return facts

    def warm(self, workloads: Sequence[Workload], log: Path) -> list[str]:
        """Compiles da_triton's kernels for workloads in parallel processes, before any timing.

        Returns what went wrong; the measurements will show it again.
        """
        start, count = time.perf_counter(), min(AT_ONCE, len(workloads))
        jobs = [
            Warming(self.where, None, WARMING_SHARE * self.budget.left, list(workloads[i::count]))
            for i in range(count)
        ]
        failures = in_parallel(jobs, WARMING_SHARE * self.budget.left + MARGIN, log)
        self.spent.compilation += time.perf_counter() - start
        return failures

    def _measured(self, job: Job) -> tuple[Any, str, int | None]:
        """Results (empty if none came), what went wrong, and with which provider if one did."""
        found: Any = []
        using: int | None = None

        def receive(value):
            nonlocal found, using
            if isinstance(value, Using):
                using = value.place
            elif isinstance(value, Spent):
                self.spent += value
            else:
                found = value

        seconds, before = self.budget.left, self.worker.imports
        job = dataclasses.replace(job, seconds=max(0.8 * seconds, seconds - MARGIN))
        failure = self.worker.run(job, seconds, receive, self.where.silence)
        self.spent.imports += self.worker.imports - before
        return found, failure, using

    def _row(self, job: Group, place: int, status: str) -> Row:
        row = self._bench()._row(job.workload, job.mode, job.providers[place])
        return row | {"status": status}

    def _bench(self) -> Bench:
        """Only for what it knows of rows: this process measures nothing."""
        where = self.where
        return Bench(
            device=where.device, dtype=where.dtype, timer=_no_timer, effort=where.effort,
            budget=self.budget,
        )  # fmt: skip


def _no_timer(closure: Closure, *, launches_count: bool) -> float:
    raise RuntimeError("groups are measured in a worker")
